"""The whole appliance on one page: events in, commands out. No I/O, no clock, no randomness.

    FlowStarted ──▶ LookUp ──▶ LookedUp ──▶ (ask again) ──▶ add the process, then judge ──▶ (Handle ──▶ Handled)
                                                                                                    │
                            Report ◀── (GatherEvidence ──▶ EvidenceFound, where it is suspect) ◀─────┘
                               └─▶ (AskOther ──▶ OpinionFound ──▶ Report, again)

One engine serves one guest. Time comes with each event, so that replay equals live (P10: add, then judge).

A flow that waits in the host gets exactly one act that ends its waiting, before anything else is done about it. An
incoming one is let in if its listener may have it, and judged by the process that accepts it. When the time is nearly
up and nobody is known to own it, the policy for flows without a process decides; if that lets it go, it is judged by
its further life, like a flow that was never held.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from enum import IntEnum
from ipaddress import IPv6Address
from typing import Protocol

from appliance.acting import LEAD_NS, Acts, Doing
from appliance.bind import Case, Forgeries, concealed, forged, next_look_ns, tie
from appliance.messages import (
    Command,
    Decided,
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
    Binding,
    Decision,
    Direction,
    Endpoint,
    Evidence,
    Finding,
    FiveTuple,
    Flag,
    Flow,
    FlowEnded,
    FlowId,
    FlowPayload,
    FlowStarted,
    GuestProcess,
    HoldPolicy,
    IpAddress,
    Judgement,
    Match,
    Owner,
    ProcessKey,
    Severity,
    Snapshot,
    Verdict,
)
from appliance.opinions import Opinions
from appliance.rules.match import Subject, louder

MAX_PROCESSES = 65_536  # of the process queue: twice a default pid_max
MAX_REMEMBERED = 65_536  # tuples whose owners an earlier look has seen
MAX_RECORDS = 262_144  # open flows in the record queue
EVIDENCE_FRESH_NS = 10_000_000_000  # foreign code is looked for at most once in this time for one process


class Judge(Protocol):
    """The rules, as the engine needs them."""

    @property
    def version(self) -> str:
        """Version of everything that is loaded."""
        ...

    def judge(self, subject: Subject) -> Judgement:
        """Decide on one flow. Pure."""
        ...


class Names(Protocol):
    """The DNS answers this guest has received."""

    def observe(self, payload: FlowPayload, flow: Flow) -> None:
        """Learn from one payload."""
        ...

    def names_of(self, ip: IpAddress, at_ns: int) -> tuple[str, ...]:
        """Names by which the guest knows an address at that time."""
        ...


class Alarm(IntEnum):
    """What a point in time is for."""

    LOOK = 0  # ask again who owns a flow
    OVERDUE = 1  # the hold of a new flow is about to end
    UNANSWERED = 2  # nobody has decided on a flow that is held for a person


class Engine:
    """Judges every flow of one guest."""

    def __init__(
        self,
        judge: Judge,
        names: Names,
        *,
        tags: tuple[str, ...] = (),
        hold: HoldPolicy | None = None,
        other: bool = False,
    ) -> None:
        """``hold`` is the policy by which the tap holds new flows, if it does; ``other``: AskOther will be answered."""
        self._judge = judge
        self._names = names
        self._os, self._tags = "", tags
        self._cases: dict[FlowId, Case] = {}
        self._pending: dict[FlowId, Verdict] = {}  # whose evidence is sought
        self._sought: dict[ProcessKey, list[FlowId]] = {}  # one search for all flows of a process
        self._opinions = Opinions(wanted=other)
        self._acts = Acts(hold or HoldPolicy())
        self._due: list[tuple[int, int, Alarm, FlowId]] = []
        self._forgeries = Forgeries()
        self._remembered: dict[FiveTuple, tuple[Owner, ...]] = {}
        self._evidence: OrderedDict[ProcessKey, tuple[int, tuple[Evidence, ...]]] = OrderedDict()
        self._by_pid: dict[int, GuestProcess] = {}
        self.processes: OrderedDict[ProcessKey, GuestProcess] = OrderedDict()
        self.records: OrderedDict[FlowId, Verdict] = OrderedDict()
        self.waiting = self._acts.waiting  # for a person

    def describe(self, tags: tuple[str, ...]) -> None:
        """What its operator calls this guest from now on."""
        self._tags = tags

    def hold_new(self, hold: HoldPolicy | None) -> None:
        """The tap holds new flows by another policy from now on."""
        self._acts.hold = hold or HoldPolicy()

    @property
    def next_due_ns(self) -> int | None:
        """When a Tick is wanted; None: nothing waits."""
        return self._due[0][0] if self._due else None

    def feed(self, event: Event) -> Iterator[Command]:
        """Take one event; yield what is to be done, in order."""
        match event:
            case FlowStarted(flow, at_ns, held):
                yield from self._started(flow, at_ns, held=held)
            case LookedUp(flow_id, finding, at_ns):
                yield from self._answered(flow_id, finding, at_ns)
            case Handled():
                yield from self._handled(event)
            case FlowPayload():
                yield from self._payload(event)
            case FlowEnded(flow_id, _, _, at_ns):
                yield from self._ended(flow_id, at_ns)
            case EvidenceFound(flow_id, evidence, at_ns):
                yield from self._evidenced(flow_id, evidence, at_ns)
            case OpinionFound():
                for verdict in self._opinions.hear(event):
                    yield from self._report(verdict, again=True)
            case Decided(flow_id, allow, who, at_ns):
                yield from self._decided(flow_id, allow, who)
            case SnapshotTaken(snapshot, os, again):
                self._os = os
                if not again:
                    self._start_afresh()
                self._seed(snapshot)
            case Tick(at_ns):
                while self._due and self._due[0][0] <= at_ns:
                    due_ns, _, alarm, flow_id = heapq.heappop(self._due)
                    yield from self._woken(alarm, flow_id, due_ns, at_ns)

    def _woken(self, alarm: Alarm, flow_id: FlowId, due_ns: int, at_ns: int) -> Iterator[Command]:
        if alarm is Alarm.UNANSWERED:
            yield from self._decided(flow_id, None)
            return
        case = self._cases.get(flow_id)
        if case is None or case.judged:
            return
        if alarm is Alarm.OVERDUE:
            if case.held:
                yield from self._answer(case, at_ns)
        elif case.due_ns == due_ns:  # else another time was set since
            case.retries, case.due_ns = case.retries + 1, 0
            if not case.looking:  # else the answer under way sets the next time
                yield from self._look(case, at_ns, on_packet=False)

    # -- binding --

    def _started(self, flow: Flow, at_ns: int, *, held: bool) -> Iterator[Command]:
        case = self._cases[flow.id] = Case(flow)
        if held:
            hold_ns = round(self._acts.hold.deadline_s * 1e9)
            case.held, case.deadline_ns = True, flow.started_ns + hold_ns
            self._wake(case.deadline_ns - min(LEAD_NS, hold_ns // 4), flow.id, Alarm.OVERDUE)
        if not flow.midstream:
            self._remembered.pop(flow.tuple, None)  # the tuple belongs to another connection from now on
        yield from self._look(case, at_ns, on_packet=flow.direction is Direction.OUT)

    def _wake(self, at_ns: int, flow_id: FlowId, alarm: Alarm) -> None:
        heapq.heappush(self._due, (at_ns, flow_id.number, alarm, flow_id))

    def _look(self, case: Case, at_ns: int, *, on_packet: bool) -> Iterator[Command]:
        case.looking, case.asked_ns, case.on_packet = True, at_ns, on_packet
        yield LookUp(case.flow)

    def _answered(self, flow_id: FlowId, finding: Finding, at_ns: int) -> Iterator[Command]:
        case = self._cases.get(flow_id)
        if case is None or case.judged:
            return
        case.looking = False
        case.learn(finding, at_ns)
        yield from self._go_on(case, at_ns)

    def _go_on(self, case: Case, at_ns: int) -> Iterator[Command]:
        """Judge a flow of which all is known that can be, or set the time of the next look."""
        again_ns = next_look_ns(case)
        if again_ns is None and case.held and case.best and case.best.match is Match.LISTENER:
            yield from self._answer(case, at_ns)  # who accepts it will show when it is let in
        elif again_ns is None:
            yield from self._judge_case(case, at_ns)
            if case.ended:
                self._forget(case.flow.id)
        elif case.due_ns != again_ns:
            case.due_ns = again_ns
            self._wake(again_ns, case.flow.id, Alarm.LOOK)

    def _answer(self, case: Case, at_ns: int) -> Iterator[Command]:
        """No more can be known while it waits: by what is known it is stopped for good, or let go and followed."""
        judgement = self._judgement(case.flow, tie(case), at_ns)
        order = self._acts.order(case, judgement, at_ns)
        if order is None or order.act is not Act.RELEASE:
            yield from self._judge_case(case, at_ns)
            if case.ended:
                self._forget(case.flow.id)
            return
        yield self._acts.begin(Doing(case.flow, order, judgement.ask, True, case.flow.started_ns))
        case.release(at_ns)
        if not case.looking:
            yield from self._go_on(case, at_ns)

    def _payload(self, event: FlowPayload) -> Iterator[Command]:
        case = self._cases.get(event.flow)
        if case is None:
            return
        self._names.observe(event, case.flow)
        outgoing = event.direction is Direction.OUT
        case.sent += outgoing
        case.received += not outgoing
        # What the guest just sent, a socket holds now: the best moment to find the process that accepted it.
        if outgoing and not case.judged and not case.looking and event.at_ns > case.asked_ns:
            yield from self._look(case, event.at_ns, on_packet=True)

    def _ended(self, flow_id: FlowId, at_ns: int) -> Iterator[Command]:
        case = self._cases.get(flow_id)
        if case is not None:
            case.ended = True
            if case.judged or not case.looking:  # else the answer under way ends it
                if not case.judged:
                    yield from self._judge_case(case, at_ns)
                self._forget(flow_id)
            self._remembered.pop(case.flow.tuple, None)
        self.records.pop(flow_id, None)
        self.waiting.pop(flow_id, None)

    def _forget(self, flow_id: FlowId) -> None:
        """A flow is over and judged: nobody need be woken for it."""
        del self._cases[flow_id]
        while self._due and self._due[0][3] not in self._cases:
            heapq.heappop(self._due)

    def _start_afresh(self) -> None:
        """What an earlier kernel of this guest did says nothing of this one."""
        self.processes.clear()
        self._by_pid.clear()
        self._evidence.clear()
        self._opinions.clear()
        self._remembered.clear()

    def _seed(self, snapshot: Snapshot) -> None:
        """Learn the processes that are there, and the owners of what is open."""
        for process in snapshot.processes:
            self._add(process)
        for socket in snapshot.sockets[:MAX_REMEMBERED]:
            if socket.remote is not None and socket.owners and Flag.STALE not in socket.flags:
                ends = _on_the_wire(socket.local), _on_the_wire(socket.remote)
                self._remembered[FiveTuple(socket.protocol, *ends)] = socket.owners

    # -- judging --

    def _add(self, process: GuestProcess) -> bool:
        """Put a process into the process queue; True when it is new there."""
        new = process.key not in self.processes
        self.processes[process.key] = process
        self.processes.move_to_end(process.key)
        self._by_pid[process.pid] = process
        if len(self.processes) > MAX_PROCESSES:
            _, oldest = self.processes.popitem(last=False)
            if self._by_pid.get(oldest.pid) is oldest:
                del self._by_pid[oldest.pid]
        return new

    def _judge_case(self, case: Case, at_ns: int) -> Iterator[Command]:
        case.judged = True
        flow = case.flow
        known = self._remembered.get(flow.tuple, ()) if flow.midstream else ()
        binding = tie(case, known)
        added = [self._add(owner.process) for owner in binding.owners]
        evidence = forged(flow) + (case.best.evidence if case.best else ())
        judgement = self._judgement(flow, binding, at_ns)
        if (forgery := self._forgeries.loudest(evidence, at_ns)) is not None:
            judgement = louder(judgement, Severity.MEDIUM, forgery.claim)
        if (hidden := concealed(binding)) is not None:
            judgement = louder(judgement, Severity.HIGH, hidden)
        verdict = Verdict(
            flow,
            binding,
            judgement,
            at_ns,
            evidence=evidence,
            names=self._names.names_of(flow.tuple.remote.ip, at_ns),
            rules_version=self._judge.version,
            new_process=any(added),
            handling=case.handling,
        )
        order = self._acts.order(case, judgement, at_ns)
        if order is None:
            yield from self._gather(verdict, at_ns)
            return
        since_ns = flow.started_ns if case.held else None
        yield self._acts.begin(Doing(flow, order, judgement.ask, case.is_held(at_ns), since_ns, verdict))
        case.held = False

    def _judgement(self, flow: Flow, binding: Binding, at_ns: int) -> Judgement:
        names = self._names.names_of(flow.tuple.remote.ip, at_ns)
        parent = self._parent(binding.process)
        return self._judge.judge(Subject(flow, binding, names, self._os, parent, self._tags))

    def _parent(self, process: GuestProcess | None) -> GuestProcess | None:
        parent = self._by_pid.get(process.parent_pid) if process else None
        return parent if parent and process and parent.key.started_ns <= process.key.started_ns else None

    def _handled(self, event: Handled) -> Iterator[Command]:
        case = self._cases.get(event.flow)
        doing = self._acts.settle(event, living=case is not None and not case.ended)
        if isinstance(doing, Handle):
            yield doing
            return
        if doing is None:
            return
        verdict = doing.verdict
        if verdict is None:  # it was let go without one
            if case is not None:
                case.handling = doing.handling
            return
        if (waiting := self.waiting.get(event.flow)) is not None:
            self._wake(waiting.deadline_ns - LEAD_NS, event.flow, Alarm.UNANSWERED)
        if not doing.again:
            yield from self._gather(verdict, event.at_ns)
        elif event.flow in self._pending:  # its evidence is still sought
            self._pending[event.flow] = verdict
        else:
            yield from self._report(verdict, again=True)

    def _decided(self, flow_id: FlowId, allow: bool | None, who: str = "") -> Iterator[Command]:
        """The verdict is told again, with what became of the flow."""
        handle = self._acts.decide(flow_id, allow, who)
        if handle is not None:
            yield handle

    # -- telling --

    def _gather(self, verdict: Verdict, at_ns: int) -> Iterator[Command]:
        """Look for foreign code in a process that is denied or that the guest conceals, once in a while; report."""
        process = verdict.binding.process
        suspected = verdict.judgement.decision is not Decision.ALLOW or concealed(verdict.binding) is not None
        if not suspected or process is None or process.task_va == 0:
            yield from self._report(verdict)
            return
        looked_at_ns, evidence = self._evidence.get(process.key, (None, ()))
        if looked_at_ns is not None and at_ns - looked_at_ns < EVIDENCE_FRESH_NS:
            yield from self._tell(verdict, evidence, at_ns)
            return
        self._pending[verdict.flow.id] = verdict
        if process.key in self._sought:
            self._sought[process.key].append(verdict.flow.id)
            return
        self._sought[process.key] = [verdict.flow.id]
        yield GatherEvidence(verdict.flow.id, process)

    def _evidenced(self, flow_id: FlowId, evidence: tuple[Evidence, ...], at_ns: int) -> Iterator[Command]:
        first = self._pending.get(flow_id)
        process = first.binding.process if first else None
        if process is None:
            return
        self._evidence[process.key] = (at_ns, evidence)
        if len(self._evidence) > MAX_PROCESSES:
            self._evidence.popitem(last=False)
        for sought_for in self._sought.pop(process.key, ()):
            yield from self._tell(self._pending.pop(sought_for), evidence, at_ns)

    def _tell(self, verdict: Verdict, evidence: tuple[Evidence, ...], at_ns: int) -> Iterator[Command]:
        """Report with what is foreign in its process, and ask the other engine."""
        process = verdict.binding.process
        known = self._opinions.known(process.key, at_ns) if process else ()
        verdict = _with(verdict, evidence + known)
        yield from self._report(verdict)
        yield from self._opinions.ask(verdict, at_ns)

    def _report(self, verdict: Verdict, *, again: bool = False) -> Iterator[Command]:
        if (waiting := self.waiting.get(verdict.flow.id)) is not None:
            waiting.verdict = verdict
        self._opinions.update(verdict)
        case = self._cases.get(verdict.flow.id)
        if case is not None and not case.ended:
            self.records[verdict.flow.id] = verdict
            if len(self.records) > MAX_RECORDS:
                self.records.popitem(last=False)
        yield Report(verdict, again)


def _on_the_wire(end: Endpoint) -> Endpoint:
    """A v4-mapped socket's packets are IPv4."""
    mapped = end.ip.ipv4_mapped if isinstance(end.ip, IPv6Address) else None
    return Endpoint(mapped, end.port) if mapped else end


def _with(verdict: Verdict, evidence: tuple[Evidence, ...]) -> Verdict:
    """Attach what was found in the process; foreign code in a denied process makes it parasitic (P15)."""
    foreign = any(item.weight >= 2 for item in evidence)
    parasitic = foreign and verdict.judgement.decision is Decision.DENY
    return replace(verdict, evidence=verdict.evidence + evidence, parasitic=parasitic)
