"""Ports that come and go: rtnetlink's link notifications of one network namespace.

Told as they came, newest last; what could not be kept is told as "unknown: look again", never left out silently. A
bridge tells of its ports too, in messages of its own family: leaving a bridge looks like being deleted there, so those
are not read. Sources: rtnetlink(7), netlink(7), ``rtmsg_ifinfo`` in net/core/rtnetlink.c, ``br_ifinfo_notify`` in
net/bridge/br_netlink.c.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from struct import unpack, unpack_from
from typing import Final, Self

from appliance.errors import HostError
from appliance.rtnetlink import (
    IFINFOMSG,
    NETLINK_ROUTE,
    NLMSGHDR,
    RTM_DELLINK,
    RTM_NEWLINK,
    parse_attributes,
)
from appliance.tap.netns import call_in_netns

RTMGRP_LINK: Final = 1
IFLA_IFNAME: Final = 3
IFLA_MASTER: Final = 10
IFF_UP: Final = 1
SO_RCVBUFFORCE: Final = 33
BUFFER_BYTES: Final = 1 << 20  # some 500 notifications
DATAGRAM: Final = 1 << 16
BATCH: Final = 1024  # datagrams read at once; an event storm must not hold up its reader


class PortState(StrEnum):
    """What is known of an interface after a change."""

    UP = "up"
    DOWN = "down"  # it is there, and passes no packets
    GONE = "gone"  # deleted, or moved to another network namespace
    UNKNOWN = "unknown"  # changes were lost: look at every interface again


@dataclass(frozen=True, slots=True)
class PortChange:
    """One interface as it is now. ``master`` is the ifindex of the bridge that it is a port of, None without one."""

    state: PortState
    ifname: str = ""
    ifindex: int = 0
    master: int | None = None


LOOK_AGAIN: Final = PortChange(PortState.UNKNOWN)


class PortWatcher:
    """Tells which interfaces of a network namespace came, changed and went since it was made. Used by one thread.

    ``netns`` is a path, None for our own. Needs no privilege beside that of going there. Raises UsageError,
    PermissionRefused, HostError.
    """

    def __init__(self, netns: str | None = None, buffer_bytes: int = BUFFER_BYTES) -> None:
        try:
            self._socket = call_in_netns(netns, lambda: _open(buffer_bytes))
        except OSError as error:
            raise HostError(f"cannot watch ports in {netns or 'our network namespace'}: {error.strerror}") from error

    def changes(self) -> list[PortChange]:
        """Return what changed since the last call, in order, without waiting.

        ``LOOK_AGAIN`` comes first where anything was lost: what follows it may be incomplete, and is still true.
        """
        told: list[PortChange] = []
        lost = False
        for _ in range(BATCH):
            try:
                data, _, flags, (sender, _) = self._socket.recvmsg(DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # the kernel had to drop notifications
                    raise HostError(f"cannot read changes of ports: {error.strerror}") from error
                lost = True
                continue
            if sender != 0:  # not the kernel
                continue
            lost |= bool(flags & socket.MSG_TRUNC)
            told += parse_changes(data)
        return [LOOK_AGAIN, *told] if lost else told

    def fileno(self) -> int:
        """A descriptor that is readable when there are changes."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop watching; may be called twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_changes(data: bytes) -> list[PortChange]:
    """Read the link notifications of one datagram; LOOK_AGAIN stands for one that was cut short."""
    changes: list[PortChange] = []
    at = 0
    while at + NLMSGHDR <= len(data):
        length, kind = unpack_from("=IH", data, at)
        if length < NLMSGHDR or at + length > len(data):
            return [*changes, LOOK_AGAIN]
        if kind in {RTM_NEWLINK, RTM_DELLINK}:
            changes += _parse_link(data[at + NLMSGHDR : at + length], gone=kind == RTM_DELLINK)
        at += length + 3 & ~3
    return changes


def _parse_link(body: bytes, *, gone: bool) -> Iterator[PortChange]:
    if len(body) < IFINFOMSG:
        yield LOOK_AGAIN
        return
    family, index, flags = unpack_from("=BxxxiI", body)
    if family != socket.AF_UNSPEC:
        return
    found = dict(parse_attributes(body[IFINFOMSG:]))
    name = found.get(IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "replace")
    above = found.get(IFLA_MASTER, b"")
    (master,) = unpack("=I", above) if len(above) == 4 else (0,)
    if gone:
        yield PortChange(PortState.GONE, name, index)
    else:
        yield PortChange(PortState.UP if flags & IFF_UP else PortState.DOWN, name, index, master or None)


def _open(buffer_bytes: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, NETLINK_ROUTE)
    try:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        except PermissionError:  # then within net.core.rmem_max
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.bind((0, RTMGRP_LINK))
    except BaseException:
        sock.close()
        raise
    return sock
