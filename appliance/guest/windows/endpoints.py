"""TCP connections of Vista and later: ``tcpip!PartitionTable``, its partitions, their hash tables, all chains.

A partition points to three tables of the kind `hashtables` walks. Each _TCP_ENDPOINT is in two of them, by two links
inside it: whoever hides a connection must take it out of both. An endpoint is believed when its pool tag, its state,
its ports, its address family and its addresses can be true; connections in TIME_WAIT (their own, smaller object) are
told by their tag wherever they are linked.
Sources: tcpip.pdb (PartitionTable, PartitionCount), `layouts`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from appliance.errors import Implausible
from appliance.guest.windows.addresses import Addresses, Pair, Piece, ip_of, plain, tag_of
from appliance.guest.windows.hashtables import Fetch, HashTables
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import (
    STATES,
    TCP_TAGS,
    TIME_WAIT,
    TIME_WAIT_TAGS,
    Layout,
    TimeWait,
)
from appliance.model import Endpoint, Gap

MAX_PARTITIONS: Final = 1024  # there is one for each processor
COUNT_SIZE: Final = 4  # PartitionCount is a ULONG
FIRST, SECOND, BOTH = 1, 2, 3  # bits of RawSocket.tables
TRIES: Final = 3


class Kind(Enum):
    """What kind of object a socket is; the value is the name of its structure."""

    TCP = "_TCP_ENDPOINT"
    TIME_WAIT = "_TCP_TIMEWAIT_ENDPOINT"
    LISTENER = "_TCP_LISTENER"
    UDP = "_UDP_ENDPOINT"


@dataclass(frozen=True, slots=True)
class RawSocket:
    """One socket of the guest, as read at one instant. ``marks`` and ``pieces`` are what makes it this very socket."""

    kind: Kind
    va: int
    state: int  # TCPStateEnum
    family: int  # AF_INET or AF_INET6, as Windows counts them
    local: Endpoint
    remote: Endpoint | None
    owner: int  # _EPROCESS; 0: it has none
    key: bytes  # both ends as packets carry them
    tables: int = 0  # of a connection: bits FIRST and SECOND
    compartment: int = 1
    marks: tuple[tuple[int, bytes], ...] = ()  # offsets in what `span` reads
    pieces: tuple[Piece, ...] = ()  # its addresses

    @property
    def state_name(self) -> str:
        """The state, as Linux calls it."""
        return STATES.get(self.state, "CLOSE")


def key_of(local: bytes, local_port: int, remote: bytes = b"", remote_port: int = 0) -> bytes:
    """What a connection is found by: addresses in network order, v4-mapped ones as IPv4."""
    return b"%b%d.%b%d" % (plain(local), local_port, plain(remote), remote_port)


class Partitions:
    """Where the hash tables of all partitions are."""

    def __init__(self, kernel: WindowsKernel, table: int, count: int) -> None:
        """``table`` and ``count`` are the addresses of the symbols PartitionTable and PartitionCount."""
        self._kernel, self._table, self._count = kernel, table, count
        self._seen: tuple[bytes, ...] = ()

    def find(self, layout: Layout) -> list[tuple[int, int]] | None:
        """Address and kind of each table; None when nothing has changed since the last call.

        Raises UnreadableMemory, Implausible.
        """
        space, pointer = self._kernel.space, layout.pointer
        head = space.read(self._table, pointer)
        raw_count = space.read(self._count, COUNT_SIZE)
        base, count = int.from_bytes(head, "little"), int.from_bytes(raw_count, "little")
        if not self._kernel.is_kernel(base) or base % pointer:
            raise Implausible("tcpip's PartitionTable leads nowhere")
        if not 0 < count <= MAX_PARTITIONS:
            raise Implausible(f"tcpip says it has {count} partitions")
        stride = layout.stride
        parts = space.readv([(base + index * stride, 3 * pointer) for index in range(count)])
        seen = (head, raw_count, *(part or b"" for part in parts))
        if seen == self._seen:
            return None
        found = []
        for part in parts:
            if part is None:
                continue
            for kind, at in enumerate(layout.tables):
                va = int.from_bytes(part[at : at + pointer], "little")
                if self._kernel.is_kernel(va) and not va % pointer:
                    found.append((va, kind))
        if not found:
            raise Implausible("no partition of tcpip's has a table")
        self._seen = seen
        return found

    def forget(self) -> None:
        """Find them anew."""
        self._seen = ()


class Connections:
    """All TCP connections of one guest, kept up to date."""

    def __init__(self, kernel: WindowsKernel, partitions: Partitions, layout: Layout) -> None:
        self._kernel, self._partitions, self.layout = kernel, partitions, layout
        self._hashes = HashTables(kernel)
        self._addresses = Addresses(kernel, layout)
        self._pair = struct.Struct("<QQ" if layout.pointer == 8 else "<II")
        self._one = struct.Struct("<Q" if layout.pointer == 8 else "<I")
        self._header = 2 * layout.pointer  # _POOL_HEADER
        self._size = self._header + layout.tcp.size(layout.pointer)
        self._fetch = tuple(Fetch(link + self._header, self._size) for link in layout.tcp.links)
        self._seen_changes = -1
        self._connections: dict[int, RawSocket] = {}
        self._waiting: dict[int, RawSocket] = {}  # by the address of an entry
        self._doubtful: set[int] = set()  # entries that are part of neither
        self._torn = 0
        self.by_key: dict[bytes, RawSocket] = {}
        self.gaps: list[Gap] = []

    @property
    def torn(self) -> int:
        """Chains and endpoints that contradicted themselves, since the start."""
        return self._hashes.torn + self._torn

    def __iter__(self) -> Iterator[RawSocket]:
        yield from self._connections.values()
        yield from {raw.va: raw for raw in self._waiting.values()}.values()

    def walk(self) -> None:
        """Read everything afresh. What is found in doubt, or in one table only, is looked at again."""
        self.refresh(whole=True)
        for _ in range(TRIES - 1):
            if not self._doubtful and all(raw.tables == BOTH for raw in self._connections.values()):
                break
            self.refresh()

    def refresh(self, *, whole: bool = False) -> None:
        """Bring the connections up to date; ``whole``: read every one afresh. Raises GuestError."""
        if whole:
            self._partitions.forget()
        tables = self._partitions.find(self.layout)
        if tables is not None:
            self._hashes.open(tables)
        gaps = self._hashes.refresh(self._fetch, whole=whole)
        if whole or self._hashes.changes != self._seen_changes or self._doubtful:
            self._take(whole=whole)
            self._seen_changes = self._hashes.changes
        if self._doubtful:
            why = f"{len(self._doubtful)} entries are no connections that can be"
            gaps.append(Gap("connection table", min(self._doubtful), why))
        self.gaps = gaps

    # -- objects --

    def _take(self, *, whole: bool) -> None:
        """Parse what is new, drop what has left."""
        links = self.layout.tcp.links
        bits: dict[int, int] = {}  # by the address of what may be a connection: the tables it is in
        entries: set[int] = set()  # that are part of no connection
        for table in self._hashes.tables:
            for chain in table.chains.values():
                if table.kind < len(links):
                    link, bit = links[table.kind], 1 << table.kind
                    for entry in chain:
                        bits[entry - link] = bits.get(entry - link, 0) | bit
                else:
                    entries.update(chain)
        connections, waiting = ({}, {}) if whole else (self._connections, self._waiting)
        kept: dict[int, RawSocket] = {}
        fresh = []
        read_again = self._hashes.fetched  # its chain has changed, so it may be another one by now
        for va, tables in bits.items():
            known = connections.get(va)
            if known is not None and va - self._header not in read_again:
                kept[va] = known if known.tables == tables else replace(known, tables=tables)
            elif not any(va + link in waiting for link in links):
                fresh.append(va)
            else:
                entries.update(self._entries(va, tables))
        for va, raw in self._parse(fresh, bits).items():
            if raw is None:
                entries.update(self._entries(va, bits[va]))
            else:
                kept[va] = raw
        self._connections = kept
        self._waiting = {entry: raw for entry, raw in waiting.items() if entry in entries}
        self._waiting |= self._parse_waiting(entries - self._waiting.keys())
        ours = {va + link for va in bits for link in links}
        self._doubtful = {entry for entry in entries if entry in ours and entry not in self._waiting}
        self._torn += len(self._doubtful)
        self.by_key = {raw.key: raw for raw in self._waiting.values()}
        self.by_key |= {raw.key: raw for raw in kept.values()}

    def _entries(self, va: int, tables: int) -> list[int]:
        return [va + link for bit, link in enumerate(self.layout.tcp.links) if tables >> bit & 1]

    def _parse(self, vas: Sequence[int], bits: Mapping[int, int]) -> dict[int, RawSocket | None]:
        """Connections among objects, by their address; None where there is none."""
        known = self._hashes.fetched
        wanted = [va for va in vas if va - self._header not in known]
        read = dict(zip(wanted, self._readv([(va - self._header, self._size) for va in wanted]), strict=True))
        found: dict[int, RawSocket | None] = dict.fromkeys(vas)
        tcp, header = self.layout.tcp, self._header
        sound: list[tuple[int, bytes]] = []
        pointers = []
        for va in vas:
            raw = known.get(va - header) or read.get(va)
            if raw is None or tag_of(raw) not in TCP_TAGS:
                continue
            if int.from_bytes(raw[header + tcp.state : header + tcp.state + 4], "little") in STATES:
                sound.append((va, raw))
                pointers.append(self._pointers(raw))
        for (va, raw), pair in zip(sound, self._addresses.pairs(pointers), strict=True):
            if pair is not None:
                found[va] = self._connection(va, raw, pair, bits.get(va, 0))
        return found

    def _pointers(self, raw: bytes) -> tuple[int, int]:
        tcp, header = self.layout.tcp, self._header
        return (
            self._one.unpack_from(raw, header + tcp.inet_af)[0],
            self._one.unpack_from(raw, header + tcp.addr_info)[0],
        )

    def _connection(self, va: int, raw: bytes, pair: Pair, tables: int) -> RawSocket | None:
        tcp, header = self.layout.tcp, self._header
        local_port, remote_port = (
            int.from_bytes(raw[header + at : header + at + 2], "big") for at in (tcp.local_port, tcp.remote_port)
        )
        if not local_port:
            return None
        owner = self._one.unpack_from(raw, header + tcp.owner)[0]
        return RawSocket(
            Kind.TCP,
            va,
            int.from_bytes(raw[header + tcp.state : header + tcp.state + 4], "little"),
            pair.family,
            Endpoint(ip_of(pair.local), local_port),
            Endpoint(ip_of(pair.remote), remote_port),
            owner if self._kernel.is_kernel(owner) else 0,
            key_of(pair.local, local_port, pair.remote, remote_port),
            tables,
            marks=marks_of(raw, header, (tcp.inet_af, tcp.addr_info), (tcp.local_port, tcp.remote_port)),
            pieces=pair.pieces,
        )

    def _parse_waiting(self, entries: Iterable[int]) -> dict[int, RawSocket]:
        """Connections in TIME_WAIT among entries, by entry."""
        layout = self.layout.time_wait
        found: dict[int, RawSocket] = {}
        if layout is None:
            return found
        size = self._header + layout.size(self.layout.pointer)
        for link in layout.links:
            wanted = [entry for entry in entries if entry not in found]
            raws = self._readv([(entry - link - self._header, size) for entry in wanted])
            sound = [
                (entry, raw)
                for entry, raw in zip(wanted, raws, strict=True)
                if raw is not None and tag_of(raw) in TIME_WAIT_TAGS
            ]
            pointers = [
                (
                    self._one.unpack_from(raw, self._header + layout.inet_af)[0],
                    self._one.unpack_from(raw, self._header + layout.local)[0],
                    self._one.unpack_from(raw, self._header + layout.remote)[0],
                )
                for _, raw in sound
            ]
            for (entry, raw), pair in zip(sound, self._addresses.waiting(pointers), strict=True):
                if pair is not None:
                    found[entry] = self._past(entry - link, raw, pair, layout)
        return found

    def _past(self, va: int, raw: bytes, pair: Pair, layout: TimeWait) -> RawSocket:
        header = self._header
        local_port, remote_port = (
            int.from_bytes(raw[header + at : header + at + 2], "big") for at in (layout.local_port, layout.remote_port)
        )
        return RawSocket(
            Kind.TIME_WAIT,
            va,
            TIME_WAIT,
            pair.family,
            Endpoint(ip_of(pair.local), local_port),
            Endpoint(ip_of(pair.remote), remote_port),
            0,
            key_of(pair.local, local_port, pair.remote, remote_port),
            marks=marks_of(raw, header, (layout.inet_af,), (layout.local_port, layout.remote_port)),
            pieces=pair.pieces,
        )

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.space.readv(spans) if spans else []


def marks_of(raw: bytes, header: int, pointers: Iterable[int], ports: Iterable[int]) -> tuple[tuple[int, bytes], ...]:
    """What must not change in an object while it is the same one: its pool tag, these pointers, these ports."""
    pointer = header // 2
    places = [(4, 4), *((header + at, pointer) for at in pointers), *((header + at, 2) for at in ports)]
    return tuple((at, raw[at : at + size]) for at, size in places)
