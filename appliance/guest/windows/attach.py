"""Attaches to a Windows guest with nothing but its RAM and the symbols of its kernel.

Steps: the page tables (roots.py), the kernel's image below them, the record RSDS in it, the symbols that it names, and
with them the System process, whose own page tables are used from then on. Each is checked against another source
before it is believed. Where registers are known, nothing is searched; else the low stub tells; else all of RAM is
looked through. Several kernels may lie in RAM: the one whose clock is latest runs.
Sources: exports and symbols of ntoskrnl.exe (PsInitialSystemProcess, PsLoadedModuleList); _KDDEBUGGER_DATA64
(OwnerTag "KDBG" at 10h, KernBase at 18h).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from appliance.errors import GuestError, GuestGone, Implausible, OutOfTime, UnreadableMemory, UnsupportedGuest
from appliance.guest.windows import pe, xp_types
from appliance.guest.windows.isf import PdbId, SymbolTable
from appliance.guest.windows.kernel import BUILDS, KUSER32, KUSER64, SymbolSource, UserShared, WindowsKernel
from appliance.guest.windows.roots import (
    Root,
    check_root,
    find_by_stub,
    find_by_tables,
    find_by_vcpus,
    is_linux,
    looks_like_windows,
    runs,
)
from appliance.guest.windows.space import PAGE, AddressSpace, Mode
from appliance.guest.windows.xp_kpcr import find_by_kpcr
from appliance.ports import GuestMemory

__all__ = ["attach", "looks_like_windows"]

KERNELS = frozenset(("ntoskrnl.pdb", "ntkrnlmp.pdb", "ntkrnlpa.pdb", "ntkrpamp.pdb", "ntkrla57.pdb"))
SPAN = 64 << 20  # how far below an address in it the kernel's image begins at most
SYSTEM_PID = 4
_TAG_AT = 0x10  # in _KDDEBUGGER_DATA64
MAX_PAGES = 1 << 20  # mapped pages that are looked at for the beginning of an image
MAX_KERNELS = 8  # in one RAM
_EXPORTED = "ntoskrnl.exe"
_BATCH = 256
_IMAGES64 = (0xFFFF_F800_0000_0000, 0xFFFF_F880_0000_0000)
_IMAGES32 = (0x8000_0000, 0xFFC0_0000)


class Located(NamedTuple):
    """A kernel's image, found by page tables of its own."""

    space: AddressSpace
    shared: UserShared
    base: int
    headers: pe.Headers
    pdb: PdbId | None  # None: the image does not say
    how: str


def attach(
    memory: GuestMemory,
    *,
    symbols: SymbolSource | None = None,
    seconds: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> WindowsKernel:
    """Attach to the Windows kernel in this RAM, in ``seconds`` at most.

    Raises UnsupportedGuest (no Windows, or no symbols for it: then with the command that gets them), Implausible,
    UnreadableMemory, OutOfTime, GuestGone.
    """
    end = clock() + seconds
    trouble: GuestError = UnsupportedGuest(("no running Windows kernel was found in its memory",))
    for roots, is_sure in _rounds(memory, lambda: clock() > end):
        found = sorted(_locate_all(roots, lambda: clock() > end), key=_age, reverse=True)
        if not is_sure and not (memory.live and found and runs(found[0].space, found[0].shared, clock)):
            continue
        for located in found:
            try:
                return _assemble(located, symbols)
            except (UnsupportedGuest, GuestGone):  # it runs: an older one in the same RAM would be the wrong one
                raise
            except GuestError as error:
                trouble = error
        if clock() > end:
            raise OutOfTime("the guest's memory is too large to be searched in time")
    raise trouble


def _rounds(memory: GuestMemory, expired: Callable[[], bool]) -> Iterator[tuple[Iterator[Root], bool]]:
    """Where to look, one after the other, and whether what is found there is surely the kernel that runs."""
    yield find_by_vcpus(memory), True
    yield find_by_stub(memory), True
    if not is_linux(memory):
        yield find_by_tables(memory, near=True, expired=expired), False
        yield find_by_tables(memory, expired=expired), True


def _age(located: Located) -> tuple[int, int]:
    """What grows from boot to boot, and within one."""
    return located.shared.system_time, located.shared.interrupt_time


def _locate_all(roots: Iterator[Root], expired: Callable[[], bool]) -> Iterator[Located]:
    """The kernels below these roots, each once. The time running out ends the search, not what was found."""
    seen: set[int] = set()  # where a kernel's KUSER_SHARED_DATA lies: all its processes share it
    try:
        for root in roots:
            place = root.space.to_gpa(KUSER64 if root.space.pointer_size == 8 else KUSER32)
            if place is None or place in seen:
                continue
            located = _locate(root, expired)
            if located:
                seen.add(place)
                yield located
            if len(seen) >= MAX_KERNELS:
                return
    except OutOfTime:
        return


def _locate(root: Root, expired: Callable[[], bool]) -> Located | None:
    """The kernel's image: downwards from addresses in it, else wherever images are mapped."""
    tried: set[int] = set()
    for hint in root.hints:
        for base in _images_below(root.space, hint):
            if base not in tried:
                tried.add(base)
                found = _examine(root, base)
                if found:
                    return found
    for base in _images_mapped(root.space, expired):
        if base not in tried:
            tried.add(base)
            found = _examine(root, base)
            if found:
                return found
    return None


def _examine(root: Root, base: int) -> Located | None:
    """Whether the image at ``base`` is a kernel: by the name of its symbols, or by its exported name."""
    space = root.space
    try:
        headers = pe.read_headers(space, base)
        if headers.is64 != (space.pointer_size == 8):
            return None
        pdb = pe.find_debug_id(space, base, headers, thorough=False)
        if pdb is None and pe.find_export_name(space, base, headers).lower() == _EXPORTED:
            pdb = pe.find_debug_id(space, base, headers)
            if pdb is None or pdb.name not in KERNELS:
                pdb = pe.seek_debug_id(space, base, headers.size, KERNELS)
            return Located(space, root.shared, base, headers, pdb, root.how)
    except (Implausible, UnreadableMemory):
        return None
    return Located(space, root.shared, base, headers, pdb, root.how) if pdb and pdb.name in KERNELS else None


def _images_below(space: AddressSpace, hint: int) -> Iterator[int]:
    """Pages at or below an address that begin like an image, nearest first. Holes are passed over."""
    top = hint & -PAGE
    lowest = max(top - SPAN, 1 << 63 if space.pointer_size == 8 else 0x8000_0000)
    for end in range(top, lowest, -_BATCH * PAGE):
        pages = range(end, max(end - _BATCH * PAGE, lowest), -PAGE)
        for page, head in zip(pages, space.readv([(page, 2) for page in pages]), strict=True):
            if head == b"MZ":
                yield page


def _images_mapped(space: AddressSpace, expired: Callable[[], bool]) -> Iterator[int]:
    """Pages that begin like an image, wherever the kernel maps some. Raises OutOfTime."""
    pages = _mapped(space)
    for _ in range(0, MAX_PAGES, 16 * _BATCH):
        if expired():
            raise OutOfTime("searching the guest's memory for its kernel took too long")
        batch = [page for page, _ in zip(pages, range(16 * _BATCH), strict=False)]
        if not batch:
            return
        for page, head in zip(batch, space.readv([(page, 2) for page in batch]), strict=True):
            if head == b"MZ":
                yield page


def _mapped(space: AddressSpace) -> Iterator[int]:
    try:
        for leaf in space.walk_pages(*(_IMAGES64 if space.pointer_size == 8 else _IMAGES32)):
            if leaf.present:
                yield from range(leaf.va, leaf.va + leaf.size, PAGE)
    except (UnreadableMemory, Implausible):
        return


def _assemble(located: Located, symbols: SymbolSource | None) -> WindowsKernel:
    """Put the pieces together, checking one against the other."""
    types = _types(located, symbols)
    space, size = located.space, located.headers.size
    kernel = WindowsKernel(
        space,
        base=located.base,
        size=size,
        types=types,
        shared=located.shared,
        store=symbols,
        pdb=located.pdb,
    )
    dtb = _system_root(kernel)
    shared = check_root(space.memory, dtb, space.mode)
    if shared is None:
        raise Implausible("the page tables of the guest's System process do not map what Windows shares with everyone")
    head = kernel.symbol("PsLoadedModuleList")
    if space.pointer(space.pointer(head) + space.pointer_size) != head:
        raise Implausible("the guest's list of modules does not lead back to its head")
    kernel = WindowsKernel(
        space.other(dtb),
        base=located.base,
        size=size,
        types=types,
        shared=shared,
        store=symbols,
        pdb=located.pdb,
    )
    version = pe.find_version(kernel.space, located.base, located.headers)
    kernel.revision = version[3] if version else None
    name = f"Windows {kernel.release}" + (f".{kernel.revision}" if kernel.revision else "")
    bits = {Mode.LEGACY: "x86", Mode.PAE: "x86 with PAE", Mode.LONG4: "x64", Mode.LONG5: "x64 with 5 levels"}
    kernel.describe = f"{name} {bits[space.mode]}, {located.pdb or 'no symbols named'}, found {located.how}"
    return kernel


def _types(located: Located, symbols: SymbolSource | None) -> SymbolTable:
    """Symbols and types: by what the image says, else (XP, Server 2003) tables of ours that this guest confirms."""
    trouble: UnsupportedGuest | None = None
    if located.pdb and symbols:
        try:
            return symbols.find(located.pdb)
        except UnsupportedGuest as error:
            trouble = error
    if located.shared.major == 5:
        kdbg = _find_kdbg(located)
        if kdbg is not None:
            build = _build(located, kdbg)
            return xp_types.choose(located.space, located.base, located.headers.size, build, kdbg, located.pdb)[1]
    raise trouble or UnsupportedGuest((f"no symbols for {located.pdb or 'its kernel'}",))


def _find_kdbg(located: Located) -> int | None:
    """The kernel's debugger data: what _KPCR of CPU 0 leads to (x86), else in a section it may write to."""
    space = located.space
    view = find_by_kpcr(space)
    if view is not None and view.base == located.base and view.kdbg:
        return view.kdbg
    for section in located.headers.sections:
        if section.flags & pe.WRITE:
            pages = range(located.base + section.rva, located.base + section.rva + min(section.size, 4 << 20), PAGE)
            for page, data in zip(pages, space.readv([(page, PAGE) for page in pages]), strict=True):
                for found in re.finditer(b"KDBG", data or b""):
                    if found.start() >= _TAG_AT and _is_kdbg(located, (data or b"")[found.start() :]):
                        return page + found.start() - _TAG_AT
    return None


def _is_kdbg(located: Located, raw: bytes) -> bool:
    """Whether these bytes, from OwnerTag on, name this kernel."""
    size = located.space.pointer_size
    return raw[:4] == b"KDBG" and raw[8 : 8 + size] == located.base.to_bytes(size, "little")


def _build(located: Located, kdbg: int) -> int:
    """The build number in the text that the debugger data names ("2600.xpsp_sp3..."), 0 where there is none."""
    try:
        text = located.space.read_text(located.space.pointer(kdbg + xp_types.KDBG_SYMBOLS["NtBuildLab"]), 8)
    except UnreadableMemory:
        return 0
    number = text.split(b".", 1)[0]
    return int(number) if number.isdigit() and int(number) in BUILDS else 0


def _system_root(kernel: WindowsKernel) -> int:
    """The page tables of the System process, which end with the machine only. Raises Implausible."""
    space, types = kernel.space, kernel.types
    links = types.offset("_EPROCESS.ActiveProcessLinks")
    by_symbol = kernel.find("PsInitialSystemProcess")
    process = space.pointer(by_symbol) if by_symbol else space.pointer(kernel.symbol("PsActiveProcessHead")) - links
    if space.pointer(process + types.offset("_EPROCESS.UniqueProcessId")) != SYSTEM_PID:
        raise Implausible("the guest's first process is not the one with the pid 4: other symbols than its kernel's?")
    return space.pointer(process + types.offset("_EPROCESS.Pcb.DirectoryTableBase"))
