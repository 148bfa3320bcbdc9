"""The second half of a 32-bit process on a 64-bit Windows: a PEB, a loader and its lists as a 32-bit Windows has them.

Source of the offsets, which no symbol table of a 64-bit kernel tells: volatility3 symbols/windows/wow64.json (_PEB32,
_PEB_LDR_DATA, _LDR_DATA_TABLE_ENTRY); what such a process loads: Windows Internals 7, part 1, "Wow64".
"""

from __future__ import annotations

import struct

from tests.worlds.windows.boot import Kernel
from tests.worlds.windows.memory import Memory

NTDLL32, KERNEL32 = "C:\\Windows\\SysWOW64\\ntdll.dll", "C:\\Windows\\SysWOW64\\kernel32.dll"
NTDLL32_VA, KERNEL32_VA, DLL_VA = 0x77B0_0000, 0x7620_0000, 0x7400_0000
PROGRAM_VA, PEB32_VA = 0x0040_0000, 0x00F0_0000
EMULATION = ("wow64.dll", "wow64win.dll", "wow64cpu.dll")  # 64-bit, in every such process
_LISTS = (0xC, 0x14, 0x1C)  # heads in _PEB_LDR_DATA: by load, by memory, by initialization
_LDR_AT, _ENTRIES_AT, _TEXT_AT, _PARAMS_AT = 0x800, 0x1000, 0x2000, 0x900
_STRIDE = 0x100


class Second:
    """PEB and loader of one 32-bit process, in a region of their own."""

    def __init__(self, kernel: Kernel, memory: Memory, base: int, path: str, command: str) -> None:
        self.kernel, self.memory = kernel, memory
        self.peb = memory.region(PEB32_VA, 0x4000, "RW").start
        self._texts, self._entries = self.peb + _TEXT_AT, self.peb + _ENTRIES_AT
        ldr, params = self.peb + _LDR_AT, self.peb + _PARAMS_AT
        space = memory.space
        space.write(self.peb + 8, struct.pack("<III", base, ldr, params))
        space.write(params + 0x38, self._text(path) + self._text(command))
        space.write(ldr, struct.pack("<IB", 0x30, 1))
        for at in _LISTS:
            space.write(ldr + at, struct.pack("<II", ldr + at, ldr + at))
        wow64 = kernel.nonpaged.take(b"Wow6", kernel.types.pack("_EWOW64PROCESS", {"Peb": self.peb}))
        kernel.set(memory.eprocess, "_EPROCESS.WoW64Process", wow64)

    def load(self, path: str, base: int, size: int, *, lists: int = 3) -> int:
        """Put a module on the first of the lists; the address of its entry."""
        space, entry = self.memory.space, self._entries
        self._entries += _STRIDE
        names = self._text(path) + self._text(path.rsplit("\\", 1)[-1])
        space.write(entry + 0x18, struct.pack("<III", base, base + 0x1000, size) + names)
        space.write(entry + 0x34, struct.pack("<IH", 0x22CC, 0xFFFF))
        for number, at in enumerate(_LISTS):
            head, link = self.peb + _LDR_AT + at, entry + 8 * number
            space.write(link, struct.pack("<II", link, link))
            if number < lists:
                last = int.from_bytes(space.read(head + 4, 4), "little")
                space.write(link, struct.pack("<II", head, last))
                space.write(last, struct.pack("<I", link))
                space.write(head + 4, struct.pack("<I", link))
        return entry

    def _text(self, words: str) -> bytes:
        """A UNICODE_STRING of 32 bits."""
        data, at = words.encode("utf-16-le"), self._texts
        self.memory.space.write(at, data + b"\0\0")
        self._texts += len(data) + 2
        return struct.pack("<HHI", len(data), len(data) + 2, at)
