"""Reads the RAM of a running, unmodified QEMU from outside: no pause, no write, no monitor.

The guest-physical map comes from the command line (layout.py) and ``/proc/PID/maps`` (hostmap.py). Plain RAM is read
through ``/proc/PID/mem`` and ``process_vm_readv``; shared RAM (memfd, file) through a read-only mapping of ours.

Never-touched pages: a read through ``/proc/PID/mem`` maps the shared zero page, nothing is allocated. Reading a hole of
a *shared* block allocates that page, at most the RAM the guest was promised anyway; scans therefore ask `data_regions`,
which skips holes (lseek SEEK_DATA), and only single reads of what the guest itself points to go through the mapping.
A shared file that is truncated on the host kills its QEMU by SIGBUS, and every reader of the mapping with it.
Sources: proc(5), lseek(2), QEMU util/mmap-alloc.c, backends/hostmem-*.c, softmmu/physmem.c.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

from appliance.errors import GuestGone, HostError, PermissionRefused, UnreadableMemory, UsageError
from appliance.memory import qmp
from appliance.memory.commandline import CommandLine, parse_command_line, qemu_target
from appliance.memory.hostmap import Block, Span, locate
from appliance.memory.process import ProcessMemory, is_uniform, pack, read_start_time
from appliance.memory.spans import shift_into
from appliance.model import Region, VcpuState

MAP_NORESERVE = 0x4000  # include/uapi/asm-generic/mman-common.h: never take huge pages for us

COPY_FROM = 1 << 16  # larger reads are copied by the kernel, which spares a page fault for each page of them


class QemuMemory:
    """Guest-physical RAM of one QEMU process. ``proof`` says how the map was found."""

    name = "qemu"
    live = True

    def __init__(
        self, process: ProcessMemory, spans: Sequence[Span], *, monitor: str | None = None, proof: str = ""
    ) -> None:
        self.pid, self.proof = process.pid, proof
        self.instance = f"{process.pid}.{process.started}"
        self._process, self._monitor = process, monitor
        self._spans = tuple(sorted(spans))
        self._starts = [span.gpa for span in self._spans]
        self._regions = tuple(Region(span.gpa, span.end - span.gpa) for span in self._spans)
        main = max(self._spans, key=lambda span: span.end - span.gpa)
        self._low, self._high, self._delta = main.gpa, main.end, main.hva - main.gpa
        self._end = self._spans[-1].end
        self._read = process.read

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM, sorted, disjoint; without the hole between 640 KiB and 1 MiB."""
        return self._regions

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        if self._low <= gpa and gpa + size <= self._high and size >= 0:
            return self._read(gpa + self._delta, size)
        return self._read(self._translate(gpa, size), size)

    def bind_reader(self, base: int, otherwise: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        """`read` of ``base + gpa`` in one frame; ``otherwise`` reads what lies outside the largest run of RAM."""
        low, high, delta = base + self._low, base + self._high, self._delta - base
        process, pread, slowly = self._process, os.pread, self._process.read

        def read(va: int, size: int) -> bytes:
            if va < low or va + size > high or size < 0:
                return otherwise(va, size)
            try:
                data = pread(process.fd, size, va + delta)  # not a number kept here: it may be another file's by now
            except OSError:
                return slowly(va + delta, size)
            return data if len(data) == size else slowly(va + delta, size)

        return read

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans, 1024 by one system call; None where one is unreadable."""
        try:
            found = self.readv_packed(pack(spans, len(spans)))
        except struct.error:  # a negative number, or one beyond 64 bits
            found = None
        return [self._read_or_none(gpa, size) for gpa, size in spans] if found is None else found

    def readv_packed(self, spans: bytes, base: int = 0) -> list[bytes | None] | None:
        """`readv` of packed ``base + gpa, size`` pairs; None if one lies outside ``base`` to the end of RAM."""
        if not spans:
            return []
        moved = shift_into(spans, base + self._low, self._high - self._low, self._low + self._delta)
        return self._read_many(moved) if moved is not None else self._readv_mixed(spans, base)

    def data_regions(self) -> tuple[Region, ...]:
        """The regions worth scanning."""
        return self._regions

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers, where QEMU has a free QMP socket of ours to ask; else empty."""
        if self._monitor is None:
            return ()
        try:
            return qmp.read_vcpus(self._monitor, pid=self.pid)
        except HostError:
            return ()  # busy or gone: the port promises "empty where this route has none"

    def check_alive(self) -> None:
        """Raise GuestGone unless the same QEMU process is still there."""
        self._process.check_alive()

    def close(self) -> None:
        """Release the descriptors; may be called twice."""
        self._process.close()

    def _translate(self, gpa: int, size: int) -> int:
        index = bisect_right(self._starts, gpa) - 1
        if index >= 0 and size >= 0:
            span = self._spans[index]
            if gpa + size <= span.end:
                return span.hva + gpa - span.gpa
        raise UnreadableMemory(gpa, size, "not RAM")

    def _read_many(self, spans: bytes) -> list[bytes | None]:
        return self._process.readv(spans)

    def _readv_mixed(self, spans: bytes, base: int) -> list[bytes | None] | None:
        """Spans in several runs of RAM, or outside."""
        starts, table = self._starts, [(span.end, span.hva - span.gpa) for span in self._spans]
        table.append((-1, 0))  # what bisect's -1 finds: nothing
        numbers = array("Q", spans)
        inside: list[tuple[int, int]] = []
        places: list[int] = []
        for place, (va, size) in enumerate(zip(numbers[0::2], numbers[1::2], strict=True)):
            gpa = va - base
            if not 0 <= gpa < self._end and base:
                return None
            end, delta = table[bisect_right(starts, gpa) - 1]
            if gpa + size <= end:
                inside.append((gpa + delta, size))
                places.append(place)
        pieces = self._read_many(pack(inside, len(inside)))
        if len(pieces) == len(numbers) // 2:
            return pieces
        found: list[bytes | None] = [None] * (len(numbers) // 2)
        for place, piece in zip(places, pieces, strict=True):
            found[place] = piece
        return found

    def _read_or_none(self, gpa: int, size: int) -> bytes | None:
        try:
            return self.read(gpa, size)
        except UnreadableMemory:
            return None


class SharedQemuMemory(QemuMemory):
    """The same for RAM that QEMU shares through one file or memfd: read by a mapping of our own."""

    name = "qemu-shared"

    def __init__(
        self, process: ProcessMemory, spans: Sequence[Span], block: Block, fd: int, *, monitor: str | None, proof: str
    ) -> None:
        super().__init__(process, spans, monitor=monitor, proof=proof)
        self._fd = fd
        self._map = mmap.mmap(fd, block.size, mmap.MAP_SHARED | MAP_NORESERVE, mmap.PROT_READ)
        self._base = block.hva
        self._read = self._read_mapped

    def data_regions(self) -> tuple[Region, ...]:
        """The parts of RAM that the guest or QEMU has ever touched."""
        found = []
        for span in self._spans:
            position, end = span.hva - self._base, span.hva - self._base + span.end - span.gpa
            shift = span.gpa - position
            while position < end:
                try:
                    start = os.lseek(self._fd, position, os.SEEK_DATA)
                except OSError:
                    break  # ENXIO: only a hole follows
                position = min(os.lseek(self._fd, start, os.SEEK_HOLE), end)
                if start < position:
                    found.append(Region(start + shift, position - start))
        return tuple(found)

    def close(self) -> None:
        """Release the mapping and the descriptors; may be called twice."""
        super().close()
        self._map.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def bind_reader(self, base: int, otherwise: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        """The same by our mapping."""
        low, high, delta = base + self._low, base + self._high, self._delta - base - self._base
        mapped = self._map

        def read(va: int, size: int) -> bytes:
            if va < low or va + size > high or not 0 <= size <= COPY_FROM:
                return otherwise(va, size)
            return mapped[va + delta : va + delta + size]

        return read

    def _read_mapped(self, hva: int, size: int) -> bytes:
        start = hva - self._base
        if size > COPY_FROM:
            data = os.pread(self._fd, size, start)
            if len(data) == size:
                return data
        return self._map[start : start + size]

    def _read_many(self, spans: bytes) -> list[bytes | None]:
        self._process.check_alive()
        data, base, numbers = self._map, self._base, array("Q", spans)
        sizes = numbers[1::2]
        if len(sizes) and is_uniform(sizes):
            size = sizes[0]
            return [data[start : start + size] for start in [hva - base for hva in numbers[0::2]]]
        return [data[hva - base : hva - base + size] for hva, size in zip(numbers[0::2], sizes, strict=True)]


def open_qemu(pid: int, *, monitor: str | Path | None = None, passive: bool = True) -> QemuMemory:
    """Open the RAM of a running QEMU.

    ``monitor`` names a QMP socket; with ``passive=False`` one found on the command line is used too. It is asked for
    registers, and for the map where that cannot be found passively (memory devices, mappings that look alike).
    Raises UsageError (no such process, no QEMU), PermissionRefused, HostError (no x86, RAM not found), GuestGone.
    """
    line = read_command_line(pid)
    socket = str(monitor) if monitor else None
    if socket is None and not passive and line.monitors:
        socket = qmp.find_socket(pid, line.monitors[0])
    process = ProcessMemory(pid)
    try:
        if socket and line.hotplug:
            return QemuMemory(process, ask_monitor(pid, socket, line), monitor=socket, proof="told by QEMU")
        try:
            found = locate(process, line)
        except HostError:
            if socket is None:
                raise
            return QemuMemory(process, ask_monitor(pid, socket, line), monitor=socket, proof="told by QEMU")
        block = found.blocks[0]
        if block.fd is not None:
            try:
                return SharedQemuMemory(process, found.spans, block, block.fd, monitor=socket, proof=found.proof)
            except OSError as error:
                os.close(block.fd)
                raise HostError(f"the RAM of QEMU process {pid} cannot be mapped: {error.strerror or error}") from None
        return QemuMemory(process, found.spans, monitor=socket, proof=found.proof)
    except BaseException:
        process.close()
        raise


def ask_monitor(pid: int, socket: str, line: CommandLine) -> list[Span]:
    """The map of RAM as QEMU itself tells it. Raises HostError."""
    names = {"pc.ram", "microvm.ram", *line.hotplug, *(block.id for block in line.blocks)}
    spans = []
    with qmp.Monitor(socket, pid=pid) as monitor:
        for region, name, _ in qmp.parse_flat_view(monitor.human("info mtree -f")):
            hva = qmp.parse_host_address(monitor.human(f"gpa2hva {region.gpa:#x}")) if name in names else None
            if hva is not None:
                spans.append(Span(region.gpa, region.gpa + region.size, hva))
    if not spans:
        raise HostError(f"QEMU's monitor {socket} names no RAM")
    return spans


def read_command_line(pid: int) -> CommandLine:
    """The command line of a QEMU process. Raises UsageError, PermissionRefused, HostError."""
    read_start_time(pid)
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:
        raise GuestGone(f"process {pid} has ended") from None
    try:
        exe = str(Path(f"/proc/{pid}/exe").readlink())
    except PermissionError:
        exe = argv[0] if argv else ""
        if qemu_target(exe, exe):
            raise PermissionRefused(
                f"QEMU process {pid} may not be looked at: run as root or with CAP_SYS_PTRACE"
            ) from None
    except OSError:
        exe = ""
    target = qemu_target(argv[0] if argv else "", exe)
    if target is None:
        raise UsageError(f"process {pid} is no QEMU: {exe or (argv[0] if argv else 'a kernel thread')}")
    if target != "x86":
        raise HostError(f"process {pid} emulates {target}; only x86 guests are supported")
    return parse_command_line(argv)
