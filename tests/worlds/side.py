"""A guest that every route on a KVM host reaches: a domain of a real libvirtd with shared RAM and a QMP socket."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from appliance.memory.hostmap import locate
from appliance.memory.process import ProcessMemory
from appliance.memory.qemu import QemuMemory, read_command_line
from appliance.memory.qmp import Monitor
from lab.domain import Domain, boot_parts, make_xml
from lab.image import build
from lab.libvirtd import Libvirtd
from lab.network import WORLD_IP4, WORLD_IP6, Network

IMAGE = "debian-12-cloud"
MIB = 1 << 20
RAM = 384 * MIB
_SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
_MORE = "http://libvirt.org/schemas/domain/qemu/1.0"
_WORKLOAD = "exec python3 -S -E /opt/workloads/sockets.py --count {count} --server {v4} --server6 {v6} --own"


class Side:
    """The guest, and where it can be got at. Files made for it go to ``folder``."""

    def __init__(self, libvirtd: Libvirtd, domain: Domain, folder: Path) -> None:
        self.libvirtd, self.domain, self.folder = libvirtd, domain, folder
        self.pid = libvirtd.qemu_pid(domain.name)
        self.qmp = folder / "qmp"
        descriptors = Path(f"/proc/{self.pid}/fd").iterdir()
        self.ram = next(path for path in descriptors if str(path.readlink()).startswith("/memfd:"))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts, nothing of it changes."""
        self.libvirtd.virsh("suspend", self.domain.name)
        try:
            yield
        finally:
            self.libvirtd.virsh("resume", self.domain.name)

    def dump(self) -> Path:
        """All of RAM as QEMU itself writes it down."""
        path = self.folder / "raw"
        with Monitor(self.qmp, 120) as monitor:
            monitor.execute("pmemsave", val=0, size=RAM, filename=str(path))
        return path

    def plain(self) -> QemuMemory:
        """Its process, read as one whose RAM is not shared."""
        process = ProcessMemory(self.pid)
        return QemuMemory(process, locate(process, read_command_line(self.pid)).spans)


@contextlib.contextmanager
def open_side(network: Network, folder: Path, sockets: int = 48) -> Iterator[Side]:
    """Boot it, and have it hold some sockets."""
    with Libvirtd(network) as libvirtd:
        port = network.next_place()
        kernel, devices = boot_parts(build(IMAGE), port, "side", libvirtd.folder, "")
        domain = Domain("side", str(uuid.uuid4()), port, libvirtd.folder)
        xml = make_xml(domain.name, domain.uuid, RAM // MIB, kernel=kernel, devices=devices)
        argument = f"<more:arg value='-qmp'/><more:arg value='unix:{folder / 'qmp'},server=on,wait=off'/>"
        xml = xml.replace("<domain ", f"<domain xmlns:more='{_MORE}' ").replace("<vcpu>", f"{_SHARED}<vcpu>")
        libvirtd.define(xml.replace("</domain>", f"<more:commandline>{argument}</more:commandline></domain>"))
        libvirtd.virsh("start", domain.name)
        try:
            domain.connect()
            domain.spawn(_WORKLOAD.format(count=sockets, v4=WORLD_IP4, v6=WORLD_IP6)).wait_for("READY", 120)
            yield Side(libvirtd, domain, folder)
        finally:
            domain.disconnect()
