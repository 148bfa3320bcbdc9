"""Threads of one process: where each began, where it runs, what waits to be run in it.

Where a thread began stands in its `_ETHREAD`: StartAddress is mostly ntdll's own beginning of every thread,
Win32StartAddress what its maker asked for; a thread can change the latter, and before Windows Vista messages of LPC
lie over it. Where it entered the kernel stands in its trap frame; what it will return to, on its user stack, where old
words lie as well: a hint and no proof. What will be run in it next, in its queue of user APCs.
Sources: _ETHREAD, _KTHREAD, _KTRAP_FRAME, _KAPC_STATE, _KAPC of ntkrnlmp.pdb; Intel SDM vol. 2 (CALL).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

from appliance.guest.budget import Budget
from appliance.guest.suspects import Suspects
from appliance.guest.windows.injection_bytes import is_call
from appliance.guest.windows.injection_pages import PAGE
from appliance.guest.windows.injection_views import Scene, View
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.record import Record
from appliance.guest.windows.space import AddressSpace
from appliance.guest.windows.threads import RawThread
from appliance.model import Evidence

MAX_TOLD: Final = 32  # threads told of one by one
WAITING: Final = 5  # _KTHREAD_STATE.Waiting
MAX_APCS: Final = 64  # of one thread
MAX_QUEUED: Final = 4096  # of one process
STACK_BYTES: Final = 16 << 10  # of each user stack that are searched
USER_APCS: Final = 1  # _MODE.UserMode: the second list of _KAPC_STATE.ApcListHead


class Place(NamedTuple):
    """Where a thread is, and what it will do."""

    thread: RawThread
    starts: tuple[tuple[str, int], ...]  # where it began in user space, by the name of the member that says so
    rip: int  # 0: not known; it runs, or it is the kernel's
    rsp: int
    routines: tuple[int, ...]  # of its waiting user APCs, and their first arguments


class ThreadReader:
    """Reads what the walk over threads does not."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel, types = kernel, kernel.types
        self._size = kernel.pointer_size
        self._more = (
            Record(types, "_ETHREAD", ("Tcb.TrapFrame?", "Tcb.ApcState.ApcListHead?"))
            if types.has("_KTHREAD.TrapFrame") or types.has("_KAPC_STATE.ApcListHead")
            else None
        )
        names = ("Rip?", "Eip?", "Rsp?", "HardwareEsp?", "SegCs?")
        known = types.has("_KTRAP_FRAME.Rip") or types.has("_KTRAP_FRAME.Eip")
        self._frame = Record(types, "_KTRAP_FRAME", names) if known else None
        apc = types.has("_KAPC.ApcListEntry") and types.has("_KAPC.NormalRoutine")
        self._apc = (
            Record(types, "_KAPC", ("ApcListEntry.Flink", "NormalRoutine", "NormalContext?", "SystemArgument1?"))
            if apc
            else None
        )
        self._apc_link = types.offset("_KAPC.ApcListEntry") if apc else 0
        self._left = MAX_QUEUED
        lists = types.has("_KAPC_STATE.ApcListHead")
        self._lists = types.offset("_ETHREAD.Tcb.ApcState.ApcListHead") if lists else 0

    def read(self, threads: Sequence[RawThread], cut: list[str]) -> list[Place]:
        """Where threads are, as far as this kernel's types let it be known; what is left out is told in ``cut``."""
        more, space = self._more, self._kernel.space
        self._left = MAX_QUEUED
        if more is None:
            return [Place(thread, self._starts(thread), 0, 0, ()) for thread in threads]
        raws = space.readv([more.span(thread.va) for thread in threads])
        parsed = [more.parse(raw) if raw else (0, 0) for raw in raws]
        # Of a thread that waits, the frame is the one of its system call; else it may be what is left of an older one.
        waits = [thread.state == WAITING for thread in threads]
        frames = self._frames([frame if wait else 0 for (frame, _), wait in zip(parsed, waits, strict=True)])
        places = [
            Place(thread, self._starts(thread), *frame, self._apcs(thread, lists))
            for thread, frame, (_, lists) in zip(threads, frames, parsed, strict=True)
        ]
        if not self._left:
            cut.append(f"what waits to be run in threads, after the first {MAX_QUEUED}")
        return places

    def _starts(self, thread: RawThread) -> tuple[tuple[str, int], ...]:
        """Threads of the kernel work in processes, too: of csrss and of minimal ones, for instance."""
        words = ("Win32StartAddress", thread.win32_start), ("StartAddress", thread.start)
        return tuple((word, address) for word, address in words if address and not self._kernel.is_kernel(address))

    def _frames(self, vas: Sequence[int]) -> list[tuple[int, int]]:
        """Instruction and stack pointer in each trap frame, 0 where it is none of user space."""
        record = self._frame
        if record is None:
            return [(0, 0)] * len(vas)
        fits = [self._kernel.is_kernel(va) for va in vas]
        raws = iter(self._kernel.space.readv([record.span(va) for va, fit in zip(vas, fits, strict=True) if fit]))
        found = []
        for fit in fits:
            raw = next(raws) if fit else None
            rip, eip, rsp, esp, cs = record.parse(raw) if raw else (0, 0, 0, 0, 0)
            ip, sp = rip or eip, rsp or esp
            user = cs & 3 == 3 and not self._kernel.is_kernel(ip) and not self._kernel.is_kernel(sp)
            found.append((ip, sp) if user else (0, 0))
        return found

    def _apcs(self, thread: RawThread, lists: object) -> tuple[int, ...]:
        record, size = self._apc, self._size
        if record is None or not isinstance(lists, bytes) or len(lists) < 4 * size:
            return ()
        head = thread.va + self._lists + 2 * size * USER_APCS
        node = int.from_bytes(lists[2 * size : 3 * size], "little")
        found: list[int] = []
        seen: set[int] = set()
        while node != head and node not in seen and len(seen) < MAX_APCS and self._kernel.is_kernel(node):
            if not self._left:
                break
            self._left -= 1
            seen.add(node)
            raw = self._kernel.space.readv([record.span(node - self._apc_link)])[0]
            if raw is None:
                break
            node, *routines = record.parse(raw)
            found += routines
        return tuple(routine for routine in found if routine)


def judge_threads(
    places: Sequence[Place], scene: Scene, suspects: Suspects, space: AddressSpace, budget: Budget
) -> Iterator[Evidence]:
    """Threads that began, run or will go on where no thread should; the same of what waits to be run in them."""
    found = _judge_all(places, scene, suspects, space, budget)
    for number, evidence in enumerate(sorted(found, key=lambda one: -one.weight)):
        if number == MAX_TOLD:
            claim = f"more than {MAX_TOLD} threads have to do with foreign code; the others are not told"
            yield Evidence(claim, "foreign-thread", weight=evidence.weight)
            return
        yield evidence


def _judge_all(
    places: Sequence[Place], scene: Scene, suspects: Suspects, space: AddressSpace, budget: Budget
) -> Iterator[Evidence]:
    for number, place in enumerate(places):
        if budget.over:
            budget.cut_off(f"{len(places) - number} of {len(places)} threads")
            return
        budget.spend(1)
        evidence = _begun(place, scene, suspects) or _running(place, scene, suspects) or _queued(place, scene, suspects)
        if evidence is None and suspects and place.rsp:
            evidence = _returning(place, scene, suspects, space)
        if evidence is not None:
            yield evidence


def _begun(place: Place, scene: Scene, suspects: Suspects) -> Evidence | None:
    """Where it began. The heaviest of its two beginnings counts; only where neither is mapped, that counts."""
    found: list[Evidence] = []
    for _, address in place.starts:
        hit, view = suspects.at(address), scene.at(address)
        if hit is not None:
            found.append(_evidence(f"{_who(place)} began in {hit.what}", place, address, 2))
        elif view is None:
            continue
        elif not view.image:
            weight = 2 if view.executable else 1
            found.append(_evidence(f"{_who(place)} began in {_region(view)}", place, address, weight))
        elif scene.modules and scene.lists_whole and not scene.is_listed(view):
            name = view.file.path if view.file else view.name
            found.append(_evidence(f"{_who(place)} began in {name}, which the loader does not know", place, address, 2))
    if place.starts and all(scene.at(address) is None for _, address in place.starts):
        address = place.starts[0][1]
        claim = f"{_who(place)} began at {address:#x}, where nothing is mapped any more"
        found.append(_evidence(claim, place, address, 1))
    return max(found, key=lambda one: one.weight, default=None)


def _running(place: Place, scene: Scene, suspects: Suspects) -> Evidence | None:
    if not place.rip:
        return None
    hit, view = suspects.at(place.rip), scene.at(place.rip)
    if hit is not None:
        if hit.weight < 2 and scene.runtime is not None:
            return None  # code that a JIT made does run
        return _evidence(f"{_who(place)} runs in {hit.what}", place, place.rip, 2)
    if view is None:
        return _evidence(f"{_who(place)} runs where nothing is mapped", place, place.rip, 2)
    if not view.image:
        return _evidence(f"{_who(place)} runs in {_region(view)}", place, place.rip, 2)
    return None


def _queued(place: Place, scene: Scene, suspects: Suspects) -> Evidence | None:
    for routine in place.routines:
        hit, view = suspects.at(routine), scene.at(routine)
        if hit is not None and hit.weight < 2 and scene.runtime is not None:
            continue  # code that a JIT made is called back
        if hit is not None or (view is not None and not view.image and view.executable):
            what = hit.what if hit is not None else _region(view) if view is not None else ""
            return _evidence(f"an APC waits to run {what} in {_who(place)}", place, routine, 2)
    return None


def _returning(place: Place, scene: Scene, suspects: Suspects, space: AddressSpace) -> Evidence | None:
    """The first word on its stack that is an address in a suspect range behind a call, and where it lies."""
    size = space_bytes(scene)
    start = place.rsp + size - 1 & -size
    view = scene.at(start)
    if view is None:
        return None
    edges = [start, *range((start & -PAGE) + PAGE, min(view.end, start + STACK_BYTES), PAGE)]
    ends = [*edges[1:], min(view.end, start + STACK_BYTES)]
    spans = [(low, high - low) for low, high in zip(edges, ends, strict=True)]
    for (low, _), raw in zip(spans, space.readv(spans), strict=True):
        if raw is None:
            continue
        words = Struct(f"<{len(raw) // size}{'Q' if size == 8 else 'I'}").unpack(raw[: len(raw) // size * size])
        for number, word in enumerate(words):
            hit = suspects.at(word)
            if hit is None or hit.weight < 2:
                continue
            before = space.readv([(word - 7, 7)])[0]
            if before is not None and is_call(before):
                claim = f"the stack of {_who(place)} holds a return address into {hit.what}"
                return _evidence(claim, place, low + size * number, 1)
    return None


def space_bytes(scene: Scene) -> int:
    """Bytes of a word of the process."""
    return scene.bits // 8


def _who(place: Place) -> str:
    return f"thread {place.thread.tid}"


def _region(view: View) -> str:
    what = f"data file {view.file.path}" if view.file else "memory of no image"
    return f"{view.protection} {what} at {view.start:#x}"


def _evidence(claim: str, place: Place, address: int, weight: int) -> Evidence:
    thread = place.thread
    rip = f"{place.rip:#x}" if place.rip else "?"
    detail = (
        f"thread {thread.tid}; rip {rip}; StartAddress {thread.start:#x}; Win32StartAddress {thread.win32_start:#x}"
        + f"; suspended {thread.suspended} times" * (thread.suspended > 0)
    )
    return Evidence(claim, "foreign-thread", address, 0, None, detail, weight)
