"""From physical pages back to kernel addresses: the kernel's page tables, read once for all pages that are asked for.

Bounded in tables and time whatever the entries say. The recursive mapping of the tables themselves (Windows keeps one
entry of the top table that points to it) is not followed. Sources: as of `space`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator

from appliance.guest.paging import LARGE, PRESENT
from appliance.guest.windows.space import ADDRESS, PAGE, AddressSpace, Mode

MAX_TABLES = 1 << 16  # 256 MiB of page tables
BATCH = 256  # tables read at once
_Table = tuple[int, int]  # guest-physical address, VA of the first entry


def find_pages(space: AddressSpace, gpas: Collection[int], expired: Callable[[], bool]) -> tuple[dict[int, int], bool]:
    """Where in the kernel's half these guest-physical pages are mapped, and whether all of it was looked at.

    A page that is mapped at several addresses is told with one of them, one that is mapped nowhere is left out. Raises
    GuestGone.
    """
    levels, entry_size = space.mode.value
    bits, kind = (9, "Q") if entry_size == 8 else (10, "I")
    search = _Search({gpa & -PAGE for gpa in gpas}, kind)
    tables: list[_Table] = [(space.root, 0)]
    seen = {space.root}
    for level in range(levels - 1, -1, -1):
        shift = 12 + bits * level
        top = level == levels - 1
        size = 32 if top and space.mode is Mode.PAE else PAGE
        may_be_large = 0 < level < 3 and not (top and space.mode is not Mode.LEGACY)
        below: list[_Table] = []
        for va, raw in _read(space, tables, size):
            if not search.wanted:
                return search.found, True
            if expired():
                return search.found, False
            if level == 0:
                search.pages(va, raw)
                continue
            for index, entry in enumerate(array(kind, raw)):
                if not entry & PRESENT:
                    continue
                at = va + (index << shift)
                if top:
                    if not at >> (space.mode.bits - 1) & 1:
                        continue  # the process's half
                    at = _sign_extended(at, space.mode)
                child = entry & ADDRESS
                if may_be_large and entry & LARGE:
                    search.large(at, entry, shift)
                elif child not in seen:
                    if len(seen) >= MAX_TABLES:
                        return search.found, False
                    seen.add(child)
                    below.append((child, at))
        tables = below
    return search.found, True


class _Search:
    def __init__(self, wanted: set[int], kind: str) -> None:
        self.wanted, self.found = wanted, dict[int, int]()
        self._kind = kind
        self._clean = ADDRESS.__and__ if kind == "Q" else 0xFFFF_F000.__and__

    def pages(self, va: int, raw: bytes) -> None:
        """One lowest table: most have nothing that is wanted, which is told without a loop of ours."""
        frames = list(map(self._clean, array(self._kind, raw)))
        if self.wanted.isdisjoint(frames):
            return
        for index, (frame, entry) in enumerate(zip(frames, array(self._kind, raw), strict=True)):
            if frame in self.wanted and entry & PRESENT:
                self._take(frame, va + index * PAGE)

    def large(self, va: int, entry: int, shift: int) -> None:
        """An entry that is a page itself."""
        base = entry & ADDRESS & -(1 << shift)
        if self._kind == "I":
            base = (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32
        end = base + (1 << shift)
        for frame in [frame for frame in self.wanted if base <= frame < end]:
            self._take(frame, va + frame - base)

    def _take(self, frame: int, va: int) -> None:
        self.found[frame] = va
        self.wanted.discard(frame)


def _sign_extended(va: int, mode: Mode) -> int:
    return va if mode.pointer_size == 4 else va | (1 << 64) - (1 << mode.bits)


def _read(space: AddressSpace, tables: Iterable[_Table], size: int) -> Iterator[tuple[int, bytes]]:
    """The tables that can be read, some at a time."""
    pending = list(tables)
    for first in range(0, len(pending), BATCH):
        part = pending[first : first + BATCH]
        for (_, va), raw in zip(part, space.memory.readv([(gpa, size) for gpa, _ in part]), strict=True):
            if raw is not None:
                yield va, raw
