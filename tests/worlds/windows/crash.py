"""Writes crash dumps as Windows does: complete ones by runs or by a bitmap, kernel ones, for x64 and x86."""

from __future__ import annotations

import struct
from collections.abc import Sequence

PAGE = 4096
FULL, KERNEL, MINI, BITMAP = 1, 2, 4, 5
HEADER = 0x2000


def header64(
    dtb: int,
    kdbg: int,
    kind: int,
    runs: Sequence[tuple[int, int]],
    *,
    modules: int = 0,
    processes: int = 0,
) -> bytes:
    """_DUMP_HEADER64; ``runs`` in pages."""
    data = bytearray(b"PAGE" * (HEADER // 4))  # what is not filled holds that word
    data[:8] = b"PAGEDU64"
    struct.pack_into("<IIQQQQII", data, 8, 0xF, 20348, dtb, 0, modules, processes, 0x8664, 1)
    struct.pack_into("<Q", data, 0x80, kdbg)
    struct.pack_into("<IIQ", data, 0x88, len(runs), 0, sum(count for _, count in runs))
    for number, run in enumerate(runs):
        struct.pack_into("<QQ", data, 0x98 + 16 * number, *run)
    struct.pack_into("<Q", data, 0x348 + 0xF8, 0xFFFFF80312345678)
    struct.pack_into("<I", data, 0xF98, kind)
    return bytes(data)


def header32(dtb: int, kdbg: int, kind: int, runs: Sequence[tuple[int, int]], *, pae: bool) -> bytes:
    """_DUMP_HEADER."""
    data = bytearray(b"PAGE" * (HEADER // 8))
    data[:8] = b"PAGEDUMP"
    struct.pack_into("<IIIIIIII", data, 8, 0xF, 2600, dtb, 0, 0, 0, 0x14C, 1)
    data[0x5C] = pae
    struct.pack_into("<I", data, 0x60, kdbg)
    struct.pack_into("<II", data, 0x64, len(runs), sum(count for _, count in runs))
    for number, run in enumerate(runs):
        struct.pack_into("<II", data, 0x6C + 8 * number, *run)
    struct.pack_into("<I", data, 0x320 + 0xB8, 0x80512345)
    struct.pack_into("<I", data, 0xF88, kind)
    return bytes(data)


def by_runs(ram: bytes, head: bytes, runs: Sequence[tuple[int, int]]) -> bytes:
    """A complete dump: the runs one behind the other."""
    return head + b"".join(ram[first * PAGE : (first + count) * PAGE] for first, count in runs)


def by_bitmap(ram: bytes, head: bytes, *, signature: bytes = b"FDMP", keep_zeros: bool = False) -> bytes:
    """A dump of the pages that hold something."""
    count, zeros = len(ram) // PAGE, bytes(PAGE)
    pages = [number for number in range(count) if keep_zeros or ram[number * PAGE : (number + 1) * PAGE] != zeros]
    bitmap = bytearray(-(-count // 8))
    for number in pages:
        bitmap[number // 8] |= 1 << number % 8
    first = -(-(len(head) + 0x38 + len(bitmap)) // PAGE) * PAGE
    before = signature + b"DUMP" + bytes(24) + struct.pack("<QQQ", first, len(pages), count) + bitmap
    body = b"".join(ram[number * PAGE : (number + 1) * PAGE] for number in pages)
    return (head + before).ljust(first, b"\0") + body
