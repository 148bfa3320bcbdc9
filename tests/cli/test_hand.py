"""The verbs that speak to a running appliance, over its real socket; guest text does no harm on the way."""

import json
import os
import pwd
import re
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import contract
from appliance.cli.duration import duration_text, parse_duration
from appliance.cli.main import app
from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import Binding, Match
from appliance.respond import Banning, ControlRoom, ControlServer, HeldFlow, Words, control_path, spare
from appliance.respond.client import NotRunning, ask
from tests.respond.desks import PATIENCE_S, Clock, FakeDesk, Serving, eventually, verdict
from tests.worlds.nouns import owner

EVIL = "\x1b[2J\x1b]0;owned\x07\u202eevil[red]"
DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "json.md").read_text()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.fixture
def desk():
    return FakeDesk()


@pytest.fixture
def room(folder, desk):
    stopped = []
    banning = Banning(Clock(), stopped.append, spared=spare(), path=folder / "bans.json", wait_s=PATIENCE_S)
    made = ControlRoom(
        Words(contract.verdict, contract.iso), banning, lambda: stopped.append("stop"), Clock(), "1", wait_s=PATIENCE_S
    )
    with Serving(desk):
        made.admit(desk)
        server = ControlServer(control_path(), made.answer, print, tick=made.tick)
        yield made
        server.close()


def run(*words, code=0):
    result = CliRunner().invoke(app, list(words))
    assert (type(result.exception), result.exit_code) in {(type(None), code), (SystemExit, code)}, result.output
    return result.stdout


def run_json(*words, code=0):
    return json.loads(run(*words, "--output", "json", code=code))


def documented(title):
    section = DOCUMENT.split(f"## {title}")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def hold(desk, name="nginx", number=1):
    one = verdict(number)
    bound = replace(one, binding=Binding(Match.EXACT, None, (owner(name=name),), 1000))
    desk.waiting.append(HeldFlow(bound, Clock()() + 42 * 10**9, bound.judgement.decision))
    return contract.verdict_id(bound)


# -- nobody there --


@pytest.mark.parametrize(
    "words",
    [["status"], ["held"], ["bans"], ["decide", "abcdef", "allow"], ["ban", "203.0.113.9"], ["unban", "203.0.113.9"]],
)
def test_where_no_appliance_runs_one_is_told_how_to_start_it(words):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, NotRunning)
    assert "parasight watch TARGET" in str(result.exception)
    assert result.exception.exit_code == 6


def test_a_socket_that_is_left_over_is_no_appliance(folder):
    control_path().parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(control_path()))
    with pytest.raises(NotRunning):
        ask({"do": "status"})


# -- the verbs --


def test_status_shows_each_guest(room):
    text = run("status")
    assert "qemu:4242" in text
    assert "tc+ring" in text
    (body,) = run_json("status")
    assert set(body) | set(body["guests"][0]) == documented("`status`")


def test_held_shows_what_waits_and_decide_decides(room, desk):
    assert run_json("held") == []
    wanted = hold(desk)
    text = run("held")
    assert wanted in text
    assert "nginx" in text
    assert "42 s, then deny" in text
    (body,) = run_json("held")
    assert body["id"] == wanted
    assert set(body) == set(contract.verdict(verdict())) | documented("`held`")
    assert f"{wanted} of qemu:4242 is allowed" in run("decide", wanted[:6], "allow")
    assert desk.decided[0][1:] == (True, pwd.getpwuid(os.geteuid()).pw_name)
    assert run_json("held") == []


def test_a_decision_comes_too_late_with_words(room):
    result = CliRunner().invoke(app, ["decide", "abcdef", "block"])
    assert isinstance(result.exception, UsageError)
    assert "parasight held" in str(result.exception)


def test_only_allow_and_block_are_decisions(room, desk):
    result = CliRunner().invoke(app, ["decide", hold(desk), "perhaps"])
    assert result.exit_code == 2
    assert not desk.decided


def test_block_and_release_reach_the_one_flow(room, desk):
    one = verdict(5)
    room.known.remember(contract.verdict_id(one), one.flow.id)
    assert "is blocked" in run("block", contract.verdict_id(one))
    (body,) = run_json("block", contract.verdict_id(one)[:8], "--reset")
    assert body == {"id": contract.verdict_id(one), "vm": "qemu:4242", "act": "reset", "done": True}
    assert "goes on" in run("release", contract.verdict_id(one))
    assert [act.value for _, act, _ in desk.acts] == ["block", "reset", "release"]
    late = verdict(500)
    room.known.remember(contract.verdict_id(late), late.flow.id)
    assert "nothing was done" in run("block", contract.verdict_id(late), code=1)


def test_ban_bans_and_unban_lifts(room, desk):
    text = run("ban", "203.0.113.0/24", "--for", "1h", "--reason", "scans us")
    assert "203.0.113.0/24 is banned for 1 h, for all guests" in text
    assert "in place of an older ban" in run("ban", "203.0.113.0/24", "--for", "2h", "--reason", "scans us")
    run("ban", "2001:db8::7")
    assert [str(peer) for peer in desk.kernel] == ["203.0.113.0/24", "2001:db8::7/128"]
    text = run("bans")
    assert "scans us" in text
    assert "2001:db8::7/128" in text
    bodies = run_json("bans")
    assert set(bodies[0]) == documented("`bans`")
    assert "is not banned any more, for all guests" in run("unban", "203.0.113.0/24")
    assert [str(peer) for peer in desk.kernel] == ["2001:db8::7/128"]
    (body,) = run_json("unban", "2001:db8::7")
    assert set(body) == {"lifted", "still", "not_yet"}
    assert run_json("bans") == []


def test_a_ban_inside_another_is_lifted_and_one_is_told_of_the_other(room):
    run("ban", "203.0.113.0/24")
    run("ban", "203.0.113.9")
    assert "covered still: 203.0.113.0/24 is banned until it is lifted" in run("unban", "203.0.113.9")


def test_a_ban_that_would_do_harm_is_refused(room, desk):
    result = CliRunner().invoke(app, ["ban", "0.0.0.0/0"])
    assert isinstance(result.exception, UsageError)
    assert "never-ban" in str(result.exception)
    assert desk.kernel == {}


def test_a_ban_that_a_guest_cannot_carry_out_is_told_and_ends_with_1(room, desk):
    desk.refuses = HostError("its packets are only seen")
    result = CliRunner().invoke(app, ["ban", "203.0.113.9"])
    assert result.exit_code == 1
    assert "not yet in force for qemu:4242: its packets are only seen" in result.output
    desk.refuses = None
    eventually(lambda: len(desk.kernel) == 1, "the server's own housekeeping tries it again")


@pytest.mark.parametrize(
    "words", [["ban", "x"], ["ban", "10.0.0.1/8"], ["ban", "1.2.3.4", "--for", "soon"], ["unban", ""]]
)
def test_a_slip_of_the_pen_is_a_usage_error(room, words):
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UsageError)


def test_guest_text_does_no_harm(room, desk):
    hold(desk, name=EVIL)
    text = run("held")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b" in text
    (body,) = run_json("held")
    assert body["process"]["name"] == EVIL


# -- the client --


def test_many_people_ask_at_once(room):
    failed = []

    def talk():
        for _ in range(10):
            try:
                ask({"do": "status"})
            except HostError as error:  # more than the socket bears: said, not hung
                if "try again" not in str(error):
                    failed.append(error)

    threads = [threading.Thread(target=talk) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failed


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"ok": False, "error": "no", "code": 2}, UsageError),
        ({"ok": False, "error": "no", "code": 5}, PermissionRefused),
        (["what"], HostError),
        ({}, HostError),
    ],
)
def test_an_error_of_the_appliance_is_the_error_of_the_command(folder, answer, kind):
    server = ControlServer(control_path(), lambda *_: None, print)
    server._reply = lambda *_: answer
    try:
        with pytest.raises(kind):
            ask({"do": "status"})
    finally:
        server.close()


def test_an_appliance_that_dies_is_told(folder):
    control_path().parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control_path()))
        listener.listen()

        def die():
            client, _ = listener.accept()
            client.close()

        dying = threading.Thread(target=die)
        dying.start()
        with pytest.raises(HostError, match="ended without an answer"):
            ask({"do": "status"})
        dying.join(PATIENCE_S)


def test_an_appliance_that_hangs_is_not_waited_for_for_ever(folder):
    control_path().parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control_path()))
        listener.listen()
        with pytest.raises(HostError, match="does not answer"):
            ask({"do": "status"}, wait_s=0.05)


# -- durations --


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30", 30), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("7d", 604800), (None, None)],
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1w", "-5s", "1h30m", "٣s"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="--for"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.44, "0.4 s"), (42, "42 s"), (303, "5 m 3 s"), (3600, "1 h"), (3601, "1 h"), (93784, "1 d 2 h")],
)
def test_durations_are_said_by_their_two_units_that_matter(seconds, text):
    assert duration_text(seconds) == text
