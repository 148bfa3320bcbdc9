"""Owners at the first packet, while the guest connects as fast as it can: late maybe, wrong never."""

import json
import threading
import time
from collections import Counter, defaultdict
from ipaddress import ip_address

import pytest

from appliance.bind import PROMPT_NS
from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.memory.qemu import open_qemu
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Match, Reason, Transport
from lab.world import Caller
from tests.system.wire import Wire

pytestmark = pytest.mark.system

SECONDS = 12
PORTS = {8001, 8002, 8003, 7000}


@pytest.fixture(scope="module")
def eye(guest):
    made = LinuxEye(attach(open_qemu(guest.pid)))
    made.read_snapshot()
    yield made
    made.close()


@pytest.fixture(scope="module")
def churned(guest, network, eye):
    """Flow, finding and its time for every first packet, and what the guest wrote down about the same connections."""
    wire = Wire(str(network.path()), guest.port, guest.mac)
    job = guest.spawn(f"exec /usr/bin/python3 -S -E /opt/workloads/churn.py --seconds {SECONDS}")
    job.wait_for("READY", 60)
    calls = {"tcp": (8001, 8002), "udp": (8003,), "seconds": SECONDS - 2, "pause_s": 0.005}
    with Caller(network, [guest.ip4, guest.ip6], **calls) as caller:
        waiting = threading.Thread(target=caller.wait)
        waiting.start()
        found = [(flow, eye.find_owner(flow), time.time_ns()) for flow in wire.first_packets(3.0)]
        waiting.join()
    job.wait(SECONDS + 60)
    wire.close()
    return found, [json.loads(line) for line in guest.get("/tmp/churn.jsonl").splitlines()]


def test_no_owner_is_wrong_and_outgoing_tcp_is_exact_at_the_first_packet(churned, capsys):
    found, lines = churned
    exact, listening = defaultdict(set), defaultdict(set)
    for line in lines:
        if "listener" in line or line["direction"] == "in":  # a forking server's children inherit its socket
            listening[line["protocol"], line["lport"]] |= set(line["pids"])
        if "listener" not in line:
            exact[line["protocol"], line["lport"], ip_address(line["remote"]), line["rport"]] |= set(line["pids"])
    counts, prompt, wrong = Counter(), Counter(), []
    for flow, finding, answered_ns in found:
        protocol, local, remote = str(flow.tuple.protocol), flow.tuple.local, flow.tuple.remote
        if PORTS.isdisjoint({local.port, remote.port}):
            continue
        counts[protocol, flow.direction, finding.match] += 1
        if answered_ns - flow.started_ns <= PROMPT_NS:  # a host that is too busy to look says nothing of how we look
            prompt[protocol, flow.direction, finding.match] += 1
        holders = exact[protocol, local.port, remote.ip, remote.port]
        if finding.match is not Match.EXACT or flow.direction is Direction.IN:
            holders = holders | listening[protocol, local.port]
        if finding.owners and holders and not {owner.process.pid for owner in finding.owners} <= holders:
            wrong.append((flow.tuple, finding, holders))
    with capsys.disabled():
        print("\n", *sorted((" ".join(map(str, key)), n) for key, n in counts.items()), sep="\n  ")
    assert wrong == []
    out = {match: prompt["tcp", Direction.OUT, match] for match in Match}
    assert sum(out.values()) > 20 * SECONDS
    assert out[Match.EXACT] >= 0.97 * sum(out.values())


def test_the_walks_under_churn_contradict_nothing(guest, eye):
    job = guest.spawn("exec /usr/bin/python3 -S -E /opt/workloads/churn.py --seconds 8")
    job.wait_for("READY", 60)
    names = set()
    for _ in range(40):
        snapshot = eye.read_snapshot()
        for socket in snapshot.sockets:
            if socket.remote is not None and socket.remote.port == 7000:
                names |= {owner.process.command for owner in socket.owners}
    job.wait(60)
    assert names <= {"/usr/bin/python3 -S -E /opt/workloads/churn.py --seconds 8"}


def flow(guest, protocol, lport, rport, direction, **more):
    local, remote = Endpoint(ip_address(guest.ip4), lport), Endpoint(ip_address("10.77.0.1"), rport)
    more = {"local": local} | more
    return Flow(FlowId(GuestId("qemu:0"), 0), FiveTuple(protocol, more["local"], remote), direction, 0)


def test_what_has_no_process_says_why(guest, eye):
    tcp, udp, icmp = Transport.TCP, Transport.UDP, Transport.ICMP
    assert eye.find_owner(flow(guest, tcp, 4, 5, Direction.IN)).reason is Reason.CLOSED
    assert eye.find_owner(flow(guest, udp, 4, 5, Direction.IN)).reason is Reason.CLOSED
    for protocol in (tcp, udp, icmp):  # late or hidden: only the flow's further life tells
        finding = eye.find_owner(flow(guest, protocol, 4, 5, Direction.OUT))
        assert (finding.match, finding.reason, finding.final) == (Match.NONE, None, False)
    assert eye.find_owner(flow(guest, icmp, 0, 0, Direction.IN)).match is Match.KERNEL


@pytest.mark.parametrize("protocol", [Transport.TCP, Transport.UDP, Transport.ICMP])
@pytest.mark.parametrize("direction", Direction)
def test_what_the_guest_routes_for_others_is_nobodys(guest, eye, protocol, direction):
    """Not even that of a socket on this port of every address."""
    code = "import socket, time\nlistener, datagrams = socket.socket(), socket.socket(2, 2)\n"
    code += "listener.bind(('', 8100)); listener.listen(); datagrams.bind(('', 8100))\nprint('READY', flush=True)"
    job = guest.spawn(["/usr/bin/python3", "-S", "-E", "-c", code + "\ntime.sleep(99)"])
    job.wait_for("READY", 30)
    time.sleep(0.3)  # since the last look at the guest's addresses
    elsewhere = Endpoint(ip_address("10.99.0.1"), 8100)
    finding = eye.find_owner(flow(guest, protocol, 8100, 5, direction, local=elsewhere))
    assert (finding.match, finding.reason, finding.owners) == (Match.NONE, Reason.FORWARDED, ())
    if protocol is Transport.UDP:
        own = eye.find_owner(flow(guest, protocol, 8100, 5, direction))
        assert (own.match, len(own.owners)) == (Match.UNCONNECTED, 1)
    job.kill()
    job.wait(10)


def test_raw_sockets_are_the_suspects_where_no_socket_fits(guest, eye):
    code = "import socket, time\nkept = [socket.socket(2, 3, n) for n in (255, 1)]\nprint('READY', flush=True)"
    code += "\ntime.sleep(99)"
    job = guest.spawn(["/usr/bin/python3", "-S", "-E", "-c", code])
    job.wait_for("READY", 30)
    late = eye.find_owner(flow(guest, Transport.TCP, 4, 5, Direction.OUT))
    assert (late.match, late.reason, late.owners) == (Match.NONE, Reason.RAW, ())
    assert late.evidence[0].kind == "raw-socket"
    ping = eye.find_owner(flow(guest, Transport.ICMP, 0, 0, Direction.OUT))
    assert (ping.match, ping.reason, len(ping.owners)) == (Match.UNCONNECTED, Reason.RAW, 1)
    job.kill()


def test_a_process_is_described_afresh_and_gone_when_it_is_gone(guest, eye):
    job = guest.spawn("echo READY; exec sleep 99")
    job.wait_for("READY", 30)
    time.sleep(0.5)
    process = next(p for p in eye.read_snapshot().processes if p.command == "sleep 99")
    assert eye.read_process(process.key) == process
    job.kill()
    job.wait(10)
    assert eye.read_process(process.key) is None
