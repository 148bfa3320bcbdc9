"""Guest RAM from a file: a raw image, LiME, a crash dump of Windows, or the ELF core of QEMU's ``dump-guest-memory``.

The format is told by content, never by name. A file that is cut short gives what is there; `gaps` names the rest. The
file is mapped read-only and must not shrink meanwhile.
Sources: LiME doc/README.md (lime_mem_range_header), ELF-64 object file format, QEMU dump/dump.c and
target/i386/arch_dump.c (QEMUCPUState, the note that holds the registers), docs/specs of the formats that are refused.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from appliance.errors import ConfigError, UnreadableMemory
from appliance.memory.crashdump import SIGNATURES, parse_crash_dump
from appliance.model import Gap, Region, VcpuState

PAGE = 4096
MAX_SEGMENTS = 1 << 16
FIRMWARE = range(0xFD00_0000, 1 << 32)  # QEMU dumps its flash, and old display memory, as PT_LOAD too: no RAM
_LIME = struct.pack("<II", 0x4C694D45, 1)
_LIME_HEADER = struct.Struct("<IIQQQ")
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _PN_XNUM = 4, 62, 1, 4, 0xFFFF
# Offsets in QEMUCPUState: rip, the bases of FS, GS and IDT, cr0 to cr4, and (since QEMU 3.0) kernel_gs_base at 432.
_REGISTERS = {"rip": 136, "fs_base": 240, "gs_base": 264, "idt_base": 384, "cr0": 392, "cr3": 416, "cr4": 424}
_KERNEL_GS_BASE = 432
_REFUSED = (
    (b"KDUMP   ", "a compressed kdump file", "dump again without -z/-l/-s, or convert it with makedumpfile -E"),
    (b"makedumpfile", "a flattened kdump file", "rearrange it with makedumpfile -R, then convert it with -E"),
    (b"AVML", "a compressed AVML file", "convert it with avml-convert"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first"),
    (b"\xfd7zXZ", "compressed by xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it first"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it first"),
    (b"QEVM", "a QEMU migration stream", "use dump-guest-memory instead"),
    (b"LibvirtQemudSave", "a saved libvirt domain", "use virsh dump --memory-only instead"),
    (b"QFI\xfb", "a qcow2 disk image", "give a memory image"),
    (b"\xd4\xc3\xb2\xa1", "a packet capture", "give a memory image"),
    (b"\n\r\r\n", "a packet capture", "give a memory image"),
)


_NOWHERE = (-(1 << 70), 0)  # what an address below all extents finds


class Extent(NamedTuple):
    """A run of RAM: ``[gpa, end)`` lies at ``offset`` of the file."""

    gpa: int
    end: int
    offset: int


class FileMemory:
    """A guest's RAM at one moment. ``gaps`` names what the file should hold and does not."""

    name = "file"
    live = False

    def __init__(
        self,
        data: mmap.mmap,
        extents: Sequence[Extent],
        gaps: Sequence[Gap],
        cpus: Sequence[VcpuState],
        instance: str,
        *,
        kernel_va: int = 0,
        path: str | Path | None = None,
    ) -> None:
        self.gaps, self.instance = tuple(gaps), instance
        self.kernel_va = kernel_va  # an address in the kernel's image, where the file tells one
        self._path = path
        self._data, self._cpus = data, tuple(cpus)
        self._extents = tuple(extents)
        self._starts = [extent.gpa for extent in extents]
        self._ends = [(extent.end, extent.offset - extent.gpa) for extent in extents] + [_NOWHERE]
        self._regions = tuple(Region(extent.gpa, extent.end - extent.gpa) for extent in extents)

    @property
    def regions(self) -> tuple[Region, ...]:
        """What the file holds, sorted, disjoint."""
        return self._regions

    @property
    def is_raw(self) -> bool:
        """Whether the file is nothing but RAM, byte for byte from guest-physical 0 on."""
        return self._extents[0].gpa == self._extents[0].offset == 0 and len(self._extents) == 1

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory."""
        end, delta = self._ends[bisect_right(self._starts, gpa) - 1]
        if gpa + size > end or size < 0:
            raise UnreadableMemory(gpa, size, "not in the file")
        return self._data[gpa + delta : gpa + delta + size]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans; None where one is not in the file."""
        starts, ends, data = self._starts, self._ends, self._data
        found: list[bytes | None] = []
        for gpa, size in spans:
            end, delta = ends[bisect_right(starts, gpa) - 1]
            found.append(data[gpa + delta : gpa + delta + size] if gpa + size <= end and size >= 0 else None)
        return found

    def readv_packed(self, spans: bytes, base: int = 0) -> list[bytes | None] | None:
        """`readv` of packed ``base + gpa, size`` pairs; None if one lies outside ``base`` to the end of RAM."""
        numbers = array("Q", spans)
        addresses = numbers[0::2]
        if base and addresses and not base <= min(addresses) <= max(addresses) < base + self._extents[-1].end:
            return None
        return self.readv([(address - base, size) for address, size in zip(addresses, numbers[1::2], strict=True)])

    def data_regions(self) -> tuple[Region, ...]:
        """The regions worth scanning: without the holes of a sparse file."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC) if self._path is not None else -1
        except OSError:
            return self._regions
        if fd < 0:
            return self._regions
        try:
            return tuple(Region(gpa, size) for extent in self._extents for gpa, size in _filled(fd, extent))
        finally:
            os.close(fd)

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers, where the dump holds them."""
        return self._cpus

    def check_alive(self) -> None:
        """A file stays as it is."""

    def close(self) -> None:
        """Release the mapping; may be called twice."""
        self._data.close()


def open_file(path: str | Path) -> FileMemory:
    """Open a memory image. Raises ConfigError: missing, empty, of a format we do not read, or cut off too early."""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: is empty; take the memory image again") from None
    try:
        extents, cpus, kernel_va = _parse(data)
        kept, gaps = _fit(extents, len(data))
        if not kept:
            raise ConfigError(f"holds no guest memory: {len(data)} bytes in all; take the memory image again")
    except ConfigError as error:
        data.close()
        raise ConfigError(f"{path}: {error}") from None
    instance = f"{status.st_dev}.{status.st_ino}.{status.st_mtime_ns}"
    return FileMemory(data, kept, gaps, cpus, instance, kernel_va=kernel_va, path=path)


def _filled(fd: int, extent: Extent) -> Iterator[tuple[int, int]]:
    """The parts of an extent that are no holes of the file, in whole pages."""
    position, end = extent.offset, extent.offset + extent.end - extent.gpa
    shift = extent.gpa - extent.offset
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        except OSError:
            return  # ENXIO: only a hole follows
        first = max(position, start - (start - extent.offset) % PAGE)
        last = min(end, stop + -(stop - extent.offset) % PAGE)
        if first < last:
            yield first + shift, last - first
        position = max(last, position + 1)


def _parse(data: mmap.mmap) -> tuple[list[Extent], list[VcpuState], int]:
    """Where RAM lies, registers, and an address in the kernel's image (0: none is told)."""
    head = data[:32]
    if head.startswith(b"\x7fELF"):
        return *_parse_elf(data), 0
    if head.startswith(_LIME):
        return list(_parse_lime(data)), [], 0
    if head.startswith(SIGNATURES):
        dump = parse_crash_dump(data)
        return [Extent(*run) for run in dump.runs], [dump.cpu], dump.kernel_va
    for magic, what, remedy in _REFUSED:
        if head.startswith(magic):
            raise ConfigError(f"is {what}; {remedy}")
    return [Extent(0, -(-len(data) // PAGE) * PAGE, 0)], [], 0


def _parse_lime(data: mmap.mmap) -> Iterator[Extent]:
    position = 0
    for _ in range(MAX_SEGMENTS):
        if position == len(data):
            return
        if position + _LIME_HEADER.size > len(data):
            raise ConfigError(f"ends inside a LiME header at byte {position}; take the memory image again")
        magic, version, first, last, _ = _LIME_HEADER.unpack_from(data, position)
        if struct.pack("<II", magic, version) != _LIME or last < first or last >> 52:
            raise ConfigError(f"has a damaged LiME header at byte {position}; take the memory image again")
        position += _LIME_HEADER.size
        yield Extent(first, last + 1, position)
        position += last + 1 - first
        if position > len(data):
            return
    raise ConfigError(f"has more than {MAX_SEGMENTS} LiME ranges")


def _parse_elf(data: mmap.mmap) -> tuple[list[Extent], list[VcpuState]]:
    if len(data) < _ELF_HEADER.size:
        raise ConfigError(f"ends inside its ELF header: {len(data)} bytes in all; take the dump again")
    ident, kind, machine, _, _, table, sections, _, _, size, count, _, _, _ = _ELF_HEADER.unpack_from(data)
    if kind != _ET_CORE or machine != _EM_X86_64 or ident[4:6] != b"\2\1":
        raise ConfigError("is an ELF file, but no 64-bit x86 memory dump (dump-guest-memory makes one)")
    if count == _PN_XNUM and sections + 48 <= len(data):
        count = struct.unpack_from("<I", data, sections + 44)[0]  # sh_info of section 0
    end = table + count * size
    if size < _PROGRAM.size or count > MAX_SEGMENTS or end > len(data):
        raise ConfigError(f"ends inside its table of segments, {end - len(data)} bytes short; take the dump again")
    extents: list[Extent] = []
    cpus: list[VcpuState] = []
    for number in range(count):
        kind, _, offset, _, address, stored, _, _ = _PROGRAM.unpack_from(data, table + number * size)
        if kind == _PT_LOAD and stored and not (address in FIRMWARE and address + stored - 1 in FIRMWARE):
            extents.append(Extent(address, address + stored, offset))
        elif kind == _PT_NOTE:
            cpus += _parse_notes(data[offset : offset + min(stored, 1 << 24)])
    if not extents:
        raise ConfigError("is an ELF core without any memory segment; Xen cores are not supported")
    return extents, cpus


def _parse_notes(data: bytes) -> Iterator[VcpuState]:
    """Registers from the notes named QEMU, one for each CPU."""
    position = 0
    while position + 12 <= len(data):
        name_size, size, _ = struct.unpack_from("<III", data, position)
        name_at = position + 12
        at = name_at + -(-name_size // 4) * 4
        if data[name_at : name_at + 5] == b"QEMU\0" and size >= 432 and at + 432 <= len(data):
            where = _REGISTERS | ({"kernel_gs_base": _KERNEL_GS_BASE} if size >= 440 and at + 440 <= len(data) else {})
            yield VcpuState(**{name: struct.unpack_from("<Q", data, at + place)[0] for name, place in where.items()})
        position = at + -(-size // 4) * 4


def _fit(extents: Sequence[Extent], size: int) -> tuple[list[Extent], list[Gap]]:
    """What of the extents lies in the file, in order and disjoint; the rest as gaps."""
    kept: list[Extent] = []
    gaps: list[Gap] = []
    missing, total = 0, sum(extent.end - extent.gpa for extent in extents)
    for gpa, end, offset in sorted(extents):
        start = max(gpa, kept[-1].end) if kept else gpa
        there = min(end, gpa + max(0, size - offset)) & -PAGE
        if start < there:
            kept.append(Extent(start, there, offset + start - gpa))
        if there < end:
            missing += end - max(there, start)
            gaps.append(
                Gap(f"{end - max(there, start):#x} bytes of RAM", max(there, start), "the file ends before them")
            )
    if missing:
        why = f"the file is cut short: {missing} of {total} bytes of RAM are missing; copy or take it again"
        gaps.insert(0, Gap("memory image", 0, why))
    return kept, gaps
