"""Catches what C code prints while it is called: a library that says only there why something failed.

Owns C's ``stdout`` and ``stderr`` for those moments, by the variables of the C library; the descriptors 1 and 2 stay as
they are. Source: stdio(3), memfd_create(2), glibc libio/stdio.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
from collections.abc import Iterator

from appliance.errors import HostError

MAX_PRINTED = 1 << 16  # bytes
TURN_S = 5.0  # that a call is waited for
_UNBUFFERED = 2  # _IONBF of stdio.h
_lock = threading.Lock()


@contextlib.contextmanager
def caught() -> Iterator[list[str]]:
    """Lines that C code of this process prints meanwhile; they are there at the end. Raises HostError.

    None where another call has not come back for long: what this one prints goes where that one's does.
    """
    if not _lock.acquire(timeout=TURN_S):
        yield []
        return
    try:
        if not _sinks:
            _sinks.append(_make_sink())
        with _sinks[0].catch() as lines:
            yield lines
    finally:
        _lock.release()


def _make_sink() -> _Sink:
    try:
        return _Sink()
    except OSError as error:
        raise HostError(f"what a library prints cannot be caught: {error.strerror}") from None


class _Sink:
    """Takes the place of C's ``stdout`` and ``stderr`` for a while; what Python prints goes its usual way.

    LibVMI says what went wrong on standard output, among the answers of a command. The stream is never closed: libxc
    keeps the one that was ``stderr`` when it was opened. It holds `MAX_PRINTED` bytes.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.fdopen.restype = ctypes.c_void_p
        libc.setvbuf.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._taken = [ctypes.c_void_p.in_dll(libc, name) for name in ("stdout", "stderr")]
        self._fd = os.memfd_create("libvmi", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, MAX_PRINTED)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        self._stream = libc.fdopen(self._fd, b"w")
        libc.setvbuf(self._stream, None, _UNBUFFERED, 0)

    @contextlib.contextmanager
    def catch(self) -> Iterator[list[str]]:
        """Lines that C code prints meanwhile: there at the end."""
        lines: list[str] = []
        os.lseek(self._fd, 0, os.SEEK_SET)
        before = [variable.value for variable in self._taken]
        try:
            for variable in self._taken:
                variable.value = self._stream
            yield lines
        finally:
            for variable, stream in zip(self._taken, before, strict=True):
                variable.value = stream
            size = os.lseek(self._fd, 0, os.SEEK_CUR)
            lines += os.pread(self._fd, size, 0).decode(errors="replace").splitlines()


_sinks: list[_Sink] = []  # one, once it is needed
