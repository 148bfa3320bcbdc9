"""The kernel's own symbol table, found in its read-only data and read in place.

Three layouts exist, told apart by looking, never by version (distributions backport):

* old:  offsets, relative_base, num_syms, names, markers, token_table, token_index
* old with ``kallsyms_seqs_of_names`` (3 bytes each, big-endian) between markers and token_table
* new:  num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names

Offsets are 32 bits relative to relative_base (which is ``_text``), either all unsigned, or, with absolute per-CPU
symbols (CONFIG_KALLSYMS_ABSOLUTE_PERCPU), negative ones count down from relative_base - 1 and the others are absolute.
Sources: scripts/kallsyms.c (write_src), kernel/kallsyms.c (kallsyms_expand_symbol, kallsyms_sym_address,
get_symbol_seq), commits "kallsyms: Improve the performance of kallsyms_lookup_name()" (6.2) and "scripts/kallsyms:
change the output order" (6.4).
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from appliance.errors import Implausible, UnsupportedGuest

MAX_SYMBOLS = 1 << 21
MIN_SYMBOLS = 512
MAX_NAMES = 8 << 20
MAX_TEXT = 64 << 20  # bytes of all names decoded
MAX_TRIES = 64  # look-alikes of one table that are tried: the guest decides how many there are
_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_DIGIT_TOKEN = 0x30
_TOKEN_LIMIT = 128  # bytes of one token
MAX_TOKENS = 256 * _TOKEN_LIMIT + 1024
_STATIC_LOCAL = re.compile(rb"\.\d+$")


class Places(NamedTuple):
    """Where the tables lie in the copy of memory they were found in. ``seqs_at`` is -1 where the kernel has none."""

    total: int
    names_at: int
    markers_at: int
    tokens_at: int
    tokens_size: int  # of token_table and token_index
    offsets_at: int
    seqs_at: int


@dataclass(frozen=True, slots=True)
class Tables:
    """The raw tables. ``signed`` says which of the two meanings the offsets have; ``seqs`` lists the names in order."""

    base: int
    count: int
    names: bytes
    markers: array[int]
    tokens: tuple[bytes, ...]
    offsets: array[int]
    seqs: bytes | None
    signed: bool
    places: Places


class KallsymsTable:
    """Symbols by name and by address. A name is found by binary search where the kernel sorted them, else by a dict."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._known: dict[str, int | None] = {}
        self._all: dict[bytes, int] | None = None
        self._listed: list[bytes] = []

    def __len__(self) -> int:
        return self.tables.count

    def find(self, name: str) -> int | None:
        """Address of a symbol, None when the kernel has none of that name."""
        if name not in self._known:
            index = self._index(name.encode())
            self._known[name] = None if index is None else self.address(index)
        return self._known[name]

    def get(self, name: str) -> int:
        """Address of a symbol. Raises UnsupportedGuest naming it."""
        address = self.find(name)
        if address is None:
            raise UnsupportedGuest((f"its symbol table has no {name}",))
        return address

    def find_prefix(self, name: str) -> int | None:
        """Address of ``name``, or of the static local ``name.N`` that the compiler numbered."""
        exact = self.find(name)
        if exact is not None:
            return exact
        prefix = name.encode() + b"."
        for found, index in self._with_prefix(prefix):
            if _STATIC_LOCAL.fullmatch(found, len(prefix) - 1):
                return self.address(index)
        return None

    def nearest(self, va: int) -> tuple[str, int] | None:
        """The symbol at or below an address, and the distance to it."""
        index = bisect_right(range(self.tables.count), va, key=self.address) - 1
        if index < 0:
            return None
        start = self.address(index)
        while index and self.address(index - 1) == start:
            index -= 1  # the first of several names for one address
        return self.name(index).decode("ascii", "replace"), va - start

    def address(self, index: int) -> int:
        """Address of the symbol at a position of the table."""
        tables = self.tables
        offset = tables.offsets[index]
        if not tables.signed:
            return (tables.base + (offset & 0xFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        return offset if offset >= 0 else (tables.base - 1 - offset) & 0xFFFFFFFFFFFFFFFF

    def name(self, index: int) -> bytes:
        """Name of the symbol at a position of the table, without its type letter."""
        names, position = self.tables.names, self.tables.markers[index >> 8]
        try:
            for _ in range(index & 255):
                length = names[position]
                position += 1 + length if length < 0x80 else 2 + (length & 0x7F | names[position + 1] << 7)
            length = names[position]
            position += 1
            if length >= 0x80:
                length = length & 0x7F | names[position] << 7
                position += 1
        except IndexError:
            raise Implausible("the kernel's symbol table contradicts itself") from None
        return b"".join(map(self.tables.tokens.__getitem__, names[position : position + length]))[1:]

    def name_at(self, place: int) -> bytes:
        """The name that is at ``place`` of the names in order."""
        return self.name(self._at(place))

    def order(self) -> bytes | None:
        """What seqs would be, where the kernel has none and all names were decoded anyway."""
        if self._all is None or self.tables.seqs is not None:
            return None
        names = sorted(range(self.tables.count), key=self._listed.__getitem__)
        return b"".join(index.to_bytes(3, "big") for index in names)

    def _index(self, name: bytes) -> int | None:
        if self.tables.seqs is None:
            return self._everything().get(name)
        place = bisect_left(range(self.tables.count), name, key=self.name_at)
        if place < self.tables.count:
            index = self._at(place)
            if self.name(index) == name:
                return index
        return None

    def _at(self, place: int) -> int:
        """Position in the table of the symbol that is at ``place`` of the names in order."""
        assert self.tables.seqs is not None
        index = int.from_bytes(self.tables.seqs[3 * place : 3 * place + 3], "big")
        if index >= self.tables.count:
            raise Implausible("the kernel's symbol table contradicts itself")
        return index

    def _with_prefix(self, prefix: bytes) -> Iterator[tuple[bytes, int]]:
        if self.tables.seqs is None:
            yield from ((name, index) for name, index in self._everything().items() if name.startswith(prefix))
            return
        place = bisect_left(range(self.tables.count), prefix, key=self.name_at)
        while place < self.tables.count:
            index = self._at(place)
            name = self.name(index)
            if not name.startswith(prefix):
                return
            yield name, index
            place += 1

    def _everything(self) -> dict[bytes, int]:
        """All names; of equal ones the first."""
        if self._all is None:
            names, tokens = self.tables.names, self.tables.tokens
            position, starts = 0, []
            pieces = list(map(tokens.__getitem__, names))
            try:
                for _ in range(self.tables.count):
                    starts.append(position)
                    length = names[position]
                    pieces[position] = b"\n"
                    position += 1
                    if length >= 0x80:
                        length = length & 0x7F | names[position] << 7
                        pieces[position] = b""
                        position += 1
                    position += length
            except IndexError:
                raise Implausible("the kernel's symbol table contradicts itself") from None
            if sum(map(len, pieces)) > MAX_TEXT:
                raise Implausible("the kernel's symbol table contradicts itself")
            text = b"".join(pieces[:position]).split(b"\n")[1:]
            if len(text) != self.tables.count:
                raise Implausible("the kernel's symbol table contradicts itself")
            self._listed = [name[1:] for name in text]
            self._all = {name: index for index, name in reversed(list(enumerate(self._listed)))}
        return self._all


def find_tables(data: bytes, text_va: int) -> Tables | None:
    """Find the symbol table in a copy of the kernel's read-only data, whose ``_text`` is at ``text_va``."""
    base = struct.pack("<Q", text_va)
    for start, end in _token_tables(data):
        places = _find_new(data, base, start, end) or _find_old(data, base, start, end)
        tables = load_tables(lambda at, size: data[at : at + size], places, text_va) if places else None
        if tables:
            return tables
    return None


def load_tables(read: Callable[[int, int], bytes], places: Places, text_va: int) -> Tables | None:
    """Load the tables from known places; None when they are not there (any more)."""
    if not MIN_SYMBOLS <= places.total <= MAX_SYMBOLS or not 0 < places.markers_at - places.names_at <= MAX_NAMES:
        return None
    count, marker_count = places.total, _marker_count(places.total)
    tokens = _parse_tokens(read(places.tokens_at, min(places.tokens_size, MAX_TOKENS)))
    names = read(places.names_at, places.markers_at - places.names_at)
    markers, offsets = array("I"), array("i")
    markers.frombytes(read(places.markers_at, 4 * marker_count))
    offsets.frombytes(read(places.offsets_at, 4 * count))
    complete = len(markers) == marker_count and len(offsets) == count and not markers[0]
    if tokens is None or not complete or not _check_names(names, markers[1]):
        return None
    seqs = read(places.seqs_at, 3 * count) if places.seqs_at >= 0 else None
    # Where per-CPU symbols are absolute, nearly all others are negative; otherwise none is (an image is below 2 GiB).
    signed = offsets[count // 2] < 0
    tables = Tables(text_va, count, names, markers, tokens, offsets, seqs, signed, places)
    return tables if is_sorted(tables) else replace(tables, seqs=None)


def is_sorted(tables: Tables) -> bool:
    """Whether seqs really lists the names in order: a sample of them."""
    if tables.seqs is None or len(tables.seqs) != 3 * tables.count:
        return False
    table = KallsymsTable(tables)
    try:
        sample = [table.name_at(place) for place in range(0, tables.count, max(1, tables.count // 64))]
    except (Implausible, IndexError):
        return False
    return sample == sorted(sample)


def _token_tables(data: bytes) -> Iterator[tuple[int, int]]:
    """Candidates for token_table: its start, and the end of token_index behind it."""
    hit = data.find(_DIGITS)
    for _ in range(MAX_TRIES):
        if hit < 0:
            break
        start = hit
        for _ in range(_DIGIT_TOKEN):
            start = data.rfind(b"\0", max(0, start - _TOKEN_LIMIT), max(start - 1, 0)) + 1
            if start <= 0:
                break
        if start > 0:
            window = data[start : start + MAX_TOKENS]
            length = sum(len(token) + 1 for token in window.split(b"\0", 256)[:256])
            for end in {_align(start + length, alignment) + 512 for alignment in (8, 4)}:
                if _parse_tokens(data[start:end]) is not None:
                    yield start, end
        hit = data.find(_DIGITS, hit + 1)


def _parse_tokens(data: bytes) -> tuple[bytes, ...] | None:
    """The 256 tokens of a token_table, if the token_index that ends ``data`` agrees."""
    tokens = tuple(data.split(b"\0", 256)[:256])
    ends = accumulate((len(token) + 1 for token in tokens[:-1]), initial=0)
    index = struct.pack(f"<{len(tokens)}H", *(start & 0xFFFF for start in ends))
    return tokens if len(tokens) == 256 and data[-512:] == index else None


def _find_new(data: bytes, base: bytes, token_table: int, end: int) -> Places | None:
    """offsets, relative_base and seqs follow token_index; markers lie directly before token_table."""
    offsets_at = _align(end, 8)
    base_at = data.find(base, offsets_at + 4 * MIN_SYMBOLS, offsets_at + 4 * MAX_SYMBOLS)
    for _ in range(MAX_TRIES):
        if base_at < 0:
            break
        if base_at % 8 == offsets_at % 8:
            for count in ((base_at - offsets_at) // 4, (base_at - offsets_at) // 4 - 1):
                markers_at = token_table - _align(4 * _marker_count(count), 8)
                names_at = _names_before(data, count, markers_at)
                if names_at is not None:
                    size = end - token_table
                    return Places(count, names_at, markers_at, token_table, size, offsets_at, base_at + 8)
        base_at = data.find(base, base_at + 1, offsets_at + 4 * MAX_SYMBOLS)
    return None


def _names_before(data: bytes, count: int, markers_at: int) -> int | None:
    """Where names begin: 8 bytes behind a num_syms whose first 256 names are as long as the markers say."""
    if markers_at < 0:
        return None
    wanted, second = struct.pack("<I", count), _second_marker(data, markers_at)
    limit = max(0, markers_at - 48 * count)
    at = data.rfind(wanted, limit, markers_at)
    for _ in range(MAX_TRIES):
        if at < 0:
            break
        if _check_names(data[at + 8 : min(at + 8 + second, markers_at)], second):
            return at + 8
        at = data.rfind(wanted, limit, at + 3)
    return None


def _find_old(data: bytes, base: bytes, token_table: int, end: int) -> Places | None:
    """offsets, relative_base, num_syms, names and markers precede token_table, perhaps with seqs in between."""
    base_at = data.rfind(base, 0, token_table)
    for _ in range(MAX_TRIES):
        if base_at < 0:
            break
        count = int.from_bytes(data[base_at + 8 : base_at + 12], "little")
        names_at, offsets_at = base_at + 16, base_at - _align(4 * count, 8)
        if MIN_SYMBOLS <= count <= MAX_SYMBOLS and offsets_at >= 0:
            markers, seqs = _align(4 * _marker_count(count), 8), _align(3 * count, 8)
            for markers_at, seqs_at in (
                (token_table - markers, -1),
                (token_table - seqs - markers, token_table - seqs),
            ):
                second = _second_marker(data, markers_at) if markers_at > names_at else 0
                if second and _check_names(data[names_at : min(names_at + second, markers_at)], second):
                    return Places(count, names_at, markers_at, token_table, end - token_table, offsets_at, seqs_at)
        base_at = data.rfind(base, 0, base_at + 7)
    return None


def _second_marker(data: bytes, markers_at: int) -> int:
    return int.from_bytes(data[markers_at + 4 : markers_at + 8], "little")


def _check_names(names: bytes, second: int) -> bool:
    """Whether the first 256 names end where the second marker points."""
    if not 256 <= second <= min(256 * 512, len(names)):
        return False
    position = 0
    try:
        for _ in range(256):
            length = names[position]
            position += 1
            if length >= 0x80:
                length = length & 0x7F | names[position] << 7
                position += 1
            position += length
            if not length or position > second:
                return False
    except IndexError:
        return False
    return position == second


def _marker_count(count: int) -> int:
    return (count + 255) >> 8


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
