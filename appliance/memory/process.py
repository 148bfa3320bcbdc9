"""The memory of another process, read-only: ``/proc/PID/mem`` for one read, ``process_vm_readv`` for many.

Owns: one descriptor opened O_RDONLY, which pins the process's address space (a pid that is reused meanwhile is never
read through it), and the batching of scattered reads.
Sources: proc(5), process_vm_readv(2), Linux fs/proc/base.c (mem_rw returns 0 once the address space is gone).
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise, repeat
from pathlib import Path

from appliance.errors import GuestGone, HostError, PermissionRefused, UnreadableMemory, UsageError

IOV_MAX = 1024  # include/uapi/linux/uio.h UIO_MAXIOV
BATCH_BYTES = 8 << 20  # bytes gathered by one system call

_REMEDY = (
    "run as root or with CAP_SYS_PTRACE; where root is refused too, look at kernel.yama.ptrace_scope (3 forbids it), "
    "at the AppArmor or SELinux profile of this command, and at the container's seccomp filter"
)

_libc = ctypes.CDLL(None, use_errno=True)
_process_vm_readv = _libc.process_vm_readv
_process_vm_readv.restype = ctypes.c_ssize_t
_process_vm_readv.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]


class ProcessMemory:
    """The address space of one live process. ``name`` is how people know it, for messages."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.started = read_start_time(pid)
        try:
            self.fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            raise PermissionRefused(f"the memory of process {pid} may not be read: {_REMEDY}") from None
        except (FileNotFoundError, ProcessLookupError):
            raise UsageError(f"there is no process {pid}") from None
        except OSError as error:
            raise HostError(f"the memory of process {pid} cannot be opened: {error.strerror}") from None
        try:
            self._pidfd = open_life(pid, self.started)
        except BaseException:
            os.close(self.fd)
            raise
        self._poll = select.poll()
        self._poll.register(self._pidfd, select.POLLIN)
        self._buffer = array("B", bytes(1 << 16))
        self._local = array("Q", (self._buffer.buffer_info()[0], 0))

    def read(self, hva: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        try:
            data = os.pread(self.fd, size, hva)
        except OSError as error:
            self.check_alive()
            raise UnreadableMemory(hva, size, str(error.strerror)) from None
        return data if len(data) == size else self._read_rest(hva, size, data)

    def readv(self, spans: bytes) -> list[bytes | None]:
        """Read many spans, given as packed pairs of 64-bit ``hva, size``; None where one is unreadable.

        About 0.3 us each, most of it the kernel's. Raises GuestGone.
        """
        found: list[bytes | None] = []
        while spans:
            part = spans[: 16 * IOV_MAX]
            sizes = array("Q", part)[1::2]
            if sum(sizes) > BATCH_BYTES:
                sizes = sizes[: max(1, bisect_right(list(accumulate(sizes)), BATCH_BYTES))]
                part = part[: 16 * len(sizes)]
            pieces = self._gather(part, sizes)
            found = found + pieces if found else pieces
            spans = spans[16 * len(pieces) :]
        return found

    def read_scattered(self, hvas: Sequence[int], size: int) -> list[bytes | None]:
        """Read ``size`` bytes at each address."""
        return self.readv(pack(zip(hvas, repeat(size), strict=False), len(hvas)))

    def check_alive(self) -> None:
        """Raise GuestGone unless the very process that was opened is still there."""
        if self.fd < 0 or self._poll.poll(0):  # readable once the process has exited, also as a zombie
            raise GuestGone(f"process {self.pid} has ended")

    def close(self) -> None:
        """Release the descriptor; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._pidfd)
            self.fd = -1

    def _gather(self, remote: bytes, sizes: array[int]) -> list[bytes | None]:
        """One system call: the results lie in one buffer, then cut up. None ends them at an unreadable span."""
        count, total = len(sizes), sum(sizes)
        if not total:
            return [b""] * count
        if total > len(self._buffer):
            self._buffer = array("B", bytes(total))
            self._local[0] = self._buffer.buffer_info()[0]
        self._local[1] = total
        got = _process_vm_readv(self.pid, self._local.buffer_info()[0], 1, remote, count, 0)
        if got == total:
            # Our descriptor pins the address space: while it can be read, the pid was not given to another process.
            if os.pread(self.fd, 1, int.from_bytes(remote[:8], "little")) == b"":
                raise GuestGone(f"process {self.pid} has ended")
            return cut(memoryview(self._buffer)[:total], sizes)
        self.check_alive()
        whole = min(bisect_right(list(accumulate(sizes)), max(got, 0)), count - 1)
        return [*cut(memoryview(self._buffer)[: sum(sizes[:whole])], sizes[:whole]), None]

    def _read_rest(self, hva: int, size: int, data: bytes) -> bytes:
        """Continue a short read (the kernel may stop at a mapping's end or after 2 GiB)."""
        parts, got = [data], len(data)
        while got < size and parts[-1]:
            try:
                parts.append(os.pread(self.fd, size - got, hva + got))
            except OSError:
                break
            got += len(parts[-1])
        if got == size:
            return b"".join(parts)
        self.check_alive()
        raise UnreadableMemory(hva, size, "end of the process's mapping")


def pack(spans: Iterable[tuple[int, int]], count: int) -> bytes:
    """Pairs of unsigned 64-bit numbers. Raises struct.error where one is out of range."""
    return struct.pack(f"<{2 * count}Q", *chain.from_iterable(spans))


def cut(buffer: memoryview, sizes: array[int]) -> list[bytes | None]:
    """Cut one buffer into pieces of the given sizes."""
    if not sizes:
        return []
    first = sizes[0]
    if first and is_uniform(sizes):
        return list(struct.unpack(f"{first}s" * len(sizes), buffer))
    data, ends = bytes(buffer), [0, *accumulate(sizes)]
    return [data[start:end] for start, end in pairwise(ends)]


def is_uniform(sizes: array[int]) -> bool:
    """Whether all sizes are equal; much cheaper than looking at each."""
    return sizes.tobytes() == sizes[:1].tobytes() * len(sizes)


def open_life(pid: int, started: int) -> int:
    """A descriptor of the process that started then: readable once it has ended. Raises GuestGone, HostError."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise GuestGone(f"process {pid} has ended") from None
    except OSError as error:
        raise HostError(f"process {pid} cannot be kept in sight: {error.strerror}") from None
    try:
        if read_start_time(pid) == started:
            return pidfd
    except UsageError:
        pass  # it ended just now
    os.close(pidfd)
    raise GuestGone(f"process {pid} has ended")


def read_start_time(pid: int) -> int:
    """Start time of a process in clock ticks since the host's boot (proc(5), field 22 of stat).

    Raises UsageError when there is no such process (a zombie counts as none).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise UsageError(f"there is no process {pid}") from None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in b"ZX":
        raise UsageError(f"process {pid} has ended")
    return int(fields[19])
