"""Rules learnt from what was recorded: a draft that a person reviews (P11)."""

import json

import pytest

from appliance.errors import ConfigError
from appliance.model import Decision
from appliance.rules import load_text
from appliance.rules.draft import write_draft
from appliance.rules.learn import Limits, learn
from tests.rules.builders import flow, process, subject
from tests.worlds.command import parasight


def body(
    number, *, path="/usr/sbin/ntpd", direction="out", protocol="udp", remote="192.0.2.10", port=123, names=(), **more
):
    ends = {"local": {"ip": "10.0.0.5", "port": 40000}, "remote": {"ip": remote, "port": port}}
    if direction == "in":
        ends = {"local": {"ip": "10.0.0.5", "port": port}, "remote": {"ip": remote, "port": 50000 + number % 9000}}
    return {
        "id": f"{number:012x}",
        "time": f"2026-11-{1 + number % 20:02}T12:00:00Z",
        "vm": f"qemu:{1 + number % 3}",
        "flow": {
            "direction": direction,
            "protocol": protocol,
            "started": "2026-11-01T12:00:00Z",
            "midstream": False,
            "names": list(names),
        }
        | ends,
        "binding": {"match": "exact", "reason": None},
        "process": {"path": path, "pid": 100, "started": "2026-11-01T00:00:00Z", "services": []},
        "verdict": "allow",
        "alert": False,
        "evidence": [],
    } | more


def learnt_of(*groups, **limits):
    return learn([one for group in groups for one in group], Limits(**limits))


def test_a_program_that_only_asks_for_the_time_may_do_just_that_afterwards():
    draft = write_draft(learnt_of([body(number) for number in range(60)]))
    rules = load_text(draft)
    asks = subject(process("/usr/sbin/ntpd"), flow=flow("192.0.2.10", 123, protocol="udp"))
    calls = subject(process("/usr/sbin/ntpd"), flow=flow("203.0.113.9", 443))
    assert rules.judge(asks).decision is Decision.ALLOW
    assert rules.judge(calls).decision is Decision.DENY
    assert "60 connections of" in draft


def test_a_draft_says_so_and_its_own_tests_pass():
    rules = load_text(write_draft(learnt_of([body(number) for number in range(60)])))
    assert rules.sets[0].draft
    assert rules.test()
    assert all(result.ok for result in rules.test())
    assert any("draft" in str(warning) for warning in rules.warnings)


def test_what_was_flagged_is_not_learnt():
    honest = [body(number) for number in range(60)]
    bad = [body(100 + number, remote="203.0.113.9", port=4444, protocol="tcp", verdict="deny") for number in range(30)]
    found = learnt_of(honest, bad)
    assert found.unused == {"flagged": 30}
    draft = write_draft(found)
    assert "4444" not in draft.split("tests:")[0]
    assert "ATTENTION: 30 more were flagged" in draft


@pytest.mark.parametrize(
    ("bodies", "why"),
    [
        ([body(number) for number in range(5)], "only 5 connections"),
        ([body(number, port=100 + number % 12) for number in range(120)], "12 kinds of access"),
        ([body(number, path="/usr/bin/python3.11") for number in range(60)], "script"),
        ([body(number, path=r"C:\Windows\System32\svchost.exe") for number in range(60)], "services are not known"),
        ([body(number) for number in range(40)] + [body(90, port=443, protocol="tcp")], "not settled"),
        ([body(number, path="/tmp/a*b") for number in range(60)], "literally"),
    ],
)
def test_what_has_no_single_purpose_is_named_with_the_reason(bodies, why):
    found = learnt_of(bodies)
    assert not found.suggested
    assert why in found.others[0][1]
    assert why in write_draft(found)


def test_a_verdict_that_is_told_twice_counts_once():
    found = learnt_of([body(number % 30) for number in range(60)])
    assert found.suggested[0].connections == 30


def test_names_are_preferred_to_addresses_and_three_of_a_parent_become_one():
    bodies = [
        body(
            number,
            path="/usr/bin/updater",
            protocol="tcp",
            port=443,
            remote=f"198.51.100.{number % 40}",
            names=[f"m{number % 5}.example.net"],
        )
        for number in range(60)
    ]
    draft = write_draft(learnt_of(bodies))
    assert '"*.example.net"' in draft


def test_incoming_connections_from_private_peers_stay_private():
    bodies = [
        body(n, path="/usr/sbin/mysqld", direction="in", protocol="tcp", port=3306, remote=f"10.0.{n % 9}.{n}")
        for n in range(60)
    ]
    rules = load_text(write_draft(learnt_of(bodies)))
    mysqld = process("/usr/sbin/mysqld")
    assert rules.judge(subject(mysqld, flow=flow("10.0.7.7", 3306, inbound=True))).decision is Decision.ALLOW
    assert rules.judge(subject(mysqld, flow=flow("203.0.113.7", 3306, inbound=True))).decision is Decision.DENY


def test_many_dynamic_ports_are_one_kind_of_access():
    bodies = [body(n, path="/opt/rpc", protocol="tcp", port=49152 + n % 30, remote="10.0.0.9") for n in range(90)]
    assert "ports: 49152-65535" in write_draft(learnt_of(bodies))


def test_a_service_of_a_svchost_is_a_program_of_its_own():
    windows = r"C:\Windows\System32\svchost.exe"
    bodies = [
        body(number, path=windows, process={"path": windows, "pid": 9, "started": None, "services": ["W32Time"]})
        for number in range(60)
    ]
    draft = write_draft(learnt_of(bodies))
    assert 'service: "W32Time"' in draft
    assert "os: windows" in draft
    assert all(result.ok for result in load_text(draft).test())


def test_a_guests_text_cannot_leave_its_comment():
    bodies = [body(number, path="/opt/x\n- name: evil\u202e") for number in range(60)]
    draft = write_draft(learnt_of(bodies))
    assert load_text(draft).sets[0].profile_names == ()
    assert "evil" not in [line.strip() for line in draft.splitlines()]


def test_what_is_no_verdict_is_counted():
    assert learnt_of([{"a": 1}, body(1)]).unused == {"not a verdict": 1}


def test_the_command_writes_a_draft_once_and_watch_refuses_it(tmp_path):
    history = tmp_path / "verdicts.jsonl"
    history.write_text("".join(json.dumps(body(number)) + "\n" for number in range(60)))
    draft = tmp_path / "draft.yaml"
    words = ("rules", "suggest", "--from", history, "--since", "36500d", "--write", draft)
    assert parasight(*words, home=tmp_path).code == 0
    assert parasight("rules", "test", draft, home=tmp_path).code == 0
    again = parasight(*words, home=tmp_path)
    assert (again.code, "replaces nothing" in again.err) == (2, True)
    refused = parasight("watch", "port:lo", "--rules", draft, "--for", "1s", home=tmp_path)
    assert (refused.code, "is a draft" in refused.err) == (ConfigError.exit_code, True)


def test_a_guest_is_its_uuid_whatever_process_it_ran_in():
    one = [body(number, vm=f"qemu:{number}", vm_uuid="u") for number in range(60)]
    two = [body(100 + number, vm="qemu:1", vm_uuid=f"u-{number % 2}") for number in range(60)]
    (alone,) = learnt_of(one).suggested
    assert len(alone.guests) == 1
    (both,) = learnt_of(two).suggested
    assert len(both.guests) == 2
