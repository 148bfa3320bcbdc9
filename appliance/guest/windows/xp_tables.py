"""Where tcpip.sys of Windows XP and Server 2003 keeps its connections and sockets, and which of it is true here.

Two tables, each an array of chain heads: ``_TCBTable`` of connections (_TCPT_OBJECT) and ``_AddrObjTable`` of address
objects (_ADDRESS_OBJECT), by which sockets are bound; a variable each says how many heads there are. Their places are
public symbols of tcpip.pdb. Without those every build that we know of is tried, and if none fits the image's own data
is searched; whatever is found is believed by what lies in it, never by a version.
Sources: volatility 2.6.1, volatility/win32/network.py (places, by build) and plugins/overlays/windows/tcpip_vtypes.py
(structures); pool tags TCPT and TCPA: plugins/connscan.py, sockscan.py. Ports are big-endian, the rest little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.windows import pe
from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.space import AddressSpace

CONNECTION_TAG: Final = b"TCPT"
SOCKET_TAG: Final = b"TCPA"
MAX_CHAINS: Final = 65_536  # MaxHashTableSize of the registry is at most that, and a power of two
MAX_SOCKET_CHAINS: Final = 16_384
MAX_PROBED: Final = 512  # objects of one candidate that are looked at
MAX_DATA: Final = 1 << 20  # bytes of tcpip.sys that are searched
MAX_RIVALS: Final = 4  # tables of one kind that a search tries
MIN_UNTAGGED: Final = 3  # objects that must be sound where none has a pool tag


class Variables(NamedTuple):
    """RVAs in tcpip.sys."""

    connections: int  # TCBTable, a pointer
    connection_chains: int  # MaxHashTableSize, u32
    sockets: int  # AddrObjTable, a pointer
    socket_chains: int  # AddrObjTableSize, u32


class Row(NamedTuple):
    """The variables of one build of tcpip.sys."""

    name: str
    pointer: int
    variables: Variables


ROWS: Final = (
    Row("XP, multiprocessor", 4, Variables(0x497E8, 0x3F7C8, 0x48760, 0x48764)),
    Row("XP, uniprocessor", 4, Variables(0x495E8, 0x3F5BC, 0x48560, 0x48564)),
    Row("XP SP2 2180", 4, Variables(0x493E8, 0x3F3B0, 0x48360, 0x48364)),
    Row("XP 3244", 4, Variables(0x496E8, 0x3F6BC, 0x48660, 0x48664)),
    Row("XP 3394", 4, Variables(0x49768, 0x3F73C, 0x486E0, 0x486E4)),
    Row("XP SP3 5625", 4, Variables(0x49AE8, 0x3FAC8, 0x48A60, 0x48A64)),
    Row("XP 2111", 4, Variables(0x49A68, 0x3FA48, 0x489E0, 0x489E4)),
    Row("Server 2003 3790", 4, Variables(0x4C6C8, 0x4312C, 0x4BBA0, 0x4BBA4)),
    Row("Server 2003 SP1 1830", 4, Variables(0x4E428, 0x44140, 0x4D4E4, 0x4D4E8)),
    Row("Server 2003 SP2 3959", 4, Variables(0x7C548, 0x50308, 0x5ADA4, 0x5ADA8)),
    Row("Server 2003 SP2 4573", 4, Variables(0x7F0AC, 0x52328, 0x5CF04, 0x5CF08)),
    Row("Server 2003 SP2 3959 x64", 8, Variables(0xC8D30, 0x9B4A0, 0xA4880, 0xA4888)),
    Row("Server 2003 SP1 1830 x64", 8, Variables(0x8F2D0, 0x861CC, 0x8C4C0, 0x8C4C8)),
    Row("Server 2003 SP2 x64", 8, Variables(0xCD2D8, 0x9E4A0, 0xA78E0, 0xA78E8)),
)
NAMES: Final = ("TCBTable", "MaxHashTableSize", "AddrObjTable", "AddrObjTableSize")


class ConnectionLayout(NamedTuple):
    """Offsets in _TCPT_OBJECT; Next is at 0."""

    remote: int  # 4 bytes, in network order
    local: int
    remote_port: int  # 2 bytes, big-endian; LocalPort follows it
    pid: int
    size: int


class SocketLayout(NamedTuple):
    """Offsets in _ADDRESS_OBJECT; Next is at 0."""

    local: int
    port: int  # big-endian; Protocol (u16, little-endian) follows it
    pid: int
    created: int  # FILETIME
    size: int


CONNECTION: Final = {
    4: ConnectionLayout(0xC, 0x10, 0x14, 0x18, 0x1C),
    8: ConnectionLayout(0x14, 0x18, 0x1C, 0x20, 0x24),
}
SOCKETS: Final = {  # XP and 2003, 2003 from SP1 on; x64
    4: (SocketLayout(0x2C, 0x30, 0x148, 0x158, 0x160), SocketLayout(0x30, 0x34, 0x14C, 0x158, 0x160)),
    8: (SocketLayout(0x58, 0x5C, 0x238, 0x248, 0x250),),
}

_UNIX_EPOCH, _STEP = 116_444_736_000_000_000, 100  # FILETIME counts 100 ns since 1601
_PLAUSIBLE: Final = range(883_612_800 * 10**9, 7_258_118_400 * 10**9)  # 1998 to 2200
MAX_PID: Final = 1 << 26


class RawConnection(NamedTuple):
    """One _TCPT_OBJECT. Addresses in network order."""

    va: int
    following: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    pid: int

    @property
    def identity(self) -> tuple[object, ...]:
        """What is the same as long as it is the same connection: all but its place in its chain."""
        return self.local, self.local_port, self.remote, self.remote_port, self.pid


class RawSocket(NamedTuple):
    """One _ADDRESS_OBJECT; ``created_ns`` counts from the Unix epoch, by the guest's clock."""

    va: int
    following: int
    local: bytes
    port: int
    protocol: int  # IANA
    pid: int
    created_ns: int

    @property
    def identity(self) -> tuple[object, ...]:
        """What is the same as long as it is the same socket."""
        return self.local, self.port, self.protocol, self.pid, self.created_ns


class Parser:
    """Reads the objects as one build lays them out. What cannot be one is None: ``tagged``, too, what has no tag."""

    def __init__(self, pointer: int, sockets: SocketLayout, *, tagged: bool = True) -> None:
        self.pointer, self.sockets, self.connections = pointer, sockets, CONNECTION[pointer]
        self.header = 2 * pointer  # _POOL_HEADER; its PoolTag is at +4
        self.tagged = tagged
        self._next = struct.Struct("<I" if pointer == 4 else "<Q")
        self._word = struct.Struct("<I")
        self._ports = struct.Struct(">HH")

    def connection_span(self, va: int) -> tuple[int, int]:
        """What to read for `connection`."""
        return va - self.header, self.header + self.connections.size

    def socket_span(self, va: int) -> tuple[int, int]:
        """What to read for `socket`."""
        return va - self.header, self.header + self.sockets.size

    def connection(self, va: int, raw: bytes) -> RawConnection | None:
        """The connection at ``va``, from the bytes of its span."""
        at, layout = self.header, self.connections
        if self.tagged and raw[4:8] != CONNECTION_TAG:
            return None
        remote_port, local_port = self._ports.unpack_from(raw, at + layout.remote_port)
        (pid,) = self._word.unpack_from(raw, at + layout.pid)
        local, remote = (raw[at + where : at + where + 4] for where in (layout.local, layout.remote))
        if not local_port or not remote_port or pid & 3 or pid >= MAX_PID or not any(local) or not any(remote):
            return None
        return RawConnection(va, self._next.unpack_from(raw, at)[0], local, local_port, remote, remote_port, pid)

    def socket(self, va: int, raw: bytes) -> RawSocket | None:
        """The socket at ``va``, from the bytes of its span."""
        at, layout = self.header, self.sockets
        if self.tagged and raw[4:8] != SOCKET_TAG:
            return None
        (port,) = struct.unpack_from(">H", raw, at + layout.port)
        (protocol,) = struct.unpack_from("<H", raw, at + layout.port + 2)
        (pid,) = self._word.unpack_from(raw, at + layout.pid)
        (filetime,) = struct.unpack_from("<Q", raw, at + layout.created)
        created_ns = (filetime - _UNIX_EPOCH) * _STEP
        if not 0 < protocol < 256 or pid & 3 or pid >= MAX_PID or created_ns not in _PLAUSIBLE:
            return None
        if protocol in (6, 17) and not port:
            return None
        local = raw[at + layout.local : at + layout.local + 4]
        return RawSocket(va, self._next.unpack_from(raw, at)[0], local, port, protocol, pid, created_ns)


class Place(NamedTuple):
    """A table that was found: where its heads are, and how many."""

    va: int
    chains: int


class Tables(NamedTuple):
    """What `find_tables` believes, and why."""

    variables: Variables
    parser: Parser
    how: str
    sound: int  # objects that spoke for it


Kernel = Callable[[int], bool]  # whether an address can be the kernel's


def find_tables(
    space: AddressSpace,
    is_kernel: Kernel,
    base: int,
    size: int,
    symbols: SymbolTable | None,
    headers: pe.Headers | None,
) -> Tables:
    """Which variables are those of this tcpip.sys, and which layout its sockets have.

    Raises UnsupportedGuest when nothing fits, OutOfTime, GuestGone.
    """
    pointer = space.pointer_size
    probe = _Probe(space, is_kernel, base)
    named = _named(symbols)
    if named is not None:
        fit = probe.judge(named, thorough=False)
        if fit is None:
            raise UnsupportedGuest(("tcpip.sys does not have its tables where its symbols say",))
        return Tables(named, fit.parser, "by symbol", fit.sound)
    fits = []
    for row in ROWS:
        if row.pointer == pointer and max(row.variables) + pointer <= size:
            fit = probe.judge(row.variables)
            if fit is not None:
                fits.append((fit.sound, row, fit))
    if not fits and headers is not None:
        found = probe.search(headers)
        if found is not None:
            return Tables(found[0], found[1].parser, "measured", found[1].sound)
    if not fits:
        raise UnsupportedGuest(
            ("this build of tcpip.sys is not known, and its tables cannot be told by what is in them",)
        )
    sound, row, fit = max(fits, key=lambda each: each[0])
    rivals = [other.name for count, other, _ in fits if count == sound and other.variables != row.variables]
    if rivals:
        raise UnsupportedGuest((f"tcpip.sys may be that of {row.name} as well as of {', '.join(rivals)}",))
    return Tables(row.variables, fit.parser, row.name, sound)


def read_place(space: AddressSpace, is_kernel: Kernel, table: int, count: int, *, sockets: bool) -> Place | None:
    """Where the heads of a table are; ``table`` and ``count`` are the variables' addresses. None: not there.

    Raises UnreadableMemory.
    """
    va, chains = space.pointer(table), space.u32(count)
    most = MAX_SOCKET_CHAINS if sockets else MAX_CHAINS
    if not is_kernel(va) or va % space.pointer_size or not 0 < chains <= most:
        return None
    if not sockets and chains & chains - 1:
        return None
    return Place(va, chains)


def _named(symbols: SymbolTable | None) -> Variables | None:
    """The variables by their public names; the C compiler of x86 puts an underscore before them."""
    if symbols is None:
        return None
    found = []
    for name in NAMES:
        rva = symbols.find(name)
        found.append(symbols.find("_" + name) if rva is None else rva)
    return Variables(*(rva for rva in found if rva is not None)) if None not in found else None


class _Fit(NamedTuple):
    sound: int  # objects that can be what they should be
    parser: Parser


class _Probe:
    """Tries variables on one image."""

    def __init__(self, space: AddressSpace, is_kernel: Kernel, base: int) -> None:
        self._space, self._is_kernel, self._base = space, is_kernel, base

    def judge(self, variables: Variables, *, thorough: bool = True) -> _Fit | None:
        """How well variables fit. ``thorough``: without a single sound object they do not fit at all."""
        places = []
        for table, count, sockets in ((*variables[:2], False), (*variables[2:], True)):
            try:
                place = read_place(
                    self._space, self._is_kernel, self._base + table, self._base + count, sockets=sockets
                )
            except UnreadableMemory:
                return None
            heads = self.heads(place) if place is not None else None
            if heads is None:
                return None
            places.append(heads)
        connections, sockets_found = places
        size = self._space.pointer_size
        best: _Fit | None = None
        for tagged in (True, False):
            for layout in SOCKETS[size]:
                parser = Parser(size, layout, tagged=tagged)
                good, bad = self.count(parser, connections, sockets_found)
                # Live tables are read while they change; without pool tags nothing may be in doubt.
                enough = bad <= good // 4 if tagged else good >= MIN_UNTAGGED and not bad
                if good and enough and (best is None or good > best.sound):
                    best = _Fit(good, parser)
            if best is not None:
                return best
        if not connections and not sockets_found and not thorough:
            return _Fit(0, Parser(size, SOCKETS[size][-1]))
        return None

    def heads(self, place: Place) -> list[int] | None:
        """The chains' heads that are in use; None if one of them is no pointer that can be."""
        size = self._space.pointer_size
        raw = self._space.readv([(place.va, place.chains * size)])[0]
        if raw is None:
            return None
        heads = [head for (head,) in struct.iter_unpack("<I" if size == 4 else "<Q", raw) if head]
        wrong = any(head % (2 * size) or not self._is_kernel(head) for head in heads)
        return None if wrong else heads[:MAX_PROBED]

    def count(self, parser: Parser, connections: Iterable[int], sockets: Iterable[int]) -> tuple[int, int]:
        """How many objects at the chains' heads are sound, and how many are not."""
        connections, sockets = list(connections), list(sockets)
        raws = self._space.readv([parser.connection_span(va) for va in connections])
        good = sum(
            raw is not None and parser.connection(va, raw) is not None
            for va, raw in zip(connections, raws, strict=True)
        )
        raws = self._space.readv([parser.socket_span(va) for va in sockets])
        good += sum(
            raw is not None and parser.socket(va, raw) is not None for va, raw in zip(sockets, raws, strict=True)
        )
        return good, len(connections) + len(sockets) - good

    def search(self, headers: pe.Headers) -> tuple[Variables, _Fit] | None:
        """The variables by what they lead to: pointers in the image's data to arrays of tagged objects.

        AddrObjTableSize lies right behind AddrObjTable in every build that is known, and both tables have sockets or
        connections in them: a guest that has neither cannot be measured.
        """
        size = self._space.pointer_size
        words = list(self._words(headers))
        pointers = [(rva, value) for rva, value in words if self._is_kernel(value) and not value % (2 * size)]
        by_rva = dict(words)
        socket_tables = []
        for rva, value in pointers:
            chains = by_rva.get(rva + size, 0) & 0xFFFF_FFFF
            if 0 < chains <= MAX_SOCKET_CHAINS and self._tags(Place(value, chains)) == {SOCKET_TAG}:
                socket_tables.append((rva, rva + size))
        connection_tables = [
            rva
            for rva, value in pointers
            if any(self._tags(Place(value, chains)) == {CONNECTION_TAG} for chains in (512, 64))
        ]
        counts: dict[int, int] = {}
        for rva, value in self._counts(headers):
            if 16 <= value <= MAX_CHAINS and not value & value - 1:
                counts.setdefault(value, rva)
        best: tuple[Variables, _Fit] | None = None
        for sockets in socket_tables[:MAX_RIVALS]:
            for connections in connection_tables[:MAX_RIVALS]:
                for _, count in sorted(counts.items(), reverse=True):  # of those that see as much, the largest
                    variables = Variables(connections, count, *sockets)
                    fit = self.judge(variables)
                    if fit is not None and (best is None or fit.sound > best[1].sound):
                        best = variables, fit
        return best

    def _words(self, headers: pe.Headers) -> Iterator[tuple[int, int]]:
        size = self._space.pointer_size
        for rva, raw in self._data(headers):
            for index, (value,) in enumerate(struct.iter_unpack("<I" if size == 4 else "<Q", raw)):
                yield rva + index * size, value

    def _counts(self, headers: pe.Headers) -> Iterator[tuple[int, int]]:
        for rva, raw in self._data(headers):
            for index, (value,) in enumerate(struct.iter_unpack("<I", raw)):
                yield rva + 4 * index, value

    def _data(self, headers: pe.Headers) -> Iterator[tuple[int, bytes]]:
        """The pages of the image that it may write to."""
        left = MAX_DATA
        for section in headers.sections:
            if section.flags & pe.WRITE:
                for rva in range(section.rva & -4096, section.rva + section.size, 4096):
                    left -= 4096
                    if left < 0:
                        return
                    raw = self._space.readv([(self._base + rva, 4096)])[0]
                    if raw is not None:
                        yield rva, raw

    def _tags(self, place: Place) -> set[bytes]:
        """Pool tags of what the heads lead to; empty where one of them is no pointer."""
        size = self._space.pointer_size
        heads = self.heads(place)
        if not heads:
            return set()
        raws = self._space.readv([(head - 2 * size + 4, 4) for head in heads[:64]])
        return {raw or b"" for raw in raws}
