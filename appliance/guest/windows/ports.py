"""What is bound to a port: TCP listeners and UDP sockets, by tcpip's port pools.

A pool has a bitmap of taken ports and 256 assignments, each with a list of 256 entries. An entry is a tagged pointer to
the ``Next`` member of what is bound, which leads to what else is bound to the port. Connections are in these chains
too; they are passed over. All entries are read, also those of ports that the bitmap calls free; `Ports.taken` is the
bitmap's own word. Only entries that have changed are followed again.
Sources: tcpip.pdb, `layouts`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from appliance.errors import GuestError
from appliance.guest.windows.addresses import Addresses, Home, Piece, ip_of, tag_of
from appliance.guest.windows.compartments import Compartments, Pool
from appliance.guest.windows.endpoints import Kind, RawSocket, key_of, marks_of
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.layouts import (
    ADDRESS_SIZE,
    CLOSED,
    ESTABLISHED,
    LISTEN,
    LISTENER_TAGS,
    PATH_TAGS,
    UDP_TAGS,
    Bound,
    Layout,
)
from appliance.model import Endpoint, Gap, Transport

BLOCKS: Final = 256
ENTRIES: Final = 256
MAX_LISTS: Final = 2048  # lists of entries of all pools together; 512 are all there are in one compartment
MAX_CHAIN: Final = 4096  # of what is bound to one port
MAX_BITMAP: Final = 1 << 13  # bytes
MAX_BOUND: Final = 1 << 17

_KINDS: Final = {
    Transport.TCP: (Kind.LISTENER, LISTENER_TAGS, LISTEN),
    Transport.UDP: (Kind.UDP, UDP_TAGS, CLOSED),
}


@dataclass(slots=True)
class _Pool:
    """One port pool as it was last seen."""

    pool: Pool
    heads: bytes = b""  # from the bitmap to the end of the assignments
    bitmap: bytes = b""
    blocks: dict[int, int] = field(default_factory=dict)  # by number: where the entries lie
    contents: dict[int, bytes] = field(default_factory=dict)
    entries: dict[int, list[int]] = field(default_factory=dict)  # by number of the block: tagged pointers
    sockets: dict[int, tuple[RawSocket, ...]] = field(default_factory=dict)  # by port
    proofs: dict[int, list[Piece]] = field(default_factory=dict)  # by port: the links of its chain


class Ports:
    """Everything that is bound to a port, kept up to date."""

    def __init__(
        self, kernel: WindowsKernel, compartments: Compartments, layout: Layout, sample: int | None = None
    ) -> None:
        """``sample``: follow the chains of so many ports only, spread over all of them."""
        self._sample = sample
        self._kernel, self._compartments, self._layout = kernel, compartments, layout
        self._addresses = Addresses(kernel, layout)
        self._one = struct.Struct("<Q" if layout.pointer == 8 else "<I")
        self._code = "Q" if layout.pointer == 8 else "I"
        self._header = 2 * layout.pointer
        self._mask = -layout.pointer  # an entry's lowest bits are flags
        self._pools: list[_Pool] = []
        self._lacks: list[Gap] = []
        self.gaps: list[Gap] = []
        self.torn = 0
        self.refused = dict.fromkeys(_KINDS, 0)  # of those, what was bound and could not be true
        self.changes = 0  # how often something was bound or given up

    def __iter__(self) -> Iterator[RawSocket]:
        for pool in self._pools:
            for sockets in pool.sockets.values():
                yield from sockets

    def of_port(self, transport: Transport, port: int) -> list[RawSocket]:
        """Listeners, or UDP sockets, of one port, in the order of their chain."""
        return [raw for pool in self._pools if pool.pool.transport is transport for raw in pool.sockets.get(port, ())]

    def taken(self) -> dict[tuple[Transport, int], set[int]]:
        """The ports that each pool's bitmap calls taken, by protocol and compartment."""
        return {(each.pool.transport, each.pool.compartment): _bits(each.bitmap) for each in self._pools}

    def entry(self, transport: Transport, compartment: int, port: int) -> int:
        """What a port's assignment leads to, an address inside an object; 0 where to nothing."""
        for pool in self._pools:
            if (pool.pool.transport, pool.pool.compartment) == (transport, compartment):
                entries = pool.entries.get(port >> 8)
                return entries[port & 255] & self._mask if entries else 0
        return 0

    def kinds(self) -> dict[Kind, bool]:
        """Of each kind whether anything at all is in the lists that it is in."""
        there = {pool.pool.transport for pool in self._pools for entries in pool.entries.values() if any(entries)}
        return {kind: transport in there for transport, (kind, _, _) in _KINDS.items()}

    def agreement(self) -> tuple[int, int]:
        """How many entries there are whose port the bitmap calls taken, and how many that it calls free."""
        taken = free = 0
        for pool in self._pools:
            bits = _bits(pool.bitmap)
            for number, entries in pool.entries.items():
                ports = [number << 8 | low for low, entry in enumerate(entries) if entry]
                real = sum(port in bits and self._kernel.is_kernel(entries[port & 255]) for port in ports)
                taken, free = taken + real, free + len(ports) - real
        return taken, free

    def proof(self, raw: RawSocket) -> tuple[Piece, ...]:
        """The links that lead to all that is bound to a port: while they are the same, so is what they lead to."""
        port = raw.local.port
        transport = Transport.UDP if raw.kind is Kind.UDP else Transport.TCP
        return tuple(
            piece for pool in self._pools if pool.pool.transport is transport for piece in pool.proofs.get(port, ())
        )

    def walk(self) -> None:
        """Read everything afresh."""
        self.refresh(whole=True)

    def refresh(self, *, whole: bool = False) -> None:
        """Bring everything up to date; ``whole``: follow every chain again. Raises OutOfTime, GuestGone."""
        if whole or not self._pools:
            self._find()
        self.gaps = list(self._lacks)
        layout = self._layout.pool
        if layout is None:
            return
        try:
            self._read_heads()
            changed = [(pool, port) for pool in self._pools for port in self._changed_ports(pool)]
            if changed:
                self.changes += 1
                self._follow(changed[:: len(changed) // self._sample + 1] if self._sample else changed)
        except GuestError:
            self._pools = []  # half of it is known: start over next time
            raise

    def refresh_port(self, transport: Transport, port: int) -> None:
        """Bring one port up to date; all of them where its list may be another one. Raises OutOfTime, GuestGone."""
        pools = [each for each in self._pools if each.pool.transport is transport]
        if not pools or not all(self._reread_slot(each, port) for each in pools):
            self.refresh()
            return
        told = self.gaps
        before = [each.sockets.get(port) for each in pools]
        try:
            self._follow([(each, port) for each in pools])
        except GuestError:
            self._pools = []
            raise
        self.gaps = told
        self.changes += before != [each.sockets.get(port) for each in pools]

    def at(self, transport: Transport, vas: Sequence[int]) -> list[RawSocket]:
        """Listeners, or UDP sockets, at addresses to which no port leads; what is none is left out.

        Their compartment is not known, and told as the first. Raises OutOfTime, GuestGone.
        """
        bound, header = self._bound(transport), self._header
        size = header + bound.size(self._layout.pointer)
        read = zip(vas, self._readv([(va - header, size) for va in vas]), strict=True)
        sound = [(va, raw) for va, raw in read if raw is not None and tag_of(raw) in _KINDS[transport][1]]
        pointers = [(self._at(raw, bound.inet_af), self._at(raw, bound.local)) for _, raw in sound]
        homes = self._addresses.homes(pointers, direct=bound.direct)
        remotes = self._remotes(bound, [raw for _, raw in sound], homes)
        found = []
        for (va, raw), home, remote in zip(sound, homes, remotes, strict=True):
            port = int.from_bytes(raw[header + bound.port : header + bound.port + 2], "big")
            if home is not None and port:
                found.append(self._socket(Pool(transport, 1, 0), port, va, raw, home, remote))
        return found

    # -- pools --

    def _find(self) -> None:
        self._pools = []
        if self._layout.pool is None:
            self._lacks = [Gap("port pools", 0, "not known for this build of Windows: what is bound is not told")]
            return
        pools, self._lacks = self._compartments.find()
        self._pools = [_Pool(pool) for pool in pools]

    def _read_heads(self) -> None:
        """Bitmap and assignments of all pools, and the entries of all known blocks: two batches and three at most."""
        layout = self._layout.pool
        assert layout is not None
        pointer = self._layout.pointer
        length = layout.assignments + BLOCKS * pointer - layout.bitmap
        heads = self._readv([(each.pool.va + layout.bitmap, length) for each in self._pools])
        for each, raw in zip(self._pools, heads, strict=True):
            if raw is None:
                self.gaps.append(Gap(f"{each.pool.transport} port pool", each.pool.va, "unreadable"))
            elif raw != each.heads or len(each.blocks) < BLOCKS:
                each.heads = raw
                self._find_blocks(each, raw[layout.assignments - layout.bitmap :])
        spans = [(each, *self._bitmap_span(each)) for each in self._pools]
        for (each, _, _), raw in zip(spans, self._readv([(va, size) for _, va, size in spans]), strict=True):
            if raw is None:
                self.gaps.append(Gap(f"{each.pool.transport} port pool", each.pool.va, "its bitmap is unreadable"))
            each.bitmap = raw or b""

    def _bitmap_span(self, pool: _Pool) -> tuple[int, int]:
        """RTL_BITMAP: SizeOfBitMap in bits, Buffer."""
        pointer = self._layout.pointer
        if len(pool.heads) < 2 * pointer:
            return pool.pool.va, 0
        bits = int.from_bytes(pool.heads[:4], "little")
        buffer = self._one.unpack_from(pool.heads, pointer)[0]
        return (buffer, min(bits // 8, MAX_BITMAP)) if self._kernel.is_kernel(buffer) else (pool.pool.va, 0)

    def _find_blocks(self, pool: _Pool, raw: bytes) -> None:
        """_PORT_ASSIGNMENT *[256], each with a pointer to its list."""
        layout = self._layout.pool
        assert layout is not None
        assignments = [
            (number, va) for number, (va,) in enumerate(self._one.iter_unpack(raw)) if self._kernel.is_kernel(va)
        ]
        lists = self._readv([(va + layout.list, self._layout.pointer) for _, va in assignments])
        blocks = {}
        for (number, _), found in zip(assignments, lists, strict=True):
            if found is not None and self._kernel.is_kernel(va := self._one.unpack(found)[0]):
                blocks[number] = va
        room = MAX_LISTS - sum(len(each.blocks) for each in self._pools if each is not pool)
        if len(blocks) > room:
            self.gaps.append(Gap(f"{pool.pool.transport} port pool", pool.pool.va, "too many lists of ports"))
            blocks = dict(list(blocks.items())[: max(room, 0)])
        for number in [each for each in pool.blocks if blocks.get(each) != pool.blocks[each]]:
            pool.contents.pop(number, None)
        pool.blocks = blocks

    def _changed_ports(self, pool: _Pool) -> list[int]:
        layout = self._layout.pool
        assert layout is not None
        numbers = list(pool.blocks)
        raws = self._readv([(pool.blocks[number], ENTRIES * layout.stride) for number in numbers])
        changed = []
        step, at = layout.stride // self._layout.pointer, layout.entry // self._layout.pointer
        for number, raw in zip(numbers, raws, strict=True):
            if raw is None or raw == pool.contents.get(number):
                continue
            before = pool.entries.get(number, [0] * ENTRIES)
            entries = array(self._code, raw)[at::step].tolist()
            changed += [number << 8 | low for low, entry in enumerate(entries) if entry != before[low]]
            pool.contents[number], pool.entries[number] = raw, entries
        gone = [number for number in pool.entries if number not in pool.blocks]
        for number in gone:
            changed += [number << 8 | low for low, entry in enumerate(pool.entries.pop(number)) if entry]
        return changed

    def _reread_slot(self, pool: _Pool, port: int) -> bool:
        """Take in what one port's entry says; False where the way to it is not what it was."""
        layout, pointer, number = self._layout.pool, self._layout.pointer, port >> 8
        if layout is None or not pool.heads:
            return False
        at = layout.assignments + number * pointer
        assignment = pool.heads[at - layout.bitmap :][:pointer]
        if number not in pool.entries:
            return self._readv([(pool.pool.va + at, pointer)]) == [assignment] and not any(assignment)
        va = self._one.unpack(assignment)[0]
        spans = [(pool.pool.va + at, pointer), (va + layout.list, pointer), (self._slot(pool, port), pointer)]
        *way, word = self._readv(spans)
        if word is None or way != [assignment, self._one.pack(pool.blocks[number])]:
            return False
        entry = self._one.unpack(word)[0]
        if entry != pool.entries[number][port & 255]:
            pool.entries[number][port & 255] = entry
            pool.contents.pop(number, None)  # it may be as it was before by the next refresh
        return True

    # -- what is bound --

    def _follow(self, changed: list[tuple[_Pool, int]]) -> None:
        """The chains of these ports, one object of each at a time."""
        chains: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        going: list[tuple[_Pool, int, int, set[int]]] = []
        for pool, port in changed:
            chains[id(pool), port] = []
            entries = pool.entries.get(port >> 8)
            word = entries[port & 255] if entries else 0
            pool.proofs[port] = [(self._slot(pool, port), self._one.pack(word))] if word else []
            entry = word & self._mask
            if self._kernel.is_kernel(entry):
                going.append((pool, port, entry, set()))
        room = MAX_BOUND
        while going and room > 0:
            room -= len(going)
            raws = self._objects([(pool.pool.transport, node) for pool, _, node, _ in going])
            following = []
            for (pool, port, node, seen), (raw, after) in zip(going, raws, strict=True):
                if after is None:
                    self.torn += 1
                    continue
                if raw is not None:
                    chains[id(pool), port].append((node - self._bound(pool.pool.transport).next, raw))
                seen.add(node)
                pool.proofs[port].append((node, self._one.pack(after)))
                link = after & self._mask
                if self._kernel.is_kernel(link):
                    if link in seen or len(seen) >= MAX_CHAIN:
                        self.torn += 1
                        self.gaps.append(Gap(f"{pool.pool.transport} port {port}", node, "its chain leads in a circle"))
                    else:
                        following.append((pool, port, link, seen))
            going = following
        self._parse(changed, chains)

    def _slot(self, pool: _Pool, port: int) -> int:
        layout = self._layout.pool
        assert layout is not None
        return pool.blocks[port >> 8] + (port & 255) * layout.stride + layout.entry

    def _objects(self, nodes: Sequence[tuple[Transport, int]]) -> list[tuple[bytes | None, int | None]]:
        """The bytes of what is bound, None for what is neither listener nor UDP socket, and its tagged successor."""
        spans = []
        for transport, node in nodes:
            bound = self._bound(transport)
            spans.append((node - bound.next - self._header, self._header + bound.size(self._layout.pointer)))
        raws = self._readv(spans)
        links = self._readv([(node, self._layout.pointer) for _, node in nodes])
        found: list[tuple[bytes | None, int | None]] = []
        for (transport, _), raw, link in zip(nodes, raws, links, strict=True):
            after = None if link is None else self._one.unpack(link)[0]
            ours = raw is not None and tag_of(raw) in _KINDS[transport][1]
            found.append((raw if ours else None, after))
        return found

    def _bound(self, transport: Transport) -> Bound:
        return self._layout.listener if transport is Transport.TCP else self._layout.udp

    def _parse(self, changed: list[tuple[_Pool, int]], chains: dict[tuple[int, int], list[tuple[int, bytes]]]) -> None:
        for transport in _KINDS:
            bound = self._bound(transport)
            objects = [
                (pool, port, va, raw)
                for pool, port in changed
                if pool.pool.transport is transport
                for va, raw in chains[id(pool), port]
            ]
            pointers = [(self._at(raw, bound.inet_af), self._at(raw, bound.local)) for *_, raw in objects]
            homes = self._addresses.homes(pointers, direct=bound.direct)
            remotes = self._remotes(bound, [raw for *_, raw in objects], homes)
            sockets: dict[tuple[int, int], list[RawSocket]] = {}
            for (pool, port, va, raw), home, remote in zip(objects, homes, remotes, strict=True):
                told = int.from_bytes(raw[self._header + bound.port : self._header + bound.port + 2], "big")
                if home is None or told != port:
                    self.torn += 1
                    self.refused[transport] += 1
                    self.gaps.append(Gap(f"{transport} port {port}", va, "what is bound to it cannot be true"))
                    continue
                socket = self._socket(pool.pool, port, va, raw, home, remote)
                sockets.setdefault((id(pool), port), []).append(socket)
            for pool, port in changed:
                if pool.pool.transport is transport:
                    pool.sockets.pop(port, None)
                    if (id(pool), port) in sockets:
                        pool.sockets[port] = tuple(sockets[id(pool), port])

    def _remotes(self, bound: Bound, raws: list[bytes], homes: list[Home | None]) -> list[tuple[bytes, int] | None]:
        """The far end of connected UDP sockets, where the build is known to say it."""
        found: list[tuple[bytes, int] | None] = [None] * len(raws)
        if bound.path is None or bound.path_address is None or bound.remote_port is None:
            return found
        places = []
        for index, (raw, home) in enumerate(zip(raws, homes, strict=True)):
            va = self._at(raw, bound.path)
            if home is not None and self._addresses.is_object(va):
                places.append((index, va, ADDRESS_SIZE[home.family]))
        spans = [(va - self._header, self._header + bound.path_address + size) for _, va, size in places]
        at = self._header + bound.remote_port
        for (index, _, size), path in zip(places, self._readv(spans), strict=True):
            port = int.from_bytes(raws[index][at : at + 2], "big")
            if port and path is not None and tag_of(path) in PATH_TAGS:
                found[index] = path[-size:], port
        return found

    def _socket(
        self, pool: Pool, port: int, va: int, raw: bytes, home: Home, remote: tuple[bytes, int] | None
    ) -> RawSocket:
        bound = self._bound(pool.transport)
        kind, _, state = _KINDS[pool.transport]
        owner = self._at(raw, bound.owner)
        pointer = self._layout.pointer
        places = [(bound.inet_af, pointer), (bound.local, pointer), (bound.port, 2)]
        far = None
        if remote is not None and bound.path is not None and bound.remote_port is not None:
            far = Endpoint(ip_of(remote[0]), remote[1])
            places += [(bound.path, pointer), (bound.remote_port, 2)]
        return RawSocket(
            kind,
            va,
            ESTABLISHED if far else state,
            home.family,
            Endpoint(ip_of(home.local), port),
            far,
            owner if self._kernel.is_kernel(owner) else 0,
            key_of(home.local, port, *(remote or ())),
            compartment=pool.compartment,
            marks=marks_of(raw, [(4, 4), *((self._header + at, size) for at, size in places)]),
            pieces=home.pieces,
        )

    def _at(self, raw: bytes, offset: int) -> int:
        number: int = self._one.unpack_from(raw, self._header + offset)[0]
        return number

    def _readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return self._kernel.space.readv(spans) if spans else []


def _bits(bitmap: bytes) -> set[int]:
    """The numbers of the bits that are set, the lowest of the first byte being 0."""
    return {8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}
