"""From a packet's tuple to the process, on Windows since Vista.

Connections are found in a dictionary that `sockets` keeps up to date, and read again before anybody is named. The exact
connection first, then a listener; for UDP a connected socket, then one that is bound to the address, then one that is
bound to all of them. Three tries, then TORN; in doubt nobody, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from appliance.guest.windows.addresses import ANY, plain
from appliance.guest.windows.endpoints import Kind, RawSocket, key_of
from appliance.guest.windows.layouts import AF_INET6, SYN_RCVD
from appliance.guest.windows.processes import RawProcess
from appliance.guest.windows.sockets import Sockets
from appliance.model import Direction, Evidence, Finding, Flow, Match, Owner, Reason, Transport

TRIES: Final = 3
REREAD_REST_NS: Final = 20_000_000  # between two looks at all that is known because of a miss
WALK_REST_NS: Final = 500_000_000  # and at everything
REST_TIMES: Final = 10  # as long as the look took
MAX_TOLD: Final = 1 << 14
MAX_SHARED: Final = 64  # sockets of one port that are told together
# What the kernel sends unasked: IGMP, tunnels (IANA numbers).
KERNEL_PROTOCOLS: Final = frozenset({2, 4, 41, 47, 50, 51, 97, 115, 137})
# Replies, errors, redirects; and echo requests, which ping has the kernel send (IcmpSendEcho): who asked is not kept.
KERNEL_ICMP: Final = frozenset({0, 3, 5, 8, 11, 12, 14})
KERNEL_ICMPV6: Final = frozenset({1, 2, 3, 4, 128, 129, 131, 132, 133, 135, 136, 137, 143})
ICMP_NUMBERS: Final = frozenset({1, 58})


class _TornError(Exception):
    """What was read contradicts itself: start over."""


class _Rested:
    """A look that a miss asks for, and the rest after it: misses come as often as anybody likes."""

    def __init__(self, look: Callable[[], object], least_ns: int, clock_ns: Callable[[], int]) -> None:
        self._look, self._least_ns, self._clock_ns = look, least_ns, clock_ns
        self._until_ns = 0

    def __call__(self) -> bool:
        """Look; False: not yet."""
        began = self._clock_ns()
        if began < self._until_ns:
            return False
        self._look()
        ended = self._clock_ns()
        self._until_ns = ended + max(self._least_ns, REST_TIMES * (ended - began))
        return True


class Lookup:
    """Answers "who owns this tuple?" for one guest."""

    def __init__(self, sockets: Sockets, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._sockets = sockets
        # What was used again at once shows in no table's head; what lies elsewhere by now, in no other way than this.
        self._reread = _Rested(sockets.reread_connections, REREAD_REST_NS, clock_ns)
        self._walk = _Rested(sockets.walk, WALK_REST_NS, clock_ns)
        # What was told of a socket: told again while it and its owner are the same, until the next whole look.
        self._told: dict[bytes, tuple[Match, RawSocket, RawProcess | None, int, Finding]] = {}

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now. Raises GuestError."""
        torn = 0
        for _ in range(TRIES):
            try:
                finding = self._find(flow)
            except _TornError:
                torn += 1
                continue
            return replace(finding, torn=torn) if torn else finding
        return Finding(Match.NONE, reason=Reason.TORN, torn=torn)

    def _find(self, flow: Flow) -> Finding:
        match flow.tuple.protocol:
            case Transport.TCP:
                return self._tcp(flow)
            case Transport.UDP:
                return self._udp(flow)
            case _:
                return self._other(flow)

    # -- TCP --

    def _tcp(self, flow: Flow) -> Finding:
        local, remote = flow.tuple.local, flow.tuple.remote
        key = key_of(local.ip.packed, local.port, remote.ip.packed, remote.port)
        checked = self._connection(key)
        started_here = flow.direction is Direction.OUT and not flow.midstream
        if checked is None:
            return (None if started_here else self._of_listener(flow, None)) or self._nobody(flow)
        raw, owner = checked
        if raw.kind is Kind.TIME_WAIT:
            return Finding(Match.NONE, socket=self._sockets.build(raw, None), reason=Reason.TIME_WAIT, final=True)
        if owner is None and not raw.owner and raw.state == SYN_RCVD and not started_here:
            finding = self._of_listener(flow, raw)  # a handshake under way
            if finding is not None:
                return finding
        return self._owned([(raw, owner)], Match.EXACT)

    def _connection(self, key: bytes) -> tuple[RawSocket, RawProcess | None] | None:
        """A connection by its ends, read again; with what has changed in the tables if need be."""
        sockets = self._sockets
        for look in (None, self._refresh, self._reread, self._walk):
            if look is not None and not look():
                continue
            raw = sockets.connection(key)
            checked = sockets.check(raw) if raw is not None else None
            if checked is not None:
                return checked
            if raw is not None:
                sockets.doubt(raw)
        if raw is not None:
            raise _TornError
        return None

    def _refresh(self) -> bool:
        self._sockets.refresh_connections()
        return True

    def _of_listener(self, flow: Flow, raw: RawSocket | None) -> Finding | None:
        """The listener that an incoming connection goes to; None when there is none."""
        found = self._bound(flow)
        if not found:
            return None
        finding = self._owned(found, Match.LISTENER)
        if raw is not None and finding.owners:
            return replace(finding, socket=self._sockets.build(raw, None))
        return finding

    # -- UDP, and what is bound --

    def _udp(self, flow: Flow) -> Finding:
        found = self._bound(flow)
        if not found:
            return self._nobody(flow)
        return self._owned(found, Match.EXACT if found[0][0].remote is not None else Match.UNCONNECTED)

    def _bound(self, flow: Flow) -> list[tuple[RawSocket, RawProcess | None]]:
        """The best of what is bound to the flow's local port, read again; several when they are equally good."""
        sockets, transport, port = self._sockets, flow.tuple.protocol, flow.tuple.local.port
        for fresh in (False, True):
            if fresh:
                sockets.refresh_port(transport, port)
            best = _best(flow, sockets.bound(transport, port))
            if not best:
                continue
            checked = [sockets.check(raw) for raw in best[:MAX_SHARED]]
            if all(each is not None for each in checked):
                return [each for each in checked if each is not None]
            if fresh:
                raise _TornError
        return []

    # -- who --

    def _owned(self, checked: list[tuple[RawSocket, RawProcess | None]], match: Match) -> Finding:
        """The finding for these sockets, any of which it may be: everybody who owns one of them."""
        sockets = self._sockets
        first, process = checked[0]
        known = self._told.get(first.key) if len(checked) == 1 else None
        if known is not None and known[:3] == (match, first, process) and known[3] == sockets.looks:
            return known[4]
        if not sockets.is_trusted(first):
            if self._walk() and sockets.is_trusted(first):
                raise _TornError  # what was read before may have been read in the wrong places
            evidence = Evidence(
                "where this build of Windows keeps owners is not verified", "unverified-layout", first.va
            )
            return Finding(Match.NONE, socket=sockets.build(first, None), reason=Reason.ORPHAN, evidence=(evidence,))
        if any(raw.owner and owner is None for raw, owner in checked):
            raise _TornError  # its owner is no process
        built = sockets.build_all(checked)
        owners = _everybody(owner for socket in built for owner in socket.owners)
        if not owners:
            return Finding(Match.NONE, socket=built[0], reason=Reason.ORPHAN)
        socket = next(each for each in built if each.owners)
        ambiguous = len({owner.process.path for owner in owners}) > 1
        finding = Finding(match, owners, socket, Reason.AMBIGUOUS if ambiguous else None)
        if len(checked) == 1:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told[first.key] = match, first, process, sockets.looks, finding
        return finding

    def _nobody(self, flow: Flow) -> Finding:
        """No socket of this tuple. The reason stays open where only the flow's further life can tell."""
        closed = flow.direction is Direction.IN and not flow.midstream
        certain = closed and self._sockets.is_own(flow.tuple.local.ip.packed)
        return Finding(Match.NONE, reason=Reason.CLOSED if certain else None)

    def _other(self, flow: Flow) -> Finding:
        """ICMP and other protocols: told as the kernel's where the kernel speaks of its own accord."""
        v6 = flow.tuple.local.ip.version == 6
        number = flow.ip_protocol or ((58 if v6 else 1) if flow.tuple.protocol is Transport.ICMP else 0)
        if number in ICMP_NUMBERS:
            if flow.direction is Direction.IN:
                return Finding(Match.KERNEL, final=True)
            kinds = KERNEL_ICMPV6 if number == 58 else KERNEL_ICMP
            return Finding(Match.KERNEL) if not flow.midstream and flow.icmp_type in kinds else Finding(Match.NONE)
        return Finding(Match.KERNEL) if number in KERNEL_PROTOCOLS else Finding(Match.NONE)


def _best(flow: Flow, bound: list[RawSocket]) -> list[RawSocket]:
    """Those that take the flow's packets: connected to its far end, bound to its address, or bound to all addresses.

    An IPv6 socket that is bound to all addresses takes IPv4 too unless it was told not to (IPV6_V6ONLY), which cannot
    be seen from here: it comes last.
    """
    local, remote = plain(flow.tuple.local.ip.packed), plain(flow.tuple.remote.ip.packed)
    ranked: dict[int, list[RawSocket]] = {}
    for raw in bound:
        rank = _rank(raw, local, remote, flow.tuple.remote.port)
        if rank is not None:
            ranked.setdefault(rank, []).append(raw)
    return ranked[min(ranked)] if ranked else []


def _rank(raw: RawSocket, local: bytes, remote: bytes, remote_port: int) -> int | None:
    home = raw.local.ip.packed
    anywhere = home == ANY[len(home)]
    if not anywhere and plain(home) != local:
        return None
    if anywhere and len(home) == 4 and len(local) == 16:
        return None
    if raw.remote is not None:
        return 0 if (plain(raw.remote.ip.packed), raw.remote.port) == (remote, remote_port) else None
    if not anywhere:
        return 1
    return 3 if raw.family == AF_INET6 and len(local) == 4 else 2


def _everybody(owners: Iterable[Owner]) -> tuple[Owner, ...]:
    """Each process once, the oldest first."""
    found = {owner.process.key: owner for owner in owners}
    return tuple(sorted(found.values(), key=lambda owner: (owner.process.key.started_ns, owner.process.pid)))
