"""The guest's list of processes: ``PsActiveProcessHead``, a ring of ``_EPROCESS.ActiveProcessLinks``.

The first look follows the links one by one; every later one first reads all processes known from the look before in
one batch, so that only new ones cost a read of their own. Both directions must agree: a link whose target does not
point back means that the list moved under us, and the walk starts over, three times at most; then what either direction
reaches is told, and a gap.
Sources: symbols of ntkrnlmp.pdb.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.errors import GuestError, UnreadableMemory
from appliance.guest.windows.eprocess import PROCESS_OBJECT, Layout, RawProcess, is_plausible_time
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.portrait import Portraits
from appliance.model import Flag, Gap, GuestProcess

__all__ = ["ProcessList", "Processes", "RawProcess"]

MAX_PROCESSES: Final = 65_536  # pids are handles of PspCidTable; no guest of ours has that many
MAX_PID: Final = 1 << 26  # ExMaxHandle bounds a handle table at 2^24 entries, each counts for 4
TRIES: Final = 3
SYSTEM_PID: Final = 4
YOUNG_NS: Final = 1_000_000_000  # nt!PspInsertProcess links a process only after it was made


class ProcessList(NamedTuple):
    """One look at the list. ``torn`` counts the tries that contradicted themselves."""

    processes: list[RawProcess]
    gaps: list[Gap]
    torn: int = 0


class Processes:
    """Walks the processes of one guest, remembers where they were, and describes them."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel = kernel
        self._layout = Layout(kernel.types)
        self._links = kernel.types.offset("_EPROCESS.ActiveProcessLinks.Flink")
        self._threads = kernel.types.offset("_EPROCESS.ThreadListHead.Flink")
        types = kernel.types
        older = types.has("_ETHREAD.ThreadsProcess")  # until Vista
        places = ("ThreadListEntry", "Cid.UniqueProcess", "ThreadsProcess" if older else "Tcb.Process")
        known = all(types.has(f"_ETHREAD.{name}") for name in places)
        self._thread_places = tuple(types.offset(f"_ETHREAD.{name}") for name in places) if known else None
        self._head = kernel.symbol("PsActiveProcessHead")
        self._pointer = kernel.pointer_size
        self._objects = Objects(kernel)
        self._portraits = Portraits(kernel, self.read)
        self._known: list[int] = []
        self._listed: dict[int, RawProcess] = {}

    # -- the list --

    def walk(self) -> ProcessList:
        """Read all processes of the list, in its order. Raises GuestError when not even its head can be read."""
        torn = 0
        found: list[RawProcess] = []
        why = ""
        at = self._head
        while torn < TRIES:
            fresh = self._prefetch()
            found, at, why = self._follow(fresh, forwards=True)
            if not why:
                break
            torn += 1
        gaps: list[Gap] = []
        if why:
            gaps.append(Gap("process list", at, why))
            found, _, _ = self._follow({}, forwards=True, strict=False)
            backwards, _, _ = self._follow({}, forwards=False, strict=False)
            seen = {raw.va for raw in found}
            found += [raw for raw in reversed(backwards) if raw.va not in seen]
        self._known = [raw.va for raw in found]
        self._listed = {raw.va: raw for raw in found}
        return ProcessList(found, gaps, torn)

    def span(self, va: int) -> tuple[int, int]:
        """The span of a process to read for :meth:`parse`."""
        return self._layout.span(va)

    def parse(self, va: int, raw: bytes) -> RawProcess:
        """A process from the bytes of its span; nothing of it is checked."""
        return self._layout.parse(va, raw)

    def read(self, va: int) -> RawProcess:
        """One process, unchecked. Raises UnreadableMemory."""
        return self.parse(va, self._kernel.space.read(*self._layout.span(va)))

    # -- is this one? --

    def is_sound(self, raw: RawProcess) -> bool:
        """Whether bytes can be those of a process: pid, page tables, start time, list of threads.

        Its links on the list of processes are not asked: a hidden one may have any. Nor is the kind of object: nothing
        needs it for long, so that whoever wants to be overlooked may overwrite it (`find` weighs it).
        """
        if not self._is_object(raw.va):
            return False
        if not 0 < raw.pid < MAX_PID or raw.pid & 3 or not raw.dtb:
            return False
        if not is_plausible_time(raw.created) and (raw.created or raw.pid != SYSTEM_PID):  # XP's System has none
            return False
        return self._kernel.is_kernel(raw.thread_flink) and self._kernel.is_kernel(raw.thread_blink)

    def find(self, va: int) -> RawProcess | None:
        """The process at an address, None when there is none.

        Its bytes must be sound, the list of its threads must lead back to it, and somebody must vouch for it: its own
        header, the object manager, its neighbours on the list of processes, or a thread that names it.
        """
        if not self._is_object(va):
            return None
        head = va + self._threads
        try:
            raw = self.read(va)
            if not self.is_sound(raw):
                return None
            # LIST_ENTRY: Flink, Blink. The thread that is first points back to the head; of an empty list, it itself.
            back = self._kernel.space.pointer(raw.thread_flink + self._pointer)
            forth = self._kernel.space.pointer(raw.thread_blink)
        except UnreadableMemory:
            return None
        return raw if head in (back, forth) and self._is_vouched_for(raw) else None

    def is_process(self, va: int) -> bool:
        """Whether an address is that of a process; see :meth:`find`."""
        return self.find(va) is not None

    def is_listed(self, raw: RawProcess) -> bool:
        """Whether the list leads to a process now. The list is walked anew unless the last look at it tells enough."""
        listed = self._listed.get(raw.va)
        if listed is not None and listed.key == raw.key:
            return True
        if self._is_alone(raw.va):
            return False
        listing = self.walk()
        listed = self._listed.get(raw.va)
        if listed is None and listing.gaps:
            return self._has_neighbours(raw.va)
        return listed is not None and listed.key == raw.key

    def is_young(self, raw: RawProcess) -> bool:
        """Whether a process of a running guest started a moment ago: it may not be on the list yet."""
        if not self._kernel.memory.live:
            return False  # nothing will be linked any more
        try:
            return 0 <= self._kernel.read_shared().epoch_ns - raw.created < YOUNG_NS
        except UnreadableMemory:
            return False

    # -- what a person wants to know --

    def describe(self, raw: RawProcess, *, hidden: bool = False) -> GuestProcess:
        """Describe one process; ``hidden``: it is on no list. What was found before is not read again."""
        return self.describe_all((raw,), hidden=hidden)[0]

    def describe_all(self, raws: Sequence[RawProcess], *, hidden: bool = False) -> list[GuestProcess]:
        """Describe many processes at once, which costs fewer reads."""
        return self._portraits.describe(raws, (Flag.HIDDEN_PROCESS,) if hidden else ())

    def forget(self) -> None:
        """Describe everything afresh next time."""
        self._portraits.forget()

    # -- private --

    def _is_object(self, va: int) -> bool:
        return self._kernel.is_kernel(va) and not va % self._pointer

    def _is_vouched_for(self, raw: RawProcess) -> bool:
        """Whether its header, the object manager, its neighbours or its first thread call it a process."""
        if raw.kind == PROCESS_OBJECT or self._objects.is_process(raw.va):
            return True
        if self._has_neighbours(raw.va) and not self._is_alone(raw.va):
            return True
        if self._thread_places is None:
            return False
        links, pid, process = self._thread_places
        space, thread = self._kernel.space, raw.thread_flink - links
        try:
            named = space.pointer(thread + pid), space.pointer(thread + process)
        except UnreadableMemory:
            return False
        return named == (raw.pid, raw.va)

    def _is_alone(self, va: int) -> bool:
        """Whether a process is in a ring of its own: its links lead to itself."""
        node = (va + self._links).to_bytes(self._pointer, "little")
        try:
            return self._kernel.space.read(va + self._links, 2 * self._pointer) == 2 * node
        except UnreadableMemory:
            return True

    def _has_neighbours(self, va: int) -> bool:
        """Whether both neighbours of a process in its ring point to it."""
        space, node = self._kernel.space, va + self._links
        try:
            flink, blink = space.pointer(node), space.pointer(node + self._pointer)
            return space.pointer(flink + self._pointer) == node and space.pointer(blink) == node
        except UnreadableMemory:
            return False

    def _prefetch(self) -> dict[int, bytes | None]:
        raws = self._kernel.space.readv([self._layout.span(va) for va in self._known])
        return dict(zip(self._known, raws, strict=True))

    def _follow(
        self, fresh: dict[int, bytes | None], *, forwards: bool, strict: bool = True
    ) -> tuple[list[RawProcess], int, str]:
        """Follow one direction; what was found, where it ended, and why if that was too early.

        Unless ``strict``, what is soundly a process need not point back.
        """
        try:
            head = self._kernel.space.read(self._head, 2 * self._pointer)
        except UnreadableMemory:
            raise GuestError("the guest's list of processes (PsActiveProcessHead) cannot be read") from None
        first, last = (int.from_bytes(part, "little") for part in (head[: self._pointer], head[self._pointer :]))
        node, end = (first, last) if forwards else (last, first)
        previous = self._head
        found: list[RawProcess] = []
        seen: set[int] = set()
        while node != self._head:
            raw = self._fetch(node - self._links, fresh)
            if raw is None:
                return found, node, "a link leads to what cannot be read, or is no process"
            back, following = (raw.blink, raw.flink) if forwards else (raw.flink, raw.blink)
            if back != previous and (strict or not self.is_sound(raw)):
                return found, node, "a process does not point back to the one before it"
            if raw.va in seen:
                return found, node, "the list runs in a circle"
            if len(found) >= MAX_PROCESSES:
                return found, node, f"more than {MAX_PROCESSES} processes"
            seen.add(raw.va)
            found.append(raw)
            previous, node = node, following
        return found, node, "" if previous == end else "the list's end is not where its head says"

    def _fetch(self, va: int, fresh: dict[int, bytes | None]) -> RawProcess | None:
        bytes_ = fresh.get(va)
        if bytes_ is None:
            if not self._is_object(va):
                return None
            try:
                bytes_ = self._kernel.space.read(*self._layout.span(va))
            except UnreadableMemory:
                return None
        raw = self.parse(va, bytes_)
        return raw if raw.kind == PROCESS_OBJECT or self.is_sound(raw) else None
