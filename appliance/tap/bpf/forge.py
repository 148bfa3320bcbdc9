"""Frames that we send: held ones made whole again, and TCP resets. Bytes in, bytes out.

A guest that leaves checksums and segmentation to its host hands over frames that no wire ever carries: their checksums
are partial, one frame may be many segments. What we send on is what the wire would have carried. Sources: RFC 791, 793,
768, 8200, 1071 (the checksum); include/uapi/linux/if_vlan.h; all fields in network order.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct, pack, pack_into, unpack_from
from typing import Final

from appliance.tap.bpf.layout import KEY

TCP: Final = 6
UDP: Final = 17
FIN, SYN, RST, PSH, ACK, CWR = 1, 2, 4, 8, 16, 128
MAX_PIECES: Final = 64  # of one frame
_VLANS: Final = frozenset({0x8100, 0x88A8, 0x9100})
_EXTENSIONS: Final = frozenset({0, 43, 44, 51, 60, 135, 139, 140})
_ROUTING: Final = 43
_TCP = Struct("!HHIIBBHHH")  # ports, sequence, acknowledgement, offset, flags, window, checksum, urgent


@dataclass(frozen=True, slots=True)
class Shape:
    """Where things begin in a frame, in bytes. ``sums``: its transport checksum can be computed."""

    network: int
    transport: int
    payload: int
    end: int  # of the IP packet; what follows is padding
    version: int
    protocol: int
    sums: bool


def parse(frame: bytes) -> Shape | None:
    """Find the parts of a TCP or UDP frame; None for anything else, and for damaged ones."""
    try:
        return _parse(frame)
    except (IndexError, ValueError):
        return None


def add_tag(frame: bytes, tag: int) -> bytes:
    """Put an out-of-band VLAN tag (``struct event``) into the frame."""
    if not tag:
        return frame
    return b"".join((frame[:12], (tag >> 16).to_bytes(2, "little"), pack("!H", tag & 0xFFFF), frame[12:]))


def complete(frame: bytes, tag: int = 0, gso_size: int = 0, wire_len: int = 0) -> list[bytes]:
    """The frame as the wire would have carried it, one for each segment; empty when too much of it is missing."""
    shape = parse(frame)
    cut = len(frame) < wire_len
    if shape is None:
        return [] if cut or gso_size else [add_tag(frame, tag)]
    if gso_size and shape.sums:
        return [add_tag(piece, tag) for piece in _segment(frame, shape, gso_size, cut)]
    if cut or len(frame) < shape.end:
        return []
    whole = bytearray(frame)
    fill_checksums(whole, shape)
    return [add_tag(bytes(whole), tag)]


def fill_checksums(frame: bytearray, shape: Shape) -> None:
    """Compute the checksums of the IPv4 header and of TCP or UDP, in place."""
    if shape.version == 4:
        header = shape.network + 10
        frame[header : header + 2] = bytes(2)
        ihl = (frame[shape.network] & 15) * 4
        pack_into("!H", frame, header, checksum(frame[shape.network : shape.network + ihl]))
    if not shape.sums:
        return
    at = shape.transport + (16 if shape.protocol == TCP else 6)
    if shape.protocol == UDP and shape.version == 4 and not any(frame[at : at + 2]):
        return  # RFC 768: its sender made none
    frame[at : at + 2] = bytes(2)
    size = shape.end - shape.transport
    first, stop = (12, 20) if shape.version == 4 else (8, 40)
    addresses = bytes(frame[shape.network + first : shape.network + stop])
    total = checksum(addresses + pack("!II", size, shape.protocol) + frame[shape.transport : shape.end])
    pack_into("!H", frame, at, total or (0xFFFF if shape.protocol == UDP else 0))


def checksum(data: bytes | bytearray) -> int:
    """RFC 1071. The sum of 16-bit words with end-around carry is the number modulo 65535."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    return (0xFFFF - int.from_bytes(data, "big") % 0xFFFF) % 0xFFFF


def make_reset(key: bytes, macs: bytes, to_guest: bool, seq: int, ack: int) -> bytes:
    """A TCP reset of a flow (``struct key``), as if from its other end. ``macs``: as in ``struct flow``."""
    _, vlan, local_port, remote_port, _, version, _, local, remote = KEY.unpack(key)
    source, target = (remote, local) if to_guest else (local, remote)
    ports = (remote_port, local_port) if to_guest else (local_port, remote_port)
    ethernet = bytearray(macs[6:] + macs[:6] if to_guest else macs)
    if vlan >> 12:
        ethernet += pack("!HH", 0x88A8, vlan >> 12)
    if vlan:
        ethernet += pack("!HH", 0x8100, vlan & 0xFFF)
    if version == 4:
        network = pack("!HBBHHHBBH", 0x0800, 0x45, 0, 40, 0, 0x4000, 64, TCP, 0) + source[:4] + target[:4]
    else:
        network = pack("!HIHBB", 0x86DD, 6 << 28, 20, TCP, 64) + source + target
    transport = _TCP.pack(*ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, RST | ACK, 0, 0, 0)
    at = len(ethernet) + len(network)
    frame = ethernet + network + transport
    fill_checksums(frame, Shape(len(ethernet) + 2, at, at + 20, at + 20, version, TCP, True))
    return bytes(frame)


def answer_syn(frame: bytes) -> int | None:
    """The acknowledgement that a SYN expects; None when the frame is no first SYN."""
    shape = parse(frame)
    if shape is None or shape.protocol != TCP or not shape.sums:
        return None
    _, _, seq, _, _, flags, *_ = _TCP.unpack_from(frame, shape.transport)
    if flags & (SYN | ACK) != SYN:
        return None
    return int(seq + 1 + shape.end - shape.payload) & 0xFFFFFFFF


def expected_by(frame: bytes) -> int | None:
    """The sequence number that the sender of a TCP segment expects next; None when it does not say, or resets."""
    shape = parse(frame)
    if shape is None or shape.protocol != TCP or not shape.sums:
        return None
    _, _, _, ack, _, flags, *_ = _TCP.unpack_from(frame, shape.transport)
    return int(ack) if flags & (ACK | RST) == ACK else None


def _parse(frame: bytes) -> Shape | None:
    at = 12
    kind = int.from_bytes(frame[at : at + 2], "big")
    for _ in range(2):
        if kind in _VLANS:
            at += 4
            kind = int.from_bytes(frame[at : at + 2], "big")
    network = at + 2
    if kind == 0x0800:
        found = _parse_ipv4(frame, network)
    elif kind == 0x86DD:
        found = _parse_ipv6(frame, network)
    else:
        return None
    version, protocol, transport, end, sums = found
    if protocol not in {TCP, UDP} or not network + 20 <= transport <= min(end, len(frame)):
        return None
    if not sums:
        return Shape(network, transport, transport, end, version, protocol, False)
    header = 8 if protocol == UDP else (frame[transport + 12] >> 4) * 4
    payload = transport + header
    if header < (8 if protocol == UDP else _TCP.size) or payload > min(end, len(frame)):
        return None  # what looks like its header may be what follows the packet in its frame
    if protocol == UDP and (length := int.from_bytes(frame[transport + 4 : transport + 6], "big")) >= header:
        end = min(end, transport + length)
    return Shape(network, transport, payload, end, version, protocol, True)


def _parse_ipv4(frame: bytes, network: int) -> tuple[int, int, int, int, bool]:
    fragment = int.from_bytes(frame[network + 6 : network + 8], "big") & 0x3FFF
    size = int.from_bytes(frame[network + 2 : network + 4], "big") or len(frame) - network  # 0: BIG TCP
    return 4, frame[network + 9], network + (frame[network] & 15) * 4, network + size, not fragment


def _parse_ipv6(frame: bytes, network: int) -> tuple[int, int, int, int, bool]:
    size = int.from_bytes(frame[network + 4 : network + 6], "big")
    end = network + 40 + size if size else len(frame)
    protocol, at, sums = frame[network + 6], network + 40, True
    for _ in range(8):
        if protocol not in _EXTENSIONS:
            return 6, protocol, at, end, sums
        length = frame[at + 1]
        if protocol == 44:
            sums = sums and not int.from_bytes(frame[at + 2 : at + 4], "big") & 0xFFF9
            step = 8
        else:
            step = (length + 2) * 4 if protocol == 51 else (length + 1) * 8
            sums = sums and (protocol != _ROUTING or not frame[at + 3])  # the sum is over its last target
        protocol, at = frame[at], at + step
    raise ValueError("a longer chain than the kernel program follows")


def _segment(frame: bytes, shape: Shape, gso_size: int, cut: bool) -> list[bytes]:
    """Segments of a super-packet, as TCP or UDP segmentation offload makes them (net/ipv4/tcp_offload.c)."""
    end = len(frame) if cut else shape.end
    heads, payload = frame[: shape.payload], frame[shape.payload : end]
    pieces = [payload[at : at + gso_size] for at in range(0, len(payload), gso_size)] or [b""]
    if cut and len(pieces[-1]) < gso_size and shape.protocol == UDP:
        pieces.pop()  # half a datagram is none
    cut = cut or len(pieces) > MAX_PIECES  # the guest chose the size; TCP repeats the rest
    made = []
    for index, piece in enumerate(pieces[:MAX_PIECES]):
        whole = bytearray(heads + piece)
        stop = len(whole)
        size = stop - shape.network
        if shape.version == 4:
            (ident,) = unpack_from("!H", whole, shape.network + 4)
            pack_into("!HH", whole, shape.network + 2, size, (ident + index) & 0xFFFF)
        else:
            pack_into("!H", whole, shape.network + 4, size - 40)
        if shape.protocol == UDP:
            pack_into("!H", whole, shape.transport + 4, stop - shape.transport)
        else:
            _set_segment(whole, shape.transport, index * gso_size, index == 0, not cut and index == len(pieces) - 1)
        fill_checksums(
            whole, Shape(shape.network, shape.transport, shape.payload, stop, shape.version, shape.protocol, True)
        )
        made.append(bytes(whole))
    return made


def _set_segment(frame: bytearray, transport: int, offset: int, first: bool, last: bool) -> None:
    (seq,) = unpack_from("!I", frame, transport + 4)
    pack_into("!I", frame, transport + 4, (seq + offset) & 0xFFFFFFFF)
    if not last:
        frame[transport + 13] &= ~(FIN | PSH) & 0xFF
    if not first:
        frame[transport + 13] &= ~CWR & 0xFF
