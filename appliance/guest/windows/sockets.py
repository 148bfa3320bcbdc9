"""All sockets of a Windows guest since Vista: found, kept up to date, checked again, owned and described.

The tables are read with a layout that `measure` has verified in this very guest. An owner is only told when its address
is that of a process (type of object, page tables, threads that lead back), and a socket that is remembered only after
its memory, its links and its owner were read again.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.compartments import Compartments
from appliance.guest.windows.endpoints import BOTH, Connections, Kind, Partitions, RawSocket
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import STATES, Layout
from appliance.guest.windows.measure import Measure, Measured
from appliance.guest.windows.ports import Ports
from appliance.guest.windows.processes import Processes, RawProcess
from appliance.model import Flag, Gap, GuestProcess, GuestSocket, Owner, Transport

TCPIP: Final = "tcpip.sys"
MAX_OWNERS: Final = 1 << 16  # processes remembered as owners


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
        self._owners: dict[int, RawProcess] = {}
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
        measured = self._measure(again=True)
        before = self.torn
        self.connections.walk()
        self.ports.walk()
        gaps = [*self.connections.gaps, *self.ports.gaps]
        gaps += [Gap("layout of tcpip.sys", self._base, doubt) for doubt in measured.doubts]
        return SocketList([*self.connections, *self.ports], gaps, self.torn - before)

    def refresh_connections(self) -> None:
        """Bring the connections up to date."""
        self._measure()
        self.connections.refresh()

    def refresh_ports(self) -> None:
        """Bring what is bound up to date."""
        self._measure()
        self.ports.refresh()

    def connection(self, key: bytes) -> RawSocket | None:
        """The connection with these ends (`key_of`), as last seen."""
        self._measure()
        return self.connections.by_key.get(key)

    def bound(self, transport: Transport, port: int) -> list[RawSocket]:
        """What is bound to a port, as last seen."""
        self._measure()
        return self.ports.of_port(transport, port)

    # -- one socket --

    def check(self, raw: RawSocket) -> tuple[RawSocket, RawProcess | None] | None:
        """Read a remembered socket again, with its links and its owner; None when it is not the same any more.

        First what it is and who owns it, then, in a second batch, whether it still is that and still is linked: what
        was freed keeps its bytes for a while, but nothing leads to it.
        """
        spans, size = self._spans(raw)
        known = self._owners.get(raw.owner)
        owner_span = [self._processes.span(raw.owner)] if known is not None else []
        links = self.ports.proof(raw) if raw.kind in (Kind.LISTENER, Kind.UDP) else ()
        first = self._readv([*spans, *owner_span, *((va, len(told)) for va, told in links)])
        body = first[0]
        if body is None or not self._is_same(raw, first):
            return None
        at = len(spans) + len(owner_span)
        if any(seen != told for seen, (_, told) in zip(first[at:], links, strict=True)):
            return None
        fresh = self._renew(raw, body)
        if fresh.state not in STATES:
            return None
        again = self._neighbours(raw, body)
        second = self._readv([(raw.va - self._header, size), *(span for span, _ in again)])
        if second[0] is None or any(second[0][at : at + len(told)] != told for at, told in raw.marks):
            return None
        if any(seen != told for seen, (_, told) in zip(second[1:], again, strict=True)):
            return None
        if self._renew(raw, second[0]) != fresh:
            return None
        if not fresh.owner:
            return fresh, None
        owner_raw = first[len(spans)] if owner_span else None
        if known is not None and fresh.owner == raw.owner and owner_raw is not None:
            owner = self._processes.parse(raw.owner, owner_raw)
            if owner.key == known.key and self._processes.is_sound(owner):
                return fresh, owner
        return fresh, self.find_owner(fresh.owner)

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

    def is_trusted(self, raw: RawSocket) -> bool:
        """Whether the owner of such a socket may be told in this guest."""
        return self._measure().is_trusted(raw.kind)

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
        flags = []
        if process is not None and Flag.HIDDEN_PROCESS in process.flags:
            flags.append(Flag.HIDDEN_PROCESS)
        if raw.kind is Kind.TCP and raw.tables not in (0, BOTH):
            flags.append(Flag.ONE_TABLE_ONLY)
        if owner is not None and owner.exited:
            flags.append(Flag.OWNER_EXITED)
        return GuestSocket(
            Transport.UDP if raw.kind is Kind.UDP else Transport.TCP,
            raw.state_name,
            raw.local,
            raw.remote,
            (Owner(process),) if process is not None else (),
            raw.compartment,
            raw.va,
            flags=tuple(flags),
        )

    def _measure(self, *, again: bool = False) -> Measured:
        """Find the layout; ``again``: when it is not verified yet, there may be more to verify it with by now."""
        measured = self._measured
        kinds = {Kind.TCP, Kind.LISTENER, Kind.UDP}
        if measured is not None and (not again or measured.verified >= kinds):
            return measured
        listed = [each.va for each in self._processes.walk().processes]
        fresh = Measure(self._kernel, self.symbol, listed, self._processes.is_process).measure()
        if measured is None or fresh.layout != measured.layout:
            table, count = self.symbol("PartitionTable"), self.symbol("PartitionCount")
            assert table is not None and count is not None  # or it could not be measured
            layout = fresh.layout
            self.connections = Connections(self._kernel, Partitions(self._kernel, table, count), layout)
            self.ports = Ports(self._kernel, Compartments(self._kernel, self.symbol, layout), layout)
        self._measured = fresh
        return fresh

    def _spans(self, raw: RawSocket) -> tuple[list[tuple[int, int]], int]:
        """What to read of a socket: its body from its pool header on, then its addresses."""
        size = self._header + self._size(raw.kind)
        return [(raw.va - self._header, size), *((va, len(told)) for va, told in raw.pieces)], size

    def _size(self, kind: Kind) -> int:
        layout, pointer = self.layout, self._kernel.pointer_size
        match kind:
            case Kind.TCP:
                return layout.tcp.size(pointer)
            case Kind.LISTENER:
                return layout.listener.size(pointer)
            case Kind.UDP:
                return layout.udp.size(pointer)
            case Kind.TIME_WAIT:
                return layout.time_wait.size(pointer) if layout.time_wait else 0

    def _is_same(self, raw: RawSocket, found: list[bytes | None]) -> bool:
        body = found[0]
        if body is None or any(body[at : at + len(told)] != told for at, told in raw.marks):
            return False
        return all(seen == told for seen, (_, told) in zip(found[1:], raw.pieces, strict=False))

    def _renew(self, raw: RawSocket, body: bytes) -> RawSocket:
        """State and owner as they are now."""
        layout = self.layout
        match raw.kind:
            case Kind.TIME_WAIT:
                return raw
            case Kind.TCP:
                place = layout.tcp.owner
                at = self._header + layout.tcp.state
                state = int.from_bytes(body[at : at + 4], "little")
            case _:
                place = layout.listener.owner if raw.kind is Kind.LISTENER else layout.udp.owner
                state = raw.state
        owner = self._one.unpack_from(body, self._header + place)[0]
        owner = owner if self._kernel.is_kernel(owner) else 0
        if (state, owner) == (raw.state, raw.owner):
            return raw
        return replace(raw, state=state, owner=owner)

    def _neighbours(self, raw: RawSocket, body: bytes) -> list[tuple[tuple[int, int], bytes]]:
        """Of a connection: the links of its neighbours that must lead back to it."""
        if raw.kind is not Kind.TCP:
            return []
        pointer = self._kernel.pointer_size
        found = []
        for bit, link in enumerate(self.layout.tcp.links):
            if not raw.tables >> bit & 1:
                continue
            at = self._header + link
            entry = self._one.pack(raw.va + link)
            after = self._one.unpack_from(body, at)[0]
            before = self._one.unpack_from(body, at + pointer)[0]
            found += [((after + pointer, pointer), entry), ((before, pointer), entry)]
            break  # one table is proof enough that it lives
        return found

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.space.readv(spans)
