"""A second, independent reader of BTF: all types of a kernel as plain records, for engines that want them all.

Shares no code with ``appliance.guest.layout``, which decodes only what it is asked for: each is tested by the other.
Source: Linux Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cached_property

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR = range(1, 15)
DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(15, 20)
MODIFIERS = (VOLATILE, CONST, RESTRICT, TYPE_TAG, TYPEDEF)

# Bytes behind the 12 of a record: fixed, and for each of its vlen entries.
_FIXED = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
_EACH = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}


@dataclass(frozen=True, slots=True)
class Record:
    """One type. ``value`` is its size, or the type it refers to."""

    id: int
    name: str
    kind: int
    vlen: int
    flag: bool
    value: int
    at: int  # where the data behind the common part begins


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a structure or union."""

    name: str
    type_id: int
    bit_offset: int
    bits: int  # 0: no bit-field


@dataclass
class Btf:
    """All types of one kernel."""

    blob: bytes
    records: list[Record] = field(init=False)

    def __post_init__(self) -> None:
        magic, _, _, header, type_at, type_size, text_at, text_size = struct.unpack_from("<HBBIIIII", self.blob)
        if magic != 0xEB9F:
            raise ValueError("this is no type information")
        self._text = self.blob[header + text_at : header + text_at + text_size]
        self._data = self.blob[header + type_at : header + type_at + type_size]
        self.records = [Record(0, "void", 0, 0, False, 0, 0)]
        at, unpack = 0, struct.Struct("<III").unpack_from
        while at < len(self._data):
            name, info, value = unpack(self._data, at)
            kind, vlen = info >> 24 & 31, info & 0xFFFF
            record = Record(len(self.records), self.text(name), kind, vlen, bool(info >> 31), value, at + 12)
            self.records.append(record)
            at += 12 + _FIXED.get(kind, 0) + vlen * _EACH.get(kind, 0)

    def text(self, offset: int) -> str:
        """Read a name from the string section."""
        return self._text[offset : self._text.index(b"\0", offset)].decode() if offset else ""

    @cached_property
    def by_name(self) -> dict[tuple[int, str], Record]:
        """By kind and name; where compilation units disagree, the one with most members."""
        found: dict[tuple[int, str], Record] = {}
        for record in self.records:
            known = found.get((record.kind, record.name))
            if record.name and (known is None or record.vlen > known.vlen):
                found[record.kind, record.name] = record
        return found

    def members(self, record: Record) -> list[Member]:
        """List the members of a structure or union."""
        found = []
        for name, type_id, where in struct.iter_unpack("<III", self._data[record.at : record.at + 12 * record.vlen]):
            bits, offset = (where >> 24, where & 0xFFFFFF) if record.flag else (0, where)
            found.append(Member(self.text(name), type_id, offset, bits))
        return found

    def enumerators(self, record: Record) -> list[tuple[str, int]]:
        """List names and values."""
        form = ("<Ii" if record.flag else "<II") if record.kind == ENUM else "<III"
        size = struct.calcsize(form) * record.vlen
        found = []
        for name, low, *high in struct.iter_unpack(form, self._data[record.at : record.at + size]):
            value = low | high[0] << 32 if high else low
            found.append((self.text(name), value - (1 << 64) if high and record.flag and value >> 63 else value))
        return found

    def array(self, record: Record) -> tuple[int, int]:
        """Type of the elements, and their number."""
        element, _, count = struct.unpack_from("<III", self._data, record.at)
        return element, count

    def encoding(self, record: Record) -> tuple[bool, bool, int]:
        """Of an integer: signed, boolean, bits."""
        (data,) = struct.unpack_from("<I", self._data, record.at)
        return bool(data >> 24 & 1), bool(data >> 24 & 4), data & 0xFF

    def strip(self, type_id: int) -> Record:
        """Behind typedef, const, volatile, restrict and tags."""
        record = self.records[type_id]
        while record.kind in MODIFIERS:
            record = self.records[record.value]
        return record
