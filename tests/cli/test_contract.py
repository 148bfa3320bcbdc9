"""The JSON contract is what docs/json.md says, and guest text does no harm on a terminal."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from appliance.cli import contract, story
from appliance.cli.render import Output, safe
from appliance.cli.watching import _Showing
from appliance.model import (
    Act,
    Binding,
    Decision,
    Endpoint,
    Evidence,
    GuestId,
    GuestInfo,
    GuestPort,
    GuestSocket,
    Handling,
    Judgement,
    Match,
    Missing,
    RuleRef,
    Transport,
    Verdict,
)
from appliance.summary import Summary
from tests.worlds.nouns import VM, flow, owner, process

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text()
EVIL = "\x1b[2J\x1b]0;owned\x07\u202eevil[red]"


def documented(title: str) -> set[str]:
    section = DOCUMENT.split(f"## {title}")[1].split("\n## ")[0]
    tables = [part for part in section.split("\n\n") if part.startswith("| key |")]
    rows = [line.split("|")[1] for table in tables for line in table.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def a_verdict(**changes) -> Verdict:
    judgement = Judgement(Decision.DENY, RuleRef("r.yaml", 7, "nginx", "set", "1"), alert=True, because="because")
    binding = Binding(Match.EXACT, None, (owner(),), 310_000)
    found = Evidence("code in memory without a file", "anon-exec", 0x7F0000000000, 4096, "ab" * 32, EVIL, 2)
    return Verdict(flow(), binding, judgement, 2_000_000_000, evidence=(found,), **changes)


def test_guests_have_the_documented_keys():
    body = contract.guest(GuestInfo(VM, 4242, 1 << 30, (GuestPort("tap1", "52:54:00:00:00:01"),)))
    assert body.keys() == documented("`guests`")


def test_processes_have_the_documented_keys():
    assert contract.process(process()).keys() == documented("`processes`, and every owner")


def test_connections_have_the_documented_keys():
    ends = Endpoint(ip_address("::ffff:10.0.0.1"), 80), Endpoint(ip_address("::ffff:10.0.0.2"), 4000)
    body = contract.connection("qemu:1", GuestSocket(Transport.TCP, "ESTABLISHED", *ends, (owner(),), 1, 0xFFFF))
    assert body.keys() == documented("`connections`")
    assert body["local"] == {"ip": "::ffff:10.0.0.1", "port": 80}


def test_verdicts_and_the_summary_have_the_documented_keys():
    verdict, summary = contract.verdict(a_verdict()), contract.summary([Summary("qemu:1")], 0.5)
    assert verdict.keys() | summary.keys() | {"summary"} == documented(
        "`watch` and `replay`: one object per verdict"
    ) | {"summary"}
    assert json.loads(json.dumps([verdict, summary])) == [verdict, summary]


def test_what_is_absent_is_null():
    kernel = process(path=Missing.NOT_APPLICABLE)
    assert contract.process(kernel)["path"] is None
    assert contract.process(None) is None


def test_the_id_names_the_flow_of_one_run_and_nothing_else():
    assert contract.verdict_id(a_verdict()) == contract.verdict_id(a_verdict(parasitic=True))


@pytest.mark.parametrize("at_ns", [0, -(10**30), 10**30, 1_700_000_000_123_456_789])
def test_any_time_a_guest_claims_can_be_printed(at_ns):
    assert contract.iso(at_ns).endswith("Z")


def test_guest_text_cannot_speak_to_the_terminal():
    name = process(name=EVIL, path=EVIL)
    body = contract.verdict(a_verdict()) | {"process": contract.process(name), "owners": [contract.process(name)]}
    out = io.StringIO()
    with redirect_stdout(out):
        story.print_row(body)
        story.print_story(body)
    assert all(c.isprintable() or c == "\n" for c in out.getvalue())
    assert "\\x1b" in out.getvalue()


def test_a_verdict_that_is_told_again_is_one_line_with_what_is_new(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = a_verdict()
    theirs = Evidence("Volatility's malfind: executable memory", "volatility:malfind", 0x1000, 4096, weight=1)
    out = io.StringIO()
    with redirect_stdout(out), _Showing(Output.TABLE, everything=True) as showing:
        showing.verdict(first)
        told_at_first = out.tell()
        showing.verdict(replace(first, evidence=(*first.evidence, theirs)))
    again = out.getvalue()[told_at_first:]
    name = contract.verdict_id(first)
    assert (out.getvalue()[:told_at_first].count(name), again.count(name)) == (1, 1)
    assert "malfind" in again and " more " in again
    for known in ("code in memory without a file", "because", "r.yaml"):
        assert known in out.getvalue() and known not in again


def test_what_many_verdicts_get_alike_is_shown_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    theirs = Evidence("Volatility's malfind: executable memory", "volatility:malfind", 0x1000, 4096, weight=1)
    verdicts = [replace(a_verdict(), flow=flow(number)) for number in range(3)]
    out = io.StringIO()
    with redirect_stdout(out), _Showing(Output.TABLE, everything=True) as showing:
        for one in verdicts + [replace(one, evidence=(*one.evidence, theirs)) for one in verdicts]:
            showing.verdict(one)
    assert out.getvalue().count("malfind") == 1
    assert out.getvalue().count(f"the same as {contract.verdict_id(verdicts[0])}") == 2


def test_long_guest_text_is_cut():
    assert len(safe("A" * 100_000)) <= 96


def told(body) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        story.print_row(body)
        story.print_story(body)
    return out.getvalue()


@pytest.mark.parametrize(
    ("handling", "act", "done", "held_us", "words"),
    [
        (None, None, None, None, "none: nothing was asked of the hand"),
        (Handling(Act.BLOCK, True), "block", True, None, "blocked"),
        (Handling(Act.RELEASE, True, 400_000), "release", True, 400.0, "held, then released after 0.4 ms"),
        (Handling(Act.HOLD, True), "hold", True, None, "held for a person to decide"),
        (Handling(Act.BLOCK, True, 7_200_000_000), "block", True, 7_200_000.0, "held, then blocked after 7.2 s"),
        (Handling(Act.RESET, False, 0), "reset", False, 0.0, "not reset: the flow was gone, or the host refused"),
    ],
)
def test_what_was_done_to_a_flow_is_told(handling, act, done, held_us, words):
    body = contract.verdict(a_verdict(handling=handling))
    assert (body["act"], body["act_done"], body["held_us"]) == (act, done, held_us)
    assert words in told(body)


def test_every_act_has_a_word():
    for act in Act:
        assert told(contract.verdict(a_verdict(handling=Handling(act, True))))


def test_a_verdict_that_an_older_version_wrote_down_can_still_be_told():
    body = contract.verdict(a_verdict())
    for key in ("act", "act_done", "held_us"):
        del body[key]
    assert "DENY" in told(body)


def test_a_verdict_and_a_summary_tell_which_guest_it_is_also_when_its_process_id_is_another_guests():
    vm = GuestId("qemu:4711", "11111111-2222-3333-4444-555555555555", "web-01", "4711-1")
    one = a_verdict()
    body = contract.verdict(replace(one, flow=replace(one.flow, id=replace(one.flow.id, vm=vm))))
    assert (body["vm"], body["vm_uuid"], body["vm_name"]) == ("qemu:4711", vm.uuid, "web-01")
    (told,) = contract.summary([Summary("qemu:4711", uuid=vm.uuid, name=vm.name)], 0.5)["guests"]
    assert (told["vm"], told["vm_uuid"], told["vm_name"]) == ("qemu:4711", vm.uuid, "web-01")
