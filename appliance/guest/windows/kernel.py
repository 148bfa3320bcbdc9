"""An attached Windows kernel: its address space, its symbols and types, its loaded modules and its clocks.

Made by :func:`appliance.guest.windows.attach.attach`. One `WindowsKernel` belongs to one thread.
Sources: symbols PsLoadedModuleList, NtBuildNumber, NtBuildLab, MmSystemRangeStart and types _KLDR_DATA_TABLE_ENTRY (or
_LDR_DATA_TABLE_ENTRY), _KUSER_SHARED_DATA of the kernel's PDB; ntddk.h (KUSER_SHARED_DATA: at fffff78000000000, on x86
at ffdf0000; InterruptTime 8, SystemTime 14, NtBuildNumber 260 from Windows 10 on, NtMajorVersion 26c, TickCount 320).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from appliance.errors import GuestError, GuestGone, Implausible, OutOfTime, UnreadableMemory, UnsupportedGuest
from appliance.guest.windows import pe
from appliance.guest.windows.isf import PdbId, SymbolTable
from appliance.guest.windows.space import AddressSpace

KUSER64, KUSER32 = 0xFFFF_F780_0000_0000, 0xFFDF_0000
KUSER_SIZE = 0x330
INTERRUPT_TIME, SYSTEM_TIME, BUILD_NUMBER, MAJOR, MINOR, TICK_COUNT = 0x8, 0x14, 0x260, 0x26C, 0x270, 0x320
EPOCH = 116_444_736_000_000_000  # 1970 in 100 ns since 1601
BUILDS = range(2195, 100_000)  # Windows 2000 and later
MAX_MODULES = 4096
_TEXT = 1024  # bytes of a module's path
_HEAD = 0x200  # bytes of an image that tell one build and one place of it from others


class KernelModule(NamedTuple):
    """One image in the kernel, as the loader tells of it."""

    name: str  # "tcpip.sys"
    base: int
    size: int
    path: str


class Modules(list[KernelModule]):
    """The loaded modules; ``gaps`` says what was wrong with their list, e.g. where it broke off."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[str] = []


class SymbolSource(Protocol):
    """Where symbols come from: `appliance.guest.windows.symbols.SymbolStore`."""

    def find(self, pdb: PdbId) -> SymbolTable:
        """The table of one build of one binary. Raises UnsupportedGuest with the command that gets it."""
        ...


@dataclass(frozen=True, slots=True)
class UserShared:
    """What KUSER_SHARED_DATA says. Times are in units of 100 ns; ``system_time`` since 1601."""

    interrupt_time: int
    system_time: int
    build: int  # 0 before Windows 10
    major: int
    minor: int
    ticks: int

    @property
    def epoch_ns(self) -> int:
        """The guest's clock in nanoseconds since the Unix epoch."""
        return (self.system_time - EPOCH) * 100


def parse_user_shared(raw: bytes) -> UserShared:
    """Parse KUSER_SHARED_DATA (`KUSER_SIZE` bytes). A time that changed under the read has two unlike high parts."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(raw[at : at + size], "little")

    return UserShared(
        interrupt_time=number(INTERRUPT_TIME, 8),
        system_time=number(SYSTEM_TIME, 8),
        build=number(BUILD_NUMBER, 4) & 0xFFFF if number(BUILD_NUMBER, 4) & 0xFFFF in BUILDS else 0,
        major=number(MAJOR, 4),
        minor=number(MINOR, 4),
        ticks=number(TICK_COUNT, 8),
    )


class WindowsKernel:
    """One attached kernel. ``base`` is the address of its image, ``types`` also holds its symbols."""

    def __init__(
        self,
        space: AddressSpace,
        *,
        base: int,
        size: int,
        types: SymbolTable,
        shared: UserShared,
        store: SymbolSource | None = None,
        pdb: PdbId | None = None,
    ) -> None:
        self.memory, self.space, self.base, self.size, self.types = space.memory, space, base, size, types
        self.pointer_size = space.pointer_size
        self.pdb = pdb or types.pdb
        self.store = store
        self.major, self.minor = shared.major, shared.minor
        self._shared_va = KUSER64 if self.pointer_size == 8 else KUSER32
        self._lowest = self._system_range()
        self._module_tables: dict[PdbId, SymbolTable] = {}
        self.build = shared.build or self._build()
        self.revision: int | None = None  # the last part of the file's version, where it is known ("UBR")
        self._head: bytes | None = None  # of the image: its headers, without what they say of sections
        self.describe = ""

    @property
    def release(self) -> str:
        """The version as people write it: "10.0.20348"."""
        return f"{self.major}.{self.minor}.{self.build}"

    # -- symbols --

    def symbol(self, name: str) -> int:
        """The address of a symbol. Raises UnsupportedGuest naming it."""
        return self.base + self.types.get(name)

    def find(self, name: str) -> int | None:
        """The address of a symbol, None where the kernel's symbols have none of this name."""
        rva = self.types.find(name)
        return None if rva is None else self.base + rva

    def module_symbols(self, name: str) -> SymbolTable | None:
        """Symbols of a loaded module ("tcpip.sys"), by what its image in memory says of them; None: it is not loaded.

        Raises UnsupportedGuest where its symbols cannot be had or the image does not name them.
        """
        module = next((module for module in self.modules() if module.name.lower() == name.lower()), None)
        return None if module is None else self.image_symbols(module)

    def image_symbols(self, module: KernelModule) -> SymbolTable:
        """Symbols of a module. Raises UnsupportedGuest."""
        wanted = module.name.lower().rsplit(".", 1)[0] + ".pdb"
        try:
            pdb = pe.find_debug_id(self.space, module.base, pe.read_headers(self.space, module.base))
        except (Implausible, UnreadableMemory):  # its headers are paged out, or were wiped
            pdb = None
        if pdb is None or pdb.name != wanted:
            pdb = pe.seek_debug_id(self.space, module.base, module.size, (wanted,)) or pdb
        if pdb is None:
            raise UnsupportedGuest((f"the image of {module.name} does not say which symbols are its own",))
        if pdb.name != wanted:
            raise UnsupportedGuest((f"the image of {module.name} names the symbols of another: {pdb}",))
        if self.store is None:
            raise UnsupportedGuest((f"no symbols for {pdb}",))
        if pdb not in self._module_tables:
            self._module_tables[pdb] = self.store.find(pdb)
        return self._module_tables[pdb]

    # -- the machine --

    def is_kernel(self, va: int) -> bool:
        """Whether an address can be the kernel's: canonical, and above user space."""
        return self._lowest <= va < 1 << 8 * self.pointer_size

    def process_space(self, dtb: int) -> AddressSpace:
        """The address space of a process; ``dtb`` is _KPROCESS.DirectoryTableBase."""
        return self.space.other(dtb)

    def forget(self) -> None:
        """Drop remembered translations; call at the start of each look."""
        self.space.forget()

    def limit(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> AbstractContextManager[None]:
        """Within this, reads raise OutOfTime once so many seconds have passed."""
        return self.space.limit(seconds, clock)

    def read_shared(self) -> UserShared:
        """The machine's clocks, read now. Raises UnreadableMemory."""
        for _ in range(8):
            raw = self.space.read(self._shared_va, KUSER_SIZE)
            if _is_settled(raw, INTERRUPT_TIME) and _is_settled(raw, SYSTEM_TIME):
                break
        return parse_user_shared(raw)

    def read_pulse(self) -> int:
        """InterruptTime: it grows while this kernel runs. Raises UnreadableMemory, Implausible: another one runs now.

        Page tables and image are looked up afresh, and the image's headers must be those of before: after a reboot
        page tables may lie where they did.
        """
        fresh = self.space.other(self.space.root)
        head, clock = fresh.readv([(self.base, _HEAD), (self._shared_va + INTERRUPT_TIME, 8)])
        if head is None or clock is None or (self._head is not None and head != self._head):
            raise Implausible("the kernel that was attached to is not there any more: the guest has rebooted")
        self._head = head
        return int.from_bytes(clock, "little")

    def modules(self) -> Modules:
        """The loaded modules, in load order. Their list is followed forwards, each link checked backwards.

        Raises UnsupportedGuest (no such symbol or type), UnreadableMemory (the list's head), OutOfTime.
        """
        types, space = self.types, self.space
        entry = "_KLDR_DATA_TABLE_ENTRY" if types.has("_KLDR_DATA_TABLE_ENTRY.DllBase") else "_LDR_DATA_TABLE_ENTRY"
        links = types.offset(f"{entry}.InLoadOrderLinks")
        size = max(types.offset(f"{entry}.{name}") for name in ("BaseDllName", "FullDllName")) + 2 * self.pointer_size
        size = max(size, links + 2 * self.pointer_size)
        head = self.symbol("PsLoadedModuleList")
        found = Modules()
        before, at = head, space.pointer(head)
        seen = {head}
        while at != head:
            if at in seen or len(seen) > MAX_MODULES or not self.is_kernel(at):
                found.gaps.append(f"the list of modules leads to {at:#x} after {len(found)} of them")
                break
            seen.add(at)
            try:
                raw = space.read(at - links, size)
                module = self._parse_module(raw, entry)
            except UnreadableMemory:
                found.gaps.append(f"the module at {at:#x} cannot be read")
                break
            if self._pointer(raw, links + self.pointer_size) != before:
                found.gaps.append(f"the module at {at:#x} does not lead back")
            if module is None:
                found.gaps.append(f"the module at {at:#x} is implausible")
            else:
                found.append(module)
            before, at = at, self._pointer(raw, links)
        return found

    # -- private --

    def _parse_module(self, raw: bytes, entry: str) -> KernelModule | None:
        base = self._pointer(raw, self.types.offset(f"{entry}.DllBase"))
        where = self.types.offset(f"{entry}.SizeOfImage")
        size = int.from_bytes(raw[where : where + 4], "little")
        if not self.is_kernel(base) or base % 4096 or not 0 < size <= pe.MAX_IMAGE:
            return None
        name = self._text(raw, self.types.offset(f"{entry}.BaseDllName"))
        return KernelModule(name, base, size, self._text(raw, self.types.offset(f"{entry}.FullDllName")))

    def _text(self, raw: bytes, at: int) -> str:
        """A UNICODE_STRING: length in bytes, maximum, buffer. Empty where it is paged out."""
        length, buffer = int.from_bytes(raw[at : at + 2], "little"), self._pointer(raw, at + self.pointer_size)
        try:
            return self.space.read_wide(buffer, min(length, _TEXT))
        except UnreadableMemory:
            return ""

    def _pointer(self, raw: bytes, at: int) -> int:
        return int.from_bytes(raw[at : at + self.pointer_size], "little")

    def _system_range(self) -> int:
        """Where the kernel's half begins; on x86 it may be moved (MmSystemRangeStart, boot option /3GB)."""
        if self.pointer_size == 8:
            return (1 << 64) - (1 << self.space.mode.bits - 1)
        try:
            start = self.space.pointer(self.symbol("MmSystemRangeStart"))
        except (UnreadableMemory, UnsupportedGuest, Implausible):
            return 0x8000_0000
        return start if 0x8000_0000 <= start <= 0xC000_0000 else 0x8000_0000

    def _build(self) -> int:
        """The build number before Windows 10: the kernel's own variable, or the text beside it."""
        try:
            where = self.find("NtBuildNumber")
            number = self.space.u32(where) & 0xFFFF if where else 0  # XP's own debugger data does not name it
            if number in BUILDS:
                return number
            text = self.space.read_text(self.symbol("NtBuildLab"), 16).split(b".", 1)[0]
            return int(text) if text.isdigit() and int(text) in BUILDS else 0
        except (GuestGone, OutOfTime):
            raise
        except GuestError:
            return 0


def _is_settled(raw: bytes, at: int) -> bool:
    """_KSYSTEM_TIME: LowPart, High1Time, High2Time. The high parts differ while it is being written."""
    return raw[at + 4 : at + 8] == raw[at + 8 : at + 12]
