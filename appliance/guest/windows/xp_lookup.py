"""From a packet's tuple to the process, on Windows XP and Server 2003.

The exact connection first, then a listener; what was found is read again, with its owner, before anybody is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from appliance.errors import Implausible, UnsupportedGuest
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.xp_owners import Holder
from appliance.guest.windows.xp_sockets import ICMP, TCP, TRIES, UDP, UNKNOWN, Key, XpSockets, socket_state
from appliance.guest.windows.xp_tables import RawConnection, RawSocket
from appliance.model import (
    Direction,
    Evidence,
    Finding,
    Flag,
    Flow,
    GuestSocket,
    Match,
    Reason,
    Transport,
)

_NUMBERS: Final = {Transport.TCP: TCP, Transport.UDP: UDP}
# ICMP that the kernel sends unasked: replies, errors, redirects.
_KERNEL_ICMP: Final = frozenset({0, 3, 4, 5, 8, 11, 12, 14, 18})
IGMP: Final = 2
IPPROTO_RAW: Final = 255


class XpLookup:
    """Answers "who owns this tuple?" for one guest."""

    def __init__(self, kernel: WindowsKernel, sockets: XpSockets) -> None:
        self._space, self._sockets = kernel.space, sockets
        self.taken_out: Mapping[Key, RawConnection] = {}  # that live and are in no chain, by the last sweep

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now; NO_MEMORY where its table is not one that we can read. Raises GuestError."""
        local, remote = flow.tuple.local.ip, flow.tuple.remote.ip
        if local.version != 4 or remote.version != 4:
            return Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)  # tcpip6.sys is not read
        torn = self._sockets.torn
        for attempt in range(TRIES):
            fresh = attempt > 0 or not self._sockets.is_found
            if fresh:
                try:
                    self._sockets.refresh()
                except Implausible:
                    self._sockets.torn += 1
                    continue
                except UnsupportedGuest:
                    return Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)
            finding = self._find_once(flow, fresh=fresh)
            if finding is not None:
                lost = self._sockets.torn - torn
                return replace(finding, torn=lost) if lost else finding
        return Finding(Match.NONE, reason=Reason.TORN, torn=self._sockets.torn - torn)

    def _find_once(self, flow: Flow, *, fresh: bool) -> Finding | None:
        """The answer; None: look again."""
        match flow.tuple.protocol:
            case Transport.TCP:
                return self._find_tcp(flow, fresh=fresh)
            case Transport.UDP:
                sockets = self._sockets.bound(UDP, flow.tuple.local)
                found = self._of_sockets(sockets, Match.UNCONNECTED)
                return found if found is not None else self._nobody(flow, fresh=fresh)
            case _:
                return self._find_other(flow) if fresh else None

    def _find_tcp(self, flow: Flow, *, fresh: bool) -> Finding | None:
        near, far = flow.tuple.local, flow.tuple.remote
        key = (near.ip.packed, near.port, far.ip.packed, far.port)
        connection = self._sockets.by_key.get(key)
        if connection is not None:
            return self._of_connection(connection)
        if fresh and (taken := self.taken_out.get(key)) is not None:
            found = self._of_connection(taken)
            if found is not None and found.owners and found.socket is not None:
                claim = "a connection that lives lies in the kernel's pool and in none of its chains"
                flag = Flag.UNLINKED_ENDPOINT
                socket = replace(found.socket, flags=(flag, *found.socket.flags))
                evidence = Evidence(claim, flag.value, taken.va, weight=2)
                return replace(found, socket=socket, evidence=(*found.evidence, evidence))
        if flow.direction is Direction.IN or flow.midstream:
            listening = [each for each in self._sockets.bound(TCP, near) if self._sockets.state(each) == "LISTEN"]
            heard = self._of_sockets(listening, Match.LISTENER) if fresh else None
            if heard is not None:
                return heard
        return self._nobody(flow, fresh=fresh)

    def _of_connection(self, known: RawConnection) -> Finding | None:
        """The owner of a connection; both are the same before and after. None where they are not."""
        sockets = self._sockets
        process = sockets.holders.known(known.pid)
        if process is None:
            holder = sockets.holder(known)
            process = sockets.holders.known(known.pid)
            if process is None:  # nobody has this pid
                return (
                    self._finding(Match.EXACT, [holder], sockets.build(known, holder, UNKNOWN))
                    if sockets.is_same(known)
                    else None
                )
        spans = [sockets.parser.connection_span(known.va), sockets.holders.span(process.va)]
        before = self._space.readv(spans)
        if not sockets.is_still(known, before[0]) or not sockets.holders.is_still(process, before[1]):
            sockets.holders.look()
            return None
        holder = sockets.holders.judge(process, sockets.born_ns(known))
        after = self._space.readv(spans)
        if after != before and not (sockets.is_still(known, after[0]) and sockets.holders.is_still(process, after[1])):
            sockets.torn += 1
            return None
        return self._finding(Match.EXACT, [holder], sockets.build(known, holder, UNKNOWN))

    def _of_sockets(self, sockets: Sequence[RawSocket], match: Match) -> Finding | None:
        """One finding from all sockets that it may be; None where there are none, or they changed meanwhile."""
        if not sockets:
            return None
        holders = [self._sockets.holder(each) for each in sockets]
        again = self._space.readv([self._sockets.parser.socket_span(each.va) for each in sockets])
        for before, raw in zip(sockets, again, strict=True):
            if raw is None or self._sockets.parser.socket(before.va, raw) != before:
                self._sockets.torn += 1
                return None
        first = next((number for number, holder in enumerate(holders) if holder.owner), 0)
        socket = self._sockets.build(sockets[first], holders[first], socket_state(sockets[first]))
        return self._finding(match, holders, socket)

    def _finding(self, match: Match, holders: Sequence[Holder], socket: GuestSocket) -> Finding:
        owners = tuple(dict.fromkeys(holder.owner for holder in holders if holder.owner is not None))
        evidence = tuple(claim for holder in holders for claim in holder.evidence)
        if not owners:
            # Nobody has the pid: its process has ended, or is hidden from every view. Only the wire can tell.
            named = any(holder.flag is not None for holder in holders)
            reason = Reason.HIDDEN if named and not evidence else Reason.ORPHAN
            return Finding(Match.NONE, socket=socket, reason=reason, evidence=evidence)
        reason_found = Reason.AMBIGUOUS if len(owners) > 1 else None
        return Finding(match, owners, socket, reason_found, evidence)

    def _find_other(self, flow: Flow) -> Finding:
        """ICMP and other protocols: a process only if it holds a raw socket that can have sent it."""
        number = flow.ip_protocol or _NUMBERS.get(flow.tuple.protocol, ICMP)
        if number == ICMP and flow.direction is Direction.IN:
            return Finding(Match.KERNEL, final=True)
        raw = [
            each
            for (protocol, _), group in self._sockets.by_port.items()
            if protocol in (number, IPPROTO_RAW)
            for each in group
        ]
        found = self._of_sockets(raw, Match.UNCONNECTED)
        if found is not None and found.owners:
            return replace(found, reason=found.reason or Reason.RAW)
        if number == IGMP or (number == ICMP and not flow.midstream and flow.icmp_type in _KERNEL_ICMP):
            return Finding(Match.KERNEL)
        return Finding(Match.NONE)

    def _nobody(self, flow: Flow, *, fresh: bool) -> Finding | None:
        if not fresh:
            return None
        came_in = flow.direction is Direction.IN and not flow.midstream
        number = _NUMBERS[flow.tuple.protocol]
        certain = self._sockets.is_whole and (number, flow.tuple.local.port) not in self._sockets.by_port
        return Finding(Match.NONE, reason=Reason.CLOSED if came_in and certain else None)
