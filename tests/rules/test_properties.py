"""What holds for every rule set and every subject."""

import time
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.model import (
    Binding,
    Decision,
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowId,
    GuestId,
    GuestProcess,
    Judgement,
    Match,
    Missing,
    Owner,
    ProcessKey,
    Reason,
    Transport,
)
from appliance.rules import RuleBook, Subject, load, load_text
from tests.rules.builders import HEAD, flow, process, subject

ROOT = Path(__file__).parents[2]
SHIPPED = load([ROOT / "rules"])

PORTS = st.sampled_from([1, 22, 25, 53, 80, 443, 5001, 6667, 65535])
ADDRESSES = st.sampled_from(["10.77.0.1", "203.0.113.9", "192.168.1.1", "fd00::1", "::ffff:10.0.0.1", "0.0.0.0"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "direction": st.sampled_from(["in", "out"]),
        "protocol": st.sampled_from(["tcp", "udp"]),
        "ports": st.lists(PORTS | st.just("1-1023"), min_size=1, max_size=3),
        "severity": st.sampled_from(["low", "high"]),
        "expires": st.sampled_from(["1969-12-31", "2026-11-22"]),
    },
)
SECTIONS = st.fixed_dictionaries(
    {
        "default": st.sampled_from(["allow", "deny"]),
        "allow": st.lists(ENTRIES, max_size=4),
        "deny": st.lists(ENTRIES, max_size=4),
    }
)
FLOWS = st.builds(
    lambda remote, port, inbound, protocol, at: flow(remote, port, inbound=inbound, protocol=protocol, at_ns=at),
    ADDRESSES,
    PORTS,
    st.booleans(),
    st.sampled_from(Transport),
    st.sampled_from([0, 1_800_000_000 * 10**9]),
)


def judge(section: dict[str, object], given_flow: Flow) -> Judgement:
    text = HEAD + yaml.safe_dump({"spec": {"processes": [{"name": "p", "match": {"name": "nginx"}, **section}]}})
    return load_text(text).judge(subject(process(), flow=given_flow))


@settings(max_examples=120, deadline=None)
@given(SECTIONS, ENTRIES, FLOWS)
def test_one_more_allow_entry_never_makes_an_allow_a_deny(section, entry, given_flow):
    if judge(section, given_flow).decision is Decision.ALLOW:
        wider = {**section, "allow": [*section["allow"], entry]}
        assert judge(wider, given_flow).decision is Decision.ALLOW


@settings(max_examples=120, deadline=None)
@given(SECTIONS, ENTRIES, FLOWS)
def test_one_more_deny_entry_never_makes_a_deny_an_allow(section, entry, given_flow):
    if judge(section, given_flow).decision is Decision.DENY:
        narrower = {**section, "deny": [*section["deny"], entry]}
        assert judge(narrower, given_flow).decision is Decision.DENY


@settings(max_examples=120, deadline=None)
@given(SECTIONS, FLOWS, st.randoms(use_true_random=False))
def test_the_order_of_entries_means_nothing(section, given_flow, random):
    mixed = {**section, "allow": list(section["allow"]), "deny": list(section["deny"])}
    random.shuffle(mixed["allow"])
    random.shuffle(mixed["deny"])
    one, two = judge(section, given_flow), judge(mixed, given_flow)
    assert (one.decision, one.alert, one.severity) == (two.decision, two.alert, two.severity)


MAYBE = st.text(max_size=30) | st.sampled_from(Missing)
PATHS = MAYBE | st.sampled_from(
    [
        "/usr/sbin/nginx",
        "/tmp/x",
        "/usr/bin/python3.11",
        r"C:\Windows\System32\svchost.exe",
        r"c:\windows\notepad.exe",
        "/" * 9000,
    ]
)
PROCESSES = st.builds(
    GuestProcess,
    key=st.builds(ProcessKey, st.integers(0, 9), st.integers()),
    name=st.text(max_size=15),
    path=PATHS,
    command=MAYBE | st.just("svchost.exe -k x -s Dnscache"),
    parent_pid=st.integers(0, 9),
    uid=st.integers(-1, 2**32),
    user=st.none() | st.text(max_size=5),
    deleted=st.booleans(),
    container=st.none() | st.text(max_size=5),
    cgroup=MAYBE | st.just("/system.slice/x.service"),
)
IPS = st.integers(0, 2**32 - 1).map(IPv4Address) | st.integers(0, 2**128 - 1).map(IPv6Address)
ENDS = st.builds(Endpoint, IPS, st.integers(-1, 70000))
SUBJECTS = st.builds(
    Subject,
    flow=st.builds(
        Flow,
        id=st.just(FlowId(GuestId("qemu:1"), 1)),
        tuple=st.builds(FiveTuple, st.sampled_from(Transport), ENDS, ENDS),
        direction=st.sampled_from(Direction),
        started_ns=st.integers(),
        midstream=st.booleans(),
    ),
    binding=st.builds(
        Binding,
        match=st.sampled_from(Match),
        reason=st.none() | st.sampled_from(Reason),
        owners=st.lists(st.builds(Owner, PROCESSES), max_size=3).map(tuple),
        latency_ns=st.integers(),
    ),
    names=st.lists(st.text(max_size=20) | st.just("a.windowsupdate.com"), max_size=3).map(tuple),
    os=st.sampled_from(["linux", "windows", "", "plan9"]),
    parent=st.none() | PROCESSES,
    tags=st.lists(st.text(max_size=3), max_size=2).map(tuple),
)


@settings(max_examples=250, deadline=None)
@given(SUBJECTS)
def test_judging_never_raises_and_always_has_a_reason(given_subject):
    for rules in (SHIPPED, RuleBook()):
        judgement = rules.judge(given_subject)
        assert judgement == rules.judge(given_subject)
        assert judgement.because
        assert judgement.because.isprintable()
        assert judgement.rule.profile
        assert judgement.alert or judgement.decision is Decision.ALLOW or judgement.rule.profile == "unbound"


@settings(max_examples=100, deadline=None)
@given(SUBJECTS, PROCESSES)
def test_one_more_owner_never_loosens_the_verdict(given_subject, another):
    owners = given_subject.binding.owners
    if owners and SHIPPED.judge(given_subject).decision is Decision.DENY:
        more = replace(given_subject, binding=replace(given_subject.binding, owners=(*owners, Owner(another))))
        if len(owners) > 1:  # with one owner its parent is the subject's, whatever its pid says
            assert SHIPPED.judge(more).decision is Decision.DENY


def test_twenty_thousand_judgements_take_less_than_a_second():
    subjects = [case.subject for rules in SHIPPED.sets for case in rules.cases]
    rates = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(40):
            for one in subjects:
                SHIPPED.judge(one)
        rates.append(40 * len(subjects) / (time.process_time() - began))
    assert max(rates) > 20_000
