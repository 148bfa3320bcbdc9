"""A guest whose packets cross no port of the host: its connections are read from its memory, and bound all the same.

The same guest stands in for a host with Yama and lockdown, which the host of these tests need not have.
"""

import json
import socket
import time

import pytest

from appliance.tap.netns import call_in_netns
from lab.guest import boot
from lab.image import build
from tests.worlds.command import ROOT, Watching, parasight

pytestmark = pytest.mark.system

LOCKDOWN = "lockdown=confidentiality"
GUEST, FORWARDED, SERVER, SERVICE = "10.77.0.11", 18080, 8000, 8080
PYTHON = ["/usr/bin/python3", "-S", "-E", "-c"]
CALL = f"import socket, time; peer = socket.create_connection(('10.77.0.1', {SERVER})); print('UP', flush=True)"
SERVE = f"import socket, time; server = socket.create_server(('0.0.0.0', {SERVICE})); print('UP', flush=True)"
YAMA_3 = "kernel.yama.ptrace_scope is 3: nobody may look into another process until the next boot"
STAY = "; time.sleep(600)"
ANSWER = "; peer, _ = server.accept()"


@pytest.fixture(scope="module")
def guest(network):
    forward = f"hostfwd=tcp:127.0.0.1:{FORWARDED}-{GUEST}:{SERVICE}"
    with boot(build("debian-12-cloud"), network, name="slirp-01", user_network=forward, append=LOCKDOWN) as booted:
        yield booted


def test_a_guest_with_user_networking_is_watched_through_its_memory(guest, network, tmp_path):
    inside = str(network.path())
    with call_in_netns(inside, lambda: socket.create_server(("127.0.0.1", SERVER))):
        target = f"qemu:{guest.pid}"
        (listed,) = [one for one in parasight("guests", "-o", "jsonl", home=tmp_path).objects if one["vm"] == target]
        assert listed["ports"] == []
        assert any("slirp" in note for note in listed["notes"])
        guest.spawn([*PYTHON, CALL + STAY]).wait_for("UP", 60)  # before the watch begins
        with Watching(target, home=tmp_path) as watching:
            assert any("read from memory every 1 s" in line for line in watching.said), watching.said
            old = wait_for(watching, "out", SERVER)
            guest.spawn([*PYTHON, CALL + STAY]).wait_for("UP", 60)
            guest.spawn([*PYTHON, SERVE + ANSWER + STAY]).wait_for("UP", 60)
            caller = call_in_netns(inside, lambda: socket.create_connection(("127.0.0.1", FORWARDED)))
            new = wait_for(watching, "out", SERVER, but=old)
            came_in = wait_for(watching, "in", SERVICE)
            truth = guest.truth()
            caller.close()
            watching.end()
        assert (old["flow"]["midstream"], new["flow"]["midstream"]) == (True, False)
        for verdict in (old, new, came_in):
            ports = verdict["flow"]["local"]["port"], verdict["flow"]["remote"]["port"]
            (real,) = [one for one in truth.sockets if (one.lport, one.rport) == ports]
            assert verdict["binding"]["match"] == "exact"
            assert [owner["pid"] for owner in verdict["owners"]] == [owner.pid for owner in real.owners]
        assert watching.summary["flows"] >= 3
        assert watching.summary["packets"] == 0


# Runs in the guest, a host with Yama and lockdown: what doctor says of each scope, and whether memory could be read.
PROBES = """
import json, os, subprocess, sys
sys.path.insert(0, "/opt/doctor")
from appliance.hosts.confinement import explain_refusal, probe_confinement
subprocess.run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], check=False)
for scope in "0123":
    with open("/proc/sys/kernel/yama/ptrace_scope", "w") as file:
        file.write(scope)
    for uid in (0, 65534):
        other = subprocess.Popen(["sleep", "60"], user=uid)
        if not (child := os.fork()):
            os.setuid(uid)
            lines = {one.name: one for one in probe_confinement()}
            try:
                maps = open(f"/proc/{other.pid}/maps").readlines()
                where = int(next(line for line in maps if "[stack]" in line).split("-")[1].split()[0], 16) - 4096
                os.pread(os.open(f"/proc/{other.pid}/mem", os.O_RDONLY), 8, where)
                readable = True
            except PermissionError:
                readable = False
            told = [lines["yama"].ok, readable, explain_refusal(other.pid).reason, lines["lockdown"].reason]
            print(json.dumps([scope, uid, *told]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        other.kill()
        other.wait()
"""


def test_what_doctor_says_of_yama_and_lockdown_is_what_a_kernel_with_them_does(guest):
    for path in ("__init__", "errors", "model", "hosts/__init__", "hosts/confinement", "hosts/lsm"):
        guest.put(f"/opt/doctor/appliance/{path}.py", (ROOT / f"appliance/{path}.py").read_bytes())
    done = guest.run(["/usr/bin/python3", "-S", "-E", "-c", PROBES])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 8
    for scope, uid, ok, readable, why, lockdown in rows:
        assert (scope, uid, ok) == (scope, uid, readable)
        assert readable == (scope == "0" or (uid == 0 and scope != "3"))
        if not readable:
            assert why == ("CAP_SYS_PTRACE is missing" if uid else YAMA_3), (scope, uid)
        assert lockdown.startswith("confidentiality: guests' memory can be read all the same")


def wait_for(watching, direction, port, *, but=None):
    """The verdict on a connection, once it is there."""
    end = "remote" if direction == "out" else "local"
    give_up_s = time.monotonic() + 60
    while time.monotonic() < give_up_s:
        for one in watching.verdicts:
            if one["flow"]["direction"] == direction and one["flow"][end]["port"] == port and one != but:
                return one
        time.sleep(0.05)
    raise AssertionError((direction, port, watching.verdicts, watching.said))
