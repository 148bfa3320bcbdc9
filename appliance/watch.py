"""One guest under watch: events from its tap into its engine, the engine's commands to its eyes, and the clock.

Runs in a thread of its own. This is the boundary where errors of a guest are caught: they are counted, they may cost
the guest its memory eye, and they never reach another guest.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from appliance.engine import (
    Command,
    Engine,
    Event,
    EvidenceFound,
    GatherEvidence,
    LookedUp,
    LookUp,
    Report,
    SnapshotTaken,
    Tick,
)
from appliance.errors import GuestError, GuestGone, ParasightError
from appliance.model import (
    Direction,
    Evidence,
    Finding,
    FlowPayload,
    GuestInfo,
    Match,
    Reason,
    Snapshot,
    TapStats,
    Verdict,
)
from appliance.ports import GuestEye, PacketTap

POLL_S = 0.1  # how long a quiet guest is waited for before the engine's timers and the stop flag are looked at
CHECK_NS = 1_000_000_000  # how often a guest is asked for signs of life
STILL_NS = 10 * CHECK_NS  # a kernel that does not tick for so long is paused, or is not the running one any more
RETRY_NS = 2 * CHECK_NS  # first pause before another try to attach; doubled with each failure
MAX_RETRY_NS = 300 * CHECK_NS
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
    gaps: int = 0  # what the full looks could not see
    guest_errors: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    unshown: int = 0  # verdicts dropped because their reader was too slow
    defect: bool = False  # it ended by an error of ours
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
        reopen: Callable[[], GuestEye | None] = lambda: None,
        looked: Callable[[Snapshot], None] = lambda snapshot: None,
    ) -> None:
        """``runs`` tells whether the guest still lives, ``reopen`` attaches again, ``looked`` hears of full looks."""
        self.info, self._tap, self._eye, self._engine = info, tap, eye, engine
        self._report, self._clock, self._tell = report, clock, tell
        self._runs, self._reopen, self._looked = runs, reopen, looked
        self._next_check_ns = 0
        self._pulse, self._beat_ns, self._spoke_ns, self._still_ns = -1, 0, 0, STILL_NS
        self._retry_ns, self._next_try_ns = RETRY_NS, clock() + RETRY_NS
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
                    if isinstance(event, FlowPayload) and event.direction is Direction.OUT:
                        self._spoke_ns = event.at_ns
                self._tick(self._clock())
                self._check()
            if self.info.ports and not stop():
                raise GuestGone("its ports are gone")
            self._finish()
        except ParasightError as error:  # the boundary: this guest's watch ends, the others go on
            self._end(str(error))
        except Exception as error:  # a defect of ours: it must not look like a quiet guest
            self.summary.defect = True
            self._end(f"a defect of Parasight, please report it: {error!r}\n{traceback.format_exc()}")
        finally:
            self._drop_eye()
            self.summary.cpu_s = time.thread_time() - cpu_start_s

    def _wait_s(self) -> float:
        due_ns = self._engine.next_due_ns
        return POLL_S if due_ns is None else min(POLL_S, max(0.0, (due_ns - self._clock()) / 1e9))

    def _tick(self, at_ns: int) -> None:
        due_ns = self._engine.next_due_ns
        if due_ns is not None and due_ns <= at_ns:
            self._carry_out(Tick(at_ns))

    def _check(self) -> None:
        """Once a second: a guest that has ended sends no more packets, and its tap may stay; a kernel may restart."""
        now_ns = self._clock()
        if now_ns < self._next_check_ns:
            return
        self._next_check_ns = now_ns + CHECK_NS
        if not self._runs():
            raise GuestGone("the guest has ended")
        if self._eye is None:
            if now_ns >= self._next_try_ns:
                self._adopt(self._reopen(), now_ns)
        elif self._eye.live:
            self._check_pulse(self._eye, now_ns)

    def _check_pulse(self, eye: GuestEye, now_ns: int) -> None:
        """A kernel that does not tick any more is paused, or was replaced by a reboot: attach once more to learn which.

        A paused guest sends nothing, so one that does is waited for less.
        """
        pulse = self._pulse
        with self._guest_errors("pulse"):
            pulse = eye.read_pulse()
        if pulse != self._pulse:
            self._pulse, self._beat_ns, self._still_ns = pulse, now_ns, STILL_NS
            return
        speaks = self._spoke_ns - self._beat_ns > CHECK_NS
        if now_ns - self._beat_ns <= (2 * CHECK_NS if speaks else self._still_ns):
            return
        fresh = self._reopen()
        if fresh is not None and fresh.read_pulse() == self._pulse:  # the same kernel: the guest is paused
            fresh.close()
            self._still_ns = min(2 * self._still_ns, MAX_RETRY_NS)
            return
        self._drop_eye()
        self._tell(f"{self.info.id.target}: its kernel does not run any more")
        self._adopt(fresh, now_ns)

    def _adopt(self, eye: GuestEye | None, now_ns: int) -> None:
        self._eye = eye
        if eye is None:
            self._retry_ns = min(2 * self._retry_ns, MAX_RETRY_NS)
            self._next_try_ns = now_ns + self._retry_ns
            return
        self._tell(f"{self.info.id.target}: {eye.describe}, attached again")
        self._retry_ns, self._still_ns, self._beat_ns, self._pulse = RETRY_NS, STILL_NS, now_ns, -1
        self._seed()

    def _drop_eye(self) -> None:
        if self._eye is not None:
            self._eye.close()
            self._eye = None

    def _seed(self) -> None:
        """Learn the processes and the connections that are already open."""
        if self._eye is not None:
            with self._guest_errors("first look"):
                snapshot = self._eye.read_snapshot()
                self.summary.gaps += len(snapshot.gaps)
                self._looked(snapshot)
                self._carry_out(SnapshotTaken(snapshot, self._eye.os))

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
            self._drop_eye()
        except GuestError as error:
            self.summary.guest_errors[f"{what}: {type(error).__name__}"] += 1

    def _end(self, why: str) -> None:
        """End the watch of this guest before its time: what its tap still has is judged, then it is said."""
        self.summary.ended = why
        self._tell(f"{self.info.id.target}: the watch has ended: {why}")
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self._finish()

    def _finish(self) -> None:
        """Judge the flows still open; take the final counters."""
        try:
            for event in self._tap.close():
                self._carry_out(event)
        finally:
            self.summary.tap = self._tap.stats()
