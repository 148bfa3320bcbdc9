"""The Linux eye: processes and sockets of one running guest, read from its memory alone.

A snapshot walks tasks, socket tables and descriptors in turn while the guest runs on, then reads every link that made
an owner again; what changed meanwhile is dropped and counted, never guessed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from appliance.errors import OutOfTime
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.fast import FastPath
from appliance.guest.linux.hashes import TupleHash
from appliance.guest.linux.holding import Holding
from appliance.guest.linux.injection import find_foreign
from appliance.guest.linux.lookup import Lookup
from appliance.guest.linux.namespaces import Namespaces
from appliance.guest.linux.owners import Owners
from appliance.guest.linux.probe import Probe
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Raw, Sockets
from appliance.model import (
    Evidence,
    Finding,
    Flow,
    Gap,
    GuestProcess,
    GuestSocket,
    Match,
    Owner,
    ProcessKey,
    Reason,
    Snapshot,
)

TRIES = 3
LOOK_S = 2.0  # a thousand sockets take a twentieth of a second, the first time
OFFLINE_LOOK_S = 60.0  # of a dump, which nobody waits for with packets in hand
LOOKUP_S = 0.05
MAX_GAPS = 256  # named one by one; more are summed up


class LinuxEye:
    """Implements ``ports.GuestEye`` for a Linux guest."""

    def __init__(
        self,
        kernel: Kernel,
        clock_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = time.monotonic,
        look_s: float | None = None,
        lookup_s: float = LOOKUP_S,
        missing: Sequence[Gap] = (),
    ) -> None:
        """Resolve the facts. ``look_s`` and ``lookup_s`` are how long a full look and a lookup may take.

        ``missing``: of its memory.

        Raises UnsupportedGuest naming what this kernel lacks.
        """
        self.os, self.live = "linux", kernel.memory.live
        self._kernel, self._missing = kernel, tuple(missing)
        self._clock_ns, self._clock_s = clock_ns, clock_s
        self._look_s = look_s or (LOOK_S if kernel.memory.live else OFFLINE_LOOK_S)
        self._lookup_s = lookup_s
        self._took_s = self._look_s  # by the last full look
        self._fresh = True  # the first lookup may have to do all that a full look does
        self.describe = f"Linux {kernel.release}, build id {kernel.build_id}"
        self._facts = Facts(kernel)
        self._namespaces = Namespaces(kernel, self._facts)
        self._hashes = TupleHash(kernel)
        self._sockets = Sockets(kernel, self._facts, self._hashes)
        self._owners = Owners(kernel, self._facts)
        self._holding = Holding(kernel, self._facts, self._sockets, self._owners)
        probe = Probe(kernel, self._facts, self._namespaces, self._sockets)
        fast = FastPath(kernel, self._facts, self._namespaces, self._sockets, self._owners, self._hashes)
        self._lookup = Lookup(self._namespaces, self._sockets, probe, self._holding, fast)
        self._socket = self._facts.record("socket")
        self._built: dict[int, tuple[Raw, GuestSocket]] = {}

    def read_snapshot(self) -> Snapshot:
        """Walk everything: a full look."""
        began = self._clock_ns()
        start_s = self._clock_s()
        self._kernel.forget()
        gaps = list(self._missing)
        sockets: tuple[GuestSocket, ...] = ()
        processes: tuple[GuestProcess, ...] = ()
        torn = 0
        try:
            with self._kernel.limit(self._look_s / 2, self._clock_s):  # the rest is for what is found
                self._owners.processes.read_clock()
                gaps += self._namespaces.look()
                walked = self._sockets.walk(self._namespaces.all)
            with self._kernel.limit(start_s + self._look_s - self._clock_s(), self._clock_s):
                torn = walked.torn
                found = self._sockets.complete(walked)
                gaps += walked.gaps
                files = self._files(found)
                kept, owners, lost, more = self._resolve(found, files)
                torn += lost
                gaps += more
                processes = self._processes()
                sockets = self._build(kept, owners, files)
        except OutOfTime:  # what was not read twice is not told
            gaps.append(Gap("full look", 0, f"not done within {self._look_s:g} s: no process and no socket is told"))
        self._took_s, self._fresh = self._clock_s() - start_s, False
        return Snapshot(began, processes, sockets, _bounded(gaps), torn, self._clock_ns() - began)

    def find_owner(self, flow: Flow) -> Finding:
        """Say who owns a flow's tuple now; torn where that takes too long."""
        if self._namespaces.all and (quick := self._lookup.find_quickly(flow)) is not None:
            return quick
        # A guest with very many processes needs more than the usual guest; how long, its last full look tells.
        patience_s = self._look_s if self._fresh else max(self._lookup_s, min(self._took_s, 10 * self._lookup_s))
        self._fresh = False
        try:
            with self._kernel.limit(patience_s, self._clock_s):
                if not self._namespaces.all:
                    self._namespaces.look()
                return self._lookup.find(flow)
        except OutOfTime:
            return Finding(Match.NONE, reason=Reason.TORN, torn=1)

    def read_process(self, key: ProcessKey) -> GuestProcess | None:
        """Describe one process afresh; None when it is gone or its pid was reused."""
        for _ in range(2):
            for leader in self._owners.tasks.leaders:
                if leader.tgid != key.pid or leader.start_ns != key.started_ns:
                    continue
                (raw,) = self._kernel.readv([self._owners.task_list.span(leader.va)])
                task = leader if raw is None else self._owners.task_list.parse(leader.va, raw)
                same = raw is not None and (task.tgid, task.start_ns) == (key.pid, key.started_ns)
                if same and task.thread_pid:  # NULL once it is released (kernel/exit.c), its memory not yet reused
                    self._owners.processes.forget()
                    return self._owners.processes.describe([self._owners.effective(task)], self._owners.parents)[0]
            self._owners.look()
        return None

    def find_foreign(self, process: GuestProcess) -> tuple[Evidence, ...]:
        """What in this process is foreign."""
        return find_foreign(self._kernel, self._facts, process)

    def read_pulse(self) -> int:
        """``total_forks`` (kernel/fork.c), and below it ``jiffies_64`` (kernel/time/timer.c).

        Both only ever grow while this very kernel runs. A revert to a snapshot takes both back; the clocks of a virtual
        machine may not go back with it, and then jiffies catch up at once.
        """
        kernel = self._kernel
        kernel.memory.check_alive()
        forks_va = kernel.symbols.find("total_forks")
        forks = kernel.u64(forks_va) if forks_va is not None else 0
        return forks << 64 | kernel.u64(kernel.symbols.get("jiffies_64"))

    def close(self) -> None:
        """Release the memory behind it."""
        self._kernel.memory.close()

    # -- the parts of a snapshot --

    def _files(self, found: list[Raw]) -> dict[int, int]:
        """``sk_socket->file`` of every full socket, by the socket's address; 0 where the kernel itself owns it."""
        full = [raw for raw in found if raw.full and is_object(raw.sk_socket)]
        values = self._kernel.readv([self._socket.span(raw.sk_socket) for raw in full])
        files: dict[int, int] = {}
        for raw, data in zip(full, values, strict=True):
            file = self._socket.parse(data)[0] if data is not None else 0
            files[raw.va] = file or self._holding.parent_file(raw)
        return files

    def _resolve(
        self, found: list[Raw], files: dict[int, int]
    ) -> tuple[list[Raw], dict[int, tuple[Owner, ...]], int, list[Gap]]:
        """Owners of all sockets, re-validated; sockets that changed meanwhile are left out."""
        owners: dict[int, tuple[Owner, ...]] = {}
        kept, torn, gaps = found, 0, []
        wanted = {file for file in files.values() if file}
        for _ in range(TRIES):
            gaps = self._owners.look()
            doubtful = self._owners.revalidate()
            owners.update(self._owners.bulk(wanted - owners.keys(), doubtful))
            alive = self._unchanged(kept, files)
            torn += len(kept) - len(alive)
            kept = alive
            wanted = {file for raw in kept if (file := files.get(raw.va, 0))}
            if wanted <= owners.keys():
                return kept, owners, torn, gaps
        gaps += [
            Gap("owner of a socket", raw.va, "no listed process holds its file")
            for raw in kept
            if files.get(raw.va, 0) not in owners and files.get(raw.va, 0)
        ]
        return kept, owners, torn, gaps

    def _unchanged(self, found: list[Raw], files: dict[int, int]) -> list[Raw]:
        """The sockets that still are what they were: tuple, ``sk_socket`` and file."""
        common, tail = self._sockets.common, self._sockets.tail
        size, cut = tail.low + tail.size - common.low, tail.low - common.low
        spans = [(raw.va + common.low, size) if raw.va in files else common.span(raw.va) for raw in found]
        links = [self._socket.span(raw.sk_socket) for raw in found if raw.va in files]
        values, held = self._kernel.readv(spans), iter(self._kernel.readv(links))
        alive: list[Raw] = []
        for raw, data in zip(found, values, strict=True):
            link = next(held) if raw.va in files else None
            if data is None:
                continue
            if raw.data != data[: common.size] and self._sockets.parse(data[: common.size]).tuple != raw.common.tuple:
                continue
            if raw.va in files:
                moved = raw.more != data[cut:] and tail.parse(data[cut:])[0] != raw.sk_socket
                file = self._socket.parse(link)[0] if link is not None else 0
                if moved or file not in (files[raw.va], 0):
                    continue
            alive.append(raw)
        return alive

    def _build(
        self, kept: list[Raw], owners: dict[int, tuple[Owner, ...]], files: dict[int, int]
    ) -> tuple[GuestSocket, ...]:
        """Public sockets; those of the look before where nothing changed."""
        built: dict[int, tuple[Raw, GuestSocket]] = {}
        for raw in kept:
            own = owners.get(files.get(raw.va, 0), ())
            last = self._built.get(raw.va)
            if last is None or last[0] is not raw or last[1].owners != own:
                last = raw, self._sockets.build(raw, own)
            built[raw.va] = last
        self._built = built
        return tuple(socket for _, socket in built.values())

    def _processes(self) -> tuple[GuestProcess, ...]:
        leaders = [self._owners.effective(task) for task in self._owners.tasks.leaders]
        return tuple(self._owners.processes.describe(leaders, self._owners.parents))


def _bounded(gaps: list[Gap]) -> tuple[Gap, ...]:
    if len(gaps) <= MAX_GAPS:
        return tuple(gaps)
    return (*gaps[:MAX_GAPS], Gap("more gaps", 0, f"{len(gaps) - MAX_GAPS} not listed"))
