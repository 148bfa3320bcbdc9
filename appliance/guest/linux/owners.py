"""Who holds a file: from ``struct file`` to processes, confirmed against the living guest.

The index of the last look is only a hint. A holder counts when, read again in one batch, the descriptor slot still
holds the file, the table is still the task's, and the task is still the same process (thread-group id and start time);
a recycled task, table or file fails one of these. ``file->f_count`` says how many references exist: as long as there
are no more than confirmed slots, nobody else holds the file; if there are, all tables are read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.descriptors import Descriptors, Holder, HoldingTask
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.processes import Processes
from appliance.guest.linux.tasks import Task, TaskList, Tasks
from appliance.model import Gap, GuestProcess, Owner

MAX_CONFIRMED = 1024  # holders confirmed for one file
MAX_USERS = 256  # processes that share one descriptor table (CLONE_FILES)
MAX_SETTLED = 4096
TRIES = 3
MAX_OWNERS = 65_536

Span = tuple[int, int]


class Held(NamedTuple):
    """Who holds a file, confirmed, and the guards as they were read in the same batch."""

    owners: tuple[Owner, ...]
    guards: Sequence[bytes | None]


class _Confirmed(NamedTuple):
    users: list[tuple[Holder, Task]]  # descriptor and the leader as read just now
    references: int  # file->f_count, 0 when unknown
    complete: bool  # no process was added since the list was walked
    guards: Sequence[bytes | None]


class Owners:
    """The processes of one guest and what they hold."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self.task_list = TaskList(kernel, facts)
        self.descriptors = Descriptors(kernel, facts)
        self.processes = Processes(kernel, facts)
        self._init = facts.needed("init_task")
        self._file = facts.record("file")
        self._bias = 0 if facts.find("file.f_ref") is None else 1  # file_ref counts from 0
        self.tasks = Tasks([], {}, [], 0)
        self.parents: dict[int, int] = {}  # task VA -> tgid
        self._owner_cache: dict[tuple[int, int], Owner] = {}
        self._settled: dict[int, tuple[int, frozenset[tuple[int, int]]]] = {}

    def look(self) -> list[Gap]:
        """Walk all tasks and their descriptors afresh. Raises GuestError when there is nothing to walk."""
        self.tasks = self.task_list.walk()
        if not self.processes.users:
            self.processes.read_users(self.tasks.leaders)
        self._note_tasks()
        return self.tasks.gaps + self.descriptors.look(self.tasks)

    def _walk_tasks(self) -> None:
        """Walk all tasks and learn which tables they use; the index stays the hint it is."""
        self.tasks = self.task_list.walk()
        self._note_tasks()
        self.descriptors.note(self.tasks)

    def _extend(self) -> bool:
        """Take in the processes started since the last look, if that is all that happened."""
        try:
            if self.task_list.is_tail(self.tasks, *self._kernel.readv(self.task_list.tail_spans(self.tasks))):
                return True
            tasks = self.task_list.newcomers(self.tasks)
        except UnreadableMemory:
            return False
        if tasks is None:
            return False
        self.tasks = tasks
        self._note_tasks()
        self.descriptors.note(tasks)
        return True

    def _note_tasks(self) -> None:
        self.parents = {self._init: 0}
        for leader in self.tasks.leaders:
            self.parents[leader.va] = leader.tgid
        for group in self.tasks.threads.values():
            self.parents.update((thread.va, thread.tgid) for thread in group)
        self._settled.clear()

    def find_quickly(self, file: int, socket: int) -> Owner | None:
        """The one holder of a file, where the index has one and a few reads confirm that there is no other.

        The chain is read from the process towards the socket: task, table and slot, file, ``private_data``. None says
        nothing; :meth:`find` then looks properly. Raises UnreadableMemory.
        """
        known = self.descriptors.index.get(file)
        if known is not None:
            owner = self._confirm_quickly(known, file, socket)
            if owner is not None:
                return owner
        recent = self.descriptors.find_recent(file)
        if recent is None:
            return None
        self.descriptors.index[file] = [recent]
        return self._confirm_quickly([recent], file, socket)

    def _confirm_quickly(self, known: list[Holder], file: int, socket: int) -> Owner | None:
        users = self.descriptors.users.get(known[0].table.files)
        if len(known) != 1 or users is None or len(users) != 1 or users[0].via is not users[0].leader:
            return None
        user, (table, number) = users[0], known[0]
        leader = self.task_list.parse(user.leader.va, self._kernel.read(*self.task_list.span(user.leader.va)))
        if not _same(user, leader, leader, table.files) or not self.descriptors.holds(known[0], file):
            return None
        references, private = self._file.parse(self._kernel.read(*self._file.span(file)))
        if private != socket or references + self._bias != 1:
            return None
        self.descriptors.remember(table.files)
        process = self.processes.describe_quickly(leader)
        if process is None:
            (process,) = self.processes.describe((self.effective(leader),), self.parents)
        return self.owner_of(process, number)

    def find(self, file: int, guards: Sequence[Span]) -> Held | None:
        """Everybody who holds ``file`` now; None when nobody does, after a full look. ``guards`` are read alongside."""
        known = self.descriptors.index.get(file, ())
        if len(known) > 1:
            confirmed = self._confirm(file, known, guards)
            if confirmed.users and self._is_all(file, confirmed):
                return self._held(confirmed)
        if not self.tasks.leaders:
            self.look()
        elif not self._extend():
            self._walk_tasks()
        confirmed = self._confirm(file, self.descriptors.search(file), guards)
        for _ in range(TRIES - 1):
            if confirmed.users and (confirmed.complete or self._is_all(file, confirmed)):
                break
            self._walk_tasks()
            confirmed = self._confirm(file, self.descriptors.search(file), guards)
            if confirmed.complete:
                break
        holders = list(dict.fromkeys(holder for holder, _ in confirmed.users))
        if not holders:
            self.descriptors.index.pop(file, None)
            return None
        self.descriptors.index[file] = holders
        if len(self._settled) >= MAX_SETTLED:
            self._settled.clear()
        self._settled[file] = confirmed.references, _slots(confirmed)
        self.descriptors.remember(holders[0].table.files)
        return self._held(confirmed)

    def _is_all(self, file: int, confirmed: _Confirmed) -> bool:
        """Whether there can be no further holder: no more references than slots, or what a full search has settled."""
        slots = _slots(confirmed)
        if 0 < confirmed.references <= len(slots):
            return True
        return confirmed.complete and self._settled.get(file) == (confirmed.references, slots)

    def _confirm(self, file: int, holders: Sequence[Holder], guards: Sequence[Span]) -> _Confirmed:
        holders = holders[:MAX_CONFIRMED]
        users = self.descriptors.users
        parse, span = self.task_list.parse, self.task_list.span
        spans: list[Span] = []
        for holder in holders:
            for leader, via in users.get(holder.table.files, [])[:MAX_USERS]:
                spans.append(span(leader.va))
                if via is not leader:
                    spans.append(span(via.va))
            spans.extend(self.descriptors.checks(holder))
        spans.append(self._file.span(file))
        spans.extend(self.task_list.tail_spans(self.tasks))
        spans.extend(guards)
        raws = self._kernel.readv(spans)
        values = iter(raws)
        found: list[tuple[Holder, Task]] = []
        for holder in holders:
            table = holder.table
            alive = []
            for user in users.get(table.files, [])[:MAX_USERS]:
                first = next(values)
                second = first if user.via is user.leader else next(values)
                if first is not None and second is not None:
                    leader = parse(user.leader.va, first)
                    if _same(user, leader, parse(user.via.va, second), table.files):
                        alive.append(leader)
            links = _number(next(values)), _number(next(values)), _number(next(values))
            if links == (table.fdt, table.fd, file):
                found += [(holder, leader) for leader in alive]
        value = next(values)
        references = 0 if value is None else (self._file.parse(value)[0] + self._bias) & 0xFFFF_FFFF
        complete = self.task_list.is_tail(self.tasks, next(values), next(values))
        return _Confirmed(found, references, complete, raws[len(raws) - len(guards) :] if guards else ())

    def _held(self, confirmed: _Confirmed) -> Held:
        if len(confirmed.users) == 1:
            holder, leader = confirmed.users[0]
            process = self.processes.describe_quickly(leader)
            if process is None:
                (process,) = self.processes.describe((self.effective(leader),), self.parents)
            return Held((Owner(process, (holder.number,)),), confirmed.guards)
        return Held(self._grouped(confirmed.users), confirmed.guards)

    def _grouped(self, users: Iterable[tuple[Holder, Task]]) -> tuple[Owner, ...]:
        """One owner per process, oldest first, with all its descriptors."""
        leaders: dict[int, Task] = {}
        numbers: dict[int, set[int]] = {}
        for holder, leader in users:
            leaders[leader.va] = leader
            numbers.setdefault(leader.va, set()).add(holder.number)
        tasks = sorted(leaders.values(), key=lambda task: (task.start_ns, task.tgid))
        described = self.processes.describe([self.effective(task) for task in tasks], self.parents)
        return tuple(
            Owner(process, tuple(sorted(numbers[task.va]))) for task, process in zip(tasks, described, strict=True)
        )

    def effective(self, leader: Task) -> Task:
        """A leader that has exited while other threads live on: what it no longer has, they still do."""
        if not leader.mm and not leader.kernel_thread:
            for thread in self.tasks.threads.get(leader.va, ()):
                if thread.mm:
                    return leader._replace(mm=thread.mm, nsproxy=thread.nsproxy or leader.nsproxy, fs=thread.fs)
        return leader

    # -- all at once --

    def revalidate(self) -> set[int]:
        """Read every task and table pointer again; returns the tables whose owner is no longer certain."""
        users = self.descriptors.users
        spans: list[Span] = []
        span = self.task_list.span
        tables = list(self.descriptors.tables.values())
        for table in tables:
            spans.append(self.descriptors.checks(Holder(table, 0))[0])
            for leader, via in users.get(table.files, ()):
                spans.append(span(leader.va))
                if via is not leader:
                    spans.append(span(via.va))
        values = iter(self._kernel.readv(spans))
        doubtful: set[int] = set()
        for table in tables:
            if _number(next(values)) != table.fdt:
                doubtful.add(table.files)
            for user in users.get(table.files, ()):
                first = next(values)
                second = first if user.via is user.leader else next(values)
                if first is None or second is None:
                    doubtful.add(table.files)
                    continue
                leader = self.task_list.parse(user.leader.va, first)
                if not _same(user, leader, self.task_list.parse(user.via.va, second), table.files):
                    doubtful.add(table.files)
        return doubtful

    def bulk(self, files: Iterable[int], doubtful: set[int]) -> dict[int, tuple[Owner, ...]]:
        """Owners of many files from the index of the last look."""
        index = self.descriptors.index
        users = {
            files: [user.leader for user in self.descriptors.users.get(files, ())]
            for files in self.descriptors.tables
            if files not in doubtful
        }
        process = self._describe_all(users)
        owners: dict[int, tuple[Owner, ...]] = {}
        for file in files:
            holders = index.get(file, ())
            numbers: dict[int, set[int]] = {}
            for holder in holders:
                for leader in users.get(holder.table.files, ()):
                    if len(holders) == 1 and len(users[holder.table.files]) == 1:
                        owners[file] = (self.owner_of(process[leader.va], holder.number),)
                    else:
                        numbers.setdefault(leader.va, set()).add(holder.number)
            if numbers:
                held = [Owner(process[va], tuple(sorted(fds))) for va, fds in numbers.items()]
                owners[file] = tuple(sorted(held, key=lambda owner: (owner.process.key.started_ns, owner.process.pid)))
        return owners

    def _describe_all(self, users: dict[int, list[Task]]) -> dict[int, GuestProcess]:
        leaders = {leader.va: leader for group in users.values() for leader in group}
        described = self.processes.describe([self.effective(task) for task in leaders.values()], self.parents)
        return dict(zip(leaders, described, strict=True))

    def owner_of(self, process: GuestProcess, number: int) -> Owner:
        """The same object for the same process and descriptor: a walk makes a thousand of them."""
        key = process.task_va, number
        known = self._owner_cache.get(key)
        if known is None or known.process is not process:
            if len(self._owner_cache) >= MAX_OWNERS:
                self._owner_cache.clear()
            known = self._owner_cache[key] = Owner(process, (number,))
        return known


def _same(user: HoldingTask, leader: Task, via: Task, files: int) -> bool:
    known = user.leader
    return (
        leader.tgid == known.tgid
        and leader.start_ns == known.start_ns
        and via.files == files
        and via.tgid == known.tgid
        and via.start_ns == user.via.start_ns
    )


def _slots(confirmed: _Confirmed) -> frozenset[tuple[int, int]]:
    return frozenset((holder.table.files, holder.number) for holder, _ in confirmed.users)


def _number(raw: bytes | None) -> int:
    return 0 if raw is None else int.from_bytes(raw, "little")
