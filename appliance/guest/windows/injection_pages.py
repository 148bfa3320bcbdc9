"""The pages behind a region of a process: which are in memory, which are executable, whose copies they are.

Page tables are read here in whole and judged entry by entry without making an object of each: a process has some
hundred thousand. A page of an image belongs to the image's section until somebody writes to it; then the process gets
a copy. The section's own entry for a page, its *prototype*, is valid or in transition as long as the shared page is in
memory; so a page that a process maps and that its prototype does not name is a private copy. No database of pages is
needed for that.
Sources: Intel SDM vol. 3A chapter 4; symbols _MMPTE_HARDWARE, _MMPTE_TRANSITION, _MMVAD.FirstPrototypePte of
ntkrnlmp.pdb; Windows Internals, 7th ed. part 1, chapter 5 (prototype PTEs).
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from appliance.errors import GuestError
from appliance.guest.budget import Budget
from appliance.guest.windows.space import ADDRESS, PROTOTYPE, TRANSITION, AddressSpace, Mode

PAGE: Final = 4096
PRESENT, WRITABLE, USER, LARGE, NX = 1, 2, 4, 0x80, 1 << 63  # Intel SDM
SOFT_EXECUTE, SOFT_WRITE = 2 << 5, 4 << 5  # _MMPTE_TRANSITION.Protection: MM_EXECUTE, MM_READWRITE
BATCH: Final = 64  # pages hashed between two looks at the clock, tables read at once
HEAD_BYTES: Final = 32  # shown
MAX_TABLES: Final = 1 << 16  # of one level
MAX_HASHED: Final = 4096  # pages of one region that are hashed and searched: 16 MiB

Range = tuple[int, int]  # [start, end)


class Leaf(NamedTuple):
    """A page that is in memory."""

    va: int
    gpa: int
    size: int
    executable: bool
    writable: bool
    valid: bool  # False: trimmed from the working set, and still in memory


class Digest(NamedTuple):
    """What is in memory of a range. ``sha256`` is over the resident bytes in address order."""

    resident: int  # pages of 4 KiB
    total: int
    hashed: int
    sha256: str | None
    head: bytes
    first_va: int
    blank: bool  # all bytes read are 0

    def __str__(self) -> str:
        text = f"{self.resident} of {self.total} pages resident"
        if self.hashed < self.resident:
            text += f", {self.hashed} of them hashed"
        return text + (f", bytes at {self.first_va:#x}: {self.head.hex()}" if self.head else "")


class _Table(NamedTuple):
    base: int  # the first address that it speaks about
    gpa: int  # of a large page: the entry
    nx: bool
    writable: bool


class Pages:
    """Looks at pages of one process."""

    def __init__(self, space: AddressSpace) -> None:
        self.space = space
        mode = space.mode
        self._entry = mode.value[1]
        self._code = "Q" if self._entry == 8 else "I"
        bits = 9 if self._entry == 8 else 10
        count = mode.value[0]
        self._shifts = [12 + bits * level for level in range(count - 1, -1, -1)]
        self._pae = mode is Mode.PAE
        self.has_nx = mode is not Mode.LEGACY

    def leaves(self, ranges: Sequence[Range], budget: Budget, *, executable: bool = False) -> list[Leaf]:
        """The pages in memory of disjoint ranges, in address order; only executable ones if asked for.

        What the budget does not allow is noted there. Raises GuestGone, and OutOfTime at the guest's own limit.
        """
        found: list[Leaf] = []
        inside = _Ranges(ranges)
        tables = [_Table(0, self.space.root, nx=False, writable=True)]
        for depth in range(len(self._shifts)):
            below: list[_Table] = []
            for at in range(0, len(tables), BATCH):
                if budget.over or len(below) > MAX_TABLES:
                    budget.cut_off(f"page tables from {tables[at].base:#x} on")
                    break
                before = len(found)
                for table, entries in self._read(tables[at : at + BATCH], top=depth == 0):
                    if depth == len(self._shifts) - 1:
                        found += self._last(table, entries, inside, executable)
                    else:
                        found += self._middle(table, entries, depth, inside, below, executable)
                budget.spend(len(tables[at : at + BATCH]) + len(found) - before)
            tables = below
        found.sort()
        return found

    def _read(self, tables: Sequence[_Table], *, top: bool) -> Iterator[tuple[_Table, array[int]]]:
        size = 32 if top and self._pae else PAGE  # the top table of PAE has four entries
        raws = self.space.memory.readv([(table.gpa, size) for table in tables])
        for table, raw in zip(tables, raws, strict=True):
            if raw is not None:
                yield table, array(self._code, raw)

    def _last(self, table: _Table, entries: array[int], inside: _Ranges, executable: bool) -> Iterator[Leaf]:
        """The leaves of a lowest table."""
        if executable and table.nx:
            return
        if executable and self.has_nx:
            wanted = [i for i, e in enumerate(entries) if (e & 1 and e < NX) or e & 0xC41 == TRANSITION | SOFT_EXECUTE]
        else:
            wanted = [i for i, e in enumerate(entries) if e & 1 or e & 0xC01 == TRANSITION]
        for index in wanted:
            va, entry = table.base + (index << 12), entries[index]
            if not inside.has(va, PAGE):
                continue
            if entry & PRESENT:
                allowed = not (table.nx or (self.has_nx and entry >= NX))
                yield Leaf(va, entry & ADDRESS, PAGE, allowed, table.writable and bool(entry & WRITABLE), True)
            else:
                may_run, may_write = bool(entry & SOFT_EXECUTE), bool(entry & SOFT_WRITE)
                gpa = entry & self.space.in_ram
                yield Leaf(va, gpa, PAGE, may_run and not table.nx, may_write and table.writable, False)

    def _middle(
        self, table: _Table, entries: array[int], depth: int, inside: _Ranges, below: list[_Table], executable: bool
    ) -> Iterator[Leaf]:
        """The large pages of an upper table; the tables under it are added to ``below``."""
        shift = self._shifts[depth]
        rightless = depth == 0 and self._entry == 8  # KVA shadow: the kernel's copy carries NX; PAE: there are none
        low = max(0, (inside.start - table.base) >> shift)
        for index, entry in enumerate(entries[low : ((inside.end - 1 - table.base) >> shift) + 1], low):
            present = bool(entry & PRESENT)
            if not entry or (not present and entry & (TRANSITION | PROTOTYPE) != TRANSITION):
                continue
            va = table.base + (index << shift)
            if not inside.has(va, 1 << shift):
                continue
            nx = table.nx or (present and entry >= NX and not rightless)
            if executable and nx:
                continue
            writable = table.writable and (rightless or not present or bool(entry & WRITABLE))
            if present and entry & LARGE and shift <= 30 and not (depth == 0 and self._pae):
                yield from self._large(_Table(va, entry, nx, writable), shift, inside)
            else:
                below.append(_Table(va, entry & (ADDRESS if present else self.space.in_ram), nx, writable))

    def _large(self, page: _Table, shift: int, inside: _Ranges) -> Iterator[Leaf]:
        size = 1 << shift
        pse36 = (page.gpa & 0xFFC0_0000) | (page.gpa >> 13 & 0xFF) << 32
        gpa = pse36 if self._entry == 4 else page.gpa & ADDRESS & -size
        for start, end in inside.within(page.base, size):
            yield Leaf(start, gpa + start - page.base, end - start, not page.nx, page.writable, True)

    def count_paged_out(self, start: int, end: int) -> int:
        """How many of the first `MAX_HASHED` pages from ``start`` on are in a paging file, or merged with equal ones.

        A page that was never touched has no entry, or one that says its protection only. Raises GuestError.
        """
        end = min(end, start + MAX_HASHED * PAGE)
        shift = 32 if self._entry == 8 else 12  # _MMPTE_SOFTWARE.PageFileHigh
        entries = (pte.raw for pte in self.space.walk_pages(start, end) if not pte.present and not pte.gpa)
        return sum(1 for raw in entries if raw >> shift or raw & PROTOTYPE)

    def digest(
        self, leaves: Sequence[Leaf], start: int, end: int, budget: Budget
    ) -> tuple[Digest, list[tuple[int, bytes]]]:
        """Hash the first `MAX_HASHED` resident pages of ``[start, end)``; also each one's address and bytes."""
        sha, hashed, blank = hashlib.sha256(), 0, True
        head, first_va = b"", 0
        kept: list[tuple[int, bytes]] = []
        small = small_of(leaves, MAX_HASHED)
        for chunk in range(0, len(small), BATCH):
            if budget.over:
                budget.cut_off(f"bytes of {start:#x}-{end:#x}: from {small[chunk].va:#x} on")
                break
            part = small[chunk : chunk + BATCH]
            for page, raw in zip(part, self.read(part), strict=True):
                if raw is None:
                    continue
                kept.append((page.va, raw))
                if not head:
                    head, first_va = raw[:HEAD_BYTES], page.va
                sha.update(raw)
                hashed += 1
                blank = blank and not raw.strip(b"\0")
            budget.spend(len(part))
        resident, total = sum(leaf.size for leaf in leaves) // PAGE, max((end - start) // PAGE, 1)
        return Digest(resident, total, hashed, sha.hexdigest() if hashed else None, head, first_va, blank), kept

    def read(self, leaves: Sequence[Leaf]) -> list[bytes | None]:
        """The bytes of pages."""
        return self.space.memory.readv([(leaf.gpa, leaf.size) for leaf in leaves])


class Prototypes:
    """The prototype entries of mapped images: where the shared pages are."""

    def __init__(self, kernel_space: AddressSpace) -> None:
        self._space = kernel_space
        self._size = 4 if kernel_space.mode is Mode.LEGACY else 8

    def shared(self, first: int, numbers: Sequence[int]) -> list[int | None]:
        """Where the shared page of each page number of a view is, whose prototype entries begin at ``first``.

        0: it is not in memory; None: that cannot be told.
        """
        if not first or first % self._size:
            return [None] * len(numbers)
        wanted = [first + self._size * number for number in numbers]
        pages = sorted({va & -PAGE for va in wanted})
        try:
            blocks = dict(zip(pages, self._space.readv([(page, PAGE) for page in pages]), strict=True))
        except GuestError:
            return [None] * len(numbers)
        found: list[int | None] = []
        for va in wanted:
            block = blocks[va & -PAGE]
            at = va % PAGE
            found.append(None if block is None else self._frame(int.from_bytes(block[at : at + self._size], "little")))
        return found

    def _frame(self, entry: int) -> int:
        """Where the page of a prototype entry is; 0 where it is not in memory."""
        if entry & PRESENT:
            return entry & ADDRESS
        return entry & self._space.in_ram if entry & (TRANSITION | PROTOTYPE) == TRANSITION else 0


def small_of(leaves: Sequence[Leaf], most: int) -> list[Leaf]:
    """The same pages as pages of 4 KiB, the first ``most`` of them."""
    if all(leaf.size == PAGE for leaf in leaves):
        return list(leaves[:most])
    small = (
        leaf._replace(va=leaf.va + at, gpa=leaf.gpa + at, size=min(PAGE, leaf.size - at))
        for leaf in leaves
        for at in range(0, leaf.size, PAGE)
    )
    return list(islice(small, most))


def merge(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """Adjacent pages together."""
    runs: list[list[Leaf]] = []
    for leaf in leaves:
        if runs and runs[-1][-1].va + runs[-1][-1].size == leaf.va:
            runs[-1].append(leaf)
        else:
            runs.append([leaf])
    return runs


class _Ranges:
    """Sorted, disjoint ranges of addresses."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [start for start, _ in self._ranges]
        self.start, self.end = (self._ranges[0][0], self._ranges[-1][1]) if self._ranges else (0, 0)

    def has(self, va: int, size: int) -> bool:
        """Whether ``[va, va + size)`` touches one."""
        number = bisect_right(self._starts, va + size - 1) - 1
        return number >= 0 and self._ranges[number][1] > va

    def within(self, va: int, size: int) -> Iterator[Range]:
        """The parts of ``[va, va + size)`` that lie in one."""
        number = max(bisect_right(self._starts, va) - 1, 0)
        for start, end in self._ranges[number:]:
            if start >= va + size:
                return
            if end > va:
                yield max(start, va), min(end, va + size)
