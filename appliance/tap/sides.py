"""Which packets of a capture the guest sent: a file has no port side, so addresses must tell.

Told: MAC or IP addresses of the guest. Not told: per IP version, the address that talks with the most others, a
private one first, then the one that speaks first. A conversation without that address is placed by the same rule.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

MAX_ADDRESSES: Final = 4096
MAX_PEERS: Final = 256
MAX_PAIRS: Final = 65536

Pair = tuple[bytes, bytes]  # source and destination, packed IP addresses


class Sides:
    """Decides for each frame: sent by the guest (True), to it (False), or neither (None)."""

    def __init__(self, local: Iterable[str] | None, pairs: Iterable[Pair] = ()) -> None:
        self._told = local is not None
        self._macs: set[bytes] = set()
        self._ips: set[bytes] = set()
        self._pairs: OrderedDict[Pair, bool] = OrderedDict()
        for text in local or ():
            self._add(text)
        if not self._told:
            self._ips = guess_locals(pairs)

    @property
    def by_ip(self) -> bool:
        """The link-layer addresses say nothing about the guest."""
        return not self._macs

    @property
    def addresses(self) -> tuple[str, ...]:
        """The guest's IP addresses, as told or guessed."""
        return tuple(sorted(str(ip_address(packed)) for packed in self._ips))

    def is_from_guest(self, data: bytes) -> bool | None:
        """Who sent this Ethernet frame."""
        if self._macs and (found := self._by_mac(data)) is not None:
            return found
        pair = read_pair(data)
        if pair is None:
            return False
        here, there = pair[0] in self._ips, pair[1] in self._ips
        if here or there:
            return here
        if self._told:
            return False if data[0] & 1 else None
        return self._by_pair(pair)

    def _by_mac(self, data: bytes) -> bool | None:
        if data[6:12] in self._macs:
            return True
        return False if data[:6] in self._macs or data[0] & 1 else None

    def _by_pair(self, pair: Pair) -> bool:
        """A conversation in which the guest's address has no part: remember which side we called the guest."""
        known = self._pairs.get(pair)
        if known is None:
            known = not _is_private(pair[1]) or _is_private(pair[0])
            self._pairs[pair] = known
            self._pairs[pair[1], pair[0]] = not known
            while len(self._pairs) > MAX_PAIRS:
                self._pairs.popitem(last=False)
        return known

    def _add(self, text: str) -> None:
        try:
            self._ips.add(ip_address(text).packed)
        except ValueError:
            self._macs.add(bytes.fromhex(text.replace(":", "").replace("-", "")))


def guess_locals(pairs: Iterable[Pair]) -> set[bytes]:
    """The most talkative address of each IP version."""
    peers: defaultdict[bytes, set[bytes]] = defaultdict(set)
    order: dict[bytes, int] = {}
    for src, dst in pairs:
        for address, peer in ((src, dst), (dst, src)):
            if _is_unicast(address) and (address in peers or len(peers) < MAX_ADDRESSES):
                order.setdefault(address, len(order))
                if len(peers[address]) < MAX_PEERS:
                    peers[address].add(peer)
    found = set()
    for size in (4, 16):
        candidates = [address for address in peers if len(address) == size]
        if candidates:
            found.add(max(candidates, key=lambda a: (len(peers[a]), _is_private(a), -order[a])))
    return found


def read_pair(data: bytes) -> Pair | None:
    """Source and destination of an IP packet behind at most two VLAN tags."""
    at = 12
    for _ in range(3):
        kind = data[at : at + 2]
        if kind == b"\x08\0":
            return (data[at + 14 : at + 18], data[at + 18 : at + 22]) if len(data) >= at + 22 else None
        if kind == b"\x86\xdd":
            return (data[at + 10 : at + 26], data[at + 26 : at + 42]) if len(data) >= at + 42 else None
        if kind not in {b"\x81\0", b"\x88\xa8", b"\x91\0"}:
            return None
        at += 4
    return None


def _is_private(packed: bytes) -> bool:
    """RFC 1918, RFC 4193, loopback and link-local; not what else ``ipaddress`` calls private (documentation nets)."""
    if len(packed) == 4:
        first, second = packed[0], packed[1]
        return first in {10, 127} or packed[:2] in {b"\xc0\xa8", b"\xa9\xfe"} or (first == 172 and second & 0xF0 == 16)
    return packed[0] & 0xFE == 0xFC or (packed[0] == 0xFE and packed[1] & 0xC0 == 0x80) or packed == bytes(15) + b"\1"


def _is_unicast(packed: bytes) -> bool:
    address = ip_address(packed)
    return not (address.is_multicast or address.is_unspecified or packed == b"\xff\xff\xff\xff")
