"""One inventory of the guests that are here, from every hypervisor that runs here.

A guest is its UUID: what several sources tell of one guest is one guest. Events are hints to look again; what is true
is what the sources say when they are asked. One that does not answer is a trouble that is told, and what it said
before of guests that are still seen to run goes on being believed.
"""

from __future__ import annotations

import functools
import select
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Final, Self

from appliance.errors import HostError
from appliance.hosts.arguments import Arguments
from appliance.hosts.domains import PATIENCE_S, LibvirtSource
from appliance.hosts.libvirt import INSTALL, SOCKETS, is_installed
from appliance.hosts.merge import join, note_twins
from appliance.hosts.qemu import QemuSource, is_managed
from appliance.hosts.qemu import is_running as is_qemu_running
from appliance.hosts.xen import XenSource
from appliance.hosts.xen import is_running as is_xen_running
from appliance.model import GuestChange, GuestInfo
from appliance.ports import GuestSource

POLL_S: Final = 0.5  # how long a guest may go unnoticed where no source tells of changes
ALONE_S: Final = 1.0  # how long a new domain may be without a process before it is listed without


class Inventory:
    """Asks every source of this host. ``troubles`` says what could not be asked the last time, for a person."""

    def __init__(self, sources: Sequence[GuestSource], troubles: Sequence[str] = ()) -> None:
        """``troubles`` are those that no question to a source will tell."""
        self.troubles: tuple[str, ...] = tuple(troubles)
        self._lasting = self.troubles
        self._sources = tuple(sources)
        self._told: dict[GuestSource, list[GuestInfo]] = {}
        self._alone: dict[str, float] = {}  # lives of domains without a process here: since when, monotonic
        self._joined: set[str] = set()  # lives of domains that have or had one
        self._first = True

    @classmethod
    def of_this_host(cls, *, events: bool = False) -> Self:
        """Every source there is here. ``events``: `wait` returns as soon as one tells of a change."""
        sources: list[GuestSource] = [QemuSource()]
        troubles = []
        if is_installed():
            sources.append(LibvirtSource(events=events))
        elif any(path.exists() for path in SOCKETS):
            troubles.append(f"libvirt runs here and cannot be asked, its Python binding is not installed: {INSTALL}")
        if XenSource.is_here():
            sources.append(XenSource())
        return cls(sources, troubles)

    def find_guests(self) -> list[GuestInfo]:
        """Every guest that is here now, once."""
        processes: list[tuple[GuestInfo, Arguments]] = []
        domains: list[tuple[GuestInfo, dict[str, str]]] = []
        others: list[GuestInfo] = []
        troubles = list(self._lasting)
        for source in self._sources:
            told = self._ask(source, troubles)
            match source:
                case QemuSource():
                    processes += [(info, found) for info in told if (found := source.arguments(info)) is not None]
                case LibvirtSource():
                    domains += [(info, source.macs(info)) for info in told]
                    troubles += source.troubles
                case _:
                    others += told
        self.troubles = tuple(dict.fromkeys(troubles))
        guests, joined, alone = join(processes, domains, is_managed)
        return note_twins([*guests, *self._settled(joined, alone), *others])

    def find_off(self) -> list[str]:
        """Names and UUIDs of guests that are defined here and do not run. Raises HostError."""
        return [word for source in self._sources if isinstance(source, LibvirtSource) for word in source.find_off()]

    def wait(self, timeout_s: float = POLL_S) -> tuple[GuestChange, ...]:
        """Wait until a source tells of changes, at most ``timeout_s``; what it told."""
        files = {fd: source for source in self._sources if (fd := source.fileno()) >= 0}
        poll = select.poll()  # select(2) knows no descriptor above 1023
        for fd in files:
            poll.register(fd, select.POLLIN)
        ready = poll.poll(timeout_s * 1000)
        return tuple(change for fd, _ in ready for change in files[fd].changes())

    def has_process(self, info: GuestInfo) -> bool:
        """Whether a life that libvirt listed alone at first was found to be that of a process, which is listed too."""
        return info.pid is None and info.id.instance in self._joined

    def close(self) -> None:
        """Ask no more; may be called twice."""
        for source in self._sources:
            source.close()

    def _ask(self, source: GuestSource, troubles: list[str]) -> list[GuestInfo]:
        """What a source tells, or told the last time it could be asked."""
        try:
            self._told[source] = source.find_guests()
        except HostError as error:
            troubles.append(str(error))
        except Exception:  # a defect of ours with one source must not hide the guests of all others
            troubles.append(f"{source.name}: a defect of Parasight, please report it:\n{traceback.format_exc()}")
        return self._told.get(source, [])

    def _settled(self, joined: list[GuestInfo], alone: list[GuestInfo]) -> list[GuestInfo]:
        """The domains that have no process of their own here, without those that are only starting or ending.

        Between a process and what libvirt says of it lies a moment; a guest is not two guests for that long.
        """
        now_s = time.monotonic()
        first = 0.0 if self._first else now_s
        self._first = False
        self._alone = {one.id.instance: self._alone.get(one.id.instance, first) for one in alone}
        self._joined = {one.id.instance for one in joined} | (self._joined & self._alone.keys())
        return [
            one
            for one in alone
            if one.id.instance not in self._joined and now_s >= self._alone[one.id.instance] + ALONE_S
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_running(guest: GuestInfo) -> bool:
    """Whether the very same life of this guest goes on: not another one by its name, pid or domid."""
    if guest.pid is not None:
        return is_qemu_running(guest)
    if guest.hypervisor == "xen":
        return is_xen_running(guest)
    return guest.hypervisor is not None and _ask_libvirt(guest)


def _ask_libvirt(guest: GuestInfo) -> bool:
    """One question at a time: several threads would take each other's answers. Who waits for too long believes it."""
    if not _asking.acquire(timeout=PATIENCE_S):
        return True
    try:
        return _libvirt().is_running(guest)
    finally:
        _asking.release()


_asking: Final = threading.Lock()


@functools.cache
def _libvirt() -> LibvirtSource:
    """One connection for all guests of which only libvirt tells; kept as long as we run."""
    return LibvirtSource()
