"""Where QEMU's x86 machines put their RAM in guest-physical space. Pure arithmetic, no I/O.

Sources (QEMU 5.0 to 9.x): hw/i386/pc_piix.c pc_init1, hw/i386/pc_q35.c pc_q35_init, hw/i386/microvm.c
microvm_memory_init (the split below 4 GiB); hw/i386/pc.c pc_memory_init (aliases ram-below-4g and ram-above-4g of one
linear block; enforce_amd_1tb_hole: RAM that would touch the HyperTransport hole starts at 1 TiB instead).
"""

from __future__ import annotations

from typing import NamedTuple

from appliance.memory.commandline import CommandLine

FOUR_GIB = 1 << 32
GIB = 1 << 30
ABOVE_1TB = 1 << 40  # target/i386/cpu.h AMD_ABOVE_1TB_START
AMD_HT_START = 0xFD_0000_0000
# Video memory, option ROMs and the firmware's shadow: RAM, ROM or registers, as the chipset happens to be programmed.
LEGACY_HOLE = (0xA0000, 0x100000)


class Extent(NamedTuple):
    """A run of RAM: ``size`` bytes at ``gpa`` are those at ``offset`` of the machine's linear RAM."""

    gpa: int
    offset: int
    size: int


def below_4g(line: CommandLine) -> int:
    """Bytes of RAM below 4 GiB."""
    size, limit = line.ram_size, line.max_below_4g
    if line.machine == "microvm":
        low = 0xC0000000
    elif line.machine == "q35":
        low = 0x80000000 if size >= 0xB0000000 else 0xB0000000
        low = min(low, limit or FOUR_GIB)
    else:
        limit = limit or 0xE0000000
        low = min(limit, 0xC0000000) if size >= limit else limit
    return min(size, low)


def extents(line: CommandLine, above_start: int = FOUR_GIB) -> tuple[Extent, ...]:
    """All RAM of the machine, sorted, without the hole between 640 KiB and 1 MiB."""
    low = below_4g(line)
    hole_start, hole_end = LEGACY_HOLE
    found = [Extent(0, 0, min(low, hole_start))]
    if low > hole_end:
        found.append(Extent(hole_end, hole_end, low - hole_end))
    if line.ram_size > low:
        found.append(Extent(above_start, low, line.ram_size - low))
    return tuple(found)


def above_start(line: CommandLine, amd: bool) -> int:
    """Where RAM above 4 GiB begins."""
    high = line.ram_size - below_4g(line)
    return ABOVE_1TB if amd and FOUR_GIB + high > AMD_HT_START else FOUR_GIB
