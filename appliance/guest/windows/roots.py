"""Finds page-table roots of a running Windows: in registers, in the low stub, or by tables that name themselves.

A root is believed when KUSER_SHARED_DATA lies where Windows always maps it. Each comes with addresses that lie in the
kernel's image, where there are any. Searching all of RAM comes last, skips holes, and ends when its time is up.
Sources: Intel SDM vol. 3A (IDT gates, CR0, CR4); PROCESSOR_START_BLOCK of the boot loader (near jump and
CompletionFlag, LmTarget 70h, Cr3 A0h: Ionescu, "Getting Physical", REcon 2017; MemProcFS);
_KPRCB.KernelDirectoryTableBase (in the page of _KPCR at 6000h to C000h, by build); self-map: entry 300h (x86), entries
0 to 3 of the last page directory (PAE), on x64 entry 1EDh up to Windows 8.1 and a random one of the upper half later;
MSRC, "KVA Shadow: Mitigating Meltdown on Windows".
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from appliance.errors import OutOfTime, UnreadableMemory
from appliance.guest.paging import PRESENT
from appliance.guest.windows.kernel import KUSER32, KUSER64, KUSER_SIZE, UserShared, parse_user_shared
from appliance.guest.windows.space import ADDRESS, PAGE, AddressSpace, Mode
from appliance.guest.windows.xp_kpcr import find_by_kpcr
from appliance.model import Region, VcpuState
from appliance.ports import GuestMemory

LOW_MEMORY = 1 << 20
NEAR = 32 << 20  # where the boot's own page tables usually lie
MAX_VCPUS = 64
MAX_ROOTS = 4096  # candidates of one search
PULSE_S = 0.1  # a running kernel's clock moves every 15.6 ms, seldom later
CHUNK = 4 << 20
_ZEROS = bytes(CHUNK)
_VERSIONS = {5: range(4), 6: range(4), 10: range(1)}  # NtMajorVersion: NtMinorVersion
_STUB, _STUB_MASK = 0x00000001_000600E9, 0xFFFFFFFF_FFFF00FF
_STUB_SIZE, _TARGET_AT, _CR3_AT = 0xA8, 0x70, 0xA0
_KERNEL_ROOT_AT = (0x9000, 0x7000, 0xA000, 0x8000, 0xB000, 0xC000, 0x6000)  # in _KPCR
_VECTORS = (0, 14, 3, 13)  # divide error, page fault, breakpoint, general protection
_SELF32, _SELF_PAE = 0x300, 3
_SHARED_ENTRY4, _SHARED_ENTRY5 = 0x1EF, 0x1FF  # of the root: what maps KUSER_SHARED_DATA
# The lowest byte of an entry that leads to the kernel's own tables: present, writable, not user, not large.
_KERNEL_TABLE = re.compile(b"[%s]" % re.escape(bytes(flags for flags in range(128) if flags & 7 == 3)), re.DOTALL)
_TOO_HIGH = 0x000F_0000_0000_0000  # address bits above 47
MAX_SEARCHES = 4  # times that all of RAM is searched for the top of PAE tables


class Root(NamedTuple):
    """A verified address space of Windows' kernel."""

    space: AddressSpace
    shared: UserShared
    hints: tuple[int, ...]  # addresses in the kernel's image, best first
    how: str


def check_root(memory: GuestMemory, root: int, mode: Mode) -> UserShared | None:
    """What KUSER_SHARED_DATA says below this root; None where it is not mapped or not plausible."""
    space = AddressSpace(memory, root, mode)
    try:
        shared = parse_user_shared(space.read(KUSER64 if mode.pointer_size == 8 else KUSER32, KUSER_SIZE))
    except UnreadableMemory:
        return None
    return shared if shared.minor in _VERSIONS.get(shared.major, ()) else None


def looks_like_windows(memory: GuestMemory, clock: Callable[[], float] = time.monotonic, *, near: bool = True) -> bool:
    """Whether a Windows kernel runs here: cheap, by registers, the first MiB and (``near``) the usual places only.

    Of a guest that lives its clock must go on (for that `PULSE_S` are waited at most): RAM keeps what ran before.
    """
    quick = [find_by_vcpus(memory), find_by_stub(memory), *([find_by_tables(memory, near=True)] if near else [])]
    found = next((root for roots in quick for root in roots), None)
    return found is not None and (not memory.live or runs(found.space, found.shared, clock))


def runs(space: AddressSpace, shared: UserShared, clock: Callable[[], float]) -> bool:
    """Whether a kernel's clock goes on from what it was, for `PULSE_S` at most."""
    end = clock() + PULSE_S
    while clock() < end:
        now = check_root(space.memory, space.root, space.mode)
        if now and now.interrupt_time != shared.interrupt_time:
            return True
    return False


def is_linux(memory: GuestMemory) -> bool:
    """Whether a virtual CPU runs on page tables as only Linux makes them: code at ffffffff80000000, no KUSER."""
    for cpu in islice(memory.vcpus(), MAX_VCPUS):
        mode = Mode.of(cpu.cr0, cpu.cr4, long_mode=True)
        if mode in (Mode.LONG4, Mode.LONG5) and check_root(memory, cpu.cr3, mode) is None:
            pages = AddressSpace(memory, cpu.cr3, mode).walk_pages(0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000)
            try:
                if next(pages, None) is not None:
                    return True
            except UnreadableMemory:
                continue
    return False


# -- registers --


def find_by_vcpus(memory: GuestMemory) -> Iterator[Root]:
    """Roots from the virtual CPUs' CR3, or (a user's root under KVA shadow) from what their _KPCR says."""
    seen: set[tuple[int, Mode]] = set()
    for cpu in islice(memory.vcpus(), MAX_VCPUS):
        for mode in _modes(cpu):
            here = AddressSpace(memory, cpu.cr3, mode)
            for root in (here.root, *_kernel_roots(here, cpu)):
                if (root, mode) in seen:
                    continue
                seen.add((root, mode))
                shared = check_root(memory, root, mode)
                if shared:
                    space = AddressSpace(memory, root, mode)
                    yield Root(space, shared, tuple(_entries(space, cpu)), "by the registers of a virtual CPU")


def _modes(cpu: VcpuState) -> Iterator[Mode]:
    """How this CPU translates: whether it is in long mode is told by what its registers hold."""
    is_long = max(cpu.rip, cpu.idt_base, cpu.lstar, cpu.gs_base, cpu.kernel_gs_base) >> 32 != 0
    for long_mode in (is_long, not is_long):
        mode = Mode.of(cpu.cr0 or 1 << 31, cpu.cr4, long_mode=long_mode)
        if mode and (mode.pointer_size == 8) == long_mode and (not long_mode or cpu.cr4 >> 5 & 1):
            yield mode


def _kernel_roots(space: AddressSpace, cpu: VcpuState) -> Iterator[int]:
    """Where a CPU that runs on a user's root keeps the kernel's."""
    if space.pointer_size == 8:
        for pcr in (cpu.gs_base, cpu.kernel_gs_base):
            if pcr >> 47 == 0x1FFFF:
                for raw in space.readv([(pcr + at, 8) for at in _KERNEL_ROOT_AT]):
                    root = int.from_bytes(raw or b"", "little")
                    if root & ADDRESS and root >> 52 & 0x7FF == 0:
                        yield root & ADDRESS


def _entries(space: AddressSpace, cpu: VcpuState) -> Iterator[int]:
    """Addresses where the CPU enters the kernel, of the kernel's half only."""
    lowest = 1 << 63 if space.pointer_size == 8 else 0x8000_0000
    told = getattr(space.memory, "kernel_va", 0)  # a crash dump's
    for va in (cpu.lstar, told, *_handlers(space, cpu.idt_base), *_by_kpcr(space, cpu.fs_base), cpu.rip):
        if lowest <= va < 1 << 8 * space.pointer_size:
            yield va


def _handlers(space: AddressSpace, idt: int) -> Iterator[int]:
    size = 2 * space.pointer_size
    for raw in space.readv([(idt + size * vector, size) for vector in _VECTORS]) if idt else ():
        if raw and size == 16:
            low, middle, high = struct.unpack("<H4xHI4x", raw)
            yield high << 32 | middle << 16 | low
        elif raw:
            yield int.from_bytes(raw[6:8], "little") << 16 | int.from_bytes(raw[:2], "little")


def _by_kpcr(space: AddressSpace, fs_base: int = 0) -> Iterator[int]:
    found = find_by_kpcr(space, fs_base)
    if found is not None:
        yield found.base


# -- the low stub --


def find_by_stub(memory: GuestMemory) -> Iterator[Root]:
    """Roots from the code that starts further processors, somewhere in the first MiB."""
    for raw in memory.readv([(gpa, _STUB_SIZE) for gpa in range(PAGE, LOW_MEMORY, PAGE)]):
        if raw is None or int.from_bytes(raw[:8], "little") & _STUB_MASK != _STUB:
            continue
        target, cr3 = struct.unpack_from("<Q", raw, _TARGET_AT)[0], struct.unpack_from("<Q", raw, _CR3_AT)[0]
        if not cr3 or target >> 47 != 0x1FFFF:
            continue
        for mode in (Mode.LONG4, Mode.LONG5):
            shared = check_root(memory, cr3, mode)
            if shared:
                yield Root(AddressSpace(memory, cr3, mode), shared, (target,), "by the code that starts processors")
                break


# -- tables that name themselves --


def find_by_tables(
    memory: GuestMemory, *, near: bool = False, expired: Callable[[], bool] = lambda: False
) -> Iterator[Root]:
    """Roots from all of RAM, lowest first: one for each process, and those of earlier boots. ``near``: only `NEAR`.

    Raises OutOfTime when ``expired`` says so.
    """
    left = MAX_ROOTS
    tops = iter(range(0 if near else MAX_SEARCHES))
    for gpa, data in _chunks(memory, NEAR if near else None):
        if expired():
            raise OutOfTime("searching the guest's memory for page tables took too long")
        for table, mode in _self_referencing(gpa, data) if data else ():
            root = _find_top(memory, table, tops, expired) if mode is Mode.PAE else table
            shared = None if root is None else check_root(memory, root, mode)
            if root is not None and shared:
                space = AddressSpace(memory, root, mode)
                yield Root(space, shared, tuple(_by_kpcr(space)), "by page tables that name themselves")
                left -= 1
                if not left:
                    return


def _chunks(memory: GuestMemory, end: int | None) -> Iterator[tuple[int, bytes]]:
    """RAM without its holes, whole pages in large pieces; empty where all of one is zero.

    Where some pages of a piece cannot be read, zeros stand for them.
    """
    data_regions = getattr(memory, "data_regions", None)
    regions: Iterable[Region] = data_regions() if data_regions else memory.regions
    for region in regions:
        start, stop = -(-region.gpa // PAGE) * PAGE, region.gpa + region.size & -PAGE
        for gpa in range(start, min(stop, end or stop), CHUNK):
            size = min(CHUNK, min(stop, end or stop) - gpa)
            data = memory.readv([(gpa, size)])[0]
            if data is None:
                pages = memory.readv([(at, PAGE) for at in range(gpa, gpa + size, PAGE)])
                data = b"".join([page or _ZEROS[:PAGE] for page in pages])
            if len(data) == size:
                yield gpa, b"" if data == (_ZEROS if size == CHUNK else _ZEROS[:size]) else data


def _self_referencing(gpa: int, data: bytes) -> Iterator[tuple[int, Mode]]:
    """Pages that look like a root (under PAE: the last page directory), by one entry of each, then by the others."""
    quads, words = memoryview(data).cast("Q"), memoryview(data).cast("I")
    for entry_at, mode in ((_SHARED_ENTRY4, Mode.LONG4), (_SHARED_ENTRY5, Mode.LONG5)):
        for found in _KERNEL_TABLE.finditer(data[8 * entry_at :: PAGE]):  # one byte of each page
            number = found.start()
            if not quads[number * 512 + entry_at] & _TOO_HIGH:
                page, upper = gpa + number * PAGE, quads[number * 512 + 256 : number * 512 + 512].tolist()
                if [entry for entry in upper if entry & ADDRESS == page and entry & PRESENT]:
                    yield page, mode
    # An entry that names its own page has the page's upper bits, which are the same for many pages.
    tops = re.compile(b"[%s]" % re.escape(bytes({gpa >> 24 & 0xFF, gpa + len(data) - 1 >> 24 & 0xFF})))
    for found in tops.finditer(data[4 * _SELF32 + 3 :: PAGE]):
        page = gpa + found.start() * PAGE
        if words[found.start() * 1024 + _SELF32] & 0xFFFF_F001 == page | PRESENT:
            yield page, Mode.LEGACY
    for found in tops.finditer(data[8 * _SELF_PAE + 3 :: PAGE]):
        page = gpa + found.start() * PAGE
        if quads[found.start() * 512 + _SELF_PAE] & (ADDRESS | PRESENT) == page | PRESENT:
            yield page, Mode.PAE


def _find_top(memory: GuestMemory, last: int, tops: Iterator[int], expired: Callable[[], bool]) -> int | None:
    """PAE: the 32 bytes that name the four page directories, of which ``last`` is one and names the others.

    First before and behind them, then (as often as ``tops`` allows) everywhere below 4 GiB.
    """
    raw = memory.readv([(last, 32)])[0]
    if raw is None:
        return None
    directories = [entry & ADDRESS for entry in struct.unpack("<4Q", raw)]
    needle = struct.pack("<4Q", *(directory | PRESENT for directory in directories))
    near = [(gpa, PAGE) for gpa in (directories[0] - PAGE, last + PAGE) if gpa >= 0]
    found = _aligned(zip((gpa for gpa, _ in near), memory.readv(near), strict=True), needle)
    if found is None and next(tops, None) is not None:
        found = _aligned(((gpa, None if expired() else data) for gpa, data in _chunks(memory, 1 << 32)), needle)
    return found


def _aligned(pieces: Iterable[tuple[int, bytes | None]], needle: bytes) -> int | None:
    """Where a needle lies at a multiple of 32."""
    for gpa, data in pieces:
        at = data.find(needle) if data else -1
        while data and at >= 0:
            if not at % 32:
                return gpa + at
            at = data.find(needle, at + 1)
    return None
