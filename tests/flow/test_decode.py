"""The decoder against scapy, and against any bytes."""

import ipaddress

import communityid
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from appliance.flow.community import community_id
from appliance.flow.decode import Decoded, decode

ports = st.integers(0, 65535)
ip4 = st.ip_addresses(v=4).map(str)
ip6 = st.ip_addresses(v=6).map(str)
payloads = st.binary(max_size=200)


def link(**fields) -> Ether:
    """Both MACs are given: else scapy asks the network for them."""
    return Ether(src="52:54:00:00:00:02", dst="52:54:00:00:00:01", **fields)


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


def take(packet) -> Decoded:
    data = bytes(packet)
    found = decode(data, len(data))
    assert isinstance(found, Decoded), found
    return found


links = st.sampled_from([link(), link() / Dot1Q(vlan=7), link() / Dot1AD(vlan=9) / Dot1Q(vlan=7)])
options = st.sampled_from([[], [IPOption_Router_Alert()]])
tcp_options = st.sampled_from([[], [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 2)), ("WScale", 7)]])
flags = st.integers(0, 255)
chains = st.lists(
    st.sampled_from([IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(addresses=["::1", "::2"])]),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(links, options, tcp_options, ip4, ip4, ports, ports, flags, payloads)
def test_tcp_over_ipv4_is_read_as_scapy_wrote_it(lower, opts, tcp_opts, src, dst, sport, dport, bits, data) -> None:
    packet = (
        lower
        / IP(src=src, dst=dst, options=opts)
        / TCP(sport=sport, dport=dport, flags=bits, seq=dport * 65537, ack=sport, options=tcp_opts)
        / Raw(data)
    )
    found = take(packet)
    assert (found.src, found.dst, found.src_port, found.dst_port) == (packed(src), packed(dst), sport, dport)
    assert (found.flags, found.seq, found.ack, found.payload_len) == (
        bits,
        dport * 65537 & 0xFFFFFFFF,
        sport,
        len(data),
    )
    assert bytes(packet)[found.payload_at : found.payload_at + found.payload_len] == data
    assert found.ip_bytes == len(bytes(packet[IP]))
    expected = {1: None, 2: 7, 3: 9 << 12 | 7}
    assert found.vlan == expected[len(lower.layers())]


@settings(max_examples=150, deadline=None)
@given(links, chains, ip6, ip6, ports, ports, payloads)
def test_udp_behind_any_ipv6_extension_headers_is_found(lower, chain, src, dst, sport, dport, data) -> None:
    packet = lower / IPv6(src=src, dst=dst)
    for header in chain:
        packet = packet / header.copy()
    packet = packet / UDP(sport=sport, dport=dport) / Raw(data)
    found = take(packet)
    assert (found.protocol, found.src, found.dst) == (17, packed(src), packed(dst))
    assert (found.src_port, found.dst_port, found.payload_len) == (sport, dport, len(data))
    assert bytes(packet)[found.payload_at :] == data


def test_ethernet_padding_is_no_payload() -> None:
    data = bytes(link() / IP(src="10.0.0.2", dst="10.0.0.1") / TCP(flags="A")) + b"\xaa" * 6
    assert len(data) == 60
    found = decode(data, 60)
    assert (found.payload_len, found.ip_bytes) == (0, 40)


def test_a_length_of_zero_means_big_tcp() -> None:
    data = bytearray(bytes(link() / IP(src="10.0.0.2", dst="10.0.0.1") / TCP(flags="A") / Raw(b"x" * 100)))
    data[16:18] = b"\0\0"
    assert decode(bytes(data), 14 + 40 + 150_000).payload_len == 150_000
    data6 = bytearray(bytes(link() / IPv6(src="::2", dst="::1") / TCP(flags="A") / Raw(b"x" * 100)))
    data6[18:20] = b"\0\0"
    assert decode(bytes(data6), 14 + 60 + 150_000).payload_len == 150_000


def test_fragments_say_which_datagram_they_belong_to() -> None:
    first = take(
        link() / IP(src="10.0.0.2", dst="10.0.0.1", id=77, flags="MF") / UDP(sport=5, dport=6) / Raw(b"x" * 800)
    )
    assert (first.fragment, first.first, first.src_port, first.payload_len) == (77, True, 5, 800)
    later = take(link() / IP(src="10.0.0.2", dst="10.0.0.1", id=77, frag=101, proto=17) / Raw(b"x" * 80))
    assert (later.fragment, later.first, later.protocol) == (77, False, 17)
    later6 = take(
        link() / IPv6(src="::2", dst="::1") / IPv6ExtHdrFragment(id=9, offset=100, m=0, nh=17) / Raw(b"y" * 10)
    )
    assert (later6.fragment, later6.first, later6.protocol) == (9, False, 17)
    atomic = take(link() / IPv6(src="::2", dst="::1") / IPv6ExtHdrFragment(id=9, offset=0, m=0) / UDP(sport=5, dport=6))
    assert (atomic.fragment, atomic.dst_port) == (None, 6)


def test_a_tiny_first_fragment_does_not_hide_its_ports() -> None:
    whole = bytes(TCP(sport=1234, dport=80, flags="S"))
    found = take(link() / IP(src="10.0.0.2", dst="10.0.0.1", id=7, flags="MF", proto=6) / Raw(whole[:8]))
    assert (found.src_port, found.dst_port, found.flags) == (1234, 80, 0)


def test_icmp_gives_type_and_identifier() -> None:
    found = take(link() / IP(src="10.0.0.2", dst="10.0.0.1") / ICMP(type=8, id=4242) / Raw(b"abc"))
    assert (found.protocol, found.icmp_type, found.src_port, found.payload_len) == (1, 8, 4242, 3)
    found = take(link() / IPv6(src="::2", dst="::1") / ICMPv6EchoRequest(id=4242, data=b"abc"))
    assert (found.protocol, found.icmp_type, found.src_port, found.payload_len) == (58, 128, 4242, 3)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "runt"),
        (bytes(link() / ARP(pdst="10.0.0.1", psrc="10.0.0.2", hwsrc="52:54:00:00:00:02")), "arp"),
        (bytes(link(type=0x88CC) / Raw(b"xxx")), "lldp"),
        (bytes(link(type=0x1234) / Raw(b"abc")), "other-ethertype"),
        (b"\1\x80\xc2\0\0\0" + bytes(6) + b"\0\x26" + bytes(LLC()), "llc"),
        (bytes(link(type=0x0800) / Raw(b"\x45\0")), "cut-ip"),
        (bytes(link(type=0x0800) / Raw(b"\x65" + bytes(19))), "bad-ip-version"),
        (bytes(link() / IP(src="10.0.0.2", dst="1.1.1.1", len=10)), "bad-ip-length"),
        (bytes(link() / IP(src="10.0.0.2", dst="1.1.1.1", proto=6) / Raw(b"ab")), "cut-transport"),
        (bytes(link() / IP(src="10.0.0.2", dst="1.1.1.1", proto=1) / Raw(b"ab")), "cut-icmp"),
        (bytes(link() / IP(src="10.0.0.2", dst="1.1.1.1") / TCP(dataofs=2)), "bad-tcp"),
        (bytes(link() / IP(src="10.0.0.2", dst="1.1.1.1") / UDP(len=3)), "bad-udp"),
        (bytes(link() / IPv6(src="::2", dst="::1", nh=60) / Raw(b"\x3c\0\0\0\0\0\0\0" * 20)), "long-extension-chain"),
    ],
)
def test_what_cannot_be_placed_has_a_name(frame: bytes, reason: str) -> None:
    assert decode(frame, len(frame)) == reason


KINDS = [b"", b"\x08\0", b"\x86\xdd", b"\x81\0\0\7\x08\0", b"\x88\xa8\0\7\x81\0\0\1\x86\xdd"]
HEADS = [b"", b"\x45", b"\x4f", b"\x60", b"\x45\0\0\0\0\0\0\0\x40\6", b"\x60\0\0\0\0\0\0", b"\x60\0\0\0\1\0\x2c"]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(HEADS), st.binary(max_size=160), st.integers(0, 70000))
@example(b"\x86\xdd", b"", b"\x60" + bytes(39), 0)
def test_any_bytes_are_decoded_or_refused_by_name(kind: bytes, head: bytes, rest: bytes, more: int) -> None:
    data = bytes(12) + kind + head + rest
    found = decode(data, len(data) + more)
    if isinstance(found, Decoded):
        assert found.payload_len >= 0
        assert found.ip_bytes <= len(data) + more
        assert len(found.src) == len(found.dst)
        assert 0 <= found.src_port <= 65535
    else:
        assert found


def reference(protocol: int, src: str, dst: str, sport: int, dport: int) -> str:
    if protocol in {1, 6, 17, 58, 132}:
        tuple_ = communityid.FlowTuple(protocol, src, dst, sport, dport)
    else:
        tuple_ = communityid.FlowTuple(protocol, src, dst)
    return communityid.CommunityID().calc(tuple_)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([6, 17, 132, 47, 50, 33, 136]), st.sampled_from([ip4, ip6]), st.data(), ports, ports)
def test_the_community_id_is_the_one_other_tools_compute(protocol, addresses, data, sport, dport) -> None:
    src, dst = data.draw(addresses), data.draw(addresses)
    assert community_id(protocol, packed(src), packed(dst), sport, dport) == reference(protocol, src, dst, sport, dport)


@pytest.mark.parametrize(("protocol", "src", "dst"), [(1, "10.0.0.1", "10.0.0.2"), (58, "fd00::2", "fd00::1")])
def test_the_community_id_of_every_icmp_type_is_the_one_other_tools_compute(protocol, src, dst) -> None:
    for kind in range(256):
        for code in (0, 3):
            ours = community_id(protocol, packed(src), packed(dst), kind, code)
            assert ours == reference(protocol, src, dst, kind, code)
            back = community_id(protocol, packed(dst), packed(src), kind, code)
            assert back == reference(protocol, dst, src, kind, code)
