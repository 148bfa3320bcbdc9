"""bpf(2) by ctypes: maps and programs, nothing else. No libbpf on the host.

Every byte of the attribute behind the last field that a command uses must be zero, else the kernel answers EINVAL: so
each command packs its own. Sources: include/uapi/linux/bpf.h (``union bpf_attr``), bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from struct import pack
from typing import Final

_NUMBER: Final = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 0)  # asm/unistd.h
MAP_CREATE, MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, PROG_LOAD, PROG_TEST_RUN = 0, 1, 2, 3, 5, 10
MAP_LOOKUP_BATCH, MAP_DELETE_BATCH = 24, 27
PROG_TYPE_SOCKET_FILTER, PROG_TYPE_SCHED_CLS = 1, 3
LOG_BYTES: Final = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class VerifierError(OSError):
    """The kernel refused a program; the end of the verifier's log says why."""


def bpf(command: int, attr: bytes) -> tuple[int, bytes]:
    """One call; return its result and the attribute as the kernel left it. Raises OSError."""
    if not _NUMBER:
        raise OSError(errno.ENOSYS, f"the number of bpf(2) on {platform.machine()} is not known")
    buffer = ctypes.create_string_buffer(attr, len(attr))
    result = _libc.syscall(_NUMBER, command, buffer, len(attr))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result, buffer.raw


def raise_memlock() -> None:
    """Before Linux 5.11 maps count as locked memory; without the right to raise the limit, creation tells."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Map:
    """One map and its descriptor."""

    def __init__(self, name: str, kind: int, key_size: int, value_size: int, entries: int, flags: int = 0) -> None:
        self.name, self.key_size, self.value_size, self.entries = name, key_size, value_size, entries
        attr = pack("=IIIII", kind, key_size, value_size, entries, flags)
        try:
            self.fd = bpf(MAP_CREATE, attr + pack("=II16s", 0, 0, name.encode()[:15]))[0]
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.E2BIG}:
                raise
            self.fd = bpf(MAP_CREATE, attr)[0]  # names came with Linux 4.15
        self._key = ctypes.create_string_buffer(max(key_size, 1))
        self._value = ctypes.create_string_buffer(max(value_size, 1))
        self._pair = pack("=IIQQ", self.fd, 0, ctypes.addressof(self._key), ctypes.addressof(self._value))

    def lookup(self, key: bytes, size: int | None = None) -> bytes | None:
        """Return the value, None when there is none. ``size``: of all CPUs' values of a per-CPU map."""
        self._key.raw = key
        value = self._value if size is None else ctypes.create_string_buffer(size)
        attr = self._pair if size is None else self._pair[:16] + pack("=Q", ctypes.addressof(value))
        try:
            bpf(MAP_LOOKUP, attr)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Set it."""
        self._key.raw, self._value.raw = key, value
        bpf(MAP_UPDATE, self._pair)

    def delete(self, key: bytes) -> bool:
        """Remove it; whether it was there."""
        self._key.raw = key
        try:
            bpf(MAP_DELETE, self._pair[:16])
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def read_batches(self, count: int = 4096) -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys and values of a hash map, about ``count`` at a time; bounded by the size of the map."""
        keys = ctypes.create_string_buffer(self.key_size * count)
        values = ctypes.create_string_buffer(self.value_size * count)
        cursor = ctypes.create_string_buffer(max(self.key_size, 8))
        here = ctypes.addressof(cursor)
        before, left = 0, 2 * self.entries
        while left > 0:
            attr = pack("=QQQQII", before, here, ctypes.addressof(keys), ctypes.addressof(values), count, self.fd)
            try:
                found, last = _batch(MAP_LOOKUP_BATCH, attr)
            except OSError as error:
                if error.errno != errno.ENOSPC or count >= self.entries:  # a bucket larger than the batch
                    raise
                count *= 4
                keys = ctypes.create_string_buffer(self.key_size * count)
                values = ctypes.create_string_buffer(self.value_size * count)
                continue
            if found:
                yield keys.raw[: found * self.key_size], values.raw[: found * self.value_size]
            if last:
                return
            left -= max(found, 1)
            before = here

    def delete_batch(self, keys: list[bytes]) -> None:
        """Remove many; those that are gone already do not matter."""
        while keys:
            blob = b"".join(keys)
            buffer = ctypes.create_string_buffer(blob, len(blob))
            attr = pack("=QQQQII", 0, 0, ctypes.addressof(buffer), 0, len(keys), self.fd)
            done, missing = _batch(MAP_DELETE_BATCH, attr)
            if not missing:
                return
            keys = keys[done + 1 :]  # it stops at the first key that is not there

    def close(self) -> None:
        """Give the descriptor back; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _batch(command: int, attr: bytes) -> tuple[int, bool]:
    """How many entries were done, and whether ENOENT ended it."""
    attr += bytes(16)  # elem_flags, flags
    buffer = ctypes.create_string_buffer(attr, len(attr))
    result = _libc.syscall(_NUMBER, command, buffer, len(attr))
    number = ctypes.get_errno() if result < 0 else 0
    if number not in {0, errno.ENOENT}:
        raise OSError(number, os.strerror(number))
    return int.from_bytes(buffer.raw[32:36], "little"), number == errno.ENOENT


def load_program(name: str, instructions: bytes, license_name: bytes, kind: int = PROG_TYPE_SCHED_CLS) -> int:
    """Load a program; return its descriptor. Raises VerifierError with the verifier's words, OSError."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    words = ctypes.create_string_buffer(license_name)
    attr = pack("=IIQQ", kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(words))
    tail = pack("=II16s", 0, 0, name.encode()[:15])
    try:
        return bpf(PROG_LOAD, attr + pack("=IIQ", 0, 0, 0) + tail)[0]
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EINVAL, errno.E2BIG}:
            raise
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        return bpf(PROG_LOAD, attr + pack("=IIQ", 1, LOG_BYTES, ctypes.addressof(log)))[0]
    except OSError as error:
        text = log.value.decode("utf-8", "replace").strip()
        raise VerifierError(error.errno, f"{name}: {error.strerror}: {text[-2000:] or 'no log'}") from error


def count_cpus() -> int:
    """How many CPUs a per-CPU value has: all that may ever come."""
    text = Path("/sys/devices/system/cpu/possible").read_text("ascii").strip()
    return int(text.replace(",", "-").rpartition("-")[2]) + 1 if text else os.cpu_count() or 1


def run_program(fd: int, data: bytes, context: bytes) -> int:
    """Run a tc program once on a frame; ``context`` is a ``struct __sk_buff``, cut short. Return what it returns.

    Only ``cb`` of the context is looked at since Linux 5.2. Raises OSError.
    """
    frame = ctypes.create_string_buffer(data, len(data))
    words = ctypes.create_string_buffer(context, len(context))
    attr = pack(
        "=IIIIQQIIIIQQ", fd, 0, len(data), 0, ctypes.addressof(frame), 0, 0, 0, len(context), 0,
        ctypes.addressof(words), 0,
    )  # fmt: skip
    _, after = bpf(PROG_TEST_RUN, attr)
    return int.from_bytes(after[4:8], "little", signed=True)
