"""RAM of Xen domains, through libraries that behave as Xen's do and count what is asked of them."""

import contextlib
import errno
import random
import struct
import subprocess
import sys

import pytest

from appliance.errors import GuestGone, HostError, PermissionRefused, UnreadableMemory, UnsupportedGuest, UsageError
from appliance.guest.attach import attach
from appliance.memory.xen import open_xen, probe
from appliance.model import Region
from appliance.xenctl import Control, read_max_pages, write_max_pages
from tests.worlds.tiny import RAM, Tiny
from tests.worlds.xenhost import HIGH, PAGE, UUID_TEXT, XenHost

LOW, ABOVE = 3000, 900  # frames
GIB4 = HIGH * PAGE


@pytest.fixture(scope="module")
def content():
    return random.Random(5).randbytes((LOW + ABOVE) * PAGE)


@pytest.fixture
def host(tmp_path, content):
    """A domain of 3,000 frames from 0 on."""
    made = XenHost(tmp_path, low=LOW)
    made.ram[:] = content[: LOW * PAGE]
    yield made
    assert (made.state.maps, made.state.mapped) == (made.state.unmaps, 0), "a mapping was left"
    assert made.state.protections in (0, 1), "mapped for more than reading"
    assert made.state.largest <= 1024


@pytest.fixture
def memory(host):
    opened = open_xen(7, UUID_TEXT.upper(), LOW * PAGE, folder=host.folder)
    yield opened
    opened.close()
    opened.close()
    assert host.state.opened == host.state.closed


def test_what_is_read_is_what_lies_there_however_it_is_asked_for(memory, content):
    assert memory.regions == memory.data_regions() == (Region(0, LOW * PAGE),)
    assert memory.gaps == ()
    spans = [(random.Random(n).randrange(LOW * PAGE - 9000), n % 9000) for n in range(2000)]
    spans += [(5 * PAGE - 1, 2), (0, LOW * PAGE), (1, LOW * PAGE - 2), (LOW * PAGE - 8, 8), (PAGE, 0)]
    assert memory.readv(spans) == [content[at : at + size] for at, size in spans]
    assert [memory.read(at, size) for at, size in spans[-9:]] == [content[at : at + size] for at, size in spans[-9:]]


def test_a_frame_that_is_wanted_many_times_is_mapped_once(memory, host):
    before = host.state.asked, host.state.maps
    memory.readv([(frame * PAGE + 8 * part, 8) for part in range(40) for frame in range(100)])
    assert (host.state.asked - before[0], host.state.maps - before[1]) == (100, 1)


def test_nothing_is_kept_between_two_reads(memory, host):
    assert memory.read(9 * PAGE, 4) != b"new!"
    host.ram[9 * PAGE : 9 * PAGE + 4] = b"new!"
    assert memory.read(9 * PAGE, 4) == memory.readv([(9 * PAGE, 4)])[0] == b"new!"


@pytest.mark.parametrize("span", [(LOW * PAGE, 1), (LOW * PAGE - 1, 2), (-1, 1), (8, -1), (GIB4, 8), (1 << 63, 8)])
def test_what_is_no_ram_is_not_even_asked_for(memory, host, span):
    maps = host.state.maps
    with pytest.raises(UnreadableMemory, match="not RAM"):
        memory.read(*span)
    assert memory.readv([span, (0, 0), span]) == [None, b"", None]
    assert host.state.maps == maps


def test_frames_that_went_away_are_told_and_the_others_are_there(memory, host, content):
    lost = [10, 11, 700, 2999]
    host.lose(lost)
    whole = memory.readv([(frame * PAGE, PAGE) for frame in range(LOW)])
    assert [frame for frame, data in enumerate(whole) if data is None] == lost
    assert all(data in (None, content[at * PAGE : (at + 1) * PAGE]) for at, data in enumerate(whole))
    assert memory.readv([(9 * PAGE, PAGE + 1), (9 * PAGE, PAGE), (0, LOW * PAGE)])[::2] == [None, None]
    with pytest.raises(UnreadableMemory, match="ballooned out, or never populated"):
        memory.read(11 * PAGE + 5, 4)
    host.lose(lost, 0)
    assert memory.read(11 * PAGE, PAGE) == content[11 * PAGE : 12 * PAGE]


def test_a_balloon_is_named_with_its_size_and_its_holes_are_left_out_of_scans(memory, host):
    assert memory.gaps == ()
    host.lose(range(1000, 2048))
    host.lose(range(2500, 2502))
    host.state.pages -= 1050
    (gap,) = memory.gaps
    assert gap.address // PAGE in range(1000, 2048)
    assert "about 10" in gap.why and "of 3000 frames" in gap.why and "ballooned out" in gap.why
    assert memory.data_regions() == (Region(0, 1024 * PAGE), Region(2048 * PAGE, (LOW - 2048) * PAGE))
    assert memory.regions == (Region(0, LOW * PAGE),)
    host.lose(range(LOW), 0)
    host.state.pages += 1050
    assert memory.gaps == ()


def test_a_guest_does_not_decide_how_long_its_holes_are_looked_for(memory, host, monkeypatch):
    host.lose(range(0, LOW, 2))
    host.state.pages -= LOW // 2
    maps = host.state.maps
    assert memory.data_regions() == memory.regions
    assert host.state.maps - maps < 10
    host.lose(range(LOW))
    host.state.pages = 8
    assert memory.data_regions() == ()
    monkeypatch.setattr("appliance.memory.xen.POPULATED_S", 0.0)
    assert memory.data_regions() == memory.regions


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOENT])
def test_a_frame_that_is_busy_is_asked_for_again_for_a_while(memory, host, content, code):
    host.lose([3], errno.EAGAIN)
    host.state.busy_times = 2
    assert memory.read(3 * PAGE, 8) == content[3 * PAGE : 3 * PAGE + 8]
    host.lose([3], code)
    host.state.busy_times = 1 << 20
    maps = host.state.maps
    assert memory.readv([(3 * PAGE, 8), (0, 8)]) == [None, content[:8]]
    assert host.state.maps - maps == 4


def test_a_mapping_that_fails_as_a_whole_is_tried_again_only_where_that_helps(memory, host, content):
    host.state.refuse_errno, host.state.refuse_times = errno.ENOMEM, 2
    assert memory.read(0, 8) == content[:8]
    host.state.refuse_errno, host.state.refuse_times = errno.EPERM, 9
    assert memory.readv([(0, 8)]) == [None]
    assert host.state.refuse_times == 8
    with pytest.raises(UnreadableMemory, match="xl dmesg"):
        memory.read(0, 8)
    host.state.refuse_errno = host.state.refuse_times = 0


def _end(host):
    host.state.present = 0


def _die(host):
    host.state.dying = 1
    host.lose(range(LOW))


def _replace(host):
    host.state.uuid[0] ^= 1
    host.lose(range(LOW))


@pytest.mark.parametrize("change", [_end, _die, _replace])
def test_a_domain_that_ended_or_is_another_one_is_gone(memory, host, change):
    memory.check_alive()
    change(host)
    for use in (lambda: memory.read(0, 8), lambda: memory.readv([(0, 8), (PAGE, 8)]), memory.check_alive, memory.vcpus):
        with pytest.raises(GuestGone):
            use()
    with pytest.raises(GuestGone):
        open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)


def test_what_was_closed_is_gone(memory):
    memory.close()
    uses = (lambda: memory.read(0, 8), lambda: memory.readv([(0, 8)]), lambda: memory.gaps, memory.data_regions)
    for use in (*uses, memory.check_alive, memory.vcpus):
        with pytest.raises(GuestGone):
            use()


def test_a_handle_that_was_closed_is_not_given_to_the_library(host):
    control = Control(host.folder)
    control.close()
    with pytest.raises(HostError, match="closed"):
        control.read_domain(7)


def test_touching_a_frame_that_failed_would_kill_us(host):
    """What all the care is for: the libraries of this world are as dangerous as the real ones."""
    host.lose([2])
    code = (
        "from appliance.memory.foreign import ForeignMemory; import ctypes, sys, pathlib\n"
        "ForeignMemory(pathlib.Path(sys.argv[1])).look(7, [2], lambda at, errors: ctypes.string_at(at, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code, host.folder], check=False)
    assert done.returncode == -11
    host.state.unmaps, host.state.mapped = host.state.maps, 0  # what it held went with it


def test_registers_are_where_the_hypervisor_saves_them(memory, host):
    fields = {
        640: 0x11,
        656: 0x80050033,
        672: 0x1234000,
        680: 0x1020,
        832: 0x66,
        840: 0x77,
        872: 0x88,
        944: 0x99,
        960: 5,
    }
    for at, value in fields.items():
        host.state.cpu[at : at + 8] = struct.pack("<Q", value)
    first, second = memory.vcpus()
    assert (first.rip, first.cr0, first.cr3, first.cr4) == (0x11, 0x80050033, 0x1234000, 0x1020)
    assert (first.fs_base, first.gs_base, first.idt_base, first.kernel_gs_base, first.lstar) == (
        0x66,
        0x77,
        0x88,
        0x99,
        5,
    )
    host.state.vcpus = 4  # two of which were never started
    assert memory.vcpus() == (first, second)


def test_ram_above_4_gib_is_found_and_read(tmp_path, content):
    host = XenHost(tmp_path, low=LOW, high=ABOVE)
    host.ram[:] = content
    for memory_bytes in ((LOW + ABOVE) * PAGE, None):
        host.state.last_frame = HIGH + ABOVE - 1
        memory = open_xen(7, UUID_TEXT, memory_bytes, folder=tmp_path)
        assert memory.regions == (Region(0, LOW * PAGE), Region(GIB4, ABOVE * PAGE))
        assert memory.readv([(8, 8), (GIB4, 8), (GIB4 + ABOVE * PAGE, 1)]) == [
            content[8:16],
            content[LOW * PAGE :][:8],
            None,
        ]
        memory.close()


def test_a_paravirtual_domain_and_our_own_are_refused(host):
    with pytest.raises(UsageError, match="own domain"):
        open_xen(0, folder=host.folder)
    host.state.hvm = 0
    with pytest.raises(UnsupportedGuest, match="paravirtual"):
        open_xen(7, folder=host.folder)
    assert host.state.opened == host.state.closed


def test_memory_that_is_populated_on_demand_is_left_alone_while_too_few_pages_lie_ready(host, content):
    host.state.on_demand, host.state.ready = 500, 100
    with pytest.raises(UnreadableMemory, match="populated on demand"):
        open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)
    assert host.state.maps == 0
    host.state.on_demand = 100
    memory = open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)
    assert memory.read(0, 8) == content[:8]
    host.state.on_demand, maps = 101, host.state.maps  # the target was lowered
    assert memory.readv([(0, 8)]) == [None]
    assert host.state.maps == maps
    host.state.on_demand = 0
    assert memory.read(0, 8) == content[:8]
    memory.close()


@pytest.mark.parametrize(("code", "error"), [(errno.EACCES, PermissionRefused), (errno.ENOMEM, HostError)])
def test_where_it_is_not_told_whether_reading_is_harmless_nothing_is_read(host, content, code, error):
    host.state.on_demand = (1 << 64) - 1 - code
    with pytest.raises(error, match=r"populated on demand.*xl dmesg"):
        open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)
    assert host.state.maps == 0 and host.state.opened == host.state.closed
    host.state.on_demand, host.state.ready = 1, 1
    with contextlib.closing(open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)) as memory:
        assert memory.read(0, 8) == content[:8]
        host.state.on_demand, maps = (1 << 64) - 1 - code, host.state.maps
        assert memory.readv([(0, 8)]) == [None]
        assert host.state.maps == maps


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_xen_that_knows_no_memory_on_demand_has_none(host, content, code):
    host.state.on_demand = (1 << 64) - 1 - code
    with contextlib.closing(open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)) as memory:
        assert memory.read(0, 8) == content[:8]


def test_a_xen_that_cannot_be_asked_for_a_moment_costs_what_is_read_then_and_nothing_else(memory, host, content):
    host.lose(range(LOW), errno.EPERM)
    host.state.silent = errno.ENOMEM
    assert memory.readv([(0, 8)]) == [None]
    assert memory.vcpus() == ()
    for use in (lambda: memory.read(0, 8), memory.check_alive, lambda: memory.gaps):
        with pytest.raises(UnreadableMemory):
            use()
    host.lose(range(LOW), 0)
    host.state.silent = 0
    assert memory.read(0, 8) == content[:8]
    memory.check_alive()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES])
def test_a_policy_that_refuses_every_frame_is_told_as_such(host, code):
    host.lose(range(LOW), code)
    with pytest.raises(PermissionRefused, match="xl dmesg"):
        open_xen(7, UUID_TEXT, LOW * PAGE, folder=host.folder)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES])
def test_a_host_where_xen_cannot_be_asked_says_why(host, code):
    host.state.refuse_errno = code
    with pytest.raises(HostError, match="this host does not run on Xen" if code == errno.ENOENT else "xl dmesg|root"):
        open_xen(7, folder=host.folder)


@pytest.mark.parametrize(
    ("library", "package"),
    [("libxenforeignmemory.so.1", "libxenforeignmemory1"), ("libxenctrl.so.4.17", "libxenmisc4")],
)
def test_a_missing_library_is_named_with_its_package(host, library, package):
    (host.folder / library).unlink()
    with pytest.raises(HostError, match=f"{library[:10]}.*apt-get install {package}"):
        open_xen(7, folder=host.folder)
    assert host.state.opened == host.state.closed


def test_a_release_of_xen_that_is_not_known_is_refused(host):
    (host.folder / "libxenctrl.so.4.17").rename(host.folder / "libxenctrl.so.4.99")
    with pytest.raises(HostError, match=r"Xen 4\.99"):
        open_xen(7, folder=host.folder)


def test_memory_limits_are_read_and_put_back(host):
    assert read_max_pages(0, host.folder) == 0x20000
    assert read_max_pages(7, host.folder) == LOW + 8
    write_max_pages(7, 0x8100, host.folder)
    write_max_pages(0, 0x1234, host.folder)
    assert (host.state.max_pages, host.state.dom0_max_pages) == (0x8100, 0x1234)
    for use in (lambda: read_max_pages(6, host.folder), lambda: write_max_pages(6, 1, host.folder)):
        with pytest.raises(HostError):
            use()
    assert host.state.opened == host.state.closed


def test_a_domain_is_described_as_xen_sees_it(host):
    host.state.flags = 1 << 3 | 1 << 2 | 3 << 16
    with Control(host.folder) as control:
        domain = control.read_domain(7)
        assert control.read_domain(6) is None and control.read_domain(8) is None
    assert (domain.uuid, domain.hvm, domain.paused, domain.dying, domain.shutdown) == (UUID_TEXT, True, True, False, 3)
    assert (domain.pages, domain.max_pages, domain.vcpus) == (LOW + 8, LOW + 8, 2)


def test_a_linux_made_of_bytes_is_attached_to_although_it_has_ballooned(tmp_path):
    tiny = Tiny()
    host = XenHost(tmp_path, low=RAM // PAGE)
    host.ram[:] = bytes(tiny.ram)
    host.lose(range(0x20, 0x40))
    memory = open_xen(7, UUID_TEXT, RAM, folder=tmp_path)
    kernel = attach(memory, cache=False)
    assert (kernel.root, kernel.release) == (tiny.cr3, "6.1.0-tiny")
    memory.close()
    assert host.state.maps == host.state.unmaps


def test_a_host_without_xen_is_told_as_such():
    found = probe()
    assert not found.ok and not found.required and "no control domain" in found.reason
