"""The record queue, packet by packet."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6ND_NS

from appliance.model import Direction, FlowEnd, Transport
from tests.flow.packets import GUEST, ICMP, IP, PEER, T0, TCP, UDP, VM, A, B, Ether, IPv6, Made, S, Wire


@pytest.fixture(params=[False, True], ids=["ipv4", "ipv6"])
def wire(request) -> Wire:
    return Wire(v6=request.param)


@pytest.mark.parametrize("out", [True, False])
def test_a_connection_is_one_flow_from_syn_to_last_ack(wire: Wire, out: bool) -> None:
    wire.handshake(out)
    assert wire.states == ["established"]
    wire.tcp(out, "PA", 1001, 5001, b"ask")
    wire.tcp(not out, "PA", 5001, 1004, b"answer")
    wire.tcp(out, "FA", 1004, 5007)
    assert wire.states == ["half-closed"]
    wire.tcp(not out, "FA", 5007, 1005)
    wire.tcp(out, "A", 1005, 5008)
    (flow,) = wire.flows
    assert flow.direction is (Direction.OUT if out else Direction.IN)
    assert not flow.midstream
    assert (flow.tuple.protocol, flow.tuple.local.port, flow.tuple.remote.port) == (Transport.TCP, 40000, 80)
    assert str(flow.tuple.local.ip) == ("fd00::2" if wire.v6 else A)
    assert wire.ends == [FlowEnd.FIN]
    counts = wire.events[-1].counts
    assert counts.packets_out + counts.packets_in == 8
    header = 60 if wire.v6 else 40
    assert counts.bytes_out + counts.bytes_in == 8 * header + len("askanswer")
    assert [(p.direction, p.index, p.data) for p in wire.events[1:-1]] == [
        (flow.direction, 0, b"ask"),
        (Direction.IN if out else Direction.OUT, 0, b"answer"),
    ]


def test_late_packets_of_a_closed_flow_are_no_new_flow(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(True, "FA", 1001, 5001)
    wire.tcp(False, "FA", 5001, 1002)
    wire.tcp(True, "A", 1002, 5002)
    wire.tcp(False, "FA", 5001, 1002)  # retransmitted
    wire.tcp(True, "A", 1002, 5002)
    wire.tcp(True, "R", 1002)
    assert (len(wire.flows), wire.ends) == (1, [FlowEnd.FIN])
    assert len(wire.table) == 0


def test_a_retransmitted_syn_is_no_new_flow_and_a_new_isn_is_one(wire: Wire) -> None:
    wire.tcp(True, "S", 1000)
    for pause in (1, 2, 4, 8, 16, 32):
        wire.wait(pause)
        assert wire.tcp(True, "S", 1000) == []
    wire.tcp(False, "RA", 0, 1001)
    assert wire.ends == [FlowEnd.RST]
    wire.tcp(True, "S", 1000)  # some stacks repeat a refused SYN
    assert len(wire.flows) == 1
    wire.tcp(True, "S", 7777)
    assert len(wire.flows) == 2


def test_a_port_used_again_after_fin_or_without_it_is_a_new_flow(wire: Wire) -> None:
    wire.handshake(isn=1000)
    wire.tcp(True, "S", 99000)
    assert [flow.id.number for flow in wire.flows] == [1, 2]
    assert wire.ends == [FlowEnd.IDLE]
    wire.tcp(False, "SA", 42, 99001)
    wire.tcp(True, "A", 99001, 43)
    assert wire.states == ["established"]


def test_a_syn_ack_seen_first_turns_the_direction_round(wire: Wire) -> None:
    wire.tcp(True, "SA", 5000, 1001, gp=8080, pp=33333)
    (flow,) = wire.flows
    assert (flow.direction, flow.midstream) == (Direction.IN, True)


def test_a_simultaneous_open_is_one_flow(wire: Wire) -> None:
    wire.tcp(True, "S", 1000)
    wire.tcp(False, "S", 5000)
    assert wire.states == ["syn-recv"]
    wire.tcp(True, "SA", 1000, 5001)
    wire.tcp(False, "A", 5001, 1001)
    assert (len(wire.flows), wire.states) == (1, ["established"])


def test_midstream_direction_is_a_guess_by_port_or_by_known_server(wire: Wire) -> None:
    wire.tcp(True, "A", 1, 1, gp=40000, pp=443)
    wire.tcp(True, "A", 1, 1, gp=22, pp=50000)
    assert [(flow.direction, flow.midstream) for flow in wire.flows] == [(Direction.OUT, True), (Direction.IN, True)]
    wire.tcp(False, "S", 1, gp=50051, pp=3000)
    wire.tcp(True, "SA", 1, 2, gp=50051, pp=3000)
    wire.tcp(True, "A", 9, 9, gp=50051, pp=3001, data=b"x")
    assert wire.flows[-1].direction is Direction.IN
    wire.table.learn_listener(6, None, 61000)
    wire.tcp(False, "A", 9, 9, gp=61000, pp=3001)
    assert wire.flows[-1].direction is Direction.IN


def test_a_flow_picked_up_midstream_is_established_when_both_sides_spoke(wire: Wire) -> None:
    wire.tcp(True, "A", 10, 20, b"x")
    assert wire.states == ["midstream"]
    wire.tcp(False, "A", 20, 11)
    assert wire.states == ["established"]


def test_a_stray_fin_or_rst_is_no_flow(wire: Wire) -> None:
    wire.tcp(False, "R", 5)
    wire.tcp(False, "FA", 5, 5)
    assert (wire.flows, wire.ignored) == ([], {"stray-close": 2})


def test_a_reset_outside_the_window_does_not_end_a_flow(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(False, "R", 5001 + (1 << 30))
    assert wire.ends == []
    wire.tcp(False, "R", 5001)
    assert wire.ends == [FlowEnd.RST]


def test_talk_that_goes_on_after_its_end_is_seen_again(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(True, "R", 1001)  # a reset that its receiver never got
    wire.tcp(True, "PA", 1001, 5001, b"still")
    wire.tcp(False, "A", 5001, 1006)
    wire.tcp(True, "PA", 1006, 5001, b"here")
    assert len(wire.flows) == 2
    assert wire.flows[1].midstream
    assert wire.of(type(wire.events[-1]))[-1].data == b"here"


def test_only_three_payloads_of_2048_bytes_are_told_in_each_direction(wire: Wire) -> None:
    wire.handshake()
    seq = 1001
    for number in range(6):
        wire.tcp(True, "A", seq, 5001, bytes([65 + number]) * 3000)
        seq += 3000
    assert [(p.index, p.data) for p in wire.events[1:]] == [(i, bytes([65 + i]) * 2048) for i in range(3)]


def test_repeated_data_is_told_once_and_overlap_is_cut_off(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(True, "A", 1001, 5001, b"abcd")
    wire.tcp(True, "A", 1001, 5001, b"abcd")
    wire.tcp(True, "A", 1003, 5001, b"cdef")
    wire.tcp(True, "A", 1000, 5001, b"\0")  # keep-alive
    wire.tcp(False, "A", 5011, 1007, b"late")
    wire.tcp(False, "A", 5001, 1007, b"0123456789late")
    told = [(p.direction.value, p.data) for p in wire.events[1:]]
    assert told == [("out", b"abcd"), ("out", b"ef"), ("in", b"late"), ("in", b"0123456789")]


def test_data_in_a_syn_is_a_payload_told_once(wire: Wire) -> None:
    wire.tcp(True, "S", 1000, data=b"fast")
    wire.tcp(False, "SA", 5000, 1001)
    wire.tcp(True, "PA", 1001, 5001, b"fast")
    assert [p.data for p in wire.events[1:]] == [b"fast"]


def test_gso_packets_count_as_the_packets_they_become(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(True, "A", 1001, 5001, b"x" * 14480, segments=10)
    counts = wire.table.close(wire.now)[0].counts
    header = 60 if wire.v6 else 40
    assert (counts.packets_out, counts.bytes_out) == (12, 12 * header + 14480)


def test_the_short_way_counts_like_the_long_one(wire: Wire) -> None:
    wire.handshake()
    seq, back = 1001, 5001
    for _ in range(20):
        wire.tcp(True, "A", seq, back, b"x" * 1000)
        seq += 1000
        wire.tcp(False, "A", back, seq, b"y" * 10)
        back += 10
    wire.tcp(False, "R", back)  # only valid when the short way kept sequence numbers
    header = 60 if wire.v6 else 40
    counts = wire.events[-1].counts
    assert wire.ends == [FlowEnd.RST]
    assert (counts.packets_out, counts.bytes_out) == (22, 22 * header + 20_000)
    assert (counts.packets_in, counts.bytes_in) == (22, 22 * header + 200)


def test_udp_is_a_flow_that_ends_when_it_is_silent(wire: Wire) -> None:
    wire.udp(True, b"one")
    assert wire.states == ["udp-oneway"]
    wire.udp(False, b"two")
    assert wire.states == ["udp-bidir"]
    last_ns = wire.now
    assert wire.wait(179) == []
    (end,) = wire.wait(2)
    assert (end.reason, end.at_ns) == (FlowEnd.IDLE, last_ns + 180 * S)
    wire.udp(True, b"three")
    assert [flow.id.number for flow in wire.flows] == [1, 2]


def test_an_idle_flow_ends_by_the_time_of_the_frames_alone(wire: Wire) -> None:
    wire.udp(True)
    wire.now += 31 * S
    wire.udp(True)
    assert (len(wire.flows), wire.ends) == (2, [FlowEnd.IDLE])


def test_a_udp_answer_at_the_start_is_picked_up_midstream_and_later_is_not(wire: Wire) -> None:
    wire.udp(False, gp=41000, pp=53)
    wire.now += 60 * S
    wire.udp(False, gp=41001, pp=53)
    assert [(f.direction, f.midstream) for f in wire.flows] == [(Direction.OUT, True), (Direction.IN, False)]


def test_echo_request_and_reply_are_one_flow() -> None:
    wire = Wire()
    wire.ip(ICMP(type=8, id=77) / b"ping", True)
    wire.ip(ICMP(type=0, id=77) / b"ping", False)
    wire.ip(ICMP(type=8, id=77) / b"ping", False)
    first, second = wire.flows
    assert (first.tuple.local.port, first.direction, first.icmp_type) == (77, Direction.OUT, 8)
    assert (second.tuple.remote.port, second.direction) == (77, Direction.IN)


def test_icmp_errors_belong_to_the_flow_they_quote() -> None:
    wire = Wire()
    wire.udp(True, b"x" * 30, gp=4000, pp=33434)
    quoted = IP(src=A, dst=B, ttl=1) / UDP(sport=4000, dport=33434, len=38)
    wire.ip(ICMP(type=3, code=3) / bytes(quoted)[:28], False)
    wire.ip(ICMP(type=3, code=3) / bytes(IP(src=A, dst=B) / UDP(sport=1, dport=2))[:28], False)
    wire.ip(ICMP(type=3, code=3) / b"\x45", False)
    assert len(wire.flows) == 1
    assert wire.ignored == {"icmp-error-unmatched": 1, "icmp-error-unreadable": 1}
    wire6 = Wire(v6=True)
    wire6.udp(True, gp=4000, pp=33434)
    quoted6 = IPv6(src="fd00::2", dst="fd00::1") / UDP(sport=4000, dport=33434, len=9)
    wire6.ip(ICMPv6DestUnreach(code=4) / bytes(quoted6), False)
    assert (len(wire6.flows), wire6.ignored) == (1, {})


def test_fragments_are_counted_to_the_flow_of_their_first_one() -> None:
    wire = Wire()
    whole = IP(src=A, dst=B, id=9) / UDP(sport=4000, dport=5000) / (b"x" * 3000)
    pieces = fragment(whole, 1000)
    for piece in (pieces[1], *pieces):  # one came too early
        wire.raw(bytes(Ether(src=GUEST, dst=PEER) / piece), True)
    (flow,) = wire.flows
    counts = wire.table.close(wire.now)[0].counts
    assert (flow.tuple.remote.port, counts.packets_out) == (5000, len(pieces))
    assert wire.ignored == {"fragment-without-first": 1}


def test_other_protocols_are_raw_flows(wire: Wire) -> None:
    kind = IPv6 if wire.v6 else IP
    ends = {"src": "fd00::2", "dst": "fd00::1"} if wire.v6 else {"src": A, "dst": B}
    field = {"nh": 47} if wire.v6 else {"proto": 47}
    wire.raw(bytes(Ether(src=GUEST, dst=PEER) / kind(**ends, **field) / b"gre"), True)
    (flow,) = wire.flows
    assert (flow.tuple.protocol, flow.ip_protocol, flow.tuple.local.port) == (Transport.RAW, 47, 0)


def test_vlans_are_part_of_the_flows_name() -> None:
    wire = Wire()
    wire.tcp(True, "S", 1)
    wire.tcp(True, "S", 1, vlan=7)
    assert [flow.vlan for flow in wire.flows] == [None, 7]


def test_what_is_no_flow_of_the_guest_is_counted_by_reason() -> None:
    wire = Wire(macs=[GUEST])
    wire.tcp(False, "S", 1, ether={"dst": "52:54:00:00:00:99"})
    wire.udp(False, ether={"dst": "ff:ff:ff:ff:ff:ff"})
    wire.raw(bytes(Ether(src=PEER, dst=GUEST, type=0x0806) / (b"\0" * 28)), False)
    wire.raw(bytes(Ether(src=PEER, dst=GUEST) / IP(src=B, dst="224.0.0.1", proto=2) / (b"\x11" * 8)), False)
    wire6 = Wire(v6=True)
    wire6.ip(ICMPv6ND_NS(), False)
    assert wire.flows == wire6.flows == []
    assert wire.ignored["flooded"] == wire.ignored["multicast"] == wire.ignored["arp"] == wire.ignored["igmp"] == 1
    assert wire6.ignored == {"nd": 1}


def test_the_guests_addresses_are_learnt_from_what_it_sends() -> None:
    wire = Wire()
    wire.udp(True)
    wire.tcp(False, "S", 1, ether={"dst": "52:54:00:00:00:99"})
    assert wire.ignored == {"flooded": 1}


def test_dhcp_is_a_flow_because_the_guest_speaks() -> None:
    wire = Wire()
    ask = IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / b"discover"
    wire.raw(bytes(Ether(src=GUEST, dst="ff:ff:ff:ff:ff:ff") / ask), True)
    assert [(str(f.tuple), f.direction) for f in wire.flows] == [
        ("udp 0.0.0.0:68 -- 255.255.255.255:67", Direction.OUT)
    ]


def test_a_full_table_gives_up_the_unanswered_before_the_established() -> None:
    wire = Wire(max_flows=10)
    wire.handshake(gp=1000)
    for port in range(2000, 2030):
        wire.tcp(True, "S", port, gp=port)
    assert len(wire.table) == 10
    assert wire.table.evicted == 21
    assert wire.ends == [FlowEnd.EVICTED] * 21
    assert any(flow.tuple.local.port == 1000 for flow, _, _ in wire.table.records())


def test_closing_ends_every_flow_once(wire: Wire) -> None:
    wire.handshake()
    wire.udp(True)
    ends = wire.table.close(wire.now, FlowEnd.GUEST_GONE)
    assert [end.reason for end in ends] == [FlowEnd.GUEST_GONE] * 2
    assert wire.table.close(wire.now) == []


def test_the_table_counts_what_it_tells(wire: Wire) -> None:
    wire.handshake()
    wire.tcp(True, "PA", 1001, 5001, b"x")
    wire.wait(4000)
    wire.tcp(False, "R", 5001)
    stats = wire.table.stats
    assert (stats.flows, stats.events, stats.packets) == (1, len(wire.events), 5)


segments = st.tuples(
    st.booleans(),
    st.sampled_from(["S", "SA", "A", "PA", "FA", "R", "RA", "SF", "", "FPU"]),
    st.sampled_from([0, 1, 1000, 1001, 1004, 5001, 0xFFFFFFFF]),
    st.sampled_from([0, 1001, 5001, 5004]),
    st.sampled_from([b"", b"abc", b"x" * 40]),
    st.sampled_from([0, 1, 11, 400]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(segments, max_size=25), st.integers(1, 4))
def test_whatever_comes_every_flow_starts_once_and_ends_once(steps, limit: int) -> None:
    wire = Wire(max_flows=limit)
    for index, (out, flags, seq, ack, data, pause) in enumerate(steps):
        wire.now += pause * S
        wire.tcp(out, flags, seq, ack, data, gp=1000 + index % 3)
        assert len(wire.table) <= limit
    wire.events += wire.table.close(wire.now)
    started = [flow.id.number for flow in wire.flows]
    assert started == list(range(1, len(started) + 1))
    assert sorted(end.flow.number for end in wire.of(type(wire.events[-1]))) == started if started else True


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=120), st.booleans(), st.integers(0, 70000)), max_size=8))
def test_any_frames_are_taken(frames) -> None:
    wire = Wire()
    for data, out, more in frames:
        head = bytes(12) + (b"\x08\0\x45" if len(data) % 2 else b"\x86\xdd\x60")
        for frame in (data, head + data):
            wire.table.feed(Made(T0, out, frame, len(frame) + more))
    assert wire.table.vm == VM
    assert TCP
