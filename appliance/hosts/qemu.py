"""The QEMU guests of this host, whoever started them: identity, size, network ports (P1, P2).

A guest is found by its process alone. Its ports are the tap descriptors that QEMU holds, so that hot-plugged ones
count and a command line that names none misleads nobody. What has no port is said in ``notes``: silence would look
like safety.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.hosts import proc
from appliance.hosts.arguments import NetDevice, parse_arguments
from appliance.hosts.netns import find_interface, find_port, iter_namespaces
from appliance.hosts.switch import explain_switch, read_switch
from appliance.hosts.unreadable import emulated, explain_unreadable
from appliance.hosts.untappable import explain_untappable
from appliance.model import GuestChange, GuestId, GuestInfo, GuestPort

_MACVTAP: Final = re.compile(r"/dev/tap(\d+)$")  # the number is the interface's index (drivers/net/macvtap.c)


class QemuSource:
    """The QEMU processes of this host: implements `ports.GuestSource`."""

    name = "qemu"

    def find_guests(self) -> list[GuestInfo]:
        """Every QEMU guest that runs here and that we may look at, by pid."""
        return find_guests()

    def fileno(self) -> int:
        """Nothing tells of processes: they are looked for again."""
        return -1

    def changes(self) -> tuple[GuestChange, ...]:
        """Nothing is told."""
        return ()

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class _Tap:
    """A port as QEMU holds it."""

    ifname: str
    netns: str | None
    ifindex: int | None
    fds: tuple[int, ...]


def find_guests() -> list[GuestInfo]:
    """Every QEMU guest that runs here and that we may look at, by pid."""
    guests = []
    for pid in sorted(proc.iter_pids()):
        if proc.is_qemu(pid) and (argv := proc.read_argv(pid)) and parse_arguments(argv).machine != "none":
            with suppress(UsageError):  # it ended meanwhile
                guests.append(find_guest(pid))
    return guests


def find_guest(pid: int) -> GuestInfo:
    """Describe the guest of one QEMU process. Raises UsageError when ``pid`` is none, and says what it is."""
    start = proc.read_start_time(pid)
    if start is None:
        raise UsageError(f"there is no process {pid}")
    if (leader := proc.read_thread_group(pid)) not in {pid, None}:
        raise UsageError(f"{pid} is a thread of process {leader}; use qemu:{leader}")
    argv = proc.read_argv(pid)
    if not proc.is_qemu(pid) or not argv:
        raise UsageError(f"process {pid} is no QEMU system emulator, it is {proc.read_name(pid) or 'gone'!r}")
    arguments = parse_arguments(argv)
    notes: list[str] = []
    try:
        ports = tuple(_match(_find_taps(pid, notes), arguments.nets))
    except PermissionError:
        ports = ()
        notes.append(f"its ports cannot be seen: /proc/{pid}/fd needs root or CAP_SYS_PTRACE")
    unreadable = list(explain_unreadable(arguments, emulated(proc.read_qemu(pid) or argv[0])))
    notes += [*unreadable, *explain_untappable(arguments)]
    for port in ports:
        if port.ifindex is not None and (note := explain_switch(port, read_switch(port.netns, port.ifindex))):
            notes.append(note)
    if proc.read_start_time(pid) != start:
        raise UsageError(f"process {pid} ended while it was looked at")
    guest = GuestId(f"qemu:{pid}", arguments.uuid, arguments.name, f"{pid}-{start}")
    routes = () if unreadable else ("qemu",)
    return GuestInfo(guest, pid, arguments.memory_bytes, ports, routes, tuple(notes), hypervisor="qemu")


def is_running(guest: GuestInfo) -> bool:
    """Whether the very same QEMU process still runs; its pid may have been used again."""
    return guest.pid is not None and guest.id.instance == f"{guest.pid}-{proc.read_start_time(guest.pid)}"


def check_permission(guest: GuestInfo) -> None:
    """Raise PermissionRefused when the process of ``guest`` may not be looked into."""
    try:
        next(iter(proc.iter_descriptors(guest.pid or 0)), None)
    except PermissionError as error:
        raise PermissionRefused(f"{guest.id}: not allowed to look into process {guest.pid}; run as root") from error
    except OSError as error:
        raise HostError(f"{guest.id}: process {guest.pid} is gone") from error


def _find_taps(pid: int, notes: list[str]) -> list[_Tap]:
    """The taps and macvtaps that QEMU holds, each with all its queues."""
    queues: dict[str, list[int]] = {}
    found: list[_Tap] = []
    for descriptor, target in proc.iter_descriptors(pid):
        if target.endswith("/net/tun"):
            if (ifname := proc.read_interface(pid, descriptor)) is not None:
                queues.setdefault(ifname, []).append(descriptor)
        elif match := _MACVTAP.search(target):
            tap = _find_macvtap(pid, int(match[1]), descriptor)
            if tap is None:
                notes.append(f"macvtap {target}: its interface is in no network namespace that can be seen")
            elif tap.ifname not in {other.ifname for other in found}:
                found.append(tap)
    for ifname, fds in queues.items():
        place = find_port(pid, ifname, fds[0])
        if place is None:
            notes.append(f"port {ifname} is in no network namespace that can be seen: it cannot be tapped")
        else:
            found.append(_Tap(ifname, *place, tuple(fds)))
    return sorted(found, key=lambda tap: tap.fds)


def _find_macvtap(pid: int, index: int, descriptor: int) -> _Tap | None:
    for path in iter_namespaces(pid):
        if (ifname := find_interface(path, index)) is not None:
            return _Tap(ifname, path, index, (descriptor,))
    return None


def _match(taps: list[_Tap], devices: tuple[NetDevice, ...]) -> Iterator[GuestPort]:
    """Give each tap the MAC of its card: by interface name, by descriptor, or because only one is left."""
    rest = [device for device in devices if device.kind in {"tap", "bridge"}]
    macs: dict[str, str | None] = {}
    for tap in taps:
        for device in rest:
            if device.ifname == tap.ifname or set(device.fds) & set(tap.fds):
                macs[tap.ifname] = device.mac
                rest.remove(device)
                break
    unknown = [tap.ifname for tap in taps if tap.ifname not in macs]
    if len(unknown) == len(rest):  # QEMU opens them in the order of its command line
        macs |= {ifname: device.mac for ifname, device in zip(unknown, rest, strict=True)}
    for tap in taps:
        yield GuestPort(tap.ifname, macs.get(tap.ifname), tap.netns, tap.ifindex)
