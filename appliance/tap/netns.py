"""Opening something inside another network namespace without moving ourselves there.

setns(2) with CLONE_NEWNET moves the calling thread only; a socket stays in the namespace it was made in. So a helper
thread goes there, makes the socket and ends.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Final, TypeVar

from appliance.errors import HostError, PermissionRefused, UsageError

CLONE_NEWNET: Final = 0x40000000  # include/uapi/linux/sched.h

T = TypeVar("T")


def call_in_netns(netns: str | None, work: Callable[[], T]) -> T:
    """Run ``work`` in the network namespace behind the path ``netns`` (None: here) and return what it returns.

    Raises UsageError for a path that is no namespace, PermissionRefused without CAP_SYS_ADMIN, and what ``work``
    raises.
    """
    if netns is None:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _enter(netns)
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(netns: str) -> None:
    try:
        with Path(netns).open("rb") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(file.fileno(), CLONE_NEWNET) == 0:
                return
        number = ctypes.get_errno()
    except PermissionError as error:
        raise PermissionRefused(f"cannot open network namespace {netns}: {error.strerror}; run as root") from error
    except OSError as error:
        raise UsageError(f"cannot open network namespace {netns}: {error.strerror}") from error
    if number == 1:  # EPERM
        raise PermissionRefused(f"cannot enter network namespace {netns}: CAP_SYS_ADMIN is needed; run as root")
    raise HostError(f"cannot enter network namespace {netns}: {os.strerror(number)}")
