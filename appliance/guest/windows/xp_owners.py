"""Whose pid that is: the process that has it now, if it can have had it when the socket was made.

XP's connections and sockets know their process by its pid only, and pids are reused. A process that began after the
socket was made is another one; whose socket it was, nobody can tell any more. A pid that no process of the list has is
sought beside the list: a process may be hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.processes import Processes, RawProcess
from appliance.model import Evidence, Flag, Gap, Owner

MAX_REMEMBERED: Final = 4096


class Holder(NamedTuple):
    """Who holds a socket: ``owner``, or why nobody is named."""

    owner: Owner | None
    flag: Flag | None = None
    evidence: tuple[Evidence, ...] = ()


def is_same(before: RawProcess, now: RawProcess, *, ended: bool = False) -> bool:
    """Whether the bytes at one address are still those of the same process; ``ended``: it may have ended meanwhile."""
    if now.kind != before.kind or now.key != before.key:
        return False
    return ended or now.exited == before.exited


class Holders:
    """Finds processes of one guest by pid."""

    def __init__(self, kernel: WindowsKernel, processes: Processes) -> None:
        self._processes, self._space = processes, kernel.space
        self._views = OtherViews(kernel, processes)
        self._by_pid: dict[int, RawProcess] = {}
        self._hidden: dict[int, RawProcess] = {}
        self._adopted: dict[int, RawProcess] = {}  # hidden ones that others found
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

    def adopt(self, vas: Iterable[int]) -> bool:
        """Take note of hidden processes that were found elsewhere; whether one is new. Raises OutOfTime, GuestGone."""
        fresh = False
        for va in vas:
            raw = self._processes.find(va)
            if raw is not None and not raw.exited and len(self._adopted) < MAX_REMEMBERED:
                fresh |= self.known(raw.pid) is None
                self._adopted[raw.pid] = raw
        return fresh

    def find(self, pid: int, born_ns: int, *, read: bool = True) -> Holder:
        """Who has this pid and had it at ``born_ns`` (Unix epoch, the guest's clock). Raises GuestError.

        Without ``read`` what the last look found is good enough; `changed` then tells of whom it no longer is true.
        """
        if not pid:
            return Holder(None)
        if not read and (known := self.known(pid)) is not None:
            return self.judge(known, born_ns)
        for attempt in range(2):
            raw = self._read(pid)
            if raw is not None:
                return self.judge(raw, born_ns)
            if not attempt:
                self.look()
        return Holder(None, Flag.OWNER_EXITED)

    def known(self, pid: int) -> RawProcess | None:
        """The process with this pid as the last look found it; it may be gone by now."""
        return self._by_pid.get(pid) or self._hidden.get(pid)

    def judge(self, raw: RawProcess, born_ns: int) -> Holder:
        """Whether a process can have made what was made at ``born_ns``."""
        if raw.created > born_ns:
            claim = f"the pid {raw.pid} is that of {raw.name} now, which began after this was made"
            return Holder(None, Flag.OWNER_EXITED, (Evidence(claim, "pid-reused", raw.va, weight=0),))
        owner = self._owner(raw)
        if raw.exited:
            return Holder(owner, Flag.OWNER_EXITED)
        return Holder(owner, Flag.HIDDEN_PROCESS if raw.pid in self._hidden else None)

    def span(self, va: int) -> tuple[int, int]:
        """What to read of a process for `is_still`."""
        return self._processes.span(va)

    def is_still(self, known: RawProcess, raw: bytes | None) -> bool:
        """Whether these bytes are those of the same process, which has not ended meanwhile."""
        return raw is not None and is_same(known, self._processes.parse(known.va, raw))

    def changed(self, pids: Iterable[int]) -> set[int]:
        """Those of these pids that are another process's now, or whose process has ended since the last look."""
        known = [raw for pid in pids if (raw := self.known(pid)) is not None]
        again = self._space.readv([self.span(raw.va) for raw in known])
        return {before.pid for before, raw in zip(known, again, strict=True) if not self.is_still(before, raw)}

    # -- private --

    def _owner(self, raw: RawProcess) -> Owner:
        hidden = raw.pid in self._hidden
        key = (raw.va, raw.pid, raw.created)
        owner = self._owners.get(key)
        if owner is None or hidden != (Flag.HIDDEN_PROCESS in owner.process.flags):
            if len(self._owners) >= MAX_REMEMBERED:
                self._owners.clear()
            owner = self._owners[key] = Owner(self._processes.describe(raw, hidden=hidden))
        return owner

    def _read(self, pid: int) -> RawProcess | None:
        """The process with this pid, read now; None where what we know is out of date."""
        known = self.known(pid)
        if known is None and self._by_pid and not self._sought:
            self._seek()
            known = self._hidden.get(pid)
        if known is None:
            return None
        try:
            raw = self._processes.read(known.va)
        except UnreadableMemory:
            return None
        return raw if is_same(known, raw, ended=True) else None

    def _seek(self) -> None:
        """Processes that the list does not lead to."""
        self._sought = True
        sightings, gaps = self._views.find_hidden(self._listing)
        self._hidden = {sighting.process.pid: sighting.process for sighting in sightings}
        for before in self._adopted.values():
            now = self._processes.find(before.va)
            if now is not None and is_same(before, now) and now.pid not in self._by_pid:
                self._hidden.setdefault(now.pid, now)
        self.gaps += gaps
