"""An attached Linux kernel: virtual reads, symbols and layouts on top of guest-physical memory.

Made by :func:`appliance.guest.attach.attach`. Addresses of the direct map and of the kernel image are translated by
arithmetic; everything else (vmalloc, vmemmap, user space) by page walks, batched. Translations of vmalloc addresses are
remembered until `forget`, which belongs at the start of each look. One `Kernel` belongs to one thread.
Sources: Linux Documentation/arch/x86/x86_64/mm.rst (virtual memory map), arch/x86/include/asm/page_64_types.h.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from appliance.errors import OutOfTime, UnreadableMemory
from appliance.guest.kallsyms import KallsymsTable as Symbols
from appliance.guest.layout import BtfTypes as Types
from appliance.guest.layout import Field
from appliance.guest.paging import ADDRESS, PAGE, Pte, translate, translate_pages, walk_range
from appliance.ports import GuestMemory

__all__ = ["Field", "Image", "Kernel", "Pte", "Symbols", "Types"]

READ_LIMIT = 64 << 20  # bytes of one read: no length that a guest names may be larger
CACHE_LIMIT = 1 << 16  # remembered translations
KERNEL_HALF = 1 << 63
SLICE = 1 << 14  # spans read between two looks at the clock


@dataclass(frozen=True, slots=True)
class Image:
    """The kernel image: ``size`` bytes from ``_text`` on, linear in guest-physical memory."""

    va: int
    gpa: int
    size: int


class Kernel:
    """One attached kernel. Reads raise UnreadableMemory or GuestGone; batched reads give None per item instead."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        image: Image,
        root: int,
        la57: bool,
        page_offset: int,
        symbols: Symbols,
        types: Types,
        release: str = "",
        build_id: str = "",
        vmemmap_base: int = 0,
        vmalloc_base: int = 0,
    ) -> None:
        self.memory, self.image, self.root, self.la57 = memory, image, root, la57
        self.symbols, self.types, self.release, self.build_id = symbols, types, release, build_id
        self.page_offset, self.vmemmap_base, self.vmalloc_base = page_offset, vmemmap_base, vmalloc_base
        self.levels = 5 if la57 else 4
        last = memory.regions[-1]
        self._direct_end = page_offset + last.gpa + last.size
        self._image_end = image.va + image.size
        self._image_delta = image.gpa - image.va
        self._read_physical = memory.read
        self._packed: Callable[[bytes, int], list[bytes | None] | None] | None = getattr(memory, "readv_packed", None)
        self._pages: dict[int, int] = {}
        bind = getattr(memory, "bind_reader", None)
        # The same as `read`, without a deadline: for what reads a few times only. The direct map costs one frame.
        anywhere = self._read_anywhere
        self.read_unlimited: Callable[[int, int], bytes] = bind(page_offset, anywhere) if bind else anywhere
        self._until, self._clock = math.inf, time.monotonic

    @contextmanager
    def limit(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
        """Within this, `read` and `readv` raise OutOfTime once so many seconds have passed."""
        before = self._until, self._clock
        self._until, self._clock = clock() + seconds, clock
        try:
            yield
        finally:
            self._until, self._clock = before

    # -- the kernel's own address space --

    def read(self, va: int, size: int) -> bytes:
        """Return exactly ``size`` bytes at a kernel address."""
        if self._clock() > self._until:
            raise OutOfTime("reading the guest took too long")
        return self.read_unlimited(va, size)

    def _read_anywhere(self, va: int, size: int) -> bytes:
        if self.page_offset <= va and va + size <= self._direct_end and size >= 0:
            return self._read_physical(va - self.page_offset, size)
        if self.image.va <= va and va + size <= self._image_end and size >= 0:
            return self._read_physical(va + self._image_delta, size)
        data = self._read_walked(self.root, ((va, size),), self._pages)[0]
        if data is None:
            raise UnreadableMemory(va, size)
        return data

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(va, size)`` spans in as few system calls as can be; None where one is unreadable."""
        if not spans:
            return []
        if self._clock() > self._until:
            raise OutOfTime("reading the guest took too long")
        if len(spans) > SLICE:
            slices = (spans[at : at + SLICE] for at in range(0, len(spans), SLICE))
            return [piece for part in slices for piece in self.readv(part)]
        if self._packed is not None:
            try:
                raw = struct.pack(f"<{2 * len(spans)}Q", *chain.from_iterable(spans))
            except struct.error:  # a negative number, or one beyond 64 bits
                return self._readv_slowly(spans)
            found = self._packed(raw, self.page_offset)
            if found is not None:  # all of the direct map
                return found
        return self._readv_slowly(spans)

    def u64(self, va: int) -> int:
        """An unsigned 64-bit number, or a pointer."""
        return int.from_bytes(self.read(va, 8), "little")

    def u32(self, va: int) -> int:
        """An unsigned 32-bit number."""
        return int.from_bytes(self.read(va, 4), "little")

    def u16(self, va: int) -> int:
        """An unsigned 16-bit number."""
        return int.from_bytes(self.read(va, 2), "little")

    def u8(self, va: int) -> int:
        """An unsigned byte."""
        return self.read(va, 1)[0]

    def read_text(self, va: int, limit: int) -> bytes:
        """NUL-terminated text, at most ``limit`` bytes, without the NUL. Never reads past a page it need not."""
        text = b""
        while len(text) < limit:
            size = min(limit - len(text), PAGE - (va + len(text)) % PAGE)
            part = self.read(va + len(text), size)
            end = part.find(b"\0")
            if end >= 0:
                return text + part[:end]
            text += part
        return text

    def to_gpa(self, va: int) -> int | None:
        """The guest-physical address behind a kernel address, None where nothing is mapped."""
        if self.page_offset <= va < self._direct_end:
            return va - self.page_offset
        if self.image.va <= va < self._image_end:
            return va + self._image_delta
        page = va & -PAGE
        self._resolve(self.root, {page}, self._pages)
        return self._pages[page] + va % PAGE if page in self._pages else None

    def direct(self, va: int) -> int:
        """The same place in the direct map, of what lies in the image: one kind of address keeps a batch quick."""
        return va + self._image_delta + self.page_offset if self.image.va <= va < self._image_end else va

    def forget(self) -> None:
        """Drop remembered translations; call at the start of each look."""
        self._pages.clear()

    # -- other address spaces --

    def read_user(self, pgd: int, va: int, size: int) -> bytes:
        """Read another address space; ``pgd`` is ``mm->pgd`` (a kernel address) or its guest-physical address."""
        if 0 < size <= PAGE - va % PAGE:
            gpa = translate(self.memory, self._root_of(pgd), va, self.levels)
            if gpa is not None:
                return self._read_physical(gpa, size)
            raise UnreadableMemory(va, size, "not mapped, or paged out")
        data = self._read_walked(self._root_of(pgd), ((va, size),), {})[0]
        if data is None:
            raise UnreadableMemory(va, size, "not mapped, or paged out")
        return data

    def readv_user(self, pgd: int, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(va, size)`` spans of another address space; None where any page of one is absent."""
        try:
            return self._read_walked(self._root_of(pgd), spans, {})
        except UnreadableMemory:
            return [None] * len(spans)

    def walk_user_pages(self, pgd: int, start: int, end: int) -> Iterator[Pte]:
        """Yield the pages of ``[start, end)`` of another address space that have an entry, in order."""
        return walk_range(self.memory, self._root_of(pgd), start, end, self.levels)

    # -- private --

    def _root_of(self, pgd: int) -> int:
        if pgd < KERNEL_HALF:
            return pgd & ADDRESS
        gpa = self.to_gpa(pgd)
        if gpa is None:
            raise UnreadableMemory(pgd, PAGE, "page-table root is not mapped")
        return gpa & ADDRESS

    def _readv_slowly(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Spans of several kinds: those that arithmetic can translate go in one batch, the rest are walked."""
        low, high, offset = self.page_offset, self._direct_end, self.page_offset
        image, image_end, delta = self.image.va, self._image_end, self._image_delta
        physical: list[tuple[int, int]] = []
        places: list[int] = []
        walked: list[int] = []
        for place, (va, size) in enumerate(spans):
            if low <= va and va + size <= high and size >= 0:
                physical.append((va - offset, size))
                places.append(place)
            elif image <= va and va + size <= image_end and size >= 0:
                physical.append((va + delta, size))
                places.append(place)
            else:
                walked.append(place)
        pieces = self.memory.readv(physical) if physical else []
        if not walked:
            return pieces
        found: list[bytes | None] = [None] * len(spans)
        for place, piece in zip(places, pieces, strict=True):
            found[place] = piece
        rest = self._read_walked(self.root, [spans[place] for place in walked], self._pages)
        for place, piece in zip(walked, rest, strict=True):
            found[place] = piece
        return found

    def _read_walked(self, root: int, spans: Sequence[tuple[int, int]], known: dict[int, int]) -> list[bytes | None]:
        """Translate page by page, all pages of all spans together."""
        wanted = {
            page
            for va, size in spans
            if 0 < size <= READ_LIMIT
            for page in range(va & -PAGE, va + size, PAGE)
            if page not in known
        }
        self._resolve(root, wanted, known)
        parts: list[tuple[int, int]] = []
        counts: list[int] = []
        for va, size in spans:
            mapped = list(_pieces(va, size, known)) if 0 <= size <= READ_LIMIT else [None]
            whole = [piece for piece in mapped if piece is not None]
            counts.append(len(whole) if len(whole) == len(mapped) else -1)
            if counts[-1] > 0:
                parts += whole
        data = iter(self.memory.readv(parts)) if parts else iter(())
        found: list[bytes | None] = []
        for count in counts:
            pieces = [next(data) for _ in range(max(count, 0))]
            solid = [piece for piece in pieces if piece is not None]
            found.append(b"".join(solid) if count >= 0 and len(solid) == count else None)
        return found

    def _resolve(self, root: int, pages: set[int], known: dict[int, int]) -> None:
        if len(known) + len(pages) > CACHE_LIMIT:
            known.clear()
        known.update(translate_pages(self.memory, root, pages, self.levels))


def _pieces(va: int, size: int, known: dict[int, int]) -> Iterator[tuple[int, int] | None]:
    """The guest-physical spans that make up a virtual one, None for each page that is not mapped."""
    end = va + size
    while va < end:
        gpa = known.get(va & -PAGE)
        step = min(end - va, PAGE - va % PAGE)
        yield None if gpa is None else (gpa + va % PAGE, step)
        va += step
