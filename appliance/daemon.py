"""The shell around the engine: opens the eyes of each guest, carries out the engine's commands, keeps the clock.

One thread per guest, so that a guest which is slow, torn or gone never holds up another. The only place, with the
command line, that knows every room.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue

from appliance.engine import (
    Command,
    Engine,
    Event,
    EvidenceFound,
    GatherEvidence,
    Judge,
    LookedUp,
    LookUp,
    Report,
    SnapshotTaken,
    Tick,
)
from appliance.errors import GuestError, GuestGone, HostError, ParasightError, UsageError
from appliance.flow.names import Names
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.hosts.qemu import is_running
from appliance.hosts.targets import resolve
from appliance.memory.file import open_file
from appliance.memory.qemu import open_qemu
from appliance.model import Evidence, Finding, GuestInfo, Match, Reason, TapStats, Verdict
from appliance.ports import GuestEye, GuestMemory, PacketTap
from appliance.tap.af_packet import PortSource
from appliance.tap.merged import MergedSource
from appliance.tap.pcap import PcapSource

MAX_QUEUED = 100_000  # verdicts between the guests' threads and their reader
SWITCH_S = 0.0005  # a guest's thread must not wait 5 ms, Python's default, while a verdict is printed
CHECK_NS = 1_000_000_000  # how often a guest is asked for its life
POLL_S = 0.1  # how long a quiet guest is waited for before the engine's timers and the stop flag are looked at
_NO_EYE = Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)

Clock = Callable[[], int]
Tell = Callable[[str], None]


@dataclass(slots=True)
class Summary:
    """What one watch has seen and cost. Every loss is a figure here."""

    vm: str
    tap: TapStats = field(default_factory=TapStats)
    bound: Counter[str] = field(default_factory=Counter)
    unbound: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    guest_errors: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    unshown: int = 0  # verdicts dropped because their reader was too slow
    ended: str = ""  # why the watch of this guest ended early; "" when it did not

    def count(self, verdict: Verdict) -> None:
        """Count one judged flow by how it was bound and what was decided."""
        binding = verdict.binding
        if binding.match is Match.NONE:
            self.unbound[(binding.reason or Reason.LATE).value] += 1
        else:
            self.bound[binding.match.value] += 1
        self.verdicts[verdict.judgement.decision.value] += 1


class GuestWatch:
    """One guest under watch: its tap, its eye (maybe none) and its engine."""

    def __init__(
        self,
        info: GuestInfo,
        tap: PacketTap,
        eye: GuestEye | None,
        engine: Engine,
        report: Callable[[Verdict], None],
        clock: Clock,
        *,
        tell: Tell = lambda line: None,
        runs: Callable[[], bool] = lambda: True,
    ) -> None:
        self.info, self._tap, self._eye, self._engine = info, tap, eye, engine
        self._report, self._clock, self._tell, self._runs = report, clock, tell, runs
        self._next_check_ns = 0
        self.summary = Summary(info.id.target)

    def run(self, stop: Callable[[], bool]) -> None:
        """Watch until told to stop, or until the tap has nothing more to give."""
        cpu_start_s = time.thread_time()
        try:
            self._seed()
            while not stop() and not self._tap.exhausted:
                for event in self._tap.poll(self._wait_s()):
                    self._tick(event.at_ns)
                    self._carry_out(event)
                self._tick(self._clock())
                self._check_runs()
        except ParasightError as error:  # the boundary: this guest's watch ends, the others go on
            self.summary.ended = str(error)
            self._tell(f"{self.info.id.target}: the watch has ended: {error}")
        finally:
            self._finish()
            self.summary.cpu_s = time.thread_time() - cpu_start_s

    def _wait_s(self) -> float:
        due_ns = self._engine.next_due_ns
        return POLL_S if due_ns is None else min(POLL_S, max(0.0, (due_ns - self._clock()) / 1e9))

    def _tick(self, at_ns: int) -> None:
        due_ns = self._engine.next_due_ns
        if due_ns is not None and due_ns <= at_ns:
            self._carry_out(Tick(at_ns))

    def _check_runs(self) -> None:
        """Once a second: a guest that has ended sends no more packets, and its tap may stay."""
        if self._clock() >= self._next_check_ns:
            self._next_check_ns = self._clock() + CHECK_NS
            if not self._runs():
                raise GuestGone("the guest has ended")

    def _seed(self) -> None:
        """Learn the processes and the connections that are already open."""
        if self._eye is not None:
            with self._guest_errors("first look"):
                self._carry_out(SnapshotTaken(self._eye.read_snapshot()))

    def _carry_out(self, event: Event) -> None:
        """Feed one event and do what the engine commands, until it asks for nothing more."""
        events: deque[Event] = deque([event])
        while events:
            commands = list(self._engine.feed(events.popleft()))
            events.extend(answer for command in commands if (answer := self._do(command)) is not None)

    def _do(self, command: Command) -> Event | None:
        match command:
            case LookUp(flow):
                finding = _NO_EYE
                if self._eye is not None:
                    finding = Finding(Match.NONE, reason=Reason.TORN)
                    with self._guest_errors("look-up"):
                        finding = self._eye.find_owner(flow)
                self.summary.torn += finding.torn
                return LookedUp(flow.id, finding, self._clock())
            case GatherEvidence(flow_id, process):
                evidence: tuple[Evidence, ...] = ()
                if self._eye is not None:
                    with self._guest_errors("evidence"):
                        evidence = self._eye.find_foreign(process)
                return EvidenceFound(flow_id, evidence, self._clock())
            case Report(verdict):
                self.summary.count(verdict)
                self._report(verdict)
                return None

    @contextlib.contextmanager
    def _guest_errors(self, what: str) -> Iterator[None]:
        """Count what the guest does to us; a guest that is gone takes its eye with it, nothing else."""
        try:
            yield
        except GuestGone as error:
            self.summary.guest_errors["gone"] += 1
            self._tell(f"{self.info.id.target}: {error}; watching its packets only")
            self._eye = None
        except GuestError as error:
            self.summary.guest_errors[f"{what}: {type(error).__name__}"] += 1

    def _finish(self) -> None:
        for event in self._tap.close():
            self._carry_out(event)
        self.summary.tap = self._tap.stats()
        if self._eye is not None:
            self._eye.close()


def open_eye(info: GuestInfo, *, registers: bool = False) -> GuestEye:
    """Attach to a guest's memory. Raises GuestError, HostError or UsageError with what to do."""
    target = info.id.target
    memory: GuestMemory
    if target.startswith("file:"):
        memory = open_file(Path(target.removeprefix("file:")))
    elif info.pid is not None:
        memory = open_qemu(info.pid)
    else:
        raise UsageError(f"{target} has no memory to read: only its packets can be watched")
    try:
        vcpus = memory.vcpus() if registers else ()
        return LinuxEye(attach(memory, cr3=vcpus[0].cr3 if vcpus else None))
    except BaseException:
        memory.close()
        raise


def watch(
    targets: list[str],
    judge: Judge,
    report: Callable[[Verdict], None],
    *,
    stop: threading.Event,
    ready: Callable[[], None],
    tell: Tell,
    until: float | None = None,
) -> list[Summary]:
    """Watch running guests until ``stop`` is set or the monotonic time ``until`` has come.

    ``report`` is called in the caller's thread, ``ready`` once every tap sees packets, ``tell`` with one line for a
    person. Raises UsageError or HostError when a target cannot be watched at all from the start.
    """
    sys.setswitchinterval(SWITCH_S)
    queue: Queue[Verdict] = Queue(MAX_QUEUED)
    dropped = Counter[str]()

    def offer(verdict: Verdict) -> None:
        try:
            queue.put_nowait(verdict)
        except Full:
            dropped[verdict.flow.id.vm.target] += 1

    def stopping() -> bool:
        return stop.is_set() or (until is not None and time.monotonic() >= until)

    watches: list[GuestWatch] = []
    try:
        watches.extend(_open_watch(resolve(target), judge, offer, tell) for target in targets)
    except BaseException:
        for one in watches:
            one.run(lambda: True)
        raise
    threads = [threading.Thread(target=one.run, args=(stopping,), name=one.info.id.target) for one in watches]
    for thread in threads:
        thread.start()
    ready()
    while any(thread.is_alive() for thread in threads) or not queue.empty():
        with contextlib.suppress(Empty):
            report(queue.get(timeout=POLL_S))
    for one in watches:
        one.summary.unshown = dropped[one.info.id.target]
    return [one.summary for one in watches]


def replay(
    pcap: Path,
    memory: Path | None,
    judge: Judge,
    report: Callable[[Verdict], None],
    *,
    tell: Tell,
    local: frozenset[str],
) -> Summary:
    """Judge a capture against a memory image. Time is the capture's own, so the same input gives the same verdicts."""
    info = resolve(f"file:{memory or pcap}")
    source = PcapSource(pcap, local=local or None)
    eye = _open_eye_or_say(info, tell) if memory else None
    table = FlowTable(info.id)
    tap = TrackedTap(info.id, source, table)
    watcher = GuestWatch(info, tap, eye, _engine(judge, eye), report, lambda: table.now_ns, tell=tell)
    watcher.run(lambda: False)
    if source.truncation is not None:
        watcher.summary.ended = str(source.truncation)
    return watcher.summary


def _open_watch(info: GuestInfo, judge: Judge, offer: Callable[[Verdict], None], tell: Tell) -> GuestWatch:
    """Open both eyes on a live guest; the packet eye alone where the memory cannot be read."""
    if not info.ports:
        raise HostError(f"{info.id.target} has no port to watch: {'; '.join(info.notes) or 'no network card'}")
    for note in info.notes:
        tell(f"{info.id.target}: {note}")
    eye = _open_eye_or_say(info, tell) if info.pid is not None else None
    try:
        macs = [port.mac for port in info.ports if port.mac]
        tap = TrackedTap(
            info.id, MergedSource([PortSource(port) for port in info.ports]), FlowTable(info.id, macs), time.time_ns
        )
    except BaseException:
        if eye is not None:
            eye.close()
        raise
    runs = partial(is_running, info) if info.pid is not None else lambda: True
    return GuestWatch(info, tap, eye, _engine(judge, eye), offer, time.time_ns, tell=tell, runs=runs)


def _open_eye_or_say(info: GuestInfo, tell: Tell) -> GuestEye | None:
    start_s = time.monotonic()
    try:
        eye = open_eye(info)
    except GuestError as error:
        tell(f"{info.id.target}: {error}; watching its packets only")
        return None
    tell(f"{info.id.target}: {eye.describe}, attached in {time.monotonic() - start_s:.2f} s")
    return eye


def _engine(judge: Judge, eye: GuestEye | None) -> Engine:
    return Engine(judge, Names(), os="linux" if eye is not None else "")
