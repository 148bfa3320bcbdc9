"""libvirt's memoryPeek: against libvirt's own test driver, and a real libvirtd that gets stuck and restarts."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from appliance.errors import GuestGone, HostError, UnreadableMemory, UsageError
from appliance.memory.domainxml import parse_domain
from appliance.memory.layout import extents
from appliance.memory.libvirt import CHUNK, GAP, Domain, LibvirtMemory, open_libvirt
from appliance.model import Region
from appliance.ports import GuestMemory
from lab.libvirtd import Libvirtd
from lab.network import Network

libvirt = pytest.importorskip("libvirt")

UUID = "11111111-2222-3333-4444-555555555555"
MIB = 1 << 20
XML = """<domain type='test'><name>d1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>
<memory unit='MiB'>64</memory><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>{more}</domain>"""


def pattern(gpa, size):
    """What the test driver has at an address."""
    return bytes(position & 0xFF for position in range(gpa, gpa + size))


class CountedDomain(Domain):
    """Counts what is asked of libvirt."""

    asked = 0

    def peek(self, gpa, size):
        self.asked += 1
        return super().peek(gpa, size)


@pytest.fixture
def node(tmp_path):
    path = tmp_path / "node.xml"
    path.write_text(f"<node>{XML.format(more='')}</node>")
    return f"test://{path}"


@pytest.fixture
def default():
    """A domain whose state is shared by all connections of this process."""
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    yield domain
    if not domain.isActive():
        domain.create()
    connection.close()


def test_the_map_comes_from_the_xml_and_the_bytes_from_libvirt(node):
    with contextlib.closing(open_libvirt(UUID, uri=node)) as memory:
        assert isinstance(memory, GuestMemory)
        assert memory.regions == (Region(0, 0xA0000), Region(0x100000, 63 * MIB))
        assert memory.read(0x1234, 8) == pattern(0x1234, 8)
        assert memory.read(3 * MIB - 5, 2 * CHUNK + 10) == pattern(3 * MIB - 5, 2 * CHUNK + 10)
        assert memory.vcpus() == ()
        memory.check_alive()


def test_memory_that_was_plugged_in_is_not_left_out_in_silence_where_the_process_is_seen(tmp_path):
    path, device = tmp_path / "node.xml", "<target><size unit='MiB'>32</size><node>0</node></target>"
    xml = XML.format(more=f"<devices><memory model='dimm'>{device}</memory></devices>")
    numa = "<cpu><numa><cell id='0' cpus='0' memory='32' unit='MiB'/></numa></cpu>"
    xml = xml.replace("<os>", f"<maxMemory slots='2' unit='MiB'>512</maxMemory><vcpu>1</vcpu>{numa}<os>")
    path.write_text(f"<node>{xml}</node>")
    command = ["qemu-system-x86_64", "-c", "input()", "-machine", "q35", "-m", "64", "-uuid", UUID]
    with subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE) as process:
        with pytest.raises(HostError, match=r"a memory device \(dimm\)"):
            open_libvirt(UUID, pid=process.pid, uri=f"test://{path}").close()
        process.kill()


@pytest.mark.parametrize(("gib", "known"), [(1000, True), (1020, False)])
def test_a_map_that_depends_on_the_processor_is_refused(tmp_path, gib, known):
    path = tmp_path / "node.xml"
    path.write_text(f"<node>{XML.format(more='').replace('MiB', 'GiB').replace('>64<', f'>{gib}<')}</node>")
    if known:
        with contextlib.closing(open_libvirt(UUID, uri=f"test://{path}")) as memory:
            assert memory.regions[-1] == Region(1 << 32, (gib - 2) << 30)
    else:
        with pytest.raises(HostError, match="machine type"):
            open_libvirt(UUID, uri=f"test://{path}")


def test_zeros_are_never_asked_for_where_there_is_no_ram(node):
    with contextlib.closing(open_libvirt(UUID, uri=node)) as memory:  # the driver answers for any address
        spans = [(64 * MIB - 4, 4), (64 * MIB - 4, 8), (0xB8000, 4), (1 << 40, 8), (-8, 8), (0x2000, -1)]
        assert memory.readv(spans) == [pattern(64 * MIB - 4, 4), *[None] * 5]
        for gpa, size in spans[1:]:
            with pytest.raises(UnreadableMemory, match="not RAM"):
                memory.read(gpa, size)


def test_neighbours_are_asked_for_at_once_and_each_gets_its_bytes(node):
    domain = CountedDomain(node, UUID)
    with contextlib.closing(LibvirtMemory(domain, [Region(0, 64 * MIB)])) as memory:
        spans = [(gpa, 16) for gpa in range(40 * MIB, 41 * MIB, 4096)] + [(100, 3), (100 + GAP + 4, 5)]
        assert memory.readv(spans[::-1]) == [pattern(gpa, size) for gpa, size in spans[::-1]]
        assert domain.asked == 3


def test_another_life_of_the_domain_is_not_read(default):
    with contextlib.closing(LibvirtMemory(Domain("test:///default", default.UUIDString()), [Region(0, MIB)])) as memory:
        assert memory.read(16, 4) == pattern(16, 4)
        default.destroy()
        with pytest.raises(GuestGone, match="does not run"):
            memory.read(16, 4)
        default.create()
        for again in (memory.check_alive, lambda: memory.read(16, 4), lambda: memory.readv([(16, 4)])):
            with pytest.raises(GuestGone, match="started again"):
                again()


def test_a_domain_that_is_off_or_unknown_cannot_be_opened(default, node):
    default.destroy()
    with pytest.raises(UsageError, match="does not run"):
        open_libvirt(default.UUIDString(), uri="test:///default")
    with pytest.raises(UsageError, match="no domain"):
        open_libvirt("00000000-0000-0000-0000-000000000001", uri=node)


def test_a_libvirt_that_is_not_there_is_the_hosts_trouble(tmp_path):
    with pytest.raises(HostError, match="Failed to connect socket"):
        open_libvirt(UUID, uri=f"qemu+unix:///system?socket={tmp_path / 'nobody'}")


def test_while_a_call_has_not_come_back_no_other_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("appliance.memory.libvirt.OPEN_S", 0.3)
    uri = f"qemu+unix:///system?socket={tmp_path / 'silent'}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent"))
        listener.listen()
        before = threading.active_count()
        with pytest.raises(HostError, match=r"0\.3 s"):
            open_libvirt(UUID, uri=uri)
        for _ in range(20):
            with pytest.raises(HostError, match="an earlier call is still out"):
                open_libvirt(UUID, uri=uri)
        assert threading.active_count() <= before + 1
    end_s = time.monotonic() + 60
    while True:
        with pytest.raises(HostError) as caught:
            open_libvirt(UUID, uri=uri)
        if "still out" not in str(caught.value):
            break
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_closed_memory_reads_nothing(node):
    memory = open_libvirt(UUID, uri=node)
    memory.close()
    memory.close()
    with pytest.raises(UnreadableMemory):
        memory.read(0, 1)
    assert memory.readv([(0, 1)]) == [None]


@pytest.mark.parametrize(
    ("machine", "memory", "runs"),
    [
        ("pc-i440fx-7.2", "<memory unit='GiB'>5</memory>", [(0, 0xA0000), (MIB, 0xBFF00000), (1 << 32, 2 << 30)]),
        ("q35", "<memory>1048576</memory>", [(0, 0xA0000), (MIB, 1023 * MIB)]),
        (
            "pc-q35-rhel9.4.0",
            "<memory unit='KiB'>4194304</memory>",
            [(0, 0xA0000), (MIB, 2047 * MIB), (1 << 32, 2 << 30)],
        ),
    ],
)
def test_ram_lies_where_the_machine_puts_it(machine, memory, runs):
    xml = XML.format(more="").replace("pc-q35-7.2", machine).replace("<memory unit='MiB'>64</memory>", memory)
    assert [(one.gpa, one.size) for one in extents(parse_domain(xml))] == runs


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        (XML.format(more="<devices><memory model='dimm'/></devices>"), "memory device"),
        (XML.format(more="").replace(" machine='pc-q35-7.2'", ""), "no x86 machine"),
        (XML.format(more="").replace("x86_64", "aarch64"), "no x86 machine"),
        (XML.format(more="").replace("pc-q35-7.2", "nitro-enclave"), "not supported"),
        (XML.format(more="").replace("64</memory>", "lots</memory>"), "no size"),
        (
            XML.format(
                more="<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-machine'/>"
                "<q:arg value='max-ram-below-4g=1G'/></q:commandline>"
            ),
            "argument '-machine'",
        ),
        ("<domain>", "cannot be understood"),
    ],
)
def test_a_map_that_would_be_a_guess_is_refused(xml, why):
    with pytest.raises(HostError, match=why):
        parse_domain(xml)


@pytest.mark.root("runs libvirtd in namespaces of its own")
def test_a_stuck_libvirtd_costs_one_answer_and_a_restarted_one_proves_no_life(monkeypatch):
    with Network() as network, Libvirtd(network) as libvirtd:
        uuid = libvirtd.define_tiny("t1")
        libvirtd.virsh("start", "t1", "--paused")
        domain = Domain(libvirtd.uri, uuid, answer_s=1.0)
        with contextlib.closing(LibvirtMemory(domain, [Region(0x100000, 15 * MIB)])) as memory:
            expected = memory.read(15 * MIB, 64)
            with libvirtd.stuck():
                start_s = time.monotonic()
                with pytest.raises(UnreadableMemory, match="does not answer"):
                    memory.read(15 * MIB, 64)
                assert memory.readv([(15 * MIB, 64)] * 1000) == [None] * 1000
                assert time.monotonic() - start_s < 60  # and not a deadline for each
            readable(memory, expected)
            monkeypatch.setattr("appliance.memory.libvirt.CHUNK", 1 << 30)
            with pytest.raises(UnreadableMemory):  # more than the daemon hands out at once: the connection stays
                memory.read(MIB, 14 * MIB)
            assert memory.read(15 * MIB, 64) == expected
            libvirtd.restart()
            with pytest.raises(UnreadableMemory):
                memory.read(15 * MIB, 64)
            for again in (memory.check_alive, lambda: memory.read(15 * MIB, 64), lambda: memory.readv([(MIB, 8)])):
                with pytest.raises(GuestGone, match="was lost"):  # the new daemon may call another life by the same id
                    again()
        with contextlib.closing(open_libvirt(uuid, uri=libvirtd.uri)) as memory:
            assert memory.read(15 * MIB, 64) == expected
            libvirtd.virsh("destroy", "t1")
            with pytest.raises(GuestGone, match="does not run"):
                memory.check_alive()


def readable(memory, expected):
    """Wait until the stuck call has come back."""
    end_s = time.monotonic() + 60
    while True:
        try:
            assert memory.read(15 * MIB, 64) == expected
        except UnreadableMemory:
            assert time.monotonic() < end_s
            time.sleep(0.05)
        else:
            return
