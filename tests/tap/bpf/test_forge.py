"""Frames that we make are those that an independent engine makes."""

from __future__ import annotations

import itertools
import os
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether

from appliance.tap.bpf import forge
from appliance.tap.bpf.layout import KEY

HEAD = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
NETWORKS = [IP(src="10.0.0.1", dst="10.0.0.2", id=77), IPv6(src="fd00::1", dst="fd00::2")]


def spoil(packet) -> bytes:
    """The frame with its transport checksum as a guest leaves it that relies on its host."""
    raw = bytearray(bytes(packet))
    shape = forge.parse(bytes(raw))
    at = shape.transport + (16 if shape.protocol == 6 else 6)
    raw[at : at + 2] = b"\x12\x34"
    return bytes(raw)


@pytest.mark.parametrize("network", NETWORKS, ids=["v4", "v6"])
@pytest.mark.parametrize("size", [0, 1, 2, 333, 1400])
@pytest.mark.parametrize("tags", [0, 1, 2])
@pytest.mark.parametrize("padding", [0, 17])
def test_checksums_are_those_of_scapy(network, size, tags, padding) -> None:
    for transport in (TCP(sport=1, dport=2, seq=9, flags="PA"), UDP(sport=1, dport=2)):
        head = HEAD
        for tag in range(tags):
            head = head / Dot1Q(vlan=tag + 5)
        packet = head / network / transport / os.urandom(size)
        wanted = bytes(packet) + bytes(padding)
        assert forge.complete(spoil(packet) + bytes(padding)) == [wanted]


def test_a_checksum_behind_extension_headers_is_found() -> None:
    packet = HEAD / NETWORKS[1] / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2) / b"deep"
    assert forge.complete(spoil(packet)) == [bytes(packet)]


def test_a_datagram_without_a_checksum_stays_without_one() -> None:
    packet = bytes(HEAD / NETWORKS[0] / UDP(sport=1, dport=2, chksum=0) / b"x")
    assert forge.complete(packet) == [packet]


def test_fragments_and_other_protocols_stay_as_they_are() -> None:
    for packet in (
        HEAD / IP(dst="10.0.0.2", flags="MF") / UDP(chksum=5) / b"x",
        HEAD / NETWORKS[1] / IPv6ExtHdrFragment(m=1, nh=17) / UDP(chksum=5) / b"x",
        HEAD / IP(proto=47) / b"gre",
        HEAD / b"anything",
    ):
        assert forge.complete(bytes(packet)) == [bytes(packet)]


@pytest.mark.parametrize("network", NETWORKS, ids=["v4", "v6"])
def test_a_super_packet_becomes_segments(network) -> None:
    data = os.urandom(5000)
    packet = HEAD / network / TCP(sport=1, dport=2, seq=0xFFFFFF00, flags="FPA", options=[("NOP", None)] * 4) / data
    pieces = [Ether(piece) for piece in forge.complete(spoil(packet), gso_size=1448)]
    assert b"".join(bytes(piece[TCP].payload) for piece in pieces) == data
    assert [piece[TCP].seq for piece in pieces] == [(0xFFFFFF00 + 1448 * index) % (1 << 32) for index in range(4)]
    assert [str(piece[TCP].flags) for piece in pieces] == ["A", "A", "A", "FPA"]
    for piece in pieces:
        assert forge.complete(bytes(piece)) == [bytes(piece)], "each is whole, with its own checksums"
        assert bytes(piece) == bytes(rebuild(piece))


def rebuild(packet):
    """Let scapy compute what can be computed."""
    again = packet.copy()
    for layer, names in ((IP, ("len", "chksum")), (IPv6, ("plen",)), (TCP, ("chksum",)), (UDP, ("len", "chksum"))):
        if layer in again:
            for name in names:
                delattr(again[layer], name)
    return Ether(bytes(again))


def test_a_super_packet_that_was_cut_gives_what_was_captured() -> None:
    data = os.urandom(5000)
    raw = bytes(HEAD / NETWORKS[0] / TCP(sport=1, dport=2, seq=1, flags="FPA") / data)
    pieces = [Ether(piece) for piece in forge.complete(raw[:3000], gso_size=1448, wire_len=len(raw))]
    assert b"".join(bytes(piece[TCP].payload) for piece in pieces) == data[: 3000 - 54]
    assert {str(piece[TCP].flags) for piece in pieces} == {"A"}
    assert forge.complete(raw[:3000], wire_len=len(raw)) == []


def test_datagrams_that_were_left_to_segmentation_become_datagrams() -> None:
    raw = bytes(HEAD / NETWORKS[0] / UDP(sport=1, dport=2) / (b"a" * 1000 + b"b" * 1000 + b"c" * 10))
    pieces = [Ether(piece) for piece in forge.complete(raw, gso_size=1000)]
    assert [bytes(piece[UDP].payload) for piece in pieces] == [b"a" * 1000, b"b" * 1000, b"c" * 10]
    assert all(bytes(piece) == bytes(rebuild(piece)) for piece in pieces)


def test_a_guest_that_asks_for_tiny_segments_gets_few() -> None:
    raw = bytes(HEAD / NETWORKS[0] / TCP(sport=1, dport=2, flags="FPA") / bytes(10_000))
    pieces = [Ether(piece) for piece in forge.complete(raw, gso_size=1)]
    assert len(pieces) == forge.MAX_PIECES
    assert {str(piece[TCP].flags) for piece in pieces} == {"A"}


def test_a_tag_is_put_where_it_was() -> None:
    packet = HEAD / Dot1Q(vlan=7, prio=5) / NETWORKS[0] / UDP(sport=1, dport=2) / b"x"
    bare = bytes(HEAD / NETWORKS[0] / UDP(sport=1, dport=2) / b"x")
    tag = int.from_bytes(b"\x81\x00", "little") << 16 | 5 << 13 | 7
    assert forge.complete(bare, tag=tag) == [bytes(packet)]


@pytest.mark.parametrize("to_guest", [True, False])
@pytest.mark.parametrize("vlan", [0, 7, 5 << 12 | 7])
def test_a_reset_is_what_scapy_would_send(to_guest, vlan) -> None:
    for version, local, remote in ((4, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])), (6, b"\xfd" * 16, b"\xfc" * 16)):
        key = KEY.pack(3, vlan, 1000, 80, 6, version, 0, local, remote)
        frame = Ether(forge.make_reset(key, bytes(range(12)), to_guest, 5, 6))
        assert bytes(rebuild(frame)) == bytes(frame)
        ports = (80, 1000) if to_guest else (1000, 80)
        segment = frame[TCP]
        assert (segment.sport, segment.dport, segment.seq, segment.ack, str(segment.flags)) == (*ports, 5, 6, "RA")
        ends = (bytes(range(6)).hex(":"), bytes(range(6, 12)).hex(":"))  # the peer's, the guest's
        assert (frame.src, frame.dst) == (ends if to_guest else ends[::-1])


def test_only_a_first_syn_is_answered() -> None:
    for flags, data, wanted in (("S", b"", 101), ("SEC", b"", 101), ("S", b"early", 106), ("SA", b"", None)):
        frame = bytes(HEAD / NETWORKS[0] / TCP(sport=1, dport=2, seq=100, flags=flags) / data)
        assert forge.answer_syn(frame) == wanted
    assert forge.answer_syn(bytes(HEAD / NETWORKS[0] / UDP())) is None


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_whatever_a_guest_sends_is_answered_with_frames(data, gso_size) -> None:
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00\x00\x07\x08\x00", b""):
        frame = bytes(12) + kind + data
        for piece in forge.complete(frame, gso_size=gso_size):
            assert len(piece) <= len(frame)
        forge.answer_syn(frame)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [6, 17])
def test_no_length_that_a_guest_may_write_leads_beyond_the_frame(version, protocol) -> None:
    for size, more, byte in itertools.product(range(24), range(8), (0, 3, 0x10, 0x40, 0x50, 0xF0)):
        if version == 4:
            head = b"\x08\x00" + pack("!BBHIBBH", 0x45, 0, 20 + size, 0, 64, protocol, 0) + bytes(8)
        else:
            head = b"\x86\xdd" + pack("!IHBB", 6 << 28, size, protocol, 64) + bytes(32)
        frame = bytes(12) + head + bytes([byte]) * (size + more)
        for gso_size in (0, 1, 65535):
            for made in forge.complete(frame, 0, gso_size, len(frame)):
                assert len(made) <= len(frame)
        forge.answer_syn(frame)
        forge.expected_by(frame)
