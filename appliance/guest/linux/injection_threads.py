"""The threads of one process: where each one runs, where it began, who traces it.

The registers a thread entered the kernel with lie at the top of its kernel stack (task_pt_regs, arch/x86/include/asm/
processor.h). Where a POSIX thread began is kept in glibc's ``struct pthread``, to which its fs base points. What it
will return into lies on its user stack; old words lie there as well, so that alone is a hint and no proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, Final, NamedTuple

from appliance.guest.budget import Budget
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_facts import PF_IO_WORKER, PF_USER_WORKER, InjectionFacts
from appliance.guest.linux.injection_pages import spans_of
from appliance.guest.linux.record import is_object
from appliance.guest.linux.vmas import USER_END, MemoryMap
from appliance.guest.suspects import Suspect, Suspects
from appliance.model import Evidence, Gap

MAX_THREADS: Final = 8192
MAX_TOLD: Final = 32  # threads told of one by one
THREAD_SIZES: Final = (16 << 10, 32 << 10)  # arch/x86/include/asm/page_64_types.h: without and with KASAN
PADDINGS: Final = (0, 16)  # TOP_OF_KERNEL_STACK_PADDING (arch/x86/include/asm/thread_info.h): 16 with FRED
START_LOW, START_SIZE = 0x600, 0x80  # nptl/descr.h: start_routine is at 0x640 in glibc 2.27 to 2.40 on x86-64
STACK_BYTES: Final = 16 << 10  # of each user stack that are searched for return addresses
NO_CODE: Final = "runs where no code is mapped"
VSYSCALL: Final = 0xFFFF_FFFF_FF60_0000  # arch/x86/include/uapi/asm/vsyscall.h: a page that is no mapping


class Thread(NamedTuple):
    """One thread. ``rip`` is None where its registers could not be read."""

    tid: int
    name: str
    mm: int
    ptrace: int
    parent: int
    rip: int | None
    rsp: int
    fsbase: int
    starts: tuple[int, ...] = ()  # words of struct pthread about where it began


class Threads:
    """Reads threads of processes of one guest."""

    def __init__(self, kernel: Kernel, facts: InjectionFacts) -> None:
        self._kernel, self._facts = kernel, facts
        self._task, self._regs = facts.record("task"), facts.record("pt_regs")
        self._node, self._head = facts.offset("task.thread_node"), facts.offset("signal.thread_head")
        self._frame = facts.regs_size + max(PADDINGS)

    def read(self, leader: int) -> tuple[list[Thread], list[Gap]]:
        """All threads of the process whose leader's task_struct is at ``leader``."""
        tasks, gaps = self._walk(leader)
        registers = self._registers([task[8] for task in tasks])
        threads = []
        for task, frame in zip(tasks, registers, strict=True):
            tid, _, _, comm, flags, mm, _, _, _, ptrace, parent, fsbase = task
            rip, rsp = frame or (None, 0)
            if flags & (PF_IO_WORKER | PF_USER_WORKER) and not rip:
                continue  # it belongs to the kernel and never runs in user space
            if rip is None:
                gaps.append(Gap(f"registers of thread {tid}", leader, "no user frame on its kernel stack"))
            name = comm.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            threads.append(Thread(tid, name, mm, ptrace, parent, rip, rsp, fsbase))
        return threads, gaps

    def with_starts(self, threads: Sequence[Thread], pgd: int) -> list[Thread]:
        """The same threads, each with the words that say where it began."""
        spans = [((thread.fsbase & ~7) + START_LOW, START_SIZE) for thread in threads]
        words = Struct(f"<{START_SIZE // 8}Q")
        raws = self._kernel.readv_user(pgd, spans)
        pairs = zip(threads, raws, strict=True)
        return [thread._replace(starts=words.unpack(raw) if raw else ()) for thread, raw in pairs]

    def tracer(self, parent: int) -> tuple[int, str]:
        """Pid and name of the process behind ``task_struct.parent``, which is the tracer of a traced thread."""
        raw = self._kernel.readv([self._task.span(parent)])[0] if is_object(parent) else None
        if raw is None:
            return 0, "?"
        fields = self._task.parse(raw)
        return fields[1], fields[3].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")

    def returns(self, thread: Thread, memory: MemoryMap, suspects: Suspects) -> tuple[int, Suspect] | None:
        """The first word on its stack that is an address in a suspect range behind a call, and where it lies."""
        vma = memory.at(thread.rsp)
        if vma is None:
            return None
        start, end = thread.rsp + 7 & ~7, min(vma.end, (thread.rsp & ~7) + STACK_BYTES)
        spans = spans_of(start, end)
        for (low, size), raw in zip(spans, self._kernel.readv_user(memory.pgd, spans), strict=True):
            if raw is None:
                continue
            for number, word in enumerate(Struct(f"<{size // 8}Q").unpack(raw)):
                hit = suspects.at(word)
                if hit is not None and self._after_call(memory.pgd, word):
                    return low + 8 * number, hit
        return None

    def _after_call(self, pgd: int, address: int) -> bool:
        raw = self._kernel.readv_user(pgd, [(address - 7, 7)])[0]
        return raw is not None and is_call(raw)

    def _walk(self, leader: int) -> tuple[list[tuple[Any, ...]], list[Gap]]:
        tasks: list[tuple[Any, ...]] = []
        gaps: list[Gap] = []
        seen: set[int] = set()
        fields = self._task.parse(self._kernel.read(*self._task.span(leader)))
        head, va = fields[6] + self._head, leader
        while True:
            seen.add(va)
            tasks.append(fields)
            node = fields[7]
            va = node - self._node
            if node == head:
                break
            raw = self._kernel.readv([self._task.span(va)])[0] if is_object(va) and va not in seen else None
            if raw is None or len(tasks) >= MAX_THREADS:
                gaps.append(Gap("threads", node, f"the list breaks after {len(tasks)} threads"))
                break
            fields = self._task.parse(raw)
            if (fields[1], fields[6]) != (tasks[0][1], tasks[0][6]):
                gaps.append(Gap("threads", node, f"the list leaves the process after {len(tasks)} threads"))
                break
        return tasks, gaps

    def _registers(self, stacks: list[int]) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = [None] * len(stacks)
        for size in THREAD_SIZES:
            open_ones = [number for number, frame in enumerate(found) if frame is None and is_object(stacks[number])]
            raws = self._kernel.readv([(stacks[number] + size - self._frame, self._frame) for number in open_ones])
            for number, raw in zip(open_ones, raws, strict=True):
                found[number] = self._user_frame(raw) if raw is not None else None
        return found

    def _user_frame(self, raw: bytes) -> tuple[int, int] | None:
        """The rip and rsp of the frame, where the selectors say that it is one of user space."""
        for padding in PADDINGS:
            start = len(raw) - padding - self._facts.regs_size + self._regs.low
            rip, cs, rsp, ss = self._regs.parse(raw[start : start + self._regs.size])
            if cs & 3 == 3 and ss & 3 == 3 and cs < 0x10000 and ss < 0x10000 and rsp < USER_END:
                return rip, rsp
        return None


def is_call(before: bytes) -> bool:
    """Whether the seven bytes before a return address end in a call: E8 rel32, or a form of FF /2 (Intel SDM, CALL)."""
    if before[-5] == 0xE8:
        return True
    return any(before[-n] == 0xFF and before[1 - n] >> 3 & 7 == 2 for n in (2, 3, 4, 6, 7))


def judge_threads(
    threads: Sequence[Thread], memory: MemoryMap, suspects: Suspects, reader: Threads, budget: Budget
) -> Iterator[Evidence]:
    """Threads that run, began or will go on where no thread should."""
    told = 0
    for number, thread in enumerate(threads):
        if budget.over:
            budget.cut_off(f"{len(threads) - number} of {len(threads)} threads")
            return
        evidence = _where(thread, memory, suspects)
        if evidence is None and suspects and thread.rip is not None:
            hint = reader.returns(thread, memory, suspects)
            if hint is not None:
                claim = f"the stack of thread {thread.tid} ({thread.name}) holds a return address into {hint[1].what}"
                evidence = _evidence(claim, thread, hint[0], 1)
        if evidence is None:
            continue
        told += 1
        if told > MAX_TOLD:
            claim = f"more than {MAX_TOLD} threads have to do with foreign code; the others are not told"
            yield Evidence(claim, "foreign-thread", weight=evidence.weight)
            return
        yield evidence


def _where(thread: Thread, memory: MemoryMap, suspects: Suspects) -> Evidence | None:
    who = f"thread {thread.tid} ({thread.name})"
    for address in thread.starts:
        hit = suspects.at(address)
        if hit is not None:
            return _evidence(f"{who} began in {hit.what}", thread, address, 2)
    if thread.rip is None:
        return None
    hit = suspects.at(thread.rip)
    if hit is not None:
        return _evidence(f"{who} runs in {hit.what}", thread, thread.rip, 2)
    vma = memory.at(thread.rip)
    if (vma is None or not vma.executable) and thread.rip & ~0xFFF != VSYSCALL:
        return _evidence(f"{who} {NO_CODE}", thread, thread.rip, 2)
    return None


def _evidence(claim: str, thread: Thread, address: int, weight: int) -> Evidence:
    rip = "?" if thread.rip is None else f"{thread.rip:#x}"
    detail = f"thread {thread.tid}; rip {rip}; rsp {thread.rsp:#x}"
    return Evidence(claim, "foreign-thread", address, 0, None, detail, weight)
