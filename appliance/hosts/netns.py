"""In which network namespace a guest's port really is.

The tap may have been made in QEMU's own namespace or handed in from another one, and several namespaces may have an
interface of that name. The kernel tells exactly: TUNGETDEVNETNS (Linux 5.2) on a duplicate of QEMU's descriptor
(pidfd_getfd(2), Linux 5.6), which changes nothing. Where that is refused, the first namespace that has the name.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Final, TypeVar

from appliance.hosts.proc import PROC, iter_pids

CLONE_NEWNET: Final = 0x40000000
SYS_PIDFD_GETFD: Final = 438  # the same number on every architecture
TUNGETDEVNETNS: Final = 0x54E3  # include/uapi/linux/if_tun.h: _IO('T', 227)
TUNGETIFF: Final = 0x800454D2  # include/uapi/linux/if_tun.h: _IOR('T', 210, unsigned int); a struct ifreq is written
MAX_PROCESSES: Final = 8192
OURS: Final = "/proc/self/ns/net"

T = TypeVar("T")


def find_port(pid: int, ifname: str, descriptor: int | None) -> tuple[str | None, int] | None:
    """Find the interface of QEMU ``pid``: ``(path of its namespace or None for ours, ifindex)``, None when nowhere."""
    exact = find_netns(pid, descriptor) if descriptor is not None else None
    for path in iter_namespaces(pid):
        if exact is not None and read_inode(path) != exact:
            continue
        if (index := find_index(path, ifname)) is not None:
            return path, index
    return None


def find_index(netns: str | None, ifname: str) -> int | None:
    """The index of an interface in a namespace, None when it is not there."""
    with suppress(OSError):
        return call_in(netns, lambda: socket.if_nametoindex(ifname))
    return None


def find_interface(netns: str | None, index: int) -> str | None:
    """The name of the interface with this index in a namespace, None when it is not there."""
    with suppress(OSError):
        return call_in(netns, lambda: socket.if_indextoname(index))
    return None


def iter_namespaces(pid: int) -> Iterator[str | None]:
    """Paths to distinct network namespaces: QEMU's own, ours (None), the named ones, those of other processes."""
    ours = read_inode(OURS)
    seen: set[int] = set()
    named = sorted(str(path) for place in ("/run/netns", "/run/docker/netns") for path in _entries(place))
    others = (f"/proc/{other}/ns/net" for _, other in zip(range(MAX_PROCESSES), iter_pids(), strict=False))
    for source in ((f"/proc/{pid}/ns/net", OURS), named, others):
        for path in source:
            inode = read_inode(path)
            if inode is not None and inode not in seen:
                seen.add(inode)
                yield None if inode == ours else path


def read_inode(path: str | None) -> int | None:
    """Which namespace a path leads to: the inode number is its identity."""
    with suppress(OSError):
        return Path(path or OURS).stat().st_ino
    return None


def call_in(netns: str | None, work: Callable[[], T]) -> T:
    """Run ``work`` inside a network namespace, in a thread of its own. Raises OSError."""
    if netns is None:
        return work()
    results: list[T] = []
    errors: list[OSError] = []

    def run() -> None:
        try:
            with Path(netns).open("rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {netns}")
            results.append(work())
        except OSError as error:
            errors.append(error)

    thread = Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if not results:
        raise errors[0]
    return results[0]


def _entries(place: str) -> list[Path]:
    with suppress(OSError):
        return list((PROC.parent / place).iterdir())
    return []


def find_netns(pid: int, descriptor: int) -> int | None:
    """Inode of the namespace that the device of a tap descriptor is in now, None where that is not told."""
    with suppress(OSError), _copied(pid, descriptor) as copy:
        namespace = fcntl.ioctl(copy, TUNGETDEVNETNS)
        try:
            return os.fstat(namespace).st_ino
        finally:
            os.close(namespace)
    return None


def find_name(pid: int, descriptor: int) -> str | None:
    """The name of the device of a tap or macvtap descriptor, None where that is not told."""
    with suppress(OSError), _copied(pid, descriptor) as copy:
        return fcntl.ioctl(copy, TUNGETIFF, bytes(40))[:16].rstrip(b"\0").decode("ascii", "replace")
    return None


@contextmanager
def _copied(pid: int, descriptor: int) -> Iterator[int]:
    """A duplicate of another process' descriptor. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    try:
        yield copy
    finally:
        os.close(copy)
