"""One inventory of the guests that are here, from every hypervisor that runs here.

A guest is its UUID: what several sources tell of one guest is one guest. Events are hints to look again; what is true
is what the sources say when they are asked.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from typing import Self

from appliance.hosts.qemu import QemuSource
from appliance.hosts.qemu import is_running as is_qemu_running
from appliance.model import GuestChange, GuestInfo
from appliance.ports import GuestSource

POLL_S = 0.5  # how long a guest may go unnoticed where no source tells of changes


class Inventory:
    """Asks every source of this host. ``troubles`` says what could not be asked the last time, for a person."""

    def __init__(self, sources: Sequence[GuestSource]) -> None:
        self._sources = tuple(sources)
        self.troubles: tuple[str, ...] = ()

    @classmethod
    def of_this_host(cls, *, events: bool = False) -> Self:
        """Every source there is here. ``events``: `wait` returns as soon as one tells of a change."""
        return cls([QemuSource()])

    def find_guests(self) -> list[GuestInfo]:
        """Every guest that is here now, once."""
        return [guest for source in self._sources for guest in source.find_guests()]

    def wait(self, timeout_s: float = POLL_S) -> tuple[GuestChange, ...]:
        """Wait until a source tells of changes, at most ``timeout_s``; what it told."""
        files = {source.fileno(): source for source in self._sources if source.fileno() >= 0}
        ready, _, _ = select.select(files, (), (), timeout_s)
        return tuple(change for fd in ready for change in files[fd].changes())

    def close(self) -> None:
        """Ask no more; may be called twice."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_running(guest: GuestInfo) -> bool:
    """Whether the very same life of this guest goes on: not another one by its name, pid or domid."""
    return guest.hypervisor == "qemu" and is_qemu_running(guest)
