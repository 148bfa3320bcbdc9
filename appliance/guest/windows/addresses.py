"""Where a socket's addresses lie: behind INETAF, ADDRINFO and _LOCAL_ADDRESS, read for many sockets at once.

Each level of pointers is one batch, whatever the number of sockets; what several sockets share (their INETAF, the
machine's own addresses) is read once. Of the machine's own addresses the way to them is remembered, and read again in
one batch: these objects are freed and used again.
Sources: `layouts`; the pool tag of INETAF is InNl (MemProcFS vmm/vmmnet.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import ADDRESS_SIZE, FAMILY_TAGS, Layout
from appliance.model import IpAddress

Piece = tuple[int, bytes]  # an address and what was read there: whoever checks a socket again compares it
ANY = {size: bytes(size) for size in (4, 16)}
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2
MAX_WAYS = 1 << 12
_Place = tuple[int, int]  # where a local address begins, its family
_Way = tuple[bytes, tuple[Piece, ...]]  # an address, and all that leads to it


class Pair(NamedTuple):
    """Both addresses of a connection, in network order, and the memory that says so."""

    family: int
    local: bytes
    remote: bytes
    pieces: tuple[Piece, ...]


class Home(NamedTuple):
    """The local address of what is bound; all zeros: any address."""

    family: int
    local: bytes
    pieces: tuple[Piece, ...]


class Addresses:
    """Follows the pointers of one guest's sockets."""

    def __init__(self, kernel: WindowsKernel, layout: Layout) -> None:
        self._space = kernel.space
        self._is_kernel = kernel.is_kernel
        self._layout = layout
        self._pointer = kernel.pointer_size
        self._one = struct.Struct("<Q" if self._pointer == 8 else "<I")
        self._header = 2 * self._pointer  # _POOL_HEADER: 16 bytes, 8 on x86
        self._family_size = self._header + layout.family + 2
        self._ways: dict[_Place, _Way] = {}

    def families(self, pointers: Iterable[int]) -> dict[int, int]:
        """AddressFamily of INETAF objects; those that are none are left out."""
        return self._families(pointers, ())[0]

    def pairs(self, wanted: Sequence[tuple[int, int]]) -> list[Pair | None]:
        """Addresses of connections, each given by its INETAF and its ADDRINFO."""
        length = self._layout.remote + self._pointer
        spans = [(info if self.is_object(info) else -1, length) for _, info in wanted]
        families, infos = self._families([inet_af for inet_af, _ in wanted], spans)
        ends = []
        for index, ((inet_af, at), info) in enumerate(zip(wanted, infos, strict=True)):
            if info is None or inet_af not in families:
                continue
            local, remote = self._one.unpack_from(info)[0], self._one.unpack_from(info, self._layout.remote)[0]
            if self.is_object(local) and self._is_kernel(remote):
                ends.append((index, families[inet_af], local, remote, (at, info)))
        return self._join(len(wanted), ends)

    def waiting(self, wanted: Sequence[tuple[int, int, int | bytes]]) -> list[Pair | None]:
        """Addresses of connections in TIME_WAIT: INETAF, local address, and a pointer to the remote one or itself."""
        families = self.families(inet_af for inet_af, _, _ in wanted)
        found: list[Pair | None] = [None] * len(wanted)
        ends = []
        inline = []
        for index, (af, local, remote) in enumerate(wanted):
            if af not in families or not self.is_object(local):
                continue
            if isinstance(remote, bytes):
                inline.append((index, families[af], local, remote[: ADDRESS_SIZE[families[af]]]))
            elif self._is_kernel(remote):
                ends.append((index, families[af], local, remote, None))
        if ends:
            found = self._join(len(wanted), ends)
        known = self._locals({(local, family) for _, family, local, _ in inline})[0]
        for index, family, local, remote in inline:
            home = known.get((local, family))
            if home is not None:
                found[index] = Pair(family, home[0], remote, home[1])
        return found

    def homes(self, wanted: Sequence[tuple[int, int]], *, direct: bool) -> list[Home | None]:
        """Local addresses of what is bound, each given by its INETAF and the pointer to its address (null: any)."""
        families = self.families(inet_af for inet_af, _ in wanted)
        found: list[Home | None] = [None] * len(wanted)
        named = []
        for index, (inet_af, local) in enumerate(wanted):
            family = families.get(inet_af)
            if family is None:
                continue
            if not local:
                found[index] = Home(family, ANY[ADDRESS_SIZE[family]], ())
            elif self._is_kernel(local):
                named.append((index, family, local))
        places = {(local, family) for _, family, local in named}
        known = self._direct(places) if direct else self._locals(places)[0]
        for index, family, local in named:
            home = known.get((local, family))
            if home is not None:
                found[index] = Home(family, home[0], home[1])
        self._take_empty([each for each in named if found[each[0]] is None], found, 0 if direct else None)
        return found

    def is_object(self, va: int) -> bool:
        """Whether a pointer can be that of an object of the kernel's."""
        return not va % self._pointer and self._is_kernel(va)

    # -- private --

    def _take_empty(self, named: list[tuple[int, int, int]], found: list[Home | None], at: int | None) -> None:
        """An address whose own pointer is null is any address, too."""
        offset = self._layout.local_data if at is None else at
        empty = bytes(self._pointer)
        raws = self._readv([(local + offset, self._pointer) for _, _, local in named])
        for (index, family, local), raw in zip(named, raws, strict=True):
            if raw == empty:
                found[index] = Home(family, ANY[ADDRESS_SIZE[family]], ((local + offset, empty),))

    def _join(self, count: int, ends: Sequence[tuple[int, int, int, int, Piece | None]]) -> list[Pair | None]:
        spans = [(remote, ADDRESS_SIZE[family]) for _, family, _, remote, _ in ends]
        known, remotes = self._locals({(local, family) for _, family, local, _, _ in ends}, spans)
        found: list[Pair | None] = [None] * count
        for (index, family, local, remote, piece), raw in zip(ends, remotes, strict=True):
            home = known.get((local, family))
            if raw is not None and home is not None:
                pieces = ((remote, raw),) if piece is None else (piece, (remote, raw))
                found[index] = Pair(family, home[0], raw, pieces + home[1])
        return found

    def _families(
        self, pointers: Iterable[int], others: Sequence[tuple[int, int]]
    ) -> tuple[dict[int, int], list[bytes | None]]:
        """`families`, and whatever else is to be read in the same batch."""
        wanted = [pointer for pointer in set(pointers) if self.is_object(pointer)]
        raws = self._readv([*[(each - self._header, self._family_size) for each in wanted], *others])
        found = {}
        for pointer, raw in zip(wanted, raws, strict=False):
            if raw is not None and tag_of(raw) in FAMILY_TAGS:
                family = int.from_bytes(raw[-2:], "little")
                if family in ADDRESS_SIZE:
                    found[pointer] = family
        return found, raws[len(wanted) :]

    def _locals(
        self, wanted: set[_Place], others: Sequence[tuple[int, int]] = ()
    ) -> tuple[dict[_Place, _Way], list[bytes | None]]:
        """_LOCAL_ADDRESS.pData -> pointer -> address; and whatever else is to be read in the same batch."""
        ways = [(place, self._ways[place]) for place in wanted if place in self._ways]
        raws = self._readv([*others, *[(va, len(raw)) for _, (_, pieces) in ways for va, raw in pieces]])
        found: dict[_Place, _Way] = {}
        at = len(others)
        for place, way in ways:
            if raws[at : at + len(way[1])] == [raw for _, raw in way[1]]:
                found[place] = way
            at += len(way[1])
        if len(found) == len(wanted):
            return found, raws[: len(others)]
        fresh = self._walk_to({place for place in wanted if place not in found})
        if len(self._ways) + len(fresh) > MAX_WAYS:
            self._ways.clear()
        self._ways |= fresh
        return found | fresh, raws[: len(others)]

    def _walk_to(self, wanted: set[_Place]) -> dict[_Place, _Way]:
        offset = self._layout.local_data
        first = self._chase({local + offset for local, _ in wanted})
        second = self._chase(first.values())
        ways = []
        for local, family in wanted:
            middle = first.get(local + offset, 0)
            if middle in second:
                pieces = (local + offset, self._one.pack(middle)), (middle, self._one.pack(second[middle]))
                ways.append(((local, family), second[middle], pieces))
        return self._ends(ways)

    def _direct(self, wanted: set[_Place]) -> dict[_Place, _Way]:
        """Pointer -> address."""
        first = self._chase({local for local, _ in wanted})
        return self._ends(
            [
                ((local, family), first[local], ((local, self._one.pack(first[local])),))
                for local, family in wanted
                if local in first
            ]
        )

    def _ends(self, ways: Sequence[tuple[_Place, int, tuple[Piece, ...]]]) -> dict[_Place, _Way]:
        """The addresses that ways lead to, each with all that leads to it."""
        raws = self._readv([(va, ADDRESS_SIZE[family]) for (_, family), va, _ in ways])
        return {
            place: (raw, (*pieces, (va, raw)))
            for (place, va, pieces), raw in zip(ways, raws, strict=True)
            if raw is not None
        }

    def _chase(self, pointers: Iterable[int]) -> dict[int, int]:
        """What pointers point to, where that is a pointer into the kernel too."""
        wanted = [pointer for pointer in set(pointers) if self._is_kernel(pointer)]
        found = {}
        for pointer, raw in zip(wanted, self._readv([(each, self._pointer) for each in wanted]), strict=True):
            if raw is not None and self._is_kernel(target := self._one.unpack(raw)[0]):
                found[pointer] = target
        return found

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._space.readv(spans) if spans else []


def tag_of(raw: bytes) -> bytes:
    """The pool tag in front of an object whose bytes were read from its pool header on (_POOL_HEADER.PoolTag)."""
    return raw[4:8]


@lru_cache(1 << 14)
def ip_of(raw: bytes) -> IpAddress:
    """An address of 4 or 16 bytes."""
    return IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)


def plain(raw: bytes) -> bytes:
    """An address as packets carry it: a v4-mapped one is the IPv4 address."""
    return raw[12:] if len(raw) == 16 and raw.startswith(MAPPED) else raw
