"""Finds the Linux kernel image in guest-physical memory by its own page tables: with a CR3, or with nothing at all.

Without a CR3 the page of ``level3_kernel_pgt`` is looked for: all zero but its last two entries, the first of which
names ``level2_kernel_pgt``, whose one run of entries maps the image 2 MiB by 2 MiB. First behind every 2 MiB boundary
that looks like the beginning of a kernel, then everywhere. A find is a candidate until the symbol table proves it.
Sources: arch/x86/kernel/head_64.S (startup_64, level3_kernel_pgt, level2_kernel_pgt), arch/x86/kernel/head64.c
(__startup_64), arch/x86/mm/init_64.c (cleanup_highmap, mark_rodata_ro), arch/x86/boot/compressed/kaslr.c,
arch/x86/include/asm/pgtable_types.h (_KERNPG_TABLE), arch/x86/mm/pti.c (the user half of a PGD pair has bit 12 set).
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import NamedTuple

from appliance.guest.kernel import Image
from appliance.guest.paging import ADDRESS, LARGE, NX, PAGE, PRESENT, WRITABLE
from appliance.model import Region
from appliance.ports import GuestMemory

SLOT = 2 << 20
IMAGE_BASE = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map
IMAGE_SPAN = 64 << 20  # how far behind its first byte the image's page tables are looked for
MAX_IMAGE = 256 << 20
MAX_RODATA = 96 << 20
MAX_CANDIDATES = 8
_KERNPG = 0x063
# The image begins with startup_64 ([mov %rsi,%r15;] lea ...(%rip),%rsp) or, lately, with padding before a function.
_STARTUP = re.compile(rb"(?:\x49\x89\xf7)?\x48\x8d\x25|\x90{16}[^\x90]|\xcc{16}[^\xcc]|\xf3\x0f\x1e\xfa")
_STARTUP_SIZE = 24
_KERNPG_BYTE = re.compile(rb"[\x63\x67]")
_BATCH = 4096
_PTI_USER = 1 << 12


class Found(NamedTuple):
    """A candidate: the image, and its read-only data (the whole image where rights tell nothing)."""

    image: Image
    rodata: Image
    level3_gpa: int


def find_images(memory: GuestMemory, cr3: int | None) -> Iterator[list[Found]]:
    """Yield candidates in three rounds: by the CR3, behind likely 2 MiB boundaries, and everywhere.

    A round may hold several: RAM keeps the kernels of earlier boots. Bounded by the size of the guest's RAM.
    """
    if cr3 is not None:
        yield list(_described(memory, _from_cr3(memory, cr3 & ADDRESS)))
    data_regions = getattr(memory, "data_regions", None)
    regions = data_regions() if data_regions else memory.regions
    likely: list[Found] = []
    scanned = 0
    for slot in _slots(memory, regions):
        if slot >= scanned:
            end = min(slot + IMAGE_SPAN, max(ram.gpa + ram.size for ram in memory.regions if ram.gpa <= slot))
            found = next(_described(memory, _scan(memory, slot, end)), None)
            likely += [found] if found else []
            scanned = found.image.gpa + found.image.size if found else slot
    yield likely
    yield list(_described(memory, chain.from_iterable(_scan(memory, r.gpa, r.gpa + r.size) for r in regions)))


def _described(memory: GuestMemory, tables: Iterable[tuple[int, int]]) -> Iterator[Found]:
    """The candidates among pairs of level3_kernel_pgt and level2_kernel_pgt, each once."""
    seen: set[int] = set()
    for level3, level2 in tables:
        if level2 not in seen and len(seen) < MAX_CANDIDATES:
            seen.add(level2)
            found = _describe(memory, level3, level2)
            if found:
                yield found


def _from_cr3(memory: GuestMemory, cr3: int) -> Iterator[tuple[int, int]]:
    for root in dict.fromkeys((cr3 & ~_PTI_USER, cr3)):
        top = _entry(memory, root, 511)
        for level3 in (top, _entry(memory, top, 511)):  # 4 levels, 5 levels
            level2 = _entry(memory, level3, 510)
            if level2:
                yield level3, level2


def _entry(memory: GuestMemory, table: int, index: int) -> int:
    """The table an entry points to, 0 where it points to none."""
    data = memory.readv([(table + 8 * index, 8)])[0] if table else None
    value = int.from_bytes(data, "little") if data else 0
    return value & ADDRESS if value & PRESENT and not value & LARGE else 0


def _slots(memory: GuestMemory, regions: tuple[Region, ...]) -> Iterator[int]:
    starts = [
        slot
        for region in regions
        for slot in range(-(-region.gpa // SLOT) * SLOT, region.gpa + region.size - _STARTUP_SIZE, SLOT)
    ]
    for batch in range(0, len(starts), _BATCH):
        part = starts[batch : batch + _BATCH]
        heads = memory.readv([(slot, _STARTUP_SIZE) for slot in part])
        yield from (slot for slot, head in zip(part, heads, strict=True) if head and _STARTUP.match(head))


def _scan(memory: GuestMemory, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Look at the last two entries of every page: flags 0x063 or 0x067 in both, table addresses below 2^48."""
    packed = getattr(memory, "readv_packed", None)
    for batch in range(-(-start // PAGE) * PAGE, end, _BATCH * PAGE):
        tails = range(batch + PAGE - 16, min(batch + _BATCH * PAGE, end) - 15, PAGE)
        spans = zip(tails, repeat(16), strict=False)
        raw = struct.pack(f"<{2 * len(tails)}Q", *chain.from_iterable(spans)) if packed else b""
        found = packed(raw) if packed else memory.readv(list(spans))
        data = b"".join([tail or bytes(16) for tail in found])
        for hit in _KERNPG_BYTE.finditer(data[0::16]):
            tail = data[16 * hit.start() : 16 * hit.start() + 16]
            if tail[8] & 0xFB == _KERNPG and not (tail[1] & 15 or tail[9] & 15 or tail[6] or tail[7]):
                page, level2 = tails[hit.start()] + 16 - PAGE, int.from_bytes(tail[:8], "little") & ADDRESS
                rest = memory.readv([(page, PAGE - 16)])[0]
                if rest and not any(rest):
                    yield page, level2


def _describe(memory: GuestMemory, level3: int, level2: int) -> Found | None:
    """The image that level2_kernel_pgt maps, if it maps one linearly."""
    raw = memory.readv([(level2, PAGE)])[0]
    if raw is None:
        return None
    entries = array("Q", raw)
    present = [index for index in range(512) if entries[index] & PRESENT]
    large = {index: entries[index] & ADDRESS & -SLOT for index in present if entries[index] & LARGE}
    starts = {gpa - index * SLOT for index, gpa in large.items()}
    if len(starts) != 1 or not 2 <= len(present) <= MAX_IMAGE // SLOT:
        return None
    origin, first, last = starts.pop(), present[0], present[-1]
    image = Image(IMAGE_BASE + first * SLOT, origin + first * SLOT, (last - first + 1) * SLOT)
    if image.gpa < 0 or image.size > MAX_IMAGE:
        return None
    return Found(image, _rodata(memory, entries, image, present), level3)


def _rodata(memory: GuestMemory, entries: array[int], image: Image, present: list[int]) -> Image:
    """The run of pages that are neither writable nor executable; the image itself where there is none."""
    split = [index for index in present if not entries[index] & LARGE]
    tables = dict(zip(split, memory.readv([(entries[i] & ADDRESS, PAGE) for i in split]), strict=True))
    low, high = image.va + image.size, image.va
    for index in present:
        va = IMAGE_BASE + index * SLOT
        if index not in tables:
            if _is_rodata(entries[index]):
                low, high = min(low, va), max(high, va + SLOT)
            continue
        for number, entry in enumerate(array("Q", tables[index] or b"")):
            if entry & PRESENT and _is_rodata(entry):
                low, high = min(low, va + number * PAGE), max(high, va + (number + 1) * PAGE)
    if low >= high:
        low, high = image.va, image.va + image.size
    return Image(low, image.gpa + low - image.va, min(high - low, MAX_RODATA))


def _is_rodata(entry: int) -> bool:
    return bool(entry & NX) and not entry & WRITABLE
