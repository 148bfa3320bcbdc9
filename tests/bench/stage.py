"""A guest's port on a bridge, and traffic through it: guest -- port -- bridge -- peer, in namespaces of our own.

The sender (``sender.c``) is compiled into a temporary directory. It is bound to one processor and the listeners to
another, where there are two; CPU time is the scheduler's own account, in nanoseconds, and the work of a tap in the
kernel falls into the sender's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tap.world import ip

HERE = Path(__file__).parent
PORT, GUEST_MAC, PEER_MAC = "benchport0", "52:54:00:77:00:02", "52:54:00:77:00:03"
PROCESSORS = sorted(os.sched_getaffinity(0))
SENDING, LISTENING = PROCESSORS[0], PROCESSORS[-1]


@dataclass(frozen=True)
class Sent:
    """What the sender says of one wire: all packets, and its CPU seconds for a packet, slice by slice."""

    packets: int
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Stage:
    """One wire: three namespaces (names as ``ip netns`` knows them), and the sender's program."""

    host: str
    guest: str
    peer: str
    sender: str

    @property
    def host_path(self) -> str:
        return f"/run/netns/{self.host}"

    def inside(self, *words: str) -> list[str]:
        """A command in the host's namespace, on the listeners' processor."""
        return ["ip", "netns", "exec", self.host, "taskset", "-c", str(LISTENING), *words]


def send(stages: Sequence[Stage], kind: str, slices: int, count: int, rate: int = 0) -> list[Sent]:
    """``count`` frames or connections of a kind for each wire in each slice, ``rate`` in a second (0: no limit)."""
    ends = [f"/run/netns/{name}" for stage in stages for name in (stage.guest, stage.peer)]
    command = ["taskset", "-c", str(SENDING), stages[0].sender, kind, str(slices), str(count), str(rate), *ends]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert not said["refused"], f"the sender was refused {said['refused']} frames"
    found = []
    for wire in said["wires"]:
        each = wire["packets"] / slices
        found.append(Sent(wire["packets"], tuple(spent / 1e9 / each for spent in wire["cpu_ns"])))
    return found


def missing() -> str | None:
    """What a stage lacks here."""
    if os.geteuid() != 0:
        return "root"
    return next((tool for tool in ("gcc", "ip", "taskset") if shutil.which(tool) is None), None)


@contextlib.contextmanager
def make_stage(tag: str = "") -> Iterator[Stage]:
    """Build it; nothing is left of it afterwards."""
    names = [f"ps{letter}-bench{tag}-{os.getpid()}" for letter in "hgp"]
    host, guest, peer = names
    with tempfile.TemporaryDirectory(prefix="parasight-bench-") as folder:
        sender = f"{folder}/sender"
        subprocess.run(["gcc", "-O2", "-o", sender, str(HERE / "sender.c")], check=True, timeout=60)
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", host, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
            for port, other, mac in ((PORT, guest, GUEST_MAC), ("peerport0", peer, PEER_MAC)):
                ip("-n", host, "link", "add", port, "type", "veth", "peer", "eth0", "netns", other, "address", mac)
                ip("-n", host, "link", "set", port, "master", "br0")
                _quieten(host, port)
                _quieten(other, "eth0")
            _quieten(host, "br0")
            yield Stage(host, guest, peer, sender)
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


def _quieten(netns: str, device: str) -> None:
    """Up, and silent: without IPv6 nothing is sent that we did not send."""
    switch = f"echo 1 > /proc/sys/net/ipv6/conf/{device}/disable_ipv6"
    subprocess.run(["ip", "netns", "exec", netns, "sh", "-c", switch], check=True, timeout=10)
    ip("-n", netns, "link", "set", device, "up")


def cpu_s(pids: list[int]) -> float:
    """CPU seconds of all threads of the living ones (Documentation/scheduler/sched-stats.rst)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text("ascii").split()[0])
    return total / 1e9


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1]
                )
    found = [pid]
    for one in found:
        found.extend(child for child, parent in parents.items() if parent == one)
    return found
