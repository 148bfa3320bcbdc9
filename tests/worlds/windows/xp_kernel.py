"""The kernel of a Windows XP or Server 2003 made of bytes: its image and variables, processor, clock, modules, objects.

From the processor's block at FS:0 to the loaded modules. Layouts are those of `appliance.guest.windows.xp_types`.
Sources: _KPCR and _KDDEBUGGER_DATA64: ntddk.h, wdbgexts.h.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

from appliance.guest.windows import xp_types
from appliance.guest.windows.isf import SymbolTable
from tests.worlds.windows.paging import PAGE, Ram, Space
from tests.worlds.windows.xp_image import image
from tests.worlds.windows.xp_paging import AnySpace, Space32
from tests.worlds.windows.xp_pool import Pool

EPOCH = 116_444_736_000_000_000
START = 1_340_000_000  # the machine's boot, in seconds since 1970: June 2012
BUILDS = {"xp-sp2": 2, "xp-sp3": 3, "2003-sp0": 0, "2003-sp1": 1, "2003-sp2": 2, "2003-sp2-x64": 2}
ERA = {
    name: xp_types.ERAS[0 if "xp" in name else 3 if "x64" in name else 2 if "sp0" not in name else 1] for name in BUILDS
}

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
OBJECT_TYPES = ("Type", "Directory", "SymbolicLink", "Token", "Process", "Thread", "Job", "File")


class Kernel:
    """One kernel in a RAM of its own; ``guid`` is what all its images are told apart by."""

    def __init__(self, era: str, guid: str, *, pae: bool, ram: int, path: Path | None, seed: int) -> None:
        self.era, self.guid, self.kind = era, guid, ERA[era]
        self.wide = self.kind.pointer_size == 8
        self.pae, self.random = pae and not self.wide, random.Random(seed)
        self.pointer = self.kind.pointer_size
        self.path, self.ram = path, Ram(ram, path)
        self.ram.offer(0x0080_0000, ram)
        self.types: SymbolTable = xp_types.table(self.kind, SYMBOLS)
        self.base = 0xFFFFF80001000000 if self.wide else 0x804D7000
        self.image_size = 0x214000
        self.seconds = START
        self._make_space()
        self.pool = Pool(self.space, 0xFFFFFA8000000000 if self.wide else 0x81800000, self.wide)
        self._make_kernel()
        self._make_modules()

    def pdb(self) -> str:
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

    def user_space(self) -> tuple[AnySpace, int]:
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
        self.cid = self.pool.take(b"Obtb", self.types.size("_HANDLE_TABLE"))
        self._cid_pages = self.pool.take(b"Obtb", PAGE)
        self.put(self.cid, "_HANDLE_TABLE.TableCode", self._cid_pages | 1)
        write, base = self.space.write, self.base
        write(base, image(self.image_size, self.pdb(), self.guid, wide=self.wide, base=base))
        for name in ("PsActiveProcessHead", "PsLoadedModuleList", "KdpDebuggerDataListHead"):
            self.ring(base + SYMBOLS[name])
        write(base + SYMBOLS["MmProtectToValue"], struct.pack("<32I", *PROTECTIONS))
        minor, pack = (1 if self.kind.build == 2600 else 2), BUILDS[self.era]
        build = self.kind.build
        lab = f"{build}.{'xpsp_sp' if build == 2600 else 'srv03_sp'}{pack}_gdr.120504-1619\0"
        write(base + SYMBOLS["NtBuildLab"], lab.encode())
        write(base + SYMBOLS["CmNtCSDVersion"], struct.pack("<I", pack << 8))
        write(base + SYMBOLS["NtBuildNumber"], struct.pack("<I", 0xF000_0000 | build))
        self.put_pointer(base + SYMBOLS["PspCidTable"], self.cid)
        self.put_pointer(base + SYMBOLS["MmSystemRangeStart"], 0xFFFF080000000000 if self.wide else 0x80000000)
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
        self.put_pointer(base + SYMBOLS["KdpDebuggerDataListHead"], kdbg)
        version = struct.pack(
            "<HHBBHHBBBBH", 0xF, build, 6, 0, 3 if not self.wide else 1, self.machine_type(), 12, 3, 46, 0, 0
        )
        addresses = (base, base + SYMBOLS["PsLoadedModuleList"], base + SYMBOLS["KdpDebuggerDataListHead"])
        write(base + SYMBOLS["KdVersionBlock"], version + struct.pack("<QQQ", *map(signed, addresses)))
        self.minor = minor
        shared = self.ram.page()
        self.space.map(0xFFFFF78000000000 if self.wide else 0xFFDF0000, shared)
        self.shared = shared
        self._kuser()
        if not self.wide:
            self._kpcr()
        else:
            self._low_stub()
        self.object_types = {name: self._object_type(name) for name in OBJECT_TYPES}
        for number, va in enumerate(self.object_types.values()):
            self.put_pointer(base + SYMBOLS["ObpObjectTypes"] + number * self.pointer, va)

    def machine_type(self) -> int:
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
            self.put_pointer(kpcr + at, value)
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
        struct.pack_into("<IBxxxII", data, 0x264, 1, 1, 5, self.minor)
        self.ram.write(self.shared, bytes(data))

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
                self.space.write(base, image(size, pdb, self.guid, wide=self.wide, base=base))
            entry = self.pool.take(b"MmLd", self.types.size("_LDR_DATA_TABLE_ENTRY"))
            self.module_entry(self.space, entry, base, size, name, path, self.kernel_text)
            links = entry + self.types.offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks")
            self.append(self.base + SYMBOLS["PsLoadedModuleList"], links)

    # -- objects --

    def object(self, tag: bytes, name: str, kind: str) -> int:
        header = self.types.offset("_OBJECT_HEADER.Body")
        va = self.pool.take(tag, header + self.types.size(name))
        for part, value in (
            ("PointerCount", 3),
            ("HandleCount", 1),
            ("Type", self.object_types[kind]),
            ("Flags", 0x20),
        ):
            self.put(va, f"_OBJECT_HEADER.{part}", value)
        return va + header

    def _object_type(self, name: str) -> int:
        """_OBJECT_TYPE: Name at 40 (78 on x64)."""
        va = self.pool.take(b"ObjT", 0x2C0 if self.wide else 0x190)
        self.space.write(va + (0x78 if self.wide else 0x40), self.unicode(name))
        return va

    def enter_cid(self, pid: int, va: int) -> None:
        """The pid's entry in PspCidTable, a table of one level above its pages of entries."""
        per_page = PAGE // (2 * self.pointer)
        page, index = divmod(pid // 4, per_page)
        at = self._cid_pages + page * self.pointer
        if not self.read_pointer(at):
            self.put_pointer(at, self.pool.take(b"Obtb", PAGE))
        self.put_pointer(self.read_pointer(at) + index * 2 * self.pointer, va)

    def module_entry(self, space: AnySpace, entry: int, base: int, size: int, name: str, path: str, place: Any) -> None:
        put, struct_name = self.put, "_LDR_DATA_TABLE_ENTRY"
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

    # -- the clock --

    def tick(self, seconds: int = 1) -> None:
        """The clock goes on."""
        self.seconds += seconds
        self._kuser()

    def filetime(self) -> int:
        return EPOCH + self.seconds * 10**7

    # -- bytes --

    def put(self, va: int, path: str, value: int | bytes, space: AnySpace | None = None) -> None:
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

    def put_pointer(self, va: int, value: int, space: AnySpace | None = None) -> None:
        (space or self.space).write(va, value.to_bytes(self.pointer, "little"))

    def read_pointer(self, va: int, space: AnySpace | None = None) -> int:
        return int.from_bytes((space or self.space).read(va, self.pointer), "little")

    def ring(self, head: int, space: AnySpace | None = None) -> None:
        self.put_pointer(head, head, space)
        self.put_pointer(head + self.pointer, head, space)

    def append(self, head: int, node: int, space: AnySpace | None = None) -> None:
        last = self.read_pointer(head + self.pointer, space)
        for at, value in ((node, head), (node + self.pointer, last), (last, node), (head + self.pointer, node)):
            self.put_pointer(at, value, space)

    def block(self, tag: bytes, data: bytes) -> int:
        va = self.pool.take(tag, len(data))
        self.space.write(va, data)
        return va

    def unicode(self, text: str) -> bytes:
        """A UNICODE_STRING, its text in the pool."""
        return self.kernel_text(text, 0)

    def kernel_text(self, text: str, _at: int) -> bytes:
        return unicode_string(text, self.block(b"Name", text.encode("utf-16-le") or b"\0\0"), self.pointer)

    def _signed(self, address: int) -> int:
        """As the debugger's structures hold an address: 64 bits, its sign extended on x86."""
        return address if self.wide else address | 0xFFFFFFFF_00000000


def unicode_string(text: str, buffer: int, pointer: int) -> bytes:
    raw = len(text) * 2
    return struct.pack("<HH", raw, raw + 2).ljust(pointer, b"\0") + buffer.to_bytes(pointer, "little")
