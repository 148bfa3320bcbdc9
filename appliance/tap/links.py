"""Link layers of capture files made into Ethernet, so that the rest knows one only.

What a link layer does not tell is zero. Sources: tcpdump.org/linktypes.html, LINKTYPE_LINUX_SLL and _SLL2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

NO_MAC: Final = bytes(6)
GROUP_MAC: Final = b"\x01\0\0\0\0\0"  # to many; which ones is not known

_Convert = Callable[[bytes], tuple[bytes, int]]


def to_ethernet(link_type: int, data: bytes) -> tuple[bytes, int] | None:
    """The frame with an Ethernet header, and by how many bytes that made it longer; None for other link layers."""
    convert = _LINKS.get(link_type)
    return None if convert is None else convert(data)


def _ethernet(data: bytes) -> tuple[bytes, int]:
    return data, 0


def _raw_ip(data: bytes) -> tuple[bytes, int]:
    kind = b"\x86\xdd" if data[:1] and data[0] >> 4 == 6 else b"\x08\0"
    return NO_MAC + NO_MAC + kind + data, 14


def _null(data: bytes) -> tuple[bytes, int]:
    """BSD loopback: four bytes of address family, whose numbers differ by system; the IP version is the same on all."""
    return _raw_ip(data[4:])[0], 10


def _cooked(data: bytes) -> tuple[bytes, int]:
    """LINUX_SLL: packet type, ARPHRD, address length, address (8), protocol."""
    if len(data) < 16:
        return b"", 0
    return _target(data[1]) + _source(data[4:6], data[6:12]) + data[14:], -2


def _cooked2(data: bytes) -> tuple[bytes, int]:
    """LINUX_SLL2: protocol, reserved, interface index, ARPHRD, packet type, address length, address (8)."""
    if len(data) < 20:
        return b"", 0
    return _target(data[10]) + _source(b"\0" + data[11:12], data[12:18]) + data[:2] + data[20:], -6


def _target(packet_type: int) -> bytes:
    return GROUP_MAC if packet_type in {1, 2} else NO_MAC  # PACKET_BROADCAST, PACKET_MULTICAST


def _source(length: bytes, address: bytes) -> bytes:
    return address if length == b"\0\x06" else NO_MAC


_LINKS: Final[dict[int, _Convert]] = {
    0: _null, 108: _null, 1: _ethernet, 12: _raw_ip, 14: _raw_ip, 101: _raw_ip, 228: _raw_ip, 229: _raw_ip,
    113: _cooked, 276: _cooked2,
}  # fmt: skip
