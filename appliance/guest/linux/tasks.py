"""The guest's task list: thread-group leaders and their further threads.

``init_task.tasks`` is a circular list (include/linux/sched/signal.h, for_each_process); ``signal_struct.thread_head``
links the threads of a group. The first look follows the links one by one; every later one first reads all tasks known
from the look before in one batch, so that only new tasks cost a read of their own. While we walk the guest runs on: a
link whose target does not point back means that the list moved under us, and the walk starts over, three times at most.
"""

from __future__ import annotations

from typing import NamedTuple

from appliance.errors import GuestError, UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import PF_KTHREAD, Facts
from appliance.guest.linux.record import is_object
from appliance.model import Gap

MAX_TASKS = 65_536  # processes looked at; PID_MAX_LIMIT is 4 Mi (include/linux/threads.h), no guest of ours has that
MAX_THREADS = 131_072  # threads looked at, over all processes
MAX_NEWCOMERS = 64  # processes started between two looks; more are worth a full walk
TRIES = 3


class Task(NamedTuple):
    """One ``task_struct``, as read at one instant."""

    va: int
    next: int
    prev: int
    thread_next: int
    pid: int
    tgid: int
    start_ns: int
    comm: bytes
    flags: int
    mm: int
    files: int
    cred: int
    parent: int
    signal: int
    nsproxy: int
    thread_pid: int
    cgroups: int
    fs: int
    exec_id: int  # counts the programs it has run

    @property
    def kernel_thread(self) -> bool:
        """It has no program of its own (PF_KTHREAD)."""
        return bool(self.flags & PF_KTHREAD)

    @property
    def identity(self) -> tuple[object, ...]:
        """The members of the record "identity", in its order."""
        return (
            self.tgid,
            self.start_ns,
            self.files,
            self.mm,
            self.exec_id,
            self.cred,
            self.parent,
            self.nsproxy,
            self.cgroups,
            self.comm,
        )

    @property
    def description(self) -> tuple[object, ...]:
        """What points to all that describes it; unchanged, its description is too."""
        return (
            self.tgid,
            self.start_ns,
            self.comm,
            self.mm,
            self.exec_id,
            self.cred,
            self.parent,
            self.nsproxy,
            self.cgroups,
        )


class Tasks(NamedTuple):
    """One look at the task list."""

    leaders: list[Task]
    threads: dict[int, list[Task]]  # leader VA -> its further threads; absent for single-threaded processes
    gaps: list[Gap]
    tail: int  # ``init_task.tasks.prev``: unchanged as long as no process was added,
    tail_start_ns: int = 0  # if it still is the same process that is there: a task's memory is used again


class TaskList:
    """Walks the task list of one guest and remembers where its tasks were."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._record = facts.record("task")
        self._tasks = facts.offset("task.tasks")
        self._node = facts.offset("task.thread_node")
        self._head = facts.offset("signal.thread_head")
        self._init = facts.needed("init_task")
        self._tail = kernel.direct(self._init + self._tasks + 8)
        self._known: list[int] = []

    def walk(self) -> Tasks:
        """Read all tasks. Raises GuestError when not even the first one can be read."""
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            fresh = self._prefetch()
            leaders, gaps = self._walk_leaders(fresh, forgiving=last)
            if leaders is not None:
                break
        assert leaders is not None
        threads = self._walk_threads(leaders, fresh, gaps)
        self._known = [task.va for task in leaders] + [thread.va for group in threads.values() for thread in group]
        tail = leaders[-1].va + self._tasks if leaders else self._init + self._tasks
        return Tasks(leaders, threads, gaps, tail, leaders[-1].start_ns if leaders else 0)

    def newcomers(self, tasks: Tasks) -> Tasks | None:
        """The same list with the processes added at its end since; None when it is not that simple.

        Processes that ended meanwhile stay in it: whatever uses an entry confirms it anyway. Raises UnreadableMemory.
        """
        head = self._init + self._tasks
        known = {task.va: task.start_ns for task in tasks.leaders}
        fresh: list[Task] = []
        tail = node = self._kernel.u64(head + 8)
        while len(fresh) < MAX_NEWCOMERS:
            if node == head or not is_object(node - self._tasks):
                return None
            task = self.read(node - self._tasks)
            if known.get(task.va) == task.start_ns:
                gone = {task.va for task in fresh}
                leaders = [task for task in tasks.leaders if task.va not in gone] + fresh[::-1]
                start_ns = (fresh[0] if fresh else task).start_ns
                return Tasks(leaders, {**tasks.threads}, tasks.gaps, tail, start_ns)
            if task.thread_next != task.signal + self._head:
                return None  # it has threads: a full walk finds them
            fresh.append(task)
            node = task.prev
        return None

    def tail_span(self) -> tuple[int, int]:
        """Where ``init_task.tasks.prev`` is."""
        return self._tail, 8

    def tail_spans(self, tasks: Tasks) -> tuple[tuple[int, int], tuple[int, int]]:
        """What tells whether a process was added since; for :meth:`is_tail`."""
        return self.tail_span(), self.span(tasks.tail - self._tasks)

    def is_tail(self, tasks: Tasks, tail: bytes | None, last: bytes | None) -> bool:
        """Whether the list still ends with the process with which it ended then."""
        if tail is None or last is None or int.from_bytes(tail, "little") != tasks.tail:
            return False
        return self.parse(tasks.tail - self._tasks, last).start_ns == tasks.tail_start_ns

    def span(self, va: int) -> tuple[int, int]:
        """The span of a task to read for :meth:`parse`."""
        return self._record.span(va)

    def parse(self, va: int, raw: bytes) -> Task:
        """A task from the bytes of its span."""
        return Task(va, *self._record.parse(raw))

    def read(self, va: int) -> Task:
        """One task. Raises UnreadableMemory."""
        return self.parse(va, self._kernel.read(*self._record.span(va)))

    def _prefetch(self) -> dict[int, bytes | None]:
        raws = self._kernel.readv([self._record.span(va) for va in self._known])
        return dict(zip(self._known, raws, strict=True))

    def _fetch(self, va: int, fresh: dict[int, bytes | None]) -> Task | None:
        raw = fresh.get(va)
        if raw is None:
            if not is_object(va):
                return None
            try:
                raw = self._kernel.read(*self._record.span(va))
            except UnreadableMemory:
                return None
        return self.parse(va, raw)

    def _walk_leaders(self, fresh: dict[int, bytes | None], forgiving: bool) -> tuple[list[Task] | None, list[Gap]]:
        """Follow the list once; None when it contradicted itself and we may try again."""
        head = self._init + self._tasks
        first = self._fetch(self._init, {})
        if first is None:
            raise GuestError("the guest's first task (init_task) cannot be read")
        leaders: list[Task] = []
        seen: set[int] = set()
        node, previous, why = first.next, head, ""
        while node != head:
            va = node - self._tasks
            task = self._fetch(va, fresh)
            if task is None:
                why = "unreadable link"
            elif task.prev != previous and not forgiving:
                return None, []
            elif va in seen:
                why = "the list runs in a circle"
            elif len(leaders) >= MAX_TASKS:
                why = f"more than {MAX_TASKS} processes"
            if why or task is None:
                return (leaders, [Gap("process list", node, why)]) if forgiving else (None, [])
            seen.add(va)
            leaders.append(task)
            previous, node = node, task.next
        return leaders, []

    def _walk_threads(
        self, leaders: list[Task], fresh: dict[int, bytes | None], gaps: list[Gap]
    ) -> dict[int, list[Task]]:
        threads: dict[int, list[Task]] = {}
        left = MAX_THREADS
        for leader in leaders:
            head = leader.signal + self._head
            if leader.thread_next == head or not is_object(head):
                continue
            group, seen, node = [], {leader.va}, leader.thread_next
            while node != head:
                va = node - self._node
                task = self._fetch(va, fresh) if va not in seen and left else None
                if task is None or task.tgid != leader.tgid or task.signal != leader.signal:
                    gaps.append(Gap(f"threads of process {leader.tgid}", node, "the list moved or is broken"))
                    break
                seen.add(va)
                group.append(task)
                left -= 1
                node = task.thread_next
            if group:
                threads[leader.va] = group
        return threads
