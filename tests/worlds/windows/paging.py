"""Guest-physical RAM in a file, and page tables written into it as Windows lays them out.

Sources: Intel SDM vol. 3A chapter 4; that every top table maps itself, at an index drawn at boot: volatility3
automagic/windows.py; the forms of an entry that is not present: _MMPTE_TRANSITION, _MMPTE_SOFTWARE of ntkrnlmp.pdb.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from pathlib import Path

PAGE = 4096
LARGE_PAGE = 2 << 20
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
SELF = 0x1B3  # the entry of the top table that maps the tables themselves


class Ram:
    """A sparse file as long as the guest's RAM, mapped shared; without a path it has no name."""

    def __init__(self, size: int, path: Path | None = None) -> None:
        self.size, self.path = size, path
        if path is None:
            descriptor, name = tempfile.mkstemp(
                prefix="windows-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
            )
            Path(name).unlink()
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(descriptor, size)
        self.descriptor = descriptor
        self.data = mmap.mmap(descriptor, size)
        self._next: list[tuple[int, int]] = []

    def close(self) -> None:
        self.data.close()
        os.close(self.descriptor)

    def offer(self, start: int, end: int) -> None:
        """Pages may be taken from here, after those that were offered before."""
        self._next.append((start, end))

    def page(self, count: int = 1) -> int:
        """The address of fresh pages that lie side by side."""
        for number, (start, end) in enumerate(self._next):
            if start + count * PAGE <= end:
                self._next[number] = (start + count * PAGE, end)
                return start
        raise MemoryError("the machine has no RAM left; give it more (ram=)")

    def write(self, gpa: int, data: bytes) -> None:
        self.data[gpa : gpa + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        return self.data[gpa : gpa + size]


class Space:
    """One address space: its tables in RAM, and what it maps, by page. A process shares the kernel's half.

    ``shadow``: a second top table, for the time that the process itself runs (KVA shadow): it has the user's half and
    next to nothing of the kernel's; the first one then lets nothing of the user's half be executed.
    """

    def __init__(self, ram: Ram, root: int, levels: int, kernel: Space | None = None, shadow: int = 0) -> None:
        self.ram, self.root, self.levels, self.kernel, self.shadow = ram, root, levels, kernel, shadow
        self.pages: dict[int, int] = {}
        if kernel is not None:
            ram.write(root + PAGE // 2, ram.read(kernel.root + PAGE // 2, PAGE // 2))
        self._set(root, SELF, root | PRESENT | WRITABLE | ACCESSED | DIRTY | NX)

    def prepare(self, va: int) -> None:
        """Make the table below the top one, so that processes that copy the top one share what is mapped later."""
        self._table(va, self.levels - 2, user=False)

    def map(
        self,
        va: int,
        gpa: int,
        count: int = 1,
        *,
        user: bool = False,
        writable: bool = True,
        execute: bool = False,
    ) -> int:
        """Map pages one after the other; returns ``va``."""
        flags = PRESENT | ACCESSED | DIRTY | (USER if user else 0) | (WRITABLE if writable else 0)
        flags |= 0 if execute else NX
        for number in range(count):
            self.entry(va + number * PAGE, gpa + number * PAGE | flags, user=user)
            self.pages[va + number * PAGE] = gpa + number * PAGE
        return va

    def map_large(self, va: int, gpa: int) -> None:
        """Map one page of 2 MiB; both addresses are aligned to it."""
        table = self._table(va, 1, user=False)
        self._set(table, va >> 21 & 511, gpa | PRESENT | WRITABLE | ACCESSED | DIRTY | LARGE)
        for offset in range(0, LARGE_PAGE, PAGE):
            self.pages[va + offset] = gpa + offset

    def entry(self, va: int, value: int, *, user: bool = True) -> None:
        """Write the entry of one page as it is."""
        self._set(self._table(va, 0, user=user), va >> 12 & 511, value)

    def read_entry(self, va: int) -> int:
        return int.from_bytes(self.ram.read(self._table(va, 0, user=False) + 8 * (va >> 12 & 511), 8), "little")

    def transition(self, va: int) -> None:
        """Take a page out of the working set; it stays in RAM, on the standby list."""
        gpa = self._gpa(va & -PAGE)
        self.entry(va, gpa | 1 << 11 | 4 << 5)

    def page_out(self, va: int) -> None:
        """The page is in the paging file, at some place of it."""
        self.entry(va, 0x1234 << 32 | 4 << 5)
        self.pages.pop(va & -PAGE, None)

    def write(self, va: int, data: bytes) -> None:
        """Write through the pages that were mapped."""
        position = 0
        while position < len(data):
            here = va + position
            size = min(len(data) - position, PAGE - here % PAGE)
            self.ram.write(self._gpa(here & -PAGE) + here % PAGE, data[position : position + size])
            position += size

    def read(self, va: int, size: int) -> bytes:
        parts = []
        while size:
            step = min(size, PAGE - va % PAGE)
            parts.append(self.ram.read(self._gpa(va & -PAGE) + va % PAGE, step))
            va, size = va + step, size - step
        return b"".join(parts)

    def gpa(self, va: int) -> int:
        return self._gpa(va & -PAGE) + va % PAGE

    def _gpa(self, page: int) -> int:
        gpa = self.pages.get(page)
        if gpa is None and self.kernel is not None:
            gpa = self.kernel.pages.get(page)
        if gpa is None:
            raise KeyError(f"{page:#x} is not mapped")
        return gpa

    def _table(self, va: int, level: int, *, user: bool) -> int:
        """The table of ``level`` that speaks about an address; those on the way are made."""
        table = self.root
        for current in range(self.levels - 1, level, -1):
            at = table + 8 * (va >> (12 + 9 * current) & 511)
            entry = int.from_bytes(self.ram.read(at, 8), "little")
            if not entry & PRESENT:
                fresh = self.ram.page()
                entry = fresh | PRESENT | WRITABLE | ACCESSED | DIRTY | (USER if user else 0)
                if table == self.root and self.shadow and at < table + PAGE // 2:
                    self.ram.write(at - table + self.shadow, struct.pack("<Q", entry))
                    entry |= NX
                self.ram.write(at, struct.pack("<Q", entry))
            table = entry & 0x000F_FFFF_FFFF_F000
        return table

    def _set(self, table: int, index: int, value: int) -> None:
        self.ram.write(table + 8 * index, struct.pack("<Q", value))
