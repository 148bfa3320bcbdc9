"""TCP connections of Vista and later: ``tcpip!PartitionTable``, its partitions, their hash tables, all chains.

A partition points to three tables of the kind `hashtables` walks. Each _TCP_ENDPOINT is in two of them, by two links
inside it: whoever hides a connection must take it out of both. An endpoint is believed when its pool tag, its state,
its ports, its address family and its addresses can be true; connections in TIME_WAIT (their own, smaller object) are
told by their tag wherever they are linked.
Sources: tcpip.pdb (PartitionTable, PartitionCount), `layouts`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Final, NamedTuple

from appliance.errors import GuestError, Implausible
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


_PORTS = struct.Struct(">HH")  # the local one, the remote one


class Kind(Enum):
    """What kind of object a socket is; the value is the name of its structure."""

    TCP = "_TCP_ENDPOINT"
    TIME_WAIT = "_TCP_TIMEWAIT_ENDPOINT"
    LISTENER = "_TCP_LISTENER"
    UDP = "_UDP_ENDPOINT"


class RawSocket(NamedTuple):
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
    marks: tuple[tuple[int, bytes], ...] = ()  # offsets from its pool header
    pieces: tuple[Piece, ...] = ()  # its addresses

    @property
    def state_name(self) -> str:
        """The state, as Linux calls it."""
        return STATES.get(self.state, "CLOSE")


def key_of(local: bytes, local_port: int, remote: bytes = b"", remote_port: int = 0) -> bytes:
    """What a connection is found by: addresses in network order, v4-mapped ones as IPv4."""
    return plain(local) + _PORTS.pack(local_port, remote_port) + plain(remote)


class Partitions:
    """Where the hash tables of all partitions are."""

    def __init__(self, kernel: WindowsKernel, table: int, count: int) -> None:
        """``table`` and ``count`` are the addresses of the symbols PartitionTable and PartitionCount."""
        self._kernel, self._table, self._count = kernel, table, count
        self._spans: list[tuple[int, int]] = []
        self._seen: tuple[bytes | None, ...] = ()  # what was read there
        self.lacking = 0  # partitions without one of the tables that connections are in

    def find(self, layout: Layout) -> list[tuple[int, int]] | None:
        """Address and kind of each table; None when nothing has changed since the last call.

        Raises UnreadableMemory, Implausible.
        """
        space, pointer = self._kernel.space, layout.pointer
        if self._seen and tuple(space.readv(self._spans)) == self._seen:
            return None
        head = space.read(self._table, pointer)
        raw_count = space.read(self._count, COUNT_SIZE)
        base, count = int.from_bytes(head, "little"), int.from_bytes(raw_count, "little")
        if not self._kernel.is_kernel(base) or base % pointer:
            raise Implausible("tcpip's PartitionTable leads nowhere")
        if not 0 < count <= MAX_PARTITIONS:
            raise Implausible(f"tcpip says it has {count} partitions")
        stride = layout.stride
        places = [(base + index * stride, 3 * pointer) for index in range(count)]
        parts = space.readv(places)
        found = []
        self.lacking = 0
        for part in parts:
            whole = 0
            for kind, at in enumerate(layout.tables):
                va = int.from_bytes(part[at : at + pointer], "little") if part else 0
                if self._kernel.is_kernel(va) and not va % pointer:
                    found.append((va, kind))
                    whole += kind < len(layout.tcp.links)
            self.lacking += whole < len(layout.tcp.links)
        if not found:
            raise Implausible("no partition of tcpip's has a table")
        self._spans = [(self._table, pointer), (self._count, COUNT_SIZE), *places]
        self._seen = (head, raw_count, *parts)
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
        tcp, header = layout.tcp, self._header
        self._state_at, self._owner_at = header + tcp.state, header + tcp.owner
        places = [(4, 4), (header + tcp.inet_af, header), (header + tcp.local_port, 4)]
        places += [(header + link + 2 * layout.pointer, layout.pointer) for link in tcp.links]
        self._print_at = tuple(sorted((at, at + size) for at, size in places))
        self._fetch = tuple(Fetch(link + self._header, self._size) for link in layout.tcp.links)
        self._bits: dict[int, int] = {}  # by the address of what may be a connection: the tables it is in
        self._loose: set[int] = set()  # entries of other tables
        self._connections: dict[int, RawSocket] = {}
        self._prints: dict[int, bytes] = {}  # of them: what tells one from the next that is made in its place
        self._waiting: dict[int, RawSocket] = {}  # by the address of an entry
        self._doubtful: set[int] = set()  # what may be a connection, and is none
        self._torn = 0
        self.by_key: dict[bytes, RawSocket] = {}
        self.gaps: list[Gap] = []
        self.changes = 0  # how often something was found other than before

    @property
    def torn(self) -> int:
        """Chains and endpoints that contradicted themselves, since the start."""
        return self._hashes.torn + self._torn

    @property
    def is_empty(self) -> bool:
        """Whether no table leads anywhere."""
        return not self._bits

    def __iter__(self) -> Iterator[RawSocket]:
        yield from self._connections.values()
        yield from {raw.va: raw for raw in self._waiting.values()}.values()

    def walk(self) -> None:
        """Read everything afresh. What is found in doubt, or in one table only, is looked at again."""
        self.refresh(whole=True)
        for _ in range(TRIES - 1):
            if not self.gaps and all(raw.tables == BOTH for raw in self._connections.values()):
                break
            self.refresh()

    def refresh(self, *, whole: bool = False) -> None:
        """Bring the connections up to date; ``whole``: read every one afresh. Raises GuestError."""
        if whole:
            self._partitions.forget()
        try:
            tables = self._partitions.find(self.layout)
            if tables is not None:
                self._hashes.open(tables)
            gaps = self._hashes.refresh(self._fetch, whole=whole)
            if self._hashes.is_new or self._hashes.changed or self._doubtful:
                self._take()
        except GuestError:
            self._partitions.forget()  # half of it is known: start over next time
            raise
        if self._partitions.lacking:
            gaps.append(Gap("connection table", 0, f"{self._partitions.lacking} partitions lack a table"))
        if self._doubtful:
            why = f"{len(self._doubtful)} entries are no connections that can be"
            gaps.append(Gap("connection table", min(self._doubtful), why))
        self.gaps = gaps

    def reread(self) -> None:
        """`refresh`, and parse anew what is another one by now: used again at once, it shows in no table's head."""
        known = list(self._connections)
        bodies = self._readv([(va - self._header, self._print_at[-1][1]) for va in known])
        for va, body in zip(known, bodies, strict=True):
            if body is None or self._print(body) != self._prints.get(va):
                self._prints.pop(va, None)
                self._doubtful.add(va)
        self.refresh()

    def at(self, vas: Sequence[int]) -> list[RawSocket]:
        """Connections at addresses to which no table leads; what is none is left out. Raises OutOfTime, GuestGone."""
        return [raw for raw in self._parse(vas).values() if raw is not None]

    def waiting_at(self, vas: Sequence[int]) -> list[RawSocket]:
        """Connections in TIME_WAIT at addresses to which no table leads. Raises OutOfTime, GuestGone."""
        layout = self.layout.time_wait
        return list(self._parse_waiting([va + layout.links[0] for va in vas]).values()) if layout else []

    def doubt(self, raw: RawSocket) -> None:
        """Say that one is not what it was: the next refresh parses what is there now."""
        if raw.va in self._connections:
            self._prints.pop(raw.va, None)
            self._doubtful.add(raw.va)

    # -- objects --

    def _take(self) -> None:
        """Parse what is new, drop what has left."""
        self.changes += 1
        known: dict[int, RawSocket] = {}
        prints: dict[int, bytes] = {}
        changed: Sequence[tuple[int, Sequence[int], Sequence[int]]]
        if self._hashes.is_new:
            known, prints = self._connections, self._prints
            self._bits, self._loose, self._connections, self._waiting, self.by_key = {}, set(), {}, {}, {}
            self._prints = {}
            self._doubtful = set()
            tables = self._hashes.tables
            changed = [(table.kind, (), chain) for table in tables for chain in table.chains.values()]
            self._hashes.is_new = False
        else:
            changed = [
                (table.kind, before, table.chains.get(bucket, ()))
                for (_, bucket), (table, before) in self._hashes.changed.items()
            ]
        touched = self._relink(changed)
        loose = self._reloose(changed)
        self._take_over([raw for va, raw in known.items() if va in touched and va in prints], prints)
        self._parse_all(touched | self._doubtful, loose)

    def _take_over(self, known: Sequence[RawSocket], prints: dict[int, bytes]) -> None:
        """Connections of before whose addresses are still where they were; whether each is the same, `_keep` sees."""
        places = list({piece for raw in known for piece in raw.pieces})
        seen = self._readv([(va, len(told)) for va, told in places])
        same = {piece for piece, now in zip(places, seen, strict=True) if piece[1] == now}
        for raw in known:
            if same.issuperset(raw.pieces):
                self._connections[raw.va], self._prints[raw.va] = raw, prints[raw.va]
                self.by_key[raw.key] = raw

    def _reloose(self, changed: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> set[int]:
        """The same for entries of tables in which no connections are."""
        fresh: set[int] = set()
        for kind, before, after in changed:
            if kind >= len(self.layout.tcp.links):
                self._loose.difference_update(before)
                self._forget_waiting(before)
                self._loose.update(after)
                fresh.update(after)
        return fresh

    def _relink(self, changed: Sequence[tuple[int, Sequence[int], Sequence[int]]]) -> set[int]:
        """Note who left and who came, by kind of table. Returns what has to be parsed: all that is in these chains."""
        links, bits = self.layout.tcp.links, self._bits
        touched: set[int] = set()
        for kind, before, _ in changed:
            if kind >= len(links):
                continue
            link, bit = links[kind], 1 << kind
            for entry in before:
                va = entry - link
                bits[va] = bits.get(va, 0) & ~bit
                touched.add(va)
        for kind, _, after in changed:  # only now: an object may have moved from one chain to another
            if kind < len(links):
                link, bit = links[kind], 1 << kind
                for entry in after:
                    va = entry - link
                    bits[va] = bits.get(va, 0) | bit
                    touched.add(va)
        self._forget_waiting(va + link for va in touched for link in links)
        for va in [va for va in touched if not bits[va]]:
            del bits[va]
            touched.discard(va)
            self._drop(va)
        return touched

    def _drop(self, va: int) -> None:
        self._doubtful.discard(va)
        self._prints.pop(va, None)
        gone = self._connections.pop(va, None)
        if gone is not None and self.by_key.get(gone.key) is gone:
            del self.by_key[gone.key]

    def _forget_waiting(self, entries: Iterable[int]) -> None:
        for entry in entries if self._waiting else ():
            gone = self._waiting.pop(entry, None)
            if gone is not None and self.by_key.get(gone.key) is gone:
                del self.by_key[gone.key]

    def _parse_all(self, vas: set[int], loose: set[int]) -> None:
        """Parse connections, or what is left of them, and index them. ``loose``: entries that are no connections."""
        wanted = [va for va in vas & self._bits.keys() if not self._keep(va)]
        strangers = []
        for va, raw in self._parse(wanted).items():
            if va in self._connections:
                self._drop(va)
            if raw is None:
                strangers.append(va)
            else:
                self._connections[va] = raw
                self.by_key[raw.key] = raw
                body = self._hashes.fetched.get(va - self._header)
                if body is not None:
                    self._prints[va] = self._print(body)
        found = self._parse_waiting(loose.union(*(self._entries(va) for va in strangers)))
        self._waiting |= found
        for past in found.values():
            self.by_key.setdefault(past.key, past)
        self._doubtful = {va for va in strangers if not any(entry in found for entry in self._entries(va))}
        self._torn += len(self._doubtful)

    def _keep(self, va: int) -> bool:
        """Whether a connection is the one that is known already; what it says anew is taken in."""
        told, body = self._prints.get(va), self._hashes.fetched.get(va - self._header)
        if told is None or body is None or self._print(body) != told:
            return False
        raw = self._connections[va]
        state = int.from_bytes(body[self._state_at : self._state_at + 4], "little")
        owner = self._one.unpack_from(body, self._owner_at)[0]
        owner = owner if self._kernel.is_kernel(owner) else 0
        if (state, owner, self._bits[va]) != (raw.state, raw.owner, raw.tables):
            if state not in STATES:
                return False
            fresh = self._connections[va] = raw._replace(state=state, owner=owner, tables=self._bits[va])
            if self.by_key.get(raw.key) is raw:
                self.by_key[raw.key] = fresh
        return True

    def _print(self, body: bytes) -> bytes:
        """Tag, INETAF, ADDRINFO, ports and Signature (the hash of both ends, once for each table)."""
        return b"".join([body[at:end] for at, end in self._print_at])

    def _entries(self, va: int) -> list[int]:
        tables = self._bits[va]
        return [va + link for bit, link in enumerate(self.layout.tcp.links) if tables >> bit & 1]

    def _parse(self, vas: Sequence[int]) -> dict[int, RawSocket | None]:
        """Connections among objects, by their address; None where there is none."""
        known = self._hashes.fetched
        wanted = [va for va in vas if va - self._header not in known]
        read = dict(zip(wanted, self._readv([(va - self._header, self._size) for va in wanted]), strict=True))
        found: dict[int, RawSocket | None] = dict.fromkeys(vas)
        tcp, header = self.layout.tcp, self._header
        sound: list[tuple[int, bytes, int, int, int]] = []
        pointers = []
        state_at, ports_at = self._state_at, header + tcp.local_port
        for va in vas:
            raw = known.get(va - header) or read.get(va)
            if raw is None or tag_of(raw) not in TCP_TAGS:
                continue
            state = int.from_bytes(raw[state_at : state_at + 4], "little")
            local_port, remote_port = _PORTS.unpack_from(raw, ports_at)
            if state in STATES and local_port:
                sound.append((va, raw, state, local_port, remote_port))
                pointers.append(self._pair.unpack_from(raw, header + tcp.inet_af))
        owner_at, af_at, is_kernel = self._owner_at, header + tcp.inet_af, self._kernel.is_kernel
        for (va, raw, state, local_port, remote_port), pair in zip(sound, self._addresses.pairs(pointers), strict=True):
            if pair is None:
                continue
            owner = self._one.unpack_from(raw, owner_at)[0]
            owner = owner if is_kernel(owner) else 0
            marks = (4, raw[4:8]), (af_at, raw[af_at : af_at + header]), (ports_at, raw[ports_at : ports_at + 4])
            found[va] = RawSocket(
                Kind.TCP,
                va,
                state,
                pair.family,
                Endpoint(ip_of(pair.local), local_port),
                Endpoint(ip_of(pair.remote), remote_port),
                owner,
                plain(pair.local) + raw[ports_at : ports_at + 4] + plain(pair.remote),  # see `key_of`
                self._bits.get(va, 0),
                1,
                marks,
                pair.pieces,
            )
        return found

    def _parse_waiting(self, entries: Iterable[int]) -> dict[int, RawSocket]:
        """Connections in TIME_WAIT among entries, by entry."""
        layout = self.layout.time_wait
        found: dict[int, RawSocket] = {}
        entries = list(entries)
        if layout is None or not entries:
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
            far = self._header + layout.remote
            pointers = [
                (
                    self._one.unpack_from(raw, self._header + layout.inet_af)[0],
                    self._one.unpack_from(raw, self._header + layout.local)[0],
                    raw[far : far + 16] if layout.inline else self._one.unpack_from(raw, far)[0],
                )
                for _, raw in sound
            ]
            for (entry, raw), pair in zip(sound, self._addresses.waiting(pointers), strict=True):
                if pair is not None:
                    found[entry] = self._past(entry - link, raw, pair, layout)
        return found

    def _past(self, va: int, raw: bytes, pair: Pair, layout: TimeWait) -> RawSocket:
        header = self._header
        local_port, remote_port = _PORTS.unpack_from(raw, header + layout.local_port)
        places = [(4, 4), (header + layout.inet_af, header // 2), (header + layout.local_port, 4)]
        if layout.inline:
            places.append((header + layout.remote, 16))
        return RawSocket(
            Kind.TIME_WAIT,
            va,
            TIME_WAIT,
            pair.family,
            Endpoint(ip_of(pair.local), local_port),
            Endpoint(ip_of(pair.remote), remote_port),
            0,
            key_of(pair.local, local_port, pair.remote, remote_port),
            marks=marks_of(raw, places),
            pieces=pair.pieces,
        )

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.space.readv(spans) if spans else []


def marks_of(raw: bytes, places: Iterable[tuple[int, int]]) -> tuple[tuple[int, bytes], ...]:
    """What must not change in an object while it is the same one, by offset and size: tag, pointers, ports."""
    return tuple([(at, raw[at : at + size]) for at, size in places])
