"""Is this host ready? One probe per thing that can be missing, each with the exact command that mends it.

Nothing here changes the host. Sources: capabilities(7), Documentation/admin-guide/LSM/Yama.rst, packet(7).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from pathlib import Path

from appliance.hosts.qemu import find_guests
from appliance.model import Availability

_CAP_SYS_PTRACE, _CAP_NET_RAW, _CAP_SYS_ADMIN = 19, 13, 21  # include/uapi/linux/capability.h
_ETH_P_ALL = 0x0003


def probe_host() -> tuple[Availability, ...]:
    """Run every probe, the required ones first."""
    return (
        _python(),
        _machine(),
        _capability("reading guests' memory", _CAP_SYS_PTRACE, "CAP_SYS_PTRACE"),
        _yama(),
        _packets(),
        _namespaces(),
        _guests(),
        _libvirt(),
        _kvm(),
    )


def _python() -> Availability:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Availability("python", ok, f"Python {version}", None if ok else "apt install python3.11 (or newer)")


def _machine() -> Availability:
    machine = platform.machine()
    ok = machine == "x86_64" and sys.platform == "linux"
    return Availability(
        "host", ok, f"{sys.platform} {machine}", None if ok else "run Parasight on an x86-64 Linux hypervisor"
    )


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _capability(name: str, bit: int, word: str) -> Availability:
    if _effective_capabilities() >> bit & 1:
        return Availability(name, True, f"{word} is held")
    return Availability(
        name, False, f"{word} is missing", "run as root, or: systemd-run -p AmbientCapabilities=" + word
    )


def _yama() -> Availability:
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    value = scope.read_text().strip() if scope.exists() else "absent"
    ok = value in ("absent", "0", "1", "2")  # 1 and 2 admit CAP_SYS_PTRACE, 3 admits nobody
    return Availability(
        "yama", ok, f"ptrace_scope is {value}", None if ok else "sysctl kernel.yama.ptrace_scope=1 and reboot"
    )


def _packets() -> Availability:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)).close()
    except OSError as error:
        return Availability(
            "packets", False, f"no packet socket: {error.strerror}", "run as root, or grant CAP_NET_RAW"
        )
    return Availability("packets", True, "packet sockets can be opened")


def _namespaces() -> Availability:
    ok = bool(_effective_capabilities() >> _CAP_SYS_ADMIN & 1)
    reason = (
        "ports in other network namespaces can be opened"
        if ok
        else "only ports in this network namespace can be opened"
    )
    return Availability(
        "namespaces", ok, reason, None if ok else "grant CAP_SYS_ADMIN, or start inside that namespace", required=False
    )


def _guests() -> Availability:
    found = find_guests()
    unseen = [f"{one.id.target}: {note}" for one in found for note in one.notes]
    reason = f"{len(found)} running QEMU guests" + (f"; {'; '.join(unseen)}" if unseen else "")
    return Availability(
        "guests", bool(found), reason, None if found else "start a guest; then: parasight guests", required=False
    )


def _libvirt() -> Availability:
    if importlib.util.find_spec("libvirt") is not None:
        return Availability("libvirt", True, "the Python binding is installed", required=False)
    daemon = shutil.which("virsh") is not None or Path("/run/libvirt/libvirt-sock").exists()
    reason = (
        "libvirt runs here, but its Python binding is missing" if daemon else "not installed; guests are named qemu:PID"
    )
    return Availability(
        "libvirt", not daemon, reason, "apt install python3-libvirt" if daemon else None, required=False
    )


def _kvm() -> Availability:
    device = Path("/dev/kvm")
    ok = os.access(device, os.R_OK | os.W_OK)
    return Availability(
        "kvm", ok, "/dev/kvm is there" if ok else "no /dev/kvm: guests run under emulation", required=False
    )
