"""A Windows XP or Server 2003 made of bytes: nothing runs in it; it is what an engine can find its way in.

From the processor's block at FS:0 to the loaded modules, to tcpip.sys, to the connections and sockets of its two
tables. The same verbs as `tests.worlds.windows.machine`. Layouts of the kernel are those of
`appliance.guest.windows.xp_types` (there are no others: these kernels are finished); those of tcpip.sys stand here.
Sources: /PAE and the self map at c0000000 (c0600000 with PAE): Windows Internals 4th ed. ch. 7; _KPCR and
_KDDEBUGGER_DATA64: ntddk.h, wdbgexts.h; pool headers of 8 bytes, types from 1 on: symbols of ntkrnlpa.pdb.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import lzma
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.errors import UnreadableMemory
from appliance.guest.windows import xp_types
from appliance.guest.windows.isf import Field, SymbolTable
from appliance.model import Region, VcpuState
from tests.worlds.windows import pe
from tests.worlds.windows.paging import PAGE, Ram, Space

Json = dict[str, Any]
Address = tuple[str, int]

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, NX = 1, 2, 4, 0x20, 0x40, 1 << 63
EPOCH = 116_444_736_000_000_000
START = 1_340_000_000  # the machine's boot, in seconds since 1970: June 2012
TCP, UDP, ICMP = 6, 17, 1

# What tcpip.sys of each era has where: facts of volatility 2.6.1, network.py and tcpip_vtypes.py.
VARIABLES = {  # TCBTable, MaxHashTableSize, AddrObjTable, AddrObjTableSize
    "xp-sp2": (0x493E8, 0x3F3B0, 0x48360, 0x48364),
    "xp-sp3": (0x49AE8, 0x3FAC8, 0x48A60, 0x48A64),
    "2003-sp0": (0x4C6C8, 0x4312C, 0x4BBA0, 0x4BBA4),
    "2003-sp1": (0x4E428, 0x44140, 0x4D4E4, 0x4D4E8),
    "2003-sp2": (0x7C548, 0x50308, 0x5ADA4, 0x5ADA8),
    "2003-sp2-x64": (0xC8D30, 0x9B4A0, 0xA4880, 0xA4888),
}
BUILDS = {"xp-sp2": 2, "xp-sp3": 3, "2003-sp0": 0, "2003-sp1": 1, "2003-sp2": 2, "2003-sp2-x64": 2}
ERA = {
    name: xp_types.ERAS[0 if "xp" in name else 3 if "x64" in name else 2 if "sp0" not in name else 1] for name in BUILDS
}
# Address objects: local address, port, protocol, pid, time.
OLD, NEW, WIDE = (0x2C, 0x30, 0x32, 0x148, 0x158), (0x30, 0x34, 0x36, 0x14C, 0x158), (0x58, 0x5C, 0x5E, 0x238, 0x248)
ADDRESS_OBJECT = {name: WIDE if "x64" in name else NEW if name in ("2003-sp1", "2003-sp2") else OLD for name in BUILDS}

SYMBOLS = {  # of the kernel's image; invented
    "MmProtectToValue": 0x101000,
    "KdDebuggerDataBlock": 0x82100,
    "KdVersionBlock": 0x82800,
    "KdpDebuggerDataListHead": 0x82900,
    "NtBuildLab": 0x82A00,
    "CmNtCSDVersion": 0x82A80,
    "NtBuildNumber": 0x82A84,
    "PsActiveProcessHead": 0x83000,
    "PsLoadedModuleList": 0x83040,
    "PspCidTable": 0x83080,
    "PsInitialSystemProcess": 0x83090,
    "ObpRootDirectoryObject": 0x830A0,
    "ObpObjectTypes": 0x83100,
    "MmSystemRangeStart": 0x83200,
}
PROTECTIONS = [1, 2, 0x10, 0x20, 4, 8, 0x40, 0x80, 1, 0x202, 0x210, 0x220, 0x204, 0x208, 0x240, 0x280]
PROTECTIONS += [1, 0x102, 0x110, 0x120, 0x104, 0x108, 0x140, 0x180, 1, 0x402, 0x410, 0x420, 0x404, 0x408, 0x440, 0x480]
RWX, READWRITE, WRITECOPY_X = 6, 4, 7
OBJECT_TYPES = ("Type", "Directory", "SymbolicLink", "Token", "Process", "Thread", "Job", "File")


class Space32:
    """x86 page tables of two levels, or of three with PAE; every process shares the kernel's half."""

    def __init__(self, ram: Ram, root: int, tables: Sequence[int], *, pae: bool, kernel: Space32 | None = None) -> None:
        self.ram, self.root, self.tables, self.pae, self.kernel = ram, root, tuple(tables), pae, kernel
        self.pages: dict[int, int] = {}
        self.children: list[Space32] = []
        half = len(self.tables) * PAGE // 2
        if kernel is not None:
            kernel.children.append(self)
            self._write_directory(half, kernel._read_directory(half, half))
        if pae:
            ram.write(root, b"".join(struct.pack("<Q", table | PRESENT) for table in self.tables))
        for number, table in enumerate(self.tables):
            self._directory((0x600 if pae else 0x300) + number, table | PRESENT | WRITABLE | ACCESSED | DIRTY)

    def map(
        self, va: int, gpa: int, count: int = 1, *, user: bool = False, writable: bool = True, execute: bool = True
    ) -> int:
        flags = PRESENT | ACCESSED | DIRTY | (USER if user else 0) | (WRITABLE if writable else 0)
        flags |= 0 if execute or not self.pae else NX
        for number in range(count):
            self.entry(va + number * PAGE, gpa + number * PAGE | flags)
            self.pages[va + number * PAGE] = gpa + number * PAGE
        return va

    def entry(self, va: int, value: int) -> None:
        """Write the entry of one page as it is."""
        if va >> 31 and self.kernel is not None:
            self.kernel.entry(va, value)
            return
        size, shift = (8, 21) if self.pae else (4, 22)
        index = va >> shift
        old = int.from_bytes(self._read_directory(index * size, size), "little")
        if not old & PRESENT:
            old = self.ram.page() | PRESENT | WRITABLE | ACCESSED | DIRTY | USER
            for space in (self, *(self.children if va >> 31 else ())):
                space._directory(index, old)
        table = old & 0xFFFFF000
        self.ram.write(table + size * (va >> 12 & (511 if self.pae else 1023)), value.to_bytes(size, "little"))

    def write(self, va: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            here = va + position
            size = min(len(data) - position, PAGE - here % PAGE)
            self.ram.write(self.gpa(here), data[position : position + size])
            position += size

    def read(self, va: int, size: int) -> bytes:
        parts = []
        while size:
            step = min(size, PAGE - va % PAGE)
            parts.append(self.ram.read(self.gpa(va), step))
            va, size = va + step, size - step
        return b"".join(parts)

    def gpa(self, va: int) -> int:
        page = self.pages.get(va & -PAGE)
        if page is None and self.kernel is not None:
            page = self.kernel.pages.get(va & -PAGE)
        if page is None:
            raise KeyError(f"{va:#x} is not mapped")
        return page + va % PAGE

    def _directory(self, index: int, value: int) -> None:
        size = 8 if self.pae else 4
        self._write_directory(index * size, value.to_bytes(size, "little"))

    def _write_directory(self, at: int, data: bytes) -> None:
        for position in range(0, len(data), PAGE):
            piece = data[position : position + PAGE]
            self.ram.write(self.tables[(at + position) // PAGE] + (at + position) % PAGE, piece)

    def _read_directory(self, at: int, size: int) -> bytes:
        if size <= PAGE:
            return self.ram.read(self.tables[at // PAGE] + at % PAGE, size)
        return b"".join(self._read_directory(at + position, PAGE) for position in range(0, size, PAGE))


AnySpace = Space | Space32


class RamMemory:
    """The machine's RAM as a route to a guest gives it."""

    name, live = "bytes", False

    def __init__(self, ram: Ram, vcpus: tuple[VcpuState, ...] = ()) -> None:
        self._data, self._size, self._vcpus = ram.data, ram.size, vcpus

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, self._size),)

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or size < 0 or gpa + size > self._size:
            raise UnreadableMemory(gpa, size, "not RAM")
        return self._data[gpa : gpa + size]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        last = self._size
        return [
            self._data[at : at + size] if at >= 0 and size >= 0 and at + size <= last else None for at, size in spans
        ]

    def vcpus(self) -> tuple[VcpuState, ...]:
        return self._vcpus

    def check_alive(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Process:
    """What was planted of a process."""

    va: int
    pid: int
    name: str
    path: str | None
    space: AnySpace
    dtb: int
    created: int  # a FILETIME
    ppid: int = 4
    hidden: bool = False
    exited: bool = False
    threads: list[int] = field(default_factory=list)
    vads: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    next_va: int = 0x0090_0000
    ldr: int = 0


@dataclass
class Mapped:
    """A run of user memory with a VAD of its own."""

    start: int
    size: int
    vad: int


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


class Pool:
    """Non-paged pool: blocks behind headers of 8 bytes (16 on x64), in pages that follow each other."""

    def __init__(self, space: AnySpace, base: int, wide: bool) -> None:
        self.space, self.header = space, 16 if wide else 8
        self._at = self._next = base
        self._before = 0

    def take(self, tag: bytes, size: int) -> int:
        """The address of a block's body of zeros."""
        whole = -(-(size + self.header) // self.header) * self.header
        if whole > PAGE:
            count = -(-size // PAGE)
            va = self._next
            self.space.map(va, self.space.ram.page(count), count)
            self._next += count * PAGE
            self._at = self._next
            return va
        if self._at + whole > self._next:
            self.space.map(self._next, self.space.ram.page())
            self._at, self._before = self._next, 0
            self._next += PAGE
        at, units = self._at, whole // self.header
        self._at += whole
        self.mark(at + self.header, tag, units, used=True)
        return at + self.header

    def mark(self, va: int, tag: bytes, units: int | None = None, *, used: bool) -> None:
        """Write a block's header; a free one keeps its tag and has no type."""
        at, kind = va - self.header, 5 if used else 0  # NonPagedPoolCacheAligned (4) and one: odd, as in every pool
        if self.header == 8:
            old = struct.unpack("<HH", self.space.read(at, 4)) if units is None else (self._before, units)
            self.space.write(at, struct.pack("<HH4s", old[0], old[1] & 0x1FF | kind << 9, tag))
        else:
            size = self.space.read(at + 2, 1)[0] if units is None else units
            self.space.write(at, struct.pack("<BBBB4sQ", self._before & 0xFF, 0, size, kind, tag, 0))
        self._before = units or self._before


class XpMachine:
    """One machine. ``era``: a key of `VARIABLES`. ``variables``: RVAs of tcpip.sys that no table has (TCBTable,
    MaxHashTableSize, AddrObjTable, AddrObjTableSize), to be named by `write_symbols`."""

    def __init__(
        self,
        era: str = "xp-sp3",
        *,
        pae: bool = True,
        ram: int = 64 << 20,
        path: Path | None = None,
        seed: int = 0,
        variables: tuple[int, int, int, int] | None = None,
        buckets: int = 512,
        empty: bool = False,
    ) -> None:
        self.era, self.kind, self.path = era, ERA[era], path
        self.wide = self.kind.pointer_size == 8
        self.pae, self.random = pae and not self.wide, random.Random(seed)
        self.pointer = self.kind.pointer_size
        self.variables = variables or VARIABLES[era]
        self.ram = Ram(ram, path)
        self.ram.offer(0x0080_0000, ram)
        self.types: SymbolTable = xp_types.table(self.kind, SYMBOLS)
        self.base = 0xFFFFF80001000000 if self.wide else 0x804D7000
        self.image_size = 0x214000
        self.seconds = START
        self.processes: list[Process] = []
        self.connections: list[Connection] = []
        self._guid = hashlib.md5(f"{era}/{pae}/{self.variables}".encode()).hexdigest().upper()
        self._next_pid, self._next_tid = 1000, 300
        self._key = 0
        self._make_space()
        self.pool = Pool(self.space, 0xFFFFFA8000000000 if self.wide else 0x81800000, self.wide)
        self._make_kernel()
        self._make_modules()
        self._make_tcpip(buckets)
        self.system = self.process("System", pid=4, parent=0, path=None, sid="S-1-5-18")
        self._pointer(self.base + SYMBOLS["PsInitialSystemProcess"], self.system.va)
        if not empty:
            smss = self.process("smss.exe", parent=4, path="\\SystemRoot\\System32\\smss.exe")
            csrss = self.process("csrss.exe", parent=smss.pid, path="C:\\WINDOWS\\system32\\csrss.exe")
            logon = self.process("winlogon.exe", parent=smss.pid, path="C:\\WINDOWS\\system32\\winlogon.exe")
            self.services = self.process("services.exe", parent=logon.pid)
            self.process("lsass.exe", parent=logon.pid)
            self.svchost = self.process(
                "svchost.exe",
                parent=self.services.pid,
                command="C:\\WINDOWS\\system32\\svchost -k rpcss",
                sid="S-1-5-20",
            )
            self.explorer = self.process(
                "explorer.exe", parent=csrss.pid, path="C:\\WINDOWS\\Explorer.EXE", sid="S-1-5-21-1-2-3-500"
            )

    # -- verbs --

    def process(
        self,
        name: str,
        *,
        pid: int | None = None,
        parent: int = 4,
        path: str | None = "",
        command: str | None = None,
        sid: str = "S-1-5-18",
        session: int = 0,
        hidden: bool = False,
        exited: bool = False,
        created: int | None = None,
    ) -> Process:
        """A process with a thread, an address space and its own image; ``hidden``: it is taken off the list."""
        if pid is None:
            self._next_pid += 4 * self.random.randrange(1, 20)
            pid = self._next_pid
        self.tick()
        if path == "":
            path = f"C:\\WINDOWS\\system32\\{name}"
        time = 0 if pid == 4 else self.filetime() if created is None else created
        va = self._object(b"Pro\xe3", "_EPROCESS", "Process")
        space, dtb = (self.space, self.root) if pid == 4 else self._user_space()
        made = Process(va, pid, name, path, space, dtb, time, parent, hidden, exited)
        put = self._put
        put(va, "_EPROCESS.Pcb.Header.Type", 3)
        put(va, "_EPROCESS.Pcb.Header.Size", self.types.size("_KPROCESS") // 4)
        put(va, "_EPROCESS.Pcb.DirectoryTableBase", dtb)
        put(va, "_EPROCESS.CreateTime", time)
        put(va, "_EPROCESS.ExitTime", self.filetime() if exited else 0)
        put(va, "_EPROCESS.ExitStatus", 0 if exited else 0x103)
        put(va, "_EPROCESS.UniqueProcessId", pid)
        put(va, "_EPROCESS.InheritedFromUniqueProcessId", parent)
        put(va, "_EPROCESS.ImageFileName", name.encode()[:15])
        put(va, "_EPROCESS.Token", self._token(sid, session) | 3)
        put(va, "_EPROCESS.ObjectTable", self.pool.take(b"Obtb", self.types.size("_HANDLE_TABLE")))
        self._ring(va + self.types.offset("_EPROCESS.ThreadListHead"))
        if pid != 4:
            put(va, "_EPROCESS.Session", self._session(session))
            audit = self._block(b"SeAu", self._unicode(f"\\Device\\HarddiskVolume1{_kernel_path(path)}"))
            put(va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName", audit)
            self._user_part(made, command)
        node = va + self.types.offset("_EPROCESS.ActiveProcessLinks")
        if hidden:
            self._ring(node)
        else:
            self._append(self.base + SYMBOLS["PsActiveProcessHead"], node)
        self._enter_cid(pid, va)
        self.processes.append(made)
        self.thread(made, 0x80500000 if pid == 4 else 0x00401000)
        return made

    def thread(self, process: Process, start: int) -> int:
        """A thread that began at ``start``; its address."""
        va = self._object(b"Thr\xe5", "_ETHREAD", "Thread")
        self._next_tid += 4
        put = self._put
        put(va, "_ETHREAD.Tcb.Header.Type", 6)
        put(va, "_ETHREAD.Tcb.Header.Size", self.types.size("_KTHREAD") // 4)
        put(va, "_ETHREAD.Tcb.State", 5)
        put(va, "_ETHREAD.Tcb.ApcState.Process", process.va)
        put(va, "_ETHREAD.CreateTime", process.created or self.filetime())
        put(va, "_ETHREAD.Cid.UniqueProcess", process.pid)
        put(va, "_ETHREAD.Cid.UniqueThread", self._next_tid)
        put(va, "_ETHREAD.ThreadsProcess", process.va)
        put(va, "_ETHREAD.StartAddress", 0x7C810659)  # kernel32!BaseThreadStartThunk
        put(va, "_ETHREAD.Win32StartAddress", start)
        head = process.va + self.types.offset("_EPROCESS.ThreadListHead")
        self._append(head, va + self.types.offset("_ETHREAD.ThreadListEntry"))
        process.threads.append(va)
        put(process.va, "_EPROCESS.ActiveThreads", len(process.threads))
        return va

    def region(
        self,
        process: Process,
        size: int,
        protection: int,
        content: bytes = b"",
        private: bool = True,
        *,
        start: int | None = None,
        file: str | None = None,
    ) -> Mapped:
        """Mapped memory and the VAD that tells of it; ``protection`` is an index of MmProtectToValue."""
        if start is None:
            start = process.next_va
            process.next_va += -(-size // 0x10000) * 0x10000 + 0x10000
        count = -(-size // PAGE)
        writable, execute = protection in (READWRITE, RWX), bool(protection & 2)
        process.space.map(start, self.ram.page(count), count, user=True, writable=writable, execute=execute)
        process.space.write(start, content)
        return Mapped(start, count * PAGE, self._vad(process, start, count, protection, private, file))

    def inject(self, process: Process, code: bytes = b"MZ\x90\0\x03" + bytes(range(64))) -> Mapped:
        """Private memory that can be written and run, and a thread that began in it."""
        region = self.region(process, 0x4000, RWX, code)
        self.thread(process, region.start + 0x100)
        return region

    def module(self, process: Process, name: str, path: str, *, in_ldr: bool = True, in_vad: bool = True) -> int:
        """A DLL; the address of its image."""
        size = 0x6000
        start = process.next_va
        process.next_va += 0x20000
        pieces = image(size, f"{name}.pdb", self._guid, wide=self.wide, base=start)
        if in_vad:
            self.region(process, size, WRITECOPY_X, pieces, private=False, start=start, file=path)
        else:
            self.region(process, size, WRITECOPY_X, pieces, start=start)
        if in_ldr:
            self._loaded(process, start, size, path)
        return start

    def foreign_dll(self, process: Process, path: str = "C:\\WINDOWS\\Temp\\evil.dll") -> int:
        """A DLL that is mapped and that the loader's lists do not know."""
        return self.module(process, path.rsplit("\\", 1)[-1], path, in_ldr=False)

    def tcp(
        self, process: Process | int, local: Address, remote: Address, *, linked: bool = True, socket: bool = True
    ) -> Connection:
        """A connection and, unless ``socket`` is off, the address object that it was made from."""
        pid = process if isinstance(process, int) else process.pid
        if socket:
            self._address(pid, ("0.0.0.0", local[1]), TCP, linked=linked)
        body = bytearray(0x198)
        at = (0x14, 0x18, 0x1C, 0x1E, 0x20) if self.wide else (0xC, 0x10, 0x14, 0x16, 0x18)
        body[at[0] : at[0] + 4] = ipaddress.IPv4Address(remote[0]).packed
        body[at[1] : at[1] + 4] = ipaddress.IPv4Address(local[0]).packed
        body[at[2] : at[2] + 4] = struct.pack(">HH", remote[1], local[1])
        body[at[4] : at[4] + 4] = struct.pack("<I", pid)
        va = self.pool.take(b"TCPT", len(body))
        self.space.write(va, bytes(body))
        bucket = self._hash(local, remote)
        made = Connection(va, TCP, local, remote, pid, linked, self.filetime(), self.tcb_table + bucket * self.pointer)
        if linked:
            self._push(made)
        self.connections.append(made)
        return made

    def tcp_close(self, connection: Connection, *, poison: bool = True) -> None:
        """Unlink a connection (or socket), then free it: its block keeps its tag."""
        at = connection.key
        while (following := self._read_pointer(at)) != connection.va:
            assert following, "it is not linked"
            at = following
        self._pointer(at, self._read_pointer(connection.va))
        connection.linked = False
        if poison:
            tag = b"TCPT" if connection.remote else b"TCPA"
            self.space.write(connection.va, b"\xdd" * (0x198 if connection.remote else 0x160))
            self.pool.mark(connection.va, tag, used=False)
        self.connections = [each for each in self.connections if each is not connection]

    def listener(self, process: Process | int, local: Address, *, linked: bool = True) -> Connection:
        """A TCP socket without a connection."""
        pid = process if isinstance(process, int) else process.pid
        return self._address(pid, local, TCP, linked=linked)

    def udp(
        self, process: Process | int, local: Address, *, linked: bool = True, created: int | None = None
    ) -> Connection:
        """A UDP socket."""
        pid = process if isinstance(process, int) else process.pid
        return self._address(pid, local, UDP, linked=linked, created=created)

    def raw(self, process: Process | int, local: Address, protocol: int) -> Connection:
        """A raw socket of an IP protocol."""
        pid = process if isinstance(process, int) else process.pid
        return self._address(pid, local, protocol)

    def tick(self, seconds: int = 1) -> None:
        """The clock goes on."""
        self.seconds += seconds
        self._kuser()

    # -- the whole --

    def memory(self, *, vcpus: bool = True) -> RamMemory:
        """The machine's RAM; ``vcpus``: with the registers of processor 0 in its kernel."""
        if not vcpus:
            return RamMemory(self.ram)
        cr4 = 0x6F8 if self.pae or self.wide else 0x6D8
        idt = 0xFFFFF80000600000 if self.wide else 0x8003F400
        lstar = self.base + 0x40000 if self.wide else 0
        state = VcpuState(0x8001003B, self.root, cr4, self.base + 0x1234, idt, lstar, 0 if self.wide else 0xFFDFF000)
        return RamMemory(self.ram, (state,))

    def close(self) -> None:
        self.ram.close()

    def filetime(self) -> int:
        return EPOCH + self.seconds * 10**7

    def truth(self) -> Json:
        """What a perfect engine tells."""
        return {
            "processes": {each.pid: each.name for each in self.processes if not each.hidden},
            "hidden": {each.pid: each.name for each in self.processes if each.hidden},
            "connections": sorted(
                (each.local, each.remote, each.pid) for each in self.connections if each.remote and each.linked
            ),
            "sockets": sorted(
                (each.protocol, each.local, each.pid) for each in self.connections if not each.remote and each.linked
            ),
        }

    def write_symbols(self, folder: Path, *, kernel: bool = True, tcpip: bool = True) -> Path:
        """Write ISF tables of the kernel (with all that volatility3 asks for) and of tcpip.sys (names only)."""
        names = ("TCBTable", "MaxHashTableSize", "AddrObjTable", "AddrObjTableSize")
        prefix = "" if self.wide else "_"
        variables = {prefix + name: rva for name, rva in zip(names, self.variables, strict=True)}
        tables = []
        if kernel:
            tables.append((self._pdb(), dict(SYMBOLS), self._isf_types()))
        if tcpip:
            tables.append(("tcpip.pdb", variables, {}))
        for pdb, symbols, types in tables:
            path = folder / "windows" / pdb / f"{self._guid}-1.json.xz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.compress(json.dumps(self._isf(pdb, symbols, types)).encode(), preset=1))
        return folder

    def write_dump(self, path: Path) -> Path:
        """The RAM as a crash dump of x86: _DUMP_HEADER in 4 KiB (ntiodump.h), then the pages that anything lies in."""
        head, at = bytearray(b"PAGE" * (PAGE // 4)), SYMBOLS
        lists = (self.base + at[name] for name in ("PsLoadedModuleList", "PsActiveProcessHead"))
        struct.pack_into("<4s4s6I", head, 0, b"PAGE", b"DUMP", 0xF, self.kind.build, self.root, 0, *lists)
        struct.pack_into("<3I", head, 0x20, self._machine(), 1, 0xE2)
        head[0x5C] = int(self.pae)
        struct.pack_into("<I", head, 0x60, self.base + at["KdDebuggerDataBlock"])
        runs: list[list[int]] = []
        for page in range(self.ram.size // PAGE):
            if self.ram.data[page * PAGE : page * PAGE + PAGE].strip(b"\0"):
                if runs and page - runs[-1][1] < 16:
                    runs[-1][1] = page + 1
                else:
                    runs.append([page, page + 1])
        assert len(runs) < 80, "the header has no room for more"
        struct.pack_into("<II", head, 0x64, len(runs), sum(end - start for start, end in runs))
        for number, (start, end) in enumerate(runs):
            struct.pack_into("<II", head, 0x6C + 8 * number, start, end - start)
        struct.pack_into("<I", head, 0xF88, 1)
        with path.open("wb") as file:
            file.write(head)
            for start, end in runs:
                file.write(self.ram.data[start * PAGE : end * PAGE])
        return path

    # -- private: the kernel --

    def _pdb(self) -> str:
        return "ntkrnlmp.pdb" if self.wide else "ntkrnlpa.pdb" if self.pae else "ntoskrnl.pdb"

    def _make_space(self) -> None:
        if self.wide:
            self.root = 0x001A_D000
            self.space: AnySpace = Space(self.ram, self.root, 4)
            for va in range(0xFFFF_F000_0000_0000 + (1 << 43), 1 << 64, 1 << 39):
                self.space.prepare(va)
        elif self.pae:
            self.root = 0x0033_9000
            self.space = Space32(self.ram, self.root, [self.root + PAGE * number for number in range(1, 5)], pae=True)
            self._tops = self.ram.page()
        else:
            self.root = 0x0003_9000
            self.space = Space32(self.ram, self.root, [self.root], pae=False)
        self._top_count = 0

    def _user_space(self) -> tuple[AnySpace, int]:
        if self.wide:
            root = self.ram.page()
            return Space(self.ram, root, 4, self.space), root
        assert isinstance(self.space, Space32)
        if not self.pae:
            root = self.ram.page()
            return Space32(self.ram, root, [root], pae=False, kernel=self.space), root
        self._top_count += 1  # the top tables of many processes share a page, 32 bytes each
        if self._top_count * 32 == PAGE:
            self._tops, self._top_count = self.ram.page(), 1
        root = self._tops + 32 * self._top_count
        tables = [self.ram.page() for _ in range(4)]
        return Space32(self.ram, root, tables, pae=True, kernel=self.space), root

    def _make_kernel(self) -> None:
        count = self.image_size // PAGE
        gpa = 0x0040_0000 if self.wide else 0x004D_7000  # XP: the first 512 MiB lie at 80000000
        self.space.map(self.base, gpa, count)
        self._cid = self.pool.take(b"Obtb", self.types.size("_HANDLE_TABLE"))
        self._cid_pages = self.pool.take(b"Obtb", PAGE)
        self._put(self._cid, "_HANDLE_TABLE.TableCode", self._cid_pages | 1)
        write, base = self.space.write, self.base
        write(base, image(self.image_size, self._pdb(), self._guid, wide=self.wide, base=base))
        for name in ("PsActiveProcessHead", "PsLoadedModuleList", "KdpDebuggerDataListHead"):
            self._ring(base + SYMBOLS[name])
        write(base + SYMBOLS["MmProtectToValue"], struct.pack("<32I", *PROTECTIONS))
        minor, pack = (1 if self.kind.build == 2600 else 2), BUILDS[self.era]
        build = self.kind.build
        lab = f"{build}.{'xpsp_sp' if build == 2600 else 'srv03_sp'}{pack}_gdr.120504-1619\0"
        write(base + SYMBOLS["NtBuildLab"], lab.encode())
        write(base + SYMBOLS["CmNtCSDVersion"], struct.pack("<I", pack << 8))
        write(base + SYMBOLS["NtBuildNumber"], struct.pack("<I", 0xF000_0000 | build))
        self._pointer(base + SYMBOLS["PspCidTable"], self._cid)
        self._pointer(base + SYMBOLS["MmSystemRangeStart"], 0xFFFF080000000000 if self.wide else 0x80000000)
        kdbg, signed = base + SYMBOLS["KdDebuggerDataBlock"], self._signed
        data = bytearray(0x318 if build == 3790 else 0x290)
        struct.pack_into(
            "<QQ4sI", data, 0, *[signed(base + SYMBOLS["KdpDebuggerDataListHead"])] * 2, b"KDBG", len(data)
        )
        struct.pack_into("<Q", data, 0x18, signed(base))
        data[0x36] = int(self.pae)
        for name, at in xp_types.KDBG_SYMBOLS.items():
            if name in SYMBOLS:
                struct.pack_into("<Q", data, at, signed(base + SYMBOLS[name]))
        if len(data) > 0x300:
            offset = self.types.offset
            struct.pack_into("<H", data, 0x2A8, self.types.size("_EPROCESS"))
            struct.pack_into("<H", data, 0x2AA, offset("_EPROCESS.Peb"))
            struct.pack_into("<H", data, 0x2AC, offset("_EPROCESS.InheritedFromUniqueProcessId"))
            struct.pack_into("<H", data, 0x2AE, offset("_EPROCESS.Pcb.DirectoryTableBase"))
            struct.pack_into("<H", data, 0x2A0, offset("_KTHREAD.ApcState.Process"))
            struct.pack_into("<H", data, 0x2A2, offset("_KTHREAD.State"))
        write(kdbg, bytes(data))
        self._pointer(base + SYMBOLS["KdpDebuggerDataListHead"], kdbg)
        version = struct.pack(
            "<HHBBHHBBBBH", 0xF, build, 6, 0, 3 if not self.wide else 1, self._machine(), 12, 3, 46, 0, 0
        )
        addresses = (base, base + SYMBOLS["PsLoadedModuleList"], base + SYMBOLS["KdpDebuggerDataListHead"])
        write(base + SYMBOLS["KdVersionBlock"], version + struct.pack("<QQQ", *map(signed, addresses)))
        self._minor = minor
        shared = self.ram.page()
        self.space.map(0xFFFFF78000000000 if self.wide else 0xFFDF0000, shared)
        self._shared = shared
        self._kuser()
        if not self.wide:
            self._kpcr()
        else:
            self._low_stub()
        self._object_types = {name: self._object_type(name) for name in OBJECT_TYPES}
        for number, va in enumerate(self._object_types.values()):
            self._pointer(base + SYMBOLS["ObpObjectTypes"] + number * self.pointer, va)

    def _machine(self) -> int:
        return 0x8664 if self.wide else 0x14C

    def _kpcr(self) -> None:
        page = self.ram.page()
        self.space.map(0xFFDFF000, page)
        kpcr = 0xFFDFF000
        for at, value in (
            (0x1C, kpcr),
            (0x20, kpcr + 0x120),
            (0x34, self.base + SYMBOLS["KdVersionBlock"]),
            (0x38, 0x8003F400),
        ):
            self._pointer(kpcr + at, value)
        self.space.map(0x8003F000, self.ram.page())
        # The interrupt gates: their handlers lie in the kernel.
        gates = b""
        for number in range(32):
            handler = self.base + 0x40000 + 0x40 * number
            gates += struct.pack("<HHHH", handler & 0xFFFF, 8, 0x8E00, handler >> 16)
        self.space.write(0x8003F400, gates)

    def _low_stub(self) -> None:
        """PROCESSOR_START_BLOCK in the first megabyte, as every x64 Windows leaves it (facts, section 1)."""
        self.ram.write(0x1000, struct.pack("<Q", 0x00000001000600E9))
        self.ram.write(0x1070, struct.pack("<Q", self.base + 0x40000))
        self.ram.write(0x10A0, struct.pack("<Q", self.root))
        gates = self.ram.page()
        self.space.map(0xFFFFF80000600000, gates)
        for number in range(32):
            handler = self.base + 0x41000 + 0x40 * number
            gate = struct.pack("<HHHHII", handler & 0xFFFF, 0x10, 0x8E00, handler >> 16 & 0xFFFF, handler >> 32, 0)
            self.ram.write(gates + 16 * number, gate)

    def _kuser(self) -> None:
        data = bytearray(PAGE)
        interrupt, system = (self.seconds - START + 600) * 10**7, self.filetime()
        for at, value in ((8, interrupt), (0x14, system)):
            struct.pack_into("<III", data, at, value & 0xFFFFFFFF, value >> 32, value >> 32)
        struct.pack_into("<II", data, 0, interrupt // 156250, 0xFA00000)
        root = "C:\\WINDOWS\0".encode("utf-16-le")
        data[0x30 : 0x30 + len(root)] = root
        struct.pack_into("<IBxxxII", data, 0x264, 1, 1, 5, self._minor)
        self.ram.write(self._shared, bytes(data))

    def _make_modules(self) -> None:
        region = 0xFFFFFADF00000000 if self.wide else 0xF8000000
        tcpip = region + 0x100000 + 0x1000 * self.random.randrange(64)
        self.tcpip, self.tcpip_size = tcpip, 0xD8000 if self.wide else 0x80000 if "2003" in self.era else 0x59000
        images = (
            ("ntoskrnl.exe", self.base, self.image_size, "\\WINDOWS\\system32\\ntkrnlpa.exe"),
            ("hal.dll", region, 0x20000, "\\WINDOWS\\system32\\hal.dll"),
            ("tcpip.sys", tcpip, self.tcpip_size, "\\SystemRoot\\system32\\DRIVERS\\tcpip.sys"),
            ("afd.sys", region + 0x400000, 0x22000, "\\SystemRoot\\System32\\drivers\\afd.sys"),
        )
        for name, base, size, path in images:
            if base != self.base:
                self.space.map(base, self.ram.page(size // PAGE), size // PAGE)
                pdb = name.split(".", 1)[0] + ".pdb"
                self.space.write(base, image(size, pdb, self._guid, wide=self.wide, base=base))
            entry = self.pool.take(b"MmLd", self.types.size("_LDR_DATA_TABLE_ENTRY"))
            self._entry(self.space, entry, base, size, name, path, self._kernel_text)
            links = entry + self.types.offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks")
            self._append(self.base + SYMBOLS["PsLoadedModuleList"], links)

    def _make_tcpip(self, buckets: int) -> None:
        self.buckets, self.socket_buckets = buckets, 31
        self.tcb_table = self.pool.take(b"TCPc", self.buckets * self.pointer)
        self.address_table = self.pool.take(b"TCPc", self.socket_buckets * self.pointer)
        tcb, size, address, address_size = (self.tcpip + rva for rva in self.variables)
        self._pointer(tcb, self.tcb_table)
        self._pointer(address, self.address_table)
        self.space.write(size, struct.pack("<I", self.buckets))
        self.space.write(address_size, struct.pack("<I", self.socket_buckets))

    def _hash(self, local: Address, remote: Address) -> int:
        text = f"{local}{remote}"
        return int(hashlib.md5(text.encode()).hexdigest()[:8], 16) % self.buckets

    def _push(self, made: Connection) -> None:
        """Link at the head of its chain: filled first, then linked."""
        self._pointer(made.va, self._read_pointer(made.key))
        self._pointer(made.key, made.va)

    def _address(
        self, pid: int, local: Address, protocol: int, *, linked: bool = True, created: int | None = None
    ) -> Connection:
        ip, port, proto, owner, time = ADDRESS_OBJECT[self.era]
        self.tick()
        made = self.filetime() if created is None else created
        body = bytearray(0x260 if self.wide else 0x160)
        body[ip : ip + 4] = ipaddress.IPv4Address(local[0]).packed
        body[port : port + 2] = struct.pack(">H", local[1])
        body[proto : proto + 2] = struct.pack("<H", protocol)
        body[owner : owner + 4] = struct.pack("<I", pid)
        body[time : time + 8] = struct.pack("<Q", made)
        va = self.pool.take(b"TCPA", len(body))
        self.space.write(va, bytes(body))
        key = self.address_table + (local[1] * 7 + protocol) % self.socket_buckets * self.pointer
        socket = Connection(va, protocol, local, None, pid, linked, made, key)
        if linked:
            self._push(socket)
        self.connections.append(socket)
        return socket

    # -- private: objects --

    def _object(self, tag: bytes, name: str, kind: str) -> int:
        header = self.types.offset("_OBJECT_HEADER.Body")
        va = self.pool.take(tag, header + self.types.size(name))
        for part, value in (
            ("PointerCount", 3),
            ("HandleCount", 1),
            ("Type", self._object_types[kind]),
            ("Flags", 0x20),
        ):
            self._put(va, f"_OBJECT_HEADER.{part}", value)
        return va + header

    def _object_type(self, name: str) -> int:
        """_OBJECT_TYPE: Name at 40 (78 on x64)."""
        va = self.pool.take(b"ObjT", 0x2C0 if self.wide else 0x190)
        self.space.write(va + (0x78 if self.wide else 0x40), self._unicode(name))
        return va

    def _token(self, sid: str, session: int) -> int:
        header = self.types.offset("_OBJECT_HEADER.Body")
        size, pointer = self.types.size("_TOKEN"), self.pointer
        va = self.pool.take(b"Toke", header + size + 2 * pointer + 0x40) + header
        self._put(va - header, "_OBJECT_HEADER.Type", self._object_types["Token"])
        numbers = [int(part) for part in sid.split("-")[1:]]
        raw = struct.pack("<BB", numbers[0], len(numbers) - 2) + numbers[1].to_bytes(6, "big")
        raw += b"".join(struct.pack("<I", part) for part in numbers[2:])
        groups, text = va + size, va + size + 2 * pointer
        self.space.write(text, raw)
        self._pointer(groups, text)
        self._put(va, "_TOKEN.UserAndGroupCount", 1)
        self._put(va, "_TOKEN.UserAndGroups", groups)
        self._put(va, "_TOKEN.SessionId", session)
        return va

    def _session(self, number: int) -> int:
        va = self.pool.take(b"MmSn", 0x40)
        self._put(va, "_MM_SESSION_SPACE.SessionId", number)
        return va

    def _enter_cid(self, pid: int, va: int) -> None:
        """The pid's entry in PspCidTable, a table of one level above its pages of entries."""
        per_page = PAGE // (2 * self.pointer)
        page, index = divmod(pid // 4, per_page)
        at = self._cid_pages + page * self.pointer
        if not self._read_pointer(at):
            self._pointer(at, self.pool.take(b"Obtb", PAGE))
        self._pointer(self._read_pointer(at) + index * 2 * self.pointer, va)

    # -- private: user space --

    def _user_part(self, process: Process, command: str | None) -> None:
        """KUSER_SHARED_DATA, PEB, parameters, loader lists, the program's image."""
        process.space.map(0x7FFE0000, self._shared, user=True, writable=False)
        path = process.path or process.name
        space, put = process.space, self._put
        peb, parameters, ldr = 0x7FFD5000, 0x20000, 0x241000
        for va, count in ((peb, 1), (parameters, 2), (ldr, 2)):
            space.map(va, self.ram.page(count), count, user=True)
            self._vad(process, va, count, READWRITE, True, None)
        put(peb, "_PEB.ImageBaseAddress", 0x400000, space)
        put(peb, "_PEB.Ldr", ldr, space)
        put(peb, "_PEB.ProcessParameters", parameters, space)
        put(peb, "_PEB.OSMajorVersion", 5, space)
        put(peb, "_PEB.OSMinorVersion", self._minor, space)
        put(peb, "_PEB.OSBuildNumber", self.kind.build, space)
        put(process.va, "_EPROCESS.Peb", peb)
        put(process.va, "_EPROCESS.SectionBaseAddress", 0x400000)
        at = parameters + 0x800
        for name, text in (("ImagePathName", path), ("CommandLine", command or path)):
            put(parameters, f"_RTL_USER_PROCESS_PARAMETERS.{name}", _text(text, at, self.pointer), space)
            space.write(at, text.encode("utf-16-le"))
            at += 2 * len(text) + 2
        environment = "USERDOMAIN=LAB\0USERNAME=alice\0\0".encode("utf-16-le")
        space.write(parameters + PAGE, environment)
        put(parameters, "_RTL_USER_PROCESS_PARAMETERS.Environment", parameters + PAGE, space)
        put(parameters, "_RTL_USER_PROCESS_PARAMETERS.Length", 0x1000, space)
        process.ldr, process.next_va = ldr, 0x0090_0000
        for name in ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"):
            self._ring(ldr + self.types.offset(f"_PEB_LDR_DATA.{name}ModuleList"), space)
        put(ldr, "_PEB_LDR_DATA.Initialized", 1, space)
        self._ldr_at = ldr + 0x100
        for start, file in ((0x400000, path), (0x7C900000, "C:\\WINDOWS\\system32\\ntdll.dll")):
            pieces = image(0x6000, file.rsplit("\\", 1)[-1] + ".pdb", self._guid, wide=self.wide, base=start)
            self.region(process, 0x6000, WRITECOPY_X, pieces, private=False, start=start, file=file)
            self._loaded(process, start, 0x6000, file)

    def _loaded(self, process: Process, start: int, size: int, path: str) -> None:
        space = process.space
        step = 0x100 + 4 * len(path)
        entry = process.ldr + 0x100 + sum(0x100 + 4 * len(each) + 16 & -8 for each in process.modules)
        self._entry(
            space, entry, start, size, path.rsplit("\\", 1)[-1], path, lambda text, at: _text(text, at, self.pointer)
        )
        assert entry + step < process.ldr + 2 * PAGE
        for order in ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"):
            head = process.ldr + self.types.offset(f"_PEB_LDR_DATA.{order}ModuleList")
            self._append(head, entry + self.types.offset(f"_LDR_DATA_TABLE_ENTRY.{order}Links"), space)
        process.modules.append(path)

    def _entry(self, space: AnySpace, entry: int, base: int, size: int, name: str, path: str, place: Any) -> None:
        put, struct_name = self._put, "_LDR_DATA_TABLE_ENTRY"
        put(entry, f"{struct_name}.DllBase", base, space)
        put(entry, f"{struct_name}.SizeOfImage", size, space)
        put(entry, f"{struct_name}.EntryPoint", base + 0x1000, space)
        put(entry, f"{struct_name}.LoadCount", 1, space)
        at = entry + self.types.size(struct_name)
        for member, text in (("FullDllName", path), ("BaseDllName", name)):
            where = place(text, at)
            put(entry, f"{struct_name}.{member}", where, space)
            if space is not self.space:
                space.write(at, text.encode("utf-16-le"))
            at += 2 * len(text) + 2

    def _vad(self, process: Process, start: int, count: int, protection: int, private: bool, file: str | None) -> int:
        name = "_MMVAD_SHORT" if private else "_MMVAD"
        va = self.pool.take(b"VadS" if private else b"Vad ", self.types.size(name))
        put = self._put
        put(va, f"{name}.StartingVpn", start >> 12)
        put(va, f"{name}.EndingVpn", (start >> 12) + count - 1)
        put(va, f"{name}.u.VadFlags.Protection", protection)
        put(va, f"{name}.u.VadFlags.PrivateMemory", int(private))
        put(va, f"{name}.u.VadFlags.CommitCharge", count if private else 0)
        if file is not None and not private:
            if self.types.has(f"{name}.u.VadFlags.ImageMap"):
                put(va, f"{name}.u.VadFlags.ImageMap", 1)
            area = self.pool.take(b"MmCa", self.types.size("_CONTROL_AREA"))
            put(area, "_CONTROL_AREA.FilePointer", self._file(file))
            put(va, f"{name}.ControlArea", area)
        self._grow(process, va, start >> 12)
        process.vads.append(va)
        return va

    def _grow(self, process: Process, va: int, page: int) -> None:
        """Hang a VAD into the tree; on 2003 the tree hangs right below the table's own root node."""
        root = process.va + self.types.offset("_EPROCESS.VadRoot")
        old = self.kind.build == 2600
        right, left = (self.types.offset(f"_MMVAD_SHORT.{side}Child") for side in ("Right", "Left"))
        at, parent = (root, 0) if old else (root + right, root)
        while node := self._read_pointer(at):
            parent = node
            begins = int.from_bytes(
                self.space.read(node + self.types.offset("_MMVAD_SHORT.StartingVpn"), self.pointer), "little"
            )
            at = node + (left if page < begins else right)
        self._pointer(at, va)
        if old:
            self._put(va, "_MMVAD_SHORT.Parent", parent)
        else:
            self._pointer(va, parent)

    def _file(self, path: str) -> int:
        header = self.types.offset("_OBJECT_HEADER.Body")
        va = self.pool.take(b"Fil\xe5", header + self.types.size("_FILE_OBJECT")) + header
        self._put(va - header, "_OBJECT_HEADER.Type", self._object_types["File"])
        self._put(va, "_FILE_OBJECT.FileName", self._unicode(_kernel_path(path)))
        return va

    # -- private: bytes --

    def _put(self, va: int, path: str, value: int | bytes, space: AnySpace | None = None) -> None:
        found, space = self.types.field(path), space or self.space
        if isinstance(value, bytes):
            space.write(va + found.offset, value)
            return
        size = min(found.size, 8)
        if found.bit_length:
            old = int.from_bytes(space.read(va + found.offset, size), "little")
            mask = (1 << found.bit_length) - 1
            value = old & ~(mask << found.bit_position) | (value & mask) << found.bit_position
        space.write(va + found.offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def _pointer(self, va: int, value: int, space: AnySpace | None = None) -> None:
        (space or self.space).write(va, value.to_bytes(self.pointer, "little"))

    def _read_pointer(self, va: int, space: AnySpace | None = None) -> int:
        return int.from_bytes((space or self.space).read(va, self.pointer), "little")

    def _ring(self, head: int, space: AnySpace | None = None) -> None:
        self._pointer(head, head, space)
        self._pointer(head + self.pointer, head, space)

    def _append(self, head: int, node: int, space: AnySpace | None = None) -> None:
        last = self._read_pointer(head + self.pointer, space)
        for at, value in ((node, head), (node + self.pointer, last), (last, node), (head + self.pointer, node)):
            self._pointer(at, value, space)

    def _block(self, tag: bytes, data: bytes) -> int:
        va = self.pool.take(tag, len(data))
        self.space.write(va, data)
        return va

    def _unicode(self, text: str) -> bytes:
        """A UNICODE_STRING, its text in the pool."""
        return self._kernel_text(text, 0)

    def _kernel_text(self, text: str, _at: int) -> bytes:
        return _text(text, self._block(b"Name", text.encode("utf-16-le") or b"\0\0"), self.pointer)

    def _signed(self, address: int) -> int:
        """As the debugger's structures hold an address: 64 bits, its sign extended on x86."""
        return address if self.wide else address | 0xFFFFFFFF_00000000

    # -- private: symbol tables --

    def _isf(self, pdb: str, symbols: dict[str, int], types: Json) -> Json:
        pointer = {"size": self.pointer, "signed": False, "kind": "int", "endian": "little"}
        return {
            "metadata": {
                "format": "6.1.0",
                "producer": {"name": "parasight-tests", "version": "1", "datetime": "2026-01-01T00:00:00"},
                "windows": {"pdb": {"GUID": self._guid, "age": 1, "database": pdb, "machine_type": self._machine()}},
            },
            "base_types": {
                name: {"size": size, "signed": signed, "kind": kind, "endian": "little"}
                for name, (size, signed, kind) in BASE.items()
            }
            | {"pointer": pointer},
            "user_types": types,
            "enums": {},
            "symbols": {name: {"address": rva} for name, rva in symbols.items()},
        }

    def _isf_types(self) -> Json:
        """Our types as volatility3 wants them, and empty ones for those that it asks for by name."""
        types: Json = {}
        for name, (size, members) in self.kind.types.items():
            fields = {}
            for member, where in members.items():
                kind = self._isf_kind(f"{name}.{member}", where)
                fields[member] = {"offset": where[0], "type": kind}
            types[name] = {"kind": "struct", "size": size, "fields": fields}
        types["_LARGE_INTEGER"] = {
            "kind": "union",
            "size": 8,
            "fields": {"QuadPart": {"offset": 0, "type": _base("long long")}},
        }
        types["_SID"] = {"kind": "struct", "size": 12, "fields": {}}
        wide, text = self.wide, {"kind": "struct", "name": "_UNICODE_STRING"}
        types["_OBJECT_TYPE"] = {
            "kind": "struct",
            "size": 0x2C0 if wide else 0x190,
            "fields": {"Name": {"offset": 0x78 if wide else 0x40, "type": text}},
        }
        types["_OBJECT_HEADER_NAME_INFO"] = {
            "kind": "struct",
            "size": 0x20 if wide else 0x10,
            "fields": {"Name": {"offset": 8 if wide else 4, "type": text}},
        }
        for name, (size, numbers) in OPEN_TYPES.items():
            plain = {member: {"offset": at, "type": _base(WORDS[length])} for member, (at, length) in numbers.items()}
            types[name] = {"kind": "struct", "size": size, "fields": plain}
        for name in STUBS:
            types.setdefault(name, {"kind": "struct", "size": 0x40, "fields": {}})
        return types

    def _isf_kind(self, path: str, where: Any) -> Json:
        found = where if isinstance(where, Field) else None
        if path in SPECIAL:
            return SPECIAL[path]
        if found is None:
            if isinstance(where[1], str):
                return {"kind": "struct", "name": where[1]}
            return _base(WORDS[where[1]])
        if found.bit_length:
            inner = _base(WORDS[found.size])
            return {
                "kind": "bitfield",
                "bit_position": found.bit_position,
                "bit_length": found.bit_length,
                "type": inner,
            }
        if found.length:
            return {"kind": "array", "count": found.length, "subtype": _base(WORDS[found.size // found.length])}
        if found.type.startswith("*"):
            return {"kind": "pointer", "subtype": {"kind": "struct", "name": found.type[1:]}}
        return _base(WORDS[found.size])


BASE = {
    "void": (0, False, "void"),
    "char": (1, True, "char"),
    "unsigned char": (1, False, "char"),
    "short": (2, True, "int"),
    "unsigned short": (2, False, "int"),
    "long": (4, True, "int"),
    "unsigned long": (4, False, "int"),
    "int": (4, True, "int"),
    "unsigned int": (4, False, "int"),
    "long long": (8, True, "int"),
    "unsigned long long": (8, False, "int"),
    "float": (4, True, "float"),
    "double": (8, True, "float"),
}
WORDS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned long", 8: "unsigned long long", 16: "double"}
OPEN_TYPES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {  # the same in every Windows
    "_DBGKD_GET_VERSION64": (
        0x28,
        {
            "MajorVersion": (0, 2),
            "MinorVersion": (2, 2),
            "ProtocolVersion": (4, 1),
            "Flags": (6, 2),
            "MachineType": (8, 2),
            "KernBase": (0x10, 8),
            "PsLoadedModuleList": (0x18, 8),
            "DebuggerDataList": (0x20, 8),
        },
    ),
    "_KUSER_SHARED_DATA": (
        0x338,
        {"NtProductType": (0x264, 4), "NtMajorVersion": (0x26C, 4), "NtMinorVersion": (0x270, 4)},
    ),
}
STUBS = (
    "_ERESOURCE",
    "_DEVICE_OBJECT",
    "_CM_KEY_BODY",
    "_CMHIVE",
    "_CM_KEY_NODE",
    "_CM_KEY_VALUE",
    "_HMAP_ENTRY",
    "_KSYSTEM_TIME",
    "_KMUTANT",
    "_DRIVER_OBJECT",
    "_OBJECT_SYMBOLIC_LINK",
    "_SHARED_CACHE_MAP",
    "_VACB",
    "_POOL_TRACKER_BIG_PAGES",
    "_IMAGE_DOS_HEADER",
    "_KTIMER",
    "_SECTION_OBJECT",
    "_SUBSECTION",
    "_RTL_ATOM_TABLE",
)


def _base(name: str) -> Json:
    return {"kind": "base", "name": name}


def _to(kind: Json) -> Json:
    return {"kind": "pointer", "subtype": kind}


_TIME: Json = {"kind": "union", "name": "_LARGE_INTEGER"}
_NODE = {"kind": "struct", "name": "_LIST_ENTRY"}
SPECIAL: Json = {
    "_LIST_ENTRY.Flink": _to(_NODE),
    "_LIST_ENTRY.Blink": _to(_NODE),
    "_UNICODE_STRING.Buffer": _to(_base("unsigned short")),
    "_EX_FAST_REF.Object": _to(_base("void")),
    "_EPROCESS.CreateTime": _TIME,
    "_EPROCESS.ExitTime": _TIME,
    "_ETHREAD.CreateTime": _TIME,
    "_ETHREAD.ExitTime": _TIME,
    "_CLIENT_ID.UniqueProcess": _to(_base("void")),
    "_CLIENT_ID.UniqueThread": _to(_base("void")),
    "_EPROCESS.UniqueProcessId": _to(_base("void")),
    "_EPROCESS.InheritedFromUniqueProcessId": _to(_base("void")),
    "_EPROCESS.SectionBaseAddress": _to(_base("void")),
    "_EPROCESS.Session": _to({"kind": "struct", "name": "_MM_SESSION_SPACE"}),
    "_LDR_DATA_TABLE_ENTRY.DllBase": _to(_base("void")),
    "_LDR_DATA_TABLE_ENTRY.EntryPoint": _to(_base("void")),
    "_PEB.ImageBaseAddress": _to(_base("void")),
    "_RTL_USER_PROCESS_PARAMETERS.Environment": _to(_base("void")),
    "_FILE_OBJECT.DeviceObject": _to({"kind": "struct", "name": "_DEVICE_OBJECT"}),
}


def image(size: int, pdb: str, guid: str, *, wide: bool, base: int, stamp: int = 0x4802517F) -> bytes:
    """The first pages of an image: headers, and the debug record at 2000."""
    debug = pe.Debug(pdb, guid, 1)
    wide_pieces = pe.build(size, _sections(size), debug=debug, base=base) if wide else None
    pieces = wide_pieces or _image32(size, debug, base, stamp)
    whole = bytearray(0x3000)
    for rva, data in pieces.items():
        whole[rva : rva + len(data)] = data
    return bytes(whole)


def _sections(size: int) -> list[pe.Section]:
    """Code, and data from 3f000 on where the image is that long: what tcpip.sys and the kernel write to lies there."""
    data = 0x3F000 if size > 0x40000 else size - PAGE
    return [
        pe.Section(".text", 0x1000, data - 0x1000, pe.CODE),
        pe.Section(".data", data, size - data, pe.DATA),
    ]


def _image32(size: int, debug: pe.Debug, base: int, stamp: int) -> dict[int, bytes]:
    record = pe._rsds(debug)
    directory = struct.pack("<IIHHIIII", 0, stamp, 0, 0, 2, len(record), 0x2040, 0x2040)
    dos = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80)
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x14C, len(_sections(size)), stamp, 0, 0, 0xE0, 0x10E)
    optional = struct.pack(
        "<HBBIIIIIIIII", 0x10B, 7, 10, 0x1000, 0x1000, 0, 0x1000, 0x1000, 0x2000, base, 0x1000, 0x200
    )
    optional += struct.pack(
        "<HHHHHHIIIIHHIIIIII", 5, 1, 5, 1, 5, 1, 0, size, 0x400, 0, 1, 0, 0x40000, 0x1000, 0x100000, 0x1000, 0, 16
    )
    directories = [(0, 0)] * 16
    directories[6] = (0x2000, len(directory))
    optional += b"".join(struct.pack("<II", *each) for each in directories)
    table = b"".join(
        struct.pack("<8sIIIIIIHHI", name.encode(), length, rva, length, rva, 0, 0, 0, 0, flags)
        for name, rva, length, flags in _sections(size)
    )
    return {0: dos.ljust(0x80, b"\0") + coff + optional + table, 0x2000: directory.ljust(0x40, b"\0") + record}


def _text(text: str, buffer: int, pointer: int) -> bytes:
    raw = len(text) * 2
    return struct.pack("<HH", raw, raw + 2).ljust(pointer, b"\0") + buffer.to_bytes(pointer, "little")


def _kernel_path(path: str | None) -> str:
    if not path:
        return ""
    return path[2:] if path[1:2] == ":" else path.replace("\\SystemRoot", "\\WINDOWS")
