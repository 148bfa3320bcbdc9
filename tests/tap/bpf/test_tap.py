"""Verdicts, losses and sweeps of the kernel tap."""

import socket
from ipaddress import ip_network

import pytest

from appliance.model import FlowEnd, FlowEnded, FlowPayload, FlowStarted
from appliance.tap.bpf import layout, loader, sweep
from appliance.tap.netns import call_in_netns
from tests.tap.bpf.both import collect, drain, open_kernel, packet_socket, tcp_talk, udp_talk, wait_for
from tests.tap.world import GUEST_IP, GUEST_MAC, HOST_IP, HOST_IP6, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


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

    def __init__(self, world, tap, port: int) -> None:
        self.peer, self.tap = (HOST_IP, port), tap
        self.server = call_in_netns(world.host_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.client = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.server.bind(self.peer)
        self.opened += [self.server, self.client]

    def works(self) -> bool:
        """It arrives, or was dropped by a verdict."""
        before = self.tap.dropped()
        self.client.sendto(b"x", self.peer)
        self.server.settimeout(0.1)
        for _ in range(300):
            try:
                return self.server.recv(10) == b"x"
            except TimeoutError:
                if self.tap.dropped() > before:
                    return False
        raise AssertionError("neither came nor was dropped")


def test_a_verdict_drops_one_flow_and_no_other(world, tap) -> None:
    bad, good = Echo(world, tap, 7001), Echo(world, tap, 7002)
    assert bad.works()
    assert good.works()
    (flow,) = [flow for flow in starts(drain(tap)) if flow.tuple.remote.port == 7001]
    assert tap.block(flow.id)
    assert not bad.works()
    assert good.works()
    assert tap.dropped() == 1
    assert tap.release(flow.id)
    assert bad.works()
    assert tap.block(flow.id, seconds=3)
    assert not bad.works()
    wait_for(bad.works)


def test_a_ban_stops_living_and_new_flows_of_a_peer_until_it_is_lifted(world, tap) -> None:
    old = Echo(world, tap, 7001)
    assert old.works()
    (flow,) = starts(drain(tap))
    network = ip_network("10.77.0.0/30")
    tap.ban(network)
    assert not old.works()
    assert not Echo(world, tap, 7002).works()
    udp_talk(world, HOST_IP6, from_guest=True)
    assert tap.release(flow.id), "the flow's own verdict comes before the ban"
    assert old.works()
    assert tap.unban(network)
    assert not tap.unban(network)
    assert Echo(world, tap, 7003).works()
    tap.ban(ip_network("fd77::1/128"), seconds=300)
    before = tap.dropped()
    with pytest.raises(TimeoutError):
        udp_talk(world, HOST_IP6, from_guest=True, timeout_s=0.3)
    assert tap.dropped() > before
    assert Echo(world, tap, 7004).works()


def test_events_that_found_the_ring_full_are_counted_and_made_up_for(world) -> None:
    tap = open_kernel(world, ring_bytes=4096)
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as guest:
        for port in range(8000, 8100):
            guest.sendto(b"x" * 100, (HOST_IP, port))
    tcp_talk(world, HOST_IP, from_guest=True)  # its start and its end are lost
    wait_for(lambda: len(next(tap._maps["flows"].read_batches(), (b"", b""))[0]) >= 101 * layout.KEY.size)
    assert tap.stats().lost > 70

    def is_told(events) -> bool:
        talks = {flow.id for flow in starts(events) if flow.ip_protocol == 6}
        ends = {event.flow for event in events if isinstance(event, FlowEnded)}
        return talks & ends and sum(flow.ip_protocol == 17 for flow in starts(events)) >= 100

    events = collect(tap, is_told)
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
    udp_talk(world, HOST_IP, from_guest=True)
    tcp_talk(world, GUEST_IP, from_guest=False)
    events = collect(tap, lambda told: len(starts(told)) >= 2)
    monkeypatch.setattr(sweep, "TIMEOUT_NS", (100_000_000,) * 11)

    def is_over(told) -> bool:
        left = sum(len(keys) for keys, _ in tap._maps["flows"].read_batches())
        ended = {event.flow for event in events + told if isinstance(event, FlowEnded)}
        return left == 0 and {flow.id for flow in starts(events + told)} <= ended

    events += collect(tap, is_over)
    assert is_over([])
    ends = {event.reason for event in events if isinstance(event, FlowEnded)}
    assert {FlowEnd.FIN, FlowEnd.IDLE} <= ends


def test_flows_that_the_kernel_evicted_are_told(world) -> None:
    tap = open_kernel(world, max_flows=256)
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as guest:
        for port in range(10000, 12000):
            guest.sendto(b"x", (HOST_IP, port))

    def evicted(events) -> int:
        return sum(isinstance(event, FlowEnded) and event.reason is FlowEnd.EVICTED for event in events)

    events = collect(tap, lambda told: evicted(told) >= 1500)
    events += collect(tap, lambda _: not tap._known.pending)
    assert evicted(events) == tap.stats().evicted >= 1500
    tap.close()


def test_a_payload_may_be_as_long_as_promised(world, tap) -> None:
    tcp_talk(world, HOST_IP, from_guest=True, ask=bytes(range(256)) * 64)
    told = collect(tap, lambda events: any(isinstance(event, FlowPayload) for event in events)) + drain(tap)
    payloads = [event for event in told if isinstance(event, FlowPayload)]
    assert payloads[0].data[:256] == bytes(range(256))
    assert max(len(event.data) for event in payloads) <= 2048


def test_the_probe_loads_it() -> None:
    assert loader.probe().ok
    assert layout.EVENT.size % 8 == layout.FLOW.size % 8 == layout.STATS.size % 8 == 0
    assert layout.FLOW.size == layout.SWEPT.size


def test_a_source_mac_that_the_port_was_not_given_is_told(world, tap) -> None:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    with packet_socket(world.guest_path, "eth0") as raw:
        for port, mac in ((7001, GUEST_MAC), (7002, "02:00:00:00:00:66")):
            packet = Ether(src=mac, dst="02:00:00:00:00:01") / IP(src=GUEST_IP, dst=HOST_IP) / UDP(dport=port) / b"x"
            raw.send(bytes(packet))
    flows = starts(collect(tap, lambda events: len(starts(events)) >= 2))
    spoofs = {flow.tuple.remote.port: flow.spoofed_mac for flow in flows if flow.ip_protocol == 17}
    assert spoofs == {7001: None, 7002: "02:00:00:00:00:66"}


@pytest.mark.parametrize("address", [HOST_IP, HOST_IP6])
def test_an_icmp_error_is_counted_on_the_flow_that_it_quotes(world, tap, address) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in_netns(world.guest_path, lambda: socket.socket(family, socket.SOCK_DGRAM)) as guest:
        guest.connect((address, 9))
        guest.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            guest.settimeout(30)
            guest.recv(10)
    (flow,) = starts(collect(tap, starts))

    def errors() -> list[int]:
        values = b"".join(values for _, values in tap._maps["flows"].read_batches())
        return [value[-1] for value in layout.FLOW.iter_unpack(values)]

    assert wait_for(lambda: max(errors(), default=0)) == 1
    assert dict(tap.stats().ignored)["icmp-error"] == 1
    assert len(starts(drain(tap))) == 0, "it is no flow"
    assert flow.tuple.remote.port == 9


def test_after_hours_of_silence_verdicts_are_removed_with_their_flows(world, tap, monkeypatch) -> None:
    echo = Echo(world, tap, 7001)
    assert echo.works()
    (flow,) = starts(collect(tap, starts))
    assert tap.block(flow.id)
    assert not echo.works()
    monkeypatch.setattr(sweep, "TIMEOUT_NS", (100_000_000,) * 11)
    collect(tap, lambda _: not len(tap._hand.verdicts))
    assert not list(tap._maps["verdicts"].read_batches())
    assert echo.works(), "a new flow, which nobody judged"
