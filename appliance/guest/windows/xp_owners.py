"""Whose pid that is: the process that has it now, if it can have had it when the socket was made.

XP's connections and sockets know their process by its pid only, and pids are reused. A process that began after the
socket was made is another one; whose socket it was, nobody can tell any more. A pid that no process of the list has is
sought beside the list: a process may be hidden.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.eprocess import PROCESS_OBJECT
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.processes import Processes, RawProcess
from appliance.model import Evidence, Flag, Gap, GuestProcess, Owner

MAX_REMEMBERED: Final = 4096


class Holder(NamedTuple):
    """Who holds a socket: ``owner``, or why nobody is named."""

    owner: Owner | None
    flag: Flag | None = None
    evidence: tuple[Evidence, ...] = ()


class Holders:
    """Finds processes of one guest by pid."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        self._processes = processes
        self._views = OtherViews(kernel, processes)
        self._by_pid: dict[int, RawProcess] = {}
        self._hidden: dict[int, RawProcess] = {}
        self._sought = False  # beside the list, since the last look
        self._owners: dict[tuple[int, int, int], Owner] = {}
        self.gaps: list[Gap] = []
        self.torn = 0

    def look(self) -> None:
        """Read the list of processes. Raises GuestError."""
        listing = self._processes.walk()
        self._listing = listing
        self._by_pid = {raw.pid: raw for raw in listing.processes}
        self._hidden, self._sought = {}, False
        self.gaps, self.torn = list(listing.gaps), listing.torn

    def find(self, pid: int, born_ns: int) -> Holder:
        """Who has this pid and had it at ``born_ns`` (Unix epoch, the guest's clock). Raises GuestError."""
        if not pid:
            return Holder(None)
        for attempt in range(2):
            raw = self._read(pid)
            if raw is not None:
                return self._judge(raw, pid, born_ns)
            if not attempt:
                self.look()
        return Holder(None, Flag.OWNER_EXITED)

    def is_alive(self, holder: Holder, pid: int) -> bool:
        """Whether the process that was named still is the same one."""
        raw = self._read(pid)
        return raw is not None and holder.owner is not None and raw.key == holder.owner.process.key and not raw.exited

    # -- private --

    def _judge(self, raw: RawProcess, pid: int, born_ns: int) -> Holder:
        if raw.created > born_ns:
            claim = f"the pid {pid} is that of {raw.name} now, which began after this was made"
            return Holder(None, Flag.OWNER_EXITED, (Evidence(claim, "pid-reused", raw.va, weight=0),))
        hidden = pid in self._hidden
        key = (raw.va, raw.pid, raw.created)
        owner = self._owners.get(key)
        if owner is None or hidden != (Flag.HIDDEN_PROCESS in owner.process.flags):
            if len(self._owners) >= MAX_REMEMBERED:
                self._owners.clear()
            owner = self._owners[key] = Owner(self._describe(raw, hidden=hidden))
        if raw.exited:
            return Holder(owner, Flag.OWNER_EXITED)
        return Holder(owner, Flag.HIDDEN_PROCESS if hidden else None)

    def _describe(self, raw: RawProcess, *, hidden: bool) -> GuestProcess:
        return self._processes.describe(raw, hidden=hidden)

    def _read(self, pid: int) -> RawProcess | None:
        """The process with this pid, read now; None where what we know is out of date."""
        known = self._by_pid.get(pid) or self._hidden.get(pid)
        if known is None and self._by_pid and not self._sought:
            self._seek()
            known = self._hidden.get(pid)
        if known is None:
            return None
        try:
            raw = self._processes.read(known.va)
        except UnreadableMemory:
            return None
        return raw if raw.kind == PROCESS_OBJECT and raw.key == known.key else None

    def _seek(self) -> None:
        """Processes that the list does not lead to."""
        self._sought = True
        sightings, gaps = self._views.find_hidden(self._listing)
        self._hidden = {sighting.process.pid: sighting.process for sighting in sightings}
        self.gaps += gaps
