"""The clsact qdisc of a port and the filters on its two hooks: the only file that knows pyroute2.

Sources: tc(8), tc-bpf(8), net/sched/sch_ingress.c, net/sched/cls_bpf.c, net/sched/cls_api.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from pyroute2 import IPRoute, NetlinkError

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import GuestPort
from appliance.tap.bpf.journal import Journal, Place
from appliance.tap.bpf.owner import Owner

INGRESS: Final = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS): sent by the guest
EGRESS: Final = 0xFFFFFFF3
HOOKS: Final = {INGRESS: "ingress", EGRESS: "egress"}
NAME: Final = "parasight_tap"
# What somebody who takes the qdisc away, or a handle first, makes of our request; the next try sees the new state.
RACES: Final = frozenset({errno.EEXIST, errno.EINVAL, errno.ENOENT})
NOT_THERE: Final = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})

Route: TypeAlias = IPRoute


class Raced(HostError):
    """What we saw on the port had changed when we added to it: look again."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Something of ours on a port: a ``filter`` on a ``hook``, or a clsact ``qdisc``; ``owner`` None: not readable."""

    what: str
    ifname: str
    hook: str
    owner: Owner | None

    @property
    def orphaned(self) -> bool:
        """Whether its owner is certainly gone."""
        return self.owner is None or self.owner.is_gone()


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter on one of the two hooks."""

    parent: int
    priority: int
    handle: int
    kind: str
    name: str

    @property
    def ours(self) -> bool:
        """Whether its name says that one of us put it there."""
        return self.kind == "bpf" and self.name.partition(":")[0] == NAME

    def describe(self, ifname: str) -> Ours:
        """Name it and its owner."""
        return Ours("filter", ifname, HOOKS[self.parent], Owner.parse(self.name.partition(":")[2]))


@contextmanager
def open_route(ifname: str) -> Iterator[Route]:
    """Speak rtnetlink in the calling thread's network namespace. Raises HostError, naming the port."""
    with IPRoute() as route:
        try:
            yield route
        except NetlinkError as error:
            raise _explain(error, ifname) from error


def list_ports(route: Route) -> list[tuple[int, str]]:
    """Interfaces with a clsact qdisc: (ifindex, name)."""
    indexes = {qdisc["index"] for qdisc in route.get_qdiscs() if qdisc.get_attr("TCA_KIND") == "clsact"}
    links = route.get_links() if indexes else ()
    return [(link["index"], link.get_attr("IFLA_IFNAME")) for link in links if link["index"] in indexes]


def read_kinds(route: Route, ifindex: int) -> set[str]:
    """Read which kinds of qdisc an interface has."""
    return {qdisc.get_attr("TCA_KIND") for qdisc in route.get_qdiscs(index=ifindex)}


def make_qdisc(route: Route, ifindex: int) -> bool:
    """Make a clsact qdisc; False when there is one already."""
    try:
        route.tc("add", "clsact", ifindex)
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            return False
        raise
    return True


def add_filter(route: Route, ifindex: int, wanted: Filter, fd: int) -> None:
    """Hang the program ``fd`` on a hook, direct-action. Raises Raced when its place was taken or went away."""
    try:
        route.tc(
            "add-filter", "bpf", ifindex, wanted.handle, fd=fd, name=wanted.name, parent=wanted.parent, classid=1,
            direct_action=True, prio=wanted.priority,
        )  # fmt: skip
    except NetlinkError as error:
        if error.code in RACES:
            raise Raced(f"cannot hang a filter on interface {ifindex}: {os.strerror(error.code)}") from error
        raise


def remove_qdisc(route: Route, place: Place, journal: Journal) -> bool:
    """Remove our clsact qdisc unless something hangs on it; whether it was removed."""
    if "clsact" in read_kinds(route, place.ifindex):
        if any(True for _ in _dump_filters(route, place.ifindex)):
            return False
        try:
            route.tc("del", "clsact", place.ifindex)
        except NetlinkError as error:
            if error.code not in NOT_THERE:
                raise
        journal.remove(place)
        return True
    journal.remove(place)  # another one that comes there will not be ours
    return False


def remove_orphans(route: Route, ifindex: int, ifname: str) -> list[Ours]:
    """Remove the filters of ours whose process is gone."""
    removed = []
    for found in list(list_filters(route, ifindex)):
        if found.ours and (ours := found.describe(ifname)).orphaned:
            delete(route, ifindex, found)
            removed.append(ours)
    return removed


def list_filters(route: Route, ifindex: int) -> Iterator[Filter]:
    """List the filters on both hooks; none where there is no clsact qdisc."""
    for parent, message in _dump_filters(route, ifindex):
        options = message.get_attr("TCA_OPTIONS")
        kind = message.get_attr("TCA_KIND") or ""
        if options is None:  # the head of a priority, not a filter
            continue
        name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" else ""
        yield Filter(parent, message["info"] >> 16, message["handle"], kind, name or "")


def _dump_filters(route: Route, ifindex: int) -> Iterator[tuple[int, Any]]:
    """All that hangs on both hooks, also the heads of priorities: some classifiers have no other sign of life."""
    for parent in HOOKS:
        try:
            messages = list(route.get_filters(index=ifindex, parent=parent))
        except NetlinkError as error:
            if error.code not in NOT_THERE:
                raise
            continue
        yield from ((parent, message) for message in messages)


def delete(route: Route, ifindex: int, found: Filter) -> None:
    """Remove one filter, which may be gone already."""
    try:
        route.tc("del-filter", "bpf", ifindex, found.handle, parent=found.parent, prio=found.priority)
    except NetlinkError as error:
        if error.code not in NOT_THERE:
            raise


def find_port(route: Route, port: GuestPort) -> int:
    """Find the index of a port; where it has to be a certain one, it is verified. Raises UsageError, HostError."""
    found = route.link_lookup(ifname=port.ifname)
    if not found:
        where = f" in network namespace {port.netns}" if port.netns else ""
        raise UsageError(f"there is no port {port.ifname}{where}")
    index = int(found[0])
    if port.ifindex is not None and port.ifindex != index:
        raise HostError(f"port {port.ifname} is another interface by now (index {index}, not {port.ifindex})")
    return index


def _explain(error: NetlinkError, ifname: str) -> HostError:
    if error.code in {errno.EPERM, errno.EACCES}:
        return PermissionRefused(f"cannot change the filters of {ifname}: CAP_NET_ADMIN is needed; run as root")
    return HostError(f"cannot change the filters of {ifname}: {os.strerror(error.code)}")
