"""Parasight in the dom0 of a real Xen, about a PVH domain: what it prints is held against the domain's own truth.

One boot for all tests, in their order: the last ones rename, reboot and destroy the domain.
"""

import json
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lab.agent import CompletedRun, Job
from lab.network import WORLD_IP4, WORLD_IP6
from lab.truth import Truth
from lab.world import NAMES, SINK_PORT
from lab.xen import DOMAIN_IP4, DOMAIN_IP6, DOMAIN_MAC, DOMAIN_UUID, Domain, XenHost, boot_xen
from tests.system.ss import STATES

# Both machines are emulated: a bound here only ends a hang.
pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

NAME = "web-01"
UPDATES = f"exec /usr/local/bin/updater {next(iter(NAMES))} 80 2"  # reading is slow here: no flood
WORKLOAD = f"exec python3 -S -E /opt/workloads/sockets.py --count 100 --server {WORLD_IP4} --server6 {WORLD_IP6}"
LIMITS = """
import sys
sys.path.insert(0, "/usr/lib/xen-4.17/lib/python")
from xen.lowlevel.xc import xc
print([(one["domid"], one["maxmem_kb"]) for one in xc().domain_getinfo()])
"""
RATES = """
from appliance.hosts.inventory import Inventory
from appliance.routes import measure, open_memory
with Inventory.of_this_host() as inventory:
    (info,) = inventory.find_guests()
for route in ("xen", "libvmi"):
    memory = open_memory(info, route, change_domain=True)
    rate = measure(memory)
    memory.close()
    print(f"{route:7}{rate.pages_per_s:10,.0f} pages/s {rate.reads_per_s:10,.0f} reads of 8 bytes/s")
"""


class Row(NamedTuple):
    """A socket, as ss and as `parasight connections` tell it. Descriptors are not in the contract."""

    netns: int
    protocol: str
    state: str
    local: tuple[str, int]
    remote: tuple[str, int] | None
    pids: frozenset[int]


class Watch:
    """`parasight watch` under way in dom0."""

    def __init__(self, host: XenHost, *words: str) -> None:
        self.job: Job = host.watch("watch", "--output", "jsonl", *words)
        wait_for(lambda: "ready" in self.said())

    def said(self, *words: str) -> list[str]:
        lines = [line.strip() for line in self.job.errors.splitlines()]
        return [line for line in lines if all(word in line for word in words)]

    def verdicts(self, **wanted: object) -> list[dict]:
        """What it told of flows to or from this port, in this direction, of this guest."""
        whole, _, _ = self.job.output.rpartition("\n")
        bodies = [body for line in whole.splitlines() if "flow" in (body := json.loads(line))]
        return [body for body in bodies if wanted.items() <= {**body["flow"], **body}.items()]

    def end(self) -> CompletedRun:
        self.job.kill(15)
        done = self.job.wait(120)
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture(scope="module")
def xen() -> Iterator[XenHost]:
    with boot_xen() as host:
        host.world()
        yield host


@pytest.fixture(scope="module")
def web(xen: XenHost) -> Domain:
    """The domain, with a web server and a hundred sockets of every kind."""
    domain = xen.create(NAME)
    domain.wait_booted()
    assert domain.run("/opt/demo/web.sh").returncode == 0
    domain.spawn(WORKLOAD).wait_for("READY", 180)
    return domain


def wait_for(condition, seconds=300):
    """Until it holds; the bound only ends a hang."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def look(xen: XenHost, *words: str) -> tuple[list[dict], str]:
    """What a verb prints as JSON lines, and what it says beside."""
    done = xen.parasight(*words, "--output", "jsonl", timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def of_truth(truth: Truth) -> set[Row]:
    return {
        Row(
            one.netns,
            one.protocol,
            STATES.get(one.state, one.state),
            (one.local, one.lport),
            None if one.remote is None else (one.remote, one.rport),
            frozenset(owner.pid for owner in one.owners),
        )
        for one in truth.sockets
    }


def of_bodies(bodies: list[dict]) -> set[Row]:
    return {
        Row(
            one["netns"],
            one["protocol"],
            one["state"],
            (one["local"]["ip"], one["local"]["port"]),
            None if one["remote"] is None else (one["remote"]["ip"], one["remote"]["port"]),
            frozenset(owner["pid"] for owner in one["owners"]),
        )
        for one in bodies
        if one["protocol"] in ("tcp", "udp")
    }


def assert_connections_are_the_guests_own(xen: XenHost, web: Domain, *words: str) -> str:
    """What `parasight connections` tells is what the domain's ss does; what was said beside it."""
    before = web.truth()
    bodies, said = look(xen, "connections", f"xen:{domid(xen)}", *words)
    assert_sockets(before, of_bodies(bodies), web.truth())
    return said


def assert_sockets(before: Truth, seen: set[Row], after: Truth) -> None:
    """Every socket that was there before and after, and none that never was."""
    first, last = of_truth(before), of_truth(after)
    assert len(seen) >= 100
    assert (first & last) - seen == set()
    assert seen - (first | last) == set()


def domid(xen: XenHost) -> int:
    return int(xen.must("xl", "domid", NAME))


def limits(xen: XenHost) -> str:
    """How much memory each domain may have, by Xen's own Python binding."""
    return xen.must("python3", "-c", LIMITS)


def test_the_domain_is_listed_by_its_identity_with_its_number_and_port(xen, web):
    (guest,), _ = look(xen, "guests")
    assert (guest["vm"], guest["domid"], guest["hypervisor"]) == (f"xen:{domid(xen)}", domid(xen), "xen")
    assert (guest["name"], guest["uuid"], guest["state"]) == (NAME, DOMAIN_UUID, "running")
    assert [(port["ifname"], port["mac"]) for port in guest["ports"]] == [(f"vif{domid(xen)}.0", DOMAIN_MAC)]
    assert guest["routes"] == ["xen", "libvmi"]
    assert guest["memory_bytes"] == 384 << 20
    assert guest["notes"] == []


def test_connections_and_processes_are_those_of_the_guests_own_ss_and_proc(xen, web):
    before = web.truth()
    sockets, said = look(xen, "connections", f"xen:{domid(xen)}")
    bodies, _ = look(xen, "processes", NAME)
    after = web.truth()
    assert "not seen" not in said
    assert_sockets(before, of_bodies(sockets), after)
    seen = {one["pid"]: one for one in bodies}
    ticks = {one.pid: one.starttime_ticks for one in after.processes}
    lasting = [one for one in before.processes if ticks.get(one.pid) == one.starttime_ticks]
    assert len([one for one in lasting if one.exe]) > 5
    for one in lasting:
        body = seen[one.pid]
        assert (body["parent_pid"], body["uid"]) == (one.ppid, one.uid)
        if one.exe is not None:  # kernel threads come and go, and /proc decorates their names
            assert (body["name"], body["path"]) == (one.name, one.exe.removesuffix(" (deleted)"))
            assert body["command"] == " ".join(one.cmdline).rstrip()


def test_doctor_says_how_the_domain_is_read_at_which_rate_and_why_not_by_libvmi(xen, web):
    found, _ = look(xen, "doctor")
    checks = {one["name"]: one for one in found}
    for name in ("xen domain", "xen privcmd", "xenstore", "xen memory", "tap", f"route xen:{domid(xen)} xen"):
        assert checks[name]["ok"], checks[name]
    rate = checks[f"route xen:{domid(xen)} xen"]["reason"]
    assert re.search(r"[\d,]+ pages/s, [\d,]+ reads of 8 bytes/s", rate), rate
    assert "--libvmi-allow-domain-changes" in checks[f"route xen:{domid(xen)} libvmi"]["reason"]
    assert not checks["libvmi"]["ok"]
    assert "libxenstore.so" in checks["libvmi"]["remedy"]


def test_libvmi_is_used_only_when_its_changes_are_allowed_and_leaves_none(xen, web):
    before = limits(xen)
    refused = xen.parasight("connections", f"xen:{domid(xen)}", "--route", "libvmi")
    assert refused.returncode != 0
    assert "--libvmi-allow-domain-changes" in refused.stderr
    assert limits(xen) == before
    xen.must("ln", "-sf", "libxenstore.so.4", "/usr/lib/x86_64-linux-gnu/libxenstore.so")
    assert_connections_are_the_guests_own(xen, web, "--route", "libvmi", "--libvmi-allow-domain-changes")
    assert limits(xen) == before
    print(xen.must("env", "PYTHONPATH=/opt/parasight:/opt/site", "python3", "-c", RATES, timeout_s=300))
    assert limits(xen) == before


def test_a_ballooned_guest_is_read_rightly_and_its_gaps_are_named(xen, web):
    xen.must("xl", "mem-set", NAME, "256")
    wait_for(lambda: memory_mb(xen) <= 256)
    said = assert_connections_are_the_guests_own(xen, web)
    assert re.search(r"not seen: guest memory at .*\(12\d of 384 MiB\) cannot be read: .*ballooned out", said), said
    xen.must("xl", "mem-set", NAME, "384")
    wait_for(lambda: memory_mb(xen) >= 384)
    assert "cannot be read" not in look(xen, "connections", NAME)[1]


def memory_mb(xen: XenHost) -> int:
    return int(xen.must("xl", "list", NAME).splitlines()[1].split()[2])


def test_a_watch_binds_connections_both_ways_and_flags_the_parasite(xen, web):
    watch = Watch(xen)
    wait_for(lambda: watch.said("Linux 6.1"))
    updater = web.spawn(UPDATES)
    caller = xen.call([DOMAIN_IP4, DOMAIN_IP6], tcp=[80], seconds=600, pause_s=1.0, hold_s=1.5)
    served, fetched = {"direction": "in", "vm": f"xen:{domid(xen)}"}, {"direction": "out", "vm": f"xen:{domid(xen)}"}
    wait_for(lambda: [body for body in watch.verdicts(**served) if body["binding"]["match"] == "exact"])
    wait_for(lambda: exact(watch.verdicts(**fetched), "updater"))
    caller.kill()
    worker = int(web.run("pgrep -P $(cat /run/nginx.pid)").stdout.split()[0])
    assert web.run(f"/opt/parasite/infect.sh {worker} {WORLD_IP4} {SINK_PORT} rwx").returncode == 0
    caught = lambda: [b for b in watch.verdicts() if b["flow"]["remote"]["port"] == SINK_PORT and b["evidence"]]  # noqa: E731
    parasite = wait_for(caught)[0]
    pid = updater.pid
    updater.kill()
    watch.end()
    assert (parasite["verdict"], parasite["parasitic"], parasite["process"]["pid"]) == ("deny", True, worker)
    assert (parasite["process"]["name"], parasite["binding"]["match"]) == ("nginx", "exact")
    for body in watch.verdicts():
        if body["flow"]["remote"]["port"] != SINK_PORT:
            assert body["verdict"] == "allow", body
            assert not body["alert"], body
    assert {body["process"]["pid"] for body in exact(watch.verdicts(**fetched), "updater")} == {pid}
    calls = [body for body in watch.verdicts(**served) if body["flow"]["local"]["port"] == 80]
    assert {body["process"]["name"] for body in calls if body["process"]} == {"nginx"}


def exact(bodies: list[dict], name: str) -> list[dict]:
    return [body for body in bodies if body["binding"]["match"] == "exact" and body["process"]["name"] == name]


def test_a_domain_is_followed_through_rename_reboot_and_its_end(xen, web):
    watch = Watch(xen)
    first = domid(xen)
    wait_for(lambda: watch.said(f"xen:{first}: Linux 6.1"))
    xen.must("xl", "rename", NAME, "web-02")
    wait_for(lambda: [one for one in look(xen, "guests")[0] if one["name"] == "web-02"])
    assert not watch.said("ended")
    xen.must("xl", "reboot", "web-02")
    wait_for(lambda: watch.said(f"xen:{first}: the watch has ended"))
    second = wait_for(lambda: other_domain(xen, first))
    wait_for(lambda: watch.said(f"xen:{second}: under watch (web-02): vif{second}.0"))
    wait_for(lambda: watch.said(f"xen:{second}: Linux 6.1"))
    xen.must("xl", "destroy", "web-02")
    wait_for(lambda: watch.said(f"xen:{second}: the watch has ended"))
    left = [line.split()[0] for line in xen.must("xl", "list").splitlines()]
    assert left == ["Name", "Domain-0"]  # a domain that somebody still maps stays as "(null)"
    assert "privcmd" not in xen.must("cat", f"/proc/{watch.job.pid}/maps")
    assert look(xen, "guests")[0] == []
    watch.end()


def other_domain(xen: XenHost, than: int) -> int | None:
    """The number of the domain that runs, is not this one, and has begun to run."""
    for line in xen.must("xl", "list").splitlines()[1:]:
        name, number, *_ = line.rsplit(None, 5)
        if name == "web-02" and int(number) != than:
            return int(number)
    return None
