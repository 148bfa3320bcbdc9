"""Images as the loader lays them out in memory: headers, sections, exports, the debug record, the version.

Source: Microsoft's "PE Format" (docs), the RSDS record (CV_INFO_PDB70), VS_VERSIONINFO.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

PAGE = 4096
CODE, DATA, READONLY = 0x60000020, 0xC0000040, 0x40000040


class Section(NamedTuple):
    name: str
    rva: int
    size: int
    flags: int


class Debug(NamedTuple):
    """What the RSDS record says."""

    pdb: str
    guid: str  # 32 hex digits, as symbol servers write it
    age: int


def build(
    size: int,
    sections: Sequence[Section],
    *,
    debug: Debug | None = None,
    exports: dict[str, int] | None = None,
    version: tuple[int, int, int, int] | None = None,
    name: str = "",
    dll: bool = True,
    stamp: int = 0x5F5E1000,
    base: int = 0x140000000,
    entry: int = 0x1000,
    tables: int = 0x2000,
    wide: bool = True,
) -> dict[int, bytes]:
    """Pieces of an image, by RVA. What it describes lies from ``tables`` on: debug, exports, version, a page each."""
    directories = [(0, 0)] * 16
    pieces: dict[int, bytes] = {}
    if debug is not None:
        record = rsds(debug)
        entry_bytes = struct.pack("<IIHHIIII", 0, stamp, 0, 0, 2, len(record), tables + 0x40, tables + 0x40)
        pieces[tables] = entry_bytes.ljust(0x40, b"\0") + record
        directories[6] = (tables, len(entry_bytes))
    if exports:
        pieces[tables + PAGE] = _exports(name, exports, tables + PAGE)
        directories[0] = (tables + PAGE, len(pieces[tables + PAGE]))
    if version is not None:
        pieces[tables + 2 * PAGE] = _resources(version, tables + 2 * PAGE, name)
        directories[2] = (tables + 2 * PAGE, len(pieces[tables + 2 * PAGE]))
    pieces[0] = _headers(size, sections, directories, dll=dll, stamp=stamp, base=base, entry=entry, wide=wide)
    return pieces


def _headers(
    size: int,
    sections: Sequence[Section],
    directories: Sequence[tuple[int, int]],
    *,
    dll: bool,
    stamp: int,
    base: int,
    entry: int,
    wide: bool,
) -> bytes:
    dos = bytearray(0x80)
    dos[0:2] = b"MZ"
    dos[0x3C:0x40] = struct.pack("<I", 0x80)
    dos[0x40:0x78] = (
        b"\x0e\x1f\xba\x0e\0\xb4\x09\xcd\x21\xb8\x01\x4c\xcd\x21This program cannot be run in DOS mode".ljust(0x38)[
            :0x38
        ]
    )
    machine, size_of_optional, flags = (0x8664, 0xF0, 0x22) if wide else (0x14C, 0xE0, 0x102)
    flags |= 0x2000 if dll else 0
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", machine, len(sections), stamp, 0, 0, size_of_optional, flags)
    code = (0x20B if wide else 0x10B, 14, 20, 0x1000, 0x1000, 0, entry, 0x1000)
    where = (base,) if wide else (0x2000, base & 0xFFFF_FFFF)
    versions = (10, 0, 10, 0, 10, 0, 0)
    stacks = (0x40000, 0x1000, 0x100000, 0x1000)
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII" if wide else "<HBBIIIIIIIIIHHHHHHIIIIHHIIIIII",
        *code, *where, 0x1000, 0x200, *versions, size, 0x400, 0, 1 if dll else 3, 0x4160, *stacks, 0, 16,
    )  # fmt: skip
    optional += b"".join(struct.pack("<II", *directory) for directory in directories)
    table = b"".join(
        struct.pack(
            "<8sIIIIIIHHI", part.name.encode(), part.size, part.rva, part.size, part.rva, 0, 0, 0, 0, part.flags
        )
        for part in sections
    )
    return bytes(dos) + coff + optional + table


def rsds(debug: Debug) -> bytes:
    guid = bytes.fromhex(debug.guid)
    mixed = guid[3::-1] + guid[5:3:-1] + guid[7:5:-1] + guid[8:]
    return b"RSDS" + mixed + struct.pack("<I", debug.age) + debug.pdb.encode() + b"\0"


def _exports(name: str, exports: dict[str, int], rva: int) -> bytes:
    names = sorted(exports)
    count = len(names)
    functions, pointers, ordinals = 40, 40 + 4 * count, 40 + 8 * count
    text = ordinals + 2 * count
    strings = name.encode() + b"\0"
    offsets = []
    for export in names:
        offsets.append(rva + text + len(strings))
        strings += export.encode() + b"\0"
    head = struct.pack(
        "<IIHHIIIIIII", 0, 0, 0, 0, rva + text, 1, count, count, rva + functions, rva + pointers, rva + ordinals
    )
    return (
        head
        + b"".join(struct.pack("<I", exports[export]) for export in names)
        + b"".join(struct.pack("<I", offset) for offset in offsets)
        + b"".join(struct.pack("<H", number) for number in range(count))
        + strings
    )


def _resources(version: tuple[int, int, int, int], rva: int, name: str) -> bytes:
    """One resource: RT_VERSION, 1, language 0x409."""
    info = _version(version, name)
    tree = b""
    for key, following in ((16, 0x18 | 1 << 31), (1, 0x30 | 1 << 31), (0x409, 0x48)):
        tree += struct.pack("<IIHHHHII", 0, 0, 0, 0, 0, 1, key, following)
    return tree + struct.pack("<IIII", rva + 0x58, len(info), 0, 0) + info


def _version(version: tuple[int, int, int, int], name: str) -> bytes:
    major, minor, build, revision = version
    high, low = major << 16 | minor, build << 16 | revision
    fixed = struct.pack("<IIIIIIIIIIIII", 0xFEEF04BD, 0x10000, high, low, high, low, 0x3F, 0, 0x40004, 3, 7, 0, 0)
    text = f"{major}.{minor}.{build}.{revision} (WinBuild.160101.0800)"
    strings = b"".join(
        _block(key, (value + "\0").encode("utf-16-le"), text=True)
        for key, value in (("FileVersion", text), ("InternalName", name), ("OriginalFilename", name))
    )
    table = _block("040904B0", b"", children=strings, text=True)
    children = _block("StringFileInfo", b"", children=table, text=True)
    return _block("VS_VERSION_INFO", fixed, children=children)


def _block(key: str, value: bytes, *, children: bytes = b"", text: bool = False) -> bytes:
    head = (key + "\0").encode("utf-16-le")
    head += b"\0" * (-(6 + len(head)) % 4)
    body = head + value + b"\0" * (-len(value) % 4) + children
    length = 6 + len(head) + len(value) if not children else 6 + len(body)
    data = struct.pack("<HHH", length, len(value) // 2 if text else len(value), int(text)) + body
    return data + b"\0" * (-len(data) % 4)
