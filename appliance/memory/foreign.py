"""Frames of another Xen domain, mapped for as long as one look takes: the only file that knows libxenforeignmemory.

A mapping holds the guest's pages: ballooned ones stay taken, a destroyed domain stays a zombie. So none outlives the
call that made it, none is larger than `MAX_FRAMES`, and each is read-only. A frame that could not be mapped kills who
touches it, although the call succeeded: the errors are looked at before anything else.
Sources: tools/include/xenforeignmemory.h, tools/libs/foreignmemory/linux.c (errors are negative errnos; frames that are
paged out are waited for in there), drivers/xen/privcmd.c in Linux.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from appliance.xenctl import explain, load_library, quiet_logger

MAX_FRAMES: Final = 1024  # by one mapping
LIBRARY: Final = "libxenforeignmemory.so.1"
PACKAGE: Final = "libxenforeignmemory1"

Answer = TypeVar("Answer")
Take = Callable[[int, "array[int]"], Answer]


class ForeignMemory:
    """The right to map frames of other domains. One instance belongs to one thread."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where the library is, instead of the usual places. Raises HostError, PermissionRefused."""
        self._library = load_library(LIBRARY, PACKAGE, folder)
        _declare(self._library)
        self._handle = self._library.xenforeignmemory_open(quiet_logger(), 0)
        if not self._handle:
            raise explain(ctypes.get_errno(), "memory of other Xen domains cannot be mapped")

    def look(self, domid: int, frames: Sequence[int], take: Take[Answer]) -> Answer:
        """Map the frames, call ``take`` with the address and an errno for each (0: it is there), unmap them.

        ``take`` must copy what it wants. Raises OSError when the mapping as a whole is refused, or cannot be undone.
        """
        count = len(frames)
        if not 0 < count <= MAX_FRAMES:
            raise ValueError(f"{count} frames at once")
        if not self._handle:
            raise OSError(errno.EBADF, "closed")
        numbers, errors = array("Q", frames), array("i", bytes(4 * count))
        address = self._library.xenforeignmemory_map(
            self._handle, domid, mmap.PROT_READ, count, numbers.buffer_info()[0], errors.buffer_info()[0]
        )
        if not address:
            raise OSError(ctypes.get_errno(), "xenforeignmemory_map")
        try:
            return take(address, errors)
        finally:
            if self._library.xenforeignmemory_unmap(self._handle, address, count):
                raise OSError(ctypes.get_errno(), "xenforeignmemory_unmap")

    def close(self) -> None:
        """Give the handle back; may be called twice."""
        if self._handle:
            self._library.xenforeignmemory_close(self._handle)
            self._handle = None


def _declare(library: ctypes.CDLL) -> None:
    """Result and argument types, so that no pointer is cut to 32 bits."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.xenforeignmemory_open.restype = pointer
    library.xenforeignmemory_open.argtypes = [pointer, ctypes.c_uint]
    library.xenforeignmemory_close.argtypes = [pointer]
    library.xenforeignmemory_map.restype = pointer
    library.xenforeignmemory_map.argtypes = [pointer, ctypes.c_uint32, ctypes.c_int, size, pointer, pointer]
    library.xenforeignmemory_unmap.argtypes = [pointer, pointer, size]
