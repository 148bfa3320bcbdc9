"""Finds where guest RAM begins in a host address space, by the page tables of the Linux kernel inside.

The kernel's static tables lie side by side in its image: the page of ``level3_kernel_pgt`` (all zero but its last two
entries) and behind it ``level2_kernel_pgt``, which entry 510 of the former names by *guest-physical* address. So the
host address of the one and the content of the other give the distance between the two address spaces.
Sources: arch/x86/kernel/head_64.S (level3_kernel_pgt, level2_kernel_pgt, startup_64),
arch/x86/include/asm/pgtable_types.h (_KERNPG_TABLE), arch/x86/boot/compressed/kaslr.c (2 MiB alignment).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from appliance.memory.process import ProcessMemory

PAGE = 4096
SLOT = 2 << 20  # CONFIG_PHYSICAL_ALIGN
IMAGE_SPAN = 64 << 20  # how far behind the first byte of the image its page tables are looked for
TABLE_PAGE = 0x000F_FFFF_FFFF_F000
_KERNPG = 0x063  # present, writable, accessed, dirty
# The image begins with startup_64 ([mov %rsi,%r15;] lea ...(%rip),%rsp) or, lately, with padding before a function.
_STARTUP = re.compile(rb"(?:\x49\x89\xf7)?\x48\x8d\x25|\x90{16}[^\x90]|\xcc{16}[^\xcc]|\xf3\x0f\x1e\xfa")
_STARTUP_SIZE = 24
_KERNPG_BYTE = re.compile(rb"[\x63\x67]")
_BATCH = 4096


def find_tables(memory: ProcessMemory, start: int, end: int, *, quick: bool = False) -> Iterator[tuple[int, int]]:
    """Yield pairs of a host address in [start, end) and the guest-physical address that kernel tables give to it.

    First behind every 2 MiB (counted from ``start``) that look like the start of a kernel, then (unless ``quick``)
    everywhere. Bounded by the range; 0.2 s per GiB for the second pass.
    """
    slots = range(start, end - _STARTUP_SIZE, SLOT)
    for slot, head in zip(slots, memory.read_scattered(slots, _STARTUP_SIZE), strict=True):
        if head and _STARTUP.match(head):
            yield from _scan(memory, slot, min(slot + IMAGE_SPAN, end))
    if not quick:
        yield from _scan(memory, start, end)


def _scan(memory: ProcessMemory, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Look at the last two entries of every page: flags 0x063 or 0x067 in both, table addresses below 2^46."""
    for batch in range(start, end, _BATCH * PAGE):
        tails = range(batch + PAGE - 16, min(batch + _BATCH * PAGE, end) - 15, PAGE)
        found = memory.read_scattered(tails, 16)
        data = b"".join([tail or bytes(16) for tail in found])
        for hit in _KERNPG_BYTE.finditer(data[0::16]):
            tail = data[16 * hit.start() : 16 * hit.start() + 16]
            if tail[8] & 0xFB == _KERNPG and not (tail[1] & 15 or tail[9] & 15 or tail[6] or tail[7]):
                yield from _pair(memory, tails[hit.start()] + 16 - PAGE, tail)


def _pair(memory: ProcessMemory, page: int, tail: bytes) -> Iterator[tuple[int, int]]:
    level2_gpa = struct.unpack("<Q", tail[:8])[0] & TABLE_PAGE
    level3, level2 = memory.read_scattered((page, page + PAGE), PAGE)
    if level3 and level2 and not any(level3[:-16]) and level2_gpa >= PAGE and _looks_like_image(level2):
        yield page + PAGE, level2_gpa


def _looks_like_image(level2: bytes) -> bool:
    """The kernel image: one run of present entries, the large ones 2 MiB apart in guest-physical memory."""
    entries = struct.unpack("<512Q", level2)
    large = [(index, entry & TABLE_PAGE & -SLOT) for index, entry in enumerate(entries) if entry & 0x81 == 0x81]
    starts = {gpa - index * SLOT for index, gpa in large}
    return bool(large) and len(starts) == 1
