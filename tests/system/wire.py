"""The first packet of every conversation on a guest's port, straight from an AF_PACKET socket: as early as can be.

``Flow.started_ns`` is when the host's kernel saw the packet (SO_TIMESTAMPNS, socket(7)).
"""

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, Transport
from appliance.tap.netns import call_in_netns

ETH_P_ALL = 3
SYN, ACK = 0x02, 0x10
SO_TIMESTAMPNS = 35  # include/uapi/asm-generic/socket.h


class Wire:
    def __init__(self, netns: str, ifname: str, mac: str) -> None:
        self._socket = call_in_netns(
            netns, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((ifname, ETH_P_ALL))
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self._seen: set[tuple] = set()

    def first_packets(self, timeout_s: float) -> Iterator[Flow]:
        """Flows as they begin, until nothing comes for ``timeout_s``."""
        self._socket.settimeout(timeout_s)
        while True:
            try:
                frame, notes, _, _ = self._socket.recvmsg(128, 64)
            except TimeoutError:
                return
            seconds, ns = struct.unpack("qq", notes[0][2])
            flow = self._parse(frame, seconds * 1_000_000_000 + ns)
            if flow is not None:
                yield flow

    def _parse(self, frame: bytes, at_ns: int) -> Flow | None:
        kind = int.from_bytes(frame[12:14], "big")
        if kind == 0x0800:
            protocol, addresses, at = frame[23], (frame[26:30], frame[30:34]), 14 + (frame[14] & 15) * 4
        elif kind == 0x86DD:
            protocol, addresses, at = frame[20], (frame[22:38], frame[38:54]), 54
        else:
            return None
        if protocol == 6:
            if frame[at + 13] & (SYN | ACK) != SYN:
                return None
        elif protocol != 17:
            return None
        ports = struct.unpack_from("!HH", frame, at)
        ends = [Endpoint(ip_address(ip), port) for ip, port in zip(addresses, ports, strict=True)]
        out = frame[6:12] == self._mac
        if not out and frame[:6] != self._mac:
            return None
        local, remote = ends if out else ends[::-1]
        transport = Transport.TCP if protocol == 6 else Transport.UDP
        key = (transport, local, remote)
        if transport is Transport.UDP and key in self._seen:
            return None
        self._seen.add(key)
        direction = Direction.OUT if out else Direction.IN
        return Flow(FlowId(GuestId("qemu:0"), len(self._seen)), FiveTuple(*key), direction, at_ns)

    def close(self) -> None:
        self._socket.close()
