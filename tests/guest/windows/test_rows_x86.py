"""Windows Vista to 10 with pointers of 4 bytes: the tables of tcpip.sys alone, laid out by each row in a small RAM."""

import struct
from ipaddress import ip_address

import pytest

from appliance.guest.windows.compartments import Compartments
from appliance.guest.windows.endpoints import Connections, Kind, Partitions
from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.kernel import UserShared, WindowsKernel
from appliance.guest.windows.layouts import X86, Layout
from appliance.guest.windows.measure import Measure
from appliance.guest.windows.ports import Ports
from appliance.guest.windows.space import AddressSpace, Mode
from tests.guest.windows.network import THEM, US
from tests.worlds.tiny import ByteMemory

BASE, RAM = 0x8000_0000, 4 << 20
SYMBOLS = {name: BASE + 0x3000 + 4 * at for at, name in enumerate(("PartitionTable", "PartitionCount", "TcpPortPool"))}
SYMBOLS["UdpPortPool"] = BASE + 0x300C
OWNERS = [BASE + 0x200000, BASE + 0x201000]


class Small:
    """A RAM that is mapped by large pages, and blocks of pool in it."""

    def __init__(self, row: Layout) -> None:
        self.row, self.ram, self.next = row, bytearray(RAM), 0x10000
        struct.pack_into("<Q", self.ram, 0x1000 + 8 * 2, 0x2000 | 1)
        for number in range(RAM >> 21):
            struct.pack_into("<Q", self.ram, 0x2000 + 8 * number, number << 21 | 0x83)
        self.families = {number: self.take(b"InNl", 0x40) for number in (2, 23)}
        for number, va in self.families.items():
            self.put(va + row.family, "<H", number)

    def take(self, tag: bytes, size: int) -> int:
        at = self.next
        self.next += 8 + (size + 7 & -8)
        self.ram[at + 4 : at + 8] = tag
        return BASE + at + 8

    def put(self, va: int, code: str, *values: int) -> None:
        struct.pack_into(code, self.ram, va - BASE, *values)

    def store(self, data: bytes, tag: bytes = b"Ipla") -> int:
        va = self.take(tag, len(data))
        self.ram[va - BASE : va - BASE + len(data)] = data
        return va

    def local(self, address: str) -> int:
        packed = self.store(ip_address(address).packed)
        holder = self.take(b"Ipla", 0x20)
        self.put(holder + self.row.local_data, "<I", self.store(struct.pack("<I", packed)))
        return holder

    def table(self, link: int, objects: list[int]) -> int:
        """A hash table whose objects are all in its fifth bucket."""
        directory, header = self.take(b"HTab", 128 * 8), self.take(b"TcHT", 0x28)
        for bucket in range(128):
            self.put(directory + 8 * bucket, "<II", *[directory + 8 * bucket] * 2)
        ring = [directory + 40, *(each + link for each in objects)]
        for at, entry in enumerate(ring):
            self.put(entry, "<II", ring[(at + 1) % len(ring)], ring[at - 1])
        self.put(header + 8, "<I", 128)
        self.put(header + 0x14, "<I", len(objects))
        self.put(header + 0x20, "<I", directory)
        return header

    def connection(self, port: int, owner: int, local: str = US, remote: str = THEM) -> int:
        tcp, info = self.row.tcp, self.take(b"Ippa", 0x20)
        va = self.take(b"TcpE", 0x200)
        self.put(info, "<I", self.local(local))
        self.put(info + self.row.remote, "<I", self.store(ip_address(remote).packed))
        self.put(va + tcp.inet_af, "<I", self.families[23 if ":" in local else 2])
        self.put(va + tcp.addr_info, "<I", info)
        self.put(va + tcp.state, "<I", 4)
        self.put(va + tcp.local_port, ">HH", port, 443)
        self.put(va + tcp.owner, "<I", owner)
        return va

    def partitions(self, parts: list[list[int]]) -> None:
        base = self.take(b"TcPt", len(parts) * self.row.stride)
        for number, objects in enumerate(parts):
            for at, link in zip(self.row.tables, (*self.row.tcp.links, 0), strict=True):
                header = self.table(link, objects if link else [])
                self.put(base + number * self.row.stride + at, "<I", header)
        self.put(SYMBOLS["PartitionTable"], "<II", base, len(parts))

    def bind(self, symbol: str, port: int, owner: int, address: str | None) -> None:
        pool, tag = self.row.pool, b"TcpL" if symbol == "TcpPortPool" else b"UdpA"
        assert pool is not None
        bound = self.row.listener if symbol == "TcpPortPool" else self.row.udp
        va = self.take(tag, 0x60)
        self.put(va + bound.inet_af, "<I", self.families[2])
        self.put(va + bound.owner, "<I", owner)
        self.put(va + bound.local, "<I", self.local(address) if address else 0)
        self.put(va + bound.port, ">H", port)
        block, entries, bits = (
            self.take(b"InPP", 0x800),
            self.take(b"InPA", 256 * pool.stride),
            self.take(b"Bits", 8192),
        )
        assignment = self.take(b"InPa", 0x20)
        self.put(block + pool.bitmap, "<II", 65536, bits)
        self.put(bits + port // 8, "<B", 1 << port % 8)
        self.put(block + pool.assignments + 4 * (port >> 8), "<I", assignment)
        self.put(assignment + pool.list, "<I", entries)
        self.put(entries + (port & 255) * pool.stride + pool.entry, "<I", va + bound.next | 1)
        self.put(SYMBOLS[symbol], "<I", block)

    def kernel(self) -> WindowsKernel:
        space = AddressSpace(ByteMemory(bytes(self.ram)), 0x1000, Mode.PAE)
        types = SymbolTable.of(types={}, pointer_size=4)
        return WindowsKernel(space, base=BASE, size=0, types=types, shared=UserShared(0, 0, self.row.first, 10, 0, 0))


@pytest.mark.parametrize("row", X86, ids=lambda row: row.name)
def test_a_machine_with_pointers_of_four_bytes_is_measured_and_read(row):
    small = Small(row)
    small.partitions(
        [
            [small.connection(50000, OWNERS[0]), small.connection(50001, OWNERS[1], "fe80::5", "2001:db8::1")],
            [small.connection(50002, OWNERS[1])],
        ]
    )
    if row.pool is not None:
        small.bind("TcpPortPool", 445, OWNERS[1], None)
        small.bind("UdpPortPool", 5353, OWNERS[0], US)
    kernel = small.kernel()
    measured = Measure(kernel, SYMBOLS.get, OWNERS, lambda _: False).measure()
    assert measured.layout.tcp == row.tcp and Kind.TCP in measured.verified
    partitions = Partitions(kernel, SYMBOLS["PartitionTable"], SYMBOLS["PartitionCount"])
    connections = Connections(kernel, partitions, measured.layout)
    connections.walk()
    assert {(str(raw.local), str(raw.remote), raw.owner) for raw in connections} == {
        (f"{US}:50000", f"{THEM}:443", OWNERS[0]),
        ("[fe80::5]:50001", "[2001:db8::1]:443", OWNERS[1]),
        (f"{US}:50002", f"{THEM}:443", OWNERS[1]),
    }
    assert connections.gaps == []
    if row.pool is not None:
        ports = Ports(kernel, Compartments(kernel, SYMBOLS.get, measured.layout), measured.layout)
        ports.walk()
        assert {(raw.kind, str(raw.local), raw.owner) for raw in ports} == {
            (Kind.LISTENER, "0.0.0.0:445", OWNERS[1]),
            (Kind.UDP, f"{US}:5353", OWNERS[0]),
        }
        assert measured.verified >= {Kind.LISTENER, Kind.UDP}
