"""What kind of interface a port is, as rtnetlink names it (``ip -d link``): "tun", "veth", "macvtap".

sysfs shows the interfaces of the namespace in which it was mounted; a netlink socket, those of the one in which it was
made. Sources: rtnetlink(7), include/uapi/linux/if_link.h, ``rtnl_link_info_fill`` in net/core/rtnetlink.c.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from struct import error, pack, unpack_from
from typing import Final

NETLINK_ROUTE: Final = 0
RTM_NEWLINK: Final = 16
RTM_GETLINK: Final = 18
NLM_F_REQUEST: Final = 1
IFLA_LINKINFO: Final = 18
IFLA_INFO_KIND: Final = 1
NLA_TYPE_MASK: Final = 0x3FFF
HEADERS: Final = 16 + 16  # struct nlmsghdr, struct ifinfomsg
ANSWER: Final = 1 << 16

# Guests whose frames leave through the interface itself: tap_get_user() hands them to dev_queue_xmit(), and frames to
# the guest come in by the lower device's rx_handler (drivers/net/tap.c, drivers/net/macvlan.c, drivers/net/ipvlan/).
INSIDE_OUT: Final = frozenset({"macvtap", "ipvtap"})


def sends_outwards(kind: str | None) -> bool:
    """Whether PACKET_OUTGOING on such a port is what the guest sends.

    On a tap, vnet or vif the host sends out what is for the guest; on a macvtap it is the other way round. So says
    the kernel's source, and so does a live macvtap; an ipvtap was not tried.
    """
    return kind in INSIDE_OUT


def read_kind(index: int) -> str | None:
    """The kind of an interface of the calling thread's namespace, None where it has none or that cannot be asked."""
    request = pack("=IHHII", HEADERS, RTM_GETLINK, NLM_F_REQUEST, 1, 0) + pack("=BxHiII", 0, 0, index, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sock:
            sock.settimeout(1.0)
            sock.send(request)
            return parse_kind(sock.recv(ANSWER))
    except OSError:
        return None


def parse_kind(answer: bytes) -> str | None:
    """IFLA_INFO_KIND of an RTM_NEWLINK message."""
    try:
        if unpack_from("=H", answer, 4)[0] != RTM_NEWLINK:
            return None
        for kind, value in _attributes(answer[HEADERS:]):
            if kind == IFLA_LINKINFO:
                names = [data for inner, data in _attributes(value) if inner == IFLA_INFO_KIND]
                return names[0].rstrip(b"\0").decode("ascii", "replace") if names else None
    except error:  # cut short
        pass
    return None


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, data[at + 4 : at + length]
        at += length + 3 & ~3
