"""Verdicts, losses and sweeps of the kernel tap."""

import os
import socket
import time
from ipaddress import ip_network

import pytest

from appliance.model import FlowEnd, FlowEnded, FlowPayload, FlowStarted
from appliance.tap.bpf import layout, loader
from appliance.tap.bpf import tap as tap_module
from appliance.tap.netns import call_in_netns
from tests.tap.bpf.both import drain, open_kernel, tcp_talk, udp_talk
from tests.tap.world import GUEST_IP, HOST_IP, HOST_IP6, make_world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces and bpf(2)")


@pytest.fixture
def world():
    with make_world("kv") as made:
        yield made


@pytest.fixture
def tap(world):
    made = open_kernel(world)
    yield made
    made.close()
    for sock in Echo.opened:
        sock.close()
    Echo.opened.clear()


def starts(events) -> list:
    return [event.flow for event in events if isinstance(event, FlowStarted)]


class Echo:
    """A UDP conversation of the guest that can be asked whether it works."""

    opened: list = []  # noqa: RUF012

    def __init__(self, world, port: int) -> None:
        self.peer = (HOST_IP, port)
        self.server = call_in_netns(world.host_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.client = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.server.bind(self.peer)
        self.server.settimeout(0.3)
        self.opened += [self.server, self.client]

    def works(self) -> bool:
        self.client.sendto(b"x", self.peer)
        try:
            return self.server.recv(10) == b"x"
        except TimeoutError:
            return False


def test_a_verdict_drops_one_flow_and_no_other(world, tap) -> None:
    bad, good = Echo(world, 7001), Echo(world, 7002)
    assert bad.works()
    assert good.works()
    (flow,) = [flow for flow in starts(drain(tap)) if flow.tuple.remote.port == 7001]
    assert tap.drop(flow.id)
    assert not bad.works()
    assert good.works()
    assert tap.dropped() == 1
    assert tap.forget(flow.id)
    assert bad.works()
    assert tap.drop(flow.id, seconds=0.3)
    assert not bad.works()
    time.sleep(0.3)
    assert bad.works()


def test_a_ban_stops_living_and_new_flows_of_a_peer_until_it_is_lifted(world, tap) -> None:
    old = Echo(world, 7001)
    assert old.works()
    (flow,) = starts(drain(tap))
    network = ip_network("10.77.0.0/30")
    tap.ban(network)
    assert not old.works()
    assert not Echo(world, 7002).works()
    udp_talk(world, HOST_IP6, from_guest=True)
    assert tap.allow(flow.id), "the flow's own verdict comes before the ban"
    assert old.works()
    assert tap.unban(network)
    assert not tap.unban(network)
    assert Echo(world, 7003).works()
    tap.ban(ip_network("fd77::1/128"), seconds=30)
    with pytest.raises(TimeoutError):
        udp_talk(world, HOST_IP6, from_guest=True, timeout_s=0.3)
    assert Echo(world, 7004).works()


def test_events_that_found_the_ring_full_are_counted_and_made_up_for(world) -> None:
    tap = open_kernel(world, ring_bytes=4096)
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as guest:
        for port in range(8000, 8100):
            guest.sendto(b"x" * 100, (HOST_IP, port))
    tcp_talk(world, HOST_IP, from_guest=True)  # its start and its end are lost
    lost = tap.stats().lost
    assert lost > 70
    events = drain(tap)
    time.sleep(1)
    events += drain(tap)
    flows = starts(events)
    udp = [flow for flow in flows if flow.ip_protocol == 17]
    assert len({flow.tuple.remote.port for flow in udp}) == len(udp) == 100
    assert [flow.id.number for flow in flows] == list(range(1, len(flows) + 1))
    (talk,) = [flow for flow in flows if flow.ip_protocol == 6]
    (end,) = [event for event in events if isinstance(event, FlowEnded) and event.flow == talk.id]
    assert end.reason is FlowEnd.FIN
    assert end.counts.packets_out >= 5
    assert tap.recovered > 70
    ends = [event for event in tap.close() if isinstance(event, FlowEnded)]
    assert sum(event.counts.packets_out == 1 for event in ends) >= 100, "no flow lost in the counters"


def test_silent_flows_end_by_the_sweep_and_leave_the_kernel(world, tap, monkeypatch) -> None:
    monkeypatch.setattr(tap_module, "TIMEOUT_NS", (100_000_000,) * 11)
    udp_talk(world, HOST_IP, from_guest=True)
    tcp_talk(world, GUEST_IP, from_guest=False)
    events = drain(tap)
    time.sleep(1)
    events += drain(tap)
    time.sleep(1)
    events += drain(tap)
    ends = {event.reason for event in events if isinstance(event, FlowEnded)}
    assert {FlowEnd.FIN, FlowEnd.IDLE} <= ends
    assert len(starts(events)) == sum(isinstance(event, FlowEnded) for event in events)
    left = sum(len(keys) for keys, _ in tap._maps["flows"].read_batches())
    assert left == 0


def test_flows_that_the_kernel_evicted_are_told(world) -> None:
    tap = open_kernel(world, max_flows=256)
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as guest:
        for port in range(10000, 12000):
            guest.sendto(b"x", (HOST_IP, port))
    events = drain(tap)
    time.sleep(1)
    events += drain(tap)
    evicted = [event for event in events if isinstance(event, FlowEnded) and event.reason is FlowEnd.EVICTED]
    assert len(evicted) == tap.stats().evicted >= 1500
    tap.close()


def test_a_payload_may_be_as_long_as_promised(world, tap) -> None:
    tcp_talk(world, HOST_IP, from_guest=True, ask=bytes(range(256)) * 64)
    payloads = [event for event in drain(tap) if isinstance(event, FlowPayload)]
    assert payloads[0].data[:256] == bytes(range(256))
    assert max(len(event.data) for event in payloads) <= 2048


def test_the_probe_loads_it() -> None:
    assert loader.probe().ok
    assert layout.EVENT.size % 8 == layout.FLOW.size % 8 == layout.STATS.size % 8 == 0
    assert layout.FLOW.size == layout.SWEPT.size
