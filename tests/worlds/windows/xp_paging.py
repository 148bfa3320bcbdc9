"""The memory of a Windows XP or Server 2003 made of bytes: its RAM, and the page tables of x86 with and without PAE.

Sources: /PAE and the self map at c0000000 (c0600000 with PAE): Windows Internals 4th ed. ch. 7.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from appliance.errors import UnreadableMemory
from appliance.model import Region, VcpuState
from tests.worlds.windows.paging import PAGE, Ram, Space

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, NX = 1, 2, 4, 0x20, 0x40, 1 << 63


class Space32:
    """x86 page tables of two levels, or of three with PAE; every process shares the kernel's half."""

    def __init__(self, ram: Ram, root: int, tables: Sequence[int], *, pae: bool, kernel: Space32 | None = None) -> None:
        self.ram, self.root, self.tables, self.pae, self.kernel = ram, root, tuple(tables), pae, kernel
        self.pages: dict[int, int] = {}
        self.children: list[Space32] = []
        half = len(self.tables) * PAGE // 2
        if kernel is not None:
            kernel.children.append(self)
            self._write_directory(half, kernel._read_directory(half, half))
        if pae:
            ram.write(root, b"".join(struct.pack("<Q", table | PRESENT) for table in self.tables))
        for number, table in enumerate(self.tables):
            self._directory((0x600 if pae else 0x300) + number, table | PRESENT | WRITABLE | ACCESSED | DIRTY)

    def map(
        self, va: int, gpa: int, count: int = 1, *, user: bool = False, writable: bool = True, execute: bool = True
    ) -> int:
        flags = PRESENT | ACCESSED | DIRTY | (USER if user else 0) | (WRITABLE if writable else 0)
        flags |= 0 if execute or not self.pae else NX
        for number in range(count):
            self.entry(va + number * PAGE, gpa + number * PAGE | flags)
            self.pages[va + number * PAGE] = gpa + number * PAGE
        return va

    def entry(self, va: int, value: int) -> None:
        """Write the entry of one page as it is."""
        if va >> 31 and self.kernel is not None:
            self.kernel.entry(va, value)
            return
        size, shift = (8, 21) if self.pae else (4, 22)
        index = va >> shift
        old = int.from_bytes(self._read_directory(index * size, size), "little")
        if not old & PRESENT:
            old = self.ram.page() | PRESENT | WRITABLE | ACCESSED | DIRTY | USER
            for space in (self, *(self.children if va >> 31 else ())):
                space._directory(index, old)
        table = old & 0xFFFFF000
        self.ram.write(table + size * (va >> 12 & (511 if self.pae else 1023)), value.to_bytes(size, "little"))

    def write(self, va: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            here = va + position
            size = min(len(data) - position, PAGE - here % PAGE)
            self.ram.write(self.gpa(here), data[position : position + size])
            position += size

    def read(self, va: int, size: int) -> bytes:
        parts = []
        while size:
            step = min(size, PAGE - va % PAGE)
            parts.append(self.ram.read(self.gpa(va), step))
            va, size = va + step, size - step
        return b"".join(parts)

    def gpa(self, va: int) -> int:
        page = self.pages.get(va & -PAGE)
        if page is None and self.kernel is not None:
            page = self.kernel.pages.get(va & -PAGE)
        if page is None:
            raise KeyError(f"{va:#x} is not mapped")
        return page + va % PAGE

    def _directory(self, index: int, value: int) -> None:
        size = 8 if self.pae else 4
        self._write_directory(index * size, value.to_bytes(size, "little"))

    def _write_directory(self, at: int, data: bytes) -> None:
        for position in range(0, len(data), PAGE):
            piece = data[position : position + PAGE]
            self.ram.write(self.tables[(at + position) // PAGE] + (at + position) % PAGE, piece)

    def _read_directory(self, at: int, size: int) -> bytes:
        if size <= PAGE:
            return self.ram.read(self.tables[at // PAGE] + at % PAGE, size)
        return b"".join(self._read_directory(at + position, PAGE) for position in range(0, size, PAGE))


AnySpace = Space | Space32


class RamMemory:
    """The machine's RAM as a route to a guest gives it."""

    name, live = "bytes", False

    def __init__(self, ram: Ram, vcpus: tuple[VcpuState, ...] = ()) -> None:
        self._data, self._size, self._vcpus = ram.data, ram.size, vcpus

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, self._size),)

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or size < 0 or gpa + size > self._size:
            raise UnreadableMemory(gpa, size, "not RAM")
        return self._data[gpa : gpa + size]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        last = self._size
        return [
            self._data[at : at + size] if at >= 0 and size >= 0 and at + size <= last else None for at, size in spans
        ]

    def vcpus(self) -> tuple[VcpuState, ...]:
        return self._vcpus

    def check_alive(self) -> None:
        pass

    def close(self) -> None:
        pass
