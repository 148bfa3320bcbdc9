"""What may keep us from looking into a QEMU process: capabilities, Yama, seccomp, namespaces, the modules of lsm.py.

Reading another process's memory is a PTRACE_MODE_ATTACH access, whichever call makes it; the checks below are those
that the kernel makes, in its order. ``root`` is where /proc and /sys are, for tests.
Sources: ptrace(2), capabilities(7), process_vm_readv(2), Documentation/admin-guide/LSM/Yama.rst,
security/lockdown/lockdown.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.hosts import lsm
from appliance.hosts.lsm import Obstacle, read_text
from appliance.model import Availability

ROOT: Final = Path("/")
CAP_NET_RAW, CAP_SYS_PTRACE, CAP_SYS_ADMIN = 13, 19, 21  # include/uapi/linux/capability.h
AS_ROOT: Final = "run as root, or: systemd-run -p AmbientCapabilities=CAP_SYS_PTRACE parasight ..."
NO_ATTACH: Final = "3"  # of Yama: nobody, and it stays so until the next boot


def probe_confinement(root: Path = ROOT) -> tuple[Availability, ...]:
    """One line for each kind of confinement that this kernel has."""
    return (*_probe_yama(root), *_probe_seccomp(root), *lsm.probe(root), *_probe_lockdown(root))


def explain_refusal(pid: int, root: Path = ROOT) -> Obstacle:
    """Why process ``pid`` may not be looked into, the likeliest first; and what mends it."""
    found = next(_obstacles(pid, root), None)
    if found is not None:
        return found
    return Obstacle(
        f"the kernel refuses to look into process {pid}, and nothing that we know of explains it",
        "see: dmesg; journalctl -k --grep 'denied|DENIED'",
    )


def has_capability(bit: int, root: Path = ROOT) -> bool:
    """Whether we hold a capability, by its number."""
    return bool(int(_status("CapEff", root) or "0", 16) >> bit & 1)


def _obstacles(pid: int, root: Path) -> Iterator[Obstacle]:
    if not has_capability(CAP_SYS_PTRACE, root):
        yield Obstacle("CAP_SYS_PTRACE is missing", AS_ROOT)
    if _yama(root) == NO_ATTACH:
        yield _YAMA
    if refused := _try_process_vm_readv():
        yield _seccomp(refused)
    yield from lsm.find_obstacles(pid, root)
    mine, others = _read_link(root / "proc/self/ns/user"), _read_link(root / f"proc/{pid}/ns/user")
    if mine and others and mine != others:
        yield Obstacle(
            f"process {pid} belongs to another user namespace than ours", "start parasight outside of this container"
        )


# -- Yama --

_YAMA: Final = Obstacle(
    "kernel.yama.ptrace_scope is 3: nobody may look into another process until the next boot",
    "echo kernel.yama.ptrace_scope=1 > /etc/sysctl.d/99-parasight.conf && reboot; until then: --route libvirt",
)


def _yama(root: Path) -> str | None:
    return read_text(root / "proc/sys/kernel/yama/ptrace_scope")


def _probe_yama(root: Path) -> Iterator[Availability]:
    scope = _yama(root)
    if scope == NO_ATTACH:
        yield Availability("yama", False, _YAMA.reason, _YAMA.remedy)
    elif scope in {"1", "2"} and not has_capability(CAP_SYS_PTRACE, root):
        yield Availability("yama", False, f"ptrace_scope is {scope}: only CAP_SYS_PTRACE may look", AS_ROOT)
    else:
        yield Availability("yama", True, f"ptrace_scope is {'absent' if scope is None else scope}")


# -- seccomp --


def _seccomp(refused: int) -> Obstacle:
    return Obstacle(
        f"process_vm_readv is refused even on ourselves ({os.strerror(refused)}): a seccomp filter",
        "podman or docker: --cap-add SYS_PTRACE, or --security-opt seccomp=unconfined; "
        "systemd: SystemCallFilter=process_vm_readv",
    )


def _probe_seccomp(root: Path) -> Iterator[Availability]:
    if refused := _try_process_vm_readv():
        found = _seccomp(refused)
        yield Availability("seccomp", False, found.reason, found.remedy)
        return
    filtered = _status("Seccomp", root) == "2"
    reason = "a filter is active and lets process_vm_readv pass" if filtered else "no filter of system calls"
    yield Availability("seccomp", True, reason)


def _try_process_vm_readv() -> int:
    """Read one byte of our own; the errno, 0 where it worked. Source: process_vm_readv(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, there = ctypes.create_string_buffer(1), ctypes.create_string_buffer(b"p", 1)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(here), 1)
    remote = (ctypes.c_void_p * 2)(ctypes.addressof(there), 1)
    got = libc.process_vm_readv(os.getpid(), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return 0 if got == 1 else ctypes.get_errno() or errno.EIO


# -- lockdown --


def _probe_lockdown(root: Path) -> Iterator[Availability]:
    """Guests' memory is not the kernel's: lockdown leaves it alone. The tap by perf events may be refused."""
    found = re.search(r"\[(\w+)\]", read_text(root / "sys/kernel/security/lockdown") or "")
    if found is not None:
        more = "; perf events may be refused (tap tc+perf)" if found[1] == "confidentiality" else ""
        yield Availability(
            "lockdown", True, f"{found[1]}: guests' memory can be read all the same{more}", required=False
        )


# -- /proc --


def _status(key: str, root: Path) -> str | None:
    found = re.search(rf"^{key}:\s*(\S+)", read_text(root / "proc/self/status") or "", re.MULTILINE)
    return found[1] if found else None


def _read_link(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None
