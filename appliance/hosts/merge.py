"""One guest out of what its process and what libvirt tell. Pure.

A UUID is not enough: somebody may start a QEMU by hand with the UUID of a domain, and templates are cloned with theirs.
libvirt numbers each life of a domain and hands that number to the QEMU it starts, in the path of a key; a process is a
domain's only where the UUID and that number agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from appliance.hosts.arguments import Arguments
from appliance.hosts.domains import read_life
from appliance.model import GuestInfo, GuestState


def join(
    processes: Sequence[tuple[GuestInfo, Arguments]],
    domains: Iterable[tuple[GuestInfo, Mapping[str, str]]],
    is_managed: Callable[[GuestInfo, Arguments], bool] = lambda info, arguments: True,
) -> tuple[list[GuestInfo], list[GuestInfo], list[GuestInfo]]:
    """Join domains, each with the MAC addresses behind its interfaces, to their processes.

    Of several processes that say so of themselves, the one is a domain's of which ``is_managed`` says so too.
    Returns the guests that have a process, with what libvirt knows of them; the domains that were joined; the domains
    whose process cannot be seen.
    """
    guests = {info.id.instance: info for info, _ in processes}
    joined, alone = [], []
    for domain, macs in domains:
        same = [one for one in processes if _is_domains(*one, domain)]
        if len(same) > 1:
            same = [one for one in same if is_managed(*one)]
        if len(same) == 1:
            info, arguments = same[0]
            guests[info.id.instance] = _join(info, arguments, domain, macs)
            joined.append(domain)
        else:
            alone.append(domain)
    return list(guests.values()), joined, alone


def note_twins(guests: Sequence[GuestInfo]) -> list[GuestInfo]:
    """Say it of guests that have one UUID: which of them is meant by it cannot be known."""
    counts = Counter(guest.id.uuid for guest in guests if guest.id.uuid)
    return [_note_twins(guest, guests) if guest.id.uuid and counts[guest.id.uuid] > 1 else guest for guest in guests]


def _is_domains(process: GuestInfo, arguments: Arguments, domain: GuestInfo) -> bool:
    return process.id.uuid == domain.id.uuid and arguments.libvirt_id == read_life(domain)


def _join(process: GuestInfo, arguments: Arguments, domain: GuestInfo, macs: Mapping[str, str]) -> GuestInfo:
    routes, notes = process.routes, process.notes
    if not domain.routes:  # libvirt knows a reason why its memory cannot be read
        routes, notes = (), (*(domain.notes if routes else ()), *notes)
    elif routes:
        routes = (*routes[:1], *domain.routes, *routes[1:])
    state = domain.state
    if state is GuestState.INCOMING and not arguments.incoming:
        state = GuestState.PAUSED  # it is leaving this host, or about to start: its memory is whole
    return replace(
        process,
        id=replace(process.id, name=domain.id.name),
        ports=tuple(replace(port, mac=macs.get(port.ifname, port.mac)) for port in process.ports),
        routes=routes,
        notes=notes,
        state=state,
        tags=domain.tags,
        manager=domain.manager,
        wanted=domain.wanted,
    )


def _note_twins(guest: GuestInfo, guests: Sequence[GuestInfo]) -> GuestInfo:
    others = [other.id.target for other in guests if other.id.uuid == guest.id.uuid and other is not guest]
    note = f"{', '.join(others)} has the same UUID: name this one {guest.id.target}"
    return replace(guest, notes=(*guest.notes, note))
