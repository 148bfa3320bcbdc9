"""What the eye asks of a guest's network, whatever its era; and which era it is, by looking.

Since Vista tcpip.sys has a PartitionTable (modern.py); before, a table of TCBs and one of address objects (xp.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.crossview import Placed
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.modern import Modern
from appliance.guest.windows.pools import XP_ADDRESS_TAG, XP_CONNECTION_TAG, PoolHeader
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp import XpNetwork
from appliance.model import NO_NETWORK, Finding, Flow, Gap, GuestSocket, Match, Reason

OLD = 5  # NtMajorVersion of Windows XP and Server 2003


class Walk(Protocol):
    """What a full look found. ``torn`` counts what contradicted itself."""

    @property
    def sockets(self) -> Sequence[GuestSocket]:
        """With their owners; each at its own address."""
        ...

    @property
    def gaps(self) -> Sequence[Gap]:
        """What was not seen."""
        ...

    @property
    def torn(self) -> int:
        """How often something contradicted itself."""
        ...


class Network(Protocol):
    """Connections and sockets of one guest. All methods may raise GuestError."""

    tags: tuple[bytes, ...]  # of pool blocks in which one may lie that no table leads to

    def walk(self) -> Walk:
        """Read everything."""
        ...

    def find(self, flow: Flow) -> Finding:
        """Who owns a flow's tuple now."""
        ...

    def adopt(self, vas: Sequence[int]) -> bool:
        """Take note of hidden processes; whether `walk` would tell other owners with them."""
        ...

    def loose(self, blocks: Sequence[Placed]) -> Sequence[GuestSocket]:
        """What lies in pool blocks and in no table, flagged as what it is. Call after `walk`."""
        ...

    def nearby(self, seconds: float) -> Sequence[GuestSocket]:
        """What lives in no table, sought only around what is known. Call after `walk`."""
        ...

    def bare_ports(self) -> Sequence[GuestSocket]:
        """Ports that are taken although nothing takes them. Call after `walk`, and after `loose` where that is done."""
        ...


class Old:
    """Windows XP and Server 2003. A port is held by an address object there, and by nothing else."""

    tags: tuple[bytes, ...] = (XP_CONNECTION_TAG, XP_ADDRESS_TAG)

    def __init__(self, network: XpNetwork) -> None:
        self._network = network
        self.walk, self.find, self.loose, self.adopt = network.walk, network.find, network.unlinked, network.adopt

    def nearby(self, seconds: float) -> Sequence[GuestSocket]:
        """Closed connections are kept for later use there, which makes a quick answer a wrong one."""
        return ()

    def bare_ports(self) -> Sequence[GuestSocket]:
        """There is no bitmap of ports that could say otherwise."""
        return ()


class Unread:
    """A network that cannot be read, for want of tcpip.sys, its symbols or its layout; processes can be."""

    tags: tuple[bytes, ...] = ()
    sockets: Sequence[GuestSocket] = ()
    torn = 0

    def __init__(self, why: UnsupportedGuest) -> None:
        self.gaps: Sequence[Gap] = (Gap(NO_NETWORK, 0, "; ".join(why.missing)),)

    def walk(self) -> Walk:
        """Nothing but the gap."""
        return self

    def find(self, flow: Flow) -> Finding:
        """As for a guest whose memory is not read at all."""
        return Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)

    def adopt(self, vas: Sequence[int]) -> bool:
        """Nothing is owned."""
        return False

    def loose(self, blocks: Sequence[Placed]) -> Sequence[GuestSocket]:
        """Nothing is sought."""
        return ()

    def nearby(self, seconds: float) -> Sequence[GuestSocket]:
        """Nothing is sought."""
        return ()

    def bare_ports(self) -> Sequence[GuestSocket]:
        """Nothing is known to take a port."""
        return ()


def open_network(
    kernel: WindowsKernel,
    processes: Processes,
    header: PoolHeader,
    clock_ns: Callable[[], int],
    clock_s: Callable[[], float],
) -> Network:
    """The network of this guest's era; `Unread` where tcpip.sys or its symbols are missing. Raises GuestError."""
    try:
        try:
            return Modern(kernel, processes, header, clock_ns, clock_s)
        except UnsupportedGuest:
            if kernel.major != OLD:
                raise
        return Old(XpNetwork(kernel, processes))
    except UnsupportedGuest as error:
        return Unread(error)
