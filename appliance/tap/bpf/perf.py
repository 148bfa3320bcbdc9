"""The consumer of a perf event array: for kernels that have no BPF ring buffer (before Linux 5.8).

One buffer for each CPU, mapped: a page of positions, then 2^n pages of records. Each CPU's records are in order; those
of several CPUs are merged by their time. Sources: perf_event_open(2), include/uapi/linux/perf_event.h,
kernel/events/ring_buffer.c, ``bpf_perf_event_output`` in kernel/trace/bpf_trace.c.

A record that found its buffer full is counted by the kernel program, which is told so since Linux 5.1; the buffer
itself counts it too, and ``lost`` is that figure.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import select
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct, pack
from typing import Final

from appliance.errors import HostError, PermissionRefused
from appliance.tap.bpf.layout import START
from appliance.tap.bpf.syscalls import Map

PAGE: Final = mmap.PAGESIZE
_NUMBER: Final = {"x86_64": 298, "aarch64": 241}.get(platform.machine(), 0)  # asm/unistd.h
_TYPE_SOFTWARE: Final = 1
_COUNT_SW_BPF_OUTPUT: Final = 10
_SAMPLE_RAW: Final = 1 << 10
_FD_CLOEXEC: Final = 8
# struct perf_event_attr as of PERF_ATTR_SIZE_VER0: type, size, config, period, sample type, read format, flags,
# wakeup_events, breakpoint type, config1.
_ATTR: Final = pack(
    "=IIQQQQQIIQ", _TYPE_SOFTWARE, 64, _COUNT_SW_BPF_OUTPUT, 1, _SAMPLE_RAW, 0, 0, 1, 0, 0
)  # one sample for each event, one wake-up for each sample
_RECORD_LOST: Final = 2
_RECORD_SAMPLE: Final = 9
_HEAD, _TAIL = 1024 // 8, 1032 // 8  # data_head, data_tail in struct perf_event_mmap_page, in words

_HEADER: Final = Struct("=IHH")  # type, misc, size of the whole record
_LOST: Final = Struct("=QQ")  # id, how many
_SAMPLE: Final = 12  # header, u32 size: then the event
_FIRST: Final = Struct("=12x8xQB")  # time and kind of the event in a sample
MAX_RECORD: Final = 1 << 16  # its size is an u16

CPU_BYTES: Final = 1 << 18  # at least, where the whole budget allows it: a burst comes on one CPU
SLACK_NS: Final = 100_000  # from the look at the clock in the program to its record: microseconds
ONLINE_NS: Final = 1_000_000_000
ONLINE: Final = Path("/sys/devices/system/cpu/online")

_libc = ctypes.CDLL(None, use_errno=True)


class PerfRing:
    """Records of all CPUs, read by one thread; the face of ``appliance.tap.bpf.ring.Ring``.

    ``events`` is the perf event array, ``size`` what all buffers together shall have, in bytes. CPUs that come online
    later are found within a second; until then the sweep makes up for what they could not tell.
    """

    def __init__(self, events: Map, size: int) -> None:
        """Raises PermissionRefused and HostError."""
        cpus = read_online()
        self._events = events
        self._bytes = choose_size(size, len(cpus))
        self._scratch = bytearray(MAX_RECORD)
        self.data = memoryview(self._scratch)
        self._buffers: dict[int, _Buffer] = {}
        self._gone = 0  # lost on CPUs that went offline
        self._told = False  # that something was left unread
        self._epoll = select.epoll()
        self._rest = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._rest, select.EPOLLIN)
        self._next_look_ns = time.monotonic_ns() + ONLINE_NS
        try:
            for cpu in sorted(cpus):
                self._open(cpu)
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether a record waits."""
        return any(buffer.peek() for buffer in self._buffers.values())

    @property
    def lost(self) -> int:
        """Records that found their buffer full, as far as the buffers were read."""
        return self._gone + sum(buffer.lost for buffer in self._buffers.values())

    def fileno(self) -> int:
        """Readable while records wait."""
        return self._epoll.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a record."""
        if self.ready:
            return True
        if time.monotonic_ns() >= self._next_look_ns:
            self._follow_cpus()
        self._epoll.poll(max(0.0, timeout_s))
        return self.ready

    def records(self, limit: int) -> Iterator[int]:
        """Yield where in ``data`` at most ``limit`` records begin; one is handed back when the next is asked for.

        A START is told at once. Any other record waits until no CPU can have an older one on its way, a tenth of a
        millisecond: so a flow's first packet comes before its answer. What was yielded already is not made to wait.
        """
        told = False
        heads, looked_ns = self._look()
        try:
            for _ in range(limit):
                if not heads:
                    return
                first = _choose(heads, looked_ns, alone=len(heads) == len(self._buffers))
                if first is None:
                    if told:
                        return
                    time.sleep(SLACK_NS / 1e9)
                    heads, looked_ns = self._look()
                    continue
                first.copy(self.data)
                told = True
                try:
                    yield 0
                finally:
                    first.advance()
                if not first.peek():
                    heads.remove(first)
        finally:
            self._tell_rest()

    def close(self) -> None:
        """Unmap; may be called twice."""
        if self._rest < 0:
            return
        for cpu in list(self._buffers):
            self._drop(cpu)
        self._epoll.close()
        os.close(self._rest)
        self._rest = -1
        self.data.release()

    # -- CPUs --

    def _look(self) -> tuple[list[_Buffer], int]:
        """The buffers in which a record waits, and when this was so."""
        looked_ns = time.monotonic_ns()
        return [buffer for buffer in self._buffers.values() if buffer.peek()], looked_ns

    def _tell_rest(self) -> None:
        """A descriptor of perf is readable once for each wake-up; what is left after that needs a word of ours."""
        if self._rest < 0 or self.ready == self._told:
            return
        self._told = not self._told
        if self._told:
            os.eventfd_write(self._rest, 1)
        else:
            os.eventfd_read(self._rest)

    def _follow_cpus(self) -> None:
        self._next_look_ns = time.monotonic_ns() + ONLINE_NS
        online = read_online()
        for cpu in self._buffers.keys() - online:
            if not self._buffers[cpu].peek():
                self._drop(cpu)
        for cpu in online - self._buffers.keys():
            with suppress(HostError):  # it left again, or the next look will tell
                self._open(cpu)

    def _open(self, cpu: int) -> None:
        try:
            buffer = _Buffer(cpu, self._bytes)
        except OSError as error:
            raise _explain(error, cpu) from error
        self._buffers[cpu] = buffer
        self._epoll.register(buffer.fd, select.EPOLLIN)
        self._events.update(pack("=I", cpu), pack("=I", buffer.fd))

    def _drop(self, cpu: int) -> None:
        buffer = self._buffers.pop(cpu)
        self._gone += buffer.lost
        with suppress(OSError):
            self._events.delete(pack("=I", cpu))
        self._epoll.unregister(buffer.fd)
        buffer.close()


class _Buffer:
    """The records of one CPU."""

    def __init__(self, cpu: int, size: int) -> None:
        self.lost = 0
        self.at_ns = 0  # of the record that waits: its time,
        self.starts = False  # and whether it begins a flow
        self._mask = size - 1
        self._record = 0  # its size; 0: not looked at yet
        self.fd = _open_event(cpu)
        try:
            self._map = mmap.mmap(self.fd, PAGE + size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(self.fd)
            raise
        self._bytes = memoryview(self._map)
        self._words = self._bytes[:PAGE].cast("Q")
        self._ring = self._bytes[PAGE:]

    def peek(self) -> bool:
        """Whether an event waits; what the buffer says of itself is taken in on the way."""
        if self._record:
            return True
        words = self._words
        while (tail := words[_TAIL]) != words[_HEAD]:
            kind, _, size = _HEADER.unpack_from(self._ring, tail & self._mask)  # never wraps: records begin at words
            if kind == _RECORD_SAMPLE and size >= _FIRST.size:
                self.at_ns, what = _FIRST.unpack(self._read(tail, _FIRST.size))
                self.starts = bool(what & START)
                self._record = size
                return True
            if kind == _RECORD_LOST:
                self.lost += _LOST.unpack(self._read(tail + _HEADER.size, _LOST.size))[1]
            words[_TAIL] = tail + max(size, _HEADER.size)
        return False

    def copy(self, to: memoryview) -> None:
        """The event that waits, in one piece."""
        at, size = self._words[_TAIL] + _SAMPLE & self._mask, self._record - _SAMPLE
        first = min(size, self._mask + 1 - at)
        to[:first] = self._ring[at : at + first]
        if first < size:
            to[first:size] = self._ring[: size - first]

    def advance(self) -> None:
        """Hand it back."""
        self._words[_TAIL] += self._record
        self._record = 0

    def close(self) -> None:
        for view in (self._ring, self._words, self._bytes):
            view.release()
        self._map.close()
        os.close(self.fd)

    def _read(self, at: int, size: int) -> bytes:
        at &= self._mask
        data = bytes(self._ring[at : at + size])
        return data if len(data) == size else data + bytes(self._ring[: size - len(data)])


def read_online() -> set[int]:
    """The CPUs that run now."""
    cpus: set[int] = set()
    for span in ONLINE.read_text("ascii").strip().split(","):
        first, _, last = span.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def choose_size(total: int, cpus: int) -> int:
    """Bytes of one CPU's buffer: a power of two."""
    share = max(total // cpus, min(total, CPU_BYTES), PAGE)
    return 1 << share.bit_length() - 1


def _choose(heads: list[_Buffer], looked_ns: int, *, alone: bool) -> _Buffer | None:
    """The record to tell next, None to wait. ``alone``: none can be missing, every buffer shows one."""
    first = min(heads, key=_time_of)
    if first.starts or alone or first.at_ns <= looked_ns - SLACK_NS:
        return first
    return min((head for head in heads if head.starts), key=_time_of, default=None)


def _time_of(buffer: _Buffer) -> int:
    return buffer.at_ns


def _open_event(cpu: int) -> int:
    if not _NUMBER:
        raise OSError(errno.ENOSYS, f"the number of perf_event_open(2) on {platform.machine()} is not known")
    attr = ctypes.create_string_buffer(_ATTR, len(_ATTR))
    made = int(_libc.syscall(_NUMBER, attr, -1, cpu, -1, _FD_CLOEXEC))
    if made < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return made


def _explain(error: OSError, cpu: int) -> HostError:
    if error.errno in {errno.EPERM, errno.EACCES}:
        return PermissionRefused(
            "perf event array: CAP_PERFMON (before Linux 5.8 CAP_SYS_ADMIN) and CAP_IPC_LOCK are needed; run as root"
        )
    return HostError(f"perf event array: CPU {cpu}: {error.strerror or error}")
