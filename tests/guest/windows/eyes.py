"""The eye on machines made of bytes, and what it saw in short words."""

import json
from functools import cache

from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.isf import PdbId, SymbolTable, parse_isf
from appliance.guest.windows.symbols import SymbolStore
from appliance.model import Flag, GuestSocket, Snapshot
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.real import REAL
from tests.worlds.windows.symbols import invented


@cache
def _tables() -> dict[PdbId, SymbolTable]:
    tables = [parse_isf(json.dumps(table.document).encode()) for family in FAMILIES for table in invented(family)]
    return {table.pdb: table for table in tables}


class Store:
    """The symbols of all invented families, and real ones where there are any."""

    def find(self, pdb: PdbId) -> SymbolTable:
        return _tables()[pdb] if pdb in _tables() else SymbolStore([REAL]).find(pdb)


class As:
    """The RAM of a machine, as that of a running guest or of one that stands still."""

    def __init__(self, memory, *, live: bool) -> None:
        self._memory, self.live = memory, live

    def __getattr__(self, name):
        return getattr(self._memory, name)


def eye_of(machine: Machine, *, live: bool = True, thorough: bool = True, memory=None, **options) -> WindowsEye:
    """The eye on a machine, attached as to any guest."""
    memory = As(memory or machine.memory(), live=live)
    return WindowsEye(attach(memory, symbols=Store()), thorough=thorough, **options)


def odd_sockets(snapshot: Snapshot) -> dict[tuple[str, int], set[Flag]]:
    """The sockets that have flags, by protocol and local port."""
    return {(one.protocol.value, one.local.port): set(one.flags) for one in snapshot.sockets if one.flags}


def odd_processes(snapshot: Snapshot) -> dict[int, set[Flag]]:
    """The processes that have flags, by pid."""
    return {one.pid: set(one.flags) for one in snapshot.processes if one.flags}


def row(socket: GuestSocket) -> tuple[str, str, str, str, tuple[int, ...]]:
    """A socket in comparable words: protocol, state, both ends, pids."""
    pids = tuple(owner.process.pid for owner in socket.owners)
    return socket.protocol.value, socket.state, str(socket.local), str(socket.remote or "*"), pids


def truth(machine: Machine) -> set[tuple[str, str, str, str, tuple[int, ...]]]:
    """What a perfect eye would say of a machine's living sockets."""

    def text(end):
        return "*" if end is None else f"[{end[0]}]:{end[1]}" if ":" in end[0] else f"{end[0]}:{end[1]}"

    return {
        (one.protocol, one.state, text(one.local), text(one.remote), (one.process.pid,) if one.process else ())
        for one in machine.truth().connections
    }
