"""Our two filters on a port, beside whatever else is there (the only file that knows pyroute2).

A foreign qdisc or filter is never changed, replaced or removed. Ours are known by their name, which also says whose
they are: those of a process that is gone are removed at the next attach. A clsact qdisc is removed again only by the
attachment that made it, and only while no other filter hangs on it. Sources: tc(8), tc-bpf(8), net/sched/cls_bpf.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute, NetlinkError

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import GuestPort
from appliance.tap.netns import call_in_netns

INGRESS: Final = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS): sent by the guest
EGRESS: Final = 0xFFFFFFF3
PRIORITY: Final = 2  # early: a filter before us that accepts a packet hides it from us
MAX_PRIORITY: Final = 64
HANDLE: Final = 0x50
NAME: Final = "parasight_tap"


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


class Attachment:
    """The filters of one tap on one port."""

    def __init__(self, port: GuestPort, from_guest: int, to_guest: int) -> None:
        """Attach both programs. Raises UsageError, PermissionRefused, HostError; then nothing of ours is left."""
        self.port = port
        self.ifindex = 0
        self._made_qdisc = False
        self._mine: list[_Filter] = []
        self._name = f"{NAME}:{os.getpid()}:{_start_time(os.getpid())}"
        call_in_netns(port.netns, lambda: self._attach(((INGRESS, from_guest), (EGRESS, to_guest))))

    def detach(self) -> None:
        """Remove what we attached, and nothing else; may be called twice. A port that is gone took it along."""
        if self._mine or self._made_qdisc:
            call_in_netns(self.port.netns, self._detach)

    # -- in the port's namespace --

    def _attach(self, programs: tuple[tuple[int, int], ...]) -> None:
        with IPRoute() as route:
            self.ifindex = _find_port(route, self.port)
            try:
                self._prepare(route)
                for parent, fd in programs:
                    self._add(route, parent, fd)
            except (NetlinkError, HostError) as error:
                self._remove(route)
                raise _explain(error, self.port) from error

    def _prepare(self, route: IPRoute) -> None:
        kinds = {qdisc.get_attr("TCA_KIND") for qdisc in route.get_qdiscs(index=self.ifindex)}
        if "ingress" in kinds:  # it shares its handle with clsact; libvirt's <bandwidth> makes one
            raise HostError(
                f"port {self.port.ifname} has a foreign ingress qdisc, which has no room for the egress hook"
            )
        if "clsact" not in kinds:
            route.tc("add", "clsact", self.ifindex)
            self._made_qdisc = True
            return
        for found in _list_filters(route, self.ifindex):
            if found.ours and not _is_alive(found.name):
                _delete(route, self.ifindex, found)

    def _add(self, route: IPRoute, parent: int, fd: int) -> None:
        there = [found for found in _list_filters(route, self.ifindex) if found.parent == parent]
        foreign = {found.priority for found in there if not found.ours}
        priority = next(number for number in range(PRIORITY, MAX_PRIORITY) if number not in foreign)
        used = {found.handle for found in there if found.priority == priority}
        handle = next(number for number in range(HANDLE, HANDLE + MAX_PRIORITY) if number not in used)
        route.tc(
            "add-filter", "bpf", self.ifindex, handle, fd=fd, name=self._name, parent=parent, classid=1,
            direct_action=True, prio=priority,
        )  # fmt: skip
        self._mine.append(_Filter(parent, priority, handle, "bpf", self._name))

    def _detach(self) -> None:
        with IPRoute() as route:
            try:
                if _find_port(route, self.port) == self.ifindex:
                    self._remove(route)
            except UsageError:
                pass
        self._mine.clear()
        self._made_qdisc = False

    def _remove(self, route: IPRoute) -> None:
        there = set(_list_filters(route, self.ifindex))
        for mine in self._mine:
            if mine in there:  # somebody else may sit at our place by now
                _delete(route, self.ifindex, mine)
        if self._made_qdisc and not list(_list_filters(route, self.ifindex)):
            try:
                route.tc("del", "clsact", self.ifindex)
            except NetlinkError as error:
                if error.code not in {errno.ENOENT, errno.EINVAL, errno.ENODEV}:
                    raise
        self._mine.clear()
        self._made_qdisc = False


def clear(port: GuestPort) -> int:
    """Remove the filters that processes which are gone left on this port; return how many there were."""

    def work() -> int:
        with IPRoute() as route:
            index = _find_port(route, port)
            dead = [found for found in _list_filters(route, index) if found.ours and not _is_alive(found.name)]
            for found in dead:
                _delete(route, index, found)
            return len(dead)

    return call_in_netns(port.netns, work)


def _list_filters(route: IPRoute, ifindex: int) -> Iterator[_Filter]:
    for parent in (INGRESS, EGRESS):
        try:
            messages = list(route.get_filters(index=ifindex, parent=parent))
        except NetlinkError as error:
            if error.code in {errno.EINVAL, errno.ENOENT}:  # there is no such qdisc
                continue
            raise
        for message in messages:
            options = message.get_attr("TCA_OPTIONS")
            kind = message.get_attr("TCA_KIND") or ""
            if options is None:  # the head of a priority, not a filter
                continue
            name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" else ""
            yield _Filter(parent, message["info"] >> 16, message["handle"], kind, name or "")


def _delete(route: IPRoute, ifindex: int, found: _Filter) -> None:
    try:
        route.tc("del-filter", "bpf", ifindex, found.handle, parent=found.parent, prio=found.priority)
    except NetlinkError as error:
        if error.code not in {errno.ENOENT, errno.ENODEV}:
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


def _explain(error: Exception, port: GuestPort) -> Exception:
    if not isinstance(error, NetlinkError):
        return error
    if error.code in {errno.EPERM, errno.EACCES}:
        return PermissionRefused(f"cannot attach to port {port.ifname}: CAP_NET_ADMIN is needed; run as root")
    return HostError(f"cannot attach to port {port.ifname}: {os.strerror(error.code)}")


def _is_alive(name: str) -> bool:
    _, _, owner = name.partition(":")
    pid, _, started = owner.partition(":")
    return pid.isdecimal() and started != "" and _start_time(int(pid)) == started


def _start_time(pid: int) -> str:
    """Clock ticks after boot (proc_pid_stat(5), field 22); empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[19]
