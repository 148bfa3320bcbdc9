"""Notices that somebody changed the qdiscs or filters of our ports: ours may be gone, and with them eye and hand.

The kernel tells every change of traffic control to the group RTMGRP_TC of the network namespace; where nobody changes
anything, looking costs one system call. Sources: rtnetlink(7), ``tfilter_notify`` in net/sched/cls_api.c,
``qdisc_notify`` in net/sched/sch_api.c.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from struct import unpack_from
from typing import Final

from appliance.errors import HostError
from appliance.tap.netns import call_in_netns

NETLINK_ROUTE: Final = 0
RTMGRP_TC: Final = 8
CHANGES: Final = frozenset({36, 37, 44, 45})  # RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTFILTER, RTM_DELTFILTER
NLMSGHDR: Final = 16
TCMSG: Final = 20  # struct tcmsg: family (u8), pad, ifindex (s32), handle, parent, info
DATAGRAM: Final = 1 << 16
BATCH: Final = 256  # what is left makes us look again next time


class Guard:
    """Listens in the network namespace of the ports. Raises UsageError, PermissionRefused, HostError."""

    def __init__(self, netns: str | None) -> None:
        try:
            self._socket = call_in_netns(netns, _open)
        except OSError as error:
            raise HostError(f"cannot listen for changes of traffic control: {error.strerror}") from error

    def has_changed(self, ifindexes: Collection[int]) -> bool:
        """Whether anything changed on these interfaces since the last call, without waiting; lost news count as yes."""
        changed = False
        for _ in range(BATCH):
            try:
                data = self._socket.recv(DATAGRAM)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: the kernel had to drop news
                changed = True
            else:
                changed |= parse_ifindex(data) in ifindexes
        return changed

    def close(self) -> None:
        """May be called twice."""
        self._socket.close()


def parse_ifindex(data: bytes) -> int | None:
    """The interface that a change of traffic control is about, None for other messages."""
    if len(data) < NLMSGHDR + TCMSG or unpack_from("=H", data, 4)[0] not in CHANGES:
        return None
    return int(unpack_from("=i", data, NLMSGHDR + 4)[0])


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
    try:
        sock.bind((0, RTMGRP_TC))
    except BaseException:
        sock.close()
        raise
    return sock
