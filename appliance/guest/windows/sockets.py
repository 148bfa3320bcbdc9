"""All sockets of a Windows guest since Vista: found, kept up to date, checked again, owned and described.

The tables are read with a layout that `measure` has verified in this very guest. An owner is only told when its address
is that of a process (type of object, page tables, threads that lead back), and a socket that is remembered only after
its memory, its links and its owner were read again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.windows.addresses import Piece, plain
from appliance.guest.windows.compartments import Compartments
from appliance.guest.windows.endpoints import BOTH, FIRST, Connections, Kind, Partitions, RawSocket
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import STATES, Layout
from appliance.guest.windows.measure import Measure, Measured
from appliance.guest.windows.ports import Ports
from appliance.guest.windows.processes import Processes, RawProcess
from appliance.model import Flag, Gap, GuestProcess, GuestSocket, Owner, Transport

TCPIP: Final = "tcpip.sys"
TRIES: Final = 3
MAX_PATIENCE: Final = 64  # looks
MAX_OWNERS: Final = 1 << 16  # processes remembered as owners
MAX_BUILT: Final = 1 << 16  # sockets remembered as they were told


class SocketList(NamedTuple):
    """One whole look. ``torn`` counts what contradicted itself during it."""

    sockets: list[RawSocket]
    gaps: list[Gap]
    torn: int


class Sockets:
    """The sockets of one guest."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        """Raises UnsupportedGuest where tcpip.sys or its symbols are missing; other GuestErrors."""
        self._kernel, self._processes = kernel, processes
        module = next((each for each in kernel.modules() if each.name.lower() == TCPIP), None)
        if module is None:
            raise UnsupportedGuest((f"{TCPIP}: it is not among the loaded modules",))
        self._base, self._symbols = module.base, kernel.image_symbols(module)
        if self.symbol("PartitionTable") is None:
            raise UnsupportedGuest((f"the symbol PartitionTable of {TCPIP}",))
        self._one = struct.Struct("<Q" if kernel.pointer_size == 8 else "<I")
        self._header = 2 * kernel.pointer_size
        self._measured: Measured | None = None
        self.looks = 0  # whole ones
        self._doubted: frozenset[Kind] = frozenset()  # what was there and not verified when it was measured last
        self._patience = 1  # looks until the next try
        self._next_look = 0
        self._owners: dict[int, RawProcess] = {}
        self._built: dict[int, tuple[RawSocket, GuestProcess | None, bool, GuestSocket]] = {}
        self._pair = struct.Struct("<QQ" if kernel.pointer_size == 8 else "<II")
        self._space = kernel.space
        self._trusted: tuple[Kind, ...] = ()
        self._links = (0, 0)
        self._sizes: dict[str, int] = {}  # by kind, from the pool header on
        self._places: dict[str, tuple[int | None, int | None]] = {}  # of state and owner, likewise
        self._homes_of = (-1, -1)
        self._own: set[bytes] = set()
        self.connections: Connections
        self.ports: Ports

    def symbol(self, name: str) -> int | None:
        """The address of a symbol of tcpip.sys."""
        rva = self._symbols.find(name)
        return None if rva is None else self._base + rva

    @property
    def layout(self) -> Layout:
        """The layout in use. Raises GuestError when it has to be measured first and cannot be."""
        return self._measure().layout

    @property
    def torn(self) -> int:
        """What contradicted itself, since the start."""
        return self.connections.torn + self.ports.torn if self._measured else 0

    # -- looks --

    def walk(self) -> SocketList:
        """Read every socket afresh. Raises GuestError where not even the tables can be found."""
        self.looks += 1
        self._kernel.forget()
        measured = self._measure()
        torn = self._read()
        if self._is_due(measured):
            measured = self._measure(again=True)
            torn = self._read()
        gaps = [*self.connections.gaps, *self.ports.gaps]
        gaps += [Gap("layout of tcpip.sys", self._base, doubt) for doubt in measured.doubts]
        return SocketList([*self.connections, *self.ports], gaps, torn)

    def _read(self) -> int:
        """Read everything with the layout in use; how much of it contradicted itself."""
        before = self.torn
        self.connections.walk()
        self.ports.walk()
        return self.torn - before

    def refresh_connections(self) -> None:
        """Bring the connections up to date."""
        self._measure()
        self.connections.refresh()

    def reread_connections(self) -> None:
        """Bring the connections up to date, and look at each of those that are known."""
        self._measure()
        self.connections.reread()

    def refresh_ports(self) -> None:
        """Bring what is bound up to date."""
        self._measure()
        self.ports.refresh()

    def refresh_port(self, transport: Transport, port: int) -> None:
        """Bring what is bound to one port up to date."""
        self._measure()
        self.ports.refresh_port(transport, port)

    def connection(self, key: bytes) -> RawSocket | None:
        """The connection with these ends (`key_of`), as last seen."""
        if self._measured is None:
            self._measure()
        return self.connections.by_key.get(key)

    def bound(self, transport: Transport, port: int) -> list[RawSocket]:
        """What is bound to a port, as last seen."""
        if self._measured is None:
            self._measure()
        return self.ports.of_port(transport, port)

    def is_own(self, address: bytes) -> bool:
        """Whether some socket has this local address (network order): then it is one of the guest's own."""
        self._measure()
        return plain(address) in self._homes()

    # -- one socket --

    def check(self, raw: RawSocket) -> tuple[RawSocket, RawProcess | None] | None:
        """Read a remembered socket again, with its links and its owner; None when it is not the same any more.

        First what it is, then in a second batch its owner, its addresses, the links that lead to it, and it again,
        in this order: what was freed keeps its bytes for a while, but nothing leads to it.
        """
        span = raw.va - self._header, self._sizes[raw.kind.value]
        try:
            body = self._space.read(*span)
        except UnreadableMemory:
            return None
        for at, told in raw.marks:
            if body[at : at + len(told)] != told:
                return None
        fresh = self._renew(raw, body)
        if fresh is None:
            return None
        known = self._owners.get(fresh.owner) or (self.find_owner(fresh.owner) if fresh.owner else None)
        told_by = raw.pieces + self._proof(raw, body)
        spans = [] if known is None else [self._processes.span(known.va)]
        spans += [(va, len(told)) for va, told in told_by]
        spans.append(span)
        found = self._space.readv(spans)
        owner = None
        if known is not None:
            seen_owner = found.pop(0)
            owner = self._processes.parse(known.va, seen_owner) if seen_owner is not None else None
            is_it = owner is not None and (owner.pid, owner.created) == (known.pid, known.created)
            if owner is None or not is_it or not self._processes.is_sound(owner):
                self._owners.pop(known.va, None)
                return None
        for seen, (_, told) in zip(found, told_by, strict=False):
            if seen != told:
                return None
        again = found[-1]
        if again != body and not self._is_still(raw, fresh, again):
            return None
        return fresh, owner

    def find_owner(self, va: int) -> RawProcess | None:
        """The process at an address, None when there is none: then nobody is told."""
        found = self._processes.find(va)
        if found is None:
            self._owners.pop(va, None)
            return None
        if len(self._owners) >= MAX_OWNERS:
            self._owners.clear()
        self._owners[va] = found
        return found

    def doubt(self, raw: RawSocket) -> None:
        """Say that a connection is not what it was."""
        self.connections.doubt(raw)

    def is_trusted(self, raw: RawSocket) -> bool:
        """Whether the owner of such a socket may be told in this guest."""
        return raw.kind in self._trusted

    def build(self, raw: RawSocket, owner: RawProcess | None) -> GuestSocket:
        """A socket as people want to see it, with its owner and what is odd about both."""
        return self.build_all([(raw, owner)])[0]

    def build_all(self, owned: Sequence[tuple[RawSocket, RawProcess | None]]) -> list[GuestSocket]:
        """Many sockets; their owners are described together."""
        processes = {owner.va: owner for _, owner in owned if owner is not None}
        portraits = self._describe(processes.values())
        return [self._socket(raw, owner, portraits.get(owner.va) if owner else None) for raw, owner in owned]

    def own(self, raws: Iterable[RawSocket]) -> list[tuple[RawSocket, RawProcess | None]]:
        """Sockets with the processes that own them; each process is verified once."""
        raws = list(raws)
        found = {va: self.find_owner(va) for va in {raw.owner for raw in raws if raw.owner and self.is_trusted(raw)}}
        return [(raw, found.get(raw.owner) if self.is_trusted(raw) else None) for raw in raws]

    # -- private --

    def _homes(self) -> set[bytes]:
        now = self.connections.changes, self.ports.changes
        if now != self._homes_of:
            self._homes_of = now
            self._own = {plain(raw.local.ip.packed) for each in (self.connections, self.ports) for raw in each}
        return self._own

    def _describe(self, owners: Iterable[RawProcess]) -> dict[int, GuestProcess]:
        listed: list[RawProcess] = []
        hidden: list[RawProcess] = []
        for owner in owners:
            (listed if owner.exited or self._processes.is_listed(owner) else hidden).append(owner)
        found: dict[int, GuestProcess] = {}
        for group, is_hidden in ((listed, False), (hidden, True)):
            if group:
                described = self._processes.describe_all(group, hidden=is_hidden)
                found |= {owner.va: process for owner, process in zip(group, described, strict=True)}
        return found

    def _socket(self, raw: RawSocket, owner: RawProcess | None, process: GuestProcess | None) -> GuestSocket:
        exited = owner is not None and owner.exited != 0
        known = self._built.get(raw.va)
        if known is not None and known[1] is process and known[2] is exited and (known[0] is raw or known[0] == raw):
            return known[3]
        flags = []
        if process is not None and Flag.HIDDEN_PROCESS in process.flags:
            flags.append(Flag.HIDDEN_PROCESS)
        if raw.kind is Kind.TCP and raw.tables not in (0, BOTH):
            flags.append(Flag.ONE_TABLE_ONLY)
        if exited:
            flags.append(Flag.OWNER_EXITED)
        socket = GuestSocket(
            Transport.UDP if raw.kind is Kind.UDP else Transport.TCP,
            raw.state_name,
            raw.local,
            raw.remote,
            (Owner(process),) if process is not None else (),
            raw.compartment,
            raw.va,
            flags=tuple(flags),
        )
        if len(self._built) >= MAX_BUILT:
            self._built.clear()
        self._built[raw.va] = raw, process, exited, socket
        return socket

    def _measure(self, *, again: bool = False) -> Measured:
        """Find the layout; ``again``: there may be more to verify it with by now."""
        measured = self._measured
        if measured is not None and not again:
            return measured
        fresh = self._try_to_measure(measured)
        if measured is None or fresh.layout != measured.layout:
            self._use(fresh.layout)
        self._trusted = tuple(kind for kind in Kind if fresh.is_trusted(kind))
        self._measured = fresh
        return fresh

    def _try_to_measure(self, known: Measured | None) -> Measured:
        """A busy guest's connections may be torn just then: some tries, then what was found before."""
        for tries in range(1, TRIES + 1):
            listed = [each.va for each in self._processes.walk().processes]
            try:
                return Measure(self._kernel, self.symbol, listed, self._processes.is_process).measure()
            except UnsupportedGuest:
                if known is not None:
                    return known
                if tries == TRIES:
                    raise
        raise AssertionError

    def _is_due(self, measured: Measured) -> bool:
        """Whether to measure again: there is something that is not verified; ever more seldom if that is of no use."""
        there = frozenset(
            kind
            for kind, has in ((Kind.TCP, not self.connections.is_empty), *self.ports.kinds().items())
            if has and kind not in measured.verified
        )
        if not there:
            return False
        if not there <= self._doubted:
            self._doubted, self._patience = there, 1
            self._next_look = 0
        if self.looks < self._next_look:
            return False
        self._next_look = self.looks + self._patience
        self._patience = min(2 * self._patience, MAX_PATIENCE)
        return True

    def _renew(self, raw: RawSocket, body: bytes) -> RawSocket | None:
        """State and owner as they are now; None when they cannot be."""
        state_at, owner_at = self._places[raw.kind.value]
        state = raw.state if state_at is None else int.from_bytes(body[state_at : state_at + 4], "little")
        owner = 0 if owner_at is None else self._one.unpack_from(body, owner_at)[0]
        if state == raw.state and owner == raw.owner:
            return raw
        if state not in STATES:
            return None
        return raw._replace(state=state, owner=owner if self._kernel.is_kernel(owner) else 0)

    def _is_still(self, raw: RawSocket, fresh: RawSocket, body: bytes | None) -> bool:
        """Whether the second read tells what the first one told."""
        if body is None or any(body[at : at + len(told)] != told for at, told in raw.marks):
            return False
        return self._renew(raw, body) == fresh

    def _proof(self, raw: RawSocket, body: bytes) -> tuple[Piece, ...]:
        """The links that lead to a socket. None lead to what is in no table; of TIME_WAIT nobody is named anyway."""
        if raw.kind in (Kind.LISTENER, Kind.UDP):
            return self.ports.proof(raw)
        if raw.kind is Kind.TIME_WAIT or not raw.tables:
            return ()
        link = self._links[0] if raw.tables & FIRST else self._links[1]
        after, before = self._pair.unpack_from(body, self._header + link)
        entry = self._one.pack(raw.va + link)
        return (after + self._kernel.pointer_size, entry), (before, entry)

    def _use(self, layout: Layout) -> None:
        """Read with this layout from now on."""
        table, count = self.symbol("PartitionTable"), self.symbol("PartitionCount")
        assert table is not None and count is not None  # or it could not be measured
        self.connections = Connections(self._kernel, Partitions(self._kernel, table, count), layout)
        self.ports = Ports(self._kernel, Compartments(self._kernel, self.symbol, layout), layout)
        pointer, header, past = self._kernel.pointer_size, self._header, layout.time_wait
        self._links = layout.tcp.links
        self._sizes = {
            Kind.TCP.value: header + layout.tcp.size(pointer),
            Kind.LISTENER.value: header + layout.listener.size(pointer),
            Kind.UDP.value: header + layout.udp.size(pointer),
            Kind.TIME_WAIT.value: header + (past.size(pointer) if past else 0),
        }
        self._places = {
            Kind.TCP.value: (header + layout.tcp.state, header + layout.tcp.owner),
            Kind.LISTENER.value: (None, header + layout.listener.owner),
            Kind.UDP.value: (None, header + layout.udp.owner),
            Kind.TIME_WAIT.value: (None, None),
        }
