"""The memory of another process, on a process of our own."""

import contextlib
import ctypes
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import GuestGone, HostError, ParasightError, UnreadableMemory, UsageError
from appliance.memory import anchor, monitor, process
from appliance.memory.monitor import QmpMemory
from appliance.memory.process import IOV_MAX, ProcessMemory, pack, read_start_time
from appliance.memory.qemu import open_qemu, read_command_line
from appliance.model import Region
from tests.worlds.tiny import DATA, IMAGE_GPA, Tiny

PAGE = 4096


@pytest.fixture
def room():
    """Our own memory: 64 pages of known bytes, the 10th of which cannot be read; and its address."""
    area = mmap.mmap(-1, 64 * PAGE)
    area[:] = random.Random(7).randbytes(64 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    content = bytes(area)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 10 * PAGE), PAGE, 0) == 0
    yield address, content
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 10 * PAGE), PAGE, 3)


@pytest.fixture
def own():
    memory = ProcessMemory(os.getpid())
    yield memory
    memory.close()
    memory.close()


def batch(memory, spans, shift=0):
    return memory.readv(pack([(at + shift, size) for at, size in spans], len(spans)))


def test_one_read_and_many_see_the_same_bytes(own, room):
    base, content = room
    spans = [(random.Random(n).randrange(11 * PAGE, 63 * PAGE), n % 300) for n in range(3000)]
    expected = [content[at : at + size] for at, size in spans]
    assert [own.read(base + at, size) for at, size in spans] == expected
    assert batch(own, spans, base) == expected
    assert batch(own, [(base + at, size) for at, size in spans]) == expected
    assert batch(own, [(at, 8) for at, _ in spans], base) == [content[at : at + 8] for at, _ in spans]
    assert batch(own, []) == []


def test_unreadable_spans_are_none_and_the_others_are_there(own, room):
    base, content = room
    spans = [(at * 16, 16) for at in range(64 * PAGE // 16)]
    found = batch(own, [(base + at, size) for at, size in spans])
    hidden = range(10 * PAGE, 11 * PAGE)
    assert found == [None if at in hidden else content[at : at + size] for at, size in spans]
    across = [(base + 10 * PAGE - 8, 16), (base, 4), (8, 8), (base + 11 * PAGE - 8, 16)]
    assert batch(own, across) == [None, content[:4], None, None]
    assert len(spans) > 2 * IOV_MAX


def test_a_single_unreadable_span_is_an_error(own):
    for at in (0, 1 << 46, 1 << 47, 1 << 62):
        with pytest.raises(UnreadableMemory):
            own.read(at, 16)


def test_a_process_that_ends_is_gone_at_once():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        memory = ProcessMemory(child.pid)
        maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
        address = int(next(line for line in maps if "[stack]" in line).split("-")[0], 16)
        assert memory.read(address, 8) == batch(memory, [(address, 8)])[0]
        memory.check_alive()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its pid is still taken
        for act in (memory.check_alive, lambda: memory.read(address, 8), lambda: batch(memory, [(address, 8)])):
            with pytest.raises(GuestGone):
                act()
        with pytest.raises(UsageError, match="has ended"):
            read_start_time(child.pid)
        memory.close()


@pytest.mark.parametrize("open_memory", [ProcessMemory, lambda pid: QmpMemory(pid, "", [Region(0, PAGE)])])
@pytest.mark.parametrize("how", ["it ends", "its number is another process's by now", "no descriptor is left"])
def test_a_process_that_ends_while_it_is_opened_is_gone_and_leaves_no_descriptor(monkeypatch, open_memory, how):
    def fail(_):
        raise ProcessLookupError(3, "") if how == "it ends" else OSError(24, "Too many open files")

    if how.startswith("its"):
        starts = iter(range(100))
        for module in (process, monitor):
            monkeypatch.setattr(module, "read_start_time", lambda _: next(starts))
    else:
        monkeypatch.setattr(os, "pidfd_open", fail)
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(HostError if how.startswith("no") else GuestGone):
        open_memory(os.getpid())
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_pid_that_is_no_qemu_or_no_process_is_the_callers_mistake():
    for pid in (os.getpid(), 2**22 - 1):
        with pytest.raises(UsageError):
            open_qemu(pid)
    with pytest.raises(UsageError, match="is no QEMU"):
        read_command_line(os.getpid())


@contextlib.contextmanager
def pretender(fake):
    """The pid of a sleep that bears another name, once its exec has written its command line."""
    fake.symlink_to("/bin/sleep")
    with subprocess.Popen([str(fake), "60"]) as child:
        try:
            while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
                assert child.poll() is None
            yield child.pid
        finally:
            child.kill()


def test_a_qemu_of_another_architecture_is_told_apart(tmp_path):
    with pretender(tmp_path / "qemu-system-aarch64") as pid, pytest.raises(HostError, match="emulates aarch64"):
        open_qemu(pid)


def test_where_ram_begins_is_told_by_the_kernel_in_it(own):
    tiny = Tiny()
    area = mmap.mmap(-1, len(tiny.ram) + (4 << 20))
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    base = -(-address // (2 << 20)) * (2 << 20)  # as QEMU aligns it
    area[base - address : base - address + len(tiny.ram)] = bytes(tiny.ram)
    for quick in (True, False):
        pairs = set(anchor.find_tables(own, base, base + len(tiny.ram), quick=quick))
        assert pairs == {(base + IMAGE_GPA + DATA + 0x4000, IMAGE_GPA + DATA + 0x4000)}


@pytest.mark.root("giving up rights")
def test_a_qemu_we_may_not_look_at_is_refused_with_the_remedy(tmp_path):
    with pretender(tmp_path / "qemu-system-x86_64") as pid:
        said = as_nobody(lambda: open_qemu(pid))
    assert said.startswith("PermissionRefused:")
    assert "CAP_SYS_PTRACE" in said


def as_nobody(act):
    """What an act raises in a process without rights."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(65534)
            act()
        except ParasightError as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    os.waitpid(pid, 0)
    return said
