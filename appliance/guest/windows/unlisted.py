"""Processes that are not on the guest's own list: found by their pool blocks, or because somebody points to them.

A block with a process's tag may hold a process that lives, one that has ended and is still referenced, or the rest of
one that is long gone. Only what `Processes.find` calls a process is told. One that is just being made is not on the
list yet, so a process younger than a moment is not called hidden.
Sources: as of `processes`; nt!PspInsertProcess links a process only after it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from appliance.guest.windows.eprocess import PROCESS_OBJECT, RawProcess
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.pools import PROCESS_TAG, Block, PoolHeader
from appliance.guest.windows.processes import Processes
from appliance.model import Flag

HEADERS = 0x180  # bytes between a block's start and its process: the headers of block and object
MAX_BLOCKS = 8192


class Unlisted:
    """Looks for processes outside the list."""

    def __init__(self, kernel: WindowsKernel, processes: Processes, header: PoolHeader) -> None:
        self._kernel, self._processes, self._header = kernel, processes, header
        self._kind = kernel.types.offset("_EPROCESS.Pcb.Header.Type")

    def in_blocks(self, blocks: Iterable[tuple[int, Block]]) -> list[RawProcess]:
        """The processes in pool blocks, given with their addresses. Raises OutOfTime, GuestGone."""
        space, step = self._kernel.space, self._header.size
        kept = [pair for pair in blocks if pair[1].tag == PROCESS_TAG][:MAX_BLOCKS]
        starts = space.readv([(va, min(block.size, HEADERS + self._kind + 1)) for va, block in kept])
        candidates: list[int] = []
        for (va, _), raw in zip(kept, starts, strict=True):
            places = range(step, len(raw) - self._kind, step) if raw is not None else range(0)
            told = [at for at in places if raw is not None and raw[at + self._kind] == PROCESS_OBJECT]
            candidates += [va + at for at in told or places]  # its header may have been overwritten
        return self.at(candidates)

    def at(self, addresses: Sequence[int]) -> list[RawProcess]:
        """What of these addresses is a process indeed. Raises OutOfTime, GuestGone."""
        spans = [self._processes.span(va) for va in addresses]
        found: list[RawProcess] = []
        for va, raw in zip(addresses, self._kernel.space.readv(spans), strict=True):
            if raw is None or not self._processes.is_sound(self._processes.parse(va, raw)):
                continue
            whole = self._processes.find(va)
            if whole is not None:
                found.append(whole)
        return found

    def flags(self, raw: RawProcess) -> tuple[Flag, ...] | None:
        """How a process that was not on the list is to be told; None: not at all, since it is on it by now."""
        if raw.exited:
            return (Flag.STALE,)
        if self._processes.is_listed(raw) or self._processes.is_young(raw):
            return None
        return (Flag.HIDDEN_PROCESS,)
