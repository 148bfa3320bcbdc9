"""Two looks at a guest's sockets make flow events: what is new has started, what is gone has ended. No clock, no I/O.

What it cannot tell: connections that live shorter than the time between two looks, unless they leave a TIME_WAIT
behind; UDP that is not connected; packets, bytes, first payloads. Loopback connections do not leave the guest and are
none of its flows. Direction: what goes to a local port that somebody listens on came in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from appliance.model import (
    Direction,
    Endpoint,
    FiveTuple,
    Flag,
    Flow,
    FlowCounts,
    FlowEnd,
    FlowEnded,
    FlowEvent,
    FlowId,
    FlowStarted,
    Gap,
    GuestId,
    GuestSocket,
    IpAddress,
    Snapshot,
    Transport,
)
from appliance.tap.ladder import CommunityId

MAX_FLOWS: Final = 65536
_NUMBERS: Final = {Transport.TCP: 6, Transport.UDP: 17}  # IANA protocol numbers
_OVER: Final = "TIME_WAIT"
_BEGINNING: Final = "SYN_RECV"  # another structure of the kernel's, which the accepted connection replaces
# Gaps, by how ``Gap.what`` begins, that cost owners, processes or ports, never a connection. All others may.
_HARMLESS: Final = (
    "owner of", "descriptor table", "process", "hidden process", "thread", "memory map", "loader", "packet sockets",
    "raw sockets", "icmp sockets", "layout of", "pools", "port pools", "tcp port", "udp port", "connection tables",
    "IPv6",
)  # fmt: skip


class _Server(NamedTuple):
    """Where somebody listens, or waits for datagrams; ``ip`` is None for every address."""

    netns: int
    protocol: Transport
    ip: IpAddress | None
    port: int


class _Key(NamedTuple):
    """What names a connection inside one guest: two containers may have the same tuple."""

    netns: int
    tuple: FiveTuple


@dataclass(slots=True)
class _Known:
    """One flow that has been told and has not ended."""

    id: FlowId
    address: int  # of the kernel's structure; 0: not settled yet
    gaps: frozenset[Gap]  # of the look that saw it last: what that look lacked did not hide this flow
    missed: int = 0  # looks in a row without it


class Connections:
    """The connections of one guest as its looks tell them. ``partial``: the last look may have missed some."""

    def __init__(self, vm: GuestId, community_id: CommunityId, max_flows: int = MAX_FLOWS) -> None:
        self.told = self.evicted = 0
        self.partial = False
        self._vm, self._community_id, self._max_flows = vm, community_id, max_flows
        self._flows: OrderedDict[_Key, _Known] = OrderedDict()  # the least recently seen first
        self._over: dict[_Key, None] = {}  # in TIME_WAIT at the last look
        self._servers: set[_Server] = set()  # at the last look
        self._seen_all = False  # by the last look: what is new now has begun since
        self._same_kernel = True
        self._events: list[FlowEvent] = []

    def start_afresh(self) -> None:
        """The next look may be at another kernel: what it does not have went with the old one."""
        self._seen_all = self._same_kernel = False

    def miss_look(self) -> None:
        """A look failed: what is new in the next one may have begun before."""
        self._seen_all = False

    def compare(self, snapshot: Snapshot, at_ns: int) -> list[FlowEvent]:
        """Take one full look; return what has changed since the last one, in order."""
        gaps = frozenset(gap for gap in snapshot.gaps if not gap.what.startswith(_HARMLESS))
        servers = {server for socket in snapshot.sockets if (server := _server(socket)) is not None}
        known = servers | self._servers  # who accepted a connection may listen no more
        living, over = _sort(snapshot.sockets)
        self._go_on(living, gaps, at_ns)
        self._end_missing(living.keys() | over.keys(), gaps, at_ns, torn=snapshot.torn > 0)
        for key, socket in living.items():
            if key not in self._flows:
                self._begin(key, _address(socket), gaps, known, at_ns)
        for key in over:
            if key not in self._flows and key not in self._over and self._seen_all:
                self._begin(key, 0, gaps, known, at_ns)  # it lived between two looks
            self._end(key, FlowEnd.FIN, at_ns)
        self._over, self._servers = over, servers
        self.partial = bool(gaps)
        self._seen_all, self._same_kernel = not gaps, self._same_kernel or not gaps
        events, self._events = self._events, []
        return events

    def end_all(self, reason: FlowEnd, at_ns: int) -> list[FlowEvent]:
        """End every flow still open."""
        for key in list(self._flows):
            self._end(key, reason, at_ns)
        events, self._events = self._events, []
        return events

    def _go_on(self, living: dict[_Key, GuestSocket], gaps: frozenset[Gap], at_ns: int) -> None:
        """Note the flows that are still there; end those whose tuple belongs to another connection now."""
        for key, socket in living.items():
            known = self._flows.get(key)
            if known is None:
                continue
            address = _address(socket)
            if known.address and address and known.address != address:
                self._end(key, FlowEnd.FIN, at_ns)
                continue
            known.address, known.gaps, known.missed = address or known.address, gaps, 0
            self._flows.move_to_end(key)

    def _end_missing(self, seen: Collection[_Key], gaps: frozenset[Gap], at_ns: int, *, torn: bool) -> None:
        """End the flows that are gone. What a look may have missed is not gone."""
        for key, known in list(self._flows.items()):
            if key in seen or gaps - known.gaps:
                continue
            known.missed += 1
            if known.missed > torn:  # a connection that changes while it is read is left out of that look
                reason = FlowEnd.IDLE if key.tuple.protocol is Transport.UDP else FlowEnd.FIN
                self._end(key, reason if self._same_kernel else FlowEnd.GUEST_GONE, at_ns)

    def _begin(self, key: _Key, address: int, gaps: frozenset[Gap], servers: Collection[_Server], at_ns: int) -> None:
        if len(self._flows) >= self._max_flows:
            self.evicted += 1
            self._end(next(iter(self._flows)), FlowEnd.EVICTED, at_ns)
        self.told += 1
        protocol, local, remote = key.tuple.protocol, key.tuple.local, key.tuple.remote
        number = _NUMBERS[protocol]
        came_in = any(_Server(key.netns, protocol, ip, local.port) in servers for ip in (None, local.ip))
        flow = Flow(
            FlowId(self._vm, self.told),
            key.tuple,
            Direction.IN if came_in else Direction.OUT,
            at_ns,
            ip_protocol=number,
            midstream=not self._seen_all,
            community_id=self._community_id(number, local.ip.packed, remote.ip.packed, local.port, remote.port),
        )
        self._flows[key] = _Known(flow.id, address, gaps)
        self._events.append(FlowStarted(flow, at_ns))

    def _end(self, key: _Key, reason: FlowEnd, at_ns: int) -> None:
        """Tell the end of a flow, if it was told."""
        if (known := self._flows.pop(key, None)) is not None:
            self._events.append(FlowEnded(known.id, reason, FlowCounts(), at_ns))


def _sort(sockets: Iterable[GuestSocket]) -> tuple[dict[_Key, GuestSocket], dict[_Key, None]]:
    """The connections that live, and what is left of those that are over."""
    living: dict[_Key, GuestSocket] = {}
    over: dict[_Key, None] = {}
    for socket in sockets:
        if socket.remote is None or socket.protocol not in _NUMBERS or Flag.STALE in socket.flags:
            continue
        ends = FiveTuple(socket.protocol, _on_the_wire(socket.local), _on_the_wire(socket.remote))
        if ends.remote.ip.is_loopback:
            continue
        if socket.state == _OVER:
            over[_Key(socket.netns, ends)] = None
        else:
            living[_Key(socket.netns, ends)] = socket
    return living, {key: None for key in over if key not in living}


def _server(socket: GuestSocket) -> _Server | None:
    """A listener, or a UDP socket that takes datagrams from anybody."""
    if socket.remote is not None or socket.protocol not in _NUMBERS or not socket.local.port:
        return None
    if socket.protocol is Transport.TCP and socket.state not in {"LISTEN", "UNKNOWN"}:  # bound only
        return None
    end = _on_the_wire(socket.local)
    return _Server(socket.netns, socket.protocol, None if end.ip.is_unspecified else end.ip, end.port)


def _address(socket: GuestSocket) -> int:
    """Which structure this connection is; 0 where that says nothing: it will change, or several share the tuple."""
    return 0 if socket.protocol is not Transport.TCP or socket.state == _BEGINNING else socket.address


def _on_the_wire(end: Endpoint) -> Endpoint:
    """A v4-mapped socket's packets are IPv4."""
    mapped = end.ip.ipv4_mapped if end.ip.version == 6 else None
    return Endpoint(mapped, end.port) if mapped else end
