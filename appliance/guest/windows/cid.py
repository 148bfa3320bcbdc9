"""Processes by other ways than their list: where one is that the list does not lead to, it is hidden.

``PspCidTable`` is the table that gives every process and thread its id; each process owns a handle table, and all of
these form a ring; the processes of a session form another one. To hide in all of them a process must give up what the
kernel itself needs to serve it. Candidates only: `Processes.find` checks each.
Sources: _HANDLE_TABLE (TableCode: its lowest 2 bits count the levels above the entries), _HANDLE_TABLE_ENTRY,
_MM_SESSION_SPACE of ntkrnlmp.pdb; a handle's value is 4 times its index, and the first entry of each page serves
auditing; since Windows 8 an entry packs the pointer (ObjectPointerBits, sign-extended and aligned), before it holds it.
"""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.processes import Processes, ProcessList
from appliance.guest.windows.space import PAGE
from appliance.model import Gap

MAX_TABLES: Final = 4096  # pages of entries: 256 (x86: 512) ids each
MAX_RING: Final = 65_536
MAX_HIDDEN: Final = 64  # each costs a walk of the list
HANDLE_STEP: Final = 4


class Sighting(NamedTuple):
    """A process seen off the list, and by which views."""

    process: RawProcess
    views: tuple[str, ...]  # "cid", "handles", "session"


class OtherViews:
    """Looks for processes of one guest beside their list."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        self._kernel, self._processes = kernel, processes
        types, path = kernel.types, "_HANDLE_TABLE_ENTRY.ObjectPointerBits"
        self._bits = types.field(path) if types.has(path) else None
        known = types.has("_HANDLE_TABLE_ENTRY") and types.has("_HANDLE_TABLE.TableCode")
        self._entry_size = types.size("_HANDLE_TABLE_ENTRY") if known else 0

    def find_hidden(self, listing: ProcessList) -> tuple[list[Sighting], list[Gap]]:
        """Living processes that the list does not lead to, although other views know them.

        One that ended while it was looked at is none; one that has just begun may not be on the list yet.
        """
        known = {raw.va for raw in listing.processes}
        gaps: list[Gap] = []
        views: dict[int, list[str]] = {}
        for name, walk in (("cid", self._by_id), ("handles", self._by_handle_tables), ("session", self._by_session)):
            try:
                found = walk(listing, gaps)
            except UnreadableMemory as error:
                gaps.append(Gap(f"processes by {name}", error.address, error.why))
                continue
            for va in found - known:
                views.setdefault(va, []).append(name)
        hidden: list[Sighting] = []
        looked = 0
        for va, names in views.items():
            raw = self._processes.find(va)
            if raw is None or raw.exited or self._processes.is_listed(raw):
                continue
            looked += 1
            if looked > MAX_HIDDEN:
                gaps.append(Gap("hidden processes", va, f"more than {MAX_HIDDEN} are on no list"))
                break
            if self._processes.is_young(raw):
                continue
            again = self._processes.find(va)
            if again is not None and again.key == raw.key and not again.exited:
                hidden.append(Sighting(again, tuple(names)))
        return hidden, gaps

    # -- PspCidTable --

    def _by_id(self, _: ProcessList, gaps: list[Gap]) -> set[int]:
        """Objects whose entry's id is the pid that they tell themselves."""
        where = self._kernel.find("PspCidTable")
        if where is None or not self._entry_size:
            return set()
        table = self._kernel.space.pointer(where)
        if not self._kernel.is_kernel(table):
            gaps.append(Gap("processes by cid", where, "PspCidTable names no table"))
            return set()
        code = self._kernel.space.pointer(table + self._kernel.types.offset("_HANDLE_TABLE.TableCode"))
        found = set()
        leaves = self._read_leaves(code, gaps)
        for number, page in enumerate(leaves):  # one page after the other: a hostile table names a million objects
            first = number * (PAGE // self._entry_size)
            entries = enumerate(self._parse_entries(page)) if page is not None else ()
            objects = {va: (first + index) * HANDLE_STEP for index, va in entries if va and self._kernel.is_kernel(va)}
            raws = self._kernel.space.readv([self._processes.span(va) for va in objects])
            for (va, pid), raw in zip(objects.items(), raws, strict=True):
                if raw is not None:
                    process = self._processes.parse(va, raw)
                    if process.pid == pid and self._processes.is_sound(process):
                        found.add(va)
        if lost := leaves.count(None):
            gaps.append(Gap("processes by cid", code, f"{lost} of {len(leaves)} pages of the table cannot be read"))
        return found

    def _read_leaves(self, code: int, gaps: list[Gap]) -> list[bytes | None]:
        """The pages of entries, in order."""
        size, level = self._kernel.pointer_size, code & 3
        pages = [code & ~3]
        if level == 3 or not self._kernel.is_kernel(pages[0]):
            gaps.append(Gap("processes by cid", code, "the table of ids is none"))
            return []
        for _ in range(level):
            raws = self._kernel.space.readv([(va, PAGE) for va in pages])
            pages = []
            for raw in raws:
                pages += array("Q" if size == 8 else "I", raw) if raw is not None else []
            while pages and not pages[-1]:
                pages.pop()
            if len(pages) > MAX_TABLES:
                gaps.append(Gap("processes by cid", code, f"more than {MAX_TABLES} pages of the table"))
                del pages[MAX_TABLES:]
        return self._kernel.space.readv([(va, PAGE) for va in pages])

    def _parse_entries(self, raw: bytes) -> list[int]:
        size, width = self._kernel.pointer_size, self._entry_size
        values = array("Q" if size == 8 else "I", raw)[:: max(1, width // size)]
        if self._bits is None:
            return [value & ~7 for value in values]
        # The pointer's bits are its highest ones (of 48 where pointers have 64), its lowest are zero.
        at, length = self._bits.bit_position, self._bits.bit_length
        top = 48 if size == 8 else 32
        mask, sign = (1 << length) - 1, (1 << 64) - (1 << 48) if size == 8 else 0
        return [(bits << top - length) | sign if (bits := value >> at & mask) else 0 for value in values]

    # -- rings --

    def _by_handle_tables(self, _: ProcessList, __: list[Gap]) -> set[int]:
        types, head = self._kernel.types, self._kernel.find("HandleTableListHead")
        if head is None or not all(types.has(f"_HANDLE_TABLE.{name}") for name in ("QuotaProcess", "HandleTableList")):
            return set()
        links = types.offset("_HANDLE_TABLE.HandleTableList")
        owner = types.offset("_HANDLE_TABLE.QuotaProcess")
        tables = [node - links for node in self._ring(head)]
        size = self._kernel.pointer_size
        raws = self._kernel.space.readv([(va + owner, size) for va in tables])
        return {va for raw in raws if raw is not None and (va := int.from_bytes(raw, "little"))}

    def _by_session(self, listing: ProcessList, _: list[Gap]) -> set[int]:
        """Each session's ring, entered where a listed process stands in it; its head is no process and fails later."""
        types = self._kernel.types
        if not types.has("_EPROCESS.SessionProcessLinks"):
            return set()
        links = types.offset("_EPROCESS.SessionProcessLinks")
        found: set[int] = set()
        for raw in listing.processes:
            if raw.session and raw.va not in found:
                found.add(raw.va)
                found.update(node - links for node in self._ring(raw.va + links))
        return found

    def _ring(self, head: int) -> list[int]:
        """The links of a ring, as far as each leads to one that points back."""
        space, size = self._kernel.space, self._kernel.pointer_size
        found: list[int] = []
        seen = {head}
        previous, node = head, space.pointer(head)
        while node not in seen and len(found) < MAX_RING and self._kernel.is_kernel(node):
            try:
                raw = space.read(node, 2 * size)
            except UnreadableMemory:
                break
            if int.from_bytes(raw[size:], "little") != previous:
                break
            seen.add(node)
            found.append(node)
            previous, node = node, int.from_bytes(raw[:size], "little")
        return found
