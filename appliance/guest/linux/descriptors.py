"""Open files: from a ``struct file`` back to every process that holds it, and by which descriptors.

``task_struct.files -> files_struct.fdt -> fdtable.fd[]`` (include/linux/fdtable.h). A small table is embedded in its
``files_struct`` and comes with one read; a larger one takes two more. Threads share one ``files_struct``, so do
processes made with CLONE_FILES: tables are read once and belong to every task that points to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct, pack
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.record import is_object
from appliance.guest.linux.tasks import Task, Tasks
from appliance.model import Gap

MAX_FDS = 1 << 20  # fs/file.c: sysctl_nr_open, the default ceiling of RLIMIT_NOFILE
MAX_TABLE_BYTES = 8 << 20  # of all large tables in one look: a million descriptors
MAX_HOLDERS = 4096  # descriptors of one file
MAX_RECENT = 8  # processes whose tables are tried first: who connected lately is likely to connect again
MAX_RECENT_BYTES = 64 << 10  # of one such table


class Table(NamedTuple):
    """One descriptor table, as read at one instant."""

    files: int  # struct files_struct
    fdt: int
    fd: int  # address of the array of struct file *
    raw: bytes  # the array


class Holder(NamedTuple):
    """One descriptor: ``table.fd[number]`` held a certain ``struct file``."""

    table: Table
    number: int


class HoldingTask(NamedTuple):
    """A process that uses a descriptor table; ``via`` is the thread through which it does."""

    leader: Task
    via: Task


@dataclass(slots=True)
class _Seen:
    """A ``files_struct``: the bytes of ``fdt`` it should begin with, and what the last search read of it.

    ``raw`` is only kept of one whose table is embedded, so that it stands for all its descriptors.
    """

    files: int
    head: bytes = b""
    raw: bytes = b""
    slots: frozenset[int] = frozenset()


# What a search reads: all tables, which of them are large, the spans of them and then of the large arrays.
Plan = tuple[list[_Seen], list[int], list[tuple[int, int]]]


class Descriptors:
    """All descriptor tables of a guest as of the last look, with the reverse index from file to descriptors."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._record = facts.record("files")
        self._fdtable = facts.record("fdtable")
        self._fdt = facts.offset("files.fdt")
        self._fdtab = facts.offset("files.fdtab")
        self._fd = facts.offset("fdtable.fd")
        self._array = facts.offset("files.fd_array")
        self.users: dict[int, list[HoldingTask]] = {}  # files_struct -> who uses it
        self.tables: dict[int, Table] = {}
        self.index: dict[int, list[Holder]] = {}
        self._plan: Plan | None = None
        self._seen: dict[int, _Seen] = {}
        self._recent: dict[int, None] = {}  # files_structs, the latest last

    def look(self, tasks: Tasks) -> list[Gap]:
        """Read the tables of all tasks and rebuild the index."""
        self.users, self._plan = _users(tasks), None
        gaps = self._refresh()
        self.index = _index(self.tables.values())
        return gaps

    def note(self, tasks: Tasks) -> None:
        """Learn who uses which table, without reading any."""
        self.users, self._plan = _users(tasks), None

    def remember(self, files: int) -> None:
        """Note that this table's process has just been found to hold a socket."""
        self._recent.pop(files, None)
        self._recent[files] = None
        if len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]

    def find_recent(self, file: int) -> Holder | None:
        """Look for a file in the tables of the processes found lately, one small read each."""
        needle = pack("<Q", file)
        for files in reversed(self._recent):
            try:
                table = self._read_one(files, MAX_RECENT_BYTES)
            except UnreadableMemory:
                continue
            for holder in _scan(table, needle):
                return holder
        return None

    def _read_one(self, files: int, limit: int) -> Table | None:
        fdt, _, fd, array = self._record.parse(self._kernel.read(*self._span(files)))
        if fdt == files + self._fdtab and fd == files + self._array:
            return Table(files, fdt, fd, array)
        if not is_object(fdt):
            return None
        count, fd = self._fdtable.parse(self._kernel.read(*self._fdtable.span(fdt)))
        if not is_object(fd) or not 0 < count * 8 <= limit:
            return None
        return Table(files, fdt, fd, self._kernel.read(fd, count * 8))

    def holds(self, holder: Holder, file: int) -> bool:
        """Whether the slot holds the file now, and the table is still the one of its ``files_struct``."""
        table, number = holder
        fdt, _, fd, array = self._record.parse(self._kernel.read(*self._span(table.files)))
        if fdt != table.fdt:
            return False
        if not self.is_embedded(table):
            slot = self._kernel.u64(table.fd + 8 * number)
            return bool(
                self._fdtable.parse(self._kernel.read(*self._fdtable.span(fdt)))[1] == table.fd and slot == file
            )
        return bool(fd == table.fd and int.from_bytes(array[8 * number : 8 * number + 8], "little") == file)

    def _refresh(self) -> list[Gap]:
        wanted = [files for files in self.users if is_object(files)]
        gaps: list[Gap] = []
        tables: dict[int, Table] = {}
        large: list[tuple[int, int]] = []
        for files, raw in zip(wanted, self._readv(self._span(files) for files in wanted), strict=True):
            if raw is None:
                gaps.append(Gap("descriptor table", files, "unreadable"))
                continue
            fdt, _, fd, array = self._record.parse(raw)
            if fdt == files + self._fdtab and fd == files + self._array:
                tables[files] = Table(files, fdt, fd, array)
            elif is_object(fdt):
                large.append((files, fdt))
            else:
                gaps.append(Gap("descriptor table", files, "implausible"))
        self._read_large(large, tables, gaps)
        self.tables, self._plan = tables, None
        return gaps

    def _read_large(self, large: list[tuple[int, int]], tables: dict[int, Table], gaps: list[Gap]) -> None:
        heads = self._readv(self._fdtable.span(fdt) for _, fdt in large)
        arrays: list[tuple[int, int, int, int]] = []
        budget = MAX_TABLE_BYTES
        for (files, fdt), head in zip(large, heads, strict=True):
            count, fd = self._fdtable.parse(head) if head is not None else (0, 0)
            size = min(count, MAX_FDS) * 8
            if not size or not is_object(fd) or size > budget:
                gaps.append(Gap("descriptor table", fdt, "too large" if size > budget else "unreadable or implausible"))
                continue
            budget -= size
            arrays.append((files, fdt, fd, size))
        for (files, fdt, fd, _), raw in zip(arrays, self._readv((a[2], a[3]) for a in arrays), strict=True):
            if raw is None:
                gaps.append(Gap("descriptor table", fd, "unreadable"))
            else:
                tables[files] = Table(files, fdt, fd, raw)

    def search(self, file: int) -> list[Holder]:
        """Find a file in the tables of all known tasks, read anew: one batch, and no look at tables without it."""
        if self._plan is None:
            self._plan = self._make_plan()
        plan, large, spans = self._plan
        raws = self._kernel.readv(spans)
        arrays = dict(zip(large, raws[len(plan) :], strict=True)) if large else {}
        budget = MAX_TABLE_BYTES
        needle = pack("<Q", file)
        holders: list[Holder] = []
        for seen, raw in zip(plan, raws, strict=False):
            if raw is None:
                continue
            if seen.raw == raw:  # since the search before: a set is asked twenty times faster than bytes
                if file in seen.slots:
                    holders += _scan(self._table(seen.files, raw), needle)
                continue
            array = arrays.get(seen.files, b"")
            if not seen.head or array is None or not raw.startswith(seen.head):
                table = self._reread(seen.files, budget)
                budget -= 0 if table is None or self.is_embedded(table) else len(table.raw)
                holders += _scan(table, needle)
            elif array:
                if needle in array:
                    holders += _scan(self._reread(seen.files, budget), needle)
            else:
                last = self._table(seen.files, raw)
                holders += _scan(last, needle)
                if last is not None:
                    seen.raw, seen.slots = raw, frozenset(Struct(f"<{len(last.raw) // 8}Q").unpack(last.raw))
        return holders[:MAX_HOLDERS]

    def _make_plan(self) -> Plan:
        wanted = [files for files in self.users if is_object(files)]
        known = [self.tables.get(files) for files in wanted]
        seen = [self._seen.get(files) or _Seen(files) for files in wanted]
        for each, table in zip(seen, known, strict=True):
            each.head = b"" if table is None else pack("<Q", table.fdt)
        self._seen = dict(zip(wanted, seen, strict=True))
        large = {table.files: (table.fd, len(table.raw)) for table in known if table and not self.is_embedded(table)}
        return seen, list(large), [*map(self._span, wanted), *large.values()]

    def _table(self, files: int, raw: bytes) -> Table | None:
        fdt, _, fd, array = self._record.parse(raw)
        return Table(files, fdt, fd, array) if fd == files + self._array else None

    def _reread(self, files: int, budget: int) -> Table | None:
        try:
            table = self._read_one(files, min(budget, MAX_FDS * 8))
        except UnreadableMemory:
            return None
        if table is not None:
            self.tables[files], self._plan = table, None
        return table

    def is_embedded(self, table: Table) -> bool:
        """Whether the table lies within its ``files_struct``, as it does for up to 64 descriptors."""
        return table.fd == table.files + self._array and table.fdt == table.files + self._fdtab

    def checks(self, holder: Holder) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """What to read again to confirm a holder: ``files->fdt``, ``fdt->fd`` and the slot itself."""
        table = holder.table
        direct = self._kernel.direct
        at = direct(table.files + self._fdt), direct(table.fdt + self._fd), direct(table.fd + 8 * holder.number)
        return (at[0], 8), (at[1], 8), (at[2], 8)

    def _span(self, files: int) -> tuple[int, int]:
        return self._record.span(self._kernel.direct(files))

    def _readv(self, spans: Iterable[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.readv(list(spans))


def _scan(table: Table | None, needle: bytes) -> list[Holder]:
    """The descriptors of a table that hold a file, by its bytes."""
    holders: list[Holder] = []
    at = table.raw.find(needle) if table is not None else -1
    while table is not None and at >= 0 and len(holders) < MAX_HOLDERS:
        if not at & 7:
            holders.append(Holder(table, at >> 3))
        at = table.raw.find(needle, at + 1)
    return holders


def _users(tasks: Tasks) -> dict[int, list[HoldingTask]]:
    """Who uses which table. A leader that has exited holds nothing, its living threads still do."""
    users: dict[int, list[HoldingTask]] = {}
    for leader in tasks.leaders:
        own = {leader.files}
        if leader.files:
            users.setdefault(leader.files, []).append(HoldingTask(leader, leader))
        for thread in tasks.threads.get(leader.va, ()):
            if thread.files and thread.files not in own:
                own.add(thread.files)
                users.setdefault(thread.files, []).append(HoldingTask(leader, thread))
    return users


def _index(tables: Iterable[Table]) -> dict[int, list[Holder]]:
    index: dict[int, list[Holder]] = {}
    for table in tables:
        slots = Struct(f"<{len(table.raw) // 8}Q").unpack(table.raw)
        for number, file in enumerate(slots):
            if file:
                holders = index.get(file)
                if holders is None:
                    index[file] = [Holder(table, number)]
                elif len(holders) < MAX_HOLDERS:
                    holders.append(Holder(table, number))
    return index
