"""One guest under watch: events from its tap into its engine, the engine's commands to its eyes, and the clock.

Runs in a thread of its own. This is the boundary where errors of a guest are caught: they are counted, they may cost
the guest its memory eye, and they never reach another guest.

Where there is a hand, flows wait for it: nothing that takes long is done while events are at hand.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from appliance.engine import Engine
from appliance.errors import GuestGone, HostError, ParasightError
from appliance.messages import (
    AskOther,
    Command,
    Event,
    EvidenceFound,
    GatherEvidence,
    Handle,
    Handled,
    LookedUp,
    LookUp,
    OpinionFound,
    Report,
    SnapshotTaken,
    Tick,
)
from appliance.model import (
    Act,
    Change,
    Decoy,
    Direction,
    Evidence,
    Finding,
    FlowPayload,
    GuestInfo,
    HoldPolicy,
    Match,
    Reason,
    Snapshot,
    Verdict,
)
from appliance.ports import GuestEye, OtherEngine, PacketHand, PacketTap
from appliance.sight import Aside, Sight, at_once
from appliance.summary import Summary

POLL_S = 0.1  # how long a quiet guest is waited for before the engine's timers and the stop flag are looked at
CHECK_NS = 1_000_000_000  # how often a guest is asked for signs of life
MAX_PUT_OFF = 256  # searches that wait: a guest can start processes faster than anybody can look into them
PUT_OFF_NS = 250_000_000  # so long evidence may wait for a moment without events; then its process may be gone
SHOWN_GAPS = 3  # of a first look; the summary counts all
ENDED = "the guest has ended"
AGAIN_NS = tuple(seconds * CHECK_NS for seconds in (5, 20, 60))  # a kernel that boots is looked at again after so long
MAX_HINTS = 64  # that wait; they are about what the loop sees by itself a moment later
_NO_EYE = Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)
_NOT_YET = Finding(Match.NONE, reason=Reason.NO_MEMORY)

Clock = Callable[[], int]
Tell = Callable[[str], None]


class Ports(Protocol):
    """Follows the guest's ports; ``changed``: they are known to be others."""

    def __call__(self, *, changed: bool) -> None:
        """Once a second, and when something is known to have changed."""


Policy = Callable[[str, tuple[str, ...]], HoldPolicy | None]


class GuestWatch:
    """One guest under watch: its tap, its eye (maybe none) and its engine."""

    def __init__(
        self,
        info: GuestInfo,
        tap: PacketTap,
        eye: GuestEye | None,
        engine: Engine,
        report: Callable[[Verdict], object],
        clock: Clock,
        *,
        tell: Tell = lambda line: None,
        runs: Callable[[], bool] = lambda: True,
        reopen: Callable[[], GuestEye | None] = lambda: None,
        glance: Callable[[], GuestEye | None] | None = None,
        looked: Callable[[Snapshot], None] = lambda snapshot: None,
        use: Callable[[GuestEye | None], None] = lambda eye: None,
        aside: Aside = at_once,
        work_s: Callable[[], float] | None = None,
        young: bool = False,
        silent: bool = True,
        other: OtherEngine | None = None,
        hand: PacketHand | None = None,
        hold: HoldPolicy | None = None,
        policy: Policy | None = None,
        decoys: Mapping[str, Decoy] = MappingProxyType({}),
        serve: Callable[[], object] = lambda: None,
        ports: Ports = lambda *, changed: None,
        abandon: Callable[[], None] | None = None,
    ) -> None:
        """``runs`` tells whether the guest still lives, ``reopen`` attaches again, ``looked`` hears of full looks.

        ``glance``, ``aside``, ``work_s``, ``young`` and ``silent`` are those of ``Sight``; ``use`` is given every new
        eye, and None while there is none.
        ``hand`` carries out what the engine decides, ``hold`` tells which new flows wait for it (the engine knows the
        same policy), ``policy`` what that is for another system and other tags. ``decoys`` are the far ends of
        redirects by name. ``serve`` does what others ask of this thread,
        ``ports`` looks whether the guest's ports have changed. ``abandon`` leaves the tap as a dead appliance would:
        for an operator who wants the guest's network to fail closed, also by an error of ours; where nothing is held,
        it is not used. ``other`` is asked for a second opinion.
        """
        self.info, self._tap, self.engine = info, tap, engine
        self._report, self.clock, self._tell = report, clock, tell
        self._runs, self._looked, self._use, self._policy = runs, looked, use, policy
        self._other, self._unanswered = other, 0
        self._hand, self._hold, self._decoys, self._serve, self._ports = hand, hold, decoys, serve, ports
        self._abandon = abandon
        self._had_ports = bool(info.ports)  # what is known of it may say otherwise in the end
        self._turns = 0
        self._later: deque[tuple[GatherEvidence, int]] = deque()  # with the time it was asked for
        self._complained: set[str] = set()
        self._next_check_ns = 0
        self._hints: deque[Change] = deque(maxlen=MAX_HINTS)
        self._news: GuestInfo | None = None
        self._over, self._plugged = "", False
        self._again: deque[int] = deque()  # when a kernel that has just begun is looked at once more
        self.summary = Summary(info.id.target, uuid=info.id.uuid, name=info.id.name)
        self._sight = Sight(
            info.id.target,
            eye,
            reopen,
            clock(),
            tell=tell,
            errors=self.summary.guest_errors,
            aside=aside,
            work_s=work_s,
            young=young,
            silent=silent,
            glance=glance,
            without="watching its packets only" if info.ports else "nothing of it is seen",
            state=info.state,
        )
        self._used = eye

    def run(self, stop: Callable[[], bool]) -> None:
        """Watch until told to stop, or until the tap has nothing more to give."""
        cpu_start_s = time.thread_time()
        try:
            self._seed()
            if self._hand is not None:
                self._hand.hold_new(self._hold)
            while not stop() and not self._tap.exhausted:
                quiet = True
                for event in self._tap.poll(self._wait_s()):
                    quiet = False
                    self._tick(event.at_ns)
                    self.take(event)
                    if isinstance(event, FlowPayload) and event.direction is Direction.OUT:
                        self._sight.heard(event.at_ns)
                self._tick(self.clock())
                self._catch_up(quiet=quiet)
                self._hear()
                self._see()
                self._check()
                self._serve()
                self._turns += 1
            if self._had_ports and not stop():
                raise GuestGone("its ports are gone" if self._runs() else ENDED)
            self._finish()
        except GuestGone as error:  # the boundary: this guest's watch ends, the others go on
            self._end(str(error))
        except ParasightError as error:
            self._end(str(error), failed=True)
        except Exception as error:  # a defect of ours: it must not look like a quiet guest
            self.summary.defect = True
            self._end(f"a defect of Parasight, please report it: {error!r}\n{traceback.format_exc()}", failed=True)
        finally:
            self._sight.close()
            if self._other is not None:
                self._other.close()
                self.summary.opinions["not waited for"] += self._unanswered
            self.summary.opinions += Counter()  # without what counts nothing
            self.summary.cpu_s = time.thread_time() - cpu_start_s

    def count_turns(self) -> int:
        """How often the loop came round: a sign of life."""
        return self._turns

    @property
    def opening(self) -> bool:
        """Its memory is being attached to."""
        return self._sight.opening

    @property
    def enforces(self) -> bool:
        """Whether its rules act: flows wait for them."""
        return self._hold is not None

    @property
    def flows(self) -> int:
        """Flows seen so far."""
        return self._tap.stats().flows

    def _wait_s(self) -> float:
        if self._later:
            return 0.0
        due_ns = self.engine.next_due_ns
        return POLL_S if due_ns is None else min(POLL_S, max(0.0, (due_ns - self.clock()) / 1e9))

    def _tick(self, at_ns: int) -> None:
        due_ns = self.engine.next_due_ns
        if due_ns is not None and due_ns <= at_ns:
            self.take(Tick(at_ns))

    def _catch_up(self, *, quiet: bool) -> None:
        """Do one of the things that were put off, when nobody waits, or when it has waited long enough itself."""
        if quiet and self._again and self.clock() >= self._again[0]:
            self._again.popleft()
            self._seed(again=True)
        if self._later and (quiet or self.clock() - self._later[0][1] >= PUT_OFF_NS):
            self.take(self._find_foreign(self._later.popleft()[0]))

    def _hear(self) -> None:
        """Take what the other engine has found out meanwhile."""
        for opinion in self._other.heard() if self._other is not None else ():
            self._unanswered -= 1
            self.summary.opinions["failed" if opinion.trouble is not None else "answered"] += 1
            if opinion.trouble is not None:
                self._complain("second opinion", f"no second opinion, or not all of it: {opinion.trouble}")
            self.take(OpinionFound(opinion.process, opinion.evidence, self.clock()))

    # -- what is told from outside --

    def hint(self, change: Change) -> None:
        """The hypervisor tells of a change: any thread."""
        self._hints.append(change)

    def renew(self, info: GuestInfo) -> None:
        """What the inventory knows of this life of the guest now: any thread."""
        self._news = info

    def end(self, why: str) -> None:
        """Let the watch end: any thread."""
        self._over = why

    # -- the guest's thread --

    def _see(self) -> None:
        """See to the eye: its kernel may be another one by now."""
        now_ns = self.clock()
        if (news := self._news) is not None:
            self._news = None
            self._learn(news, now_ns)
        while self._hints:
            change = self._hints.popleft()
            if change is Change.DEVICES:
                self._plugged, self._next_check_ns = True, 0
            self._sight.hint(change, now_ns)
        found = self._sight.look(now_ns)
        if self._used is not self._sight.eye:
            self._used = self._sight.eye
            self._use(self._used)
        if found:
            young = self._sight.is_young(now_ns)
            self._again = deque(now_ns + wait_ns for wait_ns in AGAIN_NS) if young else deque()
            self._seed()

    def _learn(self, info: GuestInfo, now_ns: int) -> None:
        """The guest may have other tags, or do something else."""
        tags = self.info.tags
        if info.ports != self.info.ports:
            self._plugged, self._next_check_ns = True, 0
        self.info = info
        self._sight.learn_state(info.state, now_ns)
        if info.tags != tags:
            self.engine.describe(info.tags)
            self._hold_anew()

    def _hold_anew(self) -> None:
        """Which new flows wait depends on the guest's system and tags."""
        if self._policy is None or self._hand is None:
            return
        eye = self._sight.eye
        hold = self._policy(eye.os if eye is not None else "", self.info.tags)
        if hold != self._hold:
            self._hold = hold
            self.engine.hold_new(hold)
            self._hand.hold_new(hold)

    def _check(self) -> None:
        """Once a second: a guest that has ended sends no more packets, and its tap may stay."""
        now_ns = self.clock()
        if self._over:
            raise GuestGone(self._over)
        if 0 < self._next_check_ns - now_ns <= CHECK_NS:  # further away: the host's clock was set back
            return
        self._next_check_ns = now_ns + CHECK_NS
        if not self._runs():
            raise GuestGone(ENDED)
        self._ports(changed=self._plugged)
        self._plugged = False

    def _seed(self, *, again: bool = False) -> None:
        """Learn the processes and the connections that are already open."""
        eye = self._sight.eye
        if eye is not None:
            with self._sight.guard("first look"):
                snapshot = eye.read_snapshot()
                if not self._again:  # else it boots, and will be looked at again
                    self.summary.gaps += len(snapshot.gaps)
                    for gap in snapshot.gaps[:SHOWN_GAPS]:
                        self._tell(f"{self.info.id.target}: not seen: {gap.what}: {gap.why}")
                self._looked(snapshot)
                self.take(SnapshotTaken(snapshot, eye.os, again))
            self._hold_anew()

    def take(self, event: Event) -> None:
        """Feed one event and do what the engine commands, until it asks for nothing more; in the guest's own thread."""
        events: deque[Event] = deque([event])
        while events:
            commands = list(self.engine.feed(events.popleft()))
            events.extend(answer for command in commands if (answer := self._do(command)) is not None)

    def _do(self, command: Command) -> Event | None:
        match command:
            case LookUp(flow):
                finding = _NOT_YET if self._sight.opening else _NO_EYE
                if (eye := self._sight.eye) is not None:
                    finding = Finding(Match.NONE, reason=Reason.TORN)
                    with self._sight.guard("look-up"):
                        finding = eye.find_owner(flow)
                self.summary.torn += finding.torn
                return LookedUp(flow.id, finding, self.clock())
            case Handle(flow_id, act):
                return Handled(flow_id, act, self._handle(command), self.clock())
            case GatherEvidence(flow_id) if self._hand is not None:
                if len(self._later) < MAX_PUT_OFF:
                    self._later.append((command, self.clock()))
                    return None
                self.summary.guest_errors["evidence: too much to look for"] += 1
                return EvidenceFound(flow_id, (), self.clock())
            case GatherEvidence():
                return self._find_foreign(command)
            case AskOther(process):
                eye = self._sight.eye
                if self._other is not None and eye is not None and self._other.ask(eye.os, process):
                    self._unanswered += 1
                    return None
                self.summary.opinions["not asked"] += 1
                return OpinionFound(process.key, (), self.clock())
            case Report(verdict, again):
                if not again:
                    self.summary.count(verdict)
                self._report(verdict)
                return None

    def _find_foreign(self, command: GatherEvidence) -> EvidenceFound:
        evidence: tuple[Evidence, ...] = ()
        if (eye := self._sight.eye) is not None:
            with self._sight.guard("evidence"):
                evidence = eye.find_foreign(command.process)
        return EvidenceFound(command.flow, evidence, self.clock())

    def _handle(self, command: Handle) -> bool | None:
        """Do one act; whether it was done, None where there is no hand. A host that refuses is told of once."""
        if self._hand is None:
            return None
        done = False
        try:
            done = self._act(self._hand, command)
        except HostError as error:
            self._complain(command.act, f"{command.act} was not done: {error}")
        if done:
            self.summary.acts[command.act.value] += 1
        else:
            self.summary.acts_failed += 1
        return done

    def _act(self, hand: PacketHand, command: Handle) -> bool:
        flow, seconds = command.flow, command.seconds
        match command.act:
            case Act.RELEASE:
                return hand.release(flow)
            case Act.BLOCK:
                return hand.block(flow, seconds)
            case Act.RESET:
                return hand.block(flow, seconds, reset=True)
            case Act.HOLD:
                return hand.hold(flow, seconds or 0.0, command.default)
            case Act.REDIRECT:
                decoy = self._decoys.get(command.target or "")
                if decoy is None:
                    why = f"there is no decoy {command.target!r}: what is redirected to it is blocked"
                    self._complain(command.target or "", why)
                return decoy is not None and hand.redirect(flow, decoy)

    def _complain(self, subject: str, why: str) -> None:
        """Say once what keeps the rules from being enforced; the rules bound the number of subjects."""
        if subject not in self._complained:
            self._complained.add(subject)
            self._tell(f"{self.info.id.target}: {why}")

    def _end(self, why: str, *, failed: bool = False) -> None:
        """End the watch of this guest before its time: say so, and judge what its tap still has, unless we failed."""
        self.summary.ended = why
        self._tell(f"{self.info.id.target}: the watch has ended: {why}")
        with contextlib.suppress(Exception):  # the first error is the one to tell
            if failed and self._abandon is not None and self._hold is not None:
                self._abandon()
                self._tell(f"{self.info.id.target}: its network has failed closed; to open it: parasight stop --clean")
                self.summary.tap = self._tap.stats()
            else:
                self._finish()

    def _finish(self) -> None:
        """Judge the flows still open, look for what was put off; take the final counters."""
        self._hand = None  # a tap that is closed holds nothing
        try:
            for event in self._tap.close():
                self.take(event)
            while self._later:
                self._catch_up(quiet=True)
        finally:
            self.summary.tap = self._tap.stats()
