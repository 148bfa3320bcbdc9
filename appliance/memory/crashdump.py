"""Crash dumps of Windows: where in the file each run of RAM lies, and the registers that are told.

Complete dumps (runs of pages, or one bit for each page) hold all of RAM, kernel dumps ("SDMP") what the kernel used.
Both have a root of page tables and an address in the kernel's image in their header. Small ("mini") dumps hold none.
Sources: symbols _DUMP_HEADER, _DUMP_HEADER64, _PHYSICAL_MEMORY_DESCRIPTOR of the Windows Driver Kit's debugger headers;
the header before a bitmap (HeaderSize 20h, Pages 28h, bits 30h, bitmap 38h) as volatility3 and rekall describe it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from appliance.errors import ConfigError
from appliance.model import VcpuState

PAGE = 4096
MAX_RUNS = 1 << 20
MAX_BITS = 1 << 34  # 64 TiB of RAM
SIGNATURES = (b"PAGEDUMP", b"PAGEDU64")
_FULL, _KERNEL, _BITMAP_FULL, _BITMAP_KERNEL = 1, 2, 5, 6  # DumpType
_MINI = 4
_BITMAPS = (b"SDMPDUMP", b"FDMPDUMP")
_FIRST_AT, _PAGES_AT, _BITS_AT, _BITMAP_AT = 0x20, 0x28, 0x30, 0x38
_BYTES = re.compile(rb"\xff+|\x00+|[^\xff\x00]", re.DOTALL)
_CR0 = 0x8001_0033  # paging and protection: no dump tells its CR0
_PAE = 0x20


class _Layout(NamedTuple):
    """Where the header keeps what we need."""

    header: int  # bytes before the pages, or before the bitmap's header
    pointer: str  # of struct
    dtb: int
    debugger: int  # KdDebuggerDataBlock
    runs: int  # NumberOfRuns
    first_run: int
    dump_type: int
    rip: int  # in the context of the processor that crashed (CONTEXT.Eip B8h, .Rip F8h)


_LAYOUTS = {
    b"PAGEDUMP": _Layout(0x1000, "I", 0x10, 0x60, 0x64, 0x6C, 0xF88, 0x320 + 0xB8),
    b"PAGEDU64": _Layout(0x2000, "Q", 0x10, 0x80, 0x88, 0x98, 0xF98, 0x348 + 0xF8),
}
_PAE_ENABLED = 0x5C  # of PAGEDUMP


class Bytes(Protocol):
    """A mapped file."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> bytes: ...


class CrashDump(NamedTuple):
    """What a crash dump holds; a run is ``(gpa, end, offset in the file)``."""

    runs: list[tuple[int, int, int]]
    cpu: VcpuState
    kernel_va: int  # an address in the kernel's image, 0: not told


def parse_crash_dump(data: Bytes) -> CrashDump:
    """Parse a file that begins with one of `SIGNATURES`. Raises ConfigError."""
    layout = _LAYOUTS[data[:8]]
    head = data[: layout.header]
    if len(head) < layout.header:
        raise ConfigError(f"ends inside its header: {len(head)} bytes in all; take the dump again")

    def number(at: int, kind: str = layout.pointer) -> int:
        return int(struct.unpack_from("<" + kind, head, at)[0])

    kind = number(layout.dump_type, "I")
    if kind == _FULL:
        runs = list(_runs(head, layout))
    elif kind in (_KERNEL, _BITMAP_FULL, _BITMAP_KERNEL):
        runs = list(_present(data, layout.header))
    elif kind == _MINI:
        raise ConfigError("is a small memory dump, which holds no page tables; configure a complete memory dump")
    else:
        raise ConfigError(f"is a Windows crash dump of the unknown type {kind}; configure a complete memory dump")
    is_pae = layout.pointer == "Q" or head[_PAE_ENABLED] == 1
    cpu = VcpuState(_CR0, number(layout.dtb), _PAE if is_pae else 0, rip=number(layout.rip))
    return CrashDump(runs, cpu, number(layout.debugger))


def _runs(head: bytes, layout: _Layout) -> Iterator[tuple[int, int, int]]:
    """Runs of pages, one behind the other in the file."""
    count = struct.unpack_from("<I", head, layout.runs)[0]
    size = 2 * struct.calcsize(layout.pointer)
    if layout.first_run + count * size > len(head):
        raise ConfigError(f"names {count} runs of memory, more than its header holds; take the dump again")
    offset = layout.header
    for number in range(count):
        first, pages = struct.unpack_from("<2" + layout.pointer, head, layout.first_run + number * size)
        if not pages or first + pages > MAX_BITS:
            raise ConfigError(f"has an impossible run of memory at page {first:#x}; take the dump again")
        yield first * PAGE, (first + pages) * PAGE, offset
        offset += pages * PAGE


def _present(data: Bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Runs of pages whose bit is set. The bits must be as many as the header says, else its form is another."""
    head = data[at : at + _BITMAP_AT]
    if len(head) < _BITMAP_AT or head[:8] not in _BITMAPS:
        raise ConfigError("is a Windows crash dump without the table of its pages; configure a complete memory dump")
    offset, pages, bits = struct.unpack_from("<QQQ", head, _FIRST_AT)
    bitmap = data[at + _BITMAP_AT : at + _BITMAP_AT + -(-min(bits, MAX_BITS) // 8)]
    if not 0 < bits <= MAX_BITS or int.from_bytes(bitmap, "little").bit_count() != pages or offset % PAGE:
        raise ConfigError(
            "is a Windows crash dump whose table of pages is damaged or of an older form; "
            "configure a complete memory dump"
        )
    start = end = 0  # pages of the run that grows
    for number, (first, last) in enumerate(_bits(bitmap)):
        if number > MAX_RUNS:
            raise ConfigError(f"has more than {MAX_RUNS} runs of memory; configure a complete memory dump")
        if first == end:
            end = last
            continue
        if start < end:
            yield start * PAGE, end * PAGE, offset
            offset += (end - start) * PAGE
        start, end = first, last
    if start < end:
        yield start * PAGE, end * PAGE, offset


def _bits(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Runs of set bits ``[first, last)``, in order; neighbours may touch."""
    for found in _BYTES.finditer(bitmap):
        first, byte = 8 * found.start(), bitmap[found.start()]
        if byte == 0xFF:
            yield first, 8 * found.end()
        elif byte:
            yield from ((first + bit, first + bit + 1) for bit in range(8) if byte >> bit & 1)
