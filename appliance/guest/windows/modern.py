"""The network since Vista, compared with itself: two tables, port pools, their bitmaps, and what lies in the pools.

An endpoint that no table has is called *unlinked* only when it still lives: its addresses lead somewhere, its owner is
a process that has not ended, its state is one of a connection under way, and its block is in use, or else its port is
taken and by nothing else. Anything less is *stale*. A port that is taken and that nothing takes is told too; a long run
of them is a range that an administrator, or Hyper-V, has reserved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows import pools
from appliance.guest.windows.addresses import tag_of
from appliance.guest.windows.crossview import Placed
from appliance.guest.windows.endpoints import BOTH, Kind, RawSocket, key_of
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.lookup import Lookup
from appliance.guest.windows.pools import Block, PoolHeader, find_blocks
from appliance.guest.windows.processes import Processes, RawProcess
from appliance.guest.windows.sockets import Sockets
from appliance.guest.windows.space import PAGE
from appliance.model import Endpoint, Evidence, Finding, Flag, Flow, Gap, GuestSocket, Match, Transport

TRANSPORTS: Final = {pools.LISTENER_TAG: Transport.TCP, pools.UDP_TAG: Transport.UDP}
UNDER_WAY: Final = frozenset((2, 3, 4, 7))  # SYN_SENT, SYN_RECV, ESTABLISHED, CLOSE_WAIT: nobody frees it like this
CLOSING: Final = frozenset((5, 6, 8, 9))  # FIN_WAIT1 and 2, CLOSING, LAST_ACK: they may be left in what was freed
RESERVED: Final = 8  # ports side by side
MAX_STALE: Final = 1024
RULE: Final = 3  # connections in both tables for each that is in one only
MARGIN_NS: Final = 1_000_000_000
OLD_NS: Final = 1_000_000_000  # a connection of this age is in a table, if it is in any
REST_NS: Final = 200_000_000
AROUND: Final = 1 << 16  # bytes of a neighbourhood
SETTLE: Final = 2  # how often what no table has is looked at again
AROUND_S: Final = 0.008  # of one look around while a packet's owner is sought: an answer must be prompt to count


class Looked(NamedTuple):
    """What a full look found. ``torn`` counts what contradicted itself."""

    sockets: tuple[GuestSocket, ...]
    gaps: tuple[Gap, ...]
    torn: int


class Modern:
    """Connections and sockets of one guest since Vista."""

    tags: tuple[bytes, ...] = (*pools.ENDPOINT_TAGS, pools.TIME_WAIT_TAG, *TRANSPORTS)

    def __init__(
        self,
        kernel: WindowsKernel,
        processes: Processes,
        header: PoolHeader,
        clock_ns: Callable[[], int],
        clock_s: Callable[[], float],
    ) -> None:
        """``clock_ns``: that of the flows. Raises UnsupportedGuest where tcpip.sys or its symbols are missing."""
        self._kernel, self._header, self._clock_ns, self._clock_s = kernel, header, clock_ns, clock_s
        self._live = kernel.memory.live
        self._sockets = Sockets(kernel, processes)
        self._lookup = Lookup(self._sockets)
        self._raws: list[RawSocket] = []  # of the last look, those without a table included
        self._unlinked: dict[bytes, RawSocket] = {}  # by their ends
        self._next, self._rested_ns = 0, 0

    # -- looks --

    def walk(self) -> Looked:
        """Read everything. Raises GuestError."""
        began_ns = self._guest_ns()
        walked = self._sockets.walk()
        owned = self._own(walked.sockets, began_ns)
        self._raws = [raw for raw, _ in owned]
        sockets, gaps = self._agreeing(self._sockets.build_all(owned))
        torn = walked.torn + len(walked.sockets) - len(owned)
        return Looked(tuple(sockets), (*walked.gaps, *gaps), torn)

    def adopt(self, vas: Sequence[int]) -> bool:
        """Sockets name their owners by address here: nobody need be found first."""
        return False

    def loose(self, blocks: Sequence[Placed]) -> list[GuestSocket]:
        """What lies in pool blocks and in no table; of a running guest only what lives. Call after `walk`.

        Connections in TIME_WAIT are among them, without a flag: not every build's table of them is known.
        """
        found = self._judged(blocks)
        stale = [each for each in found if each[2] is Flag.STALE]
        found = [each for each in found if each[2] is not Flag.STALE]
        self._unlinked = {raw.key: raw for raw, _, flag in found if flag is Flag.UNLINKED_ENDPOINT}
        found += () if self._live else stale[:MAX_STALE]
        self._raws += [raw for raw, _, _ in found]
        built = self._sockets.build_all([(raw, owner) for raw, owner, _ in found])
        return [_flagged(socket, flag) for socket, (_, _, flag) in zip(built, found, strict=True)]

    def nearby(self, seconds: float) -> list[GuestSocket]:
        """The same as `loose`, only around what is known, and quickly. Call after `walk`."""
        living = self._sought(seconds)
        built = self._sockets.build_all([(raw, owner) for raw, owner, _ in living])
        return [_flagged(socket, Flag.UNLINKED_ENDPOINT) for socket in built]

    def bare_ports(self) -> list[GuestSocket]:
        """Ports that are taken although nothing takes them, at two moments; as sockets without an owner."""
        bare = self._bare()
        if bare and self._live:
            self._raws += self._sockets.walk().sockets
            bare &= self._bare()
        flags = (Flag.PORT_WITHOUT_ENDPOINT,)
        return [
            GuestSocket(transport, "CLOSE", Endpoint(IPv4Address(0), port), None, (), compartment, 0, flags=flags)
            for transport, compartment, port in sorted(bare)
        ]

    # -- one tuple --

    def find(self, flow: Flow) -> Finding:
        """Who owns a flow's tuple now. Raises GuestError.

        Where no table has a connection that is not new, it is sought around those that the tables have.
        """
        finding = self._lookup.find(flow)
        young = self._live and self._clock_ns() - flow.started_ns < OLD_NS  # a new one is linked to one after the other
        for _ in range(SETTLE if self._live and not young else 0):
            if not _is_single(finding):
                break
            self._sockets.refresh_connections()  # it was being linked, or was just leaving
            finding = self._lookup.find(flow)
        socket = finding.socket
        if socket is not None and _is_single(finding) and (young or not self._is_alike()):
            finding = replace(finding, socket=_without(socket, Flag.ONE_TABLE_ONLY))
        if finding.match is Match.NONE and finding.reason is None and flow.tuple.protocol is Transport.TCP:
            return self._find_unlinked(flow) or finding
        return finding

    def _find_unlinked(self, flow: Flow) -> Finding | None:
        local, remote = flow.tuple.local, flow.tuple.remote
        key = key_of(local.ip.packed, local.port, remote.ip.packed, remote.port)
        if key not in self._unlinked and self._live:
            now_ns = self._clock_ns()
            if now_ns - flow.started_ns < OLD_NS or now_ns < self._rested_ns:
                return None
            self._rested_ns = now_ns + REST_NS
            self._sought(AROUND_S)
        raw = self._unlinked.get(key)
        checked = self._sockets.check(raw) if raw is not None else None
        if checked is None or checked[1] is None or checked[1].exited or checked[0].state not in UNDER_WAY | CLOSING:
            self._unlinked.pop(key, None)
            return None
        socket = _flagged(self._sockets.build(*checked), Flag.UNLINKED_ENDPOINT)
        claim = "a connection that lives lies in the kernel's pool and in none of its tables"
        evidence = Evidence(claim, Flag.UNLINKED_ENDPOINT.value, socket.address, weight=2)
        return Finding(Match.EXACT, socket.owners, socket, evidence=(evidence,))

    def _sought(self, seconds: float) -> list[tuple[RawSocket, RawProcess | None, Flag | None]]:
        """What lives in the memory around what is known, and in no table: pools put like beside like.

        For about so many seconds; where it ends, the next call goes on.
        """
        until = self._clock_s() + seconds
        known = {raw.va - self._header.size for raw in (*self._sockets.connections, *self._sockets.ports)}
        around = sorted({va & -AROUND for va in known})
        blocks: list[Placed] = []
        for _ in around:
            self._next = (self._next + 1) % len(around)
            for at, raw in self._read_around(around[self._next]):
                found = find_blocks(raw, at, self._header, pools.ENDPOINT_TAGS, known)[0]
                blocks += [(block.at, block) for block in found]
            if self._clock_s() > until:
                break
        living = [each for each in self._judged(blocks) if each[2] is Flag.UNLINKED_ENDPOINT] if blocks else []
        self._unlinked |= {raw.key: raw for raw, _, _ in living}
        return living

    def _read_around(self, start: int) -> list[tuple[int, bytes]]:
        """A neighbourhood, in one piece where all of it is there; else the pages that are."""
        whole = self._kernel.space.readv([(start, AROUND)])[0]
        if whole is not None:
            return [(start, whole)]
        pages = range(start, start + AROUND, PAGE)
        raws = self._kernel.space.readv([(page, PAGE) for page in pages])
        return [(page, raw) for page, raw in zip(pages, raws, strict=True) if raw is not None]

    # -- the parts --

    def _guest_ns(self) -> int:
        """The guest's clock, 0 where it cannot be read."""
        try:
            return self._kernel.read_shared().epoch_ns
        except UnreadableMemory:
            return 0

    def _own(self, raws: list[RawSocket], began_ns: int) -> list[tuple[RawSocket, RawProcess | None]]:
        """Sockets with their owners. What was made since the look began may lie where the owner lay: read again."""
        owned: list[tuple[RawSocket, RawProcess | None]] = []
        for raw, owner in self._sockets.own(raws):
            if self._live and owner is not None and owner.created > began_ns - MARGIN_NS:
                checked = self._sockets.check(raw)
                if checked is not None:
                    owned.append(checked)
            else:
                owned.append((raw, owner))
        return owned

    def _agreeing(self, sockets: list[GuestSocket]) -> tuple[list[GuestSocket], list[Gap]]:
        """Where the two tables disagree about many connections, that is how this build is, and no finding."""
        odd = sum(Flag.ONE_TABLE_ONLY in socket.flags for socket in sockets)
        if not odd or self._is_alike():
            return sockets, []
        gap = Gap("connection tables", 0, f"{odd} connections are in one of two only, too many to be odd: not compared")
        return [_without(socket, Flag.ONE_TABLE_ONLY) for socket in sockets], [gap]

    def _is_alike(self) -> bool:
        """Whether this guest's two tables hold the same as a rule."""
        tables = [raw.tables for raw in self._sockets.connections if raw.kind is Kind.TCP]
        both = tables.count(BOTH)
        return both >= RULE * (len(tables) - both) > 0

    def _judged(self, placed: Iterable[Placed]) -> list[tuple[RawSocket, RawProcess | None, Flag | None]]:
        """The sockets in pool blocks that no table has, and whether each lives; None: it is as it should be."""
        sockets, step = self._sockets, self._header.size
        bodies = {va + step: block for va, block in placed if block.tag in self.tags}
        raws = self._parse(bodies)
        for _ in range(SETTLE if self._live and raws else 0):
            # What is being made or torn down is neither here nor there for a moment: it must stay as it is, off the
            # tables, while these are read anew.
            sockets.refresh_connections()
            sockets.refresh_ports()
            if sockets.connections.gaps or sockets.ports.gaps:
                return []  # they contradict themselves: nothing follows from what they do not have
            linked = {raw.va for raw in (*sockets.connections, *sockets.ports)}
            bodies = self._again([raw.va for raw in raws if raw.va not in linked])
            again = {raw.va: raw for raw in self._parse(bodies)}
            raws = [raw for raw in raws if again.get(raw.va) == raw]
        linked = {raw.va for raw in (*sockets.connections, *sockets.ports)}
        taken = sockets.ports.taken()
        owned = sockets.own([raw for raw in raws if raw.va not in linked])
        return [(raw, owner, self._judge(raw, owner, bodies[raw.va], taken)) for raw, owner in owned]

    def _again(self, bodies: Sequence[int]) -> dict[int, Block]:
        """The blocks of these bodies by what their headers say now."""
        step = self._header.size
        found: dict[int, Block] = {}
        for va, raw in zip(bodies, self._kernel.space.readv([(va - step, step) for va in bodies]), strict=True):
            block = self._header.parse(raw, 0, va - step, tag_of(raw)) if raw is not None else None
            if block is not None:
                found[va] = block
        return found

    def _parse(self, bodies: dict[int, Block]) -> list[RawSocket]:
        connections = self._sockets.connections
        raws = connections.at([va for va, block in bodies.items() if block.tag in pools.ENDPOINT_TAGS])
        raws += connections.waiting_at([va for va, block in bodies.items() if block.tag == pools.TIME_WAIT_TAG])
        for tag, transport in TRANSPORTS.items():
            raws += self._sockets.ports.at(transport, [va for va, block in bodies.items() if block.tag == tag])
        return raws

    def _judge(
        self, raw: RawSocket, owner: RawProcess | None, block: Block, taken: dict[tuple[Transport, int], set[int]]
    ) -> Flag | None:
        """Whether a socket that no table has lives, or is only what is left of one."""
        if raw.kind is Kind.TIME_WAIT:
            return None if block.in_use else Flag.STALE
        if owner is None or owner.exited:
            return Flag.STALE
        if raw.kind is Kind.TCP and raw.state in UNDER_WAY and block.in_use:
            return Flag.UNLINKED_ENDPOINT
        if raw.kind is Kind.TCP and raw.state not in UNDER_WAY | CLOSING:
            return Flag.STALE
        # A header can be forged; a port that is taken by nothing else is taken by this.
        transport = _transport(raw)
        held = any(raw.local.port in ports for (protocol, _), ports in taken.items() if protocol is transport)
        linked = (*self._sockets.connections, *self._sockets.ports)
        alone = not any(_transport(one) is transport and one.local.port == raw.local.port for one in linked)
        return Flag.UNLINKED_ENDPOINT if held and alone else Flag.STALE

    def _bare(self) -> set[tuple[Transport, int, int]]:
        used: dict[Transport, set[int]] = {Transport.TCP: set(), Transport.UDP: set()}
        for raw in self._raws:
            used[_transport(raw)].add(raw.local.port)
        ports = self._sockets.ports
        return {
            (transport, compartment, port)
            for (transport, compartment), taken in ports.taken().items()
            for port in _singles(taken - used[transport] - {0})
            if not ports.entry(transport, compartment, port)
        }


def _transport(raw: RawSocket) -> Transport:
    return Transport.UDP if raw.kind is Kind.UDP else Transport.TCP


def _is_single(finding: Finding) -> bool:
    """Whether a connection was found in one table only."""
    return finding.socket is not None and Flag.ONE_TABLE_ONLY in finding.socket.flags


def _flagged(socket: GuestSocket, flag: Flag | None) -> GuestSocket:
    return socket if flag is None else replace(socket, flags=(flag, *socket.flags))


def _without(socket: GuestSocket, flag: Flag) -> GuestSocket:
    if flag not in socket.flags:
        return socket
    return replace(socket, flags=tuple(each for each in socket.flags if each is not flag))


def _singles(ports: set[int]) -> list[int]:
    """Ports that do not belong to a long run of them."""
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and runs[-1][-1] == port - 1:
            runs[-1].append(port)
        else:
            runs.append([port])
    return [port for run in runs if len(run) < RESERVED for port in run]
