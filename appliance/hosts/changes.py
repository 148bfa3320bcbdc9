"""Changes that one thread tells and another takes, behind a descriptor that can be waited on."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Final

from appliance.model import Change, GuestChange

MAX_CHANGES: Final = 4096
EVERYTHING: Final = GuestChange(Change.DESCRIBED)  # of any guest, in any way


class Changes:
    """What was told in the thread of libvirt's events, until somebody takes it."""

    def __init__(self) -> None:
        self.lost = False  # the connection is
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._told: deque[GuestChange] = deque(maxlen=MAX_CHANGES)
        self._changed: set[str] = set()
        self._lock = threading.Lock()

    def tell(self, change: GuestChange) -> None:
        """Queue one."""
        with self._lock:
            if self.fd < 0:
                return
            if len(self._told) == MAX_CHANGES:
                self._told.clear()
                self._told.append(EVERYTHING)
            self._told.append(change)
            if change.uuid is not None:
                self._changed.add(change.uuid)
            os.eventfd_write(self.fd, 1)

    def lose(self) -> None:
        """The connection has ended."""
        self.lost = True
        self.tell(EVERYTHING)

    def take(self) -> tuple[GuestChange, ...]:
        """All that was told, and clear the descriptor."""
        with self._lock:
            if not self._told:
                return ()
            told = tuple(self._told)
            self._told.clear()
            os.eventfd_read(self.fd)
            return told

    def take_changed(self) -> set[str]:
        """The UUIDs of domains that something was told of since the last time."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def close(self) -> None:
        """Let the descriptor go."""
        with self._lock:
            fd, self.fd = self.fd, -1
            self._told.clear()
            if fd >= 0:
                os.close(fd)
