"""A running guest: QEMU started in the lab's network, and an agent inside that does what it is told.

The agent's and the lab's own monitor channels are socket pairs handed to QEMU, so the guest looks to the appliance
like any other: one tap, and where asked for one QMP socket that nobody else uses.
"""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import tempfile
import time
import uuid as uuids
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from lab.accel import QEMU, accelerator
from lab.agent import Agent
from lab.image import Image
from lab.inside import Inside
from lab.network import NET4, WORLD_IP4, Network, Port
from lab.packages import LabError
from lab.qmp import Qmp

BOOT_S = 120.0

Shared = Literal["memfd", "file"]


class Guest(Inside):
    """A booted guest. Ended, and its files and its tap removed, by `close` or at the end of a `with`."""

    def __init__(
        self, image: Image, network: Network, port: Port, *, process: subprocess.Popen[bytes], folder: Path
    ) -> None:
        self.name = self.uuid = ""
        self.image, self.network = image, network
        self.pid = process.pid
        self.port, self.mac, self.ip4, self.ip6 = port.ifname, port.mac, port.ip4, port.ip6
        self.netns = network.netns
        self.qmp_path: Path | None = None
        self.booted_s = 0.0
        self._process, self._port, self._folder = process, port, folder
        self._agent: Agent | None = None
        self._monitor: Qmp | None = None
        self._connections: list[socket.socket] = []
        atexit.register(self.close)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Execute a command on the lab's own monitor."""
        return self.monitor.command(command, **arguments)

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events QEMU has reported since it started."""
        return self.monitor.events

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            raise LabError(f"guest {self.name} has not booted")
        return self._agent

    @property
    def monitor(self) -> Qmp:
        if self._monitor is None:
            raise LabError(f"guest {self.name} has not booted")
        return self._monitor

    def console(self, lines: int = 30) -> str:
        """The last lines of the serial console."""
        log = self._folder / "console.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def close(self) -> None:
        """End QEMU; may be called twice."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for connection in self._connections:
            connection.close()
        self.network.remove_port(self._port)
        shutil.rmtree(self._folder, ignore_errors=True)

    def connect(self, agent: socket.socket, monitor: socket.socket) -> None:
        """Wait for the agent. What it said before we listened would be lost, so it answers and never speaks first."""
        start = time.monotonic()
        self._connections = [agent, monitor]
        try:
            self._monitor = Qmp(monitor)
            self._agent = Agent(agent)
            while not self._agent.hello(0.5):
                if time.monotonic() - start > BOOT_S:
                    raise LabError(f"no agent after {BOOT_S:.0f} s")
        except LabError as error:
            raise LabError(f"guest {self.name} did not boot: {error}\n{self._last_words()}") from None
        self.booted_s = time.monotonic() - start

    def _last_words(self) -> str:
        return (self._folder / "qemu.log").read_text(errors="replace")[-800:] + "\nconsole:\n" + self.console()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def boot(
    image: Image,
    network: Network,
    *,
    name: str = "guest",
    memory_mb: int = 1024,
    machine: Literal["pc", "q35"] = "pc",
    cpus: int = 1,
    cpu: str = "max",
    shared: Shared | None = None,
    qmp: bool = True,
    extra: Sequence[str] = (),
    uuid: str | None = None,
    append: str = "",
    user_network: str | None = None,
) -> Guest:
    """Boot the image and return when its agent answers. LabError with the console's last lines when it does not.

    `cpu` 'max' has 5-level paging under TCG, 'max,la57=off' has not. `append` goes to the kernel's command line.
    `user_network`: its card has no port, the world's address leads to QEMU's own loopback; options of that network.
    """
    identity = uuid or str(uuids.uuid4())
    folder = Path(tempfile.mkdtemp(prefix="parasight-guest-"))
    port = network.add_port()
    agent, agent_far = socket.socketpair()
    monitor, monitor_far = socket.socketpair()
    kernel_line = (
        f"console=ttyS0 quiet panic=-1 lab.ip4={port.ip4}/24 lab.ip6={port.ip6}/64 lab.name={name} {append}".strip()
    )
    command = [QEMU, "-name", f"guest={name}", "-uuid", identity, "-accel", accelerator(), "-cpu", cpu]
    command += ["-smp", str(cpus), "-m", str(memory_mb), *_machine(machine, memory_mb, shared, folder)]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", kernel_line]
    tap, user = f"tap,id=net0,ifname={port.ifname},script=no,downscript=no", f"user,id=net0,net={NET4},host={WORLD_IP4}"
    command += ["-netdev", tap if user_network is None else f"{user},ipv6=off,{user_network}".rstrip(",")]
    command += ["-device", f"virtio-net-pci,netdev=net0,mac={port.mac}"]
    command += ["-display", "none", "-no-reboot", "-nodefaults", "-serial", f"file:{folder / 'console.log'}"]
    command += ["-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off"] if qmp else []
    command += ["-chardev", f"socket,id=monitor,fd={monitor_far.fileno()}", "-mon", "chardev=monitor,mode=control"]
    command += ["-chardev", f"socket,id=agent,fd={agent_far.fileno()}", "-device", "virtio-serial-pci"]
    command += ["-device", "virtserialport,chardev=agent,name=lab.agent", *extra]
    with (folder / "qemu.log").open("wb") as log, agent_far, monitor_far:
        process = subprocess.Popen(
            network.enter(*command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(agent_far.fileno(), monitor_far.fileno()),
        )
    guest = Guest(image, network, port, process=process, folder=folder)
    guest.name, guest.uuid = name, identity
    guest.qmp_path = folder / "qmp.sock" if qmp else None
    try:
        guest.connect(agent, monitor)
    except BaseException:
        guest.close()
        raise
    return guest


def _machine(machine: str, memory_mb: int, shared: Shared | None, folder: Path) -> list[str]:
    match shared:
        case None:
            return ["-machine", machine]
        case "memfd":
            backend = f"memory-backend-memfd,id=ram0,size={memory_mb}M,share=on"
        case "file":
            backend = f"memory-backend-file,id=ram0,size={memory_mb}M,share=on,mem-path={folder / 'ram'}"
    return ["-object", backend, "-machine", f"{machine},memory-backend=ram0"]
