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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Final, TypeVar

from appliance.errors import GuestError, GuestGone, Implausible, OutOfTime, UnreadableMemory, UnsupportedGuest
from appliance.guest.windows import pe
from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.kernel import KernelModule, WindowsKernel
from appliance.guest.windows.pools import Block
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp_chains import ChainTable
from appliance.guest.windows.xp_kpcr import KernelView, find_by_kpcr
from appliance.guest.windows.xp_owners import Holder, Holders
from appliance.guest.windows.xp_tables import (
    CONNECTION_TAG,
    SOCKET_TAG,
    RawConnection,
    RawSocket,
    Tables,
    find_tables,
    read_place,
)
from appliance.model import (
    NO_NETWORK,
    Direction,
    Endpoint,
    Evidence,
    Finding,
    Flag,
    Flow,
    Gap,
    GuestSocket,
    IpAddress,
    Match,
    Owner,
    Reason,
    Transport,
)

__all__ = ["KernelView", "XpNetwork", "XpWalk", "find_by_kpcr"]

TRIES: Final = 3
MAX_GAPS: Final = 64
MAX_BUILT: Final = 1 << 17
TCP, UDP, ICMP = 6, 17, 1
CLIENTS: Final = range(1025, 5001)  # ports that a client is given (registry: MaxUserPort, 5000 unless changed)
COMPARTMENT: Final = 1  # there is one
UNKNOWN: Final = "UNKNOWN"  # ss' word for it, too
_TRANSPORTS: Final = {TCP: Transport.TCP, UDP: Transport.UDP, ICMP: Transport.ICMP}
_NUMBERS: Final = {Transport.TCP: TCP, Transport.UDP: UDP}
_ANY: Final = bytes(4)
# ICMP that the kernel sends unasked: replies, errors, redirects.
_KERNEL_ICMP: Final = frozenset({0, 3, 4, 5, 8, 11, 12, 14, 18})
IGMP: Final = 2
IPPROTO_RAW: Final = 255

Key = tuple[bytes, int, bytes, int]
Raw = TypeVar("Raw", RawConnection, RawSocket)


@dataclass(frozen=True, slots=True)
class XpWalk:
    """What a full look found. ``torn`` counts what contradicted itself."""

    sockets: tuple[GuestSocket, ...]
    gaps: tuple[Gap, ...]
    torn: int


class XpNetwork:
    """Connections and sockets of one guest, kept up to date, and their owners."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        """Find tcpip.sys. Raises UnsupportedGuest when it is not loaded, GuestError."""
        self._kernel, self._space = kernel, kernel.space
        self._holders = Holders(kernel, processes)
        modules = {module.name.lower(): module for module in reversed(kernel.modules())}
        module = modules.get("tcpip.sys")
        if module is None:
            raise UnsupportedGuest(("tcpip.sys is not loaded: this guest has no network, or hides its driver",))
        self._module: KernelModule = module
        self._v6 = modules.get("tcpip6.sys")
        self._symbols, self._headers = _symbols_of(kernel, module), _headers_of(kernel, module)
        self._tables: Tables | None = None
        self._born: dict[int, tuple[RawConnection, int]] = {}  # when each connection was first seen
        self._by_key: dict[Key, RawConnection] = {}
        self._taken_out: dict[Key, RawConnection] = {}  # that live and are in no chain, by the last sweep
        self._by_port: dict[tuple[int, int], list[RawSocket]] = {}
        self._by_local: dict[int, list[RawConnection]] = {}
        self._built: dict[int, tuple[RawConnection | RawSocket, Owner | None, GuestSocket]] = {}
        self._listened: set[tuple[int, int]] = set()  # sockets that were seen without a connection
        self._changes = (-1, -1)
        self._connections: ChainTable[RawConnection] | None = None
        self._sockets: ChainTable[RawSocket] | None = None
        self.torn = 0

    @property
    def how(self) -> str:
        """By what the tables were found: "by symbol", a build's name, "measured"; empty before the first look."""
        return self._tables.how if self._tables is not None else ""

    # -- looks --

    def walk(self) -> XpWalk:
        """All connections and sockets with their owners; what changed under the look is left out.

        A build of tcpip.sys whose tables cannot be told is a gap. Raises GuestError.
        """
        torn = self.torn
        try:
            self.refresh(whole=True)
        except UnsupportedGuest as error:
            return XpWalk((), (Gap(NO_NETWORK, self._module.base, str(error)),), 0)
        self._holders.look()
        assert self._connections is not None and self._sockets is not None
        connections, sockets = self._connections.settled(), self._sockets.settled()
        self.torn += len(self._connections) - len(connections) + len(self._sockets) - len(sockets)
        told: list[tuple[RawConnection | RawSocket, str]] = [(raw, UNKNOWN) for raw in connections]
        told += [(raw, state) for raw in sockets if (state := self._state(raw)) is not None]
        found = [(raw, state, self._holder(raw, read=False)) for raw, state in told]
        changed = self._holders.changed({raw.pid for raw, _, _ in found})
        if changed:  # a process has ended meanwhile, or its pid is another one's
            self.torn += len(changed)
            self._holders.look()
            found = [(raw, state, self._holder(raw) if raw.pid in changed else holder) for raw, state, holder in found]
        sockets_told = tuple(self._build(raw, holder, state) for raw, state, holder in found)
        gaps = [*self._holders.gaps, *self._gaps(self._connections, "connection table")]
        gaps += self._gaps(self._sockets, "socket table")
        if self._v6 is not None:
            gaps.append(Gap("IPv6", self._v6.base, "tcpip6.sys keeps its connections for itself; they are not read"))
        return XpWalk(sockets_told, tuple(gaps[:MAX_GAPS]), self.torn - torn + self._holders.torn)

    def adopt(self, vas: Iterable[int]) -> bool:
        """Take note of hidden processes; whether `walk` would now tell other owners. Raises OutOfTime, GuestGone."""
        return self._holders.adopt(vas)

    def refresh(self, *, whole: bool = False) -> None:
        """Bring both tables up to date. Raises UnsupportedGuest (no table fits), UnreadableMemory, OutOfTime."""
        tables = self._find(afresh=whole and self._tables is None)
        variables, base = tables.variables, self._module.base
        assert self._connections is not None and self._sockets is not None
        for _ in range(TRIES):
            is_kernel = self._kernel.is_kernel
            first = read_place(
                self._space, is_kernel, base + variables.connections, base + variables.connection_chains, sockets=False
            )
            second = read_place(
                self._space, is_kernel, base + variables.sockets, base + variables.socket_chains, sockets=True
            )
            if first is None or second is None:
                self._tables = None
                raise Implausible("the tables of tcpip.sys are not where they were")
            settled = self._sockets.look(second)  # first: of what is bound meanwhile, a connection tells later
            settled &= self._connections.look(first)
            lost = len(self._sockets.lost) + len(self._connections.lost)
            if settled and not lost:
                break
            self.torn += 1
            if not self._kernel.memory.live:
                break
        self._index(self._kernel.read_shared().epoch_ns)

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
        self._taken_out = {
            _key(raw): raw
            for raw, told in found.values()
            if isinstance(raw, RawConnection) and Flag.UNLINKED_ENDPOINT in told.flags
        }
        return tuple(told for _, told in found.values())

    def _loose(self, blocks: Iterable[tuple[int, Block]]) -> dict[int, tuple[RawConnection | RawSocket, GuestSocket]]:
        if self._kernel.memory.live or self._connections is None:
            self.refresh()
        assert self._connections is not None and self._sockets is not None
        parser = self._parser
        connections: list[tuple[RawConnection, bool]] = []
        sockets: list[RawSocket] = []
        for va, block in blocks:
            body = va + parser.header
            if body in self._connections or body in self._sockets:
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
            holder = self._holder(socket)
            if socket.protocol == TCP and (socket.port, socket.pid) in covered:
                continue
            flag = Flag.UNLINKED_ENDPOINT if _lives(holder) else Flag.STALE
            found[socket.va] = socket, self._build(socket, holder, _socket_state(socket), flag)
        return found

    # -- one tuple --

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now; NO_MEMORY where its table is not one that we can read. Raises GuestError."""
        local, remote = flow.tuple.local.ip, flow.tuple.remote.ip
        if local.version != 4 or remote.version != 4:
            return Finding(Match.NONE, reason=Reason.NO_MEMORY, final=True)  # tcpip6.sys is not read
        torn = self.torn
        for attempt in range(TRIES):
            fresh = attempt > 0 or self._tables is None
            if fresh:
                try:
                    self.refresh()
                except Implausible:
                    self.torn += 1
                    continue
                except UnsupportedGuest:
                    return Finding(Match.NONE, reason=Reason.NO_MEMORY)
            finding = self._find_once(flow, fresh=fresh)
            if finding is not None:
                lost = self.torn - torn
                return replace(finding, torn=lost) if lost else finding
        return Finding(Match.NONE, reason=Reason.TORN, torn=self.torn - torn)

    def _find_once(self, flow: Flow, *, fresh: bool) -> Finding | None:
        """The answer; None: look again."""
        match flow.tuple.protocol:
            case Transport.TCP:
                return self._find_tcp(flow, fresh=fresh)
            case Transport.UDP:
                sockets = self._bound(UDP, flow.tuple.local)
                found = self._of_sockets(sockets, Match.UNCONNECTED)
                return found if found is not None else self._nobody(flow, fresh=fresh)
            case _:
                return self._find_other(flow) if fresh else None

    def _find_tcp(self, flow: Flow, *, fresh: bool) -> Finding | None:
        near, far = flow.tuple.local, flow.tuple.remote
        key = (near.ip.packed, near.port, far.ip.packed, far.port)
        connection = self._by_key.get(key)
        if connection is not None:
            return self._of_connection(connection)
        if fresh and (taken := self._taken_out.get(key)) is not None:
            found = self._of_connection(taken)
            if found is not None and found.owners and found.socket is not None:
                claim = "a connection that lives lies in the kernel's pool and in none of its chains"
                flag = Flag.UNLINKED_ENDPOINT
                socket = replace(found.socket, flags=(flag, *found.socket.flags))
                evidence = Evidence(claim, flag.value, taken.va, weight=2)
                return replace(found, socket=socket, evidence=(*found.evidence, evidence))
        if flow.direction is Direction.IN or flow.midstream:
            listening = [each for each in self._bound(TCP, near) if self._state(each) == "LISTEN"]
            heard = self._of_sockets(listening, Match.LISTENER) if fresh else None
            if heard is not None:
                return heard
        return self._nobody(flow, fresh=fresh)

    def _of_connection(self, known: RawConnection) -> Finding | None:
        """The owner of a connection; both are the same before and after. None where they are not."""
        process = self._holders.known(known.pid)
        if process is None:
            holder = self._holder(known)
            process = self._holders.known(known.pid)
            if process is None:  # nobody has this pid
                return (
                    self._finding(Match.EXACT, [holder], self._build(known, holder, UNKNOWN))
                    if self._is_same(known)
                    else None
                )
        spans = [self._parser.connection_span(known.va), self._holders.span(process.va)]
        before = self._space.readv(spans)
        if not self._is_still(known, before[0]) or not self._holders.is_still(process, before[1]):
            self._holders.look()
            return None
        holder = self._holders.judge(process, self._born_ns(known))
        after = self._space.readv(spans)
        if after != before and not (self._is_still(known, after[0]) and self._holders.is_still(process, after[1])):
            self.torn += 1
            return None
        return self._finding(Match.EXACT, [holder], self._build(known, holder, UNKNOWN))

    def _of_sockets(self, sockets: Sequence[RawSocket], match: Match) -> Finding | None:
        """One finding from all sockets that it may be; None where there are none, or they changed meanwhile."""
        if not sockets:
            return None
        holders = [self._holder(each) for each in sockets]
        again = self._space.readv([self._parser.socket_span(each.va) for each in sockets])
        for before, raw in zip(sockets, again, strict=True):
            if raw is None or self._parser.socket(before.va, raw) != before:
                self.torn += 1
                return None
        first = next((number for number, holder in enumerate(holders) if holder.owner), 0)
        socket = self._build(sockets[first], holders[first], _socket_state(sockets[first]))
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
            for (protocol, _), group in self._by_port.items()
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
        assert self._connections is not None and self._sockets is not None
        certain = (
            not self._sockets.lost
            and not self._connections.lost
            and (number, flow.tuple.local.port) not in self._by_port
        )
        return Finding(Match.NONE, reason=Reason.CLOSED if came_in and certain else None)

    # -- the index --

    def _find(self, *, afresh: bool) -> Tables:
        if self._tables is not None and not afresh:
            return self._tables
        module = self._module
        tables = find_tables(
            self._space, self._kernel.is_kernel, module.base, module.size, self._symbols, self._headers
        )
        if tables.sound:  # else there was nothing yet by which to choose a layout
            self._tables = tables
        parser = self._parser = tables.parser
        is_kernel = self._kernel.is_kernel
        self._connections = ChainTable(self._space, is_kernel, parser.connection_span, parser.connection)
        self._sockets = ChainTable(self._space, is_kernel, parser.socket_span, parser.socket)
        self._changes = (-1, -1)
        return tables

    def _index(self, now_ns: int) -> None:
        assert self._connections is not None and self._sockets is not None
        changes = (self._connections.changes, self._sockets.changes)
        if changes == self._changes:
            return
        self._changes = changes
        self._by_key, self._by_local, self._by_port = {}, {}, {}
        born = self._born
        self._born = {}
        for raw in self._connections:
            self._by_key[_key(raw)] = raw
            self._by_local.setdefault(raw.local_port, []).append(raw)
            before = born.get(raw.va)
            same = before is not None and before[0].identity == raw.identity
            self._born[raw.va] = (raw, before[1] if before is not None and same else now_ns)
        for socket in self._sockets:
            self._by_port.setdefault((socket.protocol, socket.port), []).append(socket)
        free = {
            (socket.va, socket.created_ns)
            for (protocol, port), group in self._by_port.items()
            if protocol == TCP and port not in self._by_local
            for socket in group
        }
        alive = {(socket.va, socket.created_ns) for socket in self._sockets}
        self._listened = (self._listened | free) & alive

    def _bound(self, protocol: int, local: Endpoint) -> list[RawSocket]:
        """Sockets that take what comes to this address: those bound to it, else those bound to any."""
        group = self._by_port.get((protocol, local.port), [])
        exact = [each for each in group if each.local == local.ip.packed]
        if exact:
            return exact
        if local.ip.is_multicast or local.ip == _broadcast():
            return group
        return [each for each in group if each.local == _ANY]

    def _state(self, socket: RawSocket) -> str | None:
        """A socket's state; None for a client's, whose connection is told instead."""
        if socket.protocol != TCP:
            return "CLOSE"
        connections = len(self._by_local.get(socket.port, ()))
        sockets = len(self._by_port.get((TCP, socket.port), ()))
        listens = connections > sockets or not connections or socket.port not in CLIENTS
        return "LISTEN" if listens or (socket.va, socket.created_ns) in self._listened else None

    # -- objects --

    def _holder(self, raw: RawConnection | RawSocket, *, read: bool = True) -> Holder:
        return self._holders.find(raw.pid, self._born_ns(raw), read=read)

    def _born_ns(self, raw: RawConnection | RawSocket) -> int:
        """When it was made, at the latest: a connection not after it was first seen, nor before its only socket."""
        if isinstance(raw, RawSocket):
            return raw.created_ns
        seen = self._born.get(raw.va)
        born_ns = seen[1] if seen is not None and seen[0] is raw else self._kernel.read_shared().epoch_ns
        group = self._by_port.get((TCP, raw.local_port), ())
        made = [each.created_ns for each in group if each.pid == raw.pid]
        return min(born_ns, made[0]) if len(made) == 1 else born_ns

    def _is_still(self, known: RawConnection, raw: bytes | None) -> bool:
        now = self._parser.connection(known.va, raw) if raw is not None else None
        return now is not None and now.identity == known.identity

    def _is_same(self, known: RawConnection) -> bool:
        return self._is_still(known, self._space.readv([self._parser.connection_span(known.va)])[0])

    def _told_unlinked(self, raw: RawConnection, in_use: bool, loose: list[RawSocket]) -> GuestSocket:
        holder = self._holder(raw)
        sockets = [*self._by_port.get((TCP, raw.local_port), ()), *loose]
        made_from = any(
            each.protocol == TCP and each.port == raw.local_port and each.pid == raw.pid for each in sockets
        )
        taken = any(each.pid == raw.pid for each in self._by_local.get(raw.local_port, ()))
        lives = in_use and _lives(holder) and made_from and not taken
        return self._build(raw, holder, UNKNOWN, Flag.UNLINKED_ENDPOINT if lives else Flag.STALE)

    def _build(
        self, raw: RawConnection | RawSocket, holder: Holder, state: str, flag: Flag | None = None
    ) -> GuestSocket:
        """What is told of an object; the same as before where nothing has changed."""
        flags = tuple(each for each in (flag, holder.flag) if each is not None)
        known = self._built.get(raw.va)
        if (
            known is not None
            and known[:2] == (raw, holder.owner)
            and (known[2].state, known[2].flags) == (state, flags)
        ):
            return known[2]
        owners = (holder.owner,) if holder.owner is not None else ()
        if isinstance(raw, RawConnection):
            protocol, port = Transport.TCP, raw.local_port
            remote = Endpoint(_ip(raw.remote), raw.remote_port)
        else:
            protocol = _TRANSPORTS.get(raw.protocol, Transport.RAW)
            port, remote = raw.port if raw.protocol in (TCP, UDP) else raw.protocol, None
        socket = GuestSocket(
            protocol, state, Endpoint(_ip(raw.local), port), remote, owners, COMPARTMENT, raw.va, flags=flags
        )
        if len(self._built) > MAX_BUILT:
            self._built.clear()
        self._built[raw.va] = raw, holder.owner, socket
        return socket

    def _gaps(self, table: ChainTable[Raw], what: str) -> list[Gap]:
        return [Gap(what, va, why) for va, why in table.lost[:MAX_GAPS]]


def _symbols_of(kernel: WindowsKernel, module: KernelModule) -> SymbolTable | None:
    """The names of tcpip.sys, where they can be had."""
    try:
        return kernel.image_symbols(module)
    except (GuestGone, OutOfTime):
        raise
    except GuestError:
        return None


def _headers_of(kernel: WindowsKernel, module: KernelModule) -> pe.Headers | None:
    try:
        return pe.read_headers(kernel.space, module.base)
    except (Implausible, UnreadableMemory):
        return None


def _key(raw: RawConnection) -> Key:
    return raw.local, raw.local_port, raw.remote, raw.remote_port


def _lives(holder: Holder) -> bool:
    return holder.owner is not None and holder.flag is not Flag.OWNER_EXITED


def _socket_state(raw: RawSocket) -> str:
    return "LISTEN" if raw.protocol == TCP else "CLOSE"


@lru_cache(maxsize=8192)
def _ip(raw: bytes) -> IPv4Address:
    return IPv4Address(raw)


@lru_cache(maxsize=1)
def _broadcast() -> IpAddress:
    return IPv4Address(0xFFFF_FFFF)
