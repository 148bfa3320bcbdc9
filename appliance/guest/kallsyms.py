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
from collections.abc import Iterator
from dataclasses import dataclass, replace

from appliance.errors import Implausible, UnsupportedGuest

MAX_SYMBOLS = 1 << 21
MIN_SYMBOLS = 256
_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_DIGIT_TOKEN = 0x30
_TOKEN_LIMIT = 128  # bytes of one token
_STATIC_LOCAL = re.compile(rb"\.\d+$")


@dataclass(frozen=True, slots=True)
class Tables:
    """The raw tables. ``signed`` says which of the two meanings the offsets have."""

    base: int
    count: int
    names: bytes
    markers: array[int]
    tokens: tuple[bytes, ...]
    offsets: array[int]
    seqs: bytes | None
    signed: bool


class KallsymsTable:
    """Symbols by name and by address. A name is found by binary search where the kernel sorted them, else by a dict."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._known: dict[str, int | None] = {}
        self._all: dict[bytes, int] | None = None

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

    def _index(self, name: bytes) -> int | None:
        if self.tables.seqs is None:
            return self._everything().get(name)
        place = bisect_left(range(self.tables.count), name, key=lambda place: self.name(self._at(place)))
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
        place = bisect_left(range(self.tables.count), prefix, key=lambda place: self.name(self._at(place)))
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
            text = b"".join(pieces[:position]).split(b"\n")[1:]
            self._all = {name[1:]: index for index, name in reversed(list(enumerate(text)))}
        return self._all


def find_tables(data: bytes, text_va: int) -> Tables | None:
    """Find the symbol table in a copy of the kernel's read-only data, whose ``_text`` is at ``text_va``."""
    base = struct.pack("<Q", text_va)
    for start, tokens, end in _token_tables(data):
        found = _find_new(data, base, start, end, tokens) or _find_old(data, base, start, tokens)
        if found:
            return found
    return None


def _token_tables(data: bytes) -> Iterator[tuple[int, tuple[bytes, ...], int]]:
    """Candidates for token_table: its start, its 256 tokens, and the end of token_index behind it."""
    hit = data.find(_DIGITS)
    while hit >= 0:
        start = hit
        for _ in range(_DIGIT_TOKEN):
            start = data.rfind(b"\0", max(0, start - _TOKEN_LIMIT), start - 1) + 1
            if start <= 0:
                break
        if start > 0:
            tokens = tuple(data[start : start + 256 * _TOKEN_LIMIT].split(b"\0", 256)[:256])
            index = list(_cumulate(tokens))
            for alignment in (8, 4):
                end = _align(start + index[-1] + len(tokens[-1]) + 1, alignment)
                if len(tokens) == 256 and data[end : end + 512] == struct.pack("<256H", *(i & 0xFFFF for i in index)):
                    yield start, tokens, end + 512
                    break
        hit = data.find(_DIGITS, hit + 1)


def _cumulate(tokens: tuple[bytes, ...]) -> Iterator[int]:
    total = 0
    for token in tokens:
        yield total
        total += len(token) + 1


def _find_new(data: bytes, base: bytes, token_table: int, end: int, tokens: tuple[bytes, ...]) -> Tables | None:
    """offsets, relative_base and seqs follow token_index; markers lie directly before token_table."""
    offsets_at = _align(end, 8)
    base_at = data.find(base, offsets_at + 4 * MIN_SYMBOLS, offsets_at + 4 * MAX_SYMBOLS)
    while base_at >= 0:
        if base_at % 8 == offsets_at % 8:
            for count in ((base_at - offsets_at) // 4, (base_at - offsets_at) // 4 - 1):
                markers_at = token_table - _align(4 * _marker_count(count), 8)
                names_at = _names_before(data, count, markers_at)
                if names_at is not None:
                    seqs = data[base_at + 8 : base_at + 8 + 3 * count]
                    return _tables(data, base, count, names_at, markers_at, tokens, offsets_at, seqs)
        base_at = data.find(base, base_at + 1, offsets_at + 4 * MAX_SYMBOLS)
    return None


def _names_before(data: bytes, count: int, markers_at: int) -> int | None:
    """Where names begin: 8 bytes behind a num_syms whose first 256 names are as long as the markers say."""
    if markers_at < 0:
        return None
    wanted = struct.pack("<I", count)
    limit = max(0, markers_at - 48 * count)
    at = data.rfind(wanted, limit, markers_at)
    while at >= 0:
        if _check_names(data, at + 8, markers_at):
            return at + 8
        at = data.rfind(wanted, limit, at + 3)
    return None


def _find_old(data: bytes, base: bytes, token_table: int, tokens: tuple[bytes, ...]) -> Tables | None:
    """offsets, relative_base, num_syms, names and markers precede token_table, perhaps with seqs in between."""
    base_at = data.rfind(base, 0, token_table)
    while base_at >= 0:
        count = struct.unpack_from("<I", data, base_at + 8)[0]
        names_at, offsets_at = base_at + 16, base_at - _align(4 * count, 8)
        if MIN_SYMBOLS <= count <= MAX_SYMBOLS and offsets_at >= 0:
            markers, seqs = _align(4 * _marker_count(count), 8), _align(3 * count, 8)
            for markers_at, sorted_names in ((token_table - markers, 0), (token_table - seqs - markers, 3 * count)):
                if markers_at > names_at and _check_names(data, names_at, markers_at):
                    start = markers_at + markers
                    between = data[start : start + sorted_names]
                    return _tables(data, base, count, names_at, markers_at, tokens, offsets_at, between)
        base_at = data.rfind(base, 0, base_at + 7)
    return None


def _check_names(data: bytes, names_at: int, markers_at: int) -> bool:
    """Whether the first 256 names end where the second marker points."""
    if markers_at + 8 > len(data):
        return False
    zero, second = (int(marker) for marker in struct.unpack_from("<II", data, markers_at))
    if zero or not 256 <= second <= 256 * 512 or names_at + second > markers_at:
        return False
    position = 0
    for _ in range(256):
        length = data[names_at + position]
        position += 1
        if length >= 0x80:
            length = length & 0x7F | data[names_at + position] << 7
            position += 1
        position += length
        if not length or position > second:
            return False
    return position == second


def _tables(
    data: bytes,
    base: bytes,
    count: int,
    names_at: int,
    markers_at: int,
    tokens: tuple[bytes, ...],
    offsets_at: int,
    seqs: bytes,
) -> Tables:
    markers, offsets = array("I"), array("i")
    markers.frombytes(data[markers_at : markers_at + 4 * _marker_count(count)])
    offsets.frombytes(data[offsets_at : offsets_at + 4 * count])
    # Where per-CPU symbols are absolute, nearly all others are negative; otherwise none is (an image is below 2 GiB).
    signed = offsets[count // 2] < 0
    names = data[names_at:markers_at]
    tables = Tables(int.from_bytes(base, "little"), count, names, markers, tokens, offsets, seqs or None, signed)
    return tables if _sorted(tables) else replace(tables, seqs=None)


def _sorted(tables: Tables) -> bool:
    """Whether seqs really lists the names in order: a sample of them."""
    if tables.seqs is None or len(tables.seqs) != 3 * tables.count:
        return False
    table = KallsymsTable(tables)
    try:
        sample = [table.name(table._at(place)) for place in range(0, tables.count, max(1, tables.count // 64))]
    except Implausible:
        return False
    return sample == sorted(sample)


def _marker_count(count: int) -> int:
    return (count + 255) >> 8


def _align(value: int, to: int) -> int:
    return -(-value // to) * to
