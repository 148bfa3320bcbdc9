"""Ports of Open vSwitch are known by what rtnetlink says of their master."""

import os
import socket
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.hosts.netns import call_in
from appliance.hosts.switch import explain_switch, read_switch
from appliance.model import GuestPort
from appliance.rtnetlink import IFLA_INFO_SLAVE_KIND, parse_info


def attribute(kind: int, data: bytes) -> bytes:
    return (struct.pack("=HH", 4 + len(data), kind) + data).ljust((len(data) + 7) & ~3, b"\0")


def answer(slave: str | None) -> bytes:
    """As the kernel answers for a tap that is a port of a switch (``rtnl_fill_ifinfo``)."""
    info = attribute(1, b"tun\0") + attribute(2, attribute(1, b"\1\0\0\0"))
    if slave:
        info += attribute(4, slave.encode() + b"\0")
    master = attribute(10, struct.pack("=I", 7)) if slave else b""
    body = struct.pack("=BxHiII", 0, 1, 9, 0x11043, 0) + attribute(3, b"vnet3\0") + master + attribute(18, info)
    return struct.pack("=IHHII", 16 + len(body), 16, 0, 1, 0) + body


@pytest.mark.parametrize("kind", ["openvswitch", "bridge", "bond"])
def test_the_kind_of_the_switch_is_read_from_the_answer(kind) -> None:
    assert parse_info(answer(kind), IFLA_INFO_SLAVE_KIND) == kind


@pytest.mark.parametrize("wrong", [b"", b"\0" * 7, answer(None), struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -19)])
def test_a_port_of_no_switch_has_none(wrong) -> None:
    assert parse_info(wrong, IFLA_INFO_SLAVE_KIND) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer(data) -> None:
    parse_info(answer("openvswitch")[:32] + data, IFLA_INFO_SLAVE_KIND)


def test_only_a_port_of_open_vswitch_has_a_note() -> None:
    port = GuestPort("vnet3")
    assert "hw-offload" in (explain_switch(port, "openvswitch") or "")
    assert explain_switch(port, "bridge") is None
    assert explain_switch(port, None) is None


@pytest.mark.root("network namespaces")
def test_a_real_port_of_a_bridge_is_read() -> None:
    name = f"psw-{os.getpid()}"
    path = f"/run/netns/{name}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        ip("-n", name, "tuntap", "add", "tap0", "mode", "tap")
        index = call_in(path, lambda: socket.if_nametoindex("tap0"))
        assert read_switch(path, index) is None
        ip("-n", name, "link", "set", "tap0", "master", "br0")
        assert read_switch(path, index) == "bridge"
        assert read_switch(path, 1 << 20) is None
        assert read_switch("/run/netns/nosuch-namespace", index) is None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)
