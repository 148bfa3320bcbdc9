"""Finds the host memory behind a QEMU guest's RAM: in ``/proc/PID/maps``, chosen by name and size, proven by content.

The mapping of plain RAM may be merged with its neighbours or cut up by madvise, so a mapping's borders are only a first
guess; the page tables of the kernel inside decide (anchor.py). A guest without a Linux kernel is accepted when exactly
one mapping has the right size.
Sources: proc(5), QEMU util/mmap-alloc.c (RAM is aligned to 2 MiB), backends/hostmem-memfd.c, hostmem-file.c.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from appliance.errors import GuestGone, HostError, PermissionRefused
from appliance.memory.anchor import SLOT, find_tables, find_windows
from appliance.memory.commandline import Backend, CommandLine
from appliance.memory.layout import Extent, above_start, extents
from appliance.memory.process import ProcessMemory


class Span(NamedTuple):
    """A run of RAM: ``[gpa, end)`` lies at ``hva`` of the QEMU process."""

    gpa: int
    end: int
    hva: int


@dataclass(frozen=True, slots=True)
class Block:
    """One block of host memory; ``offset`` is its place in the machine's linear RAM."""

    hva: int
    size: int
    offset: int
    fd: int | None = None  # of a shared block: a read-only descriptor


@dataclass(frozen=True, slots=True)
class HostMap:
    """Where all of a guest's RAM lies, and how that is known."""

    blocks: tuple[Block, ...]
    spans: tuple[Span, ...]
    proof: str


class Mapping(NamedTuple):
    """One line of ``/proc/PID/maps``."""

    start: int
    end: int
    flags: str
    offset: int
    device: str
    inode: int
    path: str


class _Wanted(NamedTuple):
    """A block that is looked for; ``offset`` is its place in the machine's linear RAM."""

    backend: Backend
    size: int
    offset: int


class _Place(NamedTuple):
    hva: int
    inode: int
    proof: str


def locate(process: ProcessMemory, line: CommandLine) -> HostMap:
    """Find every block. Raises HostError when one cannot be found, PermissionRefused, GuestGone."""
    maps = read_maps(process.pid)
    layout = extents(line, above_start(line, is_amd()))
    wanted = list(_wanted(line))
    places: dict[_Wanted, _Place] = {}
    for quick in (True, False):  # the thorough search only where the quick one leaves a doubt
        for block in wanted:
            if block not in places and (proven := _prove(process, block, maps, layout, places, quick=quick)):
                places[block] = proven
        while settled := _settle([block for block in wanted if block not in places], maps, places):
            places.update(settled)
    for block in wanted:
        if block not in places:
            raise HostError(
                f"the {block.size >> 20} MiB of RAM behind {block.backend.id!r} cannot be told apart among the "
                f"mappings of QEMU process {process.pid}, and no kernel in it settles the matter; "
                "a QMP socket of the guest would"
            )
    blocks = []
    for block in wanted:
        place = places[block]
        shared = block.backend.shared and len(wanted) == 1
        fd = _open_shared(process.pid, place.inode, block.size) if place.inode and shared else None
        blocks.append(Block(place.hva, block.size, block.offset, fd))
    proofs = dict.fromkeys(place.proof for place in places.values())
    return HostMap(tuple(blocks), tuple(_spans(blocks, layout)), "; ".join(proofs))


def _wanted(line: CommandLine) -> Iterator[_Wanted]:
    offset = 0
    for backend in line.blocks:
        size = backend.size or line.ram_size
        yield _Wanted(backend, size, offset)
        offset += size
    if offset < line.ram_size:
        raise HostError(f"QEMU was asked for {line.ram_size:#x} bytes of RAM, but its blocks have {offset:#x}")


def read_maps(pid: int) -> list[Mapping]:
    """Parse ``/proc/PID/maps``. Raises PermissionRefused, GuestGone."""
    try:
        text = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    except PermissionError:
        raise PermissionRefused(
            f"the mappings of process {pid} may not be read: run as root or with CAP_SYS_PTRACE"
        ) from None
    except OSError:
        raise GuestGone(f"process {pid} has ended") from None
    return [_parse(entry) for entry in text.splitlines()]


def _parse(entry: str) -> Mapping:
    span, flags, offset, device, inode, *path = entry.split(None, 5)
    start, end = (int(part, 16) for part in span.split("-"))
    return Mapping(start, end, flags, int(offset, 16), device, int(inode), path[0] if path else "")


def _prove(
    process: ProcessMemory,
    block: _Wanted,
    maps: Sequence[Mapping],
    layout: Sequence[Extent],
    places: dict[_Wanted, _Place],
    *,
    quick: bool,
) -> _Place | None:
    """The place of a block that the page tables of the kernel inside give away."""
    for run in _free(block, maps, places):
        if quick and run.inode:
            continue  # a file's name and size say enough, and reading here and there would fill its holes
        aligned = run.end - run.start == block.size or run.inode
        start = run.start if aligned else -(-run.start // SLOT) * SLOT
        for hva, gpa in find_tables(process, start, run.end, quick=quick):
            base = _base(hva, gpa, block.offset, block.size, layout)
            if base is not None and run.start <= base and base + block.size <= run.end:
                return _Place(base, run.inode, "proven by the guest's kernel page tables")
        for hva, gpa in () if run.inode else find_windows(process, start, run.end, block.size):
            base = _base(hva, gpa, block.offset, block.size, layout)
            if base is not None and run.start <= base and base + block.size <= run.end:
                return _Place(base, run.inode, "proven by the page tables of its Windows kernel")
    return None


def _settle(
    missing: Sequence[_Wanted], maps: Sequence[Mapping], places: dict[_Wanted, _Place]
) -> dict[_Wanted, _Place]:
    """The first block for which exactly one mapping of its size is left, or the first of equal files."""
    for block in missing:
        exact = [run for run in _free(block, maps, places) if run.end - run.start == block.size]
        if len(exact) == 1 and sum(other.size == block.size for other in missing) == 1:
            return {block: _Place(exact[0].start, exact[0].inode, "the only mapping of that size")}
        if len(exact) > 1 and all(run.inode for run in exact):
            first = min(exact, key=lambda run: run.inode)  # QEMU opens the files of equal nodes in their order
            return {block: _Place(first.start, first.inode, "by order among equal files")}
    return {}


def _free(block: _Wanted, maps: Sequence[Mapping], places: dict[_Wanted, _Place]) -> list[Mapping]:
    """Where the block may lie: runs of mappings, and single mappings of just its size, less what is taken."""
    runs = list(_runs(block.backend, maps))
    whole = {(run.start, run.end) for run in runs}
    runs += [m for m in maps if _fits(block.backend, m) and m.end - m.start == block.size and m[:2] not in whole]
    for taken, place in places.items():
        end = place.hva + taken.size
        cut = [(run, run.start, min(run.end, place.hva)) for run in runs]
        cut += [(run, max(run.start, end), run.end) for run in runs if run.end > end]
        runs = [run._replace(start=start, end=stop) for run, start, stop in cut if start < stop]
    return [run for run in dict.fromkeys(runs) if run.end - run.start >= block.size]


def _base(hva: int, gpa: int, offset: int, size: int, layout: Sequence[Extent]) -> int | None:
    """The host address of a block, given that guest-physical ``gpa`` was seen at ``hva``."""
    for extent in layout:
        if extent.gpa <= gpa < extent.gpa + extent.size:
            linear = extent.offset + gpa - extent.gpa
            return hva - (linear - offset) if offset <= linear < offset + size else None
    return None


def _fits(backend: Backend, mapping: Mapping) -> bool:
    if not mapping.flags.startswith("rw"):
        return False
    if backend.kind == "memfd":
        return mapping.path.startswith("/memfd:")
    if backend.kind == "file":
        folder = (backend.path or "").rstrip("/")
        # A directory gets an unlinked file of QEMU's own naming (qemu_back_mem.ID.XXXXXX).
        return mapping.path.removesuffix(" (deleted)") == folder or mapping.path.startswith(folder + "/")
    if backend.shared:  # anonymous shared memory: the kernel's own tmpfs, or a memfd by newer QEMU
        return mapping.flags[3] == "s" and mapping.path.startswith(("/dev/zero", "/memfd:"))
    return mapping.inode == 0 and mapping.flags[3] == "p" and (not mapping.path or mapping.path.startswith("[anon"))


def _runs(backend: Backend, maps: Sequence[Mapping]) -> Iterator[Mapping]:
    """Adjacent mappings that belong together, joined."""
    current: Mapping | None = None
    for mapping in maps:
        if not _fits(backend, mapping):
            continue
        if current and mapping.start == current.end and mapping.inode == current.inode:
            current = current._replace(end=mapping.end)
            continue
        if current:
            yield current
        current = mapping
    if current:
        yield current


def _spans(blocks: Sequence[Block], layout: Sequence[Extent]) -> Iterator[Span]:
    for extent in layout:
        for block in blocks:
            start = max(extent.offset, block.offset)
            end = min(extent.offset + extent.size, block.offset + block.size)
            if start < end:
                gpa = extent.gpa + start - extent.offset
                yield Span(gpa, gpa + end - start, block.hva + start - block.offset)


def _open_shared(pid: int, inode: int, size: int) -> int | None:
    """A read-only descriptor of the file behind shared RAM, through QEMU's own; None: read it as plain RAM."""
    try:
        paths = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None
    for path in paths:
        try:
            status = path.stat()
            if status.st_ino == inode and status.st_size >= size:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
    return None


def is_amd() -> bool:
    """Whether guests of this host have processors of AMD, as far as the map of RAM is concerned."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:400]
    except OSError:
        return False
