"""The pages behind a mapping: which are resident, whose they are, and what they hold.

A page of a private file mapping is the file's own page until somebody writes to it; then the process gets a copy, and
the copy is anonymous: ``folio->mapping`` has bit 0 set (PAGE_MAPPING_ANON, include/linux/page-flags.h). Tail pages of a
folio point to their head (``compound_head``, bit 0 set). Physical pages are read as such, so nothing here depends on
what the process itself may read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from appliance.errors import GuestError
from appliance.guest.budget import Budget
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_facts import PAGE, InjectionFacts
from appliance.guest.linux.record import is_object

MAX_SPAN: Final = 1 << 30  # bytes of one mapping that are looked at; no program's code is larger
BLOCK: Final = 2 << 20  # arch/x86/mm/init_64.c: vmemmap_populate_hugepages
MAX_BLOCKS: Final = 8192  # of these: the struct pages of 1 TiB
BATCH: Final = 64  # pages hashed between two looks at the clock
STEP: Final = 32 << 20  # bytes of address space between two looks at the clock
MAPPING_ANON: Final = 1  # PAGE_MAPPING_ANON
MAPPING_FLAGS: Final = 3
FIRST_BYTES: Final = 16  # shown
HEAD_BYTES: Final = 64  # kept


class Page(NamedTuple):
    """A resident page or, of a huge one, the part inside the mapping."""

    va: int
    gpa: int
    size: int


class Digest(NamedTuple):
    """What is resident of a range. ``sha256`` is over the resident bytes in address order."""

    resident: int  # pages of 4 KiB
    total: int
    hashed: int
    sha256: str | None
    head: bytes  # the beginning of the first resident page
    first_va: int
    blank: bool  # all bytes read are 0

    @property
    def first(self) -> bytes:
        """The first bytes, as many as people are shown."""
        return self.head[:FIRST_BYTES]

    def __str__(self) -> str:
        text = f"{self.resident} of {self.total} pages resident"
        if self.hashed < self.resident:
            text += f", {self.hashed} of them hashed"
        return text + (f", bytes at {self.first_va:#x}: {self.first.hex()}" if self.first else "")


class Pages:
    """Looks at pages of one guest."""

    def __init__(self, kernel: Kernel, facts: InjectionFacts) -> None:
        self._kernel, self._facts = kernel, facts
        self._page = facts.record("page")

    def resident(self, pgd: int, start: int, end: int, budget: Budget) -> list[Page]:
        """Present pages of ``[start, end)`` in address order; what the budget does not allow is noted there."""
        found: list[Page] = []
        if end - start > MAX_SPAN:
            budget.cut_off(f"mapping {start:#x}-{end:#x}: only its first {MAX_SPAN >> 20} MiB")
            end = start + MAX_SPAN
        for low in range(start, end, STEP):
            if budget.over:
                budget.cut_off(f"mapping {start:#x}-{end:#x}: from {low:#x} on")
                return found
            try:
                found += self._walk(pgd, low, min(low + STEP, end), budget)
            except GuestError as error:
                budget.cut_off(f"mapping {start:#x}-{end:#x}: {error}")
                return found
        return found

    def _walk(self, pgd: int, low: int, high: int, budget: Budget) -> list[Page]:
        found = []
        entries = 0
        for pte in self._kernel.walk_user_pages(pgd, low, high):
            entries += 1
            if not pte.present:
                continue
            va, gpa, size = pte.va, pte.gpa, pte.size
            if size > PAGE:
                start, stop = max(va, low), min(va + size, high)
                va, gpa, size = start, gpa + start - va, stop - start
            if size > 0:
                found.append(Page(va, gpa, size))
        budget.spend(entries)
        return found

    def digest(self, pages: Sequence[Page], start: int, end: int, budget: Budget) -> Digest:
        """Read and hash the resident pages of ``[start, end)``."""
        sha, hashed, blank = hashlib.sha256(), 0, True
        head, first_va = b"", 0
        small = [Page(p.va + at, p.gpa + at, min(PAGE, p.size - at)) for p in pages for at in range(0, p.size, PAGE)]
        for chunk in range(0, len(small), BATCH):
            if budget.over:
                budget.cut_off(f"bytes of mapping {start:#x}-{end:#x}: from {small[chunk].va:#x} on")
                break
            part = small[chunk : chunk + BATCH]
            for page, raw in zip(part, self.read(part), strict=True):
                if raw is None:
                    continue
                if not head:
                    head, first_va = raw[:HEAD_BYTES], page.va
                sha.update(raw)
                hashed += 1
                blank = blank and not raw.strip(b"\0")
            budget.spend(len(part))
        digest = sha.hexdigest() if hashed else None
        return Digest(len(small), (end - start) // PAGE, hashed, digest, head, first_va, blank)

    def read(self, pages: Sequence[Page]) -> list[bytes | None]:
        """The bytes of pages."""
        return self._kernel.memory.readv([(page.gpa, page.size) for page in pages])

    def owners(self, pgd: int, pages: Sequence[Page]) -> list[int | None]:
        """``folio->mapping`` of each page; None where its ``struct page`` cannot be read."""
        base, size, parse = self._kernel.vmemmap_base, self._facts.page_size, self._page.parse
        blocks: dict[int, dict[int, int]] = {}
        found: list[int | None] = []
        tails: list[tuple[int, int]] = []
        for number, raw in enumerate(self._structs(pgd, [base + (page.gpa >> 12) * size for page in pages], blocks)):
            if raw is None:
                found.append(None)
                continue
            compound, mapping, _ = parse(raw)
            if compound & 1:
                tails.append((number, compound - 1))
            found.append(mapping)
        heads = sorted({head for _, head in tails if is_object(head)})
        raws = dict(zip(heads, self._structs(pgd, heads, blocks), strict=True))
        for number, head in tails:
            raw = raws.get(head)
            found[number] = None if raw is None else int(parse(raw)[1])
        return found

    def _structs(self, pgd: int, addresses: Sequence[int], blocks: dict[int, dict[int, int]]) -> list[bytes | None]:
        """The bytes of many a ``struct page``.

        They lie in vmemmap, which is mapped in blocks of 2 MiB: to translate the few blocks once, and the rest by
        addition, costs a tenth of walking the tables for each.
        """
        physical: list[tuple[int, int]] = []
        places: list[int] = []
        for place, va in enumerate(addresses):
            start = va + self._page.low
            block = blocks.get(start & -BLOCK)
            if block is None:
                block = blocks[start & -BLOCK] = self._block(pgd, start & -BLOCK) if len(blocks) < MAX_BLOCKS else {}
            gpa = block.get(start & -PAGE)
            if gpa is None and BLOCK in block:
                gpa = block[BLOCK] + (start & (BLOCK - PAGE))
            if gpa is not None and start % PAGE + self._page.size <= PAGE:
                physical.append((gpa + start % PAGE, self._page.size))
                places.append(place)
        found: list[bytes | None] = [None] * len(addresses)
        for place, raw in zip(places, self._kernel.memory.readv(physical), strict=True):
            found[place] = raw
        return found

    def _block(self, pgd: int, start: int) -> dict[int, int]:
        """Where a block of vmemmap is: one address under the key BLOCK, or one for each of its pages."""
        found: dict[int, int] = {}
        try:
            for pte in self._kernel.walk_user_pages(pgd, start, start + BLOCK):
                if pte.present and pte.size >= BLOCK:
                    return {BLOCK: pte.gpa + start - pte.va}
                if pte.present:
                    found[pte.va] = pte.gpa
        except GuestError:
            return {}
        return found


def spans_of(start: int, end: int) -> list[tuple[int, int]]:
    """``[start, end)`` as spans none of which crosses a page, so that a missing page hides nothing but itself."""
    edges = [start, *range(start - start % PAGE + PAGE, end, PAGE), end]
    return [(low, high - low) for low, high in pairwise(edges) if low < high]


def is_anonymous(mapping: int) -> bool:
    """Whether a page belongs to the process and to no file (folio_test_anon)."""
    return bool(mapping & MAPPING_ANON)
