"""Every case of P12-P14 with a hand, and every order of events: what waits is answered once, nobody else is touched."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    SnapshotTaken,
    Tick,
)
from appliance.model import (
    Act,
    Ask,
    Decision,
    Direction,
    Finding,
    FlowCounts,
    FlowEnd,
    FlowEnded,
    FlowPayload,
    FlowStarted,
    HoldPolicy,
    Match,
    Reason,
    Snapshot,
    Transport,
)
from tests.rules.builders import book
from tests.test_hold import MS, Rules, Stage
from tests.worlds.nouns import NoNames, flow, owner

# -- the truth table --

DEFAULTS = {"deny": "allow", "allow": "deny"}  # and the kind of entry that makes an exception from it
RELEASED, STOPPED, NOTHING = "released", "stopped", "nothing"


def rules_of(default, listed, mode, unbound):
    """A profile for nginx: a default, and one exception that speaks of port 443 or of another one."""
    return book(f"""
        mode: {mode}
        unbound: {{action: {unbound}}}
        processes:
          - name: nginx
            match: {{image: /usr/sbin/nginx}}
            default: {default}
            {DEFAULTS[default]}: [{{direction: out, ports: {443 if listed else 444}}}]
    """)


@pytest.mark.parametrize("protocol", [Transport.TCP, Transport.UDP])
@pytest.mark.parametrize(
    ("default", "listed", "mode", "unbound", "bound", "held"),
    list(
        product(
            ["deny", "allow"], [True, False], ["monitor", "enforce"], ["allow", "deny"], [True, False], [True, False]
        )
    ),
)
def test_the_truth_table_with_a_hand(default, listed, mode, unbound, bound, held, protocol):
    finding = Finding(Match.EXACT, (owner(),)) if bound else Finding(Match.NONE, reason=Reason.ORPHAN, final=True)
    stage = Stage(rules_of(default, listed, mode, unbound), finding=finding)
    stage.start(flow(protocol=protocol), held=held)
    # P13: deny by default, an allow entry that fits makes it normal. P14: the mirror image. No process: the policy.
    normal = (default == "allow") != listed if bound else unbound == "allow"
    stopped = mode == "enforce" and not normal
    expected = STOPPED if stopped else RELEASED if held else NOTHING
    acts = {
        RELEASED: [Act.RELEASE],
        NOTHING: [],
        STOPPED: [Act.RESET if protocol is Transport.TCP and not held else Act.BLOCK],
    }
    assert stage.acts == acts[expected]
    assert stage.verdict.judgement.decision is (Decision.ALLOW if normal else Decision.DENY)
    assert len(stage.reports) == 1


# -- every order of events --

FINDINGS = (
    Finding(Match.EXACT, (owner(),)),
    Finding(Match.LISTENER, (owner(7),)),
    Finding(Match.UNCONNECTED, (owner(8),)),
    Finding(Match.KERNEL, final=True),
    Finding(Match.NONE),
    Finding(Match.NONE, reason=Reason.TORN),
    Finding(Match.NONE, reason=Reason.RAW),
    Finding(Match.NONE, reason=Reason.CLOSED),
    Finding(Match.NONE, reason=Reason.FORWARDED),
    Finding(Match.NONE, reason=Reason.ORPHAN, final=True),
)
WAITS, GOES_ON, ASKED, OVER = "waits", "goes on", "a person is asked", "over"
AFTER = {
    (WAITS, Act.RELEASE): GOES_ON,
    (WAITS, Act.BLOCK): OVER,
    (WAITS, Act.RESET): OVER,  # its time was up
    (WAITS, Act.REDIRECT): OVER,
    (WAITS, Act.HOLD): ASKED,
    (GOES_ON, Act.BLOCK): OVER,
    (GOES_ON, Act.RESET): OVER,
    (GOES_ON, Act.HOLD): ASKED,
    (ASKED, Act.RELEASE): OVER,
    (ASKED, Act.BLOCK): OVER,
    (ASKED, Act.RESET): OVER,
}


class Host:
    """Carries out acts as a tap would, and knows which of them make sense for a flow."""

    def __init__(self, engine, refuses):
        self.engine, self.refuses = engine, refuses
        self.now_ns = 1_000_000_000
        self.state, self.flows = {}, {}
        self.looking, self.acting, self.searching, self.reports = [], [], [], []

    def feed(self, event):
        for command in self.engine.feed(event):
            match command:
                case LookUp(one):
                    self.looking.append(one.id)
                case Handle(flow_id, act):
                    self.act(flow_id, act)
                case GatherEvidence(flow_id):
                    self.searching.append(flow_id)
                case Report():
                    self.reports.append(command)

    def act(self, flow_id, act):
        after = AFTER.get((self.state[flow_id], act))
        assert after is not None, f"{act} for a flow that {self.state[flow_id]}"
        done = act not in self.refuses
        if done or act not in (Act.HOLD, Act.REDIRECT):  # else something else must be done instead
            self.state[flow_id] = after
        self.acting.append(Handled(flow_id, act, done, 0))

    def answer_hand(self):
        answer = self.acting.pop(0)
        self.feed(Handled(answer.flow, answer.act, answer.done, self.now_ns))

    def start(self, *, held, protocol, direction, midstream):
        number = len(self.flows)
        one = flow(
            number,
            protocol=protocol,
            direction=direction,
            midstream=midstream,
            started_ns=self.now_ns,
            local_port=40000 + number,
        )
        self.flows[one.id], self.state[one.id] = one, WAITS if held else GOES_ON
        self.feed(FlowStarted(one, self.now_ns, held))

    def tick(self, by_ns):
        """Let time pass as the watch does: the engine is woken when it asked to be, or later."""
        self.now_ns += by_ns
        due_ns = self.engine.next_due_ns
        if due_ns is not None and due_ns <= self.now_ns:
            self.feed(Tick(self.now_ns))

    def step(self, kind, pick, detail):
        flow_id = list(self.flows)[pick % len(self.flows)] if self.flows else None
        match kind:
            case "start":
                protocol = (Transport.TCP, Transport.UDP, Transport.TCP, Transport.ICMP)[detail % 4]
                direction = Direction.IN if detail // 4 % 2 else Direction.OUT
                self.start(held=pick % 4 != 0, protocol=protocol, direction=direction, midstream=pick % 8 == 4)
            case "look" if self.looking:
                found = FINDINGS[detail % len(FINDINGS)]
                self.feed(LookedUp(self.looking.pop(pick % len(self.looking)), found, self.now_ns))
            case "hand" if self.acting:
                self.answer_hand()
            case "search" if self.searching:
                self.feed(EvidenceFound(self.searching.pop(0), (), self.now_ns))
            case "payload" if flow_id:
                side = Direction.IN if detail % 2 else Direction.OUT
                self.feed(FlowPayload(flow_id, side, 0, b"x", self.now_ns))
            case "decide" if flow_id:
                self.feed(Decided(flow_id, bool(detail % 2), "anna", self.now_ns))
            case "end" if flow_id:
                reason = tuple(FlowEnd)[detail % len(FlowEnd)]
                self.feed(FlowEnded(flow_id, reason, FlowCounts(), self.now_ns))
                if self.state[flow_id] == ASKED:
                    self.state[flow_id] = OVER  # nobody is asked about it any more
            case "look again":
                self.feed(SnapshotTaken(Snapshot(0, (), ())))
            case "time":
                self.tick(detail * detail * MS)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "start", "look", "look", "hand", "hand", "search", "payload", "decide", "end", "look again"]
            + ["time"] * 3
        ),
        st.integers(0, 63),
        st.integers(0, 63),
    ),
    min_size=30,  # else Hypothesis makes lists of five on the average, in which little can happen
    max_size=90,
)
RULES = st.builds(  # mostly such as give the hand something to do
    Rules,
    st.sampled_from([Decision.DENY, Decision.DENY, Decision.ALLOW]),
    st.sampled_from([Decision.DENY, Decision.ALLOW]),
    enforce=st.sampled_from([True, True, True, False]),
    actions=st.sampled_from(
        [
            ("hold",),
            ("hold", "reset"),
            ("hold", "redirect:trap"),
            ("redirect:trap",),
            ("reset",),
            ("block",),
            ("alert",),
        ]
    ),
    ask=st.builds(Ask, st.sampled_from([1.0, 60.0]), st.sampled_from(Decision)),
)
HOLDS = st.builds(HoldPolicy, deadline_s=st.sampled_from([0.01, 0.5, 3.0]), default=st.sampled_from(Decision))
REFUSALS = st.sampled_from([(), (), (Act.HOLD,), (Act.REDIRECT,), (Act.HOLD, Act.REDIRECT), tuple(Act)])


def run(rules, hold, refuses, steps):
    host = Host(Engine(rules, NoNames(), hold=hold), refuses)
    for step in steps:
        host.step(*step)
    return host


@settings(max_examples=300, deadline=None)
@given(RULES, HOLDS, REFUSALS, STEPS)
def test_in_every_order_of_events_what_waits_is_answered_once_and_nothing_else_is_touched(rules, hold, refuses, steps):
    host = run(rules, hold, refuses, steps)  # Host.act objects to every act that has no place
    for _ in range(200):  # then all answers come, but those of the eye: whoever still waits for it has a deadline
        while host.acting:
            host.answer_hand()
        host.tick(500 * MS)
    waiting = [state for state in host.state.values() if state in (WAITS, ASKED)]
    assert waiting == []
    assert not host.engine.waiting
    first = [report.verdict.flow.id for report in host.reports if not report.again]
    assert len(first) == len(set(first))


@settings(max_examples=80, deadline=None)
@given(RULES, HOLDS, REFUSALS, STEPS)
def test_the_same_events_give_the_same_commands(rules, hold, refuses, steps):
    one, two = run(rules, hold, refuses, steps), run(rules, hold, refuses, steps)
    assert one.reports == two.reports
    assert one.state == two.state


@settings(max_examples=80, deadline=None)
@given(RULES, HOLDS, STEPS)
def test_when_every_flow_has_ended_nothing_is_remembered_of_any(rules, hold, steps):
    host = run(rules, hold, (), steps)
    for flow_id in host.flows:
        host.feed(FlowEnded(flow_id, FlowEnd.IDLE, FlowCounts(), host.now_ns))
    while host.looking or host.acting or host.searching:
        for kind in ("look", "hand", "search"):
            host.step(kind, 0, 0)
    assert host.engine.next_due_ns is None
    assert not host.engine.records
    assert not host.engine.waiting
    assert {report.verdict.flow.id for report in host.reports} == set(host.flows)
