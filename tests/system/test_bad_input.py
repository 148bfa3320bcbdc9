"""Bad input of any kind: a clear message, the right exit code, and the other guests watched on."""

import os
import subprocess
import sys
import time

import pytest

from lab.guest import boot
from lab.image import build
from tests.worlds.command import ROOT, Watching, environment, parasight

pytestmark = pytest.mark.system

FIVE_MISTAKES = """\
apiVersion: v1
kind: RuleSet
metadata: {name: broken, version: '1'}
spec:
  mode: montor
  processes:
    - name: web
      match: {imge: /usr/sbin/nginx}
      defualt: deny
      allow:
        - {direction: sideways, ports: [80]}
        - {direction: out, ports: [70000]}
"""


@pytest.fixture
def home(tmp_path):
    return tmp_path


def test_an_unknown_guest_is_named_and_near_names_are_offered(guest, home):
    done = parasight("connections", "web-1", home=home)
    assert done.code == 2
    assert "web-1" in done.err and "web-01" in done.err


def test_a_pid_that_is_no_qemu_is_called_what_it_is(home):
    done = parasight("connections", f"qemu:{os.getpid()}", home=home)
    assert done.code == 2
    assert "QEMU" in done.err


def test_a_pid_that_does_not_exist_is_a_usage_error(home):
    assert parasight("processes", "qemu:4194304", home=home).code == 2


def test_without_permission_the_remedy_is_named(guest, home):
    home.chmod(0o777)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
    done = parasight("connections", f"qemu:{guest.pid}", home=home, prefix=nobody)
    assert done.code == 5, done
    assert "CAP_SYS_PTRACE" in done.err or "run as root" in done.err


def test_a_truncated_dump_says_how_much_is_missing(guest, home):
    dump = home / "guest.elf"
    guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{dump}")
    whole = dump.stat().st_size
    os.truncate(dump, whole // 100)
    done = parasight("connections", f"file:{dump}", home=home)
    assert done.code == 3, done
    assert "truncated" in done.err or "missing" in done.err, (whole, done.err)


def test_five_mistakes_in_a_rule_file_are_told_at_once(home):
    rules = home / "broken.yaml"
    rules.write_text(FIVE_MISTAKES)
    done = parasight("rules", "check", rules, home=home)
    assert done.code == 3
    places = [line for line in done.err.splitlines() if line.startswith(f"{rules}:")]
    assert len(places) >= 5, done.err
    for word in ("montor", "imge", "defualt", "sideways", "70000"):
        assert word in done.err
    assert "did you mean" in done.err


def test_two_watches_of_one_guest_share_the_book_and_explain_knows_at_once(guest, home):
    with Watching(f"qemu:{guest.pid}", home=home) as one, Watching(f"qemu:{guest.pid}", home=home) as other:
        guest.run("/usr/bin/python3 -c 'import socket; socket.create_connection((\"10.77.0.1\", 7000)).close()'")
        time.sleep(2.0)
        assert one.verdicts and other.verdicts
        told = parasight("explain", one.verdicts[-1]["id"], home=home)
        one.end()
        other.end()
    assert told.code == 0, told
    assert not [line for line in one.said + other.said if "explain" in line]


def test_a_reader_that_leaves_ends_the_watch(guest, home):
    command = [sys.executable, "-m", "appliance.cli", "watch", f"qemu:{guest.pid}", "-o", "jsonl"]
    watch = subprocess.Popen(
        command, cwd=ROOT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while watch.stderr.readline().strip() != "ready":
        pass
    watch.stdout.close()
    for _ in range(3):
        guest.run("/usr/bin/python3 -c 'import socket; socket.create_connection((\"10.77.0.1\", 7000)).close()'")
    assert watch.wait(timeout=30) == 0
    assert "Traceback" not in watch.stderr.read()
    watch.stderr.close()


@pytest.mark.parametrize("words", [("processes",), ("nosuch",), ("guests", "--bogus"), ("guests", "--output", "xml")])
def test_a_wrong_command_line_is_a_usage_error(words, home):
    done = parasight(*words, home=home)
    assert done.code == 2, done
    assert done.err


def test_a_guest_that_dies_while_watched_leaves_the_other_watched_on(guest, network, home):
    call_out = "/usr/bin/python3 -c 'import socket; socket.create_connection((\"10.77.0.1\", 7000)).close()'"
    with (
        boot(build("debian-12-cloud"), network, name="doomed", memory_mb=512) as doomed,
        Watching(f"qemu:{guest.pid}", f"qemu:{doomed.pid}", home=home) as watch,
    ):
        guest.run(call_out)
        os.kill(doomed.pid, 9)
        time.sleep(1.0)
        before = len(watch.verdicts)
        guest.run(call_out)
        time.sleep(1.0)
        watch.end()
    assert len(watch.verdicts) > before
    assert any(f"qemu:{doomed.pid}" in line for line in watch.said)
    ended = {one["vm"]: one["ended"] for one in watch.summary["guests"]}
    assert ended[f"qemu:{guest.pid}"] is None
    assert ended[f"qemu:{doomed.pid}"]
