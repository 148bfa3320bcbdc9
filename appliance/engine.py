"""The whole appliance on one page: events in, commands out. No I/O, no clock, no randomness.

    FlowStarted ──▶ LookUp ──▶ LookedUp ──▶ (ask again) ──▶ add the process, then judge ──▶ Report
                                                                    │ denied
                                                                    └──▶ GatherEvidence ──▶ EvidenceFound ──▶ Report

One engine serves one guest. Time comes with each event, so that replay equals live (P10: add, then judge).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from typing import Protocol

from appliance.bind import Case, next_look_ns, tie
from appliance.model import (
    Binding,
    Decision,
    Direction,
    Endpoint,
    Evidence,
    Finding,
    FiveTuple,
    Flow,
    FlowEnded,
    FlowEvent,
    FlowId,
    FlowPayload,
    FlowStarted,
    GuestProcess,
    IpAddress,
    Judgement,
    Owner,
    ProcessKey,
    Snapshot,
    Verdict,
)
from appliance.rules.match import Subject

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


# -- commands --


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask the guest eye who owns this flow now; answer with LookedUp."""

    flow: Flow


@dataclass(frozen=True, slots=True)
class GatherEvidence:
    """Look for foreign code in this process; answer with EvidenceFound."""

    flow: FlowId
    process: GuestProcess


@dataclass(frozen=True, slots=True)
class Report:
    """A flow is judged: write it down, show it."""

    verdict: Verdict


Command = LookUp | GatherEvidence | Report


# -- events beside the tap's --


@dataclass(frozen=True, slots=True)
class LookedUp:
    """The eye's answer to LookUp."""

    flow: FlowId
    finding: Finding
    at_ns: int


@dataclass(frozen=True, slots=True)
class EvidenceFound:
    """The eye's answer to GatherEvidence."""

    flow: FlowId
    evidence: tuple[Evidence, ...]
    at_ns: int


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """A full look: seeds the process queue and the owners of connections that are already open."""

    snapshot: Snapshot
    os: str = ""  # what the guest runs, for rules that are meant for one system


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    at_ns: int


Event = FlowEvent | LookedUp | EvidenceFound | SnapshotTaken | Tick


class Engine:
    """Judges every flow of one guest."""

    def __init__(self, judge: Judge, names: Names, *, tags: tuple[str, ...] = ()) -> None:
        self._judge = judge
        self._names = names
        self._os, self._tags = "", tags
        self._cases: dict[FlowId, Case] = {}
        self._pending: dict[FlowId, Verdict] = {}
        self._due: list[tuple[int, int, FlowId]] = []
        self._remembered: dict[FiveTuple, tuple[Owner, ...]] = {}
        self._evidence: OrderedDict[ProcessKey, tuple[int, tuple[Evidence, ...]]] = OrderedDict()
        self._by_pid: dict[int, GuestProcess] = {}
        self.processes: OrderedDict[ProcessKey, GuestProcess] = OrderedDict()
        self.records: OrderedDict[FlowId, Verdict] = OrderedDict()

    @property
    def next_due_ns(self) -> int | None:
        """When a Tick is wanted; None: nothing waits."""
        return self._due[0][0] if self._due else None

    def feed(self, event: Event) -> Iterator[Command]:
        """Take one event; yield what is to be done, in order."""
        match event:
            case FlowStarted(flow, at_ns):
                self._cases[flow.id] = Case(flow)
                if not flow.midstream:
                    self._remembered.pop(flow.tuple, None)  # the tuple belongs to another connection from now on
                yield from self._look(self._cases[flow.id], at_ns, on_packet=flow.direction is Direction.OUT)
            case LookedUp(flow_id, finding, at_ns):
                yield from self._answered(flow_id, finding, at_ns)
            case FlowPayload():
                yield from self._payload(event)
            case FlowEnded(flow_id, _, _, at_ns):
                yield from self._ended(flow_id, at_ns)
            case EvidenceFound(flow_id, evidence, at_ns):
                yield from self._evidenced(flow_id, evidence, at_ns)
            case SnapshotTaken(snapshot, os):
                self._os = os
                self._seed(snapshot)
            case Tick(at_ns):
                while self._due and self._due[0][0] <= at_ns:
                    _, _, flow_id = heapq.heappop(self._due)
                    if (due := self._cases.get(flow_id)) is not None and not due.judged:
                        due.retries, due.due_ns = due.retries + 1, 0
                        if not due.looking:  # else the answer under way sets the next time
                            yield from self._look(due, at_ns, on_packet=False)

    # -- binding --

    def _look(self, case: Case, at_ns: int, *, on_packet: bool) -> Iterator[Command]:
        case.looking, case.asked_ns, case.on_packet = True, at_ns, on_packet
        yield LookUp(case.flow)

    def _answered(self, flow_id: FlowId, finding: Finding, at_ns: int) -> Iterator[Command]:
        case = self._cases.get(flow_id)
        if case is None or case.judged:
            return
        case.looking = False
        case.learn(finding, at_ns)
        again_ns = next_look_ns(case)
        if again_ns is None:
            yield from self._judge_case(case, at_ns)
            if case.ended:
                del self._cases[flow_id]
        elif case.due_ns != again_ns:
            case.due_ns = again_ns
            heapq.heappush(self._due, (again_ns, flow_id.number, flow_id))

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
            if not case.looking:  # else the answer under way ends it
                if not case.judged:
                    yield from self._judge_case(case, at_ns)
                del self._cases[flow_id]
            self._remembered.pop(case.flow.tuple, None)
        self.records.pop(flow_id, None)

    def _seed(self, snapshot: Snapshot) -> None:
        """Start afresh: what an earlier kernel of this guest did says nothing of this one."""
        self.processes.clear()
        self._by_pid.clear()
        self._evidence.clear()
        self._remembered.clear()
        for process in snapshot.processes:
            self._add(process)
        for socket in snapshot.sockets[:MAX_REMEMBERED]:
            if socket.remote is not None and socket.owners:
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
        judgement = self._judgement(flow, binding, at_ns)
        verdict = Verdict(
            flow,
            binding,
            judgement,
            at_ns,
            evidence=case.best.evidence if case.best else (),
            names=self._names.names_of(flow.tuple.remote.ip, at_ns),
            rules_version=self._judge.version,
            new_process=any(added),
        )
        yield from self._decide(verdict, at_ns)

    def _judgement(self, flow: Flow, binding: Binding, at_ns: int) -> Judgement:
        names = self._names.names_of(flow.tuple.remote.ip, at_ns)
        parent = self._parent(binding.process)
        return self._judge.judge(Subject(flow, binding, names, self._os, parent, self._tags))

    def _parent(self, process: GuestProcess | None) -> GuestProcess | None:
        parent = self._by_pid.get(process.parent_pid) if process else None
        return parent if parent and process and parent.key.started_ns <= process.key.started_ns else None

    def _decide(self, verdict: Verdict, at_ns: int) -> Iterator[Command]:
        process = verdict.binding.process
        if verdict.judgement.decision is Decision.ALLOW or process is None or process.task_va == 0:
            yield from self._report(verdict)
            return
        looked_at_ns, evidence = self._evidence.get(process.key, (None, ()))
        if looked_at_ns is not None and at_ns - looked_at_ns < EVIDENCE_FRESH_NS:
            yield from self._report(_with(verdict, evidence))
            return
        self._pending[verdict.flow.id] = verdict
        yield GatherEvidence(verdict.flow.id, process)

    def _evidenced(self, flow_id: FlowId, evidence: tuple[Evidence, ...], at_ns: int) -> Iterator[Command]:
        verdict = self._pending.pop(flow_id, None)
        if verdict is None:
            return
        if (process := verdict.binding.process) is not None:
            self._evidence[process.key] = (at_ns, evidence)
            if len(self._evidence) > MAX_PROCESSES:
                self._evidence.popitem(last=False)
        yield from self._report(_with(verdict, evidence))

    def _report(self, verdict: Verdict) -> Iterator[Command]:
        if verdict.flow.id in self._cases:
            self.records[verdict.flow.id] = verdict
            if len(self.records) > MAX_RECORDS:
                self.records.popitem(last=False)
        yield Report(verdict)


def _on_the_wire(end: Endpoint) -> Endpoint:
    """A v4-mapped socket's packets are IPv4."""
    mapped = end.ip.ipv4_mapped if isinstance(end.ip, IPv6Address) else None
    return Endpoint(mapped, end.port) if mapped else end


def _with(verdict: Verdict, evidence: tuple[Evidence, ...]) -> Verdict:
    """Attach what was found in the process; foreign code in a denied process makes it parasitic (P15)."""
    foreign = any(item.weight >= 2 for item in evidence)
    return replace(verdict, evidence=verdict.evidence + evidence, parasitic=foreign)
