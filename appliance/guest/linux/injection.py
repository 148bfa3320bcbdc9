"""What in one process is foreign, at alert time: code, changed code, threads, tracers and preloaded libraries.

:meth:`Injection.find` looks at one process once and tells what it saw as Evidence, each with its place and its bytes.
What could not be seen is told too (kind ``gap``, weight 0). Kinds: anon-exec, odd-path, deleted-file, memfd,
writable-exec-file, deleted-executable, modified-text, foreign-thread, ptrace, ld-preload, gap.

Weights: 2 is suspicious on its own, 1 unusual (debuggers, JITs, upgraded libraries do it), 0 context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from weakref import WeakKeyDictionary

from appliance.errors import GuestError
from appliance.guest.budget import Budget
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import PF_KTHREAD, Facts
from appliance.guest.linux.injection_cache import PageCache
from appliance.guest.linux.injection_code import Code, judge_code
from appliance.guest.linux.injection_facts import InjectionFacts
from appliance.guest.linux.injection_files import Files, MappedFile, odd_place
from appliance.guest.linux.injection_pages import Pages, spans_of
from appliance.guest.linux.injection_text import Mapped, Texts
from appliance.guest.linux.injection_threads import NO_CODE, Thread, Threads, judge_threads
from appliance.guest.linux.paths import Paths
from appliance.guest.linux.record import is_object
from appliance.guest.linux.vmas import MemoryMap, MemoryMaps
from appliance.model import Evidence, Gap, GuestProcess

MAX_PAGES: Final = 131_072  # page table entries and pages of one part of a look: 512 MiB of code
MAX_SECONDS: Final = 0.5  # for one part of a look, of which there are four
TRIES: Final = 3
MAX_ENVIRONMENT: Final = 128 << 10  # include/uapi/linux/binfmts.h: MAX_ARG_STRLEN
MAX_VALUE: Final = 512
MAX_TOLD: Final = 256  # evidence of one process
PRELOADS: Final = (b"LD_PRELOAD=", b"LD_AUDIT=")  # ld.so(8)


class Injection:
    """Looks into processes of one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UnsupportedGuest naming what this kernel's types lack."""
        self._kernel, self._clock = kernel, clock
        self._facts = InjectionFacts(kernel)
        self._task = self._facts.record("task")
        self._maps = MemoryMaps(kernel, self._facts)
        self._files = Files(kernel, self._facts, Paths(kernel, facts))
        self._pages = Pages(kernel, self._facts)
        self._threads = Threads(kernel, self._facts)
        self._texts = Texts(kernel, self._pages, PageCache(kernel, self._facts))

    def find(self, process: GuestProcess) -> tuple[Evidence, ...]:
        """Everything foreign in a process, the heaviest first. Raises GuestError, and nothing else."""
        self._kernel.forget()  # kernel stacks lie in vmalloc space and are reused
        mine, kernel_thread = self._identify(process)
        if not mine:
            return (_gap("process", process.task_va, "it has ended, or its place was reused"),)
        if kernel_thread:
            return ()
        for _ in range(TRIES):
            threads, gaps = self._threads.read(process.task_va)
            mm = _memory_of(threads)
            if not mm:
                return (_gap("process", process.task_va, "it has no memory any more"),)
            memory = self._maps.read(mm)
            cut: list[str] = []
            evidence = list(self._look(memory, threads, cut))
            gaps += memory.gaps
            moved = _memory_of(self._threads.read(process.task_va)[0]) != mm
            if cut or not (moved or any(one.claim.endswith(NO_CODE) for one in evidence)):
                break  # else look again: the map may have changed between the look at the threads and at it
        if moved:
            gaps.append(Gap("process", process.task_va, "it replaced its memory while it was looked at"))
        if not self._identify(process)[0]:
            gaps.append(Gap("process", process.task_va, "it ended while it was looked at"))
        evidence.sort(key=lambda one: -one.weight)
        if len(evidence) > MAX_TOLD:
            gaps.append(Gap("evidence", 0, f"{len(evidence) - MAX_TOLD} more findings are not told"))
            del evidence[MAX_TOLD:]
        evidence += [_gap(gap.what, gap.address, gap.why) for gap in gaps[:MAX_TOLD]]
        evidence += [_gap("code", 0, f"not looked at: {what}") for what in cut[:MAX_TOLD]]
        return tuple(evidence)

    def read_map(self, process: GuestProcess) -> tuple[MemoryMap, dict[int, MappedFile]]:
        """The memory map of a process with all its files, as /proc/PID/maps has it. Raises GuestError."""
        mm = self._task.parse(self._kernel.read(*self._task.span(process.task_va)))[5]
        memory = self._maps.read(mm)
        return memory, self._files.look((vma.file for vma in memory.vmas), self._budget([]))

    def _look(self, memory: MemoryMap, threads: Sequence[Thread], cut: list[str]) -> Iterator[Evidence]:
        """Each part has a budget of its own, so that no part can use up another's; the longest comes last."""
        code = [vma for vma in memory.vmas if vma.executable]
        files = self._files.look([memory.exe_file, *(vma.file for vma in code)], self._budget(cut))
        started = self._threads.with_starts(threads, memory.pgd)
        starts = sorted({start for thread in started for start in thread.starts})
        judged = Code.of(memory, files, starts)
        evidence, suspects = judge_code(judged, self._pages, memory.pgd, self._budget(cut))
        yield from evidence
        yield from judge_threads(started, memory, suspects, self._threads, self._budget(cut))
        yield from self._tracers(threads)
        yield from self._preloads(memory)
        budget = self._budget(cut)
        mapped: list[Mapped] = []
        for number, vma in enumerate(code):
            if budget.over:
                budget.cut_off(f"pages of {len(code) - number} of {len(code)} executable mappings")
                break
            if vma.special or vma.file in files:
                pages = self._pages.resident(memory.pgd, vma.start, vma.end, budget)
                mapped.append((vma, files.get(vma.file), pages))
        yield from self._texts.find(memory.pgd, mapped, budget)

    def _budget(self, cut: list[str]) -> Budget:
        return Budget(MAX_PAGES, MAX_SECONDS, cut, self._clock)

    def _identify(self, process: GuestProcess) -> tuple[bool, bool]:
        """Whether the task is still this process, and whether it is a thread of the kernel."""
        if not is_object(process.task_va):
            raise GuestError(f"process {process.pid} has no known task_struct")
        fields = self._task.parse(self._kernel.read(*self._task.span(process.task_va)))
        return (fields[1], fields[2]) == (process.key.pid, process.key.started_ns), bool(fields[4] & PF_KTHREAD)

    def _tracers(self, threads: Sequence[Thread]) -> Iterator[Evidence]:
        traced: dict[int, list[int]] = {}
        for thread in threads:
            if thread.ptrace:
                traced.setdefault(thread.parent, []).append(thread.tid)
        for parent, tids in traced.items():
            pid, name = self._threads.tracer(parent)
            claim = f"process {pid} ({name}) traces it and may read and write its memory"
            detail = f"tracer {pid} {name}; threads {' '.join(map(str, tids[:16]))}"
            yield Evidence(claim, "ptrace", parent, detail=detail, weight=1)

    def _preloads(self, memory: MemoryMap) -> Iterator[Evidence]:
        """LD_PRELOAD and LD_AUDIT in the environment the process was started with, unless it has overwritten it."""
        start, end = memory.env_start, min(memory.env_end, memory.env_start + MAX_ENVIRONMENT)
        if start >= end:
            return
        spans = spans_of(start, end)
        raws = self._kernel.readv_user(memory.pgd, spans)
        if None in raws:
            yield _gap("environment", start, f"{raws.count(None)} of its {len(raws)} pages are not resident")
        at = start
        for entry in b"".join(raw or bytes(size) for raw, (_, size) in zip(raws, spans, strict=True)).split(b"\0"):
            for name in PRELOADS:
                if entry.startswith(name) and len(entry) > len(name):
                    yield _preload(entry[: len(name) + MAX_VALUE], at)
            at += len(entry) + 1


def find_foreign(kernel: Kernel, facts: Facts, process: GuestProcess) -> tuple[Evidence, ...]:
    """What in this process is foreign. Resolves its own facts once per kernel. Raises GuestError, and nothing else."""
    injection = _known.get(kernel)
    if injection is None:
        injection = _known[kernel] = Injection(kernel, facts)
    return injection.find(process)


def _memory_of(threads: Sequence[Thread]) -> int:
    """The ``mm_struct`` of a process: that of the first thread that still has one."""
    return next((thread.mm for thread in threads if is_object(thread.mm)), 0)


_known: WeakKeyDictionary[Kernel, Injection] = WeakKeyDictionary()


def _preload(entry: bytes, address: int) -> Evidence:
    text = entry.decode("utf-8", "backslashreplace")
    name, value = text.split("=", 1)
    places = [odd_place(path, "") for path in value.replace(":", " ").split()]
    weight = 2 if any(place is not None and place[0] > 1 for place in places) else 1
    claim = f"{name} makes the loader put {value} into the program"
    return Evidence(claim, "ld-preload", address, len(entry), detail=text, weight=weight)


def _gap(what: str, address: int, why: str) -> Evidence:
    return Evidence(f"{what} could not be seen in full: {why}", "gap", address)
