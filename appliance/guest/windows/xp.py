"""Connections and sockets of Windows XP and Server 2003, and who owns a packet's tuple.

tcpip.sys of that time has a table of connections and one of address objects, to which sockets are bound: UDP, raw, and
every TCP socket, be it a client's or a listener's. What it does not tell, or not where we know it:

- the state of a connection. It is UNKNOWN here; what is in the table is on its way up, established or being closed
  (what is in TIME_WAIT is kept elsewhere, and nobody owns it any more);
- whether a TCP address object listens. It does where no connection has its port, where more connections have it than
  address objects, or where no client would be given that port (clients get 1025 to 5000); else it is a client's, and
  its connection is told instead;
- IPv6: that is another driver's, tcpip6.sys, which is not read.

A connection knows its process by its pid: see `xp_owners`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.pools import Block
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp_lookup import XpLookup
from appliance.guest.windows.xp_owners import Holder
from appliance.guest.windows.xp_sockets import MAX_GAPS, TCP, UNKNOWN, XpSockets, key_of, socket_state
from appliance.guest.windows.xp_tables import CONNECTION_TAG, SOCKET_TAG, RawConnection, RawSocket
from appliance.model import NO_NETWORK, Finding, Flag, Flow, Gap, GuestSocket


@dataclass(frozen=True, slots=True)
class XpWalk:
    """What a full look found. ``torn`` counts what contradicted itself."""

    sockets: tuple[GuestSocket, ...]
    gaps: tuple[Gap, ...]
    torn: int


class XpNetwork:
    """Connections and sockets of one guest, and their owners."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        """Find tcpip.sys. Raises UnsupportedGuest when it is not loaded, GuestError."""
        self._kernel, self._space = kernel, kernel.space
        self._sockets = XpSockets(kernel, processes)
        self._lookup = XpLookup(kernel, self._sockets)

    @property
    def how(self) -> str:
        """By what the tables were found: "by symbol", a build's name, "measured"; empty before the first look."""
        return self._sockets.how

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now; NO_MEMORY where its table is not one that we can read. Raises GuestError."""
        return self._lookup.find(flow)

    def refresh(self) -> None:
        """Bring both tables up to date. Raises UnsupportedGuest (no table fits), UnreadableMemory, OutOfTime."""
        self._sockets.refresh()

    def walk(self) -> XpWalk:
        """All connections and sockets with their owners; what changed under the look is left out.

        A build of tcpip.sys whose tables cannot be told is a gap. Raises GuestError.
        """
        known = self._sockets
        torn = known.torn
        try:
            known.refresh(whole=True)
        except UnsupportedGuest as error:
            return XpWalk((), (Gap(NO_NETWORK, known.module.base, str(error)),), 0)
        known.holders.look()
        connections, sockets = known.connections.settled(), known.sockets.settled()
        known.torn += len(known.connections) - len(connections) + len(known.sockets) - len(sockets)
        told: list[tuple[RawConnection | RawSocket, str]] = [(raw, UNKNOWN) for raw in connections]
        told += [(raw, state) for raw in sockets if (state := known.state(raw)) is not None]
        found = [(raw, state, known.holder(raw, read=False)) for raw, state in told]
        changed = known.holders.changed({raw.pid for raw, _, _ in found})
        if changed:  # a process has ended meanwhile, or its pid is another one's
            known.torn += len(changed)
            known.holders.look()
            found = [(raw, state, known.holder(raw) if raw.pid in changed else holder) for raw, state, holder in found]
        sockets_told = tuple(known.build(raw, holder, state) for raw, state, holder in found)
        gaps = [*known.holders.gaps, *known.gaps()]
        if known.v6 is not None:
            gaps.append(Gap("IPv6", known.v6.base, "tcpip6.sys keeps its connections for itself; they are not read"))
        return XpWalk(sockets_told, tuple(gaps[:MAX_GAPS]), known.torn - torn + known.holders.torn)

    def adopt(self, vas: Iterable[int]) -> bool:
        """Take note of hidden processes; whether `walk` would now tell other owners. Raises OutOfTime, GuestGone."""
        return self._sockets.holders.adopt(vas)

    def unlinked(self, blocks: Iterable[tuple[int, Block]]) -> tuple[GuestSocket, ...]:
        """What pool blocks tagged TCPT and TCPA hold that no chain leads to; each comes with the address of its header.

        tcpip.sys keeps closed connections for later use, so one that no chain leads to is over (STALE) unless the
        socket that it was made from, of the same process and port, still exists and has no other connection: then it
        was taken out (UNLINKED_ENDPOINT). Sockets are given back to the pool when they are closed: one whose block is
        in use was taken out. Of a running guest only what lives is told, if it is the same at two moments. Call after
        `walk`. Raises GuestError.
        """
        try:
            found = self._loose(blocks := list(blocks))
        except UnsupportedGuest:  # `walk` has said so
            return ()
        if self._kernel.memory.live:
            lives = {va: told for va, told in found.items() if Flag.UNLINKED_ENDPOINT in told[1].flags}
            again = self._loose(blocks) if lives else {}
            found = {
                va: (raw, told)
                for va, (raw, told) in again.items()
                if va in lives and lives[va][0].identity == raw.identity
            }
        self._lookup.taken_out = {
            key_of(raw): raw
            for raw, told in found.values()
            if isinstance(raw, RawConnection) and Flag.UNLINKED_ENDPOINT in told.flags
        }
        return tuple(told for _, told in found.values())

    def _loose(self, blocks: Iterable[tuple[int, Block]]) -> dict[int, tuple[RawConnection | RawSocket, GuestSocket]]:
        if self._kernel.memory.live or not self._sockets.is_found:
            self._sockets.refresh()
        parser = self._sockets.parser
        connections: list[tuple[RawConnection, bool]] = []
        sockets: list[RawSocket] = []
        for va, block in blocks:
            body = va + parser.header
            if body in self._sockets.connections or body in self._sockets.sockets:
                continue
            if block.tag == CONNECTION_TAG:
                raw = self._space.readv([parser.connection_span(body)])[0]
                connection = parser.connection(body, raw) if raw is not None else None
                if connection is not None:
                    connections.append((connection, block.in_use))
            elif block.tag == SOCKET_TAG and block.in_use:
                raw = self._space.readv([parser.socket_span(body)])[0]
                socket = parser.socket(body, raw) if raw is not None else None
                if socket is not None:
                    sockets.append(socket)
        found: dict[int, tuple[RawConnection | RawSocket, GuestSocket]] = {}
        for connection, in_use in connections:
            found[connection.va] = connection, self._told_unlinked(connection, in_use, sockets)
        covered = {(each.local_port, each.pid) for each, _ in connections}
        for socket in sockets:
            holder = self._sockets.holder(socket)
            if socket.protocol == TCP and (socket.port, socket.pid) in covered:
                continue
            flag = Flag.UNLINKED_ENDPOINT if _lives(holder) else Flag.STALE
            found[socket.va] = socket, self._sockets.build(socket, holder, socket_state(socket), flag)
        return found

    def _told_unlinked(self, raw: RawConnection, in_use: bool, loose: list[RawSocket]) -> GuestSocket:
        holder = self._sockets.holder(raw)
        sockets = [*self._sockets.by_port.get((TCP, raw.local_port), ()), *loose]
        made_from = any(
            each.protocol == TCP and each.port == raw.local_port and each.pid == raw.pid for each in sockets
        )
        taken = any(each.pid == raw.pid for each in self._sockets.by_local.get(raw.local_port, ()))
        lives = in_use and _lives(holder) and made_from and not taken
        return self._sockets.build(raw, holder, UNKNOWN, Flag.UNLINKED_ENDPOINT if lives else Flag.STALE)


def _lives(holder: Holder) -> bool:
    return holder.owner is not None and holder.flag is not Flag.OWNER_EXITED
