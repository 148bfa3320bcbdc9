"""A capture and a memory image of a real guest are judged like the guest itself (C2, P10, law 6)."""

import subprocess
import time

import pytest

from tests.worlds.command import parasight

pytestmark = pytest.mark.system

TALKER = """
import socket, time
s = socket.create_connection(("10.77.0.1", 7000))
print("CONNECTED", s.getsockname()[1], flush=True)
while True:
    s.sendall(b"hello"); s.recv(16); time.sleep(0.2)
"""

RULES = """
apiVersion: v1
kind: RuleSet
metadata: {name: talk, version: '1'}
spec:
  processes:
    - name: python
      match: {image: '/usr/bin/python3*'}
      default: deny
      severity: high
"""


@pytest.fixture(scope="module")
def case(guest, network, tmp_path_factory):
    """A capture that begins with the connection, and a dump made while it lives."""
    home = tmp_path_factory.mktemp("case")
    capture, dump = home / "case.pcap", home / "case.elf"
    command = ["tcpdump", "-q", "-U", "-i", guest.port, "-s", "2048", "-w", str(capture), "tcp"]
    tcpdump = subprocess.Popen(network.enter(*command), stderr=subprocess.PIPE, text=True)
    try:
        assert "listening" in tcpdump.stderr.readline()
        guest.put("/tmp/talker.py", TALKER.encode())
        job = guest.spawn("exec /usr/bin/python3 /tmp/talker.py")
        job.wait_for("CONNECTED", 30)
        time.sleep(1.5)
        guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{dump}")
        live = parasight("connections", f"qemu:{guest.pid}", "-o", "jsonl", home=home)
    finally:
        tcpdump.terminate()
        tcpdump.wait()
        tcpdump.stderr.close()
    (home / "rules.yaml").write_text(RULES)
    port = int(job.output.split("CONNECTED")[1].split()[0])
    job.kill()
    return home, capture, dump, port, live


def replay(case, *words):
    home, capture, dump, _, _ = case
    return parasight(
        "replay", "--pcap", capture, "--memory", dump, "--rules", home / "rules.yaml", "-o", "jsonl", *words, home=home
    )


def test_the_connection_is_bound_to_its_process_and_denied(case):
    done = replay(case)
    assert done.code == 1, done.err
    *verdicts, summary = done.objects
    (mine,) = [body for body in verdicts if body["flow"]["local"]["port"] == case[3]]
    assert mine["verdict"] == "deny"
    assert mine["binding"]["match"] == "exact"
    assert mine["process"]["path"].startswith("/usr/bin/python3")
    assert "talker.py" in mine["process"]["command"]
    assert mine["rule"]["line"] == 9
    assert summary["bound"]["exact"] >= 1


def test_the_same_case_gives_the_same_verdicts_byte_for_byte(case):
    first, second = replay(case), replay(case)
    assert first.objects[:-1] == second.objects[:-1]


def test_explain_tells_the_story_of_a_replayed_verdict(case):
    done = replay(case)
    (mine,) = [body for body in done.objects[:-1] if body["flow"]["local"]["port"] == case[3]]
    story = parasight("explain", mine["id"][:9], home=case[0])
    assert story.code == 0
    for word in ("DENY", "talker.py", "rules.yaml:9", "exact"):
        assert word in story.out
    assert parasight("explain", "ffffffffffff", home=case[0]).code == 2


def test_the_image_shows_the_same_connections_as_the_running_guest(case):
    home, _, dump, _, live = case
    image = parasight("connections", f"file:{dump}", "-o", "jsonl", home=home)
    assert image.code == live.code == 0, image.err
    forget = {"vm": None}
    assert [body | forget for body in image.objects] == [body | forget for body in live.objects]


def test_a_truncated_capture_is_judged_as_far_as_it_goes_and_says_so(case):
    home, capture, dump, port, _ = case
    cut = home / "cut.pcap"
    cut.write_bytes(capture.read_bytes()[:-7])
    done = parasight(
        "replay", "--pcap", cut, "--memory", dump, "--rules", home / "rules.yaml", "-o", "jsonl", home=home
    )
    assert done.code == 3
    assert "packet" in done.err and "cut.pcap" in done.err
    assert any(body["flow"]["local"]["port"] == port for body in done.objects[:-1])
