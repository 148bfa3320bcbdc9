"""A guest that tries to slip past: frames that no socket would make, where flows wait, are blocked or banned."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_network
from struct import pack, unpack

import pytest
from scapy.all import raw as as_bytes
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6MLReport,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from appliance.model import Decision, FlowStarted, HoldPolicy
from appliance.tap.bpf.layout import DENY, KEY, REFUSED, SWEPT, VERDICT
from tests.tap.bpf.both import collect, packet_socket, wait_for
from tests.tap.bpf.lan import Judge, Sniffer, make_lan, nothing

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

V4 = socket.AF_INET
SECRET = b"the secret of a parasite" * 2
STRICT = HoldPolicy(deadline_s=300, default=Decision.DENY)
ENDS4 = {"src": "10.78.0.2", "dst": "10.78.0.3"}
ENDS6 = {"src": "fd78::2", "dst": "fd78::3"}
PORTS = {"sport": 4000, "dport": 4001}
PIECES = {"id": 77, **ENDS4}


def tcp(flags: str, data: bytes = SECRET, **fields):
    return IP(**ENDS4) / TCP(**PORTS, flags=flags, seq=5, ack=9, **fields) / data


def later4(protocol: int, ident: int = 77):
    return IP(src=ENDS4["src"], dst=ENDS4["dst"], id=ident, proto=protocol, frag=5) / Raw(SECRET)


def later6(following: int, ident: int = 77, offset: int = 5):
    return IPv6(**ENDS6) / IPv6ExtHdrFragment(nh=following, offset=offset, id=ident) / Raw(SECRET)


UDP4 = IP(**ENDS4) / UDP(**PORTS) / SECRET
BEGIN = UDP(**PORTS, len=88) / (b"x" * 32)  # of a datagram in two fragments
QUOTE4 = IP(src=ENDS4["dst"], dst=ENDS4["src"]) / UDP(sport=1, dport=2)
OPTIONS = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)])
# What leaves a guest whose new flows wait: nothing of these.
WAITING = {
    "data without a handshake": [tcp("PA")],
    "an acknowledgement": [tcp("A"), tcp("A", b"") / Raw(SECRET)],
    "an answer to nothing": [tcp("SA")],
    "the end of nothing": [tcp("FA"), tcp("R"), tcp("FA", b"", urgptr=0x5EC2), tcp("R", b"", urgptr=0x5EC2)],
    "no flags": [tcp("")],
    "all flags": [tcp("FSRPAUEC"), tcp("SF"), tcp("SR"), tcp("SRA")],
    "data with the first segment": [tcp("S")],
    "a header in two fragments": [
        IP(**PIECES, flags="MF", proto=6) / Raw(as_bytes(TCP(**PORTS, flags="S"))[:8]), later4(6),
    ],
    "a later fragment first": [later4(17), IP(**PIECES, flags="MF", proto=17) / BEGIN],
    "a second fragmented datagram": [
        IP(**PIECES, flags="MF") / BEGIN, later4(17),
        IP(**{**PIECES, "id": 78}, flags="MF") / BEGIN, later4(17, 78),
    ],
    "a fragment without a transport header": [
        IPv6(**ENDS6) / IPv6ExtHdrFragment(nh=60, m=1, id=77) / Raw(b"\x11\0\1\4\0\0\0\0"), later6(60, offset=1),
    ],
    "later fragments of another protocol": [
        IPv6(**ENDS6) / IPv6ExtHdrFragment(nh=17, m=1, id=77) / BEGIN, later6(59), later6(6),
    ],
    "options behind a fragment header": [
        IPv6(**ENDS6) / IPv6ExtHdrFragment(nh=60, m=1, id=77) / OPTIONS / BEGIN, later6(60, offset=6),
    ],
    "more extension headers than anybody needs": [IPv6(**ENDS6) / OPTIONS / OPTIONS / OPTIONS / OPTIONS / OPTIONS
                                                  / OPTIONS / OPTIONS / OPTIONS / OPTIONS / UDP(**PORTS) / SECRET],
    "priority tags": [Dot1Q(vlan=0) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / UDP4],
    "more tags than anybody needs": [
        Dot1Q(vlan=0) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / UDP4,
    ],
    "damaged transport headers": [
        tcp("PA", dataofs=2), tcp("PA", dataofs=15, data=SECRET[:8]), IP(**ENDS4) / UDP(**PORTS, len=3) / SECRET,
    ],
    "an echo": [IP(**ENDS4) / ICMP(type=8, id=7) / SECRET, IP(**ENDS4) / ICMP(type=0, id=8) / SECRET],
    "tunnels": [
        IP(**ENDS4, proto=47) / Raw(SECRET), IP(**ENDS4, proto=4) / UDP4,
        IP(**ENDS4, proto=41) / IPv6(**ENDS6) / Raw(SECRET),
        IPv6(**ENDS6, nh=4) / UDP4, IP(**ENDS4, proto=50) / Raw(SECRET),
    ],
    "other transports": [IP(**ENDS4, proto=number) / Raw(b"\1\1\1\2" + SECRET) for number in (33, 132, 136, 253)],
    "an error about nothing": [
        IP(**ENDS4) / ICMP(type=3, code=1) / QUOTE4 / SECRET,
        IPv6(**ENDS6) / ICMPv6DestUnreach() / IPv6(src="fd78::3", dst="fd78::2") / UDP(sport=1, dport=2) / SECRET,
    ],
    "an error about what waits": [
        UDP4, IP(**ENDS4) / ICMP(type=3, code=1) / IP(src=ENDS4["dst"], dst=ENDS4["src"]) / UDP(sport=4001, dport=4000)
        / SECRET,
    ],
    "group messages to one host": [
        IP(**ENDS4, proto=2) / Raw(SECRET), IPv6(**ENDS6, hlim=64) / ICMPv6MLReport() / SECRET,
        IP(**ENDS4) / ICMP(type=9) / SECRET,
    ],
    "other protocols": [(0x88B5, SECRET), (0x8864, b"\x11\0\0\1\0\x32\0\x21" + as_bytes(UDP4)), (0x8847, SECRET)],
}  # fmt: skip


@pytest.fixture
def lan():
    with make_lan("ke") as made:
        yield made


@pytest.fixture(autouse=True)
def one_processor():
    """What is sent from one processor arrives in order."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def frame(sender, receiver, packet) -> bytes:
    ends = {"src": sender.mac, "dst": receiver.mac}
    if isinstance(packet, tuple):
        return bytes(Ether(**ends, type=packet[0]) / Raw(packet[1]))
    return bytes(Ether(**ends) / packet)


def sent(lan, packets, sender=None, receiver=None) -> list[bytes]:
    """What of these packets arrives: looked at until a frame that always passes has come."""
    sender, receiver = sender or lan.guest, receiver or lan.server
    head = Ether(src=sender.mac, dst="ff:ff:ff:ff:ff:ff")
    fence = bytes(head / ARP(hwsrc=sender.mac, psrc="0.0.0.0", pdst="10.78.0.99"))
    made = [frame(sender, receiver, packet) for packet in packets]
    with Sniffer(receiver) as wire, packet_socket(sender.path, "eth0") as raw:
        for each in (*made, fence):
            raw.send(each)
        wait_for(lambda: any(seen.startswith(fence) for seen in wire.every()))
        ours = {*made, *(each[:12] + each[16:] for each in made)}  # also without a tag that is out of band
        return [seen for seen in wire.every() if seen in ours]


@pytest.mark.parametrize("case", WAITING)
def test_nothing_leaves_a_guest_whose_new_flows_wait(lan, case) -> None:
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    assert [seen.hex(" ") for seen in sent(lan, WAITING[case])] == []
    assert tap.held() + tap.dropped() >= len(WAITING[case])
    tap.close()


def test_nothing_in_a_damaged_packet_leaves(lan) -> None:
    """Apart from the others: some bridges drop these by themselves."""
    packets = [IP(**ENDS4, **wrong) / UDP(**PORTS) / SECRET for wrong in ({"ihl": 4}, {"len": 10}, {"version": 7})]
    packets.append((0x0800, b"\x45\0\0"))
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    assert sent(lan, packets) == []
    assert tap.dropped() == len(packets)
    tap.close()


@pytest.mark.parametrize("case", WAITING)
def test_where_nothing_waits_everything_passes(lan, case) -> None:
    tap = lan.open_tap()
    assert len(sent(lan, WAITING[case])) == len(WAITING[case])
    assert tap.held() == tap.dropped() == 0
    tap.close()


def test_what_a_network_needs_passes_whatever_waits(lan) -> None:
    from scapy.layers.inet6 import ICMPv6ND_NS

    needed = [
        IPv6(src="fe80::2", dst="ff02::1:ff00:3", hlim=255) / ICMPv6ND_NS(tgt="fd78::3"),
        IPv6(src="fe80::2", dst="ff02::16", hlim=1) / ICMPv6MLReport(mladdr="ff02::fb"),
        IP(src=ENDS4["src"], dst="224.0.0.22", proto=2, ttl=1) / Raw(b"\x22\0\xf9\x02\0\0\0\1\4\0\0\0\xe0\0\0\xfb"),
        (0x888E, b"\2\1\0\0"),
        (0x88CC, bytes(20)),
    ]
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    assert len(sent(lan, needed)) == len(needed)
    tap.close()


def test_a_connection_picked_up_in_the_middle_goes_on_when_it_is_released(lan) -> None:
    with lan.server.listen(V4) as listener, lan.guest.socket(V4, socket.SOCK_STREAM) as asker:
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0] as accepted:
            accepted.settimeout(30)
            tap = lan.open_tap()
            tap.hold_new(STRICT)
            with Judge(tap, lambda tap, event: tap.release(event.flow.id)) as judge:
                accepted.sendall(b"question")
                assert asker.recv(100) == b"question"
                asker.sendall(b"answer")
                assert accepted.recv(100) == b"answer"
                (start,) = judge.starts(80)
                assert (start.held, start.flow.midstream) == (True, True)


def test_a_guest_hears_at_once_that_its_old_connection_is_refused(lan) -> None:
    with lan.server.listen(V4) as listener, lan.guest.socket(V4, socket.SOCK_STREAM) as asker:
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0]:
            tap = lan.open_tap()
            tap.hold_new(STRICT)
            with Judge(tap, lambda tap, event: tap.block(event.flow.id)):
                asker.sendall(b"secret")
                with pytest.raises(ConnectionResetError):
                    asker.recv(100)


def test_what_a_closed_connection_was_allowed_nothing_else_is(lan) -> None:
    """Its tuple, numbers and all, with bytes that it never sent."""
    tap = lan.open_tap()
    whole = [tcp("S", b""), tcp("A", b"")]
    assert len(sent(lan, whole)) == 2  # nothing waits yet
    wait_for(lambda: [event for event in tap.poll(0.01) if isinstance(event, FlowStarted)])
    back = IP(src=ENDS4["dst"], dst=ENDS4["src"]) / TCP(sport=4001, dport=4000, flags="RA", seq=9, ack=6)
    assert len(sent(lan, [back], lan.server, lan.guest)) == 1
    tap.hold_new(STRICT)
    assert sent(lan, [tcp("PA"), tcp("A"), tcp("S", b""), tcp("S")]) == []
    tap.close()


def test_a_first_payload_in_fragments_waits_too(lan) -> None:
    tap = lan.open_tap()
    tap.hold_new(HoldPolicy(payload=True, deadline_s=300, default=Decision.DENY))
    assert len(sent(lan, [tcp("S", b"")])) == 1
    head = as_bytes(TCP(**PORTS, flags="PA", seq=6, dataofs=6))[:20] + bytes(4)
    pieces = [IP(**PIECES, flags="MF", proto=6) / Raw(head), later4(6)]
    assert sent(lan, pieces) == []
    tap.close()


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_of_a_blocked_flow_do_not_leave(lan, version) -> None:
    tap = lan.open_tap()
    ends, header = (ENDS4, IP) if version == 4 else (ENDS6, IPv6)
    assert len(sent(lan, [header(**ends) / UDP(**PORTS) / b"first"])) == 1
    (start,) = [event for event in collect(tap, bool) if isinstance(event, FlowStarted)]
    assert tap.block(start.flow.id)
    if version == 4:
        pieces = [IP(**PIECES, flags="MF") / BEGIN, later4(17), later4(17, 99)]
    else:
        pieces = [IPv6(**ENDS6) / IPv6ExtHdrFragment(nh=17, m=1, id=77) / BEGIN, later6(17), later6(59), later6(17, 99)]
    assert sent(lan, pieces) == []
    assert tap.dropped() == len(pieces)
    tap.close()


BANNED = {
    "a later fragment": [later4(17)],
    "damaged headers": [tcp("PA", dataofs=2), IP(**ENDS4) / UDP(**PORTS, len=3) / SECRET],
    "an error": [IP(**ENDS4) / ICMP(type=3, code=1) / QUOTE4 / SECRET],
    "a stray end": [tcp("FA", b""), tcp("R", b"")],
    "a group message": [IP(**ENDS4, proto=2) / Raw(SECRET)],
    "a tunnel": [IP(**ENDS4, proto=47) / Raw(SECRET)],
}


@pytest.mark.parametrize("outgoing", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("case", BANNED)
def test_nothing_passes_to_or_from_a_banned_peer(lan, case, outgoing) -> None:
    tap = lan.open_tap()
    tap.ban(ip_network("10.78.0.3/32"))
    packets = BANNED[case]
    if not outgoing:
        packets = [packet.copy() for packet in packets]
        for packet in packets:
            packet[IP].src, packet[IP].dst = packet[IP].dst, packet[IP].src
    hosts = (lan.guest, lan.server)[:: 1 if outgoing else -1]
    assert sent(lan, packets, *hosts) == []
    assert tap.dropped() == len(packets)
    tap.close()


def test_a_silent_appliance_that_fails_open_bars_nothing(lan) -> None:
    tap = lan.open_tap(patience_s=0)
    tap.hold_new(STRICT)
    tap.ban(ip_network("10.78.0.9/32"))
    packets = [
        packet
        for case in ("data without a handshake", "damaged transport headers", "tunnels")
        for packet in WAITING[case]
    ]
    assert len(sent(lan, packets)) == len(packets)
    tap.close()


def test_a_ping_waits_and_goes_on_when_it_is_released(lan) -> None:
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    with Judge(tap, nothing) as judge:
        sent(lan, [IP(**ENDS4) / ICMP(type=8, id=7) / b"ping"])
        (start,) = wait_for(judge.starts)
        assert start.held
        wait_for(lambda: not tap._ring.ready)
        with Sniffer(lan.server) as wire:
            assert judge.do(lambda: tap.release(start.flow.id))
            assert wait_for(lambda: wire.frames(1))[0].endswith(b"ping")


def test_a_flow_that_is_displaced_by_a_flood_waits_again(lan) -> None:
    """The map of flows forgets the oldest; a verdict is on one flow only."""
    tap = lan.open_tap(max_flows=256)
    tap.hold_new(STRICT)
    packets = [tcp("S", b""), UDP4]
    assert sent(lan, packets) == []
    talks = [tap._known.find(event.flow.id) for event in collect(tap, lambda told: len(told) == 2)]
    for talk in talks:
        assert tap.block(talk.flow.id)
    flood = [IP(**ENDS4) / UDP(sport=number, dport=9) for number in range(10_000, 14_000)]
    assert sent(lan, flood) == []
    assert all(tap._maps["flows"].lookup(talk.key) is None for talk in talks)
    assert sent(lan, [tcp("PA"), tcp("S"), *packets]) == []
    tap.close()


def test_a_segment_that_is_shorter_than_its_header_ends_nothing(lan) -> None:
    """What follows the packet in its frame is the guest's choice too: here it looks like the rest of a header."""
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    tails = [pack("!HH", 100 * size + more, 1) + b"\x10" * more for size in range(4, 14) for more in range(9, 16)]
    cut = [IP(**ENDS4, proto=6, len=20 + unpack("!H", tail[:2])[0] // 100) / Raw(tail) for tail in tails]
    cut += [IPv6(**ENDS6, nh=6, plen=unpack("!H", tail[:2])[0] // 100) / Raw(tail) for tail in tails]
    assert sent(lan, cut) == []
    flows = collect(tap, lambda told: len(told) == len(cut))
    assert all(start.held and tap.block(start.flow.id) for start in flows)
    tap.close()


def test_where_there_is_no_room_for_a_verdict_what_waits_is_refused_all_the_same(lan) -> None:
    """A guest that is denied faster than its flows end fills the map."""
    tap = lan.open_tap()
    tap.hold_new(HoldPolicy(deadline_s=300))
    verdicts = tap._maps["verdicts"]
    for number in range(verdicts.entries):
        verdicts.update(KEY.pack(1, 0, 0, 0, 17, 4, 0, number.to_bytes(16, "big"), bytes(16)), bytes(VERDICT.size))
    packets = [UDP4, tcp("S", b""), IP(**ENDS4) / ICMP(type=8, id=7) / SECRET]
    assert sent(lan, packets) == []
    flows: list[FlowStarted] = []
    while len(flows) < len(packets):
        flows += [event for event in tap.poll(1) if isinstance(event, FlowStarted)]
    talks = [tap._known.find(start.flow.id) for start in flows]
    assert [tap.block(start.flow.id) for start in flows] == [True] * 3
    for talk in talks:
        wait_for(lambda key=talk.key: SWEPT.unpack(tap._maps["flows"].lookup(key))[-2] & ~DENY == REFUSED)
    before = tap.dropped()
    assert sent(lan, packets) == []
    assert tap.dropped() == before + len(packets)
    tap.close()


def test_what_waits_a_moment_longer_in_the_kernel_than_for_us_is_sent_on(lan) -> None:
    """The frame that frees a flow is still in the kernel's backlog when another one of it comes."""
    tap = lan.open_tap()
    tap.hold_new(STRICT)
    sent(lan, [UDP4])
    (start,) = [event for event in collect(tap, bool) if isinstance(event, FlowStarted)]
    talk = tap._known.find(start.flow.id)
    tap._hand._drop_hold(talk)
    tap._hand._note_decision(talk, goes_on=True)  # a release whose frame has not arrived
    with Sniffer(lan.server) as wire:
        assert sent(lan, [UDP4]) == []
        wait_for(lambda: tap.poll(0.01) is not None and wire.frames(17))
    assert talk.hold is None
    tap.close()
