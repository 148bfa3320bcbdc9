"""Which way PACKET_OUTGOING goes: the kind of a port decides."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.model import GuestPort
from appliance.rtnetlink import IFLA_INFO_KIND, parse_info
from appliance.tap.af_packet import PortSource
from appliance.tap.kind import read_kind, sends_outwards
from appliance.tap.netns import call_in_netns
from appliance.tap.ring import _HEADER, BLOCK, PACKET_OUTGOING, TP_STATUS_USER, Ring
from tests.tap.world import PORT, ip, make_world

HOST = 0  # PACKET_HOST


def attribute(kind, data):
    return (struct.pack("=HH", 4 + len(data), kind) + data).ljust((len(data) + 7) & ~3, b"\0")


def answer(kind):
    info = attribute(18, attribute(1, kind.encode() + b"\0") + attribute(2, b"\1\0\0\0")) if kind else b""
    body = bytes(16) + attribute(3, b"eth0\0") + info
    return struct.pack("=IHHII", 16 + len(body), 16, 0, 1, 0) + body


@pytest.mark.parametrize("kind", ["tun", "veth", "macvtap", "vlan"])
def test_the_kind_is_read_from_the_answer(kind):
    assert parse_info(answer(kind), IFLA_INFO_KIND) == kind


@pytest.mark.parametrize("wrong", [b"", b"\0" * 7, answer(None), struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -19)])
def test_no_kind_is_none(wrong):
    assert parse_info(wrong, IFLA_INFO_KIND) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer(data):
    parse_info(answer("tun")[:32] + data, IFLA_INFO_KIND)


@pytest.mark.parametrize(
    ("kind", "outwards"),
    [("macvtap", True), ("ipvtap", True), ("tun", False), ("veth", False), ("macvlan", False), (None, False)],
)
def test_only_a_macvtap_sends_outwards_what_the_guest_sends(kind, outwards):
    assert sends_outwards(kind) is outwards


@pytest.mark.parametrize(
    ("outgoing_is_guests", "pkttype", "from_guest"),
    [(False, HOST, True), (False, PACKET_OUTGOING, False), (True, HOST, False), (True, PACKET_OUTGOING, True)],
)
@pytest.mark.root("packet sockets")
def test_the_ring_turns_the_sides_of_a_macvtap_round(outgoing_is_guests, pkttype, from_guest):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        ring = Ring(sock, BLOCK, outgoing_is_guests=outgoing_is_guests)
        header = struct.pack("=IIIHHIIHH4x10xB", TP_STATUS_USER, 60, 60, 128, 142, 1, 2, 0, 0, pkttype)
        assert _HEADER(header, 0)[-1] == pkttype
        ring._bytes[: len(header)] = header
        (frame,) = ring.frames(4)
        ring.close()
    assert frame.from_guest is from_guest


@pytest.mark.root("network namespaces and packet sockets")
def test_a_port_in_another_namespace_says_its_kind():
    with make_world("kind") as world:
        ip("-n", world.host, "link", "add", "br0", "type", "bridge")
        index = call_in_netns(world.host_path, lambda: socket.if_nametoindex("br0"))
        assert call_in_netns(world.host_path, lambda: read_kind(index)) == "bridge"
        assert call_in_netns(world.host_path, lambda: read_kind(socket.if_nametoindex("lo"))) is None
        assert call_in_netns(world.host_path, lambda: read_kind(1 << 30)) is None
        source = PortSource(GuestPort(PORT, None, world.host_path))
        assert source.kind == "veth"
        source.close()
