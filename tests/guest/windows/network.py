"""The sockets of machines made of bytes, and flows to ask for."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from ipaddress import ip_address

from appliance.guest.windows.isf import PdbId, SymbolTable, parse_isf
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.lookup import Lookup
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.sockets import Sockets
from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, GuestSocket, Region, Transport
from tests.guest.windows.machines import kernel_of
from tests.worlds.windows import Machine
from tests.worlds.windows.symbols import invented

US, THEM = "10.0.0.5", "93.184.216.34"


class Store:
    """The symbols of one family's tcpip.sys."""

    def __init__(self, family: str) -> None:
        self.family = family

    def find(self, pdb: PdbId) -> SymbolTable:
        assert pdb.name == "tcpip.pdb"
        return _tcpip(self.family)


@cache
def _tcpip(family: str) -> SymbolTable:
    return parse_isf(json.dumps(invented(family)[1].document).encode())


class Eye:
    """What looks at the sockets of one machine."""

    def __init__(self, machine: Machine, *, build: int | None = None, memory=None) -> None:
        self.machine = machine
        self.kernel: WindowsKernel = kernel_of(machine, memory)
        self.kernel.store = Store(machine.family)
        if build is not None:
            self.kernel.build = build
        self.processes = Processes(self.kernel)
        self.sockets = Sockets(self.kernel, self.processes)
        self.now_ns = 0
        self.lookup = Lookup(self.sockets, lambda: self.now_ns)

    def walk(self) -> list[GuestSocket]:
        return self.sockets.build_all(self.sockets.own(self.sockets.walk().sockets))

    def rows(self) -> set[tuple[str, str, str, str, str]]:
        """Protocol, state, both ends and the name of the owner, of a whole look."""
        return {row(socket) for socket in self.walk()}


def row(socket: GuestSocket) -> tuple[str, str, str, str, str]:
    owner = socket.owners[0].process.name if socket.owners else "-"
    return socket.protocol, socket.state, str(socket.local), str(socket.remote or "-"), owner


def flow(
    protocol: str,
    local: tuple[str, int],
    remote: tuple[str, int] = (THEM, 443),
    direction: Direction = Direction.OUT,
    *,
    midstream: bool = False,
    icmp_type: int | None = None,
) -> Flow:
    ends = [Endpoint(ip_address(address), port) for address, port in (local, remote)]
    transport = Transport(protocol)
    return Flow(
        FlowId(GuestId("file:test"), 1),
        FiveTuple(transport, *ends),
        direction,
        0,
        midstream=midstream,
        icmp_type=icmp_type,
    )


class Meddled:
    """Guest memory that changes while it is read: ``meddle`` is called before the reads whose numbers are given."""

    def __init__(self, memory, meddle: Callable[[], None], when: Callable[[int], bool]) -> None:
        self._memory, self._meddle, self._when = memory, meddle, when
        self.reads = 0
        self.live, self.name = True, "meddled"

    @property
    def regions(self) -> tuple[Region, ...]:
        return self._memory.regions

    def _count(self) -> None:
        self.reads += 1
        if self._when(self.reads):
            self._meddle()

    def read(self, gpa: int, size: int) -> bytes:
        self._count()
        return self._memory.read(gpa, size)

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        self._count()
        return self._memory.readv(spans)

    def vcpus(self) -> tuple:
        return self._memory.vcpus()

    def check_alive(self) -> None:
        self._memory.check_alive()

    def close(self) -> None:
        self._memory.close()
