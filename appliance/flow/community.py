"""Community ID v1: the same short text for one connection in every tool (Zeek, Suricata, Wireshark).

Source: github.com/corelight/community-id-spec; the ICMP message pairs are those of Zeek's analyzer. Written out here
because a flow is made in a few microseconds; the tests compare it with the PyPI package ``communityid``.
"""

from __future__ import annotations

from binascii import b2a_base64
from hashlib import sha1
from struct import Struct
from typing import Final

from appliance.flow.decode import ICMP, ICMPV6, PORTED

_PAIRS_V4: Final = {8: 0, 0: 8, 13: 14, 14: 13, 15: 16, 16: 15, 10: 9, 9: 10, 17: 18, 18: 17}
_PAIRS_V6: Final = {
    128: 129, 129: 128, 133: 134, 134: 133, 135: 136, 136: 135, 130: 131, 131: 130, 144: 145, 145: 144, 139: 140,
    140: 139,
}  # fmt: skip
_HEAD: Final = b"\0\0"  # the seed, network order
_TAIL = Struct(">BBHH").pack
_BARE = Struct(">BB").pack


def community_id(protocol: int, src: bytes, dst: bytes, src_port: int, dst_port: int) -> str:
    """Compute it from packed addresses; for ICMP the "ports" are type and code of the first message."""
    one_way = False
    if protocol in {ICMP, ICMPV6}:
        other = (_PAIRS_V4 if protocol == ICMP else _PAIRS_V6).get(src_port)
        one_way = other is None
        dst_port = dst_port if other is None else other
    elif protocol not in PORTED or protocol in {33, 136}:  # the specification has ports for TCP, UDP and SCTP only
        first, second = (src, dst) if src < dst else (dst, src)
        return _text(_HEAD + first + second + _BARE(protocol, 0))
    if one_way or src < dst or (src == dst and src_port < dst_port):
        return _text(_HEAD + src + dst + _TAIL(protocol, 0, src_port, dst_port))
    return _text(_HEAD + dst + src + _TAIL(protocol, 0, dst_port, src_port))


def _text(ordered: bytes) -> str:
    return "1:" + b2a_base64(sha1(ordered, usedforsecurity=False).digest(), newline=False).decode()
