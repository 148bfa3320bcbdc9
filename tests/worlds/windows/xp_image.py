"""Images of a Windows XP or Server 2003 made of bytes: the kernel, drivers, programs and DLLs, as far as headers go."""

from __future__ import annotations

import struct

from tests.worlds.windows import pe
from tests.worlds.windows.paging import PAGE


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
    record = pe.rsds(debug)
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
