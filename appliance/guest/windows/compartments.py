"""From tcpip's symbols to port pools: every compartment has one for TCP and one for UDP.

``TcpPortPool`` and ``UdpPortPool`` point to the pools directly (until Windows 10 1511); later ``TcpCompartmentSet`` and
``UdpCompartmentSet`` point to a set of compartments. A set names its first compartment at a known place; whatever else
in it points to a compartment, by its pool tag InCo, is one too.
Sources: tcpip.pdb; volatility3 netscan-* (_INET_COMPARTMENT_SET, _INET_COMPARTMENT, _PROTOCOL_COMPARTMENT); pool tags:
MemProcFS vmm/vmmnet.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.addresses import tag_of
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import COMPARTMENT_TAGS, Layout
from appliance.model import Gap, Transport

SET_SIZE: Final = 0x180  # of _INET_COMPARTMENT_SET
MAX_COMPARTMENTS: Final = 64
SYMBOLS: Final = {
    Transport.TCP: ("TcpPortPool", "TcpCompartmentSet"),
    Transport.UDP: ("UdpPortPool", "UdpCompartmentSet"),
}


class Pool(NamedTuple):
    """One port pool. Compartments are counted from 1, in the order in which they are found."""

    transport: Transport
    compartment: int
    va: int


class Compartments:
    """Finds the port pools of one guest."""

    def __init__(self, kernel: WindowsKernel, symbol: Callable[[str], int | None], layout: Layout) -> None:
        """``symbol`` gives the address of a symbol of tcpip.sys."""
        self._kernel, self._symbol, self._layout = kernel, symbol, layout
        self._one = struct.Struct("<Q" if layout.pointer == 8 else "<I")
        self._header = 2 * layout.pointer

    def find(self) -> tuple[list[Pool], list[Gap]]:
        """All port pools there are, and what could not be followed."""
        pools: list[Pool] = []
        gaps: list[Gap] = []
        for transport, (direct, through) in SYMBOLS.items():
            found: list[int] = []
            at = self._symbol(direct)
            if at is not None:
                found = self._chase([at])
            elif (at := self._symbol(through)) is not None:
                found = self._of_set(self._chase([at]))
            if not found:
                gaps.append(Gap(f"{transport} port pool", at or 0, "cannot be found: what is bound is not told"))
            pools += [Pool(transport, number, va) for number, va in enumerate(dict.fromkeys(found), 1)]
        return pools, gaps

    def _of_set(self, sets: list[int]) -> list[int]:
        """The pools of all compartments of a set."""
        where = self._layout.compartments
        pools: list[int] = []
        for va in sets:
            try:
                raw = self._kernel.space.read(va, SET_SIZE)
            except UnreadableMemory:
                continue
            first = self._one.unpack_from(raw, where.compartment)[0]
            others = [each for (each,) in self._one.iter_unpack(raw) if each != first and self._is_object(each)]
            tagged = self._kernel.space.readv([(each - self._header, self._header) for each in others])
            compartments = [first] * self._is_object(first) + [
                each for each, tag in zip(others, tagged, strict=True) if tag and tag_of(tag) in COMPARTMENT_TAGS
            ]
            compartments = list(dict.fromkeys(compartments))[:MAX_COMPARTMENTS]
            protocols = self._chase([each + where.protocol for each in compartments])
            pools += self._chase([each + where.pool for each in protocols])
        return pools

    def _chase(self, places: list[int]) -> list[int]:
        """The objects that these places point to."""
        raws = self._kernel.space.readv([(place, self._layout.pointer) for place in places]) if places else []
        found = [self._one.unpack(raw)[0] for raw in raws if raw is not None]
        return [va for va in found if self._is_object(va)]

    def _is_object(self, va: int) -> bool:
        return not va % self._layout.pointer and self._kernel.is_kernel(va)
