"""The machine's RAM as the appliance reads it: living bytes, or a core as QEMU's dump-guest-memory writes it.

Source of the core's form: QEMU dump/dump.c and target/i386/arch_dump.c (QEMUCPUState, its segments and registers).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from appliance.errors import UnreadableMemory
from appliance.model import Region, VcpuState
from tests.worlds.windows.boot import Kernel
from tests.worlds.windows.planted import Process

CR0, CR4, LA57 = 0x80050033, 0x3506F8, 1 << 12
STATE_SIZE = 440  # QEMUCPUState: version, size, 18 registers, ten segments of 24 bytes, cr0 to cr4, kernel_gs_base
CS, DS, ES, FS, GS, SS, LDT, TR, GDT, IDT = range(10)


class MachineMemory:
    """The living RAM of a machine."""

    name = "made of bytes"
    live = True

    def __init__(self, kernel: Kernel, running: Process | None = None) -> None:
        self._kernel, self._ram, self._running = kernel, kernel.ram, running
        self.instance = f"{kernel.family}.{id(kernel):x}"

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, self._ram.size),)

    def data_regions(self) -> tuple[Region, ...]:
        """What of the RAM was ever written to, as the file behind it tells."""
        found, position = [], 0
        while position < self._ram.size:
            try:
                start = os.lseek(self._ram.descriptor, position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(self._ram.descriptor, start, os.SEEK_HOLE)
            found.append(Region(start, position - start))
        return tuple(found)

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or size < 0 or gpa + size > self._ram.size:
            raise UnreadableMemory(gpa, size, "not RAM")
        return self._ram.data[gpa : gpa + size]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        data, end = self._ram.data, self._ram.size
        return [data[gpa : gpa + size] if gpa >= 0 <= size and gpa + size <= end else None for gpa, size in spans]

    def vcpus(self) -> tuple[VcpuState, ...]:
        return (registers(self._kernel, self._running),)

    def check_alive(self) -> None:
        """It lives as long as the test."""

    def close(self) -> None:
        """The machine is closed by whoever made it."""


def registers(kernel: Kernel, running: Process | None = None) -> VcpuState:
    """Processor 0, in the kernel or in a program."""
    space = running.user.space if running is not None else kernel.space
    state = VcpuState(
        cr0=CR0,
        cr3=space.shadow or space.root,
        cr4=CR4 | (LA57 if kernel.space.levels == 5 else 0),
        rip=kernel.va("KiSystemCall64") + 0x40,
        idt_base=kernel.idt,
        lstar=kernel.va("KiSystemCall64"),
        gs_base=kernel.gs_base,
    )
    if running is None:
        return state
    rip, teb = running.modules[0].base + 0x1234, running.threads[0].teb
    return replace(state, rip=rip, gs_base=teb, kernel_gs_base=kernel.gs_base)


def write_elf(kernel: Kernel, path: Path) -> Path:
    """Write a core of the machine: two PT_LOADs about the hole below 1 MiB, one note for the processor."""
    cpu = registers(kernel)
    state = bytearray(STATE_SIZE)
    struct.pack_into("<II", state, 0, 1, STATE_SIZE)
    struct.pack_into("<Q", state, 136, cpu.rip)
    for number, (selector, base) in {CS: (0x10, 0), GS: (0x2B, cpu.gs_base), IDT: (0, cpu.idt_base)}.items():
        struct.pack_into("<IIIIQ", state, 152 + 24 * number, selector, 0xFFF, 0, 0, base)
    struct.pack_into("<QQQQQ", state, 392, cpu.cr0, 0, 0, cpu.cr3, cpu.cr4)
    note = struct.pack("<III8s", 5, len(state), 0, b"QEMU\0") + bytes(state)
    runs = [(0, 0xA0000), (0x100000, kernel.ram.size)]
    offset = 64 + 56 * (len(runs) + 1)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(runs) + 1, 64, 0, 0)
    head += struct.pack("<IIQQQQQQ", 4, 0, offset, 0, 0, len(note), len(note), 0)
    offset = data_at = -(-(offset + len(note)) // 4096) * 4096
    for start, end in runs:
        head += struct.pack("<IIQQQQQQ", 1, 0, offset, 0, start, end - start, end - start, 0)
        offset += end - start
    with path.open("wb") as file:
        file.write(head + note)
        offset = data_at
        for start, end in runs:
            for position in range(start, end, 1 << 16):
                part = kernel.ram.data[position : min(position + (1 << 16), end)]
                if part.count(0) != len(part):
                    file.seek(offset + position - start)
                    file.write(part)
            offset += end - start
        file.truncate(offset)
    return path
