"""Windows' dynamic hash tables (RTL_DYNAMIC_HASH_TABLE), walked completely and then kept up to date by their heads.

A table is a header and a directory of buckets; a bucket is a LIST_ENTRY. Up to 128 buckets lie in one block; more of
them in blocks of 128, 256, 512, ..., which the directory points to. `refresh` re-reads headers and blocks of all tables
in one batch and follows only the chains whose bucket has changed. Whoever leaves from the middle of a chain changes no
bucket, but the count in the header: then the long chains are followed again.
Sources: nt symbols _RTL_DYNAMIC_HASH_TABLE, _RTL_DYNAMIC_HASH_TABLE_ENTRY; the same code is public in MsQuic's
src/platform/hashtable.c (HT_SECOND_LEVEL_DIR_MIN_SIZE, HT_FIRST_LEVEL_DIR_SIZE).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.kernel import WindowsKernel
from appliance.model import Gap

FIRST_BLOCK: Final = 128  # buckets of the first block, and of a table without a directory of blocks
MAX_BLOCKS: Final = 16
MAX_BUCKETS: Final = 1 << 17  # of one table; Windows keeps 128 of them until there are thousands of connections
MAX_ALL: Final = 1 << 20  # buckets of all tables together
MAX_ENTRIES: Final = 1 << 18  # of all tables together
MAX_CHAIN: Final = 1 << 14  # of one bucket
TRIES: Final = 3
KNOWN: Final = (0, 1)  # kinds that every build has; what else looks like a table need not be one
LONG: Final = 3  # from here on an entry can leave without its bucket telling


class Fetch(NamedTuple):
    """How much to read around an entry: the object it is part of, so that nothing is read twice."""

    before: int  # bytes
    size: int


@dataclass(slots=True)
class Table:
    """One hash table as it was last seen. Chains are the addresses of entries (LIST_ENTRY), in order."""

    va: int
    kind: int  # which of the tables of a partition
    header: bytes = b""
    size: int = 0
    entries: int = 0  # NumEntries
    guests: int = 0  # NumEnumerators: each may have an entry of its own in a chain
    told: tuple[int, int] = (0, 0)  # TableSize and Directory
    spans: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    chains: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by the address of the bucket
    broken: set[int] = field(default_factory=set)  # buckets whose chain contradicted itself
    walked: int = 0  # entries found

    @property
    def is_whole(self) -> bool:
        """Whether as many entries were found as the table says it has."""
        return 0 <= self.walked - self.entries <= self.guests


class _Header:
    """Offsets of _RTL_DYNAMIC_HASH_TABLE; the defaults are those of all builds since Vista."""

    def __init__(self, types: SymbolTable, pointer: int) -> None:
        def at(name: str, default: int) -> int:
            path = f"_RTL_DYNAMIC_HASH_TABLE.{name}"
            return types.offset(path) if types.has(path) else default

        self.size = at("TableSize", 8)
        self.entries = at("NumEntries", 0x14)
        self.guests = at("NumEnumerators", 0x1C)
        self.directory = at("Directory", 0x20)
        self.length = max(self.size + 4, self.entries + 4, self.guests + 4, self.directory + pointer)
        self.pointer = "<Q" if pointer == 8 else "<I"

    def parse(self, raw: bytes) -> tuple[int, int, int, int]:
        """TableSize, NumEntries, NumEnumerators, Directory."""
        size, entries, guests = (
            int.from_bytes(raw[at : at + 4], "little") for at in (self.size, self.entries, self.guests)
        )
        return size, entries, guests, struct.unpack_from(self.pointer, raw, self.directory)[0]


class HashTables:
    """All hash tables of one kind of thing, read together level by level."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._space = kernel.space
        self._is_kernel = kernel.is_kernel
        self._pointer = kernel.pointer_size
        self._head = 2 * self._pointer
        self._pair = struct.Struct("<QQ" if self._pointer == 8 else "<II")
        self._header = _Header(kernel.types, self._pointer)
        self.tables: list[Table] = []
        self.fetched: dict[int, bytes] = {}  # by the address the read began at; of the last refresh only
        self._fresh: set[int] = set()  # which of them were read in this try
        self._spans_all: list[tuple[int, int]] = []  # headers, then blocks
        self._heads: list[bytes | None] = []  # what was read there last
        self.torn = 0
        self.is_new = True  # nothing of what was found before holds
        self.changed: dict[tuple[int, int], tuple[Table, tuple[int, ...]]] = {}  # by table and bucket: as it was

    def open(self, vas: Iterable[tuple[int, int]]) -> None:
        """Start over with these tables: address and kind."""
        self.tables = [Table(va, kind) for va, kind in vas]
        self._list_spans()
        self.is_new = True

    def refresh(self, fetch: Sequence[Fetch] = (), *, whole: bool = False) -> list[Gap]:
        """Bring all chains up to date, all of them afresh if ``whole``; what stayed in doubt is named.

        ``fetch`` by kind of table: what to read along with an entry, into `fetched`. Raises OutOfTime, GuestGone.
        """
        self.fetched, self.changed = {}, {}
        if whole:
            self.open([(table.va, table.kind) for table in self.tables])
        doubted: set[int] = set()
        for _ in range(TRIES):
            dirty = self._look()
            for table in self.tables:
                if not table.is_whole and table.va not in doubted and not any(each is table for each, _, _ in dirty):
                    doubted.add(table.va)
                    dirty += self._long_chains(table)
            if not dirty:
                break
            self._fresh = set()
            self._follow(dirty, fetch)
            if not whole and all(table.is_whole and not table.broken for table in self.tables):
                return []  # what has come since is for the next time
        return [gap for table in self.tables for gap in self._gaps(table)]

    # -- heads --

    def _look(self) -> list[tuple[Table, int, tuple[int, int]]]:
        """Re-read headers and blocks in one batch. Returns the buckets to follow: table, address, first and last."""
        found = self._space.readv(self._spans_all)
        dirty: list[tuple[Table, int, tuple[int, int]]] = []
        if found == self._heads and not any(table.broken for table in self.tables):
            return dirty
        self._heads = found
        at = len(self.tables)
        moved = []
        for table, seen in zip(self.tables, found, strict=False):
            blocks, at = found[at : at + len(table.spans)], at + len(table.spans)
            header = seen or b""
            if header != table.header and self._is_other(table, header):
                moved.append(table)
            elif blocks != table.blocks or table.broken:
                dirty += self._compare(table, blocks)
        for table in moved:
            dirty += self._compare(table, self._space.readv(table.spans))
        if moved:
            self._list_spans()
        return dirty

    def _list_spans(self) -> None:
        self._spans_all = [(table.va, self._header.length) for table in self.tables]
        for table in self.tables:
            self._spans_all += table.spans
        self._heads = []

    def _is_other(self, table: Table, header: bytes) -> bool:
        """Take a header in; whether the blocks of the table are other ones than before."""
        if not header:
            table.header, table.spans, table.blocks, table.chains = b"", [], [], {}
            table.size = table.entries = table.walked = 0
            table.told = 0, 0
            self.is_new = True
            return True
        table.header, before = header, table.told
        size, table.entries, table.guests, directory = self._header.parse(header)
        table.told = size, directory
        if table.told == before:
            return False
        table.size = 0
        room = MAX_ALL - sum(each.size for each in self.tables)
        table.size = size if size <= min(MAX_BUCKETS, room) else 0
        table.spans = self._spans(table.size, directory)
        table.blocks, table.chains, table.broken, table.walked = [b""] * len(table.spans), {}, set(), 0
        self.is_new = True
        return True

    def _spans(self, size: int, directory: int) -> list[tuple[int, int]]:
        """Where the buckets of a table lie."""
        if not size or not self._is_kernel(directory):
            return []
        if size <= FIRST_BLOCK:
            return [(directory, size * self._head)]
        raw = self._space.readv([(directory, MAX_BLOCKS * self._pointer)])[0]
        if raw is None:
            return []
        spans = []
        for index, (block,) in enumerate(struct.iter_unpack("<Q" if self._pointer == 8 else "<I", raw)):
            length = min(size, FIRST_BLOCK << index)
            if self._is_kernel(block):
                spans.append((block, length * self._head))
            size -= length
            if not size:
                break
        return spans

    def _compare(self, table: Table, blocks: Sequence[bytes | None]) -> list[tuple[Table, int, tuple[int, int]]]:
        dirty = []
        step = self._head
        for index, ((va, length), seen) in enumerate(zip(table.spans, blocks, strict=True)):
            before = table.blocks[index] if index < len(table.blocks) else b""
            content = seen or b""
            if content == before:
                continue
            for at in _differences(before, content, length, step):
                now = content[at : at + step]
                bucket = va + at
                pair = self._pair.unpack(now) if len(now) == step else (bucket, bucket)
                if pair[0] == bucket:
                    if bucket in table.chains:
                        self._put(table, bucket, ())
                    table.broken.discard(bucket)
                elif pair[0] or pair[1]:  # an untouched bucket of a block that has just been made is zero
                    dirty.append((table, bucket, pair))
            table.blocks[index : index + 1] = [content]
        if table.broken:
            known = {bucket for _, bucket, _ in dirty}
            dirty += self._buckets(table, table.broken - known)
        return dirty

    def _long_chains(self, table: Table) -> list[tuple[Table, int, tuple[int, int]]]:
        return self._buckets(table, {bucket for bucket, chain in table.chains.items() if len(chain) >= LONG})

    def _buckets(self, table: Table, wanted: set[int]) -> list[tuple[Table, int, tuple[int, int]]]:
        dirty = []
        for (va, _), content in zip(table.spans, table.blocks, strict=True):
            for bucket in wanted:
                at = bucket - va
                if 0 <= at <= len(content) - self._head:
                    dirty.append((table, bucket, self._pair.unpack_from(content, at)))
        return dirty

    # -- chains --

    def _follow(self, dirty: list[tuple[Table, int, tuple[int, int]]], fetch: Sequence[Fetch]) -> None:
        """Follow chains, one entry of each at a time; first those of the first kind of table, whose reads help."""
        self._fetch_ahead(dirty, fetch)
        for kind in sorted({table.kind for table, _, _ in dirty}):
            around = fetch[kind] if kind < len(fetch) else None
            self._follow_kind([each for each in dirty if each[0].kind == kind], around)

    def _fetch_ahead(self, dirty: list[tuple[Table, int, tuple[int, int]]], fetch: Sequence[Fetch]) -> None:
        """Read in one batch what most chains lead to: what was in them before, and what stands first and last now."""
        wanted: dict[int, int] = {}
        for table, bucket, ends in dirty:
            if table.kind < len(fetch):
                before, size = fetch[table.kind]
                for entry in (*ends, *table.chains.get(bucket, ())):
                    if not entry % self._pointer and self._is_kernel(entry):
                        wanted[entry - before] = size
        for (base, _), raw in zip(wanted.items(), self._space.readv(list(wanted.items())), strict=True):
            if raw is not None:
                self.fetched[base] = raw
                self._fresh.add(base)

    def _follow_kind(self, dirty: list[tuple[Table, int, tuple[int, int]]], around: Fetch | None) -> None:
        room = MAX_ENTRIES - sum(table.walked for table in self.tables)
        going: list[tuple[Table, int, int, int, int, list[int]]] = [
            (table, bucket, last, bucket, first, []) for table, bucket, (first, last) in dirty
        ]
        while going:
            links = self._links([each[4] for each in going], around)
            following = []
            for (table, bucket, last, previous, entry, chain), link in zip(going, links, strict=True):
                if link is None or link[1] != previous or len(chain) >= MAX_CHAIN or room <= 0:
                    self._break(table, bucket, chain)
                    continue
                chain.append(entry)
                room -= 1
                if link[0] != bucket:
                    following.append((table, bucket, last, entry, link[0], chain))
                elif entry == last:
                    self._put(table, bucket, tuple(chain))
                    table.broken.discard(bucket)
                else:  # something was appended since the bucket was read
                    self._break(table, bucket, chain)
            going = following

    def _break(self, table: Table, bucket: int, chain: list[int]) -> None:
        self.torn += 1
        self._put(table, bucket, tuple(chain))
        table.broken.add(bucket)

    def _put(self, table: Table, bucket: int, chain: tuple[int, ...]) -> None:
        before = table.chains.pop(bucket, ())
        self.changed.setdefault((table.va, bucket), (table, before))
        if chain:
            table.chains[bucket] = chain
        table.walked += len(chain) - len(before)

    def _links(self, entries: list[int], around: Fetch | None) -> list[tuple[int, int] | None]:
        """Flink and Blink of many entries; None where there cannot be an entry."""
        pair, fetched = self._pair, self.fetched
        found: list[tuple[int, int] | None] = [None] * len(entries)
        wanted: list[tuple[int, int]] = []
        places: list[tuple[int, int]] = []  # index in found, offset of the entry in what is read
        before, size = around or Fetch(0, self._head)
        for index, entry in enumerate(entries):
            base = entry - before
            if before and base in self._fresh:  # nothing is read that cannot be an entry
                found[index] = pair.unpack_from(fetched[base], before)
            elif not entry % self._pointer and self._is_kernel(entry):
                wanted.append((base, size))
                places.append((index, before))
        again = []
        for (index, offset), (base, _), raw in zip(places, wanted, self._space.readv(wanted), strict=True):
            if raw is None:
                if offset:
                    again.append(index)
                continue
            if offset:
                fetched[base] = raw
                self._fresh.add(base)
            found[index] = pair.unpack_from(raw, offset)
        if again:  # something smaller at the edge of a page
            spans = [(entries[index], self._head) for index in again]
            for index, raw in zip(again, self._space.readv(spans), strict=True):
                if raw is not None:
                    found[index] = pair.unpack(raw)
        return found

    def _gaps(self, table: Table) -> Iterable[Gap]:
        if not table.spans and table.kind in KNOWN:
            yield Gap("connection table", table.va, "unreadable or implausible")
        for bucket in sorted(table.broken)[:8]:
            yield Gap("connection table", bucket, "a chain contradicted itself three times; told as far as it goes")
        if not table.broken and table.spans and not table.is_whole:
            why = f"{table.walked} entries found, {table.entries} counted by the guest"
            yield Gap("connection table", table.va, why)


def _differences(before: bytes, now: bytes, length: int, step: int) -> Iterator[int]:
    """Where pieces of two blocks differ, each ``step`` bytes long."""
    if len(before) != len(now):
        yield from range(0, min(length, max(len(now), len(before))), step)
        return
    rest = int.from_bytes(before, "little") ^ int.from_bytes(now, "little")
    while rest:
        index = (rest.bit_length() - 1) // (8 * step)
        yield index * step
        rest &= (1 << 8 * step * index) - 1
