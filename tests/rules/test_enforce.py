"""Enforcement as the rule files say it: what is done, to which flows, and how long anything waits."""
# ruff: noqa: E501  # messages stand on one line each, to be found by searching

from pathlib import Path

import pytest

from appliance.model import Act, Ask, Decision, HoldPolicy, Judgement, RuleRef, Transport
from appliance.rules import load
from appliance.rules.acts import Order, order_for
from tests.rules.builders import HEAD, book, flow, process, subject
from tests.rules.test_load import spec_problems

TCP, UDP = Transport.TCP, Transport.UDP
NGINX = "processes: [{name: nginx, match: {name: nginx}, default: deny, mode: enforce%s}]"


def warned(spec: str) -> list[str]:
    return [f"{one.line}:{one.column} {one.message}" for one in book(spec).warnings if "no id" not in one.message]


def denied(*actions: str, enforce: bool = True) -> Judgement:
    return Judgement(Decision.DENY, RuleRef("f", 1, "p"), True, actions=actions, enforce=enforce)


@pytest.mark.parametrize(
    ("actions", "waiting", "tcp", "udp"),
    [
        ((), "block", "reset", "block"),
        (("alert",), "block", "reset", "block"),
        (("alert", "snapshot"), "block", "reset", "block"),
        (("block",), "block", "block", "block"),
        (("reset",), "block", "reset", "block"),
        (("block", "reset"), "block", "reset", "block"),
        (("hold",), "hold", "hold", "hold"),
        (("block", "reset", "hold"), "hold", "hold", "hold"),
        (("redirect:trap",), "redirect", "reset", "block"),
        (("hold", "redirect:trap"), "redirect", "hold", "hold"),
        (("block", "redirect:trap"), "redirect", "block", "block"),
    ],
)
def test_the_action_that_keeps_most_possibilities_counts(actions, waiting, tcp, udp):
    target = "trap" if waiting == "redirect" else None
    for protocol, open_act in ((TCP, tcp), (UDP, udp)):
        assert order_for(denied(*actions), protocol, held=True) == Order(Act(waiting), target)
        assert order_for(denied(*actions), protocol, held=False) == Order(Act(open_act))


@pytest.mark.parametrize(
    "judgement", [Judgement(Decision.ALLOW, RuleRef("f", 1, "p"), enforce=True), denied("block", enforce=False)]
)
def test_what_is_allowed_or_only_monitored_goes_on(judgement):
    assert order_for(judgement, TCP, held=True) == Order(Act.RELEASE)
    assert order_for(judgement, TCP, held=False) is None


# -- who waits, and how long --


@pytest.mark.parametrize("spec", [
    "{}",
    "mode: enforce",
    "processes: [{name: nginx, match: {name: nginx}, default: deny}]",
    "{mode: enforce, processes: [{name: nginx, match: {name: nginx}, default: deny, mode: monitor}]}",
    "processes: [{name: nginx, match: {name: nginx}, default: allow, mode: enforce}]",
    "unbound: {action: allow, mode: enforce}",
    "{mode: enforce, applies_to: {tags: [office]}, otherwise: {default: deny}}",
    "{mode: enforce, applies_to: {os: windows}, otherwise: {default: deny}}",
])  # fmt: skip
def test_nothing_waits_where_nothing_can_be_denied_by_force(spec):
    assert book(spec).hold_policy("linux") is None


@pytest.mark.parametrize(("spec", "outgoing", "incoming"), [
    (NGINX % "", True, True),
    (NGINX % ", hold: {incoming: false}", True, False),
    ("{mode: enforce, otherwise: {deny: [{direction: out, ports: 25}]}}", True, False),
    ("{mode: enforce, otherwise: {deny: [{direction: in, ports: 22}]}}", False, True),
    ("{mode: enforce, otherwise: {deny: [{to: {ips: 10.0.0.1}}, {from: {ips: 10.0.0.1}}]}}", True, True),
    ("{mode: enforce, kernel: {deny: [{protocol: udp}]}}", True, True),
    ("{mode: enforce, unbound: {action: deny}}", True, True),
    ("{mode: enforce, unbound: {deny: hidden}}", True, True),
    ("{mode: enforce, unbound: {deny: closed}}", False, True),
])  # fmt: skip
def test_only_the_directions_that_can_be_denied_wait(spec, outgoing, incoming):
    assert book(spec).hold_policy() == HoldPolicy(outgoing, incoming)


def test_the_longest_deadline_and_the_strictest_default_of_those_that_enforce_hold():
    rules = book("""
        mode: enforce
        hold: {deadline: 200ms}
        processes:
          - {name: a, match: {name: a}, default: deny}
          - {name: b, match: {name: b}, default: deny, hold: {deadline: 1.5s}}
          - {name: c, match: {name: c}, default: deny, hold: {default: deny}}
          - {name: d, match: {name: d}, default: deny, mode: monitor, hold: {deadline: 3s}}
    """)
    assert rules.hold_policy() == HoldPolicy(deadline_s=1.5, default=Decision.DENY)
    deadlines = [profile.section.hold.deadline_s for profile in rules.sets[0].profiles]
    assert deadlines == [0.2, 1.5, 0.2, 3.0]


def test_the_sets_of_a_guest_wait_together(tmp_path):
    for name, hold in (("one", "{deadline: 2s}"), ("two", "{default: deny}")):
        spec = f"spec: {{mode: enforce, hold: {hold}, otherwise: {{default: deny}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(HEAD.replace("site", name) + spec)
    assert load([tmp_path]).hold_policy() == HoldPolicy(deadline_s=2.0, default=Decision.DENY)


def test_a_person_has_as_long_as_the_profile_says():
    rules = book("""
        mode: enforce
        on_deny: hold
        hold: {ask: 5m, default: deny}
        processes:
          - {name: nginx, match: {name: nginx}, default: deny}
          - {name: sshd, match: {name: sshd}, default: deny, hold: {ask: 10s, default: allow}}
        unbound: {action: deny, hold: {ask: 1h}}
    """)

    def ask(*owners):
        return rules.judge(subject(*owners, flow=flow())).ask

    assert ask(process()) == Ask(300.0, Decision.DENY)
    assert ask(process(name="sshd")) == Ask(10.0, Decision.ALLOW)
    assert ask() == Ask(3600.0, Decision.DENY)


# -- mistakes --


@pytest.mark.parametrize(("hold", "message"), [
    ("{deadline: 4s}", "deadline: 4s is too long: a guest gives up, or repeats what waits, after that (at most 3s)"),
    ("{deadline: 5ms}", "deadline: 5ms is too short (at least 10ms)"),
    ("{deadline: 500}", "deadline: a duration is a number with its unit, like 500ms or 1s, not '500' (write 500ms or 500s)"),
    ("{deadline: true}", "deadline: a duration is a number with its unit, like 500ms or 1s, not 'true'"),
    ("{deadline: -1s}", "deadline: a duration is a number with its unit, like 500ms or 1s, not '-1s'"),
    ("{ask: 2h}", "ask: 2h is too long: no connection waits for so long (at most 1h)"),
    ("{ask: 500ms}", "ask: 500ms is too short (at least 1s)"),
    ("{default: block}", "default: must be one of allow, deny, not 'block'"),
    ("{incoming: no}", "incoming: must be true or false, not 'no' (write false)"),
    ("{deadlin: 1s}", "unknown key 'deadlin' (did you mean 'deadline'?)"),
    ("{}", "hold: says nothing (give deadline, default, incoming or ask)"),
])  # fmt: skip
def test_a_hold_that_is_wrong_is_told_with_the_way_out(hold, message):
    (line,) = spec_problems(f"hold: {hold}")
    assert line.partition(": ")[2] == message


@pytest.mark.parametrize("deadline", ["10ms", "0.5s", "1 s", "3s", "3000ms", "0.05m"])
def test_durations_have_units(deadline):
    assert book(f"{{mode: enforce, hold: {{deadline: {deadline}}}, otherwise: {{default: deny}}}}").hold_policy()


# -- warnings --


def test_enforcing_without_saying_how_is_a_warning():
    text = "'nginx' enforces: what it denies is stopped, although on_deny does not say how"
    assert warned(NGINX % "") == []
    assert warned(NGINX % ", on_deny: [alert, block]") == []
    assert warned(NGINX % ", on_deny: 'redirect:trap'") == []
    (line,) = warned(NGINX % ", on_deny: [alert, snapshot]")
    assert line.endswith(text)
    (line,) = warned("on_deny: alert\n" + NGINX % "")
    assert line == f"5:3 {text}"


def test_a_hold_without_effect_is_a_warning():
    assert warned("hold: {deadline: 1s}") == ["5:3 nothing here enforces: nothing waits"]
    assert warned("otherwise: {default: deny, hold: {deadline: 1s}}") == [
        "5:30 'otherwise' only monitors: nothing waits for it"
    ]
    assert warned("hold: {deadline: 1s}\n" + NGINX % "") == []


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "rules").glob("*.yaml")), ids=lambda file: file.name
)
def test_a_shipped_set_can_be_enforced_as_it_is(file, tmp_path):
    text = file.read_text()
    assert text.count("  mode: monitor\n") == 1
    (tmp_path / file.name).write_text(text.replace("  mode: monitor\n", "  mode: enforce\n"))
    rules = load([tmp_path])
    assert rules.warnings == ()
    assert rules.hold_policy() == HoldPolicy()
