"""The non-paged pool of a Windows XP or Server 2003 made of bytes.

Source: pool headers of 8 bytes, types from 1 on: symbols of ntkrnlpa.pdb.
"""

from __future__ import annotations

import struct

from tests.worlds.windows.paging import PAGE
from tests.worlds.windows.xp_paging import AnySpace


class Pool:
    """Non-paged pool: blocks behind headers of 8 bytes (16 on x64), in pages that follow each other."""

    def __init__(self, space: AnySpace, base: int, wide: bool) -> None:
        self.space, self.header = space, 16 if wide else 8
        self._at = self._next = base
        self._before = 0

    def take(self, tag: bytes, size: int) -> int:
        """The address of a block's body of zeros."""
        whole = -(-(size + self.header) // self.header) * self.header
        if whole > PAGE:
            count = -(-size // PAGE)
            va = self._next
            self.space.map(va, self.space.ram.page(count), count)
            self._next += count * PAGE
            self._at = self._next
            return va
        if self._at + whole > self._next:
            self.space.map(self._next, self.space.ram.page())
            self._at, self._before = self._next, 0
            self._next += PAGE
        at, units = self._at, whole // self.header
        self._at += whole
        self.mark(at + self.header, tag, units, used=True)
        return at + self.header

    def mark(self, va: int, tag: bytes, units: int | None = None, *, used: bool) -> None:
        """Write a block's header; a free one keeps its tag and has no type."""
        at, kind = va - self.header, 5 if used else 0  # NonPagedPoolCacheAligned (4) and one: odd, as in every pool
        if self.header == 8:
            old = struct.unpack("<HH", self.space.read(at, 4)) if units is None else (self._before, units)
            self.space.write(at, struct.pack("<HH4s", old[0], old[1] & 0x1FF | kind << 9, tag))
        else:
            size = self.space.read(at + 2, 1)[0] if units is None else units
            self.space.write(at, struct.pack("<BBBB4sQ", self._before & 0xFF, 0, size, kind, tag, 0))
        self._before = units or self._before
