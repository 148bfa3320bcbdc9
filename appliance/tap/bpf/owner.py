"""Which life of which process put something on a port.

Pids are reused, so the start time is part of it, and the pid namespace, since an appliance in a container counts for
itself. Sources: proc_pid_stat(5), proc_pid_status(5), pid_namespaces(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final, Self

INITIAL_PID_NS: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h: from here every process is seen
MAX_PROCESSES: Final = 65536
PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Owner:
    """A process: its pid and start time (clock ticks after boot) as told in its pid namespace (inode number)."""

    pid: int
    started: int
    pid_ns: int

    @classmethod
    def me(cls) -> Self:
        """Describe the calling process."""
        _, started = _read_stat("self") or ("", 0)
        return cls(os.getpid(), started, _our_pid_ns())

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Describe another process that we see, by its number here; None when there is no such process."""
        stat = _read_stat(str(pid))
        return cls(pid, stat[1], _our_pid_ns()) if stat is not None and _proc_is_ours() else None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read what ``str`` made; None when it is no such thing."""
        numbers = text.split(":")
        if len(numbers) != 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
            return None
        return cls(*map(int, numbers))

    def __str__(self) -> str:
        return f"{self.pid}:{self.started}:{self.pid_ns}"

    def find(self) -> int | None:
        """Its pid in our pid namespace, None when it is gone (a zombie is) or cannot be seen from here."""
        if self.pid_ns == _our_pid_ns() and _proc_is_ours():
            return self.pid if self._is_it(self.pid) else None
        return next((pid for pid in _iter_pids(self.pid_ns, self.pid) if self._is_it(pid)), None)

    def is_gone(self) -> bool:
        """Whether that life is certainly over: of a pid namespace that we cannot see into, nothing is certain."""
        if self.find() is not None:
            return False
        return _our_pid_ns() in {self.pid_ns, INITIAL_PID_NS}

    def _is_it(self, pid: int) -> bool:
        stat = _read_stat(str(pid))
        return stat is not None and stat[0] not in {"Z", "X"} and stat[1] == self.started


def _read_stat(pid: str) -> tuple[str, int] | None:
    """State and start time (fields 3 and 22), None when there is no such process."""
    with suppress(OSError, IndexError, ValueError):
        fields = (PROC / pid / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return None


@lru_cache(1)
def _our_pid_ns() -> int:
    try:
        return (PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _proc_is_ours() -> bool:
    """Whether /proc counts as we do; it may be that of another pid namespace."""
    try:
        return (PROC / "self").readlink().name == str(os.getpid())
    except OSError:
        return False


def _iter_pids(pid_ns: int, inner: int) -> Iterator[int]:
    """Processes which are number ``inner`` in that pid namespace."""
    entries = (entry for entry in PROC.iterdir() if entry.name.isdecimal())
    for entry in islice(entries, MAX_PROCESSES):
        with suppress(OSError):
            if (entry / "ns/pid").stat().st_ino == pid_ns and _inner_pid(entry) == inner:
                yield int(entry.name)


def _inner_pid(entry: Path) -> int:
    """The last number of NSpid: the pid in the innermost namespace."""
    lines = (entry / "status").read_text("ascii", "replace").splitlines()
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), 0)
