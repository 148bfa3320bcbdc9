"""Connections and sockets of Windows XP and Server 2003, which stock Volatility 3 has no plugin for.

tcpip.sys keeps connections in the chains of ``_TCBTable`` and what is bound to a port in those of ``_AddrObjTable``.
Where they are is told by its public symbols, else by the appliance's table of builds, of which the one is believed that
leads to sound objects. The kernel and its types are Volatility's own; the structures of tcpip.sys are the appliance's
(appliance/guest/windows/xp_tables.py, with their sources).
"""

from __future__ import annotations

import datetime
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, exceptions, interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.objects import utility
from volatility3.framework.renderers import format_hints
from volatility3.framework.symbols.windows import pdbutil
from volatility3.framework.symbols.windows.extensions import network
from volatility3.plugins.parasight.home import find_appliance
from volatility3.plugins.windows import modules, pslist

if TYPE_CHECKING:
    from appliance.guest.windows.xp_tables import Tables

vollog = logging.getLogger(__name__)

MAX_CHAIN = 1 << 16  # objects of one table
PROTOCOLS = {1: "ICMP", 6: "TCPv4", 17: "UDPv4"}  # IANA
TCP = 6


class Connections(interfaces.plugins.PluginInterface):
    """Lists TCP connections and bound sockets of Windows XP and Server 2003.

    Columns are those of windows.netstat, and Flags. These systems keep no state with a connection: it is left blank.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """A Windows kernel."""
        return [
            requirements.ModuleRequirement(
                name="kernel", description="Windows kernel", architectures=["Intel32", "Intel64"]
            ),
            requirements.VersionRequirement(name="modules", component=modules.Modules, version=(3, 0, 0)),
            requirements.VersionRequirement(name="pslist", component=pslist.PsList, version=(3, 0, 0)),
            requirements.VersionRequirement(name="pdbutil", component=pdbutil.PDBUtility, version=(1, 0, 0)),
        ]

    def run(self) -> renderers.TreeGrid:
        """The table."""
        return renderers.TreeGrid(
            [
                ("Offset", format_hints.Hex),
                ("Proto", str),
                ("LocalAddr", str),
                ("LocalPort", int),
                ("ForeignAddr", str),
                ("ForeignPort", int),
                ("State", str),
                ("PID", int),
                ("Owner", str),
                ("Created", datetime.datetime),
                ("Flags", str),
            ],
            self._generator(),
        )

    def _generator(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
        find_appliance()
        from appliance.errors import GuestError  # noqa: PLC0415  found just now

        space = _Space(self.context, self.config["kernel"])
        module = self._tcpip()
        if module is None:
            vollog.error("tcpip.sys is not among the loaded modules")
            return
        base = space.canonical(int(module.DllBase))
        try:
            tables = self._tables(space, base, int(module.SizeOfImage))
        except GuestError as error:
            vollog.error(f"{error}; is this Windows XP or Server 2003? For later ones: windows.netchains")
            return
        vollog.info(f"tables of tcpip.sys: {tables.how}")
        owners = {
            int(process.UniqueProcessId): utility.array_to_string(process.ImageFileName)
            for process in pslist.PsList.list_processes(self.context, self.config["kernel"])
        }
        used = set()
        for one in _walk(space, tables, base, sockets=False):
            used.add((one.local_port, one.pid))
            ends = (_ip(one.local), one.local_port, _ip(one.remote), one.remote_port, "")
            yield 0, (format_hints.Hex(one.va), "TCPv4", *ends, *_owner(owners, one.pid, None))
        for one in _walk(space, tables, base, sockets=True):
            proto = PROTOCOLS.get(one.protocol, f"IP {one.protocol}")
            listens = one.protocol == TCP and (one.port, one.pid) not in used
            ends = (_ip(one.local), one.port, network.inaddr_any if listens else "*", 0, "LISTENING" if listens else "")
            yield 0, (format_hints.Hex(one.va), proto, *ends, *_owner(owners, one.pid, one.created_ns))

    def _tcpip(self) -> Any:
        for module in modules.Modules.list_modules(self.context, self.config["kernel"]):
            try:
                if module.BaseDllName.get_string().lower() == "tcpip.sys":
                    return module
            except exceptions.InvalidAddressException:
                continue
        return None

    def _tables(self, space: _Space, base: int, size: int) -> Tables:
        from appliance.guest.windows import xp_tables  # noqa: PLC0415  see find_appliance

        symbols: Any = self._symbols(base, size)
        return xp_tables.find_tables(space, space.is_kernel, base, size, symbols, None)  # type: ignore[arg-type]

    def _symbols(self, base: int, size: int) -> _Names | None:
        kernel = self.context.modules[self.config["kernel"]]
        path = interfaces.configuration.path_join(self.config_path, "tcpip")
        try:
            table = pdbutil.PDBUtility.symbol_table_from_pdb(
                self.context, path, kernel.layer_name, "tcpip.pdb", base, size
            )
        except (exceptions.VolatilityException, ValueError):
            return None
        return _Names(self.context, table)


class _Names:
    """Public symbols of tcpip.sys."""

    def __init__(self, context: interfaces.context.ContextInterface, table: str) -> None:
        self._context, self._table = context, table

    def find(self, name: str) -> int | None:
        try:
            return int(self._context.symbol_space.get_symbol(self._table + constants.BANG + name).address)
        except exceptions.SymbolError:
            return None


class _Space:
    """A layer of Volatility as the appliance reads one."""

    def __init__(self, context: interfaces.context.ContextInterface, kernel: str) -> None:
        self._layer = context.layers[context.modules[kernel].layer_name]
        self.pointer_size = 8 if self._layer.bits_per_register == 64 else 4
        self._lowest = 1 << 63 if self.pointer_size == 8 else 1 << 31

    def canonical(self, va: int) -> int:
        """With the sign extension that pointers in memory have."""
        return int(self._layer.canonicalize(va))

    def is_kernel(self, va: int) -> bool:
        """Whether an address can be the kernel's."""
        return self._lowest <= va < 1 << 8 * self.pointer_size

    def read(self, va: int, size: int) -> bytes:
        from appliance.errors import UnreadableMemory  # noqa: PLC0415  see find_appliance

        try:
            return bytes(self._layer.read(va & self._layer.address_mask, size))
        except exceptions.InvalidAddressException as error:
            raise UnreadableMemory(va, size) from error

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        from appliance.errors import UnreadableMemory  # noqa: PLC0415

        found: list[bytes | None] = []
        for va, size in spans:
            try:
                found.append(self.read(va, size))
            except UnreadableMemory:
                found.append(None)
        return found

    def u32(self, va: int) -> int:
        return int.from_bytes(self.read(va, 4), "little")

    def pointer(self, va: int) -> int:
        return int.from_bytes(self.read(va, self.pointer_size), "little")


def _walk(space: _Space, tables: Tables, base: int, *, sockets: bool) -> Iterator[Any]:
    """Every object of every chain that is sound, once."""
    from appliance.guest.windows import xp_tables  # noqa: PLC0415  see find_appliance

    where, parser = tables.variables, tables.parser
    table, count = (where.sockets, where.socket_chains) if sockets else (where.connections, where.connection_chains)
    place = xp_tables.read_place(space, space.is_kernel, base + table, base + count, sockets=sockets)  # type: ignore[arg-type]
    if place is None:
        return
    size, seen = space.pointer_size, set[int]()
    for index in range(place.chains):
        (raw,) = space.readv([(place.va + index * size, size)])
        va = int.from_bytes(raw or b"", "little")
        while va and va not in seen and len(seen) < MAX_CHAIN and space.is_kernel(va):
            seen.add(va)
            (raw,) = space.readv([parser.socket_span(va) if sockets else parser.connection_span(va)])
            one: Any = None if raw is None else parser.socket(va, raw) if sockets else parser.connection(va, raw)
            if one is None:
                vollog.debug(f"the chain breaks at {va:#x}")
                break
            yield one
            va = one.following


def _owner(owners: dict[int, str], pid: int, created_ns: int | None) -> tuple[Any, ...]:
    absent = renderers.UnreadableValue()
    when: Any = renderers.NotApplicableValue()
    if created_ns is not None:
        when = datetime.datetime.fromtimestamp(created_ns / 1e9, datetime.UTC)
    return pid, owners.get(pid) or absent, when, "" if pid in owners else "no-process"


def _ip(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, packed)
