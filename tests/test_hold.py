"""The hand of the engine: whatever waits in the host is answered once, at once, and no other flow is touched."""

from dataclasses import replace

import pytest

from appliance.acting import LEAD_NS, MAX_WAITING
from appliance.bind import MAX_ALARMS
from appliance.engine import Engine
from appliance.messages import (
    Decided,
    EvidenceFound,
    GatherEvidence,
    Handle,
    Handled,
    LookedUp,
    LookUp,
    Report,
    Tick,
)
from appliance.model import (
    Act,
    Ask,
    Decision,
    Direction,
    Evidence,
    Finding,
    FlowCounts,
    FlowEnd,
    FlowEnded,
    FlowPayload,
    FlowStarted,
    HoldPolicy,
    Judgement,
    Match,
    Reason,
    RuleRef,
    Severity,
    Transport,
)
from tests.worlds.nouns import NoNames, flow, owner

MS = 1_000_000
BOUND, UNBOUND = Finding(Match.EXACT, (owner(),)), Finding(Match.NONE)


class Rules:
    """Says one thing of what has a process, and another of what has none."""

    version = "test"

    def __init__(self, bound=Decision.DENY, unbound=Decision.ALLOW, *, enforce=True, actions=("alert",), ask=None):
        self.bound, self.unbound, self.enforce, self.actions = bound, unbound, enforce, actions
        self.ask = ask or Ask()

    def judge(self, subject):
        decision = self.bound if subject.binding.owners else self.unbound
        deny = decision is Decision.DENY
        return Judgement(
            decision,
            RuleRef("test.yaml", 1, "test"),
            alert=deny,
            actions=self.actions if deny else (),
            because="because",
            enforce=deny and self.enforce,
            ask=self.ask,
        )


class Stage:
    """An engine with a hand and an eye of which every answer can be told."""

    def __init__(self, rules=None, *, hold=None, finding=BOUND, hand=True):
        self.engine = Engine(rules or Rules(), NoNames(), hold=hold)
        self.finding, self.hand, self.now_ns = finding, hand, 0
        self.said = []  # everything that the engine commanded, in order

    def tell(self, event):
        events = [event]
        while events:
            event = events.pop(0)
            self.now_ns = max(self.now_ns, getattr(event, "at_ns", 0))
            for command in self.engine.feed(event):
                self.said.append(command)
                match command:
                    case LookUp(one) if self.finding is not None:
                        events.append(LookedUp(one.id, self.finding, self.now_ns))
                    case Handle(flow_id, act):
                        done = self.hand(act) if callable(self.hand) else self.hand
                        events.append(Handled(flow_id, act, done, self.now_ns))
                    case GatherEvidence(flow_id):
                        events.append(EvidenceFound(flow_id, (), self.now_ns))
        return self

    def start(self, one, *, held=True):
        return self.tell(FlowStarted(one, one.started_ns, held))

    def wait(self, until_ns):
        while (due_ns := self.engine.next_due_ns) is not None and due_ns <= until_ns:
            self.tell(Tick(due_ns))
        return self.tell(Tick(until_ns))

    @property
    def acts(self):
        return [command.act for command in self.said if isinstance(command, Handle)]

    @property
    def reports(self):
        return [command for command in self.said if isinstance(command, Report)]

    @property
    def verdict(self):
        return self.reports[-1].verdict


def ended(one, at_ns, reason=FlowEnd.IDLE):
    return FlowEnded(one.id, reason, FlowCounts(), at_ns)


def test_a_denied_flow_that_waits_is_blocked_before_anything_else_is_done():
    stage = Stage().start(flow())
    assert [type(command) for command in stage.said] == [LookUp, Handle, GatherEvidence, Report]
    assert stage.acts == [Act.BLOCK]
    assert stage.verdict.handling.act is Act.BLOCK
    assert stage.verdict.handling.done


def test_an_allowed_flow_that_waits_is_released_before_it_is_reported():
    stage = Stage(Rules(Decision.ALLOW))
    stage.finding = None
    one = flow()
    stage.start(one).tell(LookedUp(one.id, BOUND, one.started_ns + 300_000))
    assert [type(command) for command in stage.said] == [LookUp, Handle, Report]
    assert stage.verdict.handling.held_ns == 300_000


def test_in_monitor_mode_what_waits_is_released_and_nothing_else_is_touched():
    assert Stage(Rules(enforce=False)).start(flow()).acts == [Act.RELEASE]
    stage = Stage(Rules(enforce=False)).start(flow(), held=False)
    assert stage.acts == []
    assert stage.verdict.handling is None


LISTENING = Finding(Match.LISTENER, (owner(1),))


def test_an_incoming_connection_is_let_in_by_its_listener_and_judged_by_the_process_that_accepts_it():
    one, stage = flow(direction=Direction.IN, local_port=80), Stage(Rules(Decision.ALLOW), finding=LISTENING)
    stage.start(one)
    assert (stage.acts, stage.reports) == ([Act.RELEASE], [])
    stage.finding = BOUND
    stage.wait(one.started_ns + 10 * MS)
    assert stage.acts == [Act.RELEASE]
    assert stage.verdict.binding.match is Match.EXACT
    assert stage.verdict.handling.act is Act.RELEASE


def test_an_incoming_connection_that_nobody_accepts_stays_with_its_listener():
    one, stage = flow(direction=Direction.IN, local_port=80), Stage(Rules(Decision.ALLOW), finding=LISTENING)
    stage.start(one).wait(one.started_ns + 2000 * MS)
    assert stage.acts == [Act.RELEASE]
    assert stage.verdict.binding.match is Match.LISTENER


def test_an_incoming_connection_that_its_listener_may_not_have_is_never_let_in():
    stage = Stage(finding=LISTENING).start(flow(direction=Direction.IN, local_port=80))
    assert stage.acts == [Act.BLOCK]
    assert stage.verdict.binding.match is Match.LISTENER


class Refusing(Rules):
    """Lets in what comes to the listener, and has nothing to do with the process that accepts it."""

    def judge(self, subject):
        self.bound = Decision.DENY if subject.binding.match is Match.EXACT else Decision.ALLOW
        return super().judge(subject)


def test_an_incoming_connection_accepted_by_a_process_that_may_not_have_it_is_reset():
    one, stage = flow(direction=Direction.IN, local_port=80), Stage(Refusing(), finding=LISTENING)
    stage.start(one)
    stage.finding = BOUND
    stage.wait(one.started_ns + 10 * MS)
    assert stage.acts == [Act.RELEASE, Act.RESET]
    assert stage.verdict.judgement.decision is Decision.DENY


def test_an_outgoing_flow_whose_process_shows_up_while_it_waits_is_judged_by_it():
    one, stage = flow(), Stage(finding=UNBOUND)
    stage.start(one)
    assert stage.acts == []
    stage.finding = BOUND
    stage.wait(one.started_ns + 5 * MS)
    assert stage.acts == [Act.BLOCK]


@pytest.mark.parametrize("protocol", [Transport.TCP, Transport.UDP])
def test_at_the_deadline_the_policy_for_flows_without_a_process_decides(protocol):
    one = flow(protocol=protocol)
    for decision, act in ((Decision.ALLOW, Act.RELEASE), (Decision.DENY, Act.BLOCK)):
        stage = Stage(Rules(unbound=decision), finding=UNBOUND, hold=HoldPolicy(deadline_s=0.5))
        stage.start(one)
        stage.wait(one.started_ns + 500 * MS - LEAD_NS - 1)
        assert stage.acts == []
        stage.wait(one.started_ns + 500 * MS - LEAD_NS)
        assert stage.acts == [act]


@pytest.mark.parametrize(("default", "act"), [(Decision.ALLOW, Act.RELEASE), (Decision.DENY, Act.BLOCK)])
def test_where_nobody_answers_in_time_the_default_of_the_hold_decides(default, act):
    one = flow()
    stage = Stage(Rules(unbound=Decision.DENY), finding=None, hold=HoldPolicy(default=default))
    stage.start(one).wait(one.started_ns + 3000 * MS)
    assert stage.acts == [act]


def test_what_was_let_go_without_a_process_is_reported_once_and_stopped_if_its_process_is_found():
    one = flow()
    stage = Stage(finding=Finding(Match.NONE, reason=Reason.TORN)).start(one).wait(one.started_ns + 990 * MS)
    assert stage.acts == [Act.RELEASE]
    assert stage.reports == []
    stage.finding = BOUND
    stage.wait(one.started_ns + 1100 * MS)
    assert stage.acts == [Act.RELEASE, Act.RESET]
    assert len(stage.reports) == 1
    assert stage.verdict.handling.held_ns == 1000 * MS - LEAD_NS


def test_a_flow_that_waits_is_never_hidden_however_long_it_is_silent():
    for protocol in (Transport.TCP, Transport.UDP):
        one = flow(protocol=protocol)
        stage = Stage(Rules(unbound=Decision.DENY), finding=UNBOUND, hold=HoldPolicy(deadline_s=3.0)).start(one)
        for step in range(1, 29):  # the guest repeats what nobody answers
            at_ns = one.started_ns + step * 100 * MS
            stage.wait(at_ns).tell(FlowPayload(one.id, Direction.OUT, step, b"?", at_ns))
        stage.wait(one.started_ns + 3000 * MS)
        assert stage.verdict.binding.reason is Reason.LATE


def test_a_connection_that_was_let_go_and_lives_on_without_a_socket_is_hidden():
    one = flow()
    stage = Stage(finding=UNBOUND, hold=HoldPolicy(deadline_s=3.0)).start(one).wait(one.started_ns + 3000 * MS)
    at_ns = one.started_ns + 3001 * MS
    for direction in Direction:
        stage.tell(FlowPayload(one.id, direction, 0, b"x", at_ns))
    stage.wait(at_ns + 3000 * MS)
    assert stage.acts == [Act.RELEASE]
    assert stage.verdict.binding.reason is Reason.HIDDEN


def test_a_verdict_that_comes_after_the_deadline_stops_what_has_gone_on():
    one, stage = flow(), Stage(finding=None)
    stage.start(one).tell(LookedUp(one.id, BOUND, one.started_ns + 1500 * MS))
    assert stage.acts == [Act.RESET]


@pytest.mark.parametrize("seen", [True, False])
def test_a_connection_that_is_already_open_is_reset_when_it_is_denied(seen):
    assert Stage().start(flow(midstream=seen), held=False).acts == [Act.RESET]
    assert Stage().start(flow(protocol=Transport.UDP, midstream=seen), held=False).acts == [Act.BLOCK]


def test_a_flow_that_is_over_is_judged_and_nothing_is_done_to_it():
    one, stage = flow(), Stage(Rules(unbound=Decision.DENY), finding=UNBOUND)
    stage.start(one, held=False).tell(ended(one, one.started_ns + 10 * MS))
    assert stage.acts == []
    assert len(stage.reports) == 1


def test_without_a_hand_the_same_flows_have_the_same_verdicts_and_no_act():
    told = []
    for hand in (True, None):
        stage = Stage(Rules(actions=("hold",)), hand=hand)
        stage.start(flow(1)).start(flow(2, protocol=Transport.UDP), held=False)
        told.append([report.verdict for report in stage.reports])
        assert all((verdict.handling is None) == (hand is None) for verdict in told[-1])
    assert [replace(verdict, handling=None) for verdict in told[0]] == told[1]


def test_one_search_for_foreign_code_serves_all_flows_that_are_denied_meanwhile():
    engine, gathers, reports = Engine(Rules(), NoNames()), [], []
    for number in range(3):
        one = flow(number)
        list(engine.feed(FlowStarted(one, one.started_ns, True)))
        (handle,) = engine.feed(LookedUp(one.id, BOUND, one.started_ns))
        gathers += engine.feed(Handled(one.id, handle.act, True, one.started_ns))
    assert len(gathers) == 1
    found = (Evidence("code", "anon-exec", weight=2),)
    reports = list(engine.feed(EvidenceFound(gathers[0].flow, found, 2_000_000_000)))
    assert [report.verdict.flow.id.number for report in reports] == [0, 1, 2]
    assert all(report.verdict.parasitic for report in reports)


# -- a person decides (N19) --

ASKING = Rules(actions=("hold",), ask=Ask(60.0, Decision.DENY))


@pytest.mark.parametrize(("allow", "held", "act"), [
    (True, True, Act.RELEASE), (False, True, Act.BLOCK), (True, False, Act.RELEASE), (False, False, Act.RESET),
])  # fmt: skip
def test_a_person_decides_on_a_flow_that_is_held_and_the_verdict_is_told_again(allow, held, act):
    one, stage = flow(), Stage(ASKING)
    stage.start(one, held=held)
    (handle,) = [command for command in stage.said if isinstance(command, Handle)]
    assert (handle.act, handle.seconds, handle.default) == (Act.HOLD, 60.0, Decision.DENY)
    assert stage.verdict.handling.held_ns is None
    assert set(stage.engine.waiting) == {one.id}
    stage.tell(Decided(one.id, allow, "anna", one.started_ns + 7000 * MS))
    assert stage.acts == [Act.HOLD, act]
    assert [report.again for report in stage.reports] == [False, True]
    assert "anna" in stage.verdict.judgement.because
    assert stage.verdict.handling.held_ns == 7000 * MS
    stage.tell(Decided(one.id, not allow, "bob", one.started_ns + 8000 * MS)).wait(one.started_ns + 90_000 * MS)
    assert len(stage.acts) == 2


@pytest.mark.parametrize(("default", "act"), [(Decision.ALLOW, Act.RELEASE), (Decision.DENY, Act.BLOCK)])
def test_if_nobody_decides_the_default_does(default, act):
    one, stage = flow(), Stage(Rules(actions=("hold",), ask=Ask(30.0, default)))
    stage.start(one).wait(one.started_ns + 30_000 * MS)
    assert stage.acts == [Act.HOLD, act]
    assert "nobody decided within 30 s" in stage.verdict.judgement.because
    assert not stage.engine.waiting


def test_a_decision_that_comes_while_evidence_is_sought_makes_one_report():
    one, engine = flow(), Engine(ASKING, NoNames())
    at_ns = one.started_ns
    list(engine.feed(FlowStarted(one, at_ns, True)))
    list(engine.feed(LookedUp(one.id, BOUND, at_ns)))
    (gather,) = engine.feed(Handled(one.id, Act.HOLD, True, at_ns))
    assert isinstance(gather, GatherEvidence)
    (handle,) = engine.feed(Decided(one.id, True, "anna", at_ns + MS))
    assert list(engine.feed(Handled(one.id, handle.act, True, at_ns + MS))) == []
    (report,) = engine.feed(EvidenceFound(one.id, (Evidence("code", "anon-exec", weight=2),), at_ns + 2 * MS))
    assert report.verdict.handling.act is Act.RELEASE
    assert report.verdict.parasitic


@pytest.mark.parametrize("action", ["hold", "redirect:trap"])
def test_what_cannot_be_held_or_diverted_is_blocked(action):
    stage = Stage(Rules(actions=(action,)), hand=lambda act: act is Act.BLOCK).start(flow())
    assert stage.acts[1:] == [Act.BLOCK]
    assert stage.verdict.handling.act is Act.BLOCK
    assert not stage.engine.waiting


def test_nobody_is_asked_about_more_flows_than_a_person_can_see():
    stage = Stage(ASKING)
    for number in range(MAX_WAITING + 3):
        stage.start(flow(number))
    assert len(stage.engine.waiting) == MAX_WAITING
    assert stage.acts[-3:] == [Act.BLOCK] * 3


def test_a_flow_that_ends_while_a_person_thinks_is_asked_about_no_more():
    one, stage = flow(), Stage(ASKING)
    stage.start(one).tell(ended(one, one.started_ns + 5000 * MS)).wait(one.started_ns + 90_000 * MS)
    assert stage.acts == [Act.HOLD]
    assert not stage.engine.waiting


# -- forged addresses --


def test_a_forged_mac_address_is_an_alarm_once_a_minute_and_evidence_always():
    stage = Stage(Rules(Decision.ALLOW))
    for number, seconds in enumerate((0, 1, 30, 61)):
        stage.start(replace(flow(number, started_ns=seconds * 1000 * MS), spoofed_mac="02:00:00:00:00:66"))
    verdicts = [report.verdict for report in stage.reports]
    assert [verdict.judgement.alert for verdict in verdicts] == [True, False, False, True]
    assert verdicts[0].judgement.severity is Severity.MEDIUM
    assert "02:00:00:00:00:66" in verdicts[0].judgement.because
    assert [item.kind for item in verdicts[1].evidence] == ["spoofed-mac"]
    assert stage.acts == [Act.RELEASE] * 4


def test_a_forged_ip_address_that_the_eye_tells_of_is_an_alarm():
    claim = Evidence("nobody in the guest has this address", "spoofed-ip", detail="10.77.0.99", weight=1)
    finding = Finding(Match.NONE, reason=Reason.FORWARDED, evidence=(claim,), final=True)
    stage = Stage(finding=finding).start(flow(1), held=False).start(flow(2), held=False)
    assert [report.verdict.judgement.alert for report in stage.reports] == [True, False]


def test_who_forges_a_thousand_addresses_raises_a_few_alarms_a_minute():
    stage = Stage(Rules(Decision.ALLOW))
    for number in range(1000):
        mac = f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"
        stage.start(replace(flow(number, started_ns=1 + number * 100 * MS), spoofed_mac=mac))
    alarms = [report.verdict.at_ns // (60_000 * MS) for report in stage.reports if report.verdict.judgement.alert]
    assert [alarms.count(minute) for minute in (0, 1)] == [MAX_ALARMS, MAX_ALARMS]
    assert len(stage.reports) == 1000
