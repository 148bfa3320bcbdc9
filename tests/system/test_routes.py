"""One guest, read by every route that can reach it: the same bytes, the same connections, and nothing of it changed.

It is a domain of a real libvirtd, its RAM is shared, and it has a QMP socket of its own: so the QEMU process (by a
mapping and by process_vm_readv), libvirt, the monitor, LibVMI and dumps of it all tell of the same RAM.
"""

import contextlib
import hashlib
import importlib
import json
import random
import uuid
from pathlib import Path

import pytest

from appliance.memory.file import open_file
from appliance.memory.hostmap import locate
from appliance.memory.libvirt import open_libvirt
from appliance.memory.libvmi import open_libvmi_file
from appliance.memory.monitor import open_monitor
from appliance.memory.process import ProcessMemory
from appliance.memory.qemu import QemuMemory, open_qemu, read_command_line
from appliance.memory.qmp import Monitor
from lab.domain import Domain, boot_parts, make_xml
from lab.image import build
from lab.libvirtd import Libvirtd
from lab.network import WORLD_IP4, WORLD_IP6
from tests.worlds.command import parasight

pytestmark = pytest.mark.system
pytest.importorskip("libvirt")
pytest.importorskip("libvmi")

MIB = 1 << 20
RAM = 384 * MIB
SHARED = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
MORE = "http://libvirt.org/schemas/domain/qemu/1.0"
WORKLOAD = f"exec python3 -S -E /opt/workloads/sockets.py --count 48 --server {WORLD_IP4} --server6 {WORLD_IP6} --own"


class Side:
    """The guest, its dumps, and how it is named."""

    def __init__(self, libvirtd, domain, folder):
        self.libvirtd, self.domain, self.folder = libvirtd, domain, folder
        self.pid = libvirtd.qemu_pid(domain.name)
        self.qmp = folder / "qmp"
        descriptors = Path(f"/proc/{self.pid}/fd").iterdir()
        self.ram = next(path for path in descriptors if str(path.readlink()).startswith("/memfd:"))

    def look(self, verb, *words, target=None):
        """What a verb tells of it, without the name by which it was asked for."""
        prefix = ("env", f"PARASIGHT_LIBVIRT_URI={self.libvirtd.uri}")
        done = parasight(verb, target or self.domain.uuid, *words, "-o", "json", home=self.folder, prefix=prefix)
        assert done.code == 0, done.err
        return sorted(json.dumps({key: body[key] for key in body if key != "vm"}) for body in json.loads(done.out))


@pytest.fixture(scope="module")
def side(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("side")
    with Libvirtd(network) as libvirtd, contextlib.ExitStack() as stack:
        port = network.next_place()
        kernel, devices = boot_parts(build("debian-12-cloud"), port, "side", libvirtd.folder, "")
        domain = Domain("side", str(uuid.uuid4()), port, libvirtd.folder)
        xml = make_xml(domain.name, domain.uuid, RAM // MIB, kernel=kernel, devices=devices)
        argument = f"<more:arg value='-qmp'/><more:arg value='unix:{folder / 'qmp'},server=on,wait=off'/>"
        xml = xml.replace("<domain ", f"<domain xmlns:more='{MORE}' ").replace("<vcpu>", f"{SHARED}<vcpu>")
        libvirtd.define(xml.replace("</domain>", f"<more:commandline>{argument}</more:commandline></domain>"))
        libvirtd.virsh("start", domain.name)
        stack.callback(domain.disconnect)
        domain.connect()
        domain.spawn(WORKLOAD).wait_for("READY", 120)
        yield Side(libvirtd, domain, folder)


@pytest.fixture(scope="module")
def dumped(side):
    """The guest while it is paused, with its dumps by QEMU itself: raw and ELF."""
    side.libvirtd.virsh("suspend", "side")
    with Monitor(side.qmp, 60) as monitor:
        monitor.execute("pmemsave", val=0, size=RAM, filename=str(side.folder / "raw"))
    side.libvirtd.virsh("dump", "--memory-only", "--live", "--format", "elf", "side", str(side.folder / "elf"))
    yield side
    side.libvirtd.virsh("resume", "side")


def plain(pid):
    """The same process as one whose RAM is not shared."""
    process = ProcessMemory(pid)
    return QemuMemory(process, locate(process, read_command_line(pid)).spans)


def regions(memory):
    return [(region.gpa, region.size) for region in memory.regions]


def test_while_it_runs_libvirt_and_the_monitor_tell_what_the_process_tells_and_leave_no_trace(side):
    libvirt = importlib.import_module("libvirt")
    with contextlib.closing(libvirt.open(side.libvirtd.uri)) as connection:
        domain = connection.lookupByUUIDString(side.domain.uuid)
        before = domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), domain.messages(0)
        looks = [("connections", "libvirt"), ("connections", "qmp"), ("processes", "libvirt")]
        told = {verb: side.look(verb) for verb, _ in looks}
        slowly = [(verb, side.look(verb, "--route", route)) for verb, route in looks]
        again = {verb: side.look(verb) for verb, _ in looks}
        for verb, seen in slowly:  # what was there all the time is told, and nothing that never was
            assert set(told[verb]) & set(again[verb]) <= set(seen) <= set(told[verb]) | set(again[verb])
            assert len(seen) > 40
        assert (domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), domain.messages(0)) == before
        assert domain.info()[0] == libvirt.VIR_DOMAIN_RUNNING
    cache = Path(f"/proc/{side.libvirtd.pid}/root/var/cache/libvirt/qemu")
    assert not [path for path in cache.iterdir() if path.is_file()]  # where memoryPeek keeps what it hands over


def test_every_fast_route_tells_the_same_bytes_of_all_ram(dumped):
    opened = {
        "shared": open_qemu(dumped.pid),
        "plain": plain(dumped.pid),
        "raw": open_file(dumped.folder / "raw"),
        "elf": open_file(dumped.folder / "elf"),
        "libvmi, dump": open_libvmi_file(dumped.folder / "raw"),
        "libvmi, live RAM": open_libvmi_file(dumped.ram),
    }
    assert opened["shared"].name == "qemu-shared"
    assert regions(opened["shared"]) == regions(opened["plain"]) == [(0, 0xA0000), (MIB, RAM - MIB)]
    with (dumped.folder / "raw").open("rb") as truth, contextlib.ExitStack() as stack:
        for memory in opened.values():
            stack.callback(memory.close)
        for gpa, size in regions(opened["shared"]):
            for start in range(gpa, gpa + size, MIB):
                count = min(MIB, gpa + size - start)
                truth.seek(start)
                digest = hashlib.blake2b(truth.read(count)).digest()
                told = {name: hashlib.blake2b(one.read(start, count)).digest() for name, one in opened.items()}
                assert set(told.values()) == {digest}, [name for name in told if told[name] != digest]


def test_every_slow_route_tells_the_same_bytes_of_spans_all_over_ram(dumped):
    places = random.Random(4)
    spans = [(0, 4096), (0xA0000 - 5, 5), (MIB, 9), (RAM - 4096, 4096), (RAM - 1, 1), (MIB - 4, 8), (RAM - 4, 8)]
    spans += [(places.randrange(MIB, RAM - 8192), places.randrange(1, 8192)) for _ in range(300)]
    spans += [(200 * MIB + 4096 * page, 4096) for page in range(400)]
    raw = (dumped.folder / "raw").read_bytes()
    truth = [None if gpa in (MIB - 4, RAM - 4) else raw[gpa : gpa + size] for gpa, size in spans]
    opened = {
        "libvirt": open_libvirt(dumped.domain.uuid, pid=dumped.pid, uri=dumped.libvirtd.uri),
        "libvirt, by its XML": open_libvirt(dumped.domain.uuid, uri=dumped.libvirtd.uri),
        "qmp": open_monitor(dumped.pid),
    }
    for name, memory in opened.items():
        with contextlib.closing(memory):
            assert regions(memory) == [(0, 0xA0000), (MIB, RAM - MIB)], name
            assert memory.readv(spans) == truth, name
            for (gpa, size), data in list(zip(spans, truth, strict=True))[7:40]:
                assert memory.read(gpa, size) == data, name


@pytest.mark.parametrize("verb", ["connections", "processes"])
def test_dumps_and_libvmi_tell_what_the_process_tells(dumped, verb):
    told = dumped.look(verb, target=f"qemu:{dumped.pid}")
    assert len(told) > 30
    raw = f"file:{dumped.folder / 'raw'}"
    assert dumped.look(verb, target=raw) == told
    assert dumped.look(verb, target=f"file:{dumped.folder / 'elf'}") == told
    assert dumped.look(verb, "--route", "libvmi", target=raw) == told


def test_a_route_that_is_not_there_is_refused_with_those_that_are(side):
    prefix = ("env", f"PARASIGHT_LIBVIRT_URI={side.libvirtd.uri}")
    done = parasight("connections", side.domain.uuid, "--route", "libvmi", home=side.folder, prefix=prefix)
    assert done.code == 2
    assert "its routes are: qemu, libvirt, qmp" in done.err
