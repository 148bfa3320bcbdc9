"""The page cache's own copy of a page of a file, to compare a process's copy with.

A file's pages are found in ``address_space.i_pages``, an xarray (include/linux/xarray.h, lib/xarray.c: xa_load): nodes
of 64 slots, 6 bits of index a level. A slot holds a folio; its siblings hold the number of that slot.
"""

from __future__ import annotations

from typing import Final

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_facts import PAGE, InjectionFacts
from appliance.guest.linux.record import is_object

MAX_LEVELS: Final = 12  # of an xarray: 64 bits of index, 6 bits a level
NODE_ABOVE: Final = 4096  # xa_is_node: smaller internal entries are siblings, retries and zeros
XA_SLOTS: Final = 64
GPA_MASK: Final = (1 << 52) - 1


class PageCache:
    """Finds pages of files of one guest."""

    def __init__(self, kernel: Kernel, facts: InjectionFacts) -> None:
        self._kernel, self._facts = kernel, facts
        self._page = facts.record("page")

    def of_file(self, mapping: int, index: int) -> bytes | None:
        """The page cache's copy of a page of a file; None where it is not resident or the cache is in motion."""
        try:
            page = self._find_cached(mapping, index)
            if page is None:
                return None
            gpa = (page - self._kernel.vmemmap_base) // self._facts.page_size * PAGE
            return self._kernel.memory.read(gpa & GPA_MASK, PAGE)
        except UnreadableMemory:
            return None

    def _find_cached(self, mapping: int, index: int) -> int | None:
        """The ``struct page`` of a file's page: xa_load, then folio_file_page."""
        head = self._cached_folio(mapping, index)
        if head is None or not is_object(head):
            return None
        _, owner, first = self._page.parse(self._kernel.read(*self._page.span(head)))
        page: int = head + (index - first) * self._facts.page_size
        if owner != mapping or index < first or (page - self._kernel.vmemmap_base) % self._facts.page_size:
            return None
        if page != head:
            compound = self._page.parse(self._kernel.read(*self._page.span(page)))[0]
            if compound != head + 1:
                return None
        return page

    def _cached_folio(self, mapping: int, index: int) -> int | None:
        root, shift_at, slots_at = (self._facts.find(name) for name in ("xa_head", "xa_shift", "xa_slots"))
        if root is None or shift_at is None or slots_at is None or not is_object(mapping):
            return None
        entry = self._kernel.u64(mapping + root.offset)
        above = 1 << 8
        for _ in range(MAX_LEVELS):
            if not _is_node(entry):
                return None if entry & 3 or not entry or (above == 1 << 8 and index) else entry
            node = entry - 2
            shift = self._kernel.u8(node + shift_at.offset)
            if shift >= above or shift >= 64 or (above == 1 << 8 and index >> shift >= XA_SLOTS):
                return None
            slots = node + slots_at.offset
            entry = self._kernel.u64(slots + 8 * (index >> shift & XA_SLOTS - 1))
            if entry & 3 == 2 and entry >> 2 < XA_SLOTS:  # xa_is_sibling: the slot that holds the folio
                entry = self._kernel.u64(slots + 8 * (entry >> 2))
            above = shift
        return None


def _is_node(entry: int) -> bool:
    return entry & 3 == 2 and entry > NODE_ABOVE
