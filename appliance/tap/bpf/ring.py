"""The consumer of a BPF ring buffer, by mmap: no system call for a record that waits.

Two pages of positions, then the data, mapped twice in a row so that no record is ever split. Sources:
kernel/bpf/ringbuf.c, Documentation/bpf/ringbuf.rst. The kernel publishes a position after its data; on x86 loads and
stores keep their order, elsewhere the interpreter's own work between two accesses has to do.
"""

from __future__ import annotations

import mmap
import select
from collections.abc import Iterator
from typing import Final

PAGE: Final = mmap.PAGESIZE
BUSY: Final = 1 << 31  # BPF_RINGBUF_BUSY_BIT
DISCARD: Final = 1 << 30
_LENGTH: Final = DISCARD - 1


class Ring:
    """Records of one ring buffer, read by one thread. ``size`` is the map's ``max_entries``."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._mask = fd, size - 1
        self._consumer = mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._rest = mmap.mmap(fd, PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE)
        self._read = memoryview(self._consumer).cast("Q")
        self._bytes = memoryview(self._rest)
        self._written = self._bytes[:8].cast("Q")
        self._words = self._bytes[PAGE:].cast("I")
        self.data = self._bytes[PAGE:]
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @property
    def ready(self) -> bool:
        """Whether a record waits."""
        return self._read[0] != self._written[0]

    def fileno(self) -> int:
        """Readable while records wait."""
        return self._fd

    def wait(self, timeout_s: float) -> bool:
        """Wait for a record."""
        return self.ready or bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def records(self, limit: int) -> Iterator[int]:
        """Yield where in ``data`` at most ``limit`` records begin; those told are handed back at the end, together.

        The kernel wakes a reader that has caught up; one in the middle of a batch need not be woken for each record.
        """
        at, end = self._read[0], self._written[0]
        words, mask = self._words, self._mask
        try:
            while at != end and limit > 0:
                here = at & mask
                head = words[here >> 2]
                if head & BUSY:
                    return
                at += ((head & _LENGTH) + 15) & ~7
                limit -= 1
                if not head & DISCARD:
                    yield here + 8
        finally:
            self._read[0] = at

    def close(self) -> None:
        """Unmap; may be called twice."""
        for view in (self.data, self._words, self._written, self._bytes, self._read):
            view.release()
        self._rest.close()
        self._consumer.close()
