"""The receive ring of a packet socket: frames without a system call each.

TPACKET_V2, because its slots are handed over frame by frame (V3 waits for a block to fill or its timer to fire: a
millisecond that a short-lived process does not give us). Sources: Documentation/networking/packet_mmap.rst,
include/uapi/linux/if_packet.h, ``tpacket_rcv`` in net/packet/af_packet.c.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE, mmap
from struct import Struct, pack
from typing import Final

from appliance.tap.frame import SNAP, CapturedFrame, count_segments

SOL_PACKET: Final = 263
PACKET_RX_RING: Final = 5
PACKET_VERSION: Final = 10
PACKET_VNET_HDR: Final = 15
TPACKET_V2: Final = 1

TP_STATUS_USER: Final = 1
TP_STATUS_VLAN_VALID: Final = 1 << 4

SLOT: Final = 2432  # tpacket2_hdr, sockaddr_ll, virtio_net_hdr, alignment, SNAP bytes; a multiple of 16
BLOCK: Final = 1 << 18

PACKET_OUTGOING: Final = 4  # sent out of the port: on a tap to the guest, on a macvtap by it (see kind.py)
VNET_GSO_UDP_L4: Final = 5  # include/uapi/linux/virtio_net.h

# struct tpacket2_hdr: status, len, snaplen, mac, net, sec, nsec, vlan_tci, vlan_tpid; then sockaddr_ll.sll_pkttype.
_HEADER = Struct("=IIIHHIIHH4x10xB").unpack_from
_VNET = Struct("=xBHH").unpack_from  # struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size


class Ring:
    """The mapped ring of one socket; read by one thread."""

    def __init__(self, sock: socket.socket, size: int, *, outgoing_is_guests: bool = False) -> None:
        self._outgoing_is_guests = outgoing_is_guests
        blocks = max(size // BLOCK, 1)
        per_block = BLOCK // SLOT
        sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.setsockopt(SOL_PACKET, PACKET_RX_RING, pack("=IIII", BLOCK, blocks, SLOT, blocks * per_block))
        self._map = mmap(sock.fileno(), BLOCK * blocks, MAP_SHARED, PROT_READ | PROT_WRITE)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("I")
        self._slots = [block * BLOCK + slot * SLOT for block in range(blocks) for slot in range(per_block)]
        self._next = 0

    @property
    def ready(self) -> bool:
        """Whether a frame waits."""
        return bool(self._words[self._slots[self._next] >> 2] & TP_STATUS_USER)

    def frames(self, limit: int) -> Iterator[CapturedFrame]:
        """Yield at most ``limit`` frames that wait; each slot is handed back before its frame is yielded."""
        for _ in range(limit):
            at = self._slots[self._next]
            status, length, captured, mac, _net, sec, nsec, tci, _tpid, pkttype = _HEADER(self._map, at)
            if not status & TP_STATUS_USER:
                return
            begin = at + mac
            data = bytes(self._bytes[begin : begin + min(captured, SNAP)])
            gso_type, _, gso_size = _VNET(self._map, begin - 10)
            self._words[at >> 2] = 0  # TP_STATUS_KERNEL
            self._next += 1
            if self._next == len(self._slots):
                self._next = 0
            segments = 1
            if gso_type:
                segments = count_segments(data, length, gso_size, udp=gso_type & 0x7F == VNET_GSO_UDP_L4)
            vlan = tci & 0xFFF or None if status & TP_STATUS_VLAN_VALID else None
            from_guest = (pkttype == PACKET_OUTGOING) is self._outgoing_is_guests
            yield CapturedFrame(sec * 1_000_000_000 + nsec, from_guest, data, length, segments, vlan)

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._bytes.release()
        self._map.close()
