"""Layouts of the kernel's structures from its own BTF, read from guest memory and decoded only where asked.

A path is ``struct.member.member``; anonymous structures and unions are looked through, so ``sock.sk_rcvbuf`` and
``socket.sk`` work as in C. Pointers are not followed. Every index and length in the blob is attacker input: out of
range ends as Implausible.
Sources: Linux Documentation/bpf/btf.rst, include/uapi/linux/btf.h; ENUM64 is kind 19 (6.0), DECL_TAG 17, TYPE_TAG 18.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from typing import NamedTuple

from appliance.errors import Implausible, UnsupportedGuest

MAGIC = 0xEB9F
HEADER = struct.pack("<HBB", MAGIC, 1, 0)
MAX_BLOB = 32 << 20
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
TYPE_TAG, ENUM64 = 18, 19
_NAMED = frozenset((INT, STRUCT, UNION, ENUM, TYPEDEF, ENUM64))
_MODIFIERS = frozenset((TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG))
# 32-bit words behind the three of each record, for its kind: fixed, and for each of its vlen entries.
_FIXED = (0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)
_EACH = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)
_DEPTH = 32
_NAMESAKES = 16
_MEMBERS = 1 << 14  # of one structure, those of anonymous members included
MAX_TYPES = 1 << 20


class Field(NamedTuple):
    """Where a member lies. A bit-field begins ``bit`` bits into byte ``offset`` and is ``bits`` wide."""

    offset: int
    size: int  # bytes of the whole member; of a bit-field, the bytes that hold it
    bit: int = 0
    bits: int = 0  # 0: no bit-field
    length: int = 0  # elements, for an array
    type_id: int = 0


class Index(NamedTuple):
    """What one pass over the blob finds: where each type begins (in words), and which have a name to be asked for."""

    starts: array[int]  # by type id
    named: array[int]  # type ids in order of where their names lie


class BtfTypes:
    """Types of one kernel. ``blob`` is a copy, so the guest cannot change it under us."""

    def __init__(self, blob: bytes, index: Index | None = None) -> None:
        if not 24 <= len(blob) <= MAX_BLOB or not blob.startswith(HEADER):
            raise UnsupportedGuest(("it has no BTF type information (CONFIG_DEBUG_INFO_BTF)",))
        header, type_at, type_size, text_at, text_size = struct.unpack_from("<5I", blob, 4)
        types = blob[header + type_at : header + type_at + type_size]
        self._text = blob[header + text_at : header + text_at + text_size]
        self._words = array("I", types[: len(types) & -4])
        self.blob = blob
        self.index = index or _build_index(self._words)
        self._structs: dict[int, dict[str, Field]] = {}
        self._fields: dict[str, Field | None] = {}
        self._namesakes: dict[str, list[tuple[int, int, int]]] = {}

    def has(self, path: str) -> bool:
        """Whether a type, or a member of it, exists."""
        if "." in path:
            return self._find(path) is not None
        return bool(self._ids(path, _NAMED))

    def field(self, path: str) -> Field:
        """Where a member lies. Raises UnsupportedGuest naming it."""
        found = self._find(path)
        if found is None:
            raise UnsupportedGuest((f"its type information has no {path}",))
        return found

    def offset(self, path: str) -> int:
        """Offset in bytes of a member from the start of the path's first structure."""
        return self.field(path).offset

    def width(self, path: str) -> int:
        """Size of a member in bytes."""
        return self.field(path).size

    def length(self, path: str) -> int:
        """Elements of an array member, 0 for anything else."""
        return self.field(path).length

    def size(self, name: str) -> int:
        """Size in bytes of a structure, union, enumeration, integer or typedef. Raises UnsupportedGuest."""
        for type_id in self._ids(name, _NAMED):
            return self._size_of(type_id)
        raise UnsupportedGuest((f"its type information has no {name}",))

    def enum(self, name: str) -> dict[str, int]:
        """The enumerators of an enumeration; unsigned unless the kernel says otherwise. Raises UnsupportedGuest."""
        for type_id in self._ids(name, frozenset((ENUM, ENUM64))):
            return self._enumerators(type_id)
        raise UnsupportedGuest((f"its type information has no enum {name}",))

    def _find(self, path: str) -> Field | None:
        if path not in self._fields:
            try:
                self._fields[path] = self._resolve(path)
            except (IndexError, RecursionError):
                raise Implausible(f"the kernel's type information contradicts itself at {path}") from None
        return self._fields[path]

    def _resolve(self, path: str) -> Field | None:
        first, *members = path.split(".")
        for type_id in self._ids(first, frozenset((STRUCT, UNION, TYPEDEF))):
            found: Field | None = Field(0, 0, type_id=type_id)
            for member in members:
                base = found.offset if found else 0
                inner = self._members(found.type_id).get(member) if found else None
                found = inner._replace(offset=base + inner.offset) if inner else None
            if found:
                return found
        return None

    def _members(self, type_id: int) -> dict[str, Field]:
        """All members by name, those of anonymous members included."""
        type_id = self._strip(type_id)
        if type_id not in self._structs:
            found: dict[str, Field] = {}
            self._collect(type_id, 0, found, [_MEMBERS], _DEPTH)
            self._structs[type_id] = found
        return self._structs[type_id]

    def _collect(self, type_id: int, base_bits: int, found: dict[str, Field], left: list[int], depth: int) -> None:
        type_id = self._strip(type_id)
        at, kind, count = self._head(type_id)
        if kind not in (STRUCT, UNION) or not depth:
            return
        words, flagged = self._words, bool(self._words[at + 1] >> 31)
        left[0] -= count + 1
        if left[0] < 0:
            raise Implausible("the kernel's type information has a structure of too many members")
        for place in range(at + 3, at + 3 + 3 * count, 3):
            name, member, where = words[place], words[place + 1], words[place + 2]
            bits = where >> 24 if flagged else 0
            start = base_bits + (where & 0xFFFFFF if flagged else where)
            if name == 0:
                self._collect(member, start, found, left, depth - 1)
                continue
            found.setdefault(self._string(name), self._field(member, start, bits))

    def _field(self, type_id: int, start: int, bits: int) -> Field:
        stripped = self._strip(type_id)
        at, kind, _ = self._head(stripped)
        if not bits and kind == INT:  # the older form: the integer type itself says how many bits it has, and where
            data, size = self._words[at + 3], self._words[at + 2]
            if data & 0xFF < 8 * size or start & 7:
                start, bits = start + (data >> 16 & 0xFF), data & 0xFF
        if bits:
            return Field(start >> 3, ((start & 7) + bits + 7) >> 3, start & 7, bits, 0, stripped)
        length = self._words[at + 5] if kind == ARRAY else 0
        return Field(start >> 3, self._size_of(stripped), length=length, type_id=stripped)

    def _size_of(self, type_id: int, depth: int = _DEPTH) -> int:
        type_id = self._strip(type_id)
        at, kind, _ = self._head(type_id)
        if kind == PTR:
            return 8
        if kind == ARRAY:
            element = self._size_of(self._words[at + 3], depth - 1) if depth else 0
            return self._words[at + 5] * element
        return self._words[at + 2] if kind in (INT, STRUCT, UNION, ENUM, ENUM64) else 0

    def _strip(self, type_id: int) -> int:
        """Behind typedef, const, volatile, restrict and tags."""
        for _ in range(_DEPTH):
            at, kind, _ = self._head(type_id)
            if kind not in _MODIFIERS:
                break
            type_id = self._words[at + 2]
        return type_id

    def _head(self, type_id: int) -> tuple[int, int, int]:
        """Word index, kind and vlen of a type; void is kind 0."""
        if type_id == 0:
            return 0, 0, 0
        at = self.index.starts[type_id]
        info = self._words[at + 1]
        return at, info >> 24 & 31, info & 0xFFFF

    def _enumerators(self, type_id: int) -> dict[str, int]:
        at, kind, count = self._head(type_id)
        words, signed = self._words, bool(self._words[at + 1] >> 31)
        found = {}
        width = 3 if kind == ENUM64 else 2
        for place in range(at + 3, at + 3 + width * count, width):
            value = words[place + 1] | (words[place + 2] << 32 if kind == ENUM64 else 0)
            top = 1 << (63 if kind == ENUM64 else 31)
            found[self._string(words[place])] = value - 2 * top if signed and value & top else value
        return found

    def _ids(self, name: str, kinds: frozenset[int]) -> list[int]:
        """Types of that name, those with members first: a name may be used by several compilation units."""
        if name not in self._namesakes:
            self._namesakes[name] = self._find_namesakes(name)
        found = [(members, type_id) for members, type_id, kind in self._namesakes[name] if kind in kinds]
        return [type_id for _, type_id in sorted(found[:_NAMESAKES])]

    def _find_namesakes(self, name: str) -> list[tuple[int, int, int]]:
        """Members (negated), id and kind of every type of that name."""
        at = self._text.find(b"\0" + name.encode() + b"\0") + 1
        words, starts, named = self._words, self.index.starts, self.index.named
        found: list[tuple[int, int, int]] = []
        place = bisect_left(named, at, key=lambda type_id: words[starts[type_id]]) if at else len(named)
        for type_id in named[place : place + 4 * _NAMESAKES]:
            if words[starts[type_id]] != at:
                break
            _, kind, count = self._head(type_id)
            found.append((-count, type_id, kind))
        return found

    def _string(self, offset: int) -> str:
        end = self._text.find(b"\0", offset, offset + 512)
        return self._text[offset:end].decode("ascii", "replace") if end >= 0 else ""


def _build_index(words: array[int]) -> Index:
    """One pass over all records: the only part that costs time (0.2 us for each of about 100,000 types)."""
    starts = [0]
    add, steps = starts.append, _Steps()
    at, end = 0, len(words) - 2
    while at < end:
        add(at)
        at += steps[words[at + 1]]
    if len(starts) > MAX_TYPES:
        raise Implausible("the kernel's type information has too many types")
    kinds = {info for info in steps if info >> 24 & 31 in _NAMED}
    named = [type_id for type_id, start in enumerate(starts) if words[start + 1] in kinds and type_id]
    named.sort(key=lambda type_id: words[starts[type_id]])
    return Index(array("I", starts), array("I", named))


class _Steps(dict[int, int]):
    """Words of a record by its info word."""

    def __missing__(self, info: int) -> int:
        kind = info >> 24 & 31
        if kind >= len(_FIXED):
            raise Implausible("the kernel's type information has an unknown kind of type")
        self[info] = 3 + _FIXED[kind] + (info & 0xFFFF) * _EACH[kind]
        return self[info]


def find_blob(data: bytes) -> tuple[int, int] | None:
    """Offset and size of a BTF blob in a copy of the kernel's read-only data: by its header, and lengths that fit."""
    at = data.find(HEADER)
    while at >= 0:
        if at + 24 <= len(data):
            header, type_at, type_size, text_at, text_size = struct.unpack_from("<5I", data, at + 4)
            total = header + text_at + text_size
            fits = header == 24 and type_at == 0 and text_at == type_size and text_size
            if fits and 1 << 16 < total <= min(MAX_BLOB, len(data) - at) and data[at + header + text_at] == 0:
                return at, total
        at = data.find(HEADER, at + 4)
    return None
