"""The network ports that a QEMU process holds: tap and macvtap descriptors, whatever its command line says.

So hot-plugged ports count, and a command line that names none misleads nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from appliance.hosts import proc
from appliance.hosts.arguments import NetDevice
from appliance.hosts.netns import call_in, find_interface, find_name, find_netns, find_port, iter_namespaces
from appliance.hosts.untappable import HANDED
from appliance.model import GuestPort
from appliance.rtnetlink import IFLA_INFO_KIND, parse_info, read_link

_KINDS: Final = {"macvtap", "ipvtap"}
_MACVTAP: Final = re.compile(r"/dev/tap(\d+)$")  # the number is the interface's index (drivers/net/macvtap.c)


@dataclass(frozen=True, slots=True)
class Held:
    """One descriptor: of a tap by its name; of a macvtap, or of a device handed through, by its device file."""

    descriptor: int
    ifname: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Tap:
    """A port as QEMU holds it, with all its queues."""

    ifname: str
    netns: str | None
    ifindex: int | None
    fds: tuple[int, ...]


def read_held(pid: int) -> tuple[Held, ...]:
    """What the process has open of network ports, and of devices handed through. Raises PermissionError."""
    found = []
    for descriptor, target in proc.iter_descriptors(pid):
        if target.endswith("/net/tun"):
            if (ifname := proc.read_interface(pid, descriptor)) is not None:
                found.append(Held(descriptor, ifname=ifname))
        elif _MACVTAP.search(target) or HANDED.fullmatch(target):
            found.append(Held(descriptor, device=target))
    return tuple(found)


def find_taps(pid: int, held: Iterable[Held], notes: list[str]) -> list[Tap]:
    """Where the interfaces behind the descriptors are now; into ``notes`` goes what is nowhere to be seen."""
    queues: dict[tuple[str, int | None], list[int]] = {}  # two namespaces may have the same name
    found: list[Tap] = []
    for one in held:
        if one.ifname is not None:
            queues.setdefault((one.ifname, find_netns(pid, one.descriptor)), []).append(one.descriptor)
        elif match := _MACVTAP.search(one.device or ""):
            tap = _find_macvtap(pid, int(match[1]), one.descriptor)
            if tap is None:
                notes.append(f"macvtap {one.device}: its interface is in no network namespace that can be seen")
            elif (tap.netns, tap.ifname) not in {(other.netns, other.ifname) for other in found}:
                found.append(tap)
    for (ifname, _), fds in queues.items():
        place = find_port(pid, ifname, fds[0])
        if place is None:
            notes.append(f"port {ifname} is in no network namespace that can be seen: it cannot be tapped")
        else:
            found.append(Tap(ifname, *place, tuple(fds)))
    return sorted(found, key=lambda tap: tap.fds)


def match_cards(taps: list[Tap], devices: tuple[NetDevice, ...]) -> Iterator[GuestPort]:
    """Give each tap the MAC of its card: by interface name, by descriptor, or because only one is left."""
    rest = [device for device in devices if device.kind in {"tap", "bridge"}]
    macs: dict[tuple[int, ...], str | None] = {}  # by descriptors
    for tap in taps:
        for device in rest:
            if device.ifname == tap.ifname or set(device.fds) & set(tap.fds):
                macs[tap.fds] = device.mac
                rest.remove(device)
                break
    unknown = [tap.fds for tap in taps if tap.fds not in macs]
    if len(unknown) == len(rest):  # QEMU opens them in the order of its command line
        macs |= {fds: device.mac for fds, device in zip(unknown, rest, strict=True)}
    for tap in taps:
        yield GuestPort(tap.ifname, macs.get(tap.fds), tap.netns, tap.ifindex)


def _find_macvtap(pid: int, index: int, descriptor: int) -> Tap | None:
    """An index is of one namespace: another may have any interface with it."""
    name = find_name(pid, descriptor)
    for path in iter_namespaces(pid):
        ifname = find_interface(path, index)
        if ifname is not None and name in {ifname, None} and _read_kind(path, index) in _KINDS:
            return Tap(ifname, path, index, (descriptor,))
    return None


def _read_kind(netns: str | None, index: int) -> str | None:
    with suppress(OSError):
        return call_in(netns, lambda: parse_info(read_link(index), IFLA_INFO_KIND))
    return None
