"""x86-64 page tables, 4 and 5 levels, pages of 4 KiB, 2 MiB and 1 GiB. Bounded whatever the entries say.

A walk descends at most ``levels`` tables, so no content can make it loop; a range walk reads at most `MAX_TABLES`.
Sources: Intel SDM vol. 3A chapter 4 (tables 4-14 to 4-20), Linux arch/x86/include/asm/pgtable_types.h,
arch/x86/mm/pti.c (__pti_set_user_pgtbl: under page-table isolation the kernel's copy of a user PGD entry carries NX,
which the user's own copy does not).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

from appliance.errors import Implausible, UnreadableMemory
from appliance.ports import GuestMemory

PAGE = 4096
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ADDRESS = 0x000F_FFFF_FFFF_F000
MAX_TABLES = 1 << 16


class Pte(NamedTuple):
    """One leaf of a page table: a page of 4 KiB, 2 MiB or 1 GiB. Rights are those of all levels together."""

    va: int
    gpa: int  # 0 unless present
    size: int
    present: bool
    writable: bool
    user: bool
    nx: bool
    accessed: bool
    dirty: bool
    raw: int  # the entry itself; of a page that is not present its swap entry


def is_canonical(va: int, levels: int) -> bool:
    """Whether the unused upper bits of a virtual address repeat its highest used one."""
    top = va >> (11 + 9 * levels)
    return top in (0, (1 << (53 - 9 * levels)) - 1)


def translate(memory: GuestMemory, root: int, va: int, levels: int) -> int | None:
    """The guest-physical address behind a virtual one, None where nothing is mapped (or the tables are unreadable)."""
    if not is_canonical(va, levels):
        return None
    table = root & ADDRESS
    for level in range(levels - 1, -1, -1):
        shift = 12 + 9 * level
        try:
            entry = int.from_bytes(memory.read(table + 8 * ((va >> shift) & 511), 8), "little")
        except UnreadableMemory:
            return None
        if not entry & PRESENT or (entry & LARGE and level >= 3):
            return None
        if not level or entry & LARGE:
            size = 1 << shift
            return (entry & ADDRESS & -size) + (va & (size - 1))
        table = entry & ADDRESS
    return None


def translate_pages(memory: GuestMemory, root: int, pages: Iterable[int], levels: int) -> dict[int, int]:
    """The guest-physical addresses of many 4 KiB pages: one batched read for each level. Unmapped ones are left out."""
    pending = [(page, root & ADDRESS) for page in pages if is_canonical(page, levels)]
    found: dict[int, int] = {}
    for level in range(levels - 1, -1, -1):
        if not pending:
            break
        shift = 12 + 9 * level
        entries = read_entries(memory, [table + 8 * ((page >> shift) & 511) for page, table in pending])
        following = []
        for (page, _), entry in zip(pending, entries, strict=True):
            if entry is None or not entry & PRESENT:
                continue
            if level == 0:
                found[page] = entry & ADDRESS
            elif not entry & LARGE:
                following.append((page, entry & ADDRESS))
            elif level < 3:  # 2 MiB or 1 GiB; the bit is reserved further up
                size = 1 << shift
                found[page] = (entry & ADDRESS & -size) + (page & (size - 1))
        pending = following
    return found


def read_entries(memory: GuestMemory, gpas: Sequence[int]) -> list[int | None]:
    """Read page-table entries, each distinct one once; None where one is unreadable."""
    distinct = list(dict.fromkeys(gpas))
    raw = memory.readv([(gpa, 8) for gpa in distinct])
    values = {
        gpa: None if data is None else int.from_bytes(data, "little") for gpa, data in zip(distinct, raw, strict=True)
    }
    return [values[gpa] for gpa in gpas]


def walk_range(memory: GuestMemory, root: int, start: int, end: int, levels: int) -> Iterator[Pte]:
    """Yield every leaf of ``[start, end)`` that is not zero, in order, swapped-out pages included.

    Tables are read in one batch per parent table. Raises UnreadableMemory when the root is, Implausible beyond
    `MAX_TABLES`; a lower table that cannot be read is skipped.
    """
    if start >= end or not is_canonical(start, levels) or not is_canonical(end - 1, levels):
        return
    top = _Table(root & ADDRESS, start & -(1 << (12 + 9 * levels)), levels - 1, writable=True, user=True, nx=False)
    raw = memory.readv([_part(top, start, end)])[0]
    if raw is None:
        raise UnreadableMemory(root & ADDRESS, PAGE, "page-table root")
    left = MAX_TABLES
    pending: list[list[Pte] | tuple[_Table, bytes]] = [(top, raw)]  # what comes first is last
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            yield from part
            continue
        leaves, below = _entries(*part, start, end, levels)
        if not below:
            yield from leaves
            continue
        left -= len(below)
        if left < 0:
            raise Implausible(f"more than {MAX_TABLES} page tables for one range of addresses")
        contents = memory.readv([_part(child, start, end) for child in below])
        position = len(leaves)
        for child, content in zip(reversed(below), reversed(contents), strict=True):
            behind = position
            while position and leaves[position - 1].va > child.va:
                position -= 1
            pending.append(leaves[position:behind])
            if content is not None:
                pending.append((child, content))
        pending.append(leaves[:position])


class _Table(NamedTuple):
    gpa: int
    va: int  # of its first entry
    level: int
    writable: bool
    user: bool
    nx: bool


def _part(table: _Table, start: int, end: int) -> tuple[int, int]:
    """The span of a table that speaks about [start, end)."""
    first, last = _indices(table, start, end)
    return table.gpa + 8 * first, 8 * (last - first + 1)


def _indices(table: _Table, start: int, end: int) -> tuple[int, int]:
    shift = 12 + 9 * table.level
    return max(0, (start - table.va) >> shift), min(511, (end - 1 - table.va) >> shift)


def _entries(table: _Table, raw: bytes, start: int, end: int, levels: int) -> tuple[list[Pte], list[_Table]]:
    """What the entries of one table say: leaves, and tables below."""
    level, size = table.level, 1 << 12 + 9 * table.level
    above_writable, above_user, above_nx = table.writable, table.user, table.nx
    first = table.va + _indices(table, start, end)[0] * size
    # Page-table isolation marks user entries of the top level NX in the kernel's copy, which is what we read.
    isolated = level == levels - 1
    address = ADDRESS & -size
    below: list[_Table] = []
    leaves: list[Pte] = []
    entries = array("Q", raw)
    for index in compress(range(len(entries)), entries):  # the others are zero
        va, entry = first + index * size, entries[index]
        writable, user = above_writable and entry & WRITABLE != 0, above_user and entry & USER != 0
        nx = above_nx or (entry & NX != 0 and not (isolated and va >> 63 == 0))
        present = entry & PRESENT != 0
        if level and present and not entry & LARGE:
            below.append(_Table(entry & ADDRESS, va, level - 1, writable, user, nx))
        elif level < 3:
            gpa = entry & address if present else 0
            used, dirty = entry & ACCESSED != 0, entry & DIRTY != 0
            leaves.append(Pte(va, gpa, size, present, writable, user, nx, used, dirty, entry))
    return leaves, below
