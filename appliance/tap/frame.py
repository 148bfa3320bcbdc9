"""A captured frame, as every source of this room delivers it."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

SNAP: Final = 2304  # Ethernet with two tags, IP and TCP with all options, and 2,048 bytes of payload

_PORTS_V4 = Struct(">BxH").unpack_from


@dataclass(slots=True)
class CapturedFrame:
    """One link-layer frame (``appliance.ports.Frame``)."""

    at_ns: int
    from_guest: bool
    data: bytes
    wire_len: int
    segments: int = 1
    vlan: int | None = None


def count_segments(data: bytes, wire_len: int, gso_size: int, *, udp: bool) -> int:
    """How many wire packets a GSO super-packet stands for; ``gso_size`` is the payload of each (``skb_shinfo``)."""
    if gso_size <= 0 or len(data) < 34:
        return 1
    kind = data[12] << 8 | data[13]
    at = 18 if kind in {0x8100, 0x88A8} else 14
    transport = at + ((data[at] & 15) << 2 if data[at] >> 4 == 4 else 40)
    if udp:
        header = transport + 8
    else:
        header = transport + (data[transport + 12] >> 4 << 2 if len(data) > transport + 12 else 20)
    return max(1, -(-(wire_len - header) // gso_size))
