"""What in one process is foreign, at alert time: code, changed code, images, threads, and false names.

:meth:`Injection.find` looks at one process once and tells what it saw as Evidence, each with its place and its bytes.
What could not be seen is told too (kind ``gap``, weight 0). Kinds: anon-exec, injected-pe, foreign-thread,
unlisted-module, fake-module, hollowed, modified-text, peb-masquerade, odd-path, deleted-file, gap.

Weights: 2 is suspicious on its own, 1 unusual (JITs, debuggers, hooks of decent programs do it), 0 context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from appliance.errors import GuestError, Implausible, OutOfTime, UnreadableMemory
from appliance.guest.budget import Budget
from appliance.guest.windows.eprocess import Layout, RawProcess
from appliance.guest.windows.files import Files
from appliance.guest.windows.injection_code import judge_code
from appliance.guest.windows.injection_images import Program, judge_lists, judge_places, judge_program
from appliance.guest.windows.injection_pages import Pages, Prototypes
from appliance.guest.windows.injection_paths import Place, parse_place
from appliance.guest.windows.injection_text import Texts
from appliance.guest.windows.injection_threads import ThreadReader, judge_threads
from appliance.guest.windows.injection_views import MappedFile, Media, Module, Scene, view_of
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.ldr import Loaders, ModuleList
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.params import ParameterReader
from appliance.guest.windows.text import MAX_PATH, wide_text
from appliance.guest.windows.threads import Threads
from appliance.guest.windows.vads import MemoryMap, Vad, Vads
from appliance.model import Evidence, Gap, GuestProcess

MAX_PAGES: Final = 131_072  # page table entries and pages of one part of a look: 512 MiB of code
MAX_SECONDS: Final = 0.5  # for one part of a look, of which there are six
MAX_LOOK_SECONDS: Final = 3.0  # for the whole of it
TRIES: Final = 3
MAX_TOLD: Final = 256  # evidence of one process
# What a change under us looks like
PASSING: Final = ("unlisted-module", "fake-module", "hollowed", "foreign-thread", "peb-masquerade")


class _Look(NamedTuple):
    """What one look saw."""

    found: list[Evidence]
    unsettled: int  # findings about what had changed before they were told
    whole: bool  # it was not out of time


class Injection:
    """Looks into processes of one guest."""

    def __init__(self, kernel: WindowsKernel, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises UnsupportedGuest naming what this kernel's types lack."""
        self._kernel, self._clock = kernel, clock
        self._layout = Layout(kernel.types)
        self._files = Files(kernel, Objects(kernel))
        self._vads = Vads(kernel, self._files)
        self._threads, self._thread_reader = Threads(kernel), ThreadReader(kernel)
        self._loaders, self._parameters = Loaders(kernel), ParameterReader(kernel)
        self._media = Media(kernel)
        path = "_EPROCESS.Pcb.Flags.ExecuteDisable"  # _KEXECUTE_OPTIONS
        self._no_execute = kernel.types.field(path) if kernel.types.has(path) else None

    def find(self, process: GuestProcess) -> tuple[Evidence, ...]:
        """Everything foreign in a process, the heaviest first. Raises GuestError, and nothing else."""
        live = self._kernel.memory.live
        evidence: list[Evidence] = []
        gaps: list[Gap] = []
        cut: list[str] = []
        before: set[tuple[str, int]] | None = None
        for _ in range(TRIES if live else 1):
            self._kernel.forget()
            raw = self._identify(process)
            if raw is None:
                if before is None:
                    return (_gap("process", process.task_va, "it has ended, or its place was reused"),)
                evidence = [_doubtful(one) for one in evidence]
                break
            gaps, cut = [], []
            look = self._look(raw, process, gaps, cut)
            evidence = _join(evidence, look, before)
            passing = {_key(one) for one in look.found if one.kind in PASSING}
            if look.unsettled:
                gaps.append(Gap("process", process.task_va, f"{look.unsettled} findings: it changed under them"))
            if not look.whole and live:
                evidence = [_doubtful(one) for one in evidence]
            if not look.whole or not (look.unsettled or passing) or passing == before:
                break  # else look again: what may pass is told only when it is there again
            before = passing
        if self._identify(process) is None:
            gaps.append(Gap("process", process.task_va, "it ended while it was looked at"))
        evidence.sort(key=lambda one: -one.weight)
        if len(evidence) > MAX_TOLD:
            gaps.append(Gap("evidence", 0, f"{len(evidence) - MAX_TOLD} more findings are not told"))
            del evidence[MAX_TOLD:]
        evidence += [_gap(gap.what, gap.address, gap.why) for gap in gaps[:MAX_TOLD]]
        evidence += [_gap("code", 0, f"not looked at: {what}") for what in cut[:MAX_TOLD]]
        return tuple(evidence)

    def _look(self, raw: RawProcess, process: GuestProcess, gaps: list[Gap], cut: list[str]) -> _Look:
        found: list[Evidence] = []
        unsettled = 0
        try:
            with self._kernel.limit(MAX_LOOK_SECONDS, self._clock):
                memory = self._vads.walk(raw.va)
                gaps += memory.gaps
                for evidence in self._judge(raw, process, memory, gaps, cut):
                    if self._is_settled(evidence.address, process, memory):
                        found.append(evidence)
                    else:
                        unsettled += 1
        except OutOfTime:
            cut.append(f"all that would have taken longer than {MAX_LOOK_SECONDS} s")
            return _Look(found, unsettled, False)
        except UnreadableMemory as error:  # what was found before stands
            gaps.append(Gap("process", error.address, error.why))
        return _Look(found, unsettled, True)

    def _is_settled(self, address: int, process: GuestProcess, memory: MemoryMap) -> bool:
        """Whether an address still lies in the same region of the same process as when the regions were read.

        Else the bytes may have been those of what came after it: of an image that took its place, of another process.
        """
        if not address or not self._kernel.memory.live:
            return True
        was = memory.at(address)
        try:
            if self._identify(process) is None:
                return False
            return any(_same(was, self._vads.find(process.task_va, address)) for _ in range(TRIES))
        except UnreadableMemory:
            return False

    def _judge(
        self, raw: RawProcess, process: GuestProcess, memory: MemoryMap, gaps: list[Gap], cut: list[str]
    ) -> Iterator[Evidence]:
        """Each part has a budget of its own, so that no part can use up another's; the longest comes last."""
        files = self._media.files(memory.vads)
        views = [view_of(vad, files) for vad in memory.vads]
        if not raw.peb and not any(view.image for view in views):
            return  # the kernel itself, or one of its minimal processes
        loaded = self._loaders.read(raw)
        gaps += loaded.gaps
        threads = self._threads.walk(raw.va)
        gaps += threads.gaps
        places = self._thread_reader.read([thread for thread in threads.threads if thread.alive], cut)
        program = self._program(raw, loaded)
        main = next((view.file for view in views if view.image and view.start == raw.section_base), None)
        scene = Scene.of(
            views,
            _modules(loaded),
            lists_whole=bool(raw.peb) and not loaded.gaps,
            program=_place_of(program.file or main, process),
            sid=process.sid,
            bits=32 if raw.wow64 or self._kernel.pointer_size == 4 else 64,
            starts=[address for place in places for _, address in place.starts],
        )
        space = self._kernel.process_space(raw.dtb)
        pages, prototypes = Pages(space), Prototypes(self._kernel.space)
        trust_nx = self._trusts_nx(raw)
        evidence, suspects = judge_code(scene, pages, self._budget(cut), trust_nx=trust_nx)
        yield from evidence
        yield from judge_program(scene, program, pages, prototypes, self._budget(cut))
        yield from judge_lists(scene, pages, self._budget(cut))
        yield from judge_places(scene, pages, self._budget(cut))
        yield from judge_threads(places, scene, suspects, space, self._budget(cut))
        yield from Texts(scene, pages, prototypes, trust_nx=trust_nx).find(self._budget(cut))

    def _program(self, raw: RawProcess, loaded: ModuleList) -> Program:
        """What kernel and process say of the program."""
        said = self._parameters.read(raw)
        path, command = (text if isinstance(text, str) else None for text in (said.image, said.command))
        base = loaded.image_base or None
        return Program(raw.section_base, self._started_from(raw), raw.peb, base, path, command)

    def _started_from(self, raw: RawProcess) -> MappedFile | None:
        opened = self._files.read([raw.file]).get(raw.file) if raw.file else None
        if opened is not None:
            return self._media.look({raw.file: opened})[raw.file]
        try:
            text = wide_text(self._kernel.space, raw.audit, MAX_PATH) if self._kernel.is_kernel(raw.audit) else ""
        except (UnreadableMemory, Implausible):
            return None
        return MappedFile(text, parse_place(text)) if text else None

    def _trusts_nx(self, raw: RawProcess) -> bool:
        """Whether pages of this process are executable only where that was asked for (data execution prevention)."""
        if self._kernel.pointer_size == 8 and not raw.wow64:
            return True
        field = self._no_execute
        if field is None:
            return False
        try:
            value = int.from_bytes(self._kernel.space.read(raw.va + field.offset, field.size), "little")
        except UnreadableMemory:
            return False
        return bool(value >> field.bit_position & 1)

    def _budget(self, cut: list[str]) -> Budget:
        return Budget(MAX_PAGES, MAX_SECONDS, cut, self._clock)

    def _identify(self, process: GuestProcess) -> RawProcess | None:
        """The process, None where it has ended or another one has taken its place."""
        va = process.task_va
        if not self._kernel.is_kernel(va) or va % self._kernel.pointer_size:
            raise GuestError(f"process {process.pid} has no known _EPROCESS")
        try:
            raw = self._layout.parse(va, self._kernel.space.read(*self._layout.span(va)))
        except UnreadableMemory:
            return None
        return raw if raw.key == process.key and not raw.exited else None


def find_foreign(kernel: WindowsKernel, process: GuestProcess) -> tuple[Evidence, ...]:
    """What in this process is foreign. Raises GuestError, and nothing else. Who looks often keeps an `Injection`."""
    return Injection(kernel).find(process)


def _modules(loaded: ModuleList) -> list[Module]:
    """The loaders' modules by base; a WOW64 process's program is known to both of its loaders."""
    found: dict[int, Module] = {}
    for module in loaded.modules:
        old = found.get(module.base)
        had = (old.in_load, old.in_memory, old.in_init) if old else (False, False, False)
        load, memory, init = (now or before for now, before in zip(module.rings, had, strict=True))
        found[module.base] = Module(module.base, module.size, module.name or "?", module.path or "", load, memory, init)
    return list(found.values())


def _place_of(file: MappedFile | None, process: GuestProcess) -> Place:
    if file is not None:
        return file.place
    return parse_place(process.path if isinstance(process.path, str) else process.name)


def _join(earlier: Sequence[Evidence], look: _Look, before: Collection[tuple[str, int]] | None) -> list[Evidence]:
    """What is to be told after one more look: what may pass only if it was there before."""
    found = [
        one for one in look.found if before is None or not look.whole or one.kind not in PASSING or _key(one) in before
    ]
    keys = {_key(one) for one in look.found}
    gone = [one for one in earlier if one.kind != "gap" and one.address and _key(one) not in keys]
    return found + [one for one in gone if not look.whole or one.kind not in PASSING]


def _doubtful(evidence: Evidence) -> Evidence:
    """What may pass weighs less where it could not be looked at twice."""
    return replace(evidence, weight=min(evidence.weight, 1)) if evidence.kind in PASSING else evidence


def _same(was: Vad | None, now: Vad | None) -> bool:
    """Whether two looks saw one region."""
    if was is None or now is None:
        return was is now
    return all(getattr(was, name) == getattr(now, name) for name in ("va", "start", "end", "kind", "control_area"))


def _key(evidence: Evidence) -> tuple[str, int]:
    return evidence.kind, evidence.address


def _gap(what: str, address: int, why: str) -> Evidence:
    return Evidence(f"{what} could not be seen in full: {why}", "gap", address)
