"""What /proc tells of a process. Everything is read-only and bounded. Source: proc(5)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
MAX_COMMAND: Final = 1 << 20
MAX_DESCRIPTORS: Final = 65536
_TICKS: Final = os.sysconf("SC_CLK_TCK")

# Distributions call the system emulator qemu-system-ARCH, qemu-kvm or kvm; qemu-ARCH alone is the user-mode one.
_QEMU: Final = re.compile(r"(qemu-system-\w+|qemu-kvm|kvm)([-.][\w.]+)?")


def iter_pids() -> Iterator[int]:
    """All processes (thread-group leaders) that we can see."""
    for name in os.listdir(PROC):  # noqa: PTH208  not pathlib: asked twice a second, for all processes
        if name.isdigit():
            yield int(name)


def is_qemu(pid: int) -> bool:
    """Whether the process is a QEMU system emulator, by its executable; by its name only where that is unreadable."""
    return read_qemu(pid) is not None


def read_qemu(pid: int) -> str | None:
    """The file name of the QEMU system emulator that a process is, None when it is none."""
    try:
        names = [os.readlink(f"{PROC}/{pid}/exe").removesuffix(" (deleted)")]  # noqa: PTH115
    except FileNotFoundError:
        return None  # a thread of the kernel, or gone
    except OSError:
        names = [*read_argv(pid)[:1], read_name(pid)]  # the kernel cuts the latter short
    return next((name for path in names if _QEMU.fullmatch(name := path.rsplit("/", 1)[-1])), None)


def read_name(pid: int) -> str:
    """``comm``, empty when the process is gone. The kernel cuts it after 15 bytes."""
    with suppress(OSError):
        return _read(pid, "comm").rstrip("\n")
    return ""


def read_argv(pid: int) -> list[str]:
    """The command line, empty for kernel threads, zombies and processes that are gone."""
    with suppress(OSError), (PROC / str(pid) / "cmdline").open("rb") as file:
        data = file.read(MAX_COMMAND)
        return [word.decode("utf-8", "replace") for word in data.removesuffix(b"\0").split(b"\0")] if data else []
    return []


def read_start_time(pid: int) -> int | None:
    """Start time in clock ticks since boot (field 22 of stat); with the pid it names one life. None for a zombie."""
    with suppress(OSError, IndexError, ValueError):
        text = _read(pid, "stat")
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in {"Z", "X"} else int(fields[19])
    return None


def read_age_s(pid: int) -> float | None:
    """How long ago the process has started; None when it is gone."""
    start = read_start_time(pid)
    return None if start is None else time.clock_gettime(time.CLOCK_BOOTTIME) - start / _TICKS


def read_cpu_s(pid: int) -> float:
    """CPU seconds that the process has used, in user and kernel mode, guests included; 0 when it is gone."""
    with suppress(OSError, IndexError, ValueError):
        text = _read(pid, "stat")
        fields = text[text.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    return 0.0


def read_user(pid: int) -> int | None:
    """The user id as which a process runs (the effective one), None when it is gone."""
    with suppress(OSError):
        found = re.search(r"^Uid:\s*\d+\s+(\d+)", _read(pid, "status"), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def read_thread_group(pid: int) -> int | None:
    """The process that a thread id belongs to, None when there is no such thread."""
    with suppress(OSError):
        found = re.search(r"^Tgid:\s*(\d+)", _read(pid, "status"), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def iter_descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Open descriptors with what they point to. Raises PermissionError where we may not look."""
    folder = f"{PROC}/{pid}/fd"
    for descriptor in sorted(map(int, os.listdir(folder)))[:MAX_DESCRIPTORS]:  # noqa: PTH208
        with suppress(FileNotFoundError):
            yield descriptor, os.readlink(f"{folder}/{descriptor}")  # noqa: PTH115


def read_interface(pid: int, descriptor: int) -> str | None:
    """The interface behind a tun/tap descriptor (``iff:`` in fdinfo, drivers/net/tun.c), None when it has none."""
    with suppress(OSError):
        text = _read(pid, f"fdinfo/{descriptor}")
        found = re.search(r"^iff:\s*(\S+)", text, re.MULTILINE)
        return found[1] if found else None
    return None


def _read(pid: int, name: str) -> str:
    """One of its files. Not by pathlib: the inventory does this some hundred times a second."""
    with open(f"{PROC}/{pid}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
        return file.read().decode("utf-8", "replace")
