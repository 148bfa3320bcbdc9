"""One guest, read by every route that can reach it: the same bytes, the same connections, and nothing of it changed.

It is a domain of a real libvirtd, its RAM is shared, and it has a QMP socket of its own: so the QEMU process (by a
mapping and by process_vm_readv), libvirt, the monitor, LibVMI and dumps of it all tell of the same RAM.
"""

import contextlib
import hashlib
import importlib
import json
import random
from pathlib import Path

import pytest

from appliance.cli import contract
from appliance.hosts.targets import resolve
from appliance.memory.file import open_file
from appliance.memory.libvirt import open_libvirt
from appliance.memory.libvmi import open_libvmi_file
from appliance.memory.monitor import open_monitor
from appliance.memory.qemu import open_qemu
from appliance.opening import open_eye
from tests.worlds.command import parasight
from tests.worlds.side import MIB, RAM, open_side

pytestmark = pytest.mark.system
pytest.importorskip("libvirt")
pytest.importorskip("libvmi")


def look(target, route=None):
    """What a full look tells, as `connections` and `processes` print it, without the name that was asked for."""
    info = resolve(target)
    with contextlib.closing(open_eye(info, thorough=True, route=route)) as eye:
        snapshot = eye.read_snapshot()
    told = [contract.connection("", one) for one in snapshot.sockets]
    told += [contract.process(one) for one in snapshot.processes]
    assert len(snapshot.sockets) > 40
    assert len(snapshot.processes) > 40
    return {json.dumps(body) for body in told}


@pytest.fixture(scope="module")
def side(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("side")
    with open_side(network, folder) as guest, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARASIGHT_LIBVIRT_URI", guest.libvirtd.uri)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield guest


@pytest.fixture(scope="module")
def dumped(side):
    """The guest while it is paused, with its dumps by QEMU itself: raw and ELF."""
    with side.paused():
        side.dump()
        words = ("--memory-only", "--live", "--format", "elf")
        side.libvirtd.virsh("dump", *words, side.domain.name, str(side.folder / "elf"))
        yield side


def regions(memory):
    return [(region.gpa, region.size) for region in memory.regions]


def test_while_it_runs_libvirt_and_the_monitor_tell_what_the_process_tells_and_leave_no_trace(side):
    libvirt = importlib.import_module("libvirt")
    with contextlib.closing(libvirt.open(side.libvirtd.uri)) as connection:
        domain = connection.lookupByUUIDString(side.domain.uuid)
        before = domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), domain.messages(0)
        first, *slowly, last = [look(side.domain.uuid, route) for route in (None, "libvirt", "qmp", None)]
        for told in slowly:  # what was there all the time is told, and nothing that never was
            assert first & last <= told <= first | last
        assert (domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE), domain.messages(0)) == before
        assert domain.info()[0] == libvirt.VIR_DOMAIN_RUNNING
    cache = Path("/proc", str(side.libvirtd.pid), "root", "var/cache/libvirt/qemu")
    assert not [path for path in cache.iterdir() if path.is_file()]  # where memoryPeek keeps what it hands over


def test_every_fast_route_tells_the_same_bytes_of_all_ram(dumped):
    opened = {
        "shared": open_qemu(dumped.pid),
        "plain": dumped.plain(),
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


def test_dumps_and_libvmi_tell_what_the_process_tells(dumped):
    told = look(f"qemu:{dumped.pid}")
    raw = f"file:{dumped.folder / 'raw'}"
    assert look(raw) == told
    assert look(raw, "libvmi") == told
    assert look(f"file:{dumped.folder / 'elf'}") == told


def test_a_person_names_the_route_and_hears_which_there_are(side):
    prefix = ("env", f"PARASIGHT_LIBVIRT_URI={side.libvirtd.uri}")
    words = ("connections", side.domain.uuid, "-o", "json", "--route")
    done = parasight(*words, "libvirt", home=side.folder, prefix=prefix)
    assert done.code == 0, done.err
    assert len(json.loads(done.out)) > 40
    done = parasight(*words, "libvmi", home=side.folder, prefix=prefix)
    assert done.code == 2
    assert "its routes are: qemu, libvirt, qmp" in done.err


def test_where_its_process_cannot_be_seen_libvirt_alone_tells_of_it(side):
    elsewhere = ("env", f"PARASIGHT_LIBVIRT_URI={side.libvirtd.uri}", "unshare", "--pid", "--fork", "--mount-proc")
    done = parasight("connections", "side", "-o", "json", home=side.folder, prefix=elsewhere)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert {body["vm"] for body in told} == {side.domain.uuid}
    assert len(told) > 40
