"""Finds where guest RAM begins in a host address space, by the page tables of the kernel inside.

Linux: the kernel's static tables lie side by side in its image: the page of ``level3_kernel_pgt`` (all zero but its
last two entries) and behind it ``level2_kernel_pgt``, which entry 510 of the former names by *guest-physical* address.
So the host address of the one and the content of the other give the distance between the two address spaces.

Windows x64: the code that starts further processors lies in the first MiB and names the guest-physical address of the
kernel's PML4, one entry of which names that same page. Both together hold for one beginning of RAM only.
Sources: arch/x86/kernel/head_64.S (level3_kernel_pgt, level2_kernel_pgt, startup_64),
arch/x86/include/asm/pgtable_types.h (_KERNPG_TABLE), arch/x86/boot/compressed/kaslr.c (2 MiB alignment);
PROCESSOR_START_BLOCK of the Windows boot loader (Jmp, CompletionFlag, LmTarget +70h, ProcessorState Cr3 +A0h), as
Ulf Frisk (MemProcFS) and Alex Ionescu (Getting Physical with the low stub, REcon 2017) describe it.
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
LOW_MEMORY = 0xA0000
MAX_STARTS = 512  # borders of 2 MiB at which a block of RAM may begin within one run of mappings
_STUB, _STUB_MASK = 0x00000001_000600E9, 0xFFFFFFFF_FFFF00FF  # a near jump, and CompletionFlag


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


def find_windows(memory: ProcessMemory, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of a host address in [start, end) and its guest-physical address, of PML4 tables named by low stubs.

    RAM of ``size`` bytes is taken to begin on one of the first `MAX_STARTS` borders of 2 MiB, counted from ``start``.
    """
    for base in range(start, min(end - size + 1, start + MAX_STARTS * SLOT), SLOT):
        stubs = range(base + PAGE, base + LOW_MEMORY, PAGE)
        for head in memory.read_scattered(stubs, 0xA8):
            if head is None or int.from_bytes(head[:8], "little") & _STUB_MASK != _STUB:
                continue
            target, cr3 = struct.unpack_from("<Q", head, 0x70)[0], struct.unpack_from("<Q", head, 0xA0)[0]
            if target >> 47 != 0x1FFFF or cr3 & ~TABLE_PAGE & ~0xFFF or not cr3 or cr3 >= size:
                continue
            table = memory.read_scattered((base + (cr3 & TABLE_PAGE),), PAGE)[0]
            entries = struct.unpack("<512Q", table)[256:] if table else ()
            if any(entry & 1 and entry & TABLE_PAGE == cr3 & TABLE_PAGE for entry in entries):
                yield base + (cr3 & TABLE_PAGE), cr3 & TABLE_PAGE
                break


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
