"""Where a Xen guest with a physical address space of its own (HVM, PVH) has its RAM: found by asking what exists.

RAM begins at 0 and, where it does not fit below the hole for devices, goes on at 4 GiB. How large the hole is depends
on the kind of guest, its configuration and what hvmloader does with it; the highest frame of all is no RAM, and frames
are missing where the guest ballooned. So the edges are looked for, and where ballooning leaves them open, the
regions are rather too large: what is not there cannot be read anyway.
Sources (Xen 4.11 to 4.20): tools/libs/light/libxl_dom.c (libxl__build_hvm), tools/libs/guest/xg_dom_x86.c
(meminit_hvm), tools/firmware/hvmloader/pci.c (RAM moved above 4 GiB), xen/include/public/hvm/hvm_info_table.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from appliance.model import Region

PAGE: Final = 4096
SAMPLES: Final = 1024  # frames that are asked for at once
LOW_LIMIT: Final = 0xFEE00  # LAPIC_BASE_ADDRESS: RAM of a PVH guest ends there
VIDEO: Final = 0xF0000  # HVM_BELOW_4G_MMIO_START: RAM of an HVM guest ends there, video memory may follow
HIGH: Final = 0x100000  # 4 GiB
VGA_HOLE: Final = range(0xA0, 0xC0)  # LIBXL_VGA_HOLE_SIZE
BLOCK: Final = 1024  # frames that are populated, or are not, as far as a scan is concerned
STEP: Final = 16  # of this many frames of such a block, one is asked for at first
MAX_RUNS: Final = 4096

Probe = Callable[[Sequence[int]], Sequence[bool]]  # which of these frames can be mapped; at most SAMPLES


def find_regions(probe: Probe, memory_bytes: int | None, last_frame: int) -> tuple[Region, ...]:
    """RAM of a guest. ``memory_bytes``: what it was given at most; ``last_frame`` bounds it where that is not known."""
    low, high = _sized(probe, memory_bytes // PAGE) if memory_bytes else _unsized(probe, last_frame + 1)
    runs = [(0, low), (HIGH, HIGH + high)]
    if low > VGA_HOLE.stop and not any(probe(VGA_HOLE)):
        runs[:1] = [(0, VGA_HOLE.start), (VGA_HOLE.stop, low)]
    return tuple(Region(start * PAGE, (end - start) * PAGE) for start, end in runs if start < end)


def sample(regions: Sequence[Region]) -> list[int]:
    """Frames spread over all RAM, at most SAMPLES of them."""
    frames = sum(region.size for region in regions) // PAGE
    step = max(1, -(-frames // SAMPLES))
    found: list[int] = []
    skip = 0
    for region in regions:
        first, count = region.gpa // PAGE, region.size // PAGE
        found += range(first + skip, first + count, step)
        skip = (skip - count) % step
    return found


def find_populated(probe: Probe, regions: Sequence[Region], expired: Callable[[], bool]) -> tuple[Region, ...]:
    """The blocks of `BLOCK` frames in which any is there.

    Which ones the guest chooses, by its balloon: so what was not asked for before ``expired``, or lies behind
    `MAX_RUNS` runs, counts as populated.
    """
    runs: list[tuple[int, int]] = []  # first frame, one behind the last

    def add(first: int, end: int) -> None:
        if runs and runs[-1][1] == first:
            first = runs.pop()[0]
        runs.append((first, end))

    for region in regions:
        stop = (region.gpa + region.size) // PAGE
        for start in range(region.gpa // PAGE, stop, BLOCK * STEP):
            if expired() or len(runs) >= MAX_RUNS:
                add(start, stop)
                break
            frames = range(start, min(start + BLOCK * STEP, stop), STEP)
            there = {(frame - start) // BLOCK for frame, mapped in zip(frames, probe(frames), strict=True) if mapped}
            for number, first in enumerate(range(start, frames.stop, BLOCK)):
                end = min(first + BLOCK, frames.stop)
                if number in there or any(probe(range(first, end))):
                    add(first, end)
    return tuple(Region(first * PAGE, (end - first) * PAGE) for first, end in runs)


def _sized(probe: Probe, total: int) -> tuple[int, int]:
    """Frames below the hole and above 4 GiB, of a guest that has ``total`` of them at most."""
    low_edge = _find_end(probe, 0, min(total, VIDEO))
    high = _find_end(probe, HIGH, HIGH + total) - HIGH
    if not high and total <= LOW_LIMIT:
        return total, 0
    low = max(low_edge, min(total - high, LOW_LIMIT))
    if high and low + high == total and list(probe([low - 1, low])) == [True, False]:
        return low, high
    return low, max(high, total - low_edge)


def _unsized(probe: Probe, end: int) -> tuple[int, int]:
    return _find_end(probe, 0, min(end, VIDEO)), max(HIGH, _find_end(probe, HIGH, end)) - HIGH


def _find_end(probe: Probe, start: int, end: int) -> int:
    """One behind the last frame that can be mapped, looked for in ever smaller steps; ``start`` where none is found."""
    while start < end:
        step = -(-(end - start) // SAMPLES)
        frames = range(start, end, step)
        there = [frame for frame, mapped in zip(frames, probe(frames), strict=True) if mapped]
        if not there:
            return start
        if step == 1:
            return there[-1] + 1
        start, end = there[-1], min(there[-1] + step, end)
    return start
