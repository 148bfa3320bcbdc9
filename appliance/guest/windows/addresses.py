"""Where a socket's addresses lie: behind INETAF, ADDRINFO and _LOCAL_ADDRESS, read for many sockets at once.

Each level of pointers is one batch, whatever the number of sockets; what several sockets share (their INETAF, the
machine's own addresses) is read once. Nothing is remembered between two calls: these objects are freed and used again.
Sources: `layouts`; the pool tag of INETAF is InNl (MemProcFS vmm/vmmnet.c).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import ADDRESS_SIZE, FAMILY_TAGS, Layout
from appliance.model import IpAddress

Piece = tuple[int, bytes]  # an address and what was read there: whoever checks a socket again compares it
ANY = {size: bytes(size) for size in (4, 16)}
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2


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

    def families(self, pointers: Iterable[int]) -> dict[int, int]:
        """AddressFamily of INETAF objects; those that are none are left out."""
        wanted = [pointer for pointer in set(pointers) if self.is_object(pointer)]
        size = self._header + self._layout.family + 2
        found = {}
        for pointer, raw in zip(wanted, self._readv([(each - self._header, size) for each in wanted]), strict=True):
            if raw is None or tag_of(raw) not in FAMILY_TAGS:
                continue
            family = int.from_bytes(raw[-2:], "little")
            if family in ADDRESS_SIZE:
                found[pointer] = family
        return found

    def pairs(self, wanted: Sequence[tuple[int, int]]) -> list[Pair | None]:
        """Addresses of connections, each given by its INETAF and its ADDRINFO."""
        families = self.families(inet_af for inet_af, _ in wanted)
        length = self._layout.remote + self._pointer
        good = [index for index, (af, info) in enumerate(wanted) if af in families and self.is_object(info)]
        infos = self._readv([(wanted[index][1], length) for index in good])
        ends = []
        for index, info in zip(good, infos, strict=True):
            if info is None:
                continue
            local, remote = self._one.unpack_from(info)[0], self._one.unpack_from(info, self._layout.remote)[0]
            if self.is_object(local) and self._is_kernel(remote):
                family = families[wanted[index][0]]
                ends.append((index, family, local, remote, (wanted[index][1], info)))
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
        known = self._locals({(local, family) for _, family, local, _ in inline})
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
        known = self._direct(places) if direct else self._locals(places)
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
        known = self._locals({(local, family) for _, family, local, _, _ in ends})
        remotes = self._readv([(remote, ADDRESS_SIZE[family]) for _, family, _, remote, _ in ends])
        found: list[Pair | None] = [None] * count
        for (index, family, local, remote, piece), raw in zip(ends, remotes, strict=True):
            home = known.get((local, family))
            if raw is not None and home is not None:
                pieces = ((remote, raw),) if piece is None else (piece, (remote, raw))
                found[index] = Pair(family, home[0], raw, pieces + home[1])
        return found

    def _locals(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[bytes, tuple[Piece, ...]]]:
        """_LOCAL_ADDRESS.pData -> pointer -> address."""
        at = self._layout.local_data
        first = self._chase({local + at for local, _ in wanted})
        second = self._chase(first.values())
        keys = [
            (local, family, second[first[local + at]])
            for local, family in wanted
            if local + at in first and first[local + at] in second
        ]
        return self._ends(keys, lambda local: ((local + at, self._one.pack(first[local + at])),))

    def _direct(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[bytes, tuple[Piece, ...]]]:
        """Pointer -> address."""
        first = self._chase({local for local, _ in wanted})
        keys = [(local, family, first[local]) for local, family in wanted if local in first]
        return self._ends(keys, lambda local: ((local, self._one.pack(first[local])),))

    def _ends(
        self, keys: Sequence[tuple[int, int, int]], piece: Callable[[int], tuple[Piece, ...]]
    ) -> dict[tuple[int, int], tuple[bytes, tuple[Piece, ...]]]:
        raws = self._readv([(va, ADDRESS_SIZE[family]) for _, family, va in keys])
        return {
            (local, family): (raw, (*piece(local), (va, raw)))
            for (local, family, va), raw in zip(keys, raws, strict=True)
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
