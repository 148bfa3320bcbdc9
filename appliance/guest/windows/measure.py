"""Which layout this guest's tcpip.sys really has: rows are tried, offsets are searched, nothing is taken on trust.

Connections: the tables lead to entries; a pool tag in front of an entry says where the object begins, so the links are
measured. State, ports and addresses must be plausible in (nearly) all of them. The owner's offset is that at which the
objects hold addresses of processes: of a build that others have described it is that row's, if it holds there; of any
other build it must be the only one. What is bound: port pool and list say the port, and the object must repeat it.
Whoever cannot be verified has no owners: a wrong owner is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from appliance.errors import GuestError, GuestGone, OutOfTime, UnsupportedGuest
from appliance.guest.windows.addresses import Addresses, tag_of
from appliance.guest.windows.compartments import Compartments
from appliance.guest.windows.endpoints import Kind, Partitions
from appliance.guest.windows.hashtables import HashTables
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import STATES, TCP_TAGS, Bound, Layout, Tcp, candidates
from appliance.guest.windows.ports import Ports
from appliance.model import Transport

SAMPLES: Final = 256
OWNERS: Final = range(0x80, 0x380)  # where in a connection its owner is sought
STATE_PLACES: Final = range(0x28, 0x90, 4)
FAMILY_PLACES: Final = range(0x40)
LINKS: Final = range(0x80)
SHIFTS: Final = (0, 8, 16, -8)  # by which a newer build may have moved what is bound
ENOUGH: Final = 8  # connections that fit nothing are no accident any more
MOST: Final = 0.9  # of a live guest's objects some are always being torn down


@dataclass(frozen=True, slots=True)
class Measured:
    """The layout to read with. Of ``verified`` kinds the owner's place was found in this very guest."""

    layout: Layout
    verified: frozenset[Kind]
    doubts: tuple[str, ...] = ()

    def is_trusted(self, kind: Kind) -> bool:
        """Whether owners of this kind may be told: verified here, or known of this build and checked one by one."""
        return kind in self.verified or self.layout.known


class _Sample(NamedTuple):
    va: int
    raw: bytes  # from its pool header on


class Measure:
    """Finds the layout of one guest."""

    def __init__(
        self,
        kernel: WindowsKernel,
        symbol: Callable[[str], int | None],
        processes: Collection[int],
        is_process: Callable[[int], bool],
    ) -> None:
        """``symbol`` gives addresses of tcpip.sys, ``processes`` are listed, ``is_process`` knows others too."""
        self._kernel, self._symbol = kernel, symbol
        self._processes, self._is_process = frozenset(processes), is_process
        self._judged: dict[int, bool] = {}
        self._pointer = kernel.pointer_size
        self._header = 2 * self._pointer
        self.doubts: list[str] = []

    def measure(self) -> Measured:
        """The layout. Raises UnsupportedGuest where what is read fits none, OutOfTime, GuestGone."""
        rows, known = candidates(self._kernel.build, self._pointer)
        if not rows:
            raise UnsupportedGuest(("a layout of tcpip.sys for this size of pointers",))
        base = rows[0] if known else replace(rows[0], known=False)
        verified: set[Kind] = set()
        base = self._connections(base, rows, verified)
        base = self._bound(base, rows, verified)
        return Measured(base, frozenset(verified), tuple(self.doubts))

    # -- connections --

    def _connections(self, base: Layout, rows: Sequence[Layout], verified: set[Kind]) -> Layout:
        table, count = self._symbol("PartitionTable"), self._symbol("PartitionCount")
        if table is None or count is None:
            raise UnsupportedGuest(("the symbols PartitionTable and PartitionCount of tcpip.sys",))
        partitions = Partitions(self._kernel, table, count)
        base, entries = self._shape(base, rows, partitions)
        samples, links = self._samples(entries, base.tcp.links)
        if not samples:
            return base
        tcp: Tcp | None
        fitting = next((row for row in rows if self._fits(row, links, samples)), None)
        if fitting is not None:
            base = replace(base, family=fitting.family, remote=fitting.remote, local_data=fitting.local_data)
            tcp = fitting.tcp._replace(links=links, owner=base.tcp.owner)
        else:
            tcp = self._search(base, links, samples)
        if tcp is None:
            if not base.known or len(samples) >= ENOUGH:
                raise UnsupportedGuest((f"a layout of tcpip's connections for build {self._kernel.build}",))
            self.doubts.append("too few connections to verify where they keep what")
            return base
        owner = self._owner(base, samples)
        if owner is not None:
            verified.add(Kind.TCP)
            tcp = tcp._replace(owner=owner)
        elif base.known and not self._contradicts(base.tcp.owner, samples):
            tcp = tcp._replace(owner=base.tcp.owner)
        else:
            self.doubts.append("where a connection holds its owner cannot be told: connections have no owners")
            base = replace(base, known=False)
        return replace(base, tcp=tcp)

    def _shape(
        self, base: Layout, rows: Sequence[Layout], partitions: Partitions
    ) -> tuple[Layout, list[tuple[int, int]]]:
        """The distance of partitions and the place of their tables; and all entries, with the kind of their table.

        Where no row finds every table (one is paged out, or its pointer was overwritten), that which finds most.
        """
        why: GuestError | None = None
        shapes: dict[tuple[int, tuple[int, ...]], int] = {}  # how many tables each finds
        best: tuple[Layout, list[tuple[int, int]]] | None = None
        for row in (base, *rows):
            shape = row.stride, row.tables
            if shape in shapes:
                continue
            shapes[shape] = 0
            hashes = HashTables(self._kernel)
            partitions.forget()
            try:
                tables = partitions.find(row) or []
                hashes.open([each for each in tables if each[1] < len(row.tcp.links)])
                hashes.refresh()
            except (OutOfTime, GuestGone):
                raise
            except GuestError as error:
                why = error
                continue
            sound = [table for table in hashes.tables if table.spans]
            is_best = len(sound) > max(shapes.values())
            shapes[shape] = len(sound)
            if is_best:
                entries = [(entry, table.kind) for table in sound for chain in table.chains.values() for entry in chain]
                best = replace(base, stride=row.stride, tables=row.tables), entries
                if len(sound) == len(hashes.tables) and not partitions.lacking:
                    return best
        partitions.forget()
        if best is None or list(shapes.values()).count(max(shapes.values())) > 1:
            raise why or UnsupportedGuest(("tcpip's partitions, as this build of Windows lays them out",))
        return best

    def _samples(
        self, entries: list[tuple[int, int]], expected: tuple[int, int]
    ) -> tuple[list[_Sample], tuple[int, int]]:
        """Connections among entries, and where their links are."""
        links = list(expected)
        found: dict[int, _Sample] = {}
        for kind in range(len(links)):
            some = [entry for entry, each in entries if each == kind][:SAMPLES]
            places = sorted(range(LINKS.start, LINKS.stop, self._pointer), key=lambda link: link != expected[kind])
            best: list[int] = []
            for link in places:
                tags = self._readv([(entry - link - self._header, self._header) for entry in some])
                ours = [entry - link for entry, tag in zip(some, tags, strict=True) if tag and tag_of(tag) in TCP_TAGS]
                if len(ours) > len(best):
                    best, links[kind] = ours, link
                if len(best) > len(some) // 2:
                    break
            size = self._header + OWNERS.stop
            for va, raw in zip(best, self._longest(best, size), strict=True):
                found[va] = _Sample(va, raw)
        return [each for each in found.values() if tag_of(each.raw) in TCP_TAGS][:SAMPLES], (links[0], links[1])

    def _longest(self, vas: Sequence[int], size: int) -> list[bytes]:
        """Objects and what follows them: as much as can be read, since the next page may not be there."""
        spans = [(va - self._header, size) for va in vas]
        short = [(va, min(length, 4096 - va % 4096)) for va, length in spans]
        whole, parts = self._readv(spans), self._readv(short)
        return [full or part or b"" for full, part in zip(whole, parts, strict=True)]

    def _fits(self, row: Layout, links: tuple[int, int], samples: list[_Sample]) -> bool:
        """Whether state, ports and addresses of most samples can be true in this row."""
        tcp = row.tcp
        good = [each for each in samples if self._is_sound(tcp, each)]
        if len(good) < MOST * len(samples):
            return False
        addresses = Addresses(self._kernel, row)
        pointers = [(self._at(each, tcp.inet_af), self._at(each, tcp.addr_info)) for each in good]
        return sum(pair is not None for pair in addresses.pairs(pointers)) >= MOST * len(samples)

    def _is_sound(self, tcp: Tcp, sample: _Sample) -> bool:
        def number(at: int, size: int) -> int:
            return int.from_bytes(sample.raw[self._header + at : self._header + at + size], "little")

        return number(tcp.state, 4) in STATES and number(tcp.local_port, 2) != 0 and number(tcp.remote_port, 2) != 0

    def _search(self, base: Layout, links: tuple[int, int], samples: list[_Sample]) -> Tcp | None:
        """No row fits: search for the address family by its pool tag, for the state by what it can be."""
        addresses = Addresses(self._kernel, base)
        places = []
        for at in range(FAMILY_PLACES.start, FAMILY_PLACES.stop, self._pointer):
            pairs = addresses.pairs([(self._at(each, at), self._at(each, at + self._pointer)) for each in samples])
            if sum(pair is not None for pair in pairs) >= MOST * len(samples):
                places.append(at)
        states = [
            at
            for at in STATE_PLACES
            if sum(self._is_sound(Tcp(0, 0, links, at, at + 4, at + 6, 0), each) for each in samples)
            >= MOST * len(samples)
            and any(self._at(each, at) & 0xFFFFFFFF for each in samples)
        ]
        if len(places) != 1 or len(states) != 1:
            return None
        inet_af, state = places[0], states[0]
        return Tcp(inet_af, inet_af + self._pointer, links, state, state + 4, state + 6, base.tcp.owner)

    def _owner(self, base: Layout, samples: list[_Sample]) -> int | None:
        """Where the samples hold addresses of processes; None where that cannot be told."""
        good = [at for at in range(OWNERS.start, OWNERS.stop, self._pointer) if self._holds_owners(at, samples)]
        if base.known and base.tcp.owner in good:
            return base.tcp.owner
        if not good and base.known and self._holds_owners(base.tcp.owner, samples, hidden=True):
            return base.tcp.owner
        told = {tuple(self._at(each, at) for each in samples) for at in good}
        if len(told) != 1 or (len(good) > 1 and len({va for va in told.pop() if va}) < 2):
            return None  # two places that agree about one process need not agree about the next
        return good[0]

    def _holds_owners(self, at: int, samples: list[_Sample], *, hidden: bool = False) -> bool:
        values = [self._at(each, at) for each in samples]
        values = [value for value in values if value]
        owned = sum(self._judge(value) if hidden else value in self._processes for value in values)
        return owned > 0 and owned >= MOST * len(values) and len(values) >= len(samples) / 2

    def _contradicts(self, at: int, samples: list[_Sample]) -> bool:
        """Whether what a known build's row calls the owner is something else here."""
        values = [value for value in (self._at(each, at) for each in samples) if value]
        return bool(values) and not any(self._judge(value) for value in values)

    # -- what is bound --

    def _bound(self, base: Layout, rows: Sequence[Layout], verified: set[Kind]) -> Layout:
        """The port pools and what is in them. What fits no layout is not told."""
        pools = dict.fromkeys((row.pool, row.compartments) for row in (base, *rows) if row.pool is not None)
        for pool, compartments in pools:
            trial = replace(base, pool=pool, compartments=compartments)
            taken, free = self._read(trial).agreement()
            if not taken or free > taken:
                continue
            for kind in (Kind.LISTENER, Kind.UDP):
                for bound in self._variants(trial, rows, kind):
                    layout = replace(trial, listener=bound) if kind is Kind.LISTENER else replace(trial, udp=bound)
                    if self._is_bound(layout, kind):
                        trial = layout
                        verified.add(kind)
                        break
                else:
                    if not base.known:
                        self.doubts.append(f"{kind.value} of build {self._kernel.build} is not verified: no owners")
            return trial
        return base

    def _variants(self, trial: Layout, rows: Sequence[Layout], kind: Kind) -> Iterator[Bound]:
        own = trial.listener if kind is Kind.LISTENER else trial.udp
        seen = set()
        for shift in SHIFTS:
            for each in (own, *(row.listener if kind is Kind.LISTENER else row.udp for row in rows)):
                bound = _shifted(each, shift)
                if bound not in seen:
                    seen.add(bound)
                    yield bound

    def _is_bound(self, layout: Layout, kind: Kind) -> bool:
        """Whether nearly all that is bound can be true in this layout, and is owned by processes."""
        ports = self._read(layout)
        found = [raw for raw in ports if raw.kind is kind]
        owned = sum(self._judge(raw.owner) for raw in found)
        refused = ports.refused[Transport.TCP if kind is Kind.LISTENER else Transport.UDP]
        return bool(owned) and owned >= MOST * len(found) and len(found) >= MOST * (len(found) + refused)

    def _read(self, layout: Layout) -> Ports:
        ports = Ports(self._kernel, Compartments(self._kernel, self._symbol, layout), layout, SAMPLES)
        ports.walk()
        return ports

    # -- private --

    def _judge(self, va: int) -> bool:
        if va in self._processes:
            return True
        if va not in self._judged:
            self._judged[va] = self._kernel.is_kernel(va) and self._is_process(va)
        return self._judged[va]

    def _at(self, sample: _Sample, at: int) -> int:
        """A pointer in a sample; 0 beyond what was read."""
        raw = sample.raw[self._header + at : self._header + at + self._pointer]
        return int.from_bytes(raw, "little") if len(raw) == self._pointer else 0

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.space.readv(spans) if spans else []


def _shifted(bound: Bound, by: int) -> Bound:
    """What is bound, with everything moved but the tag in front."""

    def moved(at: int | None) -> int | None:
        return None if at is None else max(at + by, 0)

    return Bound(
        max(bound.inet_af + by, 0),
        max(bound.owner + by, 0),
        max(bound.local + by, 0),
        max(bound.port + by, 0),
        max(bound.next + by, 0),
        bound.direct,
        moved(bound.remote_port),
        moved(bound.path),
        bound.path_address,
    )
