"""``parasight stop``: ends what runs, takes what crashed off the ports, touches nothing else.

The verb looks only into the namespaces of the test here: appliances that others run on this machine go on.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appliance.cli import stop
from appliance.cli.main import app
from appliance.tap.bpf.journal import Journal
from tests.tap.world import PORT, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "json.md").read_text()

APPLIANCE = """
import signal, sys, time
from appliance.flow.community import community_id
from appliance.model import GuestId, GuestPort
from appliance.tap.bpf.tap import KernelTap
stopped = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: stopped.append(1))
tap = KernelTap(GuestId("port:x"), [GuestPort(sys.argv[1], netns=sys.argv[2])], time.time_ns, community_id=community_id)
print("ready", flush=True)
while not stopped:
    tap.poll(0.05)
tap.close()
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(stop, "PATIENCE_S", 120.0)  # on a busy machine
    with make_world("st") as made:
        monkeypatch.setattr(stop, "iter_namespaces", lambda _: iter([made.host_path, made.guest_path]))
        yield made


@pytest.fixture
def start(world, tmp_path):
    """Start a program that taps the port, under a name; it is ended with the test."""
    children = []

    def run(name: str, *words: str) -> subprocess.Popen:
        script = tmp_path / name
        script.write_text(APPLIANCE)
        command = [sys.executable, str(script), PORT, world.host_path, *words]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        children.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield run
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def seen(world) -> str:
    shows = (("qdisc", "show"), ("filter", "show", "dev", PORT, "ingress"), ("filter", "show", "dev", PORT, "egress"))
    command = ["ip", "netns", "exec", world.host, "tc"]
    return "".join(
        subprocess.run([*command, *show], check=True, capture_output=True, text=True, timeout=30).stdout
        for show in shows
    )


def run_stop(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["stop", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_where_nothing_of_ours_is_that_is_said(world) -> None:
    assert run_stop() == (0, "no running appliance was found\n")
    assert run_stop("--clean") == (0, "nothing of ours was found\n")
    assert json.loads(run_stop("--clean", "-o", "json")[1]) == []


def test_a_running_appliance_is_stopped_and_leaves_the_port_as_it_was(world, start) -> None:
    before = seen(world)
    child = start("parasight")
    assert run_stop() == (0, f"stopped appliance {child.pid}\n")
    assert child.wait(30) == 0
    assert seen(world) == before
    assert run_stop("--clean") == (0, "nothing of ours was found\n")


@pytest.mark.parametrize("crashed", [False, True])
def test_the_real_appliance_is_stopped_or_cleaned_after(world, tmp_path, crashed) -> None:
    before = seen(world)
    command = ["ip", "netns", "exec", world.host, sys.executable, "-m", "appliance.cli", "watch", f"port:{PORT}"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PARASIGHT_STATE": str(tmp_path)},
    ) as child:
        try:
            assert any(line == "ready\n" for line in child.stderr), "it ended before it was ready"
            assert "parasight_tap" in seen(world)
            if crashed:
                child.kill()
                child.wait()
                code, text = run_stop("--clean")
                assert (code, len(text.splitlines())) == (0, 3)
            else:
                assert run_stop() == (0, f"stopped appliance {child.pid}\n")
                assert child.wait(60) == 0
        finally:
            child.kill()
    assert seen(world) == before
    assert Journal().notes() == []


def test_two_appliances_on_one_port_are_both_stopped(world, start) -> None:
    before = seen(world)
    pids = sorted(start("parasight").pid for _ in range(2))
    code, text = run_stop("--clean")
    assert (code, text.splitlines()) == (0, [f"stopped appliance {pid}" for pid in pids])
    assert seen(world) == before


def test_what_a_crashed_appliance_left_is_removed_line_by_line(world, start) -> None:
    before = seen(world)
    child = start("parasight")
    child.send_signal(signal.SIGKILL)  # and not waited for: a zombie is as gone as gone
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert "parasight_tap" in seen(world)
    code, text = run_stop("--clean")
    assert code == 0
    assert text.splitlines() == [
        f"removed {what} of port {PORT} in {world.host_path}, left by process {child.pid}"
        for what in ("ingress filter", "egress filter", "clsact qdisc")
    ]
    assert seen(world) == before
    assert Journal().notes() == []
    assert run_stop("--clean") == (0, "nothing of ours was found\n")


def test_the_objects_have_the_documented_keys(world, start) -> None:
    child = start("parasight")
    child.kill()
    child.wait()
    bodies = json.loads(run_stop("--clean", "--output", "json")[1])
    section = DOCUMENT.split("## `stop`")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert [(body["what"], body["hook"]) for body in bodies] == [
        ("filter", "ingress"), ("filter", "egress"), ("qdisc", None)
    ]  # fmt: skip
    for body in bodies:
        assert body.keys() == documented
        assert (body["pid"], body["port"], body["netns"]) == (child.pid, PORT, world.host_path)
        assert body["done"]


def test_a_process_that_is_no_parasight_is_never_signalled(world, start) -> None:
    child = start("something-else")
    code, text = run_stop("--clean")
    assert code == 1
    assert f"process {child.pid} uses our filters but is no parasight" in text
    assert f"kept ingress filter of port {PORT} in {world.host_path}: process {child.pid} uses it" in text
    assert child.poll() is None
    assert "parasight_tap" in seen(world)


def test_an_appliance_that_only_observes_is_found_by_its_control_socket(world, tmp_path) -> None:
    script = tmp_path / "parasight"
    script.write_text(
        "import socket, sys, time\n"
        "server = socket.socket(socket.AF_UNIX)\n"
        "server.bind(sys.argv[1])\n"
        "server.listen()\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    command = [sys.executable, str(script), str(tmp_path / "run" / "control.sock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        assert run_stop() == (0, f"stopped appliance {child.pid}\n")
        assert child.wait(30) == -signal.SIGTERM
    assert run_stop() == (0, "no running appliance was found\n"), "a stale socket is nobody"


def test_an_appliance_that_does_not_end_is_named_with_the_remedy(world, start, monkeypatch) -> None:
    monkeypatch.setattr(stop, "PATIENCE_S", 0.3)
    child = start("parasight", "deaf")
    code, text = run_stop("--clean")
    assert code == 1
    assert f"'kill -KILL {child.pid}'" in text
    assert "parasight_tap" in seen(world), "its guest stays watched"
    child.kill()
    child.wait()
    assert run_stop("--clean")[0] == 0
    assert "parasight_tap" not in seen(world)


def test_a_qdisc_of_ours_that_somebody_else_uses_is_kept_until_it_is_free(world, start) -> None:
    before = seen(world)
    child = start("parasight")
    place = ["ip", "netns", "exec", world.host, "tc", "filter"]
    words = ["dev", PORT, "ingress", "protocol", "all", "pref", "9"]
    subprocess.run([*place, "add", *words, "u32", "match", "u32", "0", "0", "flowid", "1:1"], check=True, timeout=30)
    child.kill()
    child.wait()
    code, text = run_stop("--clean")
    assert code == 0
    assert text.splitlines()[-1].endswith("filters of others hang on it")
    assert "u32" in seen(world)
    subprocess.run([*place, "del", *words], check=True, timeout=30)
    assert "removed clsact qdisc" in run_stop("--clean")[1]
    assert seen(world) == before


def test_a_namespace_that_has_gone_meanwhile_is_no_error(world, monkeypatch) -> None:
    monkeypatch.setattr(stop, "iter_namespaces", lambda _: iter(["/run/netns/gone-by-now", world.host_path]))
    assert run_stop("--clean")[0] == 0
