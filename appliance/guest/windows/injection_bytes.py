"""What bytes of a process are: a PE image, even with its header wiped; shellcode; a jump that was put over code.

Nothing here reads memory. Sources: Microsoft's PE format specification (signature, COFF and optional header, sections),
Intel SDM vol. 2 (the encodings), symbols _TEB.ProcessEnvironmentBlock and _PEB of ntkrnlmp.pdb (60h and 30h).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

PAGE: Final = 4096
MACHINES: Final = (0x14C, 0x8664, 0xAA64, 0x1C4)  # IMAGE_FILE_MACHINE_I386, AMD64, ARM64, ARMNT
MAX_SECTIONS: Final = 96  # the loader's own limit
MAX_HEADER: Final = 0x800
EXECUTE, WRITE = 0x2000_0000, 0x8000_0000  # IMAGE_SCN_MEM_*

_COFF = Struct("<HHIIIHH")
_SECTION = Struct("<8sIIIIIIHHI")
_STUB: Final = re.compile(rb"This program (cannot|must) be run")
_SECTION_NAME: Final = re.compile(rb"\.(text|rdata|pdata|rsrc|reloc|idata)\0")
_BLANK_START: Final = re.compile(rb"\0{64}")
_PROLOGUE: Final = re.compile(  # of functions of x64 and x86 compilers
    rb"\x48\x89\x5c\x24|\x40\x53\x48\x83\xec|\x48\x83\xec[\x20-\x78]|\x55\x8b\xec|\x48\x8b\xc4|\x4c\x8b\xdc|\xcc\xcc\xcc\xcc"
)

_PEB: Final = "it looks for the PEB by itself"
# What shellcode does and compilers' or JITs' code does not
SHELLCODE: Final = (
    (
        re.compile(rb"\x65[\x48\x4c]\x8b([\x04\x0c\x14\x1c\x24\x2c\x34\x3c]\x25\x60\0\0\0|[\x40-\x7f]\x60)"),
        _PEB,
    ),  # gs:[60h]
    (
        re.compile(rb"\x64(\xa1|\x8b[\x05\x0d\x15\x1d\x25\x2d\x35\x3d])\x30\0\0\0|\x64\x8b[\x40-\x7f]\x30"),
        _PEB,
    ),  # fs:[30h]
    (re.compile(rb"\xfc\x48\x83\xe4\xf0\xe8|\xfc\xe8[\x80-\x90]\0\0\0\x60"), "it begins as Metasploit's payloads do"),
    (re.compile(rb"\xe8\0\0\0\0(\x41)?[\x58-\x5f]|\xd9\x74\x24\xf4[\x58-\x5f]"), "it looks for its own address"),
    (re.compile(rb"\x4c\x8b\xd1\xb8..\0\0.{0,12}\x0f\x05\xc3", re.DOTALL), "it calls the kernel past ntdll"),
)
# Chromium's sandbox keeps copies of the calls it has put detours over (sandbox/win/src/service_resolver_64.cc)
SANDBOXES: Final = SHELLCODE[-1:]


class Section(NamedTuple):
    """A section of an image; addresses are relative to the image."""

    name: str
    start: int
    end: int
    executable: bool
    writable: bool


class Header(NamedTuple):
    """What the header of an image in memory says."""

    machine: int
    stamp: int
    entry: int
    base: int  # ImageBase; the kernel writes the place it chose into it
    size: int  # SizeOfImage
    sections: tuple[Section, ...]
    imports: tuple[tuple[int, int], ...]  # [start, end) of the import address table and of the import directory
    size_of_headers: int

    @property
    def bits(self) -> int:
        """32 or 64."""
        return 64 if self.machine in (0x8664, 0xAA64) else 32


def parse_header(raw: bytes) -> Header | None:
    """The header of a PE image from its first page; None where there is no whole one."""
    if raw[:2] != b"MZ" or len(raw) < 0x40:
        return None
    return _parse_nt(raw, int.from_bytes(raw[0x3C:0x40], "little"))


def _parse_nt(raw: bytes, at: int) -> Header | None:
    if not 0 < at <= len(raw) - 0x78 or raw[at : at + 4] != b"PE\0\0":
        return None
    machine, count, stamp, _, _, optional, _ = _COFF.unpack_from(raw, at + 4)
    start = at + 24
    magic = int.from_bytes(raw[start : start + 2], "little")
    if machine not in MACHINES or magic not in (0x10B, 0x20B) or count > MAX_SECTIONS:
        return None
    wide = magic == 0x20B
    base = int.from_bytes(raw[start + 24 : start + 32] if wide else raw[start + 28 : start + 32], "little")
    entry, size = _u32(raw, start + 16), _u32(raw, start + 56)
    directories = start + (112 if wide else 96)
    imports = tuple(
        (rva, rva + length)
        for rva, length in ((_u32(raw, directories + 8 * n), _u32(raw, directories + 8 * n + 4)) for n in (12, 1))
        if rva and length
    )
    sections = tuple(_sections(raw, start + optional, count))
    return Header(machine, stamp, entry, base, size, sections, imports, _u32(raw, start + 60))


def _sections(raw: bytes, at: int, count: int) -> Iterator[Section]:
    for number in range(count):
        if at + 40 * number + 40 > len(raw):
            return
        name, size, start, stored, _, _, _, _, _, flags = _SECTION.unpack_from(raw, at + 40 * number)
        text = name.split(b"\0", 1)[0].decode("ascii", "replace")
        yield Section(text, start, start + max(size, stored), bool(flags & EXECUTE), bool(flags & WRITE))


def find_image(raw: bytes) -> str | None:
    """How the beginning of a page tells that an image lies there: ``MZ``, or what is left of a wiped header."""
    head = raw[:MAX_HEADER]
    if head[:2] == b"MZ" and head[int.from_bytes(head[0x3C:0x40], "little") :][:4] == b"PE\0\0":
        return "an image"
    at = head.find(b"PE\0\0")
    if at >= 0 and _parse_nt(raw, at) is not None:
        return "an image without its MZ"
    if _STUB.search(head):
        return "the DOS stub of an image"
    if len(set(_SECTION_NAME.findall(head))) >= 2:
        return "the section table of an image whose header was wiped"
    return None


def looks_wiped(first: bytes | None, second: bytes | None) -> bool:
    """Whether a blank first page is followed by compiled code, as of an image whose whole header was wiped."""
    if second is None or (first is not None and first.strip(b"\0")):
        return False
    return len(set(_PROLOGUE.findall(second))) >= 2 and _BLANK_START.match(second) is None


def find_shellcode(raw: bytes, *, sandbox: bool = False) -> tuple[int, str] | None:
    """Where shellcode shows itself, and by what; ``sandbox``: not by what a browser's sandbox does as well."""
    signs = [sign for sign in SHELLCODE if not (sandbox and sign in SANDBOXES)]
    hits = ((found.start(), what) for pattern, what in signs if (found := pattern.search(raw)) is not None)
    return min(hits, default=None)


class Jump(NamedTuple):
    """Where a jump goes. ``indirect``: the address is stored at ``target``."""

    target: int
    indirect: bool = False


def decode_jump(code: bytes, va: int, bits: int) -> Jump | None:
    """The unconditional jump or call that ``code`` at ``va`` begins with, in one of the forms hooks are made of."""
    mask = (1 << bits) - 1
    if code[:1] in (b"\xe9", b"\xe8") and len(code) >= 5:
        return Jump(va + 5 + _i32(code, 1) & mask)
    if code[:1] == b"\xeb" and len(code) >= 2:
        return Jump(va + 2 + int.from_bytes(code[1:2], "little", signed=True) & mask)
    if code[:2] == b"\xff\x25" and len(code) >= 6:
        return Jump((va + 6 + _i32(code, 2) if bits == 64 else _u32(code, 2)) & mask, indirect=True)
    if code[:1] == b"\x48" and code[1:3] == b"\xff\x25" and len(code) >= 7:
        return Jump(va + 7 + _i32(code, 3) & mask, indirect=True)
    if bits == 64:
        return _decode_long(code)
    if code[:1] == b"\x68" and code[5:6] == b"\xc3":  # push imm32; ret
        return Jump(_u32(code, 1))
    if code[:1] == b"\xb8" and code[5:7] == b"\xff\xe0":  # mov eax, imm32; jmp eax
        return Jump(_u32(code, 1))
    return None


def _decode_long(code: bytes) -> Jump | None:
    target = int.from_bytes(code[2:10], "little")
    if code[:2] == b"\x48\xb8" and code[10:12] in (b"\xff\xe0", b"\x50\xc3", b"\xff\xd0"):
        return Jump(target)
    if code[:3] == b"\x50\x48\xb8" and code[11:16] == b"\x48\x87\x04\x24\xc3":  # push; mov; xchg; ret: Chromium's
        return Jump(int.from_bytes(code[3:11], "little"))
    if code[:2] in (b"\x49\xba", b"\x49\xbb") and code[10:13] in (b"\x41\xff\xe2", b"\x41\xff\xe3"):
        return Jump(target)
    if code[:1] == b"\x68" and code[5:9] == b"\xc7\x44\x24\x04" and code[13:14] == b"\xc3":
        return Jump(_u32(code, 9) << 32 | _u32(code, 1))
    if code[:1] == b"\x68" and code[5:6] == b"\xc3":
        return Jump(_u32(code, 1))
    return None


def runs_of(differing: Sequence[int], gap: int = 8) -> list[tuple[int, int]]:
    """Differing positions as ``[start, end)`` runs; what lies closer than ``gap`` belongs together."""
    runs: list[tuple[int, int]] = []
    for at in differing:
        if runs and at - runs[-1][1] < gap:
            runs[-1] = runs[-1][0], at + 1
        else:
            runs.append((at, at + 1))
    return runs


def is_relocated(before: bytes, after: bytes, differing: Sequence[int], delta: int) -> bool:
    """Whether all differences are addresses that were moved by ``delta`` (signed), as the loader's fix-ups do.

    The relocations of an image that did not get its place: 32-bit, or 64-bit, in which the lower half moves too.
    """
    if not delta:
        return False
    covered = -1
    for at in differing:
        if at < covered:
            continue
        for start in range(at, max(at - 4, -1), -1):
            if start < covered or start + 4 > len(before):
                continue
            if (_u32(after, start) - _u32(before, start) - delta) & 0xFFFF_FFFF == 0:
                covered = start + (8 if _wide_move(before, after, start, delta) else 4)
                break
        else:
            return False
    return True


def _wide_move(before: bytes, after: bytes, at: int, delta: int) -> bool:
    old, new = int.from_bytes(before[at : at + 8], "little"), int.from_bytes(after[at : at + 8], "little")
    return at + 8 <= len(before) and (new - old - delta) & (1 << 64) - 1 == 0


def _u32(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")


def _i32(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little", signed=True)


def is_call(before: bytes) -> bool:
    """Whether the seven bytes before a return address end in a call: E8 rel32, or a form of FF /2."""
    if before[-5] == 0xE8:
        return True
    return any(before[-n] == 0xFF and before[1 - n] >> 3 & 7 == 2 for n in (2, 3, 4, 6, 7))
