"""A lab guest as a libvirt domain: its XML, and the way to the agent inside."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from xml.sax.saxutils import quoteattr

from lab.accel import QEMU, accelerator
from lab.agent import Agent
from lab.image import Image
from lab.inside import Inside
from lab.network import BRIDGE, Port
from lab.packages import LabError

BOOT_S = 180.0
TEMPLATE = """\
<domain type='{accel}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  {metadata}
  <memory unit='MiB'>{memory_mb}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{kernel}</os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_crash>preserve</on_crash>
  <devices>
    <emulator>/usr/bin/{qemu}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <panic model='isa'/>
    {devices}
  </devices>
</domain>
"""


def make_xml(name: str, uuid: str, memory_mb: int, *, kernel: str = "", devices: str = "", metadata: str = "") -> str:
    """A domain of this machine's accelerator. ``metadata`` goes into its element of that name."""
    return TEMPLATE.format(
        accel="kvm" if accelerator() == "kvm" else "qemu",
        name=name,
        uuid=uuid,
        memory_mb=memory_mb,
        kernel=kernel,
        devices=devices,
        metadata=f"<metadata>{metadata}</metadata>" if metadata else "",
        qemu=QEMU,
    )


def card_xml(port: Port) -> str:
    """A card on the lab's bridge; libvirt makes its tap, under the port's name."""
    return (
        f"<interface type='bridge'><source bridge='{BRIDGE}'/><mac address='{port.mac}'/>"
        f"<target dev='{port.ifname}'/><model type='virtio'/></interface>"
    )


def boot_parts(image: Image, port: Port, name: str, folder: Path, append: str) -> tuple[str, str]:
    """What boots a lab image: its kernel, and the devices that the agent and the console need."""
    line = f"console=ttyS0 quiet panic=-1 lab.ip4={port.ip4}/24 lab.ip6={port.ip6}/64 lab.name={name} {append}".strip()
    kernel = f"<kernel>{image.kernel}</kernel><initrd>{image.initramfs}</initrd><cmdline>{line}</cmdline>"
    console = quoteattr(str(folder / f"{name}.log"))
    agent = quoteattr(str(folder / f"{name}.agent"))
    return kernel, (
        card_xml(port)
        + f"<serial type='file'><source path={console}/></serial>"
        + f"<channel type='unix'><source mode='bind' path={agent}/><target type='virtio' name='lab.agent'/></channel>"
    )


class Domain(Inside):
    """A booted lab image under libvirt."""

    def __init__(self, name: str, uuid: str, port: Port, folder: Path) -> None:
        self.name, self.uuid, self.folder = name, uuid, folder
        self.port, self.mac, self.ip4, self.ip6 = port.ifname, port.mac, port.ip4, port.ip6
        self._agent: Agent | None = None
        self._connection: socket.socket | None = None

    @property
    def agent(self) -> Agent:
        if self._agent is None:
            raise LabError(f"domain {self.name} has not booted")
        return self._agent

    def connect(self, timeout_s: float = BOOT_S) -> None:
        """Wait for the agent of this life; to be called again after each start. LabError with the console's end."""
        self.disconnect()
        end = time.monotonic() + timeout_s
        while True:
            self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._connection.connect(str(self.folder / f"{self.name}.agent"))
                break
            except OSError:
                self._connection.close()
                self._check(end)
                time.sleep(0.1)
        self._agent = Agent(self._connection)
        while not self._agent.hello(0.5):
            self._check(end)

    def disconnect(self) -> None:
        """Leave the agent."""
        if self._connection is not None:
            self._connection.close()
        self._agent = self._connection = None

    def console(self, lines: int = 30) -> str:
        """The last lines of the serial console."""
        log = self.folder / f"{self.name}.log"
        return "\n".join((log.read_text(errors="replace") if log.exists() else "").splitlines()[-lines:])

    def _check(self, end: float) -> None:
        if time.monotonic() > end:
            raise LabError(f"domain {self.name} did not boot\nconsole:\n{self.console()}")
