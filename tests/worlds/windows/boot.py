"""A kernel that has booted: page tables, its image, shared user data, the debugger's blocks, drivers, pools, types.

Sources: the low stub (PROCESSOR_START_BLOCK) and where engines look for it: volatility3 automagic/pdbscan.py; KPCR,
KDBG and the version block: wdbgexts.h; everything else by the symbol table in use.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.worlds.windows import pe, symbols
from tests.worlds.windows.paging import LARGE_PAGE, PAGE, SELF, Ram, Space
from tests.worlds.windows.pool import NONPAGED, PAGED, Pool

MB = 1 << 20
EPOCH = 11_644_473_600  # seconds from 1601 to 1970
LOW_STUB_GPA, ROOT_GPA, KERNEL_GPA = 0x1000, 0x1AD000, 16 * MB
KUSER_VA, KUSER_USER_VA = 0xFFFF_F780_0000_0000, 0x7FFE_0000
NONPAGED_VA, PAGED_VA = 0xFFFF_E10C_4000_0000, 0xFFFF_B00D_8000_0000
DRIVERS_VA, CPU_VA = 0xFFFF_F803_2800_0000, 0xFFFF_F803_2000_0000
DIRECTORY_AT = 0x9000  # KernelDirectoryTableBase of the processor, in a KPCR: what the shadow's entry code switches to
BUILDS = {"17763": (17763, 5820), "19041": (19041, 5129), "20348": (20348, 1970), "26100": (26100, 2033)}
PROTECT = (0x01, 0x02, 0x10, 0x20, 0x04, 0x08, 0x40, 0x80)  # PAGE_* of the low three bits, winnt.h
TYPES = (
    "",
    "",
    "Type",
    "Directory",
    "SymbolicLink",
    "Token",
    "Job",
    "Process",
    "Thread",
    "Section",
    "Device",
    "Driver",
)
TYPES += ("Event", "Mutant", "File", "Key")
OPTIONAL_HEADERS = (0x20, 0x20, 0x10, 0x20, 0x10, 0x10, 0x10, 0x04)  # creator, name, handle, quota, process, audit, ...
NAME_INFO, QUOTA_INFO = 2, 8


@dataclass(frozen=True, slots=True)
class Driver:
    """A kernel module as it is on PsLoadedModuleList."""

    name: str
    path: str
    base: int
    size: int
    entry_va: int


def filetime(unix_ns: int) -> int:
    """100 ns since 1601."""
    return unix_ns // 100 + EPOCH * 10_000_000


class Kernel:
    """The kernel's half of a machine."""

    def __init__(
        self,
        family: str,
        *,
        ram: int,
        path: Path | None,
        symbols_from: Path | None,
        seed: int,
        now_ns: int,
        large_pages: bool,
        la57: bool,
        kva_shadow: bool = False,
    ) -> None:
        self.family, self.now_ns, self.boot_ns = family, now_ns, now_ns - 3_600_000_000_000
        self.build, self.revision = BUILDS[family]
        self.tables = symbols.real(symbols_from, family) if symbols_from else symbols.invented(family)
        self.types, self.tcpip_symbols = self.tables
        self.rng = random.Random(f"{family}/{seed}")
        self.ram = Ram(ram, path)
        self.size = 16 * MB if symbols_from else 8 * MB
        self.base = 0xFFFF_F803_0000_0000 + self.rng.randrange(0x40) * 2 * LARGE_PAGE
        self.ram.offer(KERNEL_GPA + self.size, ram)
        self.ram.offer(3 * MB, 5 * MB)
        self.ram.offer(11 * MB, KERNEL_GPA)
        self.space = Space(self.ram, ROOT_GPA, 5 if la57 else 4)
        self.kva_shadow = kva_shadow
        for va in (KUSER_VA, NONPAGED_VA, PAGED_VA, DRIVERS_VA):
            self.space.prepare(va)
        self.nonpaged = Pool(self.space, NONPAGED_VA, NONPAGED)
        self.paged = Pool(self.space, PAGED_VA, PAGED)
        self.drivers: list[Driver] = []
        self._next_driver = DRIVERS_VA
        self._map_kernel(large=large_pages)
        self._low_stub()
        self._shared_data()
        self._processor()
        self._debugger()
        self._object_types()
        for symbol in ("PsActiveProcessHead", "PsLoadedModuleList"):
            self.empty_list(self.va(symbol))
        self._first_drivers()

    # -- words --

    def va(self, symbol: str) -> int:
        """Where a symbol of the kernel is."""
        return self.base + self.types.symbol(symbol)

    def set_u64(self, va: int, value: int) -> None:
        self.space.write(va, struct.pack("<Q", value))

    def u64(self, va: int) -> int:
        return int.from_bytes(self.space.read(va, 8), "little")

    def set(self, va: int, path: str, value: int | bytes) -> None:
        """Write one field of a structure in kernel memory, whatever its width."""
        field = self.types.field(path)
        if isinstance(value, bytes):
            self.space.write(va + field.offset, value)
            return
        if field.length:
            whole = int.from_bytes(self.space.read(va + field.offset, field.size), "little")
            mask = (1 << field.length) - 1 << field.bit
            value = whole & ~mask | value << field.bit & mask
        self.space.write(va + field.offset, (value & (1 << 8 * field.size) - 1).to_bytes(field.size, "little"))

    def get(self, va: int, path: str) -> int:
        field = self.types.field(path)
        return int.from_bytes(self.space.read(va + field.offset, field.size), "little")

    def text(self, words: str, pool: Pool | None = None, tag: bytes = b"IoNm") -> bytes:
        """A UNICODE_STRING whose characters were put into a pool."""
        data = words.encode("utf-16-le")
        if not data:
            return struct.pack("<HHIQ", 0, 0, 0, 0)
        where = (pool or self.paged).take(tag, data + b"\0\0")
        return struct.pack("<HHIQ", len(data), len(data) + 2, 0, where)

    # -- lists, linked in the order in which Windows does it --

    def empty_list(self, head: int) -> None:
        self.space.write(head, struct.pack("<QQ", head, head))

    def insert_tail(self, head: int, entry: int) -> None:
        last = self.u64(head + 8)
        self.space.write(entry, struct.pack("<QQ", head, last))
        self.set_u64(last, entry)
        self.set_u64(head + 8, entry)

    def insert_head(self, head: int, entry: int) -> None:
        first = self.u64(head)
        self.space.write(entry, struct.pack("<QQ", first, head))
        self.set_u64(first + 8, entry)
        self.set_u64(head, entry)

    def remove(self, entry: int) -> None:
        following, previous = struct.unpack("<QQ", self.space.read(entry, 16))
        self.set_u64(previous, following)
        self.set_u64(following + 8, previous)

    # -- objects --

    def object(self, kind: str, tag: bytes, body: bytes, *, name: str | None = None, pool: Pool | None = None) -> int:
        """An executive object: its optional headers, its header, its body; the body's address."""
        header_size = self.types.offset("_OBJECT_HEADER.Body")
        mask = NAME_INFO if name is not None else QUOTA_INFO if kind in ("Process", "Thread") else 0
        optional = bytearray(0x20 if mask else 0)
        if name is not None:
            optional[8:24] = self.text(name, self.paged, b"ObNm")
        pool = pool or self.nonpaged
        va = pool.take(tag, bytes(optional) + bytes(header_size) + body) + len(optional) + header_size
        header = va - header_size
        values = {
            "PointerCount": 0x8001,
            "HandleCount": 1,
            "TypeIndex": self._type_index(kind, header),
            "InfoMask": mask,
        }
        self.space.write(header, self.types.pack("_OBJECT_HEADER", values)[:header_size])
        return va

    def discard(self, va: int, *, poison: bool = True, pool: Pool | None = None) -> None:
        """Free an executive object that has a quota header."""
        (pool or self.nonpaged).give(va - self.types.offset("_OBJECT_HEADER.Body") - 0x20, poison=poison)

    def header(self, va: int) -> int:
        """Where the header of an object is."""
        return va - self.types.offset("_OBJECT_HEADER.Body")

    def _type_index(self, kind: str, header: int) -> int:
        return (TYPES.index(kind) ^ self.cookie ^ header >> 8) & 0xFF

    # -- drivers --

    def driver(self, name: str, path: str, image: dict[int, bytes], size: int) -> Driver:
        """Load a kernel module: map it, and put it on the list of loaded modules."""
        base = self._next_driver
        self._next_driver += size + PAGE
        self.space.map(base, self.ram.page(size // PAGE), size // PAGE, execute=True)
        for rva, data in image.items():
            self.space.write(base + rva, data)
        return self.listed(name, path, base, size)

    def listed(self, name: str, path: str, base: int, size: int) -> Driver:
        values = {
            "DllBase": base,
            "EntryPoint": base + 0x1000,
            "SizeOfImage": size,
            "FullDllName": self.text(path),
            "BaseDllName": self.text(name),
            "Flags": 0x49104000,
        }
        entry = self.nonpaged.take(b"MmLd", self.types.pack("_LDR_DATA_TABLE_ENTRY", values))
        self.insert_tail(
            self.va("PsLoadedModuleList"), entry + self.types.offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks")
        )
        found = Driver(name, path, base, size, entry)
        self.drivers.append(found)
        return found

    # -- the parts --

    def _map_kernel(self, *, large: bool) -> None:
        if large:
            for offset in range(0, self.size, LARGE_PAGE):
                self.space.map_large(self.base + offset, KERNEL_GPA + offset)
        else:
            self.space.map(self.base, KERNEL_GPA, self.size // PAGE, execute=True)
        parts = (
            pe.Section(".rdata", 0x1000, 0xFF000, pe.READONLY),
            pe.Section(".text", 0x100000, 0x200000, pe.CODE),
            pe.Section("POOLCODE", 0x300000, 0x10000, pe.CODE),
            pe.Section("PAGE", 0x310000, 0x1F0000, pe.CODE),
            pe.Section("ALMOSTRO", 0x500000, self.size - 0x510000, pe.DATA),
            pe.Section(".rsrc", self.size - 0x10000, 0x10000, pe.READONLY),
        )
        image = pe.build(
            self.size,
            parts,
            debug=pe.Debug(self.types.pdb, self.types.guid, self.types.age),
            exports={
                "PsInitialSystemProcess": self.types.symbol("PsInitialSystemProcess"),
                "PsLoadedModuleList": self.types.symbol("PsLoadedModuleList"),
                "NtBuildNumber": self.types.symbol("NtBuildNumber"),
                "KdDebuggerEnabled": 0x310000,
            },
            version=(10, 0, self.build, self.revision),
            name="ntoskrnl.exe",
            dll=False,
            base=self.base,
        )
        for rva, data in image.items():
            self.space.write(self.base + rva, data)

    def _low_stub(self) -> None:
        stub = bytearray(0x200)
        struct.pack_into("<Q", stub, 0, 0x0000_0001_0006_00E9)  # jmp, and the flag that the processor has started
        struct.pack_into("<Q", stub, 0x70, self.va("KiSystemCall64") & -4)
        struct.pack_into("<Q", stub, 0xA0, ROOT_GPA)
        self.ram.write(LOW_STUB_GPA, bytes(stub))

    def _shared_data(self) -> None:
        self.kuser_gpa = self.ram.page()
        self.space.map(KUSER_VA, self.kuser_gpa)
        values: dict[str, int | bytes] = {
            "NtSystemRoot": "C:\\Windows".encode("utf-16-le"),
            "NtBuildNumber": self.build,
            "NtProductType": 3 if self.family in ("17763", "20348") else 1,
            "ProductTypeIsValid": 1,
            "NativeProcessorArchitecture": 9,
            "NtMajorVersion": 10,
            "NumberOfPhysicalPages": self.ram.size // PAGE,
            "ActiveProcessorCount": 1,
            "TickCountMultiplier": 0x0FA00000,
        }
        self.space.write(KUSER_VA, self.types.pack("_KUSER_SHARED_DATA", values))
        self.tick(0)

    def tick(self, seconds: float = 1.0) -> None:
        """Time goes on: high part, low part, high part again, as the kernel writes them."""
        self.now_ns += int(seconds * 1e9)
        up = (self.now_ns - self.boot_ns) // 100
        for field, value in (("InterruptTime", up), ("SystemTime", filetime(self.now_ns)), ("TickCount", up // 156250)):
            at = self.kuser_gpa + self.types.offset(f"_KUSER_SHARED_DATA.{field}")
            low, high = struct.pack("<I", value & 0xFFFF_FFFF), struct.pack("<i", value >> 32)
            self.ram.write(at + 8, high)
            self.ram.write(at, low)
            self.ram.write(at + 4, high)

    def _processor(self) -> None:
        """Processor 0: its KPCR, and an interrupt table whose handlers lie in the kernel."""
        self.space.map(CPU_VA, self.ram.page(4), 4)
        if self.kva_shadow:
            self.space.map(CPU_VA + DIRECTORY_AT & -PAGE, self.ram.page())
            self.set_u64(CPU_VA + DIRECTORY_AT, ROOT_GPA)
        self.gs_base, self.idt = CPU_VA, CPU_VA + 3 * PAGE
        for offset, value in ((0x18, CPU_VA), (0x20, CPU_VA + 0x180), (0x38, self.idt)):
            self.set_u64(CPU_VA + offset, value)
        first, fault = self.va("KiDivideErrorFault"), self.va("KiPageFault")
        for vector in range(256):
            handler = fault if vector == 14 else first + 0x40 * vector if vector < 32 else first + 0x800 + 8 * vector
            gate = struct.pack("<HHHHII", handler & 0xFFFF, 0x10, 0x8E00, handler >> 16 & 0xFFFF, handler >> 32, 0)
            self.space.write(self.idt + 16 * vector, gate)
        self.set_u64(self.va("KiProcessorBlock"), CPU_VA + 0x180)
        self.set_u64(self.va("KeNumberProcessors"), 1)

    def shadow(self) -> int:
        """A top table that maps processor 0 and the page where system calls begin, and nothing else of the kernel."""
        seen = Space(self.ram, self.ram.page(), self.space.levels)
        self.ram.write(seen.root + 8 * SELF, bytes(8))
        for va in (CPU_VA, self.idt, CPU_VA + DIRECTORY_AT & -PAGE, self.va("KiSystemCall64") & -PAGE):
            seen.map(va, self.space.gpa(va), execute=va != CPU_VA)
        return seen.root

    def _debugger(self) -> None:
        lab = f"{self.build}.1.amd64fre.invented.260101-0000"
        self.space.write(self.va("NtBuildLab"), lab.encode() + b"\0")
        self.space.write(self.va("NtBuildNumber"), struct.pack("<I", 0xF000_0000 | self.build))
        self.space.write(self.va("CmNtCSDVersion"), struct.pack("<I", 0))
        table = b"".join(
            struct.pack("<I", PROTECT[number & 7] | (0, 0x200, 0x100, 0x400)[number >> 3]) for number in range(32)
        )
        self.space.write(self.va("MmProtectToValue"), table[:96] + struct.pack("<I", 1) + table[100:])
        block = self.va("KdDebuggerDataBlock")
        data = bytearray(0x380)
        struct.pack_into("<QQ4sI", data, 0, block, block, b"KDBG", len(data))
        for offset, value in (
            (24, self.base),
            (72, self.va("PsLoadedModuleList")),
            (80, self.va("PsActiveProcessHead")),
            (88, self.va("PspCidTable")),
            (520, self.va("NtBuildLab")),
            (616, self.va("CmNtCSDVersion")),
        ):
            struct.pack_into("<Q", data, offset, value)
        self.space.write(block, bytes(data))
        values: dict[str, int | bytes] = {
            "MajorVersion": 0xF,
            "MinorVersion": self.build,
            "ProtocolVersion": 6,
            "MachineType": 0x8664,
            "KernBase": self.base,
            "PsLoadedModuleList": self.va("PsLoadedModuleList"),
            "DebuggerDataList": block,
        }
        self.space.write(self.va("KdVersionBlock"), self.types.pack("_DBGKD_GET_VERSION64", values))

    def _object_types(self) -> None:
        self.cookie = self.rng.randrange(1, 256)
        self.space.write(self.va("ObHeaderCookie"), struct.pack("<I", self.cookie))
        table = self.va("ObTypeIndexTable")
        for number, name in enumerate(TYPES):
            if number:
                values = {"Name": self.text(name, self.paged, b"ObNm"), "Index": number}
                self.set_u64(table + 8 * number, self.nonpaged.take(b"ObjT", self.types.pack("_OBJECT_TYPE", values)))
        offsets = bytes(
            sum(size for bit, size in enumerate(OPTIONAL_HEADERS) if mask >> bit & 1) & 0xFF for mask in range(256)
        )
        self.space.write(self.va("ObpInfoMaskToOffset"), offsets)

    def _first_drivers(self) -> None:
        self.listed("ntoskrnl.exe", "\\SystemRoot\\system32\\ntoskrnl.exe", self.base, self.size)
        for name in ("hal.dll", "ntfs.sys", "afd.sys"):
            folder = "" if name == "hal.dll" else "drivers\\"
            self.driver(name, f"\\SystemRoot\\system32\\{folder}{name}", self._small_image(name, 0x8000), 0x8000)
        highest = max(int(self.tcpip_symbols.symbol(name)) for name in symbols.TCPIP_SYMBOLS)
        size = -(-(highest + 0x10000) // 0x10000) * 0x10000
        debug = pe.Debug(self.tcpip_symbols.pdb, self.tcpip_symbols.guid, self.tcpip_symbols.age)
        path = "\\SystemRoot\\System32\\drivers\\tcpip.sys"
        self.tcpip = self.driver("tcpip.sys", path, self._small_image("tcpip.sys", size, debug), size)

    def _small_image(self, name: str, size: int, debug: pe.Debug | None = None) -> dict[int, bytes]:
        parts = (pe.Section(".text", 0x1000, 0x1000, pe.CODE), pe.Section(".rdata", 0x2000, size - 0x2000, pe.DATA))
        version = (10, 0, self.build, self.revision)
        return pe.build(size, parts, debug=debug, version=version, name=name, exports={"DriverEntry": 0x1000})
