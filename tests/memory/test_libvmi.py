"""LibVMI on files, and what keeps it harmless on Xen."""

import contextlib
import ctypes
import errno
import os
import random
import struct
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from appliance.errors import ConfigError, GuestGone, HostError, UnreadableMemory, UsageError
from appliance.memory import libvmi, printed
from appliance.memory.libvmi import _construct, open_libvmi_file, open_libvmi_xen, probe
from appliance.memory.xenlimits import MemoryLimits
from appliance.model import Region
from appliance.ports import GuestMemory
from appliance.xenctl import write_max_pages
from tests.worlds.xenhost import PAGE, UUID_TEXT, XenHost

pytest.importorskip("libvmi")

MIB = 1 << 20
RAM = random.Random(6).randbytes(8 * MIB)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(RAM)
    return path


@pytest.fixture
def xen(tmp_path):
    return XenHost(tmp_path, low=64)


def test_it_reads_what_the_file_holds(image):
    with contextlib.closing(open_libvmi_file(image)) as memory:
        assert isinstance(memory, GuestMemory)
        assert memory.regions == (Region(0, 8 * MIB),)
        places = random.Random(3)
        spans = [(places.randrange(7 * MIB), places.randrange(MIB)) for _ in range(20)] + [(8 * MIB - 3, 3), (5, 0)]
        expected = [RAM[gpa : gpa + size] for gpa, size in spans]
        assert memory.readv(spans) == expected == [memory.read(gpa, size) for gpa, size in spans]
        memory.check_alive()


def test_what_straddles_or_passes_the_end_is_unreadable_and_never_cut_short(image):
    with contextlib.closing(open_libvmi_file(image)) as memory:
        spans = [(8 * MIB - 4, 8), (8 * MIB, 1), (1 << 40, 8), (-8, 8), (0, -1)]
        assert memory.readv([*spans, (0, 4)]) == [*[None] * 5, RAM[:4]]
        for gpa, size in spans:
            with pytest.raises(UnreadableMemory, match="not RAM"):
                memory.read(gpa, size)


def test_pages_that_changed_meanwhile_are_read_anew(image):
    with contextlib.closing(open_libvmi_file(image)) as memory, image.open("r+b", buffering=0) as file:
        for number in range(20):
            assert memory.read(MIB, 8) == memory.readv([(MIB, 8)])[0]
            file.seek(MIB)
            file.write(struct.pack("<Q", number))
            assert memory.read(MIB, 8) == struct.pack("<Q", number) == memory.readv([(MIB, 8)])[0]


def test_the_last_page_counts_only_when_it_is_whole(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(RAM[: 2 * PAGE + 100])
    with contextlib.closing(open_libvmi_file(path)) as memory:
        assert memory.regions == (Region(0, 2 * PAGE),)
        assert memory.readv([(2 * PAGE - 8, 8), (2 * PAGE, 8)]) == [RAM[2 * PAGE - 8 : 2 * PAGE], None]


def test_what_is_no_raw_image_is_refused_before_libvmi_sees_it(tmp_path):
    lime = tmp_path / "lime"
    lime.write_bytes(struct.pack("<IIQQQ", 0x4C694D45, 1, 0, 4095, 0) + bytes(4096))
    (tmp_path / "empty").touch()
    for name, why in (("lime", "raw memory images only"), ("empty", "is empty"), ("missing", "No such file")):
        with pytest.raises(ConfigError, match=why):  # LibVMI itself crashes on the last one
            open_libvmi_file(tmp_path / name)


def test_no_page_is_kept_behind_a_read(image):
    """LibVMI keeps a domain's pages mapped, too, which holds what the guest has given back."""
    with contextlib.closing(open_libvmi_file(image)) as memory, image.open("r+b", buffering=0) as file:
        for read in (lambda: memory.read(MIB, 8), lambda: memory.readv([(MIB, 8)])[0]):
            before = read()
            file.seek(MIB)
            file.write(bytes(each ^ 0xFF for each in before))
            assert memory._handle.read_pa(MIB, 8)[0] != before


def test_each_thread_reads_by_a_handle_of_its_own(image):
    def read(seed):
        places = random.Random(seed)
        with contextlib.closing(open_libvmi_file(image)) as memory:
            spans = [(places.randrange(7 * MIB), 64) for _ in range(500)]
            return memory.readv(spans) == [RAM[gpa : gpa + size] for gpa, size in spans]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(8)))


def test_a_closed_one_reads_nothing(image):
    memory = open_libvmi_file(image)
    memory.close()
    memory.close()
    for again in (memory.check_alive, lambda: memory.read(0, 1), lambda: memory.readv([(0, 1)])):
        with pytest.raises(GuestGone):
            again()


def test_on_xen_it_must_be_allowed_to_change_the_domain(xen):
    with pytest.raises(UsageError, match="--libvmi-allow-domain-changes"):
        open_libvmi_xen(7, UUID_TEXT, folder=xen.folder)
    assert xen.state.opened == 0


def test_on_xen_the_unversioned_library_is_asked_for_before_anything_is_touched(xen):
    with pytest.raises(HostError, match="libxen-dev"):
        open_libvmi_xen(7, UUID_TEXT, change_domain=True, folder=xen.folder)
    assert xen.state.opened == 0


def test_on_xen_a_domain_that_is_not_there_is_never_handed_to_libvmi(xen):
    (xen.folder / "libxenstore.so").symlink_to(xen.folder / "libxenctrl.so.4.17")
    for domid, uuid in ((8, None), (7, UUID_TEXT.replace("0f", "ff"))):
        with pytest.raises(GuestGone):
            open_libvmi_xen(domid, uuid, change_domain=True, folder=xen.folder)
    assert (xen.state.max_pages, xen.state.dom0_max_pages) == (72, 0x20000)


def test_a_failed_attach_says_why_and_leaves_the_limits_and_no_handle(xen, capfd):
    (xen.folder / "libxenstore.so").symlink_to(xen.folder / "libxenctrl.so.4.17")
    with pytest.raises(HostError, match="LibVMI cannot open it in mode XEN"):  # this host has no Xen
        open_libvmi_xen(7, UUID_TEXT, change_domain=True, folder=xen.folder)
    assert (xen.state.max_pages, xen.state.dom0_max_pages) == (72, 0x20000)
    assert xen.state.opened == xen.state.closed > 0
    assert capfd.readouterr().err == ""


def test_what_libvmi_prints_becomes_the_reason_and_does_not_stand_among_our_answers(capfd):
    with pytest.raises(HostError, match="VMI_ERROR: The selected LibVMI mode is not available"):
        _construct("anything", "INIT_DOMAINNAME", "KVM")
    ctypes.CDLL(None).fflush(None)  # it goes through C's buffers
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def lifting(xen, monkeypatch):
    """A binding that does to limits what the real one does on Xen; ``destroyed``: its handles."""
    (xen.folder / "libxenstore.so").symlink_to(xen.folder / "libxenctrl.so.4.17")

    class Libvmi:
        def __init__(self, *_, **__):
            xen.state.max_pages = 0xFFFFFFFF

        def destroy(self):
            xen.state.max_pages = 0x3FBFFC00
            binding.destroyed.append(self)

    binding = types.ModuleType("libvmi")
    binding.Libvmi, binding.LibvmiError, binding.destroyed = Libvmi, OSError, []
    binding.INIT_DOMAINID, binding.VMIMode = 1, {"XEN": 1}
    monkeypatch.setitem(sys.modules, "libvmi", binding)
    return binding


def test_what_the_operator_sets_while_it_is_open_stays_as_it_is(xen, lifting):
    memory = open_libvmi_xen(7, UUID_TEXT, change_domain=True, folder=xen.folder)
    assert xen.state.max_pages == 72
    xen.state.max_pages, xen.state.dom0_max_pages = 100, 0x10000
    memory.close()
    assert len(lifting.destroyed) == 1
    assert (xen.state.max_pages, xen.state.dom0_max_pages) == (100, 0x10000)


def test_a_handle_is_not_detached_where_the_limits_cannot_be_kept(xen, lifting, monkeypatch):
    monkeypatch.setattr(libvmi, "TURN_S", 0.05)
    memory, other = (open_libvmi_xen(7, UUID_TEXT, change_domain=True, folder=xen.folder) for _ in range(2))
    with libvmi._limits_lock:  # another handle hangs
        memory.close()
        with pytest.raises(HostError, match="is xenstored stuck"):
            open_libvmi_xen(7, UUID_TEXT, change_domain=True, folder=xen.folder)
    xen.state.refuse_errno = errno.EMFILE
    other.close()
    assert (lifting.destroyed, xen.state.max_pages) == ([], 72)


def test_limits_are_put_back_where_the_process_ends_while_a_thread_attaches(xen):
    (xen.folder / "libxenstore.so").symlink_to(xen.folder / "libxenctrl.so.4.17")
    code = """if True:
        import pathlib, sys, threading, time, types
        from appliance.memory.libvmi import open_libvmi_xen
        from appliance.xenctl import write_max_pages

        class Libvmi:
            def __init__(self, *_, **__):
                write_max_pages(7, 0xFFFFFFFF, folder)
                lifted.set()
                time.sleep(1e6)

        binding, lifted, folder = types.ModuleType("libvmi"), threading.Event(), pathlib.Path(sys.argv[1])
        binding.Libvmi, binding.LibvmiError, binding.INIT_DOMAINID, binding.VMIMode = Libvmi, OSError, 1, {"XEN": 1}
        sys.modules["libvmi"] = binding
        attach = lambda: open_libvmi_xen(7, change_domain=True, folder=folder)
        threading.Thread(target=attach, daemon=True).start()
        sys.exit(not lifted.wait(60))
        """
    subprocess.run([sys.executable, "-c", code, xen.folder], check=True)
    assert xen.state.max_pages == 72


def test_a_host_without_descriptors_is_no_defect_and_a_call_that_hangs_holds_up_no_other(image, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as host:
        host.setattr(printed, "_sinks", [])
        host.setattr(os, "memfd_create", refuse)
        with pytest.raises(HostError, match="Too many open files"):
            open_libvmi_file(image)
    monkeypatch.setattr(printed, "TURN_S", 0.05)
    with printed._lock:
        open_libvmi_file(image).close()


def test_what_others_print_while_libvmi_is_opened_is_not_lost(image, capfd):
    def print_lines():
        for number in range(2000):
            os.write(2, f"line {number}\n".encode())

    with ThreadPoolExecutor(1) as pool:
        printing = pool.submit(print_lines)
        while not printing.done():
            open_libvmi_file(image).close()
        printing.result()
    assert sorted(capfd.readouterr().err.splitlines()) == sorted(f"line {number}" for number in range(2000))


def test_limits_are_put_back_where_they_were_changed(xen):
    limits = MemoryLimits(7, UUID_TEXT, xen.folder)
    assert limits.restore() == ()
    write_max_pages(7, 0xFFFFFFFF, xen.folder)
    write_max_pages(0, 0, xen.folder)
    assert [domain.domid for domain in limits.restore()] == [0, 7]
    assert (xen.state.max_pages, xen.state.dom0_max_pages) == (72, 0x20000)


def test_the_limit_of_dom0_is_put_back_although_that_of_a_dying_domain_cannot_be(xen):
    limits = MemoryLimits(7, UUID_TEXT, xen.folder)
    xen.state.max_pages, xen.state.dom0_max_pages, xen.state.dying = 5, 0, 1
    with pytest.raises(HostError, match="domain 7 cannot be set"):
        limits.restore()
    assert xen.state.dom0_max_pages == 0x20000


def test_where_xen_cannot_be_asked_a_domain_is_neither_gone_nor_readable(xen):
    limits = MemoryLimits(7, UUID_TEXT, xen.folder)
    xen.state.refuse_errno = errno.EMFILE
    with pytest.raises(UnreadableMemory, match="cannot be asked"):
        limits.check_alive()


def test_limits_of_a_domain_that_is_another_one_by_now_are_left_alone(xen):
    limits = MemoryLimits(7, UUID_TEXT, xen.folder)
    xen.state.uuid[0] ^= 1
    xen.state.max_pages = 5
    assert limits.restore() == ()
    assert xen.state.max_pages == 5
    with pytest.raises(GuestGone):
        limits.check_alive()


def test_the_probe_says_what_it_is_good_for_here():
    found = probe()
    assert found.ok
    assert not found.required
    assert "KVM guests it cannot" in found.reason
