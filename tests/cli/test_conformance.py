"""Known answers of an image are compared, each with what was found."""

import json

import pytest

from appliance.cli.conformance import ANSWERS, _load
from tests.worlds.command import parasight
from tests.worlds.windows import Machine


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    with Machine("19041", path=folder / "win.raw") as machine:
        notepad = machine.process("notepad.exe", parent=machine["explorer.exe"])
        machine.inject(notepad)
        machine.tcp(notepad, ("10.0.0.5", 49_800), ("203.0.113.9", 443), "CLOSE_WAIT")
        machine.tcp(notepad, ("fd00::5", 49_801), ("2001:db8::1", 443))
        machine.write_symbols(folder)
        yield folder, notepad.pid


def answers(owner: int, /, **changed) -> dict:
    row = {
        "protocol": "tcp",
        "state": "CLOSE_WAIT",
        "local": {"ip": "10.0.0.5", "port": 49_800},
        "remote": {"port": 443},
    }
    return {
        "image": {"name": "win.raw", "os": "Windows 10", "source": "made here"},
        "at_least": {"processes": 10, "connections": 1},
        "processes": [{"pid": owner, "name": "NOTEPAD.EXE", "evidence": ["injected-pe"]}],
        "connections": [row | {"pid": owner, "name": "notepad.exe"} | changed],
    }


def check(image, body: dict):
    folder, _ = image
    expected = folder / "expected.json"
    expected.write_text(json.dumps(body))
    words = ("conformance", folder / "win.raw", "--expect", expected, "--symbols", folder, "-o", "jsonl")
    return parasight(*words, home=folder)


def test_the_right_answers_are_all_given(image):
    done = check(image, answers(image[1]))
    assert done.code == 0, done.out + done.err
    assert [one["check"] for one in done.objects] == [
        "number of processes", "number of connections", "process", "connection", "evidence",
    ]  # fmt: skip
    assert all(one["ok"] for one in done.objects)


@pytest.mark.parametrize(
    "changed",
    [{"state": "ESTABLISHED"}, {"pid": 4}, {"name": "calc.exe"}, {"remote": {"port": 80}}, {"flags": ["stale"]}],
)
def test_a_wrong_answer_is_told_beside_the_nearest_that_was_found(image, changed):
    done = check(image, answers(image[1], **changed))
    assert done.code == 1
    (wrong,) = [one for one in done.objects if not one["ok"]]
    assert wrong["check"] == "connection"
    assert "10.0.0.5:49800" in wrong["found"]


def test_an_address_may_be_written_in_any_way(image):
    known = {"local": {"ip": "FD00:0:0::0:5"}, "remote": {"ip": "2001:0DB8::0:1"}, "state": "ESTABLISHED"}
    assert check(image, answers(image[1], **known)).code == 0
    assert check(image, answers(image[1], **(known | {"remote": {"ip": "2001:db8::2"}}))).code == 1
    assert check(image, answers(image[1], **(known | {"remote": {"ip": "nowhere"}}))).code == 1


def test_answers_that_are_no_answers_are_refused(image):
    done = check(image, answers(image[1]) | {"conections": []})
    assert (done.code, "conections" in done.err) == (3, True)


def test_an_unknown_name_tells_the_shipped_ones(image):
    folder, _ = image
    done = parasight("conformance", folder / "win.raw", "--expect", "nonsense", home=folder)
    assert done.code == 2
    assert "cridex" in done.err


@pytest.mark.parametrize("name", [path.stem for path in sorted(ANSWERS.glob("*.json"))])
def test_every_shipped_file_is_sound(name):
    assert _load(name).image.source


def test_what_could_not_be_seen_is_told(image):
    folder, pid = image
    whole = (folder / "win.raw").read_bytes()
    (folder / "cut.raw").write_bytes(whole[: len(whole) - 4096 - 100])
    expected = folder / "cut.json"
    expected.write_text(json.dumps(answers(pid)))
    done = parasight("conformance", folder / "cut.raw", "--expect", expected, "--symbols", folder, home=folder)
    assert "not seen: memory image: the file is cut short" in done.err
