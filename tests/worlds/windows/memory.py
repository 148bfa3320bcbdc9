"""A process's memory: its regions (VADs), what is mapped there, and what the loader says of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.worlds.windows.boot import Kernel
from tests.worlds.windows.files import PAGES, TEXT, TEXT_PAGES, WRITABLE_PAGES, File
from tests.worlds.windows.paging import ACCESSED, NX, PAGE, PRESENT, USER, WRITABLE, Space

PROTECTION = {
    "PAGE_NOACCESS": 0x18,
    "PAGE_READONLY": 1,
    "PAGE_EXECUTE": 2,
    "PAGE_EXECUTE_READ": 3,
    "PAGE_READWRITE": 4,
    "PAGE_WRITECOPY": 5,
    "PAGE_EXECUTE_READWRITE": 6,
    "PAGE_EXECUTE_WRITECOPY": 7,
}
SHORT_NAMES = {"R": "PAGE_READONLY", "RW": "PAGE_READWRITE", "RX": "PAGE_EXECUTE_READ", "RWX": "PAGE_EXECUTE_READWRITE"}
IMAGE_MAP = 2


@dataclass
class Region:
    """A run of a process's pages that one VAD describes."""

    start: int
    size: int
    protection: str
    private: bool = True
    file: File | None = None
    vad: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass
class Memory:
    """The user half of one process."""

    kernel: Kernel
    space: Space
    eprocess: int
    regions: list[Region] = field(default_factory=list)
    _next: dict[str, int] = field(default_factory=dict)

    def place(self, kind: str, first: int, size: int) -> int:
        """Where the next region of a kind goes; regions lie on 64 KiB."""
        va = self._next.get(kind, first)
        self._next[kind] = va + (size + 0x1FFFF & -0x10000)
        return va

    def region(self, start: int, size: int, protection: str, content: bytes = b"", *, backed: bool = True) -> Region:
        """Private memory; ``backed``: its pages are there, else they were never touched."""
        protection = SHORT_NAMES.get(protection, protection)
        if backed:
            count = size // PAGE
            writable, execute = "WRITE" in protection, "EXECUTE" in protection
            gpa = self.kernel.ram.page(count)
            self.space.map(start, gpa, count, user=True, writable=writable, execute=execute)
            if content:
                self.space.write(start, content)
        return self._add(Region(start, size, protection))

    def view(self, file: File, start: int, protection: str = "PAGE_READONLY") -> Region:
        """A file mapped as data."""
        for number, page in enumerate(file.pages):
            self.space.map(start + number * PAGE, page, user=True, writable=False)
        return self._add(Region(start, file.size, SHORT_NAMES.get(protection, protection), private=False, file=file))

    def image(self, file: File, start: int) -> Region:
        """An image: its code and constants are the file's own pages, its data are too until they are written."""
        for number, page in enumerate(file.pages):
            execute = TEXT <= number < TEXT + TEXT_PAGES
            self.space.map(start + number * PAGE, page, user=True, writable=False, execute=execute)
            if number >= WRITABLE_PAGES:
                self.space.entry(start + number * PAGE, page | PRESENT | USER | ACCESSED | NX | 1 << 9)  # copy on write
        return self._add(Region(start, PAGES * PAGE, "PAGE_EXECUTE_WRITECOPY", private=False, file=file))

    def copy_page(self, va: int) -> int:
        """Give the process its own copy of a page of an image, as a write to it does."""
        va &= -PAGE
        content, entry = self.space.read(va, PAGE), self.space.read_entry(va)
        fresh = self.kernel.ram.page()
        self.kernel.ram.write(fresh, content)
        self.space.entry(va, entry & ~0x000F_FFFF_FFFF_FE00 | fresh | WRITABLE)
        self.space.pages[va] = fresh
        return fresh

    def remove(self, region: Region) -> None:
        """Unmap a region."""
        self.regions.remove(region)
        for va in range(region.start, region.end, PAGE):
            if self.space.pages.pop(va, None) is not None:
                self.space.entry(va, 0)
        self._rebuild()

    def _add(self, region: Region) -> Region:
        types = self.kernel.types
        kind = "_MMVAD" if region.file is not None else "_MMVAD_SHORT"
        prefix = "Core." if region.file is not None else ""
        first, last = region.start // PAGE, region.end // PAGE - 1
        values: dict[str, int | bytes] = {
            "StartingVpn": first & 0xFFFF_FFFF,
            "EndingVpn": last & 0xFFFF_FFFF,
            "StartingVpnHigh": first >> 32,
            "EndingVpnHigh": last >> 32,
            "u.VadFlags.Protection": PROTECTION[region.protection],
            "u.VadFlags.PrivateMemory": int(region.private),
            "u1.VadFlags1.CommitCharge": region.size // PAGE if region.private else 0,
            "u1.VadFlags1.MemCommit": int(region.private),
        }
        if region.file is not None:
            values["u.VadFlags.VadType"] = IMAGE_MAP if region.file.image else 0
        values = {prefix + key: value for key, value in values.items()}
        if region.file is not None:
            values |= {
                "Subsection": region.file.subsection,
                "FirstPrototypePte": region.file.prototypes,
                "LastContiguousPte": region.file.prototypes + 8 * (region.size // PAGE - 1),
                "VadsProcess": self.eprocess | 1,
                "?FileObject": region.file.va,
            }
        tag = b"Vad " if region.file is not None else b"VadS"
        region.vad = self.kernel.nonpaged.take(tag, types.pack(kind, values))
        self.regions.append(region)
        self._rebuild()
        return region

    def _rebuild(self) -> None:
        """Link the tree anew: balanced, in the order of addresses."""
        ordered = sorted(self.regions, key=lambda region: region.start)
        root = self._link(ordered, 0, len(ordered), 0)[0]
        self.kernel.set(self.eprocess, "_EPROCESS.VadRoot.Root", root)
        self.kernel.set(self.eprocess, "_EPROCESS.VadCount", len(ordered))
        self.kernel.set(self.eprocess, "_EPROCESS.VadHint", root)

    def _link(self, ordered: list[Region], low: int, high: int, parent: int) -> tuple[int, int]:
        if low >= high:
            return 0, 0
        middle = (low + high) // 2
        vad = ordered[middle].vad
        left, left_depth = self._link(ordered, low, middle, vad)
        right, right_depth = self._link(ordered, middle + 1, high, vad)
        balance = (right_depth - left_depth) & 3
        self.kernel.space.write(vad, struct.pack("<QQQ", left, right, parent | balance))
        return vad, max(left_depth, right_depth) + 1
