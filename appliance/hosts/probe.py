"""Is this host ready? One probe per thing that can be missing, each with the exact command that mends it.

Nothing here changes the host, and nothing waits: what may hang is asked by whoever calls, with a deadline. ``root`` is
where /proc, /sys and /dev are. Sources: capabilities(7), packet(7), network_namespaces(7).
"""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from appliance.hosts.confinement import (
    AS_ROOT,
    CAP_SYS_ADMIN,
    CAP_SYS_PTRACE,
    ROOT,
    has_capability,
    probe_confinement,
)
from appliance.hosts.kvm import DEVICE, run_trial
from appliance.hosts.probe_libvirt import probe_libvirt
from appliance.hosts.probe_xen import is_xen, probe_xen
from appliance.model import Availability, GuestInfo

MAX_NOTES = 24  # of guests, told one by one
_ETH_P_ALL = 0x0003


def probe_host(
    guests: Sequence[GuestInfo] = (), troubles: Sequence[str] = (), root: Path = ROOT
) -> tuple[Availability, ...]:
    """Run every probe, the required ones first. ``guests`` and ``troubles`` are what the inventory has found."""
    return (
        _python(),
        _machine(),
        _memory(root),
        *probe_confinement(root),
        _packets(),
        _namespaces(root),
        *describe_guests(guests, [one for one in troubles if not one.startswith("libvirt")]),
        probe_libvirt([one for one in troubles if one.startswith("libvirt")], root),
        *probe_xen(root),
        probe_kvm(root),
    )


def describe_guests(guests: Sequence[GuestInfo], troubles: Sequence[str] = ()) -> Iterator[Availability]:
    """How many guests are here, and one line for each thing of them that cannot be seen."""
    kinds = [(sum(one.hypervisor == kind for one in guests), name) for kind, name in (("qemu", "QEMU"), ("xen", "Xen"))]
    count = ", ".join(f"{number} of {name}" for number, name in kinds if number)
    here = f"{len(guests)} {'guest runs' if len(guests) == 1 else 'guests run'} here ({count})"
    reason = "; ".join([here if guests else "no guest runs here", *troubles])
    remedy = None if guests else "start a guest; then: parasight guests"
    yield Availability("guests", bool(guests) and not troubles, reason, remedy, required=False)
    unseen = [(one, note) for one in guests for note in one.notes]
    for one, note in unseen[:MAX_NOTES]:
        yield Availability(f"guest {one.id.target}", False, note, required=False)
    if len(unseen) > MAX_NOTES:
        yield Availability(
            "guests unseen", False, f"{len(unseen) - MAX_NOTES} more notes", "parasight guests", required=False
        )


def probe_kvm(root: Path = ROOT, trial: Callable[[str], str] = run_trial) -> Availability:
    """Whether guests run on KVM here: ``trial`` runs one and says why it did not run."""
    device = root / DEVICE.lstrip("/")
    if is_xen(root):
        return Availability("kvm", True, "not asked: guests run on Xen", required=False)
    if not device.exists():
        reason, remedy = "no /dev/kvm: guests run under emulation", "modprobe kvm_intel || modprobe kvm_amd"
        return Availability("kvm", False, reason, remedy, required=False)
    try:
        device.open("rb").close()
    except OSError as error:
        reason = f"/dev/kvm cannot be opened ({error.strerror}), so whether it works is not known"
        return Availability("kvm", False, reason, "run as root, or: usermod -aG kvm $USER", required=False)
    if why := trial(str(device)):
        reason = f"/dev/kvm is there and does not work: {why}"
        return Availability("kvm", False, reason, "run guests with -accel tcg; see: dmesg | grep kvm", required=False)
    return Availability("kvm", True, "a guest of three instructions ran on it", required=False)


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


def _memory(root: Path) -> Availability:
    name, word = "reading guests' memory", "CAP_SYS_PTRACE"
    if has_capability(CAP_SYS_PTRACE, root):
        return Availability(name, True, f"{word} is held")
    return Availability(name, False, f"{word} is missing", AS_ROOT)


def _packets() -> Availability:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)).close()
    except OSError as error:
        return Availability(
            "packets", False, f"no packet socket: {error.strerror}", "run as root, or grant CAP_NET_RAW"
        )
    return Availability("packets", True, "packet sockets can be opened")


def _namespaces(root: Path) -> Availability:
    ok = has_capability(CAP_SYS_ADMIN, root)
    reason = (
        "ports in other network namespaces can be opened"
        if ok
        else "only ports in this network namespace can be opened"
    )
    return Availability(
        "namespaces", ok, reason, None if ok else "grant CAP_SYS_ADMIN, or start inside that namespace", required=False
    )
