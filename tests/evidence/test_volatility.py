"""The keeper of the worker: whatever the worker does, it is not waited for, and it does not outlive its watch."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from appliance.evidence.claims import MAX_CLAIMS, claims_of
from appliance.evidence.volatility import MAX_ASKED, MAX_FAILURES, SecondOpinion, probe
from tests.worlds.nouns import owner

PROCESS = owner(812).process
ROW = {"PID": 812, "Process": "x", "Start": 4096, "End": 8192, "Path": "Anonymous Mapping", "Protection": "rwx"}
ROW["Hexdump"] = "4d5a90" + 61 * "00"
HELLO = """
import json, os, sys, time
open(sys.argv[-1] + "/started", "a").write(f"{os.getpid()}\\n")
def answer(question, **what):
    print(json.dumps({"id": question["id"], **what}), flush=True)
def failing(*_):
    sys.exit(1)
for line in sys.stdin:
    question = json.loads(line)
"""


@pytest.fixture
def worker(tmp_path):
    """Make a keeper of a worker that is badly brought up; its `body` answers one question."""
    opened = []

    def make(body, **limits):
        script = HELLO + textwrap.indent(textwrap.dedent(body), "    ")
        command = [sys.executable, "-c", script]
        opened.append(SecondOpinion("qemu:1", cache=tmp_path, command=command, **limits))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def hear(one, count=1):
    heard, deadline_s = [], time.monotonic() + 30
    while len(heard) < count:
        assert time.monotonic() < deadline_s, heard
        heard += one.heard()
        time.sleep(0.005)
    return heard


def started(tmp_path):
    return [int(line) for line in (tmp_path / "started").read_text().split()]


def gone(pid):
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_rows_come_back_as_evidence(worker):
    one = worker(f"answer(question, rows={{'linux.malware.malfind': [{ROW}]}}, failed={{}}, cut=0)")
    assert one.ask("linux", PROCESS)
    (opinion,) = hear(one)
    (evidence,) = opinion.evidence
    assert opinion.process == PROCESS.key
    assert (evidence.kind, evidence.address, evidence.size, evidence.weight) == ("volatility:malfind", 4096, 4096, 1)
    assert "4d5a90" in evidence.detail
    assert opinion.trouble is None


def test_the_question_names_the_process_by_its_address(worker):
    one = worker("answer(question, error=json.dumps(question))")
    one.ask("linux", PROCESS)
    asked = json.loads(hear(one)[0].trouble[:-1].partition('"plugins"')[0].rstrip(", ") + "}")
    assert (asked["os"], asked["pid"], int(asked["at"], 16)) == ("linux", 812, PROCESS.task_va)


def test_seeing_nothing_is_said_too(worker):
    one = worker("answer(question, rows={'linux.malware.malfind': []}, failed={}, cut=0)")
    one.ask("linux", PROCESS)
    (evidence,) = hear(one)[0].evidence
    assert (evidence.kind, evidence.weight) == ("volatility:nothing", 0)


def test_a_plugin_that_failed_is_named_and_the_others_count(worker):
    one = worker(f"answer(question, rows={{'linux.malware.malfind': [{ROW}]}}, failed={{'linux.x': 'ValueError'}})")
    one.ask("linux", PROCESS)
    (opinion,) = hear(one)
    assert len(opinion.evidence) == 1
    assert "linux.x: ValueError" in opinion.trouble


def test_one_worker_answers_many_questions(worker, tmp_path):
    one = worker("answer(question, rows={}, failed={})")
    for _ in range(5):
        one.ask("linux", PROCESS)
    assert len(hear(one, 5)) == 5
    assert len(started(tmp_path)) == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("time.sleep(1000)", "took too long"),
        ("failing()", "died"),
        ("sys.stdout.write('x' * (8 << 20)); sys.stdout.flush(); time.sleep(1000)", "said too much"),
        ("print('nonsense', flush=True)", ""),
        ("print('[1]', flush=True)", "no answer"),
        ("answer({'id': 4711}, rows={})", "no answer"),
    ],
)
def test_a_worker_that_misbehaves_is_killed_and_started_anew_until_it_is_given_up(worker, tmp_path, body, why):
    one = worker(body, first_s=1.0, answer_s=1.0)
    for _ in range(MAX_FAILURES):
        one.ask("linux", PROCESS)
        (opinion,) = hear(one)
        assert opinion.evidence == ()
        assert why in opinion.trouble
    assert not one.ask("linux", PROCESS)
    pids = started(tmp_path)
    assert len(pids) == MAX_FAILURES
    assert all(gone(pid) for pid in pids)


def test_folders_of_symbols_mean_to_the_worker_what_they_mean_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    body = "\n    answer(question, error=str(os.path.samefile(sys.argv[-1], '" + str(tmp_path / "mine") + "')))"
    script = HELLO.replace('open(sys.argv[-1] + "/started", "a").write(f"{os.getpid()}\\n")\n', "") + body
    one = SecondOpinion("qemu:1", cache=tmp_path, command=[sys.executable, "-c", script], symbols=[Path("mine")])
    one.ask("linux", PROCESS)
    assert hear(one)[0].trouble == "True"
    one.close()


def test_a_worker_that_cannot_be_started_is_a_trouble_and_no_error(tmp_path):
    one = SecondOpinion("qemu:1", cache=tmp_path, command=["/nonexistent"])
    one.ask("linux", PROCESS)
    assert hear(one)[0].trouble
    one.close()


def test_asking_and_hearing_never_wait(worker):
    one = worker("time.sleep(1000)")
    began_s = time.monotonic()
    taken = [one.ask("linux", PROCESS) for _ in range(4 * MAX_ASKED)]
    assert one.heard() == []
    assert time.monotonic() - began_s < 60
    assert MAX_ASKED <= sum(taken) <= MAX_ASKED + 1


def test_closing_ends_a_busy_worker_at_once(worker, tmp_path):
    one = worker("time.sleep(1000)")
    one.ask("linux", PROCESS)
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "started").exists() or not started(tmp_path):
        assert time.monotonic() < deadline_s
    one.close()
    assert gone(started(tmp_path)[0])
    assert not one.ask("linux", PROCESS)
    one.close()


def test_an_idle_worker_ends_and_is_started_again(worker, tmp_path):
    one = worker("answer(question, rows={}, failed={})", idle_s=0.05)
    one.ask("linux", PROCESS)
    hear(one)
    assert gone(started(tmp_path)[0])
    one.ask("linux", PROCESS)
    hear(one)
    assert len(started(tmp_path)) == 2


def test_nothing_is_asked_about_a_system_that_no_plugin_knows(worker):
    assert not worker("pass").ask("plan9", PROCESS)


def test_the_probe_does_not_import_what_it_looks_for():
    code = "import sys; from appliance.evidence.volatility import probe"
    code += "; print(probe().ok, 'volatility3' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(probe().ok), "False"]


def test_a_listing_is_a_claim_only_where_something_is_odd():
    listed = {"Base": 65536, "InLoad": True, "InInit": False, "InMem": True, "MappedPath": "\\Windows\\a.exe"}
    hidden = listed | {"InLoad": False, "InMem": False, "MappedPath": "\\Users\\evil.dll"}
    unknown = hidden | {"InLoad": None}
    (claim,) = claims_of("windows.malware.ldrmodules", [listed, hidden, unknown])
    assert "evil.dll" in claim.claim
    assert claim.address == 65536
    honest = {"PEB_ImageFilePath": "C:\\a.exe", "PEB_ImageFilePath_Spoofed": False, "PEB_CommandLine_Spoofed": False}
    assert claims_of("windows.malware.pebmasquerade", [honest]) == []
    assert len(claims_of("windows.malware.pebmasquerade", [honest | {"PEB_CommandLine_Spoofed": True}])) == 1


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        7,
        {},
        {"Start": -1, "End": 1 << 80, "Path": 7, "Protection": None, "Hexdump": [1]},
        {"Start": True, "End": "x"},
        {"InLoad": 0, "InInit": "", "InMem": [], "Base": {}},
    ],
)
def test_whatever_a_row_holds_a_claim_stays_bounded(row):
    plugins = (
        "windows.malware.malfind windows.malware.ldrmodules windows.malware.suspicious_threads linux.malware.malfind"
    )
    for plugin in (*plugins.split(), "windows.malware.hollowprocesses", "linux.malware.process_spoofing", "no.such"):
        for claim in claims_of(plugin, [row]):
            assert len(claim.claim) < 1000
            assert 0 <= claim.address < 1 << 64
            assert 0 <= claim.size < 1 << 65


def test_many_rows_become_a_few_claims_and_a_number():
    rows = [ROW | {"Start": 4096 * number} for number in range(200)]
    claims = claims_of("linux.malware.malfind", rows)
    assert len(claims) == MAX_CLAIMS + 1
    assert f"{200 - MAX_CLAIMS} more" in claims[-1].claim
