"""The threads of a process: ``_EPROCESS.ThreadListHead``, a ring of ``_ETHREAD.ThreadListEntry``.

Each look reads all threads known from the look before in one batch; links are followed forwards and must lead back,
three tries, then what either direction reaches is told, and a gap. That a thread names another process than the one
whose list it is on (``Cid``, ``Process``), or works in another one's memory for now (``ApcState.Process``), is told as
it is.
Sources: _ETHREAD, _KTHREAD, _KAPC_STATE, _CLIENT_ID of ntkrnlmp.pdb; enum _KTHREAD_STATE; _KOBJECTS (wdm.h).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.windows.eprocess import THREAD_OBJECT, is_plausible_time, time_ns
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.record import Record
from appliance.model import Gap

MAX_THREADS: Final = 32_768  # of one process
MAX_KNOWN: Final = 1024  # processes whose threads we remember
TRIES: Final = 3
TERMINATED: Final = 4  # _KTHREAD_STATE.Terminated
STATES: Final = ("Initialized", "Ready", "Running", "Standby", "Terminated", "Waiting", "Transition", "DeferredReady")
MEMBERS: Final = (
    "Cid.UniqueProcess",
    "Cid.UniqueThread",
    "StartAddress",
    "Win32StartAddress",
    "CreateTime",
    "ExitTime",
    "ThreadListEntry.Flink",
    "ThreadListEntry.Blink",
    "Tcb.Header.Type",
    "Tcb.Teb?",
    "Tcb.State",
    "Tcb.WaitReason?",
    "Tcb.SuspendCount?",
    "Tcb.ApcState.Process",
    "Tcb.Process?",  # since Windows 7
    "ThreadsProcess?",  # before
)


class RawThread(NamedTuple):
    """One ``_ETHREAD``. Times are nanoseconds since the Unix epoch, 0 where the guest has none; pointers are VAs."""

    va: int
    pid: int  # Cid: of the process that it says it belongs to
    tid: int
    start: int  # StartAddress: where the kernel lets it begin (ntdll's RtlUserThreadStart, mostly)
    win32_start: int  # Win32StartAddress: what its maker asked for; the thread itself may change it
    created: int
    exited: int
    flink: int
    blink: int
    kind: int  # Tcb.Header.Type
    teb: int
    state: int  # _KTHREAD_STATE
    wait_reason: int
    suspended: int  # SuspendCount
    attached: int  # ApcState.Process: whose memory it sees now
    process: int  # whose thread it is

    @property
    def state_name(self) -> str:
        """The state in the kernel's words."""
        return STATES[self.state] if self.state < len(STATES) else str(self.state)

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self.state != TERMINATED and not self.exited


class ThreadList(NamedTuple):
    """One look at the threads of one process."""

    threads: list[RawThread]
    gaps: list[Gap]
    torn: int = 0


class Threads:
    """Walks threads of one guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel = kernel
        self._record = Record(kernel.types, "_ETHREAD", _members(kernel))
        self._head = kernel.types.offset("_EPROCESS.ThreadListHead.Flink")
        self._links = kernel.types.offset("_ETHREAD.ThreadListEntry.Flink")
        # On XP the time's lowest bits are flags: NestedFaultCount, ApcNeeded.
        shifted = kernel.types.has("_ETHREAD.NestedFaultCount")
        self._shift = 3 if shifted else kernel.types.field("_ETHREAD.CreateTime").bit_position
        self._known: dict[int, list[int]] = {}

    def walk(self, process_va: int) -> ThreadList:
        """All threads of the process at an address, in the list's order. Raises UnreadableMemory of its head."""
        torn, at, why = 0, process_va, ""
        found: list[RawThread] = []
        while torn < TRIES:
            found, at, why = self._follow(process_va)
            if not why:
                break
            torn += 1
        if why:  # what either direction reaches of the threads that say themselves whose they are
            found = self._reach(process_va)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[process_va] = [thread.va for thread in found]
        return ThreadList(found, [Gap("thread list", at, why)] if why else [], torn)

    def span(self, va: int) -> tuple[int, int]:
        """The span of a thread to read for :meth:`parse`."""
        return self._record.span(va)

    def parse(self, va: int, raw: bytes) -> RawThread:
        """A thread from the bytes of its span; nothing of it is checked."""
        values = self._record.parse(raw)
        created, exited = values[4:6]
        # ExitTime shares its place with a list entry while the thread lives (LpcReplyChain, KeyedWaitChain): a pointer
        # of 8 bytes or two of 4, which make no time.
        ended = time_ns(exited)
        times = time_ns(created >> self._shift), ended if is_plausible_time(ended) else 0
        return RawThread._make((va, *values[:4], *times, *values[6:14], values[14] or values[15]))

    def read(self, va: int) -> RawThread:
        """One thread, unchecked. Raises UnreadableMemory."""
        return self.parse(va, self._kernel.space.read(*self._record.span(va)))

    def _follow(self, process_va: int) -> tuple[list[RawThread], int, str]:
        space, kernel = self._kernel.space, self._kernel
        known = self._known.get(process_va, [])
        fresh = dict(zip(known, space.readv([self._record.span(va) for va in known]), strict=True))
        head = process_va + self._head
        found: list[RawThread] = []
        seen: set[int] = set()
        node, previous = space.pointer(head), head
        while node != head:
            va = node - self._links
            if va in seen:
                return found, node, "the list runs in a circle"
            if len(found) >= MAX_THREADS:
                return found, node, f"more than {MAX_THREADS} threads"
            raw = fresh.get(va)
            if raw is None:
                if not kernel.is_kernel(va) or va % kernel.pointer_size:
                    return found, node, "a link leads out of the kernel"
                try:
                    raw = space.read(*self._record.span(va))
                except UnreadableMemory:
                    return found, node, "a thread cannot be read"
            thread = self.parse(va, raw)
            is_thread = thread.kind == THREAD_OBJECT or thread.process == process_va
            if not is_thread or thread.blink != previous:
                return found, node, "a link leads to what is no thread, or does not point back"
            seen.add(va)
            found.append(thread)
            previous, node = node, thread.flink
        return found, node, ""

    def _reach(self, process_va: int) -> list[RawThread]:
        """The threads on both directions of a list that contradicts itself, as far as each names this process."""
        space, head = self._kernel.space, process_va + self._head
        found: dict[int, RawThread] = {}
        for at in (head, head + self._kernel.pointer_size):
            node = space.pointer(at)
            seen = {head}
            while node not in seen and len(seen) <= MAX_THREADS and self._kernel.is_kernel(node):
                seen.add(node)
                try:
                    thread = self.read(node - self._links)
                except UnreadableMemory:
                    break
                if thread.process != process_va:
                    break
                found.setdefault(thread.va, thread)
                node = thread.flink if at == head else thread.blink
        return list(found.values())


def _members(kernel: WindowsKernel) -> tuple[str, ...]:
    """The members to read. Raises UnsupportedGuest when there is no way to tell whose a thread is."""
    if not any(kernel.types.has(f"_ETHREAD.{name}") for name in ("Tcb.Process", "ThreadsProcess")):
        raise UnsupportedGuest(("a thread's process (_KTHREAD.Process)",))
    return MEMBERS
