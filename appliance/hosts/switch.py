"""Which kind of switch a port belongs to, as rtnetlink names it (``ip -d link``): "bridge_slave", "openvswitch_slave".

Sources: rtnetlink(7), include/uapi/linux/if_link.h, ``rtnl_link_slave_info_fill`` in net/core/rtnetlink.c,
net/openvswitch/vport-internal_dev.c (the master of all its ports is of the kind "openvswitch"),
lib/netdev-offload-tc.c in Open vSwitch (the qdiscs and filters of its offload).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from struct import error, pack, unpack_from
from typing import Final

from appliance.hosts.netns import call_in
from appliance.model import GuestPort

NETLINK_ROUTE: Final = 0
RTM_NEWLINK: Final = 16
RTM_GETLINK: Final = 18
NLM_F_REQUEST: Final = 1
IFLA_LINKINFO: Final = 18
IFLA_INFO_SLAVE_KIND: Final = 4
NLA_TYPE_MASK: Final = 0x3FFF
HEADERS: Final = 16 + 16  # struct nlmsghdr, struct ifinfomsg
ANSWER: Final = 1 << 16

OPEN_VSWITCH: Final = "openvswitch"


def explain_switch(port: GuestPort, kind: str | None) -> str | None:
    """What a port's switch may hide from us, None for nothing."""
    if kind != OPEN_VSWITCH:
        return None
    return (
        f"port {port.ifname} belongs to Open vSwitch: with other_config:hw-offload=true it owns the port's ingress, so "
        "connections can be observed only, and what a card forwards by itself does not cross the port; "
        "see: ovs-vsctl get Open_vSwitch . other_config:hw-offload"
    )


def read_switch(netns: str | None, index: int) -> str | None:
    """The kind of the switch that an interface is a port of; None: of none, or it cannot be asked."""
    try:
        return call_in(netns, lambda: _ask(index))
    except OSError:
        return None


def parse_slave_kind(answer: bytes) -> str | None:
    """IFLA_INFO_SLAVE_KIND of an RTM_NEWLINK message."""
    try:
        if unpack_from("=H", answer, 4)[0] != RTM_NEWLINK:
            return None
        for kind, value in _attributes(answer[HEADERS:]):
            if kind == IFLA_LINKINFO:
                names = [data for inner, data in _attributes(value) if inner == IFLA_INFO_SLAVE_KIND]
                return names[0].rstrip(b"\0").decode("ascii", "replace") if names else None
    except error:  # cut short
        pass
    return None


def _ask(index: int) -> str | None:
    request = pack("=IHHII", HEADERS, RTM_GETLINK, NLM_F_REQUEST, 1, 0) + pack("=BxHiII", 0, 0, index, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sock:
        sock.settimeout(1.0)
        sock.send(request)
        return parse_slave_kind(sock.recv(ANSWER))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, data[at + 4 : at + length]
        at += length + 3 & ~3
