"""A real guest: it boots, tells the truth, takes a parasite without dying, and leaves nothing behind."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guest import Guest, boot
from lab.image import build
from lab.network import Network
from lab.packages import LabError
from lab.world import SINK_PORT, Caller, World

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as made, World(made):
        yield made
    assert not made.path().exists()
    assert not made.path(world=True).exists()


@pytest.fixture(scope="module")
def guest(network: Network) -> Iterator[Guest]:
    with boot(build("debian-12-cloud"), network, name="lab-test") as booted:
        yield booted
    assert not Path(f"/proc/{booted.pid}").exists()
    assert booted.qmp_path is not None and not booted.qmp_path.parent.exists()


def test_commands_run_side_by_side_and_files_come_and_go(guest: Guest) -> None:
    slow = guest.spawn("echo started; exec sleep 100")
    slow.wait_for("started", 20)
    content = os.urandom(200_000)
    guest.put("/tmp/some/file", content, 0o700)
    assert guest.get("/tmp/some/file") == content
    done = guest.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert len(guest.run("sleep 100 & head -c 1000000 /dev/zero").stdout) == 1_000_000
    assert slow.running
    slow.kill()
    assert slow.wait(10).returncode == -9
    with pytest.raises(LabError, match="FileNotFoundError"):
        guest.get("/nonexistent")


def test_the_guest_outlives_the_death_of_its_agent(guest: Guest) -> None:
    orphan = guest.spawn("kill -9 $PPID; touch /tmp/killed; exec sleep 100")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(LabError, TimeoutError):
            guest.agent.request("get", timeout_s=2, path="/tmp/killed")
            break
    orphan.kill()
    assert orphan.wait(10).returncode == 127
    assert guest.run("true").returncode == 0


def test_the_truth_has_every_kind_of_socket_and_where_the_kernel_is(guest: Guest) -> None:
    job = guest.spawn("exec python3 -S -E /opt/workloads/sockets.py --count 200 --server 10.77.0.1 --server6 fd77::1")
    job.wait_for("READY", 90)
    truth = guest.truth("init_task")
    job.kill()
    states = Counter(socket.state for socket in truth.sockets)
    assert states.keys() >= {"ESTAB", "LISTEN", "UNCONN", "SYN-SENT", "CLOSE-WAIT"}
    assert states["TIME-WAIT"] >= 4
    assert states["SYN-RECV"] >= 3
    assert len(truth.sockets) >= 200
    assert any(socket.local.startswith("::ffff:") for socket in truth.sockets)
    assert any(len(socket.owners) == 3 for socket in truth.sockets)
    assert any(process.uid == 33 for process in truth.processes)
    contained = next(process for process in truth.processes if "/docker-" in process.cgroup)
    assert contained.nspid[1] == 1
    assert contained.netns != truth.init_netns
    assert any(socket.netns == contained.netns for socket in truth.sockets)
    assert truth.symbols["init_task"] > 0xFFFF_FFFF_8000_0000
    assert truth.ram[-1][1] > 512 << 20
    assert truth.release == guest.image.release


def test_an_injected_worker_has_the_parasite_and_keeps_serving(guest: Guest, network: Network) -> None:
    assert guest.run("/opt/demo/web.sh").returncode == 0
    master = int(guest.get("/run/nginx.pid"))
    workers = [process.pid for process in guest.truth().processes if process.ppid == master]
    assert len(workers) == 2
    done = guest.run(f"/opt/parasite/infect.sh {workers[0]} 10.77.0.1 {SINK_PORT} rwx")
    assert done.returncode == 0, done.stderr
    time.sleep(2)
    truth = guest.truth()
    (connection,) = [socket for socket in truth.sockets if socket.rport == SINK_PORT]
    assert (connection.state, [owner.pid for owner in connection.owners]) == ("ESTAB", [workers[0]])
    maps = guest.get(f"/proc/{workers[0]}/maps").decode()
    assert "/dev/shm/.x/libparasite.so" in maps
    assert " rwxp 00000000 00:00 0" in maps
    with Caller(network, [guest.ip4, guest.ip6], tcp=(80,), count=40, seconds=20) as caller:
        calls = caller.wait()
    assert (calls.done, calls.failed) == (40, 0)
    assert {process.pid for process in guest.truth().processes if process.ppid == master} == set(workers)
    assert guest.get("/var/log/nginx/error.log") == b""


def test_qemu_reports_no_pause_of_a_guest_nobody_paused(guest: Guest) -> None:
    assert guest.qmp("query-status")["status"] == "running"
    assert not {"STOP", "RESUME"} & {event["event"] for event in guest.events}
    guest.qmp("stop")
    guest.qmp("cont")
    assert {"STOP", "RESUME"} <= {event["event"] for event in guest.events}


def test_a_guest_that_cannot_boot_is_told_with_the_consoles_last_lines(network: Network) -> None:
    with pytest.raises(LabError, match=r"(?s)did not boot.*console:.*not syncing"):
        boot(build("debian-12-cloud"), network, append="rdinit=/nonexistent root=/dev/none")
