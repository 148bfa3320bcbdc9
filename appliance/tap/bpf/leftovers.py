"""What of ours is on the ports of a network namespace, and its removal where nobody uses it any more."""

from __future__ import annotations

from appliance.tap.bpf.clsact import Ours, list_filters, list_ports, open_route, remove_orphans, remove_qdisc
from appliance.tap.bpf.journal import Journal, here
from appliance.tap.netns import call_in_netns


def list_ours(netns: str | None) -> list[Ours]:
    """What of ours there is in a network namespace, also what living processes use.

    ``netns`` is a path, None for our own namespace. Raises HostError, and as ``call_in_netns`` does.
    """
    return call_in_netns(netns, _list)


def clean(netns: str | None) -> list[Ours]:
    """Remove what processes that are gone left in a network namespace, and return it. Raises as ``list_ours``."""
    return call_in_netns(netns, _clean)


def _list() -> list[Ours]:
    journal, ours = Journal(), []
    with open_route("ports") as route:
        for ifindex, ifname in list_ports(route):
            ours += [found.describe(ifname) for found in list_filters(route, ifindex) if found.ours]
            if (note := journal.read(here(ifindex))) is not None:
                ours.append(Ours("qdisc", ifname, "", note.owner))
    return ours


def _clean() -> list[Ours]:
    journal, removed = Journal(), []
    with open_route("ports") as route, journal.lock():
        ports = list_ports(route)
        for ifindex, ifname in ports:
            removed += remove_orphans(route, ifindex, ifname)
            note = journal.read(here(ifindex))
            if note is not None and note.owner.is_gone() and remove_qdisc(route, note.place, journal):
                removed.append(Ours("qdisc", ifname, "", note.owner))
        journal.tidy(here(0), {ifindex for ifindex, _ in ports})
    return removed
