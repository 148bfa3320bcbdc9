"""Frames from a guest's port on this host, by a packet socket bound to it (P1, P2).

ETH_P_ALL, because on a bridge port the bridge takes frames before a single protocol's socket would see them. The
socket is made with protocol 0 and receives nothing until it is bound: no foreign frame ever reaches us. Sources:
packet(7), net/packet/af_packet.c.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from struct import unpack_from
from typing import Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import Availability, GuestPort
from appliance.tap.classic import Program, build_filter
from appliance.tap.frame import SNAP, CapturedFrame
from appliance.tap.kind import read_kind, sends_outwards
from appliance.tap.netns import call_in_netns
from appliance.tap.ring import SOL_PACKET, Ring

ETH_P_ALL: Final = 3
SO_ATTACH_FILTER: Final = 26
PACKET_STATISTICS: Final = 6
SIOCGIFNAME: Final = 0x8910
ARPHRD_ETHER: Final = 1  # include/uapi/linux/if_arp.h
ARPHRD_LOOPBACK: Final = 772
BATCH: Final = 256
RING_BYTES: Final = 8 << 20  # 3,400 frames


class PortSource:
    """The frames of one port (``appliance.ports.FrameSource``). Used by one thread.

    Raises UsageError when there is no such interface, PermissionRefused without CAP_NET_RAW.
    """

    def __init__(self, port: GuestPort, ring_bytes: int = RING_BYTES) -> None:
        self.port = port
        self.why: str | None = None  # why it is exhausted
        self._lost = 0
        self._socket, self.kind = call_in_netns(port.netns, lambda: _open(port))
        try:
            self._ring = Ring(self._socket, ring_bytes, outgoing_is_guests=sends_outwards(self.kind))
            self._socket.bind((port.ifname, ETH_P_ALL))
        except OSError as error:
            self._socket.close()
            raise _explain(error, port) from error
        kind = self._socket.getsockname()[3]
        if kind not in {ARPHRD_ETHER, ARPHRD_LOOPBACK}:
            self.close()
            raise UsageError(f"port {port.ifname} is no Ethernet interface (ARPHRD type {kind})")
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN | select.POLLERR)

    def frames(self, timeout_s: float) -> Iterator[CapturedFrame]:
        """Yield the frames at hand, at most a batch; wait for the first one at most ``timeout_s``."""
        if self.exhausted:
            return
        if not self._ring.ready:
            ready = self._poll.poll(max(0.0, timeout_s) * 1000)
            if not ready or ready[0][1] & ~select.POLLIN:  # deleted while it was down: no event tells
                self._check_port()
        yield from self._ring.frames(BATCH)

    @property
    def exhausted(self) -> bool:
        """The port is gone and everything it delivered was read."""
        return self.why is not None

    def fileno(self) -> int:
        """The socket: readable while frames wait."""
        return self._socket.fileno()

    def lost(self) -> int:
        """Frames that found the ring full, so far."""
        if self._socket.fileno() >= 0:
            # struct tpacket_stats: packets, drops; reading resets both.
            self._lost += int(unpack_from("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1])
        return self._lost

    def close(self) -> None:
        """Release socket and ring."""
        if self._socket.fileno() >= 0:
            self.lost()
            self._ring.close()
            self._socket.close()
            self.why = self.why or "closed"

    def _check_port(self) -> None:
        """Tell a port that is down (it may come back) from one that is gone."""
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self._ring.ready or find_name(self._socket) is not None:
            return
        reason = os.strerror(number) if number else "it was deleted or moved"
        self.why = f"port {self.port.ifname} is gone: {reason}"


def find_name(sock: socket.socket) -> str | None:
    """The name of the interface that the socket is bound to, None when that is gone."""
    name = sock.getsockname()[0]
    return name or None


def probe() -> Availability:
    """Whether packet sockets can be opened here."""
    name = "packet socket (tap)"
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError as error:
        remedy = "run as root, or grant CAP_NET_RAW" if error.errno == errno.EPERM else "modprobe af_packet"
        return Availability(name, ok=False, reason=error.strerror or str(error), remedy=remedy)
    return Availability(name, ok=True, reason="AF_PACKET opens")


def _open(port: GuestPort) -> tuple[socket.socket, str | None]:
    """A packet socket in the current namespace that receives nothing yet, and the kind of the port."""
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    except OSError as error:
        raise _explain(error, port) from error
    try:
        if (index := _find_index(port.ifname)) is None:
            raise OSError(errno.ENODEV, "no such interface")
        if port.ifindex is not None and port.ifindex != index:
            raise HostError(f"port {port.ifname} is another interface by now (index {index}, not {port.ifindex})")
        program = Program(build_filter(SNAP))
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program.option)
        kind = read_kind(index)
    except OSError as error:
        sock.close()
        raise _explain(error, port) from error
    except HostError:
        sock.close()
        raise
    return sock, kind


def _find_index(ifname: str) -> int | None:
    with suppress(OSError):  # without errno
        return socket.if_nametoindex(ifname)
    return None


def _explain(error: OSError, port: GuestPort) -> Exception:
    where = f" in network namespace {port.netns}" if port.netns else ""
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return PermissionRefused(
                f"cannot tap port {port.ifname}{where}: CAP_NET_RAW is needed; run as root or grant it to parasight"
            )
        case errno.ENODEV | errno.ENXIO:
            return UsageError(f"there is no port {port.ifname}{where}")
        case errno.ENETDOWN:
            return HostError(f"port {port.ifname}{where} is down; ip link set {port.ifname} up")
        case errno.ENOMEM | errno.ENOBUFS:
            return HostError(f"cannot tap port {port.ifname}{where}: no kernel memory for the receive ring")
    return HostError(f"cannot tap port {port.ifname}{where}: {error.strerror or error}")
