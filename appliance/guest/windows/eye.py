"""The Windows eye: processes and sockets of one guest, read from its memory alone.

A snapshot reads the sockets, then the processes, then whatever contradicts itself or may have changed meanwhile again.
Views of the kernel are compared (crossview.py): cheaply at each look; by a sweep of all RAM where nobody waits with
packets in hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from appliance.errors import OutOfTime, UnsupportedGuest
from appliance.guest.windows.crossview import CrossView
from appliance.guest.windows.injection import Injection
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.network import Network, Unread, Walk, open_network
from appliance.guest.windows.processes import Processes
from appliance.model import (
    Evidence,
    Finding,
    Flag,
    Flow,
    Gap,
    GuestProcess,
    GuestSocket,
    Match,
    ProcessKey,
    Reason,
    Snapshot,
)

LOOK_S = 2.0  # a thousand sockets take some hundredths of a second
OFFLINE_LOOK_S = 60.0
LOOKUP_S = 0.05
SWEEP_S, OFFLINE_SWEEP_S = 10.0, 60.0
NEARBY_S = 0.25  # where there is no time for a sweep
UNREAD_S = 5.0  # a layout that could not be measured is measured again after so long
MAX_GAPS = 256


class WindowsEye:
    """Implements ``ports.GuestEye`` for a Windows guest."""

    def __init__(
        self,
        kernel: WindowsKernel,
        clock_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = time.monotonic,
        *,
        look_s: float | None = None,
        lookup_s: float = LOOKUP_S,
        thorough: bool = False,
        missing: Sequence[Gap] = (),
    ) -> None:
        """``thorough``: full looks go through all RAM, also of a running guest. ``missing``: of its memory.

        Raises UnsupportedGuest naming what this kernel or its symbols lack, except for what only the network or
        `find_foreign` needs.
        """
        self.os, self.live = "windows", kernel.memory.live
        self.describe = kernel.describe
        self._kernel, self._clock_ns, self._clock_s = kernel, clock_ns, clock_s
        self._look_s = look_s or (LOOK_S if self.live else OFFLINE_LOOK_S)
        self._lookup_s = lookup_s
        self._sweep_s = (SWEEP_S if self.live else OFFLINE_SWEEP_S) if thorough or not self.live else 0.0
        self._processes = Processes(kernel)
        self._views = CrossView(kernel, self._processes, clock_s)
        self._network = open_network(kernel, self._processes, self._views.header, clock_ns, clock_s)
        self._unread, self._unread_until_s = Unread(UnsupportedGuest(())), 0.0
        self._blind: tuple[Evidence, ...] = ()
        try:
            self._injection = Injection(kernel, clock_s)
        except UnsupportedGuest as error:
            self._blind = (Evidence(f"its memory cannot be looked into: {'; '.join(error.missing)}", "gap", weight=0),)
        self._missing = tuple(missing)
        self._took_s, self._fresh = self._look_s, True  # the first lookup may have to do all that a full look does

    def read_snapshot(self) -> Snapshot:
        """Walk everything: a full look."""
        began, start_s = self._clock_ns(), self._clock_s()
        self._kernel.forget()
        gaps = list(self._missing)
        processes: list[GuestProcess] = []
        sockets: list[GuestSocket] = []
        torn = 0
        try:
            with self._kernel.limit(self._look_s, self._clock_s):
                network, walked = self._walk_network()
                listing = self._processes.walk()
                hidden, unseen = self._views.hidden(listing)
                processes = self._processes.describe_all(listing.processes) + hidden
                sockets = list(walked.sockets)
                torn = walked.torn + listing.torn
                gaps += [*listing.gaps, *walked.gaps, *unseen]
        except OutOfTime:  # what was not read twice is not told
            gaps.append(Gap("full look", 0, f"not done within {self._look_s:g} s: no process and no socket is told"))
            return Snapshot(began, (), (), _bounded(gaps), torn, self._clock_ns() - began)
        finally:
            self._took_s, self._fresh = self._clock_s() - start_s, False
        self._compare(network, processes, sockets, gaps)
        return Snapshot(began, tuple(processes), tuple(sockets), _bounded(gaps), torn, self._clock_ns() - began)

    def find_owner(self, flow: Flow) -> Finding:
        """Say who owns a flow's tuple now; torn where that takes too long."""
        # A guest with very many sockets needs more than the usual guest; how long, its last full look tells.
        patience_s = self._look_s if self._fresh else max(self._lookup_s, min(self._took_s, 10 * self._lookup_s))
        self._fresh = False
        try:
            with self._kernel.limit(patience_s, self._clock_s):
                return self._find(flow)
        except OutOfTime:
            return Finding(Match.NONE, reason=Reason.TORN, torn=1)

    def read_process(self, key: ProcessKey) -> GuestProcess | None:
        """Describe one process afresh; None when it is gone or its pid was reused."""
        with self._kernel.limit(self._look_s, self._clock_s):
            listing = self._processes.walk()
            for raw in listing.processes:
                if raw.key == key:
                    return None if raw.exited else self._processes.describe(raw)
            hidden, _ = self._views.hidden(listing)
            return next((process for process in hidden if process.key == key), None)

    def find_foreign(self, process: GuestProcess) -> tuple[Evidence, ...]:
        """What in this process is foreign."""
        return self._blind or self._injection.find(process)

    def read_pulse(self) -> int:
        """InterruptTime: changes while this very kernel runs."""
        self._kernel.memory.check_alive()
        return self._kernel.read_pulse()

    def close(self) -> None:
        """Release the memory behind it."""
        self._kernel.memory.close()

    # -- the parts of a snapshot --

    def _walk_network(self) -> tuple[Network, Walk]:
        """The network and what it has; where its layout cannot be told there is a gap, and processes still are."""
        try:
            return self._network, self._network.walk()
        except UnsupportedGuest as error:
            unread = self._leave_unread(error)
            return unread, unread

    def _find(self, flow: Flow) -> Finding:
        if self._clock_s() < self._unread_until_s:
            return self._unread.find(flow)
        try:
            return self._network.find(flow)
        except UnsupportedGuest as error:
            return self._leave_unread(error).find(flow)

    def _leave_unread(self, why: UnsupportedGuest) -> Unread:
        """Until its layout is measured again, which takes too long to be done for each packet."""
        self._unread, self._unread_until_s = Unread(why), self._clock_s() + UNREAD_S
        return self._unread

    def _compare(
        self, network: Network, processes: list[GuestProcess], sockets: list[GuestSocket], gaps: list[Gap]
    ) -> None:
        """Add what other views have: processes that own a socket or lie in a pool, sockets that no table has."""
        known = {process.task_va for process in processes}
        try:
            if self._sweep_s:
                with self._kernel.limit(self._sweep_s + self._look_s, self._clock_s):
                    addresses = known | {socket.address for socket in sockets}
                    sighted = self._views.sweep(addresses, network.tags, self._sweep_s)
                    gaps += sighted.gaps
                    found = self._views.processes_in(sighted.blocks)
                    processes += [process for process in found if process.task_va not in known]
                    if network.adopt([process.task_va for process in found if Flag.HIDDEN_PROCESS in process.flags]):
                        sockets[:] = network.walk().sockets
                    sockets += network.loose(sighted.blocks)
                    if not sighted.gaps:  # else what takes a port may just not have been seen
                        sockets += network.bare_ports()
            else:
                with self._kernel.limit(self._look_s / 2, self._clock_s):
                    sockets += network.nearby(NEARBY_S)
        except OutOfTime:
            gaps.append(Gap("pools", 0, f"not compared within {self._sweep_s + self._look_s:g} s"))
        known = {process.task_va for process in processes}
        owners = {owner.process.task_va: owner.process for socket in sockets for owner in socket.owners}
        processes += [one for va, one in owners.items() if va not in known and Flag.HIDDEN_PROCESS in one.flags]


def _bounded(gaps: list[Gap]) -> tuple[Gap, ...]:
    if len(gaps) <= MAX_GAPS:
        return tuple(gaps)
    return (*gaps[:MAX_GAPS], Gap("more gaps", 0, f"{len(gaps) - MAX_GAPS} not listed"))
