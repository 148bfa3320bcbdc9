"""A guest that connects as fast as it can: no wrong owner, and nearly everything bound (B2, B3)."""

import json
from collections import Counter, defaultdict
from ipaddress import ip_address

import pytest

from lab.world import Caller
from tests.worlds.command import Watching

pytestmark = pytest.mark.system

SECONDS = 15
PORTS = {8001, 8002, 8003, 7000}


def end(ip, port):
    return str(ip_address(ip)), port


@pytest.fixture(scope="module")
def churned(guest, network, tmp_path_factory):
    """Verdicts of a watch, and what the guest wrote down about the same connections."""
    with Watching(f"qemu:{guest.pid}", home=tmp_path_factory.mktemp("home")) as watch:
        job = guest.spawn(f"exec /usr/bin/python3 -S -E /opt/workloads/churn.py --seconds {SECONDS}")
        job.wait_for("READY", 30)
        with Caller(
            network, [guest.ip4, guest.ip6], tcp=(8001, 8002), udp=(8003,), seconds=SECONDS - 2, pause_s=0.005
        ) as caller:
            caller.wait()
        job.wait(SECONDS + 60)
        watch.end()
    lines = [json.loads(line) for line in guest.get("/tmp/churn.jsonl").splitlines()]
    return watch, lines


def compare(verdicts, lines):
    """Count bindings; return the counts and every verdict whose owner the guest does not confirm."""
    exact, listening = defaultdict(set), defaultdict(set)
    for line in lines:
        if line.get("listener"):
            listening[line["protocol"], line["lport"]] |= set(line["pids"])
            continue
        local, remote = end(line["local"], line["lport"]), end(line["remote"], line["rport"])
        if line["direction"] == "in":  # a forking server's children inherit its listening socket
            listening[line["protocol"], line["lport"]] |= set(line["pids"])
        exact[line["protocol"], local[1], remote] |= set(line["pids"])
    counts, wrong = Counter(), []
    for body in verdicts:
        flow = body["flow"]
        local, remote = end(**flow["local"]), end(**flow["remote"])
        if flow["protocol"] not in ("tcp", "udp") or (PORTS.isdisjoint({local[1], remote[1]})):
            continue
        kind = f"{flow['protocol']}-{flow['direction']}"
        counts[kind, body["binding"]["match"]] += 1
        if body["binding"]["match"] == "none":
            counts[kind, body["binding"]["reason"]] += 1
            continue
        holders = exact[flow["protocol"], local[1], remote]
        if body["binding"]["match"] != "exact" or flow["direction"] == "in":
            holders = holders | listening[flow["protocol"], local[1]]
        if not holders:
            counts[kind, "not confirmed"] += 1  # the log's line came after the kill that ends the workload
        elif not {owner["pid"] for owner in body["owners"]} <= holders:
            wrong.append((body["id"], flow, [owner["pid"] for owner in body["owners"]], sorted(holders)))
    return counts, wrong


def total(counts, kinds, words):
    return sum(n for (kind, word), n in counts.items() if kind in kinds and word in words)


MATCHES = ("exact", "listener", "unconnected", "kernel", "none")
ALL = ("tcp-out", "tcp-in", "udp-out", "udp-in")


def test_no_owner_is_wrong_and_nearly_every_flow_is_bound(churned, capsys):
    watch, lines = churned
    counts, wrong = compare(watch.verdicts, lines)
    with capsys.disabled():
        print("\nchurn:", dict(sorted(counts.items())), "torn", watch.summary["torn"], "lost", watch.summary["lost"])
    assert not wrong
    flows = total(counts, ALL, MATCHES)
    assert flows > SECONDS * 20, "the guest did not churn"
    assert total(counts, ALL, ("not confirmed",)) <= 0.01 * flows
    assert total(counts, ("tcp-out",), ("exact",)) >= 0.97 * total(counts, ("tcp-out",), MATCHES)
    assert total(counts, ALL, ("exact", "listener", "unconnected")) >= 0.95 * flows


def test_every_miss_has_its_reason_and_every_loss_is_counted(churned):
    watch, _ = churned
    assert all(body["binding"]["reason"] for body in watch.verdicts if body["binding"]["match"] == "none")
    assert sum(watch.summary["bound"].values()) + sum(watch.summary["unbound"].values()) == watch.summary["flows"]
    assert watch.summary["flows"] == len(watch.verdicts)
    assert watch.summary["cpu_seconds"] > 0
    assert watch.summary["torn"] >= 0 and watch.summary["lost"] == 0


def test_the_guest_was_never_paused(churned, guest):
    assert not [event for event in guest.events if event["event"] in ("STOP", "RESUME")]
