"""Our two filters on a port, beside whatever else is there (the only file that knows pyroute2).

A foreign qdisc or filter is never changed, replaced or removed. Ours are known by their name, which also says whose
they are; those of a process that is gone are removed by whoever of us comes next. A clsact qdisc is removed only when
it is ours (we made it, or the journal says that one of us did) and no filter hangs on it, whoever of us was the last.
Sources: tc(8), tc-bpf(8), net/sched/cls_bpf.c, net/sched/sch_ingress.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import GuestPort
from appliance.tap.bpf.journal import Journal, Note, Place, here
from appliance.tap.bpf.owner import Owner
from appliance.tap.netns import call_in_netns

INGRESS: Final = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS): sent by the guest
EGRESS: Final = 0xFFFFFFF3
HOOKS: Final = {INGRESS: "ingress", EGRESS: "egress"}
PRIORITY: Final = 2  # early: a filter before us that accepts a packet hides it from us
MAX_PRIORITY: Final = 64
HANDLE: Final = 0x50
NAME: Final = "parasight_tap"
TRIES: Final = 3
# What somebody who takes the qdisc away or a handle first makes of our request; the next try sees the new state.
RACES: Final = frozenset({errno.EEXIST, errno.EINVAL, errno.ENOENT})
NOT_THERE: Final = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})


class ForeignIngress(HostError):
    """The port has an ``ingress`` qdisc of somebody else, which sits where clsact would: no egress hook, no hand."""

    def __init__(self, port: GuestPort) -> None:
        super().__init__(
            f"port {port.ifname} has a foreign ingress qdisc, which has no egress hook: its connections can be "
            "observed, but not held, blocked or redirected. libvirt makes one for <bandwidth><outbound>; mend it with "
            f"'virsh domiftune DOMAIN {port.ifname} --outbound 0 --live', or where nobody needs it, "
            f"'tc qdisc del dev {port.ifname} ingress'"
        )


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
class _Filter:
    parent: int
    priority: int
    handle: int
    kind: str
    name: str

    @property
    def ours(self) -> bool:
        return self.kind == "bpf" and self.name.partition(":")[0] == NAME

    def describe(self, ifname: str) -> Ours:
        return Ours("filter", ifname, HOOKS[self.parent], Owner.parse(self.name.partition(":")[2]))


class Attachment:
    """The filters of one tap on one port."""

    def __init__(self, port: GuestPort, from_guest: int, to_guest: int) -> None:
        """Attach both programs. Raises UsageError, PermissionRefused, HostError; then nothing of ours is left."""
        self.port = port
        self.ifindex = 0
        self._owner = Owner.me()
        self._name = f"{NAME}:{self._owner}"
        self._journal = Journal()
        self._place = Place(0, 0, 0)
        self._netns = -1  # our namespace may lose its name, or its name may come to mean another one
        self._made_qdisc = False
        self._mine: list[_Filter] = []
        try:
            call_in_netns(port.netns, lambda: self._attach(((INGRESS, from_guest), (EGRESS, to_guest))))
        except BaseException:
            self._forget()
            raise

    def detach(self) -> None:
        """Remove what we attached, and nothing else; may be called twice. A port that is gone took it along."""
        if self._netns < 0:
            return
        where = f"/proc/self/fd/{self._netns}" if self.port.netns else None
        try:
            call_in_netns(where, self._detach)
        finally:
            self._forget()

    # -- in the port's namespace --

    def _attach(self, programs: tuple[tuple[int, int], ...]) -> None:
        self._netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with IPRoute() as route, self._journal.lock():
            self.ifindex = _find_port(route, self.port)
            self._place = here(self.ifindex)
            try:
                for left in reversed(range(TRIES)):
                    try:
                        self._try(route, programs)
                    except NetlinkError as error:
                        if error.code not in RACES or not left:
                            raise
                        self._remove(route)
                    else:
                        return
            except NetlinkError as error:
                self._remove(route)
                raise _explain(error, self.port) from error
            except BaseException:
                self._remove(route)
                raise

    def _try(self, route: IPRoute, programs: tuple[tuple[int, int], ...]) -> None:
        kinds = _read_kinds(route, self.ifindex)
        if "ingress" in kinds:  # it shares its handle with clsact
            raise ForeignIngress(self.port)
        if "clsact" in kinds:
            _remove_orphans(route, self.ifindex, self.port.ifname)
            if self._journal.read(self._place) is not None:  # one of ours, left by a crash or still in use: now ours
                self._journal.write(Note(self._place, self.port.ifname, self._owner))
        else:
            self._journal.write(Note(self._place, self.port.ifname, self._owner))
            self._made_qdisc = _make_qdisc(route, self.ifindex)
            if not self._made_qdisc:  # somebody else was faster
                self._journal.remove(self._place)
        for parent, fd in programs:
            self._add(route, parent, fd)

    def _add(self, route: IPRoute, parent: int, fd: int) -> None:
        there = [found for found in _list_filters(route, self.ifindex) if found.parent == parent]
        foreign = {found.priority for found in there if not found.ours}
        used = {found.handle for found in there if found.ours}
        priority = next((number for number in range(PRIORITY, MAX_PRIORITY) if number not in foreign), None)
        handle = next((number for number in range(HANDLE, HANDLE + MAX_PRIORITY) if number not in used), None)
        if priority is None or handle is None:
            raise HostError(f"port {self.port.ifname} has no room for one more filter: see 'tc filter show'")
        mine = _Filter(parent, priority, handle, "bpf", self._name)
        self._mine.append(mine)
        route.tc(
            "add-filter", "bpf", self.ifindex, handle, fd=fd, name=self._name, parent=parent, classid=1,
            direct_action=True, prio=priority,
        )  # fmt: skip

    def _detach(self) -> None:
        with IPRoute() as route, self._journal.lock():
            self._remove(route)

    def _remove(self, route: IPRoute) -> None:
        there = set(_list_filters(route, self.ifindex))
        for mine in self._mine:
            if mine in there:  # somebody else may sit at our place by now
                _delete(route, self.ifindex, mine)
        self._mine.clear()
        _remove_orphans(route, self.ifindex, self.port.ifname)
        if self._made_qdisc or self._journal.read(self._place) is not None:
            _remove_qdisc(route, self._place, self._journal)
        self._made_qdisc = False

    def _forget(self) -> None:
        if self._netns >= 0:
            os.close(self._netns)
        self._netns = -1


def list_ours(netns: str | None) -> list[Ours]:
    """What of ours there is in a network namespace, also what living processes use. Raises as ``call_in_netns``."""

    def work() -> list[Ours]:
        with IPRoute() as route:
            return [one for index, ifname in _list_ports(route) for one in _find_ours(route, index, ifname)]

    return call_in_netns(netns, work)


def clean(netns: str | None) -> list[Ours]:
    """Remove what processes that are gone left in a network namespace, and return it. Raises as ``call_in_netns``."""

    def work() -> list[Ours]:
        with IPRoute() as route, Journal().lock():
            ports = dict(_list_ports(route))
            removed = [one for index, ifname in ports.items() for one in _clean_port(route, index, ifname)]
            Journal().tidy(here(0), ports.keys())
            return removed

    try:
        return call_in_netns(netns, work)
    except NetlinkError as error:
        raise _explain(error, GuestPort("any", netns=netns)) from error


def _clean_port(route: IPRoute, ifindex: int, ifname: str) -> list[Ours]:
    removed = _remove_orphans(route, ifindex, ifname)
    note = Journal().read(here(ifindex))
    if note is not None and note.owner.is_gone() and _remove_qdisc(route, note.place, Journal()):
        removed.append(Ours("qdisc", ifname, "", note.owner))
    return removed


def _find_ours(route: IPRoute, ifindex: int, ifname: str) -> Iterator[Ours]:
    yield from (found.describe(ifname) for found in _list_filters(route, ifindex) if found.ours)
    note = Journal().read(here(ifindex))
    if note is not None:
        yield Ours("qdisc", ifname, "", note.owner)


def _list_ports(route: IPRoute) -> list[tuple[int, str]]:
    """Interfaces with a clsact qdisc: (ifindex, name)."""
    indexes = {qdisc["index"] for qdisc in route.get_qdiscs() if qdisc.get_attr("TCA_KIND") == "clsact"}
    links = route.get_links() if indexes else ()
    return [(link["index"], link.get_attr("IFLA_IFNAME")) for link in links if link["index"] in indexes]


def _read_kinds(route: IPRoute, ifindex: int) -> set[str]:
    return {qdisc.get_attr("TCA_KIND") for qdisc in route.get_qdiscs(index=ifindex)}


def _make_qdisc(route: IPRoute, ifindex: int) -> bool:
    """Make a clsact qdisc; False when there is one already."""
    try:
        route.tc("add", "clsact", ifindex)
    except NetlinkError as error:
        if error.code == errno.EEXIST:
            return False
        raise
    return True


def _remove_qdisc(route: IPRoute, place: Place, journal: Journal) -> bool:
    """Remove our clsact qdisc unless something hangs on it; whether it was removed."""
    if "clsact" in _read_kinds(route, place.ifindex):
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


def _remove_orphans(route: IPRoute, ifindex: int, ifname: str) -> list[Ours]:
    """Remove the filters of ours whose process is gone."""
    removed = []
    for found in list(_list_filters(route, ifindex)):
        if found.ours and (ours := found.describe(ifname)).orphaned:
            _delete(route, ifindex, found)
            removed.append(ours)
    return removed


def _list_filters(route: IPRoute, ifindex: int) -> Iterator[_Filter]:
    for parent, message in _dump_filters(route, ifindex):
        options = message.get_attr("TCA_OPTIONS")
        kind = message.get_attr("TCA_KIND") or ""
        if options is None:  # the head of a priority, not a filter
            continue
        name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" else ""
        yield _Filter(parent, message["info"] >> 16, message["handle"], kind, name or "")


def _dump_filters(route: IPRoute, ifindex: int) -> Iterator[tuple[int, Any]]:
    """All that hangs on both hooks, also the heads of priorities: some classifiers have no other sign of life."""
    for parent in HOOKS:
        try:
            messages = list(route.get_filters(index=ifindex, parent=parent))
        except NetlinkError as error:
            if error.code not in NOT_THERE:
                raise
            continue
        yield from ((parent, message) for message in messages)


def _delete(route: IPRoute, ifindex: int, found: _Filter) -> None:
    try:
        route.tc("del-filter", "bpf", ifindex, found.handle, parent=found.parent, prio=found.priority)
    except NetlinkError as error:
        if error.code not in NOT_THERE:
            raise


def _find_port(route: IPRoute, port: GuestPort) -> int:
    found = route.link_lookup(ifname=port.ifname)
    if not found:
        where = f" in network namespace {port.netns}" if port.netns else ""
        raise UsageError(f"there is no port {port.ifname}{where}")
    index = int(found[0])
    if port.ifindex is not None and port.ifindex != index:
        raise HostError(f"port {port.ifname} is another interface by now (index {index}, not {port.ifindex})")
    return index


def _explain(error: NetlinkError, port: GuestPort) -> HostError:
    if error.code in {errno.EPERM, errno.EACCES}:
        return PermissionRefused(
            f"cannot change the filters of port {port.ifname}: CAP_NET_ADMIN is needed; run as root"
        )
    return HostError(f"cannot change the filters of port {port.ifname}: {os.strerror(error.code)}")
