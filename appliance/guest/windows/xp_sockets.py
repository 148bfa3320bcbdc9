"""What is in the tables of Windows XP's and Server 2003's tcpip.sys: found, kept up to date, owned and described.

Connections are found by both their ends, sockets by protocol and port. What tcpip.sys does not tell of them: see `xp`.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address
from typing import Final, TypeVar

from appliance.errors import GuestError, GuestGone, Implausible, OutOfTime, UnreadableMemory, UnsupportedGuest
from appliance.guest.windows import pe
from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.kernel import KernelModule, WindowsKernel
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.xp_chains import ChainTable
from appliance.guest.windows.xp_owners import Holder, Holders
from appliance.guest.windows.xp_tables import Parser, RawConnection, RawSocket, Tables, find_tables, read_place
from appliance.model import Endpoint, Flag, Gap, GuestSocket, IpAddress, Owner, Transport

TRIES: Final = 3
MAX_GAPS: Final = 64
MAX_BUILT: Final = 1 << 17
TCP, UDP, ICMP = 6, 17, 1
CLIENTS: Final = range(1025, 5001)  # ports that a client is given (registry: MaxUserPort, 5000 unless changed)
COMPARTMENT: Final = 1  # there is one
UNKNOWN: Final = "UNKNOWN"  # ss' word for it, too
_TRANSPORTS: Final = {TCP: Transport.TCP, UDP: Transport.UDP, ICMP: Transport.ICMP}
_ANY: Final = bytes(4)

Key = tuple[bytes, int, bytes, int]
Raw = TypeVar("Raw", RawConnection, RawSocket)


class XpSockets:
    """The connections and sockets of one guest."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        """Find tcpip.sys. Raises UnsupportedGuest when it is not loaded, GuestError."""
        self._kernel, self._space = kernel, kernel.space
        self.holders = Holders(kernel, processes)
        modules = {module.name.lower(): module for module in reversed(kernel.modules())}
        module = modules.get("tcpip.sys")
        if module is None:
            raise UnsupportedGuest(("tcpip.sys is not loaded: this guest has no network, or hides its driver",))
        self.module: KernelModule = module
        self.v6 = modules.get("tcpip6.sys")
        self._symbols, self._headers = _symbols_of(kernel, module), _headers_of(kernel, module)
        self._tables: Tables | None = None
        self._born: dict[int, tuple[RawConnection, int]] = {}  # when each connection was first seen
        self.by_key: dict[Key, RawConnection] = {}
        self.by_port: dict[tuple[int, int], list[RawSocket]] = {}
        self.by_local: dict[int, list[RawConnection]] = {}
        self._built: dict[int, tuple[RawConnection | RawSocket, Owner | None, GuestSocket]] = {}
        self._listened: set[tuple[int, int]] = set()  # sockets that were seen without a connection
        self._changes = (-1, -1)
        self.connections: ChainTable[RawConnection]
        self.sockets: ChainTable[RawSocket]
        self.parser: Parser
        self.torn = 0

    @property
    def how(self) -> str:
        """By what the tables were found: "by symbol", a build's name, "measured"; empty before the first look."""
        return self._tables.how if self._tables is not None else ""

    @property
    def is_found(self) -> bool:
        """Whether the tables were found, and something in them."""
        return self._tables is not None

    # -- kept up to date --

    def refresh(self, *, whole: bool = False) -> None:
        """Bring both tables up to date. Raises UnsupportedGuest (no table fits), UnreadableMemory, OutOfTime."""
        tables = self._find(afresh=whole and self._tables is None)
        variables, base = tables.variables, self.module.base
        for _ in range(TRIES):
            is_kernel = self._kernel.is_kernel
            first = read_place(
                self._space, is_kernel, base + variables.connections, base + variables.connection_chains, sockets=False
            )
            second = read_place(
                self._space, is_kernel, base + variables.sockets, base + variables.socket_chains, sockets=True
            )
            if first is None or second is None:
                self._tables = None
                raise Implausible("the tables of tcpip.sys are not where they were")
            settled = self.sockets.look(second)  # first: of what is bound meanwhile, a connection tells later
            settled &= self.connections.look(first)
            lost = len(self.sockets.lost) + len(self.connections.lost)
            if settled and not lost:
                break
            self.torn += 1
            if not self._kernel.memory.live:
                break
        self._index(self._kernel.read_shared().epoch_ns)

    def _find(self, *, afresh: bool) -> Tables:
        if self._tables is not None and not afresh:
            return self._tables
        module = self.module
        tables = find_tables(
            self._space, self._kernel.is_kernel, module.base, module.size, self._symbols, self._headers
        )
        if tables.sound:  # else there was nothing yet by which to choose a layout
            self._tables = tables
        parser = self.parser = tables.parser
        is_kernel = self._kernel.is_kernel
        self.connections = ChainTable(self._space, is_kernel, parser.connection_span, parser.connection)
        self.sockets = ChainTable(self._space, is_kernel, parser.socket_span, parser.socket)
        self._changes = (-1, -1)
        return tables

    def _index(self, now_ns: int) -> None:
        changes = (self.connections.changes, self.sockets.changes)
        if changes == self._changes:
            return
        self._changes = changes
        self.by_key, self.by_local, self.by_port = {}, {}, {}
        born = self._born
        self._born = {}
        for raw in self.connections:
            self.by_key[key_of(raw)] = raw
            self.by_local.setdefault(raw.local_port, []).append(raw)
            before = born.get(raw.va)
            same = before is not None and before[0].identity == raw.identity
            self._born[raw.va] = (raw, before[1] if before is not None and same else now_ns)
        for socket in self.sockets:
            self.by_port.setdefault((socket.protocol, socket.port), []).append(socket)
        free = {
            (socket.va, socket.created_ns)
            for (protocol, port), group in self.by_port.items()
            if protocol == TCP and port not in self.by_local
            for socket in group
        }
        alive = {(socket.va, socket.created_ns) for socket in self.sockets}
        self._listened = (self._listened | free) & alive

    # -- what is there --

    @property
    def is_whole(self) -> bool:
        """Whether no chain of the last look broke off."""
        return not self.sockets.lost and not self.connections.lost

    def gaps(self) -> list[Gap]:
        """Where chains broke off in the last look."""
        return [*_gaps(self.connections, "connection table"), *_gaps(self.sockets, "socket table")]

    def bound(self, protocol: int, local: Endpoint) -> list[RawSocket]:
        """Sockets that take what comes to this address: those bound to it, else those bound to any."""
        group = self.by_port.get((protocol, local.port), [])
        exact = [each for each in group if each.local == local.ip.packed]
        if exact:
            return exact
        if local.ip.is_multicast or local.ip == _broadcast():
            return group
        return [each for each in group if each.local == _ANY]

    def state(self, socket: RawSocket) -> str | None:
        """A socket's state; None for a client's, whose connection is told instead."""
        if socket.protocol != TCP:
            return "CLOSE"
        connections = len(self.by_local.get(socket.port, ()))
        sockets = len(self.by_port.get((TCP, socket.port), ()))
        listens = connections > sockets or not connections or socket.port not in CLIENTS
        return "LISTEN" if listens or (socket.va, socket.created_ns) in self._listened else None

    def holder(self, raw: RawConnection | RawSocket, *, read: bool = True) -> Holder:
        """Who has the pid that an object names."""
        return self.holders.find(raw.pid, self.born_ns(raw), read=read)

    def born_ns(self, raw: RawConnection | RawSocket) -> int:
        """When it was made, at the latest: a connection not after it was first seen, nor before its only socket."""
        if isinstance(raw, RawSocket):
            return raw.created_ns
        seen = self._born.get(raw.va)
        born_ns = seen[1] if seen is not None and seen[0] is raw else self._kernel.read_shared().epoch_ns
        group = self.by_port.get((TCP, raw.local_port), ())
        made = [each.created_ns for each in group if each.pid == raw.pid]
        return min(born_ns, made[0]) if len(made) == 1 else born_ns

    def is_still(self, known: RawConnection, raw: bytes | None) -> bool:
        """Whether these bytes are still those of a known connection."""
        now = self.parser.connection(known.va, raw) if raw is not None else None
        return now is not None and now.identity == known.identity

    def is_same(self, known: RawConnection) -> bool:
        """Whether a known connection still lies where it did. Raises OutOfTime, GuestGone."""
        return self.is_still(known, self._space.readv([self.parser.connection_span(known.va)])[0])

    # -- what is told --

    def build(
        self, raw: RawConnection | RawSocket, holder: Holder, state: str, flag: Flag | None = None
    ) -> GuestSocket:
        """What is told of an object; the same as before where nothing has changed."""
        flags = tuple(each for each in (flag, holder.flag) if each is not None)
        known = self._built.get(raw.va)
        if (
            known is not None
            and known[:2] == (raw, holder.owner)
            and (known[2].state, known[2].flags) == (state, flags)
        ):
            return known[2]
        owners = (holder.owner,) if holder.owner is not None else ()
        if isinstance(raw, RawConnection):
            protocol, port = Transport.TCP, raw.local_port
            remote = Endpoint(_ip(raw.remote), raw.remote_port)
        else:
            protocol = _TRANSPORTS.get(raw.protocol, Transport.RAW)
            port, remote = raw.port if raw.protocol in (TCP, UDP) else raw.protocol, None
        socket = GuestSocket(
            protocol, state, Endpoint(_ip(raw.local), port), remote, owners, COMPARTMENT, raw.va, flags=flags
        )
        if len(self._built) > MAX_BUILT:
            self._built.clear()
        self._built[raw.va] = raw, holder.owner, socket
        return socket


def _gaps(table: ChainTable[Raw], what: str) -> list[Gap]:
    return [Gap(what, va, why) for va, why in table.lost[:MAX_GAPS]]


def _symbols_of(kernel: WindowsKernel, module: KernelModule) -> SymbolTable | None:
    """The names of tcpip.sys, where they can be had."""
    try:
        return kernel.image_symbols(module)
    except (GuestGone, OutOfTime):
        raise
    except GuestError:
        return None


def _headers_of(kernel: WindowsKernel, module: KernelModule) -> pe.Headers | None:
    try:
        return pe.read_headers(kernel.space, module.base)
    except (Implausible, UnreadableMemory):
        return None


def key_of(raw: RawConnection) -> Key:
    """What a connection is found by: both its ends, in network order."""
    return raw.local, raw.local_port, raw.remote, raw.remote_port


def socket_state(raw: RawSocket) -> str:
    """The state of a socket that is told by itself."""
    return "LISTEN" if raw.protocol == TCP else "CLOSE"


@lru_cache(maxsize=8192)
def _ip(raw: bytes) -> IPv4Address:
    return IPv4Address(raw)


@lru_cache(maxsize=1)
def _broadcast() -> IpAddress:
    return IPv4Address(0xFFFF_FFFF)
