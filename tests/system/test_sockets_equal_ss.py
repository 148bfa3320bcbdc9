"""A full walk equals the guest's own `ss -tuanp`: every socket, its state, pids and descriptors; on every layout."""

import pytest

from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.qemu import open_qemu
from appliance.model import Direction, FiveTuple, Flow, FlowId, GuestId, Match, Reason, Transport
from lab.guest import boot
from lab.image import build
from tests.system.ss import differences, of_snapshot, of_truth

pytestmark = pytest.mark.system

# kernel, machine, MiB, CPU (max has 5-level paging under TCG), RAM: pairwise
GUESTS = [
    ("debian-12-cloud", "pc", 1024, "max", None),
    ("debian-12-cloud", "q35", 5120, "max,la57=off", "memfd"),
    ("debian-12", "q35", 1024, "max,la57=off", "file"),
    ("debian-12", "pc", 5120, "max", "memfd"),
    ("debian-12-backport", "q35", 1024, "max", None),
    ("debian-12-backport", "pc", 5120, "max,la57=off", "file"),
]
WORKLOAD = "exec python3 -S -E /opt/workloads/sockets.py --count 1000 --server 10.77.0.1 --server6 fd77::1"

# Like setproctitle: writes over its arguments and on into its environment.
TITLED = """
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
start, end = int(fields[45]), int(fields[46])
with open("/proc/self/mem", "r+b", 0) as memory:
    memory.seek(start)
    memory.write(b"a title ".ljust(end - start + 16, b".") + bytes(1))
print("READY", flush=True)
__import__("time").sleep(1000)
"""


@pytest.fixture(scope="module", params=GUESTS, ids=lambda guest: "-".join(str(part) for part in guest))
def crowded(request, network):
    """A guest with 1,100 sockets of every kind, and the eye on it."""
    name, machine, memory_mb, cpu, shared = request.param
    with boot(
        build(name), network, name="crowd", machine=machine, memory_mb=memory_mb, cpu=cpu, shared=shared
    ) as guest:
        guest.spawn(WORKLOAD).wait_for("READY", 120)
        eye = LinuxEye(attach(open_qemu(guest.pid)))
        yield guest, eye
        eye.close()


def test_the_walk_equals_ss(crowded):
    guest, eye = crowded
    before = of_truth(guest.truth())
    snapshot = eye.read_snapshot()
    after = of_truth(guest.truth())
    seen = of_snapshot(snapshot)
    assert len(seen) >= 1000
    assert differences(before, seen, after) == []
    assert not snapshot.gaps
    assert {row.state for row in seen} >= {"ESTABLISHED", "LISTEN", "TIME_WAIT", "SYN_RECV", "SYN_SENT", "CLOSE"}
    assert len({row.netns for row in seen}) == 2


def test_processes_equal_proc(crowded):
    guest, eye = crowded
    titled = guest.spawn(["/usr/bin/env", "ROOM=" + 64 * "x", "/usr/bin/python3", "-S", "-E", "-c", TITLED])
    titled.wait_for("READY", 60)
    truth = guest.truth()
    seen = {process.pid: process for process in eye.read_snapshot().processes}
    compared = 0
    for real in truth.processes:
        process = seen.get(real.pid)
        if process is None:
            assert "truth.py" in " ".join(real.cmdline) or real.exe is None, real
            continue
        compared += 1
        path = process.path if isinstance(process.path, str) else None
        assert (path + " (deleted)" if path and process.deleted else path) == real.exe
        if real.exe is not None:  # /proc decorates the names of kernel threads
            assert process.name == real.name
            assert process.command == " ".join(real.cmdline).rstrip()
        assert (process.parent_pid, process.uid, process.netns) == (real.ppid, real.uid, real.netns)
        assert (process.cgroup, process.pid_in_namespace) == (real.cgroup, real.nspid[-1])
        assert process.key.started_ns // (10**9 // truth.clock_ticks) == real.starttime_ticks
        assert process.started_wall_ns is not None
    assert compared > 50
    assert seen[titled.pid].command.startswith("a title ....")
    assert len(seen[titled.pid].command) > len(TITLED) + 16
    assert {"root", "www-data"} <= {process.user for process in seen.values()}
    assert "0123456789abcdef" * 4 in {process.container for process in seen.values()}


def test_every_connection_is_found_by_its_tuple(crowded):
    _, eye = crowded
    found = 0
    for socket in eye.read_snapshot().sockets:
        if socket.protocol not in (Transport.TCP, Transport.UDP) or socket.remote is None:
            continue
        finding = eye.find_owner(flow_of(socket))
        if socket.owners:
            assert (finding.match, finding.owners) == (Match.EXACT, socket.owners), socket
        elif socket.state == "TIME_WAIT":
            assert (finding.match, finding.reason) == (Match.NONE, Reason.TIME_WAIT)
        elif socket.state == "SYN_RECV" or finding.match is Match.LISTENER:
            assert finding.owners
        else:
            assert finding.match is Match.NONE
        found += 1
    assert found > 700


def flow_of(socket):
    local, remote = unmapped(socket.local), unmapped(socket.remote)
    return Flow(FlowId(GuestId("qemu:0"), 1), FiveTuple(socket.protocol, local, remote), Direction.OUT, 0)


def unmapped(end):
    """On the wire, a v4-mapped connection is IPv4."""
    mapped = getattr(end.ip, "ipv4_mapped", None)
    return end if mapped is None else type(end)(mapped, end.port)
