"""The network of a Windows XP or Server 2003 made of bytes: tcpip.sys' connections and sockets in its two tables."""

from __future__ import annotations

import hashlib
import ipaddress
import struct
from dataclasses import dataclass

from tests.worlds.windows.xp_kernel import BUILDS, Kernel

Address = tuple[str, int]

TCP, UDP = 6, 17

# What tcpip.sys of each era has where: facts of volatility 2.6.1, network.py and tcpip_vtypes.py.
VARIABLES = {  # TCBTable, MaxHashTableSize, AddrObjTable, AddrObjTableSize
    "xp-sp2": (0x493E8, 0x3F3B0, 0x48360, 0x48364),
    "xp-sp3": (0x49AE8, 0x3FAC8, 0x48A60, 0x48A64),
    "2003-sp0": (0x4C6C8, 0x4312C, 0x4BBA0, 0x4BBA4),
    "2003-sp1": (0x4E428, 0x44140, 0x4D4E4, 0x4D4E8),
    "2003-sp2": (0x7C548, 0x50308, 0x5ADA4, 0x5ADA8),
    "2003-sp2-x64": (0xC8D30, 0x9B4A0, 0xA4880, 0xA4888),
}
# Address objects: local address, port, protocol, pid, time.
OLD, NEW, WIDE = (0x2C, 0x30, 0x32, 0x148, 0x158), (0x30, 0x34, 0x36, 0x14C, 0x158), (0x58, 0x5C, 0x5E, 0x238, 0x248)
ADDRESS_OBJECT = {name: WIDE if "x64" in name else NEW if name in ("2003-sp1", "2003-sp2") else OLD for name in BUILDS}


@dataclass
class Connection:
    """A planted connection, listener or socket."""

    va: int
    protocol: int
    local: Address
    remote: Address | None
    pid: int
    linked: bool = True
    created: int = 0
    key: int = 0


class Net:
    """What tcpip.sys keeps."""

    def __init__(self, kernel: Kernel, variables: tuple[int, int, int, int], buckets: int) -> None:
        self.kernel = kernel
        self.connections: list[Connection] = []
        self.buckets, self.socket_buckets = buckets, 31
        self.tcb_table = self.kernel.pool.take(b"TCPc", self.buckets * self.kernel.pointer)
        self.address_table = self.kernel.pool.take(b"TCPc", self.socket_buckets * self.kernel.pointer)
        tcb, size, address, address_size = (self.kernel.tcpip + rva for rva in variables)
        self.kernel.put_pointer(tcb, self.tcb_table)
        self.kernel.put_pointer(address, self.address_table)
        self.kernel.space.write(size, struct.pack("<I", self.buckets))
        self.kernel.space.write(address_size, struct.pack("<I", self.socket_buckets))

    def tcp(self, pid: int, local: Address, remote: Address, *, linked: bool = True, socket: bool = True) -> Connection:
        """A connection and, unless ``socket`` is off, the address object that it was made from."""
        if socket:
            self.socket(pid, ("0.0.0.0", local[1]), TCP, linked=linked)
        body = bytearray(0x198)
        at = (0x14, 0x18, 0x1C, 0x1E, 0x20) if self.kernel.wide else (0xC, 0x10, 0x14, 0x16, 0x18)
        body[at[0] : at[0] + 4] = ipaddress.IPv4Address(remote[0]).packed
        body[at[1] : at[1] + 4] = ipaddress.IPv4Address(local[0]).packed
        body[at[2] : at[2] + 4] = struct.pack(">HH", remote[1], local[1])
        body[at[4] : at[4] + 4] = struct.pack("<I", pid)
        va = self.kernel.pool.take(b"TCPT", len(body))
        self.kernel.space.write(va, bytes(body))
        key = self.tcb_table + self._hash(local, remote) * self.kernel.pointer
        made = Connection(va, TCP, local, remote, pid, linked, self.kernel.filetime(), key)
        if linked:
            self.push(made)
        self.connections.append(made)
        return made

    def close(self, connection: Connection, *, poison: bool = True) -> None:
        """Unlink a connection (or socket), then free it: its block keeps its tag."""
        at = connection.key
        while (following := self.kernel.read_pointer(at)) != connection.va:
            assert following, "it is not linked"
            at = following
        self.kernel.put_pointer(at, self.kernel.read_pointer(connection.va))
        connection.linked = False
        if poison:
            tag = b"TCPT" if connection.remote else b"TCPA"
            self.kernel.space.write(connection.va, b"\xdd" * (0x198 if connection.remote else 0x160))
            self.kernel.pool.mark(connection.va, tag, used=False)
        self.connections = [each for each in self.connections if each is not connection]

    def socket(
        self, pid: int, local: Address, protocol: int, *, linked: bool = True, created: int | None = None
    ) -> Connection:
        """An address object: a TCP socket without a connection, a UDP or a raw one."""
        ip, port, proto, owner, time = ADDRESS_OBJECT[self.kernel.era]
        self.kernel.tick()
        made = self.kernel.filetime() if created is None else created
        body = bytearray(0x260 if self.kernel.wide else 0x160)
        body[ip : ip + 4] = ipaddress.IPv4Address(local[0]).packed
        body[port : port + 2] = struct.pack(">H", local[1])
        body[proto : proto + 2] = struct.pack("<H", protocol)
        body[owner : owner + 4] = struct.pack("<I", pid)
        body[time : time + 8] = struct.pack("<Q", made)
        va = self.kernel.pool.take(b"TCPA", len(body))
        self.kernel.space.write(va, bytes(body))
        key = self.address_table + (local[1] * 7 + protocol) % self.socket_buckets * self.kernel.pointer
        socket = Connection(va, protocol, local, None, pid, linked, made, key)
        if linked:
            self.push(socket)
        self.connections.append(socket)
        return socket

    def push(self, made: Connection) -> None:
        """Link at the head of its chain: filled first, then linked."""
        self.kernel.put_pointer(made.va, self.kernel.read_pointer(made.key))
        self.kernel.put_pointer(made.key, made.va)

    def _hash(self, local: Address, remote: Address) -> int:
        text = f"{local}{remote}"
        return int(hashlib.md5(text.encode()).hexdigest()[:8], 16) % self.buckets
