"""What tcpip.sys keeps: endpoints on their two hash tables per partition, compartments, port pools.

Offsets of its structures are read from Volatility's own tables, in the installed package (symbols/windows/netscan), so
that both engines speak of the same thing; what it does not know is placed where MemProcFS looks (vmm/vmmnet.c): the
second linkage at +0x40, the tags of blocks, two ways to the address of a UDP endpoint. The hash tables grow as the
public copy of NT's own does (MsQuic, src/platform/hashtable.c): a directory of 128 buckets, then of 256, 512, ...
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from tests.worlds.windows.boot import Kernel, filetime
from tests.worlds.windows.planted import Process

STATES = {
    "CLOSE": 0, "LISTEN": 1, "SYN_SENT": 2, "SYN_RECV": 3, "ESTABLISHED": 4, "FIN_WAIT1": 5, "FIN_WAIT2": 6,
    "CLOSE_WAIT": 7, "CLOSING": 8, "LAST_ACK": 9, "TIME_WAIT": 12, "DELETE_TCB": 13,
}  # fmt: skip
LINKS = {1: 0x28, 2: 0x40}  # of an endpoint: volatility3 and MemProcFS know one each
WAITING = (
    0  # the third table of a partition: whose it is nobody tells; here TIME_WAIT may be linked there, at its start
)
PER_TABLE = 128
ENDPOINT_SIZE, LISTENER_SIZE, UDP_SIZE, TIME_WAIT_SIZE = 0x3A0, 0xD0, 0x1C0, 0xA8
DYNAMIC = 49152


@dataclass
class Endpoint:
    """One object of tcpip.sys, and what is true of it."""

    va: int
    protocol: str  # tcp, udp
    kind: str  # TcpE, TcpL, UdpA, TcTW
    process: Process | None
    local: tuple[str, int]
    remote: tuple[str, int] | None
    state: str
    tables: tuple[int, ...] = ()
    partition: int = 0
    bucket: int = 0
    created_ns: int = 0
    alive: bool = True
    compartment: int = 1


class Net:
    """tcpip.sys of one machine."""

    def __init__(self, kernel: Kernel, partitions: int, table_size: int, tag: bytes) -> None:
        self.kernel, self.partitions, self.table_size = kernel, partitions, table_size
        self.layout = Layout(kernel.family)
        self._base = 1 << (table_size.bit_length() - 1)
        self.living: list[Endpoint] = []
        self.tag = tag
        self._families: dict[int, int] = {}
        self._locals: dict[str, tuple[int, int]] = {}
        self._paths: dict[tuple[str, str], int] = {}
        self._chains: dict[tuple[str, int], list[Endpoint]] = {}
        self._partition_table()
        self._bitmaps: dict[str, int] = {}
        self._sets: dict[str, int] = {}
        self._pools = {name: self._compartments(name) for name in ("tcp", "udp")}
        self._assignments: dict[tuple[str, int], int] = {}

    # -- the verbs --

    def tcp(
        self,
        process: Process,
        local: tuple[str, int],
        remote: tuple[str, int],
        state: str,
        tables: tuple[int, ...],
        *,
        bucket: int | None,
        partition: int | None,
        hold_port: bool | None,
    ) -> Endpoint:
        kernel, at = self.kernel, self.layout
        body = bytearray(ENDPOINT_SIZE)
        owner = at["_TCP_ENDPOINT.Owner"]
        created = filetime(kernel.now_ns)
        for offset, value in (
            (at["_TCP_ENDPOINT.InetAF"], self._family(local[0])),
            (at["_TCP_ENDPOINT.AddrInfo"], self._path(local[0], remote[0])),
            (owner, process.va),
            (owner + 0x10, created),
            (at["_TCP_ENDPOINT.CreateTime"], created),
        ):
            struct.pack_into("<Q", body, offset, value)
        struct.pack_into("<I", body, at["_TCP_ENDPOINT.State"], STATES[state])
        struct.pack_into(">H", body, at["_TCP_ENDPOINT.LocalPort"], local[1])
        struct.pack_into(">H", body, at["_TCP_ENDPOINT.RemotePort"], remote[1])
        signature = self._hash(local, remote)
        if bucket is not None:
            mask = 2 * self._base - 1
            signature = signature & ~mask | bucket
        for offset in LINKS.values():
            struct.pack_into("<Q", body, offset + 0x10, signature)
        va = kernel.nonpaged.take(self.tag, bytes(body))
        for offset in LINKS.values():
            kernel.empty_list(va + offset)
        where = partition if partition is not None else signature >> 16 & 0xFFFF
        found = Endpoint(va, "tcp", "TcpE", process, local, remote, state, (), where % self.partitions)
        found.bucket = self._bucket(signature)
        found.created_ns = kernel.now_ns
        for table in tables:
            self._link(found, table)
        if hold_port or (hold_port is None and local[1] >= DYNAMIC and not self._chains.get(("tcp", local[1]))):
            self.take_port("tcp", local[1])
        self.living.append(found)
        return found

    def set_state(self, endpoint: Endpoint, state: str) -> None:
        self.kernel.space.write(endpoint.va + self.layout["_TCP_ENDPOINT.State"], struct.pack("<I", STATES[state]))
        endpoint.state = state

    def close(self, endpoint: Endpoint, *, poison: bool, reuse: bool) -> None:
        if endpoint.kind in ("TcpL", "UdpA"):
            self._unchain(endpoint)
        for table in endpoint.tables:
            self._unlink(endpoint, table)
        if endpoint.kind == "TcpE" and endpoint.local[1] >= DYNAMIC:
            self._bit("tcp", endpoint.local[1], on=False)
        endpoint.alive, endpoint.tables = False, ()
        self.living.remove(endpoint)
        self.kernel.nonpaged.give(endpoint.va, poison=poison, reuse=reuse)

    def time_wait(self, local: tuple[str, int], remote: tuple[str, int], *, linked: bool) -> Endpoint:
        kernel = self.kernel
        body = bytearray(TIME_WAIT_SIZE)
        struct.pack_into("<Q", body, 0x30, self._family(local[0]))
        struct.pack_into(">HH", body, 0x4A, local[1], remote[1])
        struct.pack_into("<Q", body, 0x50, self._local(local[0])[0])
        far = ip_address(remote[0]).packed
        body[0x58 : 0x58 + len(far)] = far
        struct.pack_into("<Q", body, 0x98, filetime(kernel.now_ns))
        va = kernel.nonpaged.take(b"TcTW", bytes(body))
        found = Endpoint(va, "tcp", "TcTW", None, local, remote, "TIME_WAIT", created_ns=kernel.now_ns)
        if linked:
            signature = self._hash(local, remote)
            kernel.set_u64(va + 0x10, signature)
            found.partition, found.bucket = (signature >> 16 & 0xFFFF) % self.partitions, self._bucket(signature)
            self._link(found, WAITING)
        self.living.append(found)
        return found

    def listener(self, process: Process, local: tuple[str, int], compartment: int) -> Endpoint:
        kernel, at = self.kernel, self.layout
        body = bytearray(LISTENER_SIZE)
        for offset, value in (
            (at["_TCP_LISTENER.Owner"], process.va),
            (at["_TCP_LISTENER.CreateTime"], filetime(kernel.now_ns)),
            (at["_TCP_LISTENER.InetAF"], self._family(local[0])),
            (at["_TCP_LISTENER.LocalAddr"], self._bound(local[0])),
        ):
            struct.pack_into("<Q", body, offset, value)
        struct.pack_into(">H", body, at["_TCP_LISTENER.Port"], local[1])
        va = kernel.nonpaged.take(b"TcpL", bytes(body))
        found = Endpoint(va, "tcp", "TcpL", process, local, None, "LISTEN", created_ns=kernel.now_ns)
        found.compartment = compartment
        return self._chain(found)

    def udp(
        self, process: Process, local: tuple[str, int], remote: tuple[str, int] | None, compartment: int
    ) -> Endpoint:
        kernel, at = self.kernel, self.layout
        body = bytearray(UDP_SIZE)
        for offset, value in (
            (at["_UDP_ENDPOINT.Owner"], process.va),
            (at["_UDP_ENDPOINT.CreateTime"], filetime(kernel.now_ns)),
            (at["_UDP_ENDPOINT.InetAF"], self._family(local[0])),
            (at["_UDP_ENDPOINT.LocalAddr"], self._udp_bound(local[0])),
        ):
            struct.pack_into("<Q", body, offset, value)
        struct.pack_into(">H", body, at["_UDP_ENDPOINT.Port"], local[1])
        if remote is not None and kernel.build >= 19041:
            far = bytearray(0xF8)
            packed = ip_address(remote[0]).packed
            where = 0xD8 if kernel.build >= 26100 else 0xC0
            far[where : where + len(packed)] = packed
            struct.pack_into(">H", body, 0x110, remote[1])
            struct.pack_into("<Q", body, 0x120, kernel.nonpaged.take(b"IPpa", bytes(far)))
        va = kernel.nonpaged.take(b"UdpA", bytes(body))
        state = "CLOSE" if remote is None else "ESTABLISHED"
        found = Endpoint(va, "udp", "UdpA", process, local, remote, state, created_ns=kernel.now_ns)
        found.compartment = compartment
        return self._chain(found)

    def take_port(self, protocol: str, port: int) -> None:
        self._bit(protocol, port, on=True)

    # -- addresses, shared by all who use them --

    def _family(self, address: str) -> int:
        """The _INETAF of an address."""
        number = 23 if ":" in address else 2
        if number not in self._families:
            body = bytearray(0x40)
            struct.pack_into("<H", body, self.layout["_INETAF.AddressFamily"], number)
            self._families[number] = self.kernel.nonpaged.take(b"InNl", bytes(body))
        return self._families[number]

    def _local(self, address: str) -> tuple[int, int]:
        """A _LOCAL_ADDRESS and the bytes of the address."""
        if address not in self._locals:
            take = self.kernel.nonpaged.take
            packed = take(b"Ipla", ip_address(address).packed.ljust(16, b"\0"))
            pointer = take(b"Ipla", struct.pack("<Q", packed))
            body = bytearray(0x40)
            struct.pack_into("<Q", body, self.layout["_LOCAL_ADDRESS.pData"], pointer)
            self._locals[address] = take(b"Ipla", bytes(body)), packed
        return self._locals[address]

    def _path(self, local: str, remote: str) -> int:
        """The _ADDRINFO of a pair of addresses."""
        key = local, remote
        if key not in self._paths:
            take = self.kernel.nonpaged.take
            far = take(b"Ippa", ip_address(remote).packed.ljust(32, b"\0"))
            body = bytearray(0x20)
            struct.pack_into("<Q", body, self.layout["_ADDRINFO.Local"], self._local(local)[0])
            struct.pack_into("<Q", body, self.layout["_ADDRINFO.Remote"], far)
            self._paths[key] = take(b"Ippa", bytes(body))
        return self._paths[key]

    def _bound(self, address: str) -> int:
        """The local address of a listener: none where it listens on all."""
        return 0 if int(ip_address(address)) == 0 else self._local(address)[0]

    def _udp_bound(self, address: str) -> int:
        """Volatility reads pointer, address; MemProcFS goes by +0x18, pointer, +0x18."""
        if int(ip_address(address)) == 0:
            return 0
        take = self.kernel.nonpaged.take
        packed = ip_address(address).packed.ljust(16, b"\0")
        holder = take(b"Ipla", bytes(0x18) + packed)
        slot = take(b"Ipla", struct.pack("<Q", holder))
        return take(b"Ipla", struct.pack("<QQQQ", holder + 0x18, 0, 0, slot))

    # -- the hash tables --

    def _partition_table(self) -> None:
        kernel, at = self.kernel, self.layout
        size = at.size("_PARTITION")
        body = bytearray(self.partitions * size)
        table = kernel.nonpaged.take(b"TcPt", len(body)) if len(body) < 0xF00 else kernel.nonpaged.take_pages(len(body))
        self._headers: dict[tuple[int, int], int] = {}
        width = -(-kernel.types.size("_RTL_DYNAMIC_HASH_TABLE") // 16) * 16  # MemProcFS wants them aligned so
        for number in range(self.partitions):
            block = kernel.nonpaged.take(b"TcHT", 3 * width)
            for place in range(3):
                header = block + place * width
                kernel.space.write(header, self._hash_table())
                struct.pack_into("<Q", body, number * size + 8 * place, header)
                self._headers[number, place] = header
            if size == 0x80:
                head = table + number * size + 0x18
                struct.pack_into("<QQ", body, number * size + 0x18, head, head)
        kernel.space.write(table, bytes(body))
        tcpip = kernel.tcpip.base
        kernel.set_u64(tcpip + kernel.tcpip_symbols.symbol("PartitionTable"), table)
        kernel.space.write(tcpip + kernel.tcpip_symbols.symbol("PartitionCount"), struct.pack("<I", self.partitions))

    def _hash_table(self) -> bytes:
        """A header, and its directory: beyond 128 buckets a directory of directories."""
        count = self.table_size
        parts, size = [], PER_TABLE
        while count > 0:
            parts.append(self._directory(min(size, count), size))
            count -= size
            size *= 2
        directory = parts[0]
        if self.table_size > PER_TABLE:
            first = b"".join(struct.pack("<Q", part) for part in parts).ljust(16 * 8, b"\0")
            directory = self.kernel.nonpaged.take(b"HTab", first)
        values = {
            "TableSize": self.table_size,
            "Pivot": self.table_size - self._base,
            "DivisorMask": self._base - 1,
            "Directory": directory,
        }
        return self.kernel.types.pack("_RTL_DYNAMIC_HASH_TABLE", values)

    def _directory(self, used: int, size: int) -> int:
        va = self.kernel.nonpaged.take(b"HTab", 16 * size)
        heads = (va + 16 * number for number in range(used))
        self.kernel.space.write(va, b"".join(struct.pack("<QQ", head, head) for head in heads))
        return va

    def head(self, partition: int, table: int, bucket: int) -> int:
        """The address of a bucket's list head."""
        kernel = self.kernel
        directory = kernel.get(self._headers[partition, table], "_RTL_DYNAMIC_HASH_TABLE.Directory")
        if self.table_size <= PER_TABLE:
            return directory + 16 * bucket
        absolute = bucket + PER_TABLE
        level = absolute.bit_length() - 1
        return kernel.u64(directory + 8 * (level - 7)) + 16 * (absolute ^ 1 << level)

    def _link(self, endpoint: Endpoint, table: int) -> None:
        head = self.head(endpoint.partition, table, endpoint.bucket)
        self._count(endpoint.partition, table, 1, int(self.kernel.u64(head) == head))
        self.kernel.insert_head(head, endpoint.va + LINKS.get(table, 0))
        endpoint.tables += (table,)

    def _unlink(self, endpoint: Endpoint, table: int) -> None:
        head = self.head(endpoint.partition, table, endpoint.bucket)
        self.kernel.remove(endpoint.va + LINKS.get(table, 0))
        self._count(endpoint.partition, table, -1, -int(self.kernel.u64(head) == head))

    def _count(self, partition: int, table: int, entries: int, buckets: int) -> None:
        header = self._headers[partition, table]
        for name, change in (("NumEntries", entries), ("NonEmptyBuckets", buckets)):
            path = f"_RTL_DYNAMIC_HASH_TABLE.{name}"
            self.kernel.set(header, path, self.kernel.get(header, path) + change)

    def _bucket(self, signature: int) -> int:
        """Which bucket a signature belongs to, while a table grows from one power of two to the next."""
        bucket = signature & self._base - 1
        return signature & 2 * self._base - 1 if bucket < self.table_size - self._base else bucket

    def _hash(self, local: tuple[str, int], remote: tuple[str, int]) -> int:
        value = 0x9E3779B9
        for address, port in (local, remote):
            for byte in ip_address(address).packed + struct.pack(">H", port):
                value = (value ^ byte) * 0x01000193 & 0xFFFF_FFFF
        return value ^ value >> 15 | 1 << 31

    # -- port pools --

    def _compartments(self, protocol: str) -> int:
        """The set of compartments, and the first of them; the address of its port pool."""
        kernel = self.kernel
        compartment, pool = self._compartment(protocol, protocol)
        outer = bytearray(0x180)
        struct.pack_into("<Q", outer, self.layout["_INET_COMPARTMENT_SET.InetCompartment"], compartment)
        symbol = "TcpCompartmentSet" if protocol == "tcp" else "UdpCompartmentSet"
        place = kernel.tcpip.base + kernel.tcpip_symbols.symbol(symbol)
        kernel.set_u64(place, kernel.nonpaged.take(b"InCS", bytes(outer)))
        self._sets[protocol] = kernel.u64(place)
        return pool

    def _compartment(self, protocol: str, name: str) -> tuple[int, int]:
        """Compartment, protocol compartment, port pool: the addresses of the first and the last."""
        kernel, at, take = self.kernel, self.layout, self.kernel.nonpaged.take
        pool = kernel.nonpaged.take_pages(at.size("_INET_PORT_POOL"))
        bitmap = self._bitmaps[name] = kernel.nonpaged.take_pages(65536 // 8)
        where = pool + at["_INET_PORT_POOL.PortBitMap"]
        kernel.space.write(where, kernel.types.pack("_RTL_BITMAP", {"SizeOfBitMap": 65536, "Buffer": bitmap}))
        inner, middle = bytearray(0x40), bytearray(0x60)
        struct.pack_into("<Q", inner, at["_PROTOCOL_COMPARTMENT.PortPool"], pool)
        inside = take(b"TcCo" if protocol == "tcp" else b"UdCo", bytes(inner))
        struct.pack_into("<Q", middle, at["_INET_COMPARTMENT.ProtocolCompartment"], inside)
        return take(b"InCo", bytes(middle)), pool

    def _pool_of(self, endpoint: Endpoint) -> str:
        """The name of the port pool of an endpoint. Further compartments are pointed to behind the first of a set."""
        protocol, number = endpoint.protocol, endpoint.compartment
        if number == 1:
            return protocol
        name = f"{protocol}/{number}"
        if name not in self._pools:
            compartment, self._pools[name] = self._compartment(protocol, name)
            at = self.layout["_INET_COMPARTMENT_SET.InetCompartment"] + 8 * (number - 1)
            self.kernel.set_u64(self._sets[protocol] + at, compartment)
        return name

    def _bit(self, protocol: str, port: int, *, on: bool) -> None:
        at = self._bitmaps[protocol] + port // 8
        value = self.kernel.space.read(at, 1)[0]
        value = value | 1 << port % 8 if on else value & ~(1 << port % 8)
        self.kernel.space.write(at, bytes([value]))

    def _entry(self, protocol: str, port: int) -> int:
        """Where a port's entry lies; the list of its 256 ports is made when the first is taken."""
        kernel, at = self.kernel, self.layout
        key = protocol, port >> 8
        width = at.size("_PORT_ASSIGNMENT_ENTRY")
        if key not in self._assignments:
            entries = kernel.nonpaged.take_pages(256 * width)
            body = bytearray(0x40)
            struct.pack_into("<Q", body, at["_PORT_ASSIGNMENT.InPaBigPoolBase"], entries)
            assignment = kernel.nonpaged.take(b"InPA", bytes(body))
            kernel.set_u64(self._pools[protocol] + at["_INET_PORT_POOL.PortAssignments"] + 8 * (port >> 8), assignment)
            self._assignments[key] = entries
        return self._assignments[key] + (port & 0xFF) * width + at["_PORT_ASSIGNMENT_ENTRY.Entry"]

    def _chain(self, endpoint: Endpoint) -> Endpoint:
        """The newest object of a port is first; each points at the one before it, inside, at its own Next field."""
        protocol, port = self._pool_of(endpoint), endpoint.local[1]
        chain = self._chains.setdefault((protocol, port), [])
        entry, next_at = self._entry(protocol, port), self._next(endpoint)
        if chain:
            self.kernel.set_u64(endpoint.va + next_at, chain[-1].va + next_at)
        self.kernel.set_u64(entry, endpoint.va + next_at | 1)
        self._bit(protocol, port, on=True)
        chain.append(endpoint)
        self.living.append(endpoint)
        return endpoint

    def _unchain(self, endpoint: Endpoint) -> None:
        protocol, port = self._pool_of(endpoint), endpoint.local[1]
        chain, next_at = self._chains[protocol, port], self._next(endpoint)
        index = chain.index(endpoint)
        before = chain[index - 1].va + next_at if index else 0
        if index + 1 < len(chain):
            self.kernel.set_u64(chain[index + 1].va + next_at, before)
        else:
            self.kernel.set_u64(self._entry(protocol, port), before | 1 if before else 0)
        chain.remove(endpoint)
        if not chain:
            self._bit(protocol, port, on=False)

    def _next(self, endpoint: Endpoint) -> int:
        return self.layout["_TCP_LISTENER.Next" if endpoint.kind == "TcpL" else "_UDP_ENDPOINT.Next"]


class Layout:
    """Offsets of tcpip.sys by Volatility's table; those of 26100 moved as MemProcFS says, its owner beyond."""

    def __init__(self, family: str) -> None:
        self._types = _netscan("20348" if family == "26100" else family)["user_types"]
        self._moved = {}
        if family == "26100":
            for name in ("_TCP_LISTENER", "_UDP_ENDPOINT"):
                for field, value in self._types[name]["fields"].items():
                    self._moved[f"{name}.{field}"] = value["offset"] + 8
            self._moved["_TCP_ENDPOINT.Owner"] = 0x328
            self._moved["_TCP_ENDPOINT.CreateTime"] = 0x338

    def __getitem__(self, path: str) -> int:
        if path in self._moved:
            return self._moved[path]
        name, field = path.split(".")
        return int(self._types[name]["fields"][field]["offset"])

    def size(self, name: str) -> int:
        return int(self._types[name]["size"])


@cache
def _netscan(build: str) -> dict:
    spec = find_spec("volatility3")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "framework/symbols/windows/netscan" / f"netscan-win10-{build}-x64.json"
    return json.loads(path.read_text())
