"""A Xen host in QEMU: hypervisor, dom0 with this checkout of Parasight in it, and a PVH domain that is the lab's guest.

    QEMU, always emulated: a domain needs virtualization inside the machine
      Xen ── dom0: /usr/bin/parasight, agent
         │     xenbr0 ── vif1.0 ══ the domain's eth0, 10.77.0.11, fd77::b
         │        └───── world0 ══ eth0 in the network namespace `world`, 10.77.0.1, fd77::1
         └─ domain: the guest's programs; its agent on its console, relayed by dom0

`python -m lab.xen COMMAND...` boots such a host with one domain, runs the command in dom0, and ends with its exit code.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from lab.accel import QEMU
from lab.agent import Agent, CompletedRun, Job
from lab.inside import Inside
from lab.packages import LabError
from lab.world import NAMES
from lab.xenimage import XenImage, build_xen, checkout_archive

BOOT_S, DOMAIN_BOOT_S = 240.0, 180.0  # four times what two busy cores need
# Emulated: SMAP faults the interrupt return of a paravirtual dom0, and RDTSCP is reported as another instruction.
CPU = "max,-smap,-rdtscp"
DOMAIN_IP4, DOMAIN_IP6, DOMAIN_MAC = "10.77.0.11", "fd77::b", "00:16:3e:77:00:0b"
DOMAIN_UUID = "7a1e9c5e-3d0f-4a59-9a4c-0123456789ab"
LINES = ("agent", "guest", "parasight")
KERNEL, RAMDISK = "/opt/domain/vmlinuz", "/opt/domain/initramfs"


class Domain(Inside):
    """The newest domain. The agent stays the same over a reboot; what ran before is never heard of again."""

    ip4, ip6, mac = DOMAIN_IP4, DOMAIN_IP6, DOMAIN_MAC

    def __init__(self, agent: Agent, name: str, uuid: str) -> None:
        self.name, self.uuid, self._agent = name, uuid, agent

    @property
    def agent(self) -> Agent:
        return self._agent

    def wait_booted(self, timeout_s: float = DOMAIN_BOOT_S) -> None:
        """Return when its agent answers. LabError when it does not in time."""
        end = time.monotonic() + timeout_s
        while not self._agent.hello(1.0):
            if time.monotonic() > end:
                raise LabError(f"domain {self.name} did not boot within {timeout_s:.0f} s")


class XenHost(Inside):
    """A booted Xen host; commands, files and truth are those of dom0. Ended by `close` or at the end of a `with`."""

    def __init__(self, image: XenImage, *, memory_mb: int = 2048, dom0_mb: int = 1024, cpus: int = 2) -> None:
        self.booted_s = 0.0
        self._folder = Path(tempfile.mkdtemp(prefix="parasight-xen-"))
        near, far = zip(*(socket.socketpair() for _ in LINES), strict=True)
        self._connections = near
        self._agents: list[Agent] = []
        self._put_together(image)
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                # By whatever death we die, it does not outlive us.
                ["setpriv", "--pdeathsig", "KILL", *self._command(image, memory_mb, dom0_mb, cpus, far)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[end.fileno() for end in far],
            )
        self.pid = self._process.pid
        for end in far:
            end.close()
        atexit.register(self.close)

    @property
    def agent(self) -> Agent:
        if not self._agents:
            raise LabError("the Xen host has not booted")
        return self._agents[0]

    def wait_booted(self) -> Self:
        """Return when dom0's agent answers. LabError with the console's last lines when it does not."""
        start = time.monotonic()
        self._agents = [Agent(connection) for connection in self._connections]
        while not self.agent.hello(0.5):
            if time.monotonic() - start > BOOT_S or self._process.poll() is not None:
                raise LabError(f"the Xen host did not boot\n{self.console()}")
        self.booted_s = time.monotonic() - start
        return self

    def create(self, name: str = "web-01", *, uuid: str = DOMAIN_UUID, memory_mb: int = 384, max_mb: int = 0) -> Domain:
        """Start a domain, with its card on the bridge. It boots on by itself: `wait_booted` waits for it."""
        line = f"console=hvc0 quiet panic=-1 lab.ip4={DOMAIN_IP4}/24 lab.ip6={DOMAIN_IP6}/64 lab.name={name}"
        config = {"name": name, "uuid": uuid, "type": "pvh", "kernel": KERNEL, "ramdisk": RAMDISK, "extra": line}
        lines = [f"{key}={json.dumps(value)}" for key, value in config.items()]
        lines += [f"memory={memory_mb}", f"maxmem={max_mb or memory_mb}", "vcpus=1"]
        lines += [f'vif=["mac={DOMAIN_MAC},bridge=xenbr0"]', 'on_crash="preserve"']
        self.put(f"/etc/xen/{name}.cfg", "\n".join(lines).encode() + b"\n")
        self.must("xl", "create", f"/etc/xen/{name}.cfg", timeout_s=120)
        return Domain(self._agents[1], name, uuid)

    def must(self, *command: str, timeout_s: float = 60.0) -> str:
        """What a command in dom0 printed. LabError when it failed."""
        done = self.run(list(command), timeout_s)
        if done.returncode != 0:
            raise LabError(f"in dom0, `{' '.join(command)}` failed ({done.returncode}): {done.stderr[-800:]}")
        return done.stdout

    def parasight(self, *arguments: str, timeout_s: float = 120.0) -> CompletedRun:
        """Run `parasight` in dom0 to its end; words NAME=VALUE before the arguments go into its environment."""
        job = self.watch(*arguments)
        try:
            return job.wait(timeout_s)
        except TimeoutError:
            job.kill()
            raise

    def watch(self, *arguments: str) -> Job:
        """Start `parasight` in dom0, in a fork of a process that has imported it, and let it run."""
        return self._agents[2].spawn(list(arguments))

    def world(self) -> Job:
        """Start the servers of `lab.world` in the world's network namespace; listening when this returns."""
        job = self.spawn(["ip", "netns", "exec", "world", *_WORLD, "serve", json.dumps(NAMES)])
        job.wait_for("READY", 60)
        return job

    def call(self, addresses: Sequence[str], *, tcp: Sequence[int] = (), seconds: float = 5.0, **bounds: float) -> Job:
        """Start a caller (`lab.world.Caller`) in the world: clients of the domain's servers."""
        every = {"seconds": seconds, "count": 1_000_000, "pause_s": 0.2, "hold_s": 0.1, **bounds}
        orders = json.dumps([list(addresses), list(tcp), [], 1, every])
        return self.spawn(["ip", "netns", "exec", "world", *_WORLD, "call", orders])

    def console(self, lines: int = 40) -> str:
        """The last lines of the hypervisor's console, which is dom0's, too."""
        text = "".join(
            path.read_text(errors="replace")
            for path in (self._folder / "qemu.log", self._folder / "console.log")
            if path.exists()
        )
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """End QEMU; may be called twice."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for connection in self._connections:
            connection.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _put_together(self, image: XenImage) -> None:
        """dom0's root: the lab's, Xen's packages, this checkout, and the domain's two files."""
        checkout_archive(self._folder / "checkout.lz4", image)
        parts = [image.dom0.initramfs, image.dom0_more, self._folder / "checkout.lz4"]
        with (self._folder / "dom0").open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())

    def _command(
        self, image: XenImage, memory_mb: int, dom0_mb: int, cpus: int, lines: Sequence[socket.socket]
    ) -> list[str]:
        command = [QEMU, "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", CPU, "-smp", str(cpus)]
        command += ["-m", str(memory_mb), "-display", "none", "-nodefaults", "-no-reboot", "-net", "none"]
        command += ["-serial", f"file:{self._folder / 'console.log'}", "-kernel", str(image.hypervisor)]
        command += ["-initrd", f"{image.dom0.kernel} console=hvc0 loglevel=4,{self._folder / 'dom0'}"]
        command += ["-append", f"console=com1 com1=115200,8n1 dom0_mem={dom0_mb}M,max:{dom0_mb}M dom0_max_vcpus=1"]
        command += ["-device", "virtio-serial-pci"]
        for name, line in zip(LINES, lines, strict=True):
            command += ["-chardev", f"socket,id={name},fd={line.fileno()}"]
            command += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
        return command

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_WORLD = ("/usr/bin/python3", "-I", "/opt/lab/world.py")


def boot_xen(image: XenImage | None = None, *, memory_mb: int = 2048, dom0_mb: int = 1024, cpus: int = 2) -> XenHost:
    """Boot a Xen host and return when dom0's agent answers."""
    host = XenHost(image or build_xen(), memory_mb=memory_mb, dom0_mb=dom0_mb, cpus=cpus)
    try:
        return host.wait_booted()
    except BaseException:
        host.close()
        raise


def _main() -> int:
    parser = argparse.ArgumentParser(prog="lab.xen", description="Run a command in the dom0 of a Xen host.")
    parser.add_argument("--no-domain", action="store_true", help="start no domain")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    start = time.monotonic()

    def say(message: str) -> None:
        print(f"lab.xen: {time.monotonic() - start:5.1f} s: {message}", file=sys.stderr, flush=True)

    image = build_xen(say)
    say("booting")
    with boot_xen(image) as host:
        say("dom0 is up")
        if not options.no_domain:
            host.create().wait_booted()
            say("the domain is up")
        command = options.command[0] if len(options.command) == 1 else options.command
        done = host.run(command, options.timeout)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        say(f"ended with {done.returncode}")
        return done.returncode


if __name__ == "__main__":
    sys.exit(_main())
