"""ICMP as the flow table needs it: questions, answers, errors that quote a flow, and the network's own control talk.

Sources: RFC 792, 950, 1256 (IPv4); RFC 4443, 4861, 3810, 4286 (IPv6); iana.org/assignments/icmp-parameters.
"""

from __future__ import annotations

from typing import Final

from appliance.flow.decode import ICMPV6, Decoded, decode_ip

ERROR: Final = "icmp-error"
_ERRORS_V4: Final = frozenset({3, 4, 5, 11, 12})
_ERRORS_V6: Final = frozenset({1, 2, 3, 4})
_CONTROL_V4: Final = {9: "router-discovery", 10: "router-discovery"}
_CONTROL_V6: Final = {
    **dict.fromkeys((130, 131, 132, 143), "mld"),
    **dict.fromkeys((133, 134, 135, 136, 137, 141, 142, 148, 149), "nd"),
    **dict.fromkeys((151, 152, 153), "router-discovery"),
}
# IPv4 and IPv6 type numbers that matter here do not collide: one set serves both.
REPLIES: Final = frozenset({0, 14, 16, 18, 129, 140, 145})


def control_reason(packet: Decoded) -> str | None:
    """Why this message is no flow: ``ERROR`` when it quotes one, a kind of control talk, or None."""
    if packet.protocol == ICMPV6:
        return ERROR if packet.icmp_type in _ERRORS_V6 else _CONTROL_V6.get(packet.icmp_type)
    return ERROR if packet.icmp_type in _ERRORS_V4 else _CONTROL_V4.get(packet.icmp_type)


def read_quoted(data: bytes, packet: Decoded) -> Decoded | None:
    """The packet that an error message quotes; None when too little of it is there."""
    quoted = decode_ip(data[packet.payload_at :], 0)
    return None if isinstance(quoted, str) or not quoted.first else quoted
