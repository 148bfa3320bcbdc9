"""What /proc tells of a process. Everything is read-only and bounded. Source: proc(5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
MAX_COMMAND: Final = 1 << 20
MAX_DESCRIPTORS: Final = 65536

# Distributions call the system emulator qemu-system-ARCH, qemu-kvm or kvm; qemu-ARCH alone is the user-mode one.
_QEMU: Final = re.compile(r"(qemu-system-\w+|qemu-kvm|kvm)([-.][\w.]+)?")


def iter_pids() -> Iterator[int]:
    """All processes (thread-group leaders) that we can see."""
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def is_qemu(pid: int) -> bool:
    """Whether the process is a QEMU system emulator, by its executable; by its name only where that is unreadable."""
    return read_qemu(pid) is not None


def read_qemu(pid: int) -> str | None:
    """The file name of the QEMU system emulator that a process is, None when it is none."""
    try:
        names = [str((PROC / str(pid) / "exe").readlink()).removesuffix(" (deleted)")]
    except OSError:
        names = [read_name(pid), *read_argv(pid)[:1]]
    return next((name for path in names if _QEMU.fullmatch(name := path.rsplit("/", 1)[-1])), None)


def read_name(pid: int) -> str:
    """``comm``, empty when the process is gone. The kernel cuts it after 15 bytes."""
    with suppress(OSError):
        return (PROC / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
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
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in {"Z", "X"} else int(fields[19])
    return None


def read_thread_group(pid: int) -> int | None:
    """The process that a thread id belongs to, None when there is no such thread."""
    with suppress(OSError):
        found = re.search(r"^Tgid:\s*(\d+)", (PROC / str(pid) / "status").read_text(errors="replace"), re.MULTILINE)
        return int(found[1]) if found else None
    return None


def iter_descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """Open descriptors with what they point to. Raises PermissionError where we may not look."""
    entries = sorted((PROC / str(pid) / "fd").iterdir(), key=lambda entry: int(entry.name))
    for entry in entries[:MAX_DESCRIPTORS]:
        with suppress(FileNotFoundError):
            yield int(entry.name), str(entry.readlink())


def read_interface(pid: int, descriptor: int) -> str | None:
    """The interface behind a tun/tap descriptor (``iff:`` in fdinfo, drivers/net/tun.c), None when it has none."""
    with suppress(OSError):
        text = (PROC / str(pid) / "fdinfo" / str(descriptor)).read_text(errors="replace")
        found = re.search(r"^iff:\s*(\S+)", text, re.MULTILINE)
        return found[1] if found else None
    return None
