"""``windows.netstat`` that sees every connection: all links of all chains, both tables; by a scan also what is in none.

tcpip.sys keeps a TCP connection in two hash tables of its partition (``RTL_DYNAMIC_HASH_TABLE``): linked at +0x28
in the one at +8, at +0x40 in the one at +0x10. Stock ``windows.netstat`` reads the first link of each bucket of the
first table only. A connection that one of the two tables lacks was unlinked from it, and is told so. What is closed but
still remembered (TIME_WAIT) and what was unlinked from both is found by pool tag, with ``--scan``.

Sources: structures from Volatility's own tables (symbols/windows/netscan); RTL_DYNAMIC_HASH_TABLE: nt symbols, and its
two-level directory as in MsQuic's src/platform/hashtable.c, which is the same code; the linkage at +0x40 and the blocks
of TIME_WAIT: observed in tcpip.sys of Windows 10 (MemProcFS reads them so, too).
"""

from __future__ import annotations

import datetime
import logging
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from volatility3.framework import constants, exceptions, interfaces, renderers
from volatility3.framework.configuration import requirements
from volatility3.framework.renderers import format_hints
from volatility3.framework.symbols.windows import pdbutil
from volatility3.framework.symbols.windows.extensions import network
from volatility3.plugins.windows import netscan, netstat, poolscanner

vollog = logging.getLogger(__name__)

MAX_PARTITIONS = 4096  # a byte was enough until machines had more than 255 processors
MAX_BUCKETS = 1 << 20
MAX_LINKS = 1 << 18  # of one table
FIRST_DIRECTORY = 128  # buckets of the first second-level directory; each further one doubles the table
LINKS = ((8, 0x28), (0x10, 0x40))  # where a partition points to a table, and where its links are in an endpoint
OLD_PARTITION = 0x80  # bytes, before build 19041
BUCKET = 0x10  # a LIST_ENTRY on x64
ENDPOINT_TAGS = (b"TcpE", b"TTcb")  # TTcb: since build 20348
TIME_WAIT_TAG = b"TcTW"
TIME_WAIT_SIZE = 0x60  # bytes of its block that are read
_INET_AF, _LOCAL_PORT, _LOCAL, _REMOTE = 0x30, 0x4A, 0x50, 0x58  # in that block; the remote port follows the local one


class _Table(NamedTuple):
    """The head of an RTL_DYNAMIC_HASH_TABLE."""

    size: int
    entries: int
    directory: int


class NetChains(interfaces.plugins.PluginInterface):
    """Lists network connections through every link of both connection tables, and flags what only one of them has.

    Columns are those of windows.netstat, and Flags: one-table-only, unlinked-endpoint, time-wait, no-owner.
    """

    _required_framework_version = (2, 0, 0)
    _version = (1, 0, 0)

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """A Windows kernel of 64 bits, and what stock netstat is made of."""
        return [
            requirements.ModuleRequirement(name="kernel", description="Windows kernel", architectures=["Intel64"]),
            requirements.VersionRequirement(name="netscan", component=netscan.NetScan, version=(2, 0, 0)),
            requirements.VersionRequirement(name="netstat", component=netstat.NetStat, version=(2, 0, 0)),
            requirements.VersionRequirement(name="pdbutil", component=pdbutil.PDBUtility, version=(1, 0, 0)),
            requirements.VersionRequirement(name="poolscanner", component=poolscanner.PoolScanner, version=(3, 0, 0)),
            requirements.BooleanRequirement(
                name="scan",
                description="Look for what is in no table, by pool tag: TIME_WAIT and unlinked connections. Slow.",
                default=False,
                optional=True,
            ),
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
        kernel = self.context.modules[self.config["kernel"]]
        self._layer = self.context.layers[kernel.layer_name]
        self._types = netscan.NetScan.create_netscan_symbol_table(self.context, self.config["kernel"], self.config_path)
        tcpip = netstat.NetStat.get_tcpip_module(self.context, self.config["kernel"])
        if tcpip is None:
            vollog.error("tcpip.sys is not among the loaded modules")
            return
        base = int(tcpip.DllBase)
        path = interfaces.configuration.path_join(self.config_path, "tcpip")
        try:
            names = pdbutil.PDBUtility.symbol_table_from_pdb(
                self.context, path, kernel.layer_name, "tcpip.pdb", base, tcpip.SizeOfImage
            )
        except exceptions.VolatilityException as error:
            vollog.error(f"the symbols of tcpip.sys cannot be had: {error}; put them where vol -s looks")
            return
        yield from self._connections(base, names)
        yield from self._ports(base, names, kernel.layer_name)

    # -- connections --

    def _connections(self, base: int, names: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
        partitions = self._pointer(base + self._rva(names, "PartitionTable"))
        count = int.from_bytes(self._layer.read(base + self._rva(names, "PartitionCount"), 4), "little")
        if not 0 < count <= MAX_PARTITIONS:
            vollog.error(f"PartitionCount is {count}: not believed")
            return
        try:
            size = self.context.symbol_space.get_type(self._types + constants.BANG + "_PARTITION").size
        except exceptions.SymbolError:  # Volatility's table for this build has no partitions: stock netstat stops here
            size = OLD_PARTITION
        found: dict[int, set[int]] = {}
        for number in range(count):
            for table, (at, link) in enumerate(LINKS):
                for entry in self._links(partitions + number * size + at):
                    found.setdefault(entry - link, set()).add(table)
        for offset, tables in found.items():
            endpoint = self._object("_TCP_ENDPOINT", offset)
            if endpoint.is_valid():
                yield 0, (*self._connection(endpoint), _flags(endpoint, tables))
        if self.config.get("scan"):
            yield from self._scan(set(found))

    def _scan(self, linked: set[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """What has a connection's pool tag and is in no table."""
        kind = poolscanner.PoolType.NONPAGED | poolscanner.PoolType.FREE
        endpoint = self._types + constants.BANG + "_TCP_ENDPOINT"
        size = self.context.symbol_space.get_type(endpoint).size
        wanted = [
            poolscanner.PoolConstraint(tag, type_name=endpoint, size=(size, None), page_type=kind)
            for tag in ENDPOINT_TAGS
        ]
        block = self._types + constants.BANG + "_IN_ADDR"  # only where it lies is taken of it
        wanted.append(
            poolscanner.PoolConstraint(TIME_WAIT_TAG, type_name=block, size=(TIME_WAIT_SIZE, None), page_type=kind)
        )
        for constraint, one, _ in poolscanner.PoolScanner.generate_pool_scan(
            self.context, self.config["kernel"], wanted
        ):
            if constraint.tag == TIME_WAIT_TAG:
                row = self._time_wait(one.vol.offset)
                if row is not None:
                    yield 0, row
            elif one.vol.offset not in linked and one.is_valid() and one.get_remote_address():
                yield 0, (*self._connection(one), _flags(one, set()))

    def _links(self, pointer: int) -> Iterator[int]:
        """Every entry of every chain of the table that is pointed to there."""
        try:
            at = self._pointer(pointer)
            table = self._table(at)
        except exceptions.InvalidAddressException:
            return
        if table is None:
            return
        seen: set[int] = set()
        for bucket in self._buckets(table):
            try:
                entry, before = self._pointer(bucket), bucket
                while entry != bucket and len(seen) < MAX_LINKS:
                    if entry in seen or self._pointer(entry + 8) != before:
                        vollog.debug(f"the chain of bucket {bucket:#x} breaks at {entry:#x}")
                        break
                    seen.add(entry)
                    yield entry
                    entry, before = self._pointer(entry), entry
            except exceptions.InvalidAddressException:
                continue

    def _table(self, at: int) -> _Table | None:
        one = self.context.modules[self.config["kernel"]].object(
            object_type="_RTL_DYNAMIC_HASH_TABLE", offset=at, absolute=True
        )
        table = _Table(int(one.TableSize), int(one.NumEntries), int(one.Directory))
        return table if 0 < table.size <= MAX_BUCKETS and 0 < table.entries <= MAX_LINKS else None

    def _buckets(self, table: _Table) -> Iterator[int]:
        """The heads of the chains. Beyond 128 buckets the directory has a second level: 128, 256, 512 ..."""
        if table.size <= FIRST_DIRECTORY:
            yield from range(table.directory, table.directory + table.size * BUCKET, BUCKET)
            return
        left, size, index = table.size, FIRST_DIRECTORY, 0
        while left > 0:
            count = min(left, size)
            try:
                first = self._pointer(table.directory + index * 8)
                yield from range(first, first + count * BUCKET, BUCKET)
            except exceptions.InvalidAddressException:
                vollog.debug(f"directory {index} of the table is not there")
            left -= count
            size, index = 2 * size, index + 1

    def _connection(self, one: Any) -> tuple[Any, ...]:
        absent = renderers.UnreadableValue()
        try:
            state = one.State.description
        except ValueError:
            state = absent
        return (
            format_hints.Hex(one.vol.offset),
            "TCPv4" if one.get_address_family() == network.AF_INET else "TCPv6",
            one.get_local_address() or absent,
            one.LocalPort,
            one.get_remote_address() or absent,
            one.RemotePort,
            state,
            *_owner(one),
        )

    def _time_wait(self, at: int) -> tuple[Any, ...] | None:
        """A block of a connection in TIME_WAIT: it has no owner any more."""
        absent = renderers.NotApplicableValue()
        try:
            data = self._layer.read(at, TIME_WAIT_SIZE + 8)
            family = self._object("_INETAF", _word(data, _INET_AF) & self._layer.address_mask).AddressFamily
            kind, size = (socket.AF_INET, 4) if family == network.AF_INET else (socket.AF_INET6, 16)
            if family not in (network.AF_INET, network.AF_INET6):
                return None
            where = self._pointer(self._pointer((_word(data, _LOCAL) & self._layer.address_mask) + 0x10))
            local = socket.inet_ntop(kind, self._layer.read(where, size))
        except exceptions.InvalidAddressException:
            return None
        near, far = struct.unpack_from(">HH", data, _LOCAL_PORT)
        remote = socket.inet_ntop(kind, data[_REMOTE : _REMOTE + size])
        proto = "TCPv4" if size == 4 else "TCPv6"
        ends = (local, near, remote, far)
        return (format_hints.Hex(at), proto, *ends, "TIME_WAIT", absent, absent, absent, "time-wait")

    # -- listeners and UDP --

    def _ports(self, base: int, names: str, layer: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Through the port pools, as stock netstat does."""
        try:
            udp, tcp = netstat.NetStat.find_port_pools(self.context, layer, self._types, names, base)
        except (exceptions.SymbolError, exceptions.InvalidAddressException) as error:
            vollog.error(f"the port pools cannot be found: {error}")
            return
        for pool, kind in ((tcp, "tcp"), (udp, "udp")):
            seen: set[int] = set()
            for port in self._taken(pool):
                for one in netstat.NetStat.enumerate_structures_by_port(
                    self.context, layer, self._types, port, pool, kind
                ):
                    if one.vol.offset in seen or len(seen) > MAX_LINKS:
                        break
                    seen.add(one.vol.offset)
                    if one.is_valid():
                        yield from self._listening(one, kind)

    def _taken(self, pool: int) -> list[int]:
        """The ports whose bit is set."""
        try:
            bits = self._object("_INET_PORT_POOL", pool).PortBitMap
            data = self._layer.read(int(bits.Buffer), min(int(bits.SizeOfBitMap), 1 << 16) // 8, pad=True)
        except exceptions.InvalidAddressException:
            return []
        return [8 * at + bit for at, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1]

    def _listening(self, one: Any, kind: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
        offset = format_hints.Hex(one.vol.offset)
        for version, local, remote in one.dual_stack_sockets():
            ends = (local, one.Port, remote, 0, "LISTENING") if kind == "tcp" else (local, one.Port, "*", 0, "")
            yield 0, (offset, kind.upper() + version, *ends, *_owner(one), "")

    # -- private --

    def _rva(self, table: str, name: str) -> int:
        return int(self.context.symbol_space.get_symbol(table + constants.BANG + name).address)

    def _pointer(self, at: int) -> int:
        """As Volatility keeps addresses: without their sign extension."""
        return int.from_bytes(self._layer.read(at, 8), "little") & self._layer.address_mask

    def _object(self, name: str, at: int) -> Any:
        return self.context.object(self._types + constants.BANG + name, layer_name=self._layer.name, offset=at)


def _owner(one: Any) -> tuple[Any, Any, Any]:
    """Pid, name and time of creation."""
    absent = renderers.UnreadableValue()
    return one.get_owner_pid() or absent, one.get_owner_procname() or absent, one.get_create_time() or absent


def _flags(one: Any, tables: set[int]) -> str:
    flags = [] if len(tables) == len(LINKS) else ["one-table-only" if tables else "unlinked-endpoint"]
    if one.get_owner_pid() is None:
        flags.append("no-owner")
    return " ".join(flags)


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
