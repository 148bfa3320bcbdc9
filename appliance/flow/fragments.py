"""Which flow a later IP fragment belongs to: only the first one has ports.

Sources: RFC 791, section 3.2; RFC 8200, section 4.5.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from appliance.flow.decode import Decoded
from appliance.flow.records import SECOND_NS, Key

MAX_DATAGRAMS: Final = 4096
TIMEOUT_NS: Final = 30 * SECOND_NS  # net.ipv4.ipfrag_time

_Datagram = tuple[int | None, bytes, bytes, int, int]


class Fragments:
    """A bounded map of the datagrams whose first fragment was seen; the oldest one is forgotten first."""

    def __init__(self, limit: int = MAX_DATAGRAMS) -> None:
        self._limit = limit
        self._keys: OrderedDict[_Datagram, tuple[Key, int]] = OrderedDict()

    def note(self, packet: Decoded, key: Key, at_ns: int) -> None:
        """Remember the flow of a first fragment."""
        self._keys[_datagram(packet)] = key, at_ns
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def find(self, packet: Decoded, at_ns: int) -> Key | None:
        """The flow of a later fragment, when its first one was seen lately."""
        key, noted_ns = self._keys.get(_datagram(packet), (None, 0))
        return key if at_ns - noted_ns <= TIMEOUT_NS else None


def _datagram(packet: Decoded) -> _Datagram:
    return packet.vlan, packet.src, packet.dst, packet.protocol, packet.fragment or 0
