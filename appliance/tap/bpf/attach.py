"""Our two filters on a port, beside whatever else is there.

A foreign qdisc or filter is never changed, replaced or removed. Ours are known by their name, which also says whose
they are; those of a process that is gone are removed by whoever of us comes next. A clsact qdisc is removed only when
it is ours (we made it, or the journal says that one of us did) and no filter hangs on it, whoever of us was the last.
"""

from __future__ import annotations

import logging
import os
from typing import Final

from appliance.errors import HostError
from appliance.model import GuestPort
from appliance.tap.bpf.clsact import (
    EGRESS,
    HOOKS,
    INGRESS,
    NAME,
    Filter,
    Raced,
    Route,
    add_filter,
    delete,
    find_port,
    list_filters,
    make_qdisc,
    open_route,
    read_kinds,
    remove_orphans,
    remove_qdisc,
)
from appliance.tap.bpf.journal import Journal, Note, Place, here
from appliance.tap.bpf.owner import Owner
from appliance.tap.netns import call_in_netns

PRIORITY: Final = 1  # the first: a filter before us that accepts a packet hides it from us
MAX_PRIORITY: Final = 64
HANDLE: Final = 0x50
TRIES: Final = 3

_log: Final = logging.getLogger("parasight.tap")


class ForeignIngress(HostError):
    """The port has an ``ingress`` qdisc of somebody else, which sits where clsact would: no egress hook, no hand."""

    def __init__(self, port: GuestPort) -> None:
        super().__init__(
            f"port {port.ifname} has a foreign ingress qdisc, which has no egress hook: its connections can be "
            "observed, but not held, blocked or redirected. libvirt makes one for <bandwidth><outbound>; mend it with "
            f"'virsh domiftune DOMAIN {port.ifname} --outbound 0 --live', or where nobody needs it, "
            f"'tc qdisc del dev {port.ifname} ingress'"
        )


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
        self._mine: list[Filter] = []
        self._programs = ((INGRESS, from_guest), (EGRESS, to_guest))
        try:
            call_in_netns(port.netns, self._attach)
        except BaseException:
            self.forget()
            raise

    def detach(self) -> None:
        """Remove what we attached, and nothing else; may be called twice. A port that is gone took it along.

        What cannot be removed is said, not raised: the other ports have to be freed all the same.
        """
        if self._netns < 0:
            return
        try:
            call_in_netns(self._where(), self._detach)
        except HostError as error:
            _log.warning("%s; 'parasight stop --clean' takes off what is left", error)
        finally:
            self.forget()

    def mend(self) -> bool:
        """Hang our filters again where somebody took one away; whether that was necessary. Raises HostError."""
        return self._netns >= 0 and call_in_netns(self._where(), self._mend)

    def _where(self) -> str | None:
        return f"/proc/self/fd/{self._netns}" if self.port.netns else None

    # -- in the port's namespace --

    def _attach(self) -> None:
        self._netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with open_route(f"port {self.port.ifname}") as route, self._journal.lock():
            self.ifindex = find_port(route, self.port)
            self._place = here(self.ifindex)
            self._hang(route)

    def _mend(self) -> bool:
        with open_route(f"port {self.port.ifname}") as route, self._journal.lock():
            there = set(list_filters(route, self.ifindex))
            if len(self._mine) == len(self._programs) and there.issuperset(self._mine):
                return False
            if not read_kinds(route, self.ifindex):  # no qdisc at all: the port is gone
                return False
            self._remove(route)
            self._hang(route)
            return True

    def _hang(self, route: Route) -> None:
        try:
            for left in reversed(range(TRIES)):
                try:
                    self._try(route)
                except Raced:
                    if not left:
                        raise
                    self._remove(route)
                else:
                    return
        except BaseException:
            self._remove(route)
            raise

    def _try(self, route: Route) -> None:
        kinds = read_kinds(route, self.ifindex)
        if "ingress" in kinds:  # it shares its handle with clsact
            raise ForeignIngress(self.port)
        if "clsact" in kinds:
            remove_orphans(route, self.ifindex, self.port.ifname)
            if self._journal.read(self._place) is not None:  # one of ours, left by a crash or still in use: now ours
                self._journal.write(Note(self._place, self.port.ifname, self._owner))
        else:
            self._journal.write(Note(self._place, self.port.ifname, self._owner))
            self._made_qdisc = make_qdisc(route, self.ifindex)
            if not self._made_qdisc:  # somebody else was faster
                self._journal.remove(self._place)
        for parent, fd in self._programs:
            self._add(route, parent, fd)

    def _add(self, route: Route, parent: int, fd: int) -> None:
        there = [found for found in list_filters(route, self.ifindex) if found.parent == parent]
        foreign = {found.priority for found in there if not found.ours}
        used = {found.handle for found in there if found.ours}
        priority = next((number for number in range(PRIORITY, MAX_PRIORITY) if number not in foreign), None)
        handle = next((number for number in range(HANDLE, HANDLE + MAX_PRIORITY) if number not in used), None)
        if priority is None or handle is None:
            raise HostError(f"port {self.port.ifname} has no room for one more filter: see 'tc filter show'")
        if min(foreign, default=MAX_PRIORITY) < priority:
            where = f"{HOOKS[parent]} of port {self.port.ifname}"
            _log.warning("filters of others run before ours on %s: what they accept or drop is not seen", where)
        mine = Filter(parent, priority, handle, "bpf", self._name)
        add_filter(route, self.ifindex, mine, fd)
        self._mine.append(mine)

    def _detach(self) -> None:
        with open_route(f"port {self.port.ifname}") as route, self._journal.lock():
            self._remove(route)

    def _remove(self, route: Route) -> None:
        there = set(list_filters(route, self.ifindex))
        for mine in self._mine:
            if mine in there:  # somebody else may sit at our place by now
                delete(route, self.ifindex, mine)
        if self._mine and not any(found.ours for found in there):  # then the qdisc may be another one, not ours
            self._made_qdisc = False
            self._journal.remove(self._place)
        self._mine.clear()
        remove_orphans(route, self.ifindex, self.port.ifname)
        if self._made_qdisc or self._journal.read(self._place) is not None:
            remove_qdisc(route, self._place, self._journal)
        self._made_qdisc = False

    def forget(self) -> None:
        """Give the namespace back; what hangs there stays. May be called twice."""
        if self._netns >= 0:
            os.close(self._netns)
        self._netns = -1
