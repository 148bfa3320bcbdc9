"""The kernel pools: blocks behind a _POOL_HEADER, packed into pages as NT packs them.

Sources: _POOL_HEADER of ntkrnlmp.pdb (16 bytes on x64; block sizes in units of 16 bytes), and that from Vista on an
even PoolType other than 0 is non-paged: volatility3 symbols/windows/extensions/pool.py.
"""

from __future__ import annotations

import struct

from tests.worlds.windows.paging import PAGE, Space

HEADER = 16
NONPAGED, PAGED = 2, 3
FREED = b"\xdd"


class Pool:
    """One pool: fresh pages follow each other in kernel space; a freed block is given to the next of its size."""

    def __init__(self, space: Space, base: int, kind: int) -> None:
        self.space, self.kind = space, kind
        self._next = base  # the page after the last one
        self._at = base  # where the next block begins
        self._previous = 0
        self._free: dict[int, list[int]] = {}
        self._sizes: dict[int, int] = {}

    def take(self, tag: bytes, data: bytes | int) -> int:
        """The address of a block's body; ``data`` is its content or its size."""
        body = bytes(data) if isinstance(data, int) else data
        size = -(-(len(body) + HEADER) // 16) * 16
        if size > PAGE - 32:
            return self.take_pages(body)
        freed = self._free.get(size)
        if freed:
            va = freed.pop()
            at, previous = va - HEADER, self.space.read(va - HEADER, 1)[0]
        else:
            at, previous = self._place(size), self._previous
            self._previous = size // 16
            va = at + HEADER
        self._sizes[va] = size
        kind = self.kind
        self.space.write(va, body.ljust(size - HEADER, b"\0"))
        self.space.write(at, struct.pack("<BBBB4sQ", previous, 0, size // 16, kind, tag, 0))
        return va

    def take_pages(self, data: bytes | int) -> int:
        """A big allocation: whole pages, no header."""
        body = bytes(data) if isinstance(data, int) else data
        count = -(-len(body) // PAGE)
        va = self._next
        self.space.map(va, self.space.ram.page(count), count)
        self._next += count * PAGE
        self._at, self._previous = self._next, 0
        if body.strip(b"\0"):
            self.space.write(va, body)
        return va

    def give(self, va: int, *, poison: bool = True, reuse: bool = True) -> None:
        """Free a block: its header says so, and its body holds what a checked build leaves there."""
        size = self._sizes.pop(va)
        if poison:
            self.space.write(va, FREED * (size - HEADER))
        self.space.write(va - HEADER + 3, b"\0")
        if reuse:
            self._free.setdefault(size, []).append(va)

    def _place(self, size: int) -> int:
        if self._at + size > self._next:
            self.space.map(self._next, self.space.ram.page())
            self._at, self._previous = self._next, 0
            self._next += PAGE
        self._at += size
        return self._at - size
