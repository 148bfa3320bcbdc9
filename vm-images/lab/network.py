"""The lab's network: two network namespaces, so that no packet of a test ever reaches the host's own.

    host namespace                      world namespace
    tap1, tap2 ... ── br0 ── world0 ════ eth0   10.77.0.1, fd77::1

QEMU runs in the host namespace, servers and clients in the world. The n-th guest has 10.77.0.(10+n) and fd77::(10+n).
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from lab.packages import LabError

NET4 = "10.77.0.0/24"
WORLD_IP4, WORLD_IP6 = "10.77.0.1", "fd77::1"
BRIDGE = "br0"

_counter = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Port:
    """A guest's place on the bridge."""

    ifname: str
    mac: str
    ip4: str
    ip6: str


class Network:
    """A bridge and a world. `netns` and `world` are names as `ip netns` knows them."""

    def __init__(self) -> None:
        stem = f"lab-{os.getpid()}-{next(_counter)}"
        self.netns = f"{stem}-host"
        self.world = f"{stem}-world"
        self._ports = 0
        self._open = False

    def __enter__(self) -> Self:
        _unwind_on_signals()
        atexit.register(self.close)
        self._open = True
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove both namespaces; what was in them goes with them."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        for name in (self.world, self.netns):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def enter(self, *command: str, world: bool = False) -> list[str]:
        """The command line that runs a command in the namespace. It stays one process, so its pid is the command's."""
        return ["nsenter", f"--net={self.path(world=world)}", *command]

    def path(self, *, world: bool = False) -> Path:
        """The namespace's file, for setns(2)."""
        return Path("/run/netns", self.world if world else self.netns)

    def add_port(self) -> Port:
        """A new tap on the bridge."""
        port = self.next_place()
        _run(*self.enter("ip", "tuntap", "add", port.ifname, "mode", "tap", "vnet_hdr"))
        _run(*self.enter("ip", "link", "set", port.ifname, "master", BRIDGE, "up"))
        return port

    def next_place(self) -> Port:
        """The addresses of the next guest, whose tap somebody else makes under this name."""
        self._ports += 1
        number = 10 + self._ports
        return Port(f"tap{self._ports}", f"52:54:00:77:00:{number:02x}", f"10.77.0.{number}", f"fd77::{number:x}")

    def remove_port(self, port: Port) -> None:
        """Take the tap away again."""
        if self._open:
            subprocess.run(self.enter("ip", "link", "del", port.ifname), check=False, capture_output=True)

    def _make(self) -> None:
        for name in (self.netns, self.world):
            _run("ip", "netns", "add", name)
        for world in (False, True):
            for scope in ("all", "default"):
                conf = f"net.ipv6.conf.{scope}"
                _run(*self.enter("sysctl", "-qw", f"{conf}.accept_dad=0", f"{conf}.accept_ra=0", world=world))
            _run(*self.enter("ip", "link", "set", "lo", "up", world=world))
        bridge = ["type", "bridge", "mcast_snooping", "0", "stp_state", "0", "forward_delay", "0"]
        _run(*self.enter("ip", "link", "add", BRIDGE, *bridge))
        _run(*self.enter("ip", "link", "add", "world0", "type", "veth", "peer", "name", "eth0", "netns", self.world))
        _run(*self.enter("ip", "link", "set", "world0", "master", BRIDGE, "up"))
        _run(*self.enter("ip", "link", "set", BRIDGE, "up"))
        _run(*self.enter("ip", "addr", "add", f"{WORLD_IP4}/24", "dev", "eth0", world=True))
        _run(*self.enter("ip", "addr", "add", f"{WORLD_IP6}/64", "dev", "eth0", "nodad", world=True))
        _run(*self.enter("ip", "link", "set", "eth0", "up", world=True))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise LabError(f"{command[0]} is missing; remedy: apt-get install iproute2 util-linux procps") from None
    if done.returncode != 0:
        raise LabError(f"`{' '.join(command)}` failed: {done.stderr.strip()}\nremedy: run as root")


def _unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the program like an exception, so that everything opened is closed."""
    if threading.current_thread() is not threading.main_thread():
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, unwind)
