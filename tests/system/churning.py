"""What a churning guest did, by its own log, against what a watch said of it."""

import json
from collections import Counter, defaultdict
from ipaddress import ip_address

from lab.world import Caller
from tests.worlds.command import Watching

MATCHES = ("exact", "listener", "unconnected", "kernel", "none")
ALL = ("tcp-out", "tcp-in", "udp-out", "udp-in")
PORTS = {8001, 8002, 8003, 7000}


def end(ip, port):
    return str(ip_address(ip)), port


def churn(guest, network, home, *options, seconds: int):
    """Verdicts of a watch, what the guest wrote down about the same connections, and what its callers got."""
    with Watching(f"qemu:{guest.pid}", *options, home=home) as watch:
        job = guest.spawn(f"exec /usr/bin/python3 -S -E /opt/workloads/churn.py --seconds {seconds}")
        job.wait_for("READY", 30)
        with Caller(
            network, [guest.ip4, guest.ip6], tcp=(8001, 8002), udp=(8003,), seconds=seconds - 2, pause_s=0.005
        ) as caller:
            calls = caller.wait()
        job.wait(seconds + 60)
        watch.end()
    return watch, [json.loads(line) for line in guest.get("/tmp/churn.jsonl").splitlines()], calls


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
