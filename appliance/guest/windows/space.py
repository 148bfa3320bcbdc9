"""Virtual memory of a Windows guest: x86 with and without PAE, x86-64 with 4 and 5 levels, pages of every size.

A translation descends a fixed number of tables, so no content can make it loop. Translations are remembered until
`forget`, which belongs at the start of each look. A *transition* entry (not valid, transition bit set, prototype bit
clear) names a page that Windows has trimmed from a working set and that still lies in RAM: it is read through. What is
paged out, or known to a prototype entry only, is unreadable.
Sources: Intel SDM vol. 3A chapter 4 (tables 4-4 to 4-20); symbols _MMPTE_HARDWARE, _MMPTE_TRANSITION, _MMPTE_SOFTWARE
of ntkrnlmp.pdb (Valid 0, Protection 5..9, Prototype 10, Transition 11, PageFrameNumber 12..); MSRC, "KVA Shadow:
Mitigating Meltdown on Windows" (the kernel's copy of a user PML4 entry carries NX, the user's own does not).
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

from appliance.errors import Implausible, OutOfTime, UnreadableMemory
from appliance.guest.paging import ACCESSED, DIRTY, LARGE, NX, PAGE, PRESENT, USER, WRITABLE, Pte
from appliance.ports import GuestMemory

__all__ = ["PAGE", "AddressSpace", "Mode", "Pte"]

PROTOTYPE, TRANSITION = 1 << 10, 1 << 11
ADDRESS = 0x000F_FFFF_FFFF_F000
READ_LIMIT = 64 << 20  # bytes of one read: no length that a guest names may be larger
CACHE_LIMIT = 1 << 17  # remembered translations
MAX_TABLES = 1 << 16  # of one range of addresses


class _Level(NamedTuple):
    """One level of the tables, the root's first."""

    shift: int  # of the address bits that choose the entry
    mask: int  # of the index
    large: bool  # whether an entry may be a page itself


class Mode(Enum):
    """How addresses are translated. The value is the number of levels and the bytes of an entry."""

    LEGACY = (2, 4)  # x86, CR4.PAE clear
    PAE = (3, 8)
    LONG4 = (4, 8)
    LONG5 = (5, 8)

    @property
    def pointer_size(self) -> int:
        """Bytes of a pointer of the guest's kernel."""
        return 4 if self in (Mode.LEGACY, Mode.PAE) else 8

    @property
    def bits(self) -> int:
        """Significant bits of a virtual address."""
        return {Mode.LEGACY: 32, Mode.PAE: 32, Mode.LONG4: 48, Mode.LONG5: 57}[self]

    def root(self, cr3: int) -> int:
        """The guest-physical address of the top table that CR3 (or _KPROCESS.DirectoryTableBase) names."""
        if self is Mode.PAE:
            return cr3 & 0xFFFF_FFE0
        return cr3 & (0xFFFF_F000 if self is Mode.LEGACY else ADDRESS)

    @classmethod
    def of(cls, cr0: int, cr4: int, *, long_mode: bool) -> Mode | None:
        """The mode that control registers ask for; None while paging is off."""
        if not cr0 >> 31 & 1:
            return None
        if long_mode:
            return cls.LONG5 if cr4 >> 12 & 1 else cls.LONG4
        return cls.PAE if cr4 >> 5 & 1 else cls.LEGACY


_LEVELS = {
    Mode.LEGACY: (_Level(22, 1023, large=True), _Level(12, 1023, large=False)),
    Mode.PAE: (_Level(30, 3, large=False), _Level(21, 511, large=True), _Level(12, 511, large=False)),
    Mode.LONG4: (
        _Level(39, 511, large=False),
        _Level(30, 511, large=True),
        _Level(21, 511, large=True),
        _Level(12, 511, large=False),
    ),
}
_LEVELS[Mode.LONG5] = (_Level(48, 511, large=False), *_LEVELS[Mode.LONG4])


class _Deadline:
    """Shared by all address spaces of one guest."""

    __slots__ = ("clock", "until")

    def __init__(self) -> None:
        self.until = math.inf
        self.clock: Callable[[], float] = time.monotonic

    def check(self) -> None:
        if self.clock() > self.until:
            raise OutOfTime("reading the guest took too long")


class AddressSpace:
    """One virtual address space. ``root`` is the guest-physical address of its top table (CR3 without its flags).

    Reads raise UnreadableMemory, OutOfTime or GuestGone; batched reads give None per item instead of UnreadableMemory.
    All numbers are little-endian. One instance belongs to one thread.
    """

    def __init__(self, memory: GuestMemory, root: int, mode: Mode, *, deadline: _Deadline | None = None) -> None:
        self.memory, self.mode, self.root = memory, mode, mode.root(root)
        self.pointer_size = mode.pointer_size
        self._bits = mode.bits
        self._long = mode.pointer_size == 8
        self._levels = _LEVELS[mode]
        self._entry_size = mode.value[1]
        self._deadline = deadline or _Deadline()
        self._pages: dict[int, int] = {}  # page number to guest-physical address
        self._tables: dict[int, int] = {}  # the upper bits of page numbers to the table that speaks of them
        self._table_bits = self._levels[-1].mask.bit_length()
        self._read_physical = memory.read
        # A transition entry may carry set bits above all RAM (_MMPTE_TRANSITION.SwizzleBit clear, against L1TF).
        last = memory.regions[-1:]
        self.in_ram = ADDRESS & (1 << (last[0].gpa + last[0].size - 1).bit_length()) - 1 if last else 0

    # -- reads --

    def read(self, va: int, size: int) -> bytes:
        """Return exactly ``size`` bytes at a virtual address."""
        deadline = self._deadline
        if deadline.until != math.inf:
            deadline.check()
        offset = va & 0xFFF
        gpa = self._pages.get(va >> 12)
        if gpa is not None and 0 <= size <= PAGE - offset:
            return self._read_physical(gpa + offset, size)
        data = self._read_walked(((va, size),))[0]
        if data is None:
            raise UnreadableMemory(va, size, "not mapped, or paged out")
        return data

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(va, size)`` spans, all their missing translations together; None where one is unreadable."""
        deadline = self._deadline
        if deadline.until != math.inf:
            deadline.check()
        pages = self._pages
        try:
            physical = [
                (pages[va >> 12] + (va & 0xFFF), size) for va, size in spans if 0 <= size <= PAGE - (va & 0xFFF)
            ]
        except KeyError:
            return self._read_walked(spans)
        if len(physical) != len(spans):
            return self._read_walked(spans)
        return self.memory.readv(physical) if physical else []

    def pointer(self, va: int) -> int:
        """A pointer of the guest's kernel: 4 or 8 bytes."""
        return int.from_bytes(self.read(va, self.pointer_size), "little")

    def u64(self, va: int) -> int:
        """An unsigned 64-bit number."""
        return int.from_bytes(self.read(va, 8), "little")

    def u32(self, va: int) -> int:
        """An unsigned 32-bit number."""
        return int.from_bytes(self.read(va, 4), "little")

    def u16(self, va: int) -> int:
        """An unsigned 16-bit number."""
        return int.from_bytes(self.read(va, 2), "little")

    def u8(self, va: int) -> int:
        """An unsigned byte."""
        return self.read(va, 1)[0]

    def read_text(self, va: int, limit: int) -> bytes:
        """NUL-terminated bytes, at most ``limit``, without the NUL. Never reads past a page it need not."""
        text = b""
        while len(text) < limit:
            size = min(limit - len(text), PAGE - (va + len(text)) % PAGE)
            part = self.read(va + len(text), size)
            end = part.find(b"\0")
            if end >= 0:
                return text + part[:end]
            text += part
        return text

    def read_wide(self, va: int, size: int) -> str:
        """UTF-16 text of ``size`` bytes (clamped to 64 KiB), what cannot be decoded replaced, cut at a NUL."""
        raw = self.read(va, min(max(size, 0), 0xFFFE) & -2)
        return raw.decode("utf-16-le", "replace").split("\0", 1)[0]

    # -- translation --

    def to_gpa(self, va: int) -> int | None:
        """The guest-physical address behind a virtual one, None where nothing is mapped."""
        number = va >> 12
        if number not in self._pages:
            self._resolve((number,))
        gpa = self._pages.get(number)
        return None if gpa is None else gpa + (va & 0xFFF)

    def forget(self) -> None:
        """Drop remembered translations; call at the start of each look."""
        self._pages.clear()
        self._tables.clear()

    @contextmanager
    def limit(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Within this, reads of this space and its `other` ones raise OutOfTime once so many seconds have passed.

        An outer limit that ends earlier stays in force when both read the same clock.
        """
        deadline = self._deadline
        before = deadline.until, deadline.clock
        until = clock() + seconds
        if clock is deadline.clock:
            until = min(until, deadline.until)
        deadline.until, deadline.clock = until, clock
        try:
            yield
        finally:
            deadline.until, deadline.clock = before

    def other(self, root: int) -> AddressSpace:
        """Another process's address space: same memory, mode and deadline, translations of its own."""
        return AddressSpace(self.memory, root, self.mode, deadline=self._deadline)

    def walk_pages(self, start: int, end: int) -> Iterator[Pte]:
        """Yield every leaf of ``[start, end)`` whose entry is not zero, in order.

        Of a transition page ``present`` is false and ``gpa`` says where it lies; of other invalid entries ``gpa`` is
        0 and ``raw`` tells more. Tables are read in one batch per parent table. Raises UnreadableMemory when the root
        is unreadable, Implausible beyond `MAX_TABLES`, OutOfTime; a lower table that cannot be read is skipped.
        """
        if start >= end or not self._is_canonical(start) or not self._is_canonical(end - 1):
            return
        base = start & -(1 << self._bits) if self._long else 0
        top = _Table(self.root, base, 0, writable=True, user=True, nx=False)
        raw = self.memory.readv([self._part(top, start, end)])[0]
        if raw is None:
            raise UnreadableMemory(self.root, PAGE, "page-table root")
        left = MAX_TABLES
        pending: list[list[Pte] | tuple[_Table, bytes]] = [(top, raw)]  # what comes first is last
        while pending:
            part = pending.pop()
            if isinstance(part, list):
                yield from part
                continue
            if self._deadline.until != math.inf:
                self._deadline.check()
            leaves, below = self._entries(*part, start, end)
            if not below:
                yield from leaves
                continue
            left -= len(below)
            if left < 0:
                raise Implausible(f"more than {MAX_TABLES} page tables for one range of addresses")
            contents = self.memory.readv([self._part(child, start, end) for child in below])
            position = len(leaves)
            for child, content in zip(reversed(below), reversed(contents), strict=True):
                behind = position
                while position and leaves[position - 1].va > child.va:
                    position -= 1
                pending.append(leaves[position:behind])
                if content is not None:
                    pending.append((child, content))
            pending.append(leaves[:position])

    # -- private --

    def _is_canonical(self, va: int) -> bool:
        if not self._long:
            return 0 <= va < 1 << 32
        top = va >> (self._bits - 1)
        return top in (0, (1 << (65 - self._bits)) - 1)

    def _read_walked(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Translate page by page, all pages of all spans together; adjacent pages are read as one."""
        total = sum(size for _, size in spans if 0 < size <= READ_LIMIT)
        if total > READ_LIMIT and len(spans) > 1:
            return [self._read_walked((span,))[0] for span in spans]
        known = self._pages
        if max(len(known), len(self._tables)) > CACHE_LIMIT:
            self.forget()
        wanted: set[int] = set()
        for va, size in spans:
            if 0 < size <= READ_LIMIT:
                first, end = va >> 12, (va + size - 1 >> 12) + 1
                if end - first > 1:
                    wanted.update([number for number in range(first, end) if number not in known])
                elif first not in known:
                    wanted.add(first)
        if wanted:
            self._resolve(wanted)
        parts: list[tuple[int, int]] = []
        counts: list[int] = []  # of the pieces of each span; -1: not mapped
        for va, size in spans:
            offset = va & 0xFFF
            if 0 < size <= PAGE - offset:
                gpa = known.get(va >> 12)
                if gpa is not None:
                    parts.append((gpa + offset, size))
                counts.append(-1 if gpa is None else 1)
                continue
            runs = _runs(va, size, known) if 0 <= size <= READ_LIMIT else None
            counts.append(-1 if runs is None else len(runs))
            parts += runs or ()
        data = iter(self.memory.readv(parts)) if parts else iter(())
        found: list[bytes | None] = []
        for count in counts:
            if count == 1:
                found.append(next(data))
                continue
            pieces = [next(data) for _ in range(max(count, 0))]
            solid = [piece for piece in pieces if piece is not None]
            found.append(b"".join(solid) if len(solid) == count else None)
        return found

    def _resolve(self, numbers: Iterable[int]) -> None:
        """Find where pages lie: one batched read for each level, of each entry once. Tables are remembered, too."""
        last, pages, tables = self._levels[-1], self._pages, self._tables
        canonical = [number for number in numbers if self._is_canonical(number << 12)]
        unknown = {number >> self._table_bits for number in canonical} - tables.keys()
        large = self._find_tables(unknown) if unknown else {}
        size, bits = self._entry_size, self._table_bits
        below = [number for number in canonical if number >> bits in tables]
        gpas = [tables[number >> bits] + size * (number & last.mask) for number in below]
        for number, entry in zip(below, self._read_entries(gpas), strict=True):
            if entry & PRESENT:
                pages[number] = entry & ADDRESS
            elif entry & (TRANSITION | PROTOTYPE) == TRANSITION:
                pages[number] = entry & self.in_ram
        if large:
            for number in canonical:
                for shift, bases in large.items():
                    base = bases.get(number >> (shift - 12))
                    if base is not None:
                        pages[number] = base + ((number & (1 << (shift - 12)) - 1) << 12)

    def _find_tables(self, wanted: set[int]) -> dict[int, dict[int, int]]:
        """Find the last tables, by the upper bits of page numbers; large pages are returned by shift and upper bits."""
        size, bits = self._entry_size, self._table_bits
        large: dict[int, dict[int, int]] = {}
        tables: dict[int, int] = {}
        before = 0
        for depth, (shift, mask, may_be_large) in enumerate(self._levels[:-1]):
            low = shift - 12 - bits
            keys = list({key >> low for key in wanted})
            if depth:
                keys = [key for key in keys if key >> before - shift in tables]
            above = [tables[key >> before - shift] if depth else self.root for key in keys]
            entries = self._read_entries([table + size * (key & mask) for table, key in zip(above, keys, strict=True)])
            tables = {}
            for key, entry in zip(keys, entries, strict=True):
                if entry & PRESENT:
                    if not entry & LARGE:
                        tables[key] = entry & ADDRESS
                    elif may_be_large:
                        large.setdefault(shift, {})[key] = _large(entry, shift, size)
                elif entry & (TRANSITION | PROTOTYPE) == TRANSITION:
                    tables[key] = entry & self.in_ram
            before = shift
            if not tables:
                return large
        self._tables.update(tables)
        return large

    def _read_entries(self, gpas: list[int]) -> list[int]:
        """Page-table entries, 0 where one is unreadable."""
        size = self._entry_size
        if not gpas:
            return []
        if len(gpas) == 1:
            raw = self.memory.readv([(gpas[0], size)])[0]
            return [int.from_bytes(raw or b"", "little")]
        distinct = list(dict.fromkeys(gpas))
        empty = bytes(size)
        raw_all = b"".join([piece or empty for piece in self.memory.readv([(gpa, size) for gpa in distinct])])
        values = array("Q" if size == 8 else "I", raw_all)
        if len(distinct) == len(gpas):
            return list(values)
        by_gpa = dict(zip(distinct, values, strict=True))
        return [by_gpa[gpa] for gpa in gpas]

    def _part(self, table: _Table, start: int, end: int) -> tuple[int, int]:
        """The span of a table that speaks about [start, end)."""
        first, last = self._indices(table, start, end)
        return table.gpa + self._entry_size * first, self._entry_size * (last - first + 1)

    def _indices(self, table: _Table, start: int, end: int) -> tuple[int, int]:
        shift, mask, _ = self._levels[table.depth]
        return max(0, (start - table.va) >> shift), min(mask, (end - 1 - table.va) >> shift)

    def _entries(self, table: _Table, raw: bytes, start: int, end: int) -> tuple[list[Pte], list[_Table]]:
        """What the entries of one table say: leaves, and tables below."""
        shift, _, may_be_large = self._levels[table.depth]
        first = self._indices(table, start, end)[0]
        leaf = table.depth == len(self._levels) - 1
        free = self.mode is Mode.PAE and table.depth == 0  # a PDPTE of PAE has no rights
        below: list[_Table] = []
        leaves: list[Pte] = []
        for index, entry in enumerate(array("Q" if self._entry_size == 8 else "I", raw), first):
            if not entry:
                continue
            va = table.va + (index << shift)
            valid = entry & PRESENT != 0
            transition = not valid and entry & (TRANSITION | PROTOTYPE) == TRANSITION
            if valid:
                writable, user = entry & WRITABLE != 0 or free, entry & USER != 0 or free
                # Under KVA shadow the kernel's copy of a user PML4 entry carries NX.
                nx = entry & NX != 0 and not (self._long and table.depth == 0 and va >> 63 == 0)
                gpa = entry & ADDRESS
            elif transition:
                protection = entry >> 5 & 7  # MM_EXECUTE 2, MM_READWRITE 4, MM_WRITECOPY 5
                writable, user, nx = protection >= 4 or not leaf, True, leaf and not protection & 2
                gpa = entry & self.in_ram
            else:
                writable, user, nx, gpa = False, False, False, 0
            writable, user, nx = writable and table.writable, user and table.user, nx or table.nx
            if not leaf and (transition or (valid and not entry & LARGE)):
                below.append(_Table(gpa, va, table.depth + 1, writable, user, nx))
            elif leaf or (valid and may_be_large):
                if valid and not leaf:
                    gpa = _large(entry, shift, self._entry_size)
                used, dirty = valid and entry & ACCESSED != 0, valid and entry & DIRTY != 0
                leaves.append(Pte(va, gpa, 1 << shift, valid, writable, user, nx, used, dirty, entry))
        return leaves, below


class _Table(NamedTuple):
    gpa: int
    va: int  # of its first entry
    depth: int
    writable: bool
    user: bool
    nx: bool


def _large(entry: int, shift: int, size: int) -> int:
    """Where a large page lies. Without PAE an entry's bits 13 to 20 are address bits 32 to 39 (PSE-36)."""
    if size == 4:
        return (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32
    return entry & ADDRESS & -(1 << shift)


def _runs(va: int, size: int, known: dict[int, int]) -> list[tuple[int, int]] | None:
    """The guest-physical spans that make up a virtual one, None if a page of it is not mapped."""
    runs: list[tuple[int, int]] = []
    end = va + size
    while va < end:
        page = known.get(va >> 12)
        if page is None:
            return None
        gpa, step = page + (va & 0xFFF), min(end - va, PAGE - (va & 0xFFF))
        if runs and runs[-1][0] + runs[-1][1] == gpa:
            runs[-1] = (runs[-1][0], runs[-1][1] + step)
        else:
            runs.append((gpa, step))
        va += step
    return runs
