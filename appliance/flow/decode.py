"""Ethernet frames to what the flow table needs: any bytes give a ``Decoded`` or a named reason, never an exception.

Sources: IEEE 802.1Q (tags), RFC 791 and 815 (IPv4, fragments), RFC 8200 (IPv6 and its extension headers), RFC 2675
and ``include/linux/ipv6.h`` (BIG TCP: a length of 0 means "look at the frame"), RFC 9293 (TCP), RFC 768 (UDP),
RFC 792 and 4443 (ICMP), RFC 1858 (tiny fragments must not hide a flow). Checksums are never verified: offloading
leaves them partial at the tap.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

# IANA protocol numbers.
ICMP: Final = 1
IGMP: Final = 2
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58
PORTED: Final = frozenset({TCP, UDP, 33, 132, 136})  # DCCP, SCTP and UDP-Lite begin with two ports as well

# TCP flag bits (RFC 9293, section 3.1).
FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
ACK: Final = 0x10

ETHERTYPES: Final = {0x0806: "arp", 0x8035: "arp", 0x88CC: "lldp", 0x8863: "pppoe", 0x8864: "pppoe", 0x888E: "eapol"}
EXTENSIONS: Final = frozenset({0, 43, 44, 51, 60, 135, 139, 140})  # IPv6 headers that lead to another one
MAX_EXTENSIONS: Final = 12
TAGS: Final = frozenset({0x8100, 0x88A8, 0x9100})
MAX_TAGS: Final = 4

_TWO = Struct(">HH").unpack_from
_IPV4 = Struct(">BxHHHxB2x4s4s").unpack_from
_IPV6 = Struct(">4xHBx16s16s").unpack_from
_TCP = Struct(">HHIIBB").unpack_from
_FRAGMENT = Struct(">BxHI").unpack_from


class Decoded(NamedTuple):
    """One packet. Lengths are those of the wire; ``payload_at`` points into the bytes that were captured."""

    vlan: int | None  # outermost tag's VID; with QinQ ``outer << 12 | inner``
    protocol: int  # IANA number of the first header that is no extension
    src: bytes  # 4 or 16
    dst: bytes
    src_port: int
    dst_port: int
    ip_bytes: int  # IP packet, header included, padding excluded
    payload_at: int  # where the application's bytes begin
    payload_len: int  # how many the wire carried
    flags: int = 0  # TCP
    seq: int = 0
    ack: int = 0
    icmp_type: int = -1
    icmp_code: int = 0
    header_len: int = 0  # IP and transport headers: what each segment of a GSO packet repeats
    fragment: int | None = None  # identification, when this is one of several fragments
    first: bool = True  # False: a later fragment, which has no ports


def decode(data: bytes, wire_len: int, vlan: int | None = None) -> Decoded | str:
    """Decode one Ethernet frame; a string says why it is no IP packet that we can place."""
    if len(data) < 14:
        return "runt"
    kind, at = data[12] << 8 | data[13], 14
    if kind not in {0x0800, 0x86DD}:
        kind, at, vlan = _skip_tags(data, kind, at, vlan)
    if kind == 0x0800:
        return _ipv4(data, at, wire_len, vlan)
    if kind == 0x86DD:
        return _ipv6(data, at, wire_len, vlan)
    if kind < 0x0600:
        return "llc"
    if kind in TAGS:  # a receiver may still find IP behind more tags than we look for
        return "long-extension-chain"
    return ETHERTYPES.get(kind, "other-ethertype")


def decode_ip(data: bytes, at: int) -> Decoded | str:
    """Decode the IP packet that an ICMP error quotes at ``at``; it may be cut after 8 bytes of transport header."""
    version = data[at] >> 4 if len(data) > at else 0
    if version == 4:
        return _ipv4(data, at, len(data), None)
    return _ipv6(data, at, len(data), None) if version == 6 else "bad-ip-version"


def _skip_tags(data: bytes, kind: int, at: int, vlan: int | None) -> tuple[int, int, int | None]:
    """Step over 802.1Q and QinQ tags (0x8100, 0x88a8, 0x9100)."""
    for _ in range(MAX_TAGS):
        if kind not in TAGS or len(data) < at + 4:
            break
        tci, kind = _TWO(data, at)
        at += 4
        if vid := tci & 0xFFF:  # VID 0 is a priority tag: no VLAN (802.1Q, table 9-2)
            vlan = vid if vlan is None else (vlan & 0xFFF) << 12 | vid
    return kind, at, vlan


def _ipv4(data: bytes, at: int, wire_len: int, vlan: int | None) -> Decoded | str:
    if len(data) < at + 20:
        return "cut-ip"
    version_ihl, total, ident, frag, protocol, src, dst = _IPV4(data, at)
    header = (version_ihl & 15) << 2
    if version_ihl >> 4 != 4:
        return "bad-ip-version"
    room = wire_len - at
    size = total or room  # BIG TCP
    if header < 20 or size < header:
        return "bad-ip-length"
    size = min(size, room)
    fragment = ident if frag & 0x3FFF else None
    if fragment is not None and frag & 0x1FFF:
        return Decoded(vlan, protocol, src, dst, 0, 0, size, at + header, 0, fragment=fragment, first=False)
    return _transport(data, at, at + header, size, protocol, src, dst, vlan, fragment)


def _ipv6(data: bytes, at: int, wire_len: int, vlan: int | None) -> Decoded | str:
    if len(data) < at + 40:
        return "cut-ip"
    if data[at] >> 4 != 6:
        return "bad-ip-version"
    length, protocol, src, dst = _IPV6(data, at)
    room = wire_len - at
    size = min(40 + length, room) if length else room  # RFC 2675, BIG TCP
    here, fragment = at + 40, None
    for _ in range(MAX_EXTENSIONS):
        if protocol not in EXTENSIONS:
            return _transport(data, at, here, size, protocol, src, dst, vlan, fragment)
        if len(data) < here + 8:
            return "cut-ip"
        if protocol == 44:
            protocol, offset, ident = _FRAGMENT(data, here)
            here += 8
            if offset & 0xFFF9:  # RFC 6946: offset 0 without M is a whole packet
                fragment = ident
            if offset & 0xFFF8:
                return Decoded(vlan, protocol, src, dst, 0, 0, size, here, 0, fragment=ident, first=False)
        else:
            step = (data[here + 1] + 2) << 2 if protocol == 51 else (data[here + 1] + 1) << 3
            protocol, here = data[here], here + step
    return "long-extension-chain"


def _transport(
    data: bytes,
    ip_at: int,
    at: int,
    size: int,
    protocol: int,
    src: bytes,
    dst: bytes,
    vlan: int | None,
    fragment: int | None,
) -> Decoded | str:
    rest = ip_at + size - at  # what the wire carried behind the IP headers
    have = min(len(data) - at, rest)
    if protocol == TCP:
        if have >= 14:
            src_port, dst_port, seq, ack, offset, flags = _TCP(data, at)
            header = offset >> 4 << 2
            if header < 20 or (header > rest and fragment is None):
                return "bad-tcp"
            return Decoded(
                vlan, protocol, src, dst, src_port, dst_port, size, at + header, max(rest - header, 0),
                flags, seq, ack, -1, 0, at - ip_at + header, fragment,
            )  # fmt: skip
        header = 20
    elif protocol == UDP:
        if have >= 8:
            length = data[at + 4] << 8 | data[at + 5]
            if 0 < length < 8:
                return "bad-udp"
            src_port, dst_port = _TWO(data, at)
            carried = rest - 8 if length == 0 or fragment is not None else min(length, rest) - 8
            return Decoded(
                vlan, protocol, src, dst, src_port, dst_port, size, at + 8, carried,
                0, 0, 0, -1, 0, at - ip_at + 8, fragment,
            )  # fmt: skip
        header = 8
    elif protocol in {ICMP, ICMPV6}:
        if have < 8:
            return "cut-icmp"
        ident = data[at + 4] << 8 | data[at + 5]
        return Decoded(
            vlan, protocol, src, dst, ident, 0, size, at + 8, rest - 8,
            0, 0, 0, data[at], data[at + 1], at - ip_at + 8, fragment,
        )  # fmt: skip
    elif protocol in PORTED:
        header = 4
    else:
        return Decoded(vlan, protocol, src, dst, 0, 0, size, at, max(rest, 0), header_len=at - ip_at, fragment=fragment)
    if have < 4:
        return "cut-transport"
    src_port, dst_port = _TWO(data, at)
    return Decoded(
        vlan, protocol, src, dst, src_port, dst_port, size, at + header, max(rest - header, 0),
        header_len=at - ip_at + header, fragment=fragment,
    )  # fmt: skip
