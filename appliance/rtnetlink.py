"""What the kernel says of an interface over rtnetlink. Used by the rooms that look at ports.

sysfs shows the interfaces of the namespace in which it was mounted; a netlink socket, those of the one in which it was
made. Sources: rtnetlink(7), netlink(7), include/uapi/linux/if_link.h, ``rtnl_link_info_fill`` and
``rtnl_link_slave_info_fill`` in net/core/rtnetlink.c.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from struct import error, pack, unpack_from
from typing import Final

NETLINK_ROUTE: Final = 0
RTM_NEWLINK: Final = 16
RTM_DELLINK: Final = 17
RTM_GETLINK: Final = 18
NLM_F_REQUEST: Final = 1
IFLA_LINKINFO: Final = 18
IFLA_INFO_KIND: Final = 1  # what it is: "tun", "veth", "macvtap"
IFLA_INFO_SLAVE_KIND: Final = 4  # what it is a port of: "bridge", "openvswitch"
NLA_TYPE_MASK: Final = 0x3FFF
NLMSGHDR: Final = 16  # struct nlmsghdr: length (u32), type (u16), flags (u16), sequence, port
IFINFOMSG: Final = 16  # struct ifinfomsg: family (u8), pad, ARPHRD (u16), index (s32), flags (u32), change
ANSWER: Final = 1 << 16


def read_link(index: int) -> bytes:
    """The RTM_NEWLINK message of an interface of the calling thread's namespace. Raises OSError."""
    request = pack("=IHHII", NLMSGHDR + IFINFOMSG, RTM_GETLINK, NLM_F_REQUEST, 1, 0) + pack(
        "=BxHiII", 0, 0, index, 0, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sock:
        sock.settimeout(1.0)
        sock.send(request)
        return sock.recv(ANSWER)


def parse_info(answer: bytes, which: int) -> str | None:
    """One text of the IFLA_LINKINFO of an RTM_NEWLINK message; None where it has none. Takes any bytes."""
    try:
        if unpack_from("=H", answer, 4)[0] != RTM_NEWLINK:
            return None
    except error:  # cut short
        return None
    for kind, value in parse_attributes(answer[NLMSGHDR + IFINFOMSG :]):
        if kind == IFLA_LINKINFO:
            names = [data for inner, data in parse_attributes(value) if inner == which]
            return names[0].rstrip(b"\0").decode("ascii", "replace") if names else None
    return None


def parse_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each struct nlattr, up to the first that is cut short."""
    at = 0
    while at + 4 <= len(data):
        length, kind = unpack_from("=HH", data, at)
        if length < 4 or at + length > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[at + 4 : at + length]
        at += length + 3 & ~3
