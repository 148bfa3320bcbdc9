"""Processes that are not on the guest's own list: found by their pool blocks, or because somebody points to them.

A block with a process's tag may hold a process that lives, one that has ended and is still referenced, or the rest of
one that is long gone. Only what `Processes.find` calls a process is told. One that is just being made is not on the
list yet, so a process younger than a moment is not called hidden.
Sources: as of `processes`; nt!PspInsertProcess links a process only after it was made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.pools import PROCESS_TAG, Block, PoolHeader
from appliance.guest.windows.processes import Processes
from appliance.model import Flag

HEADERS = 0x180  # bytes between a block's start and its process: the headers of block and object
BATCH = 64  # blocks looked into between two looks at the clock


class Unlisted:
    """Looks for processes outside the list."""

    def __init__(self, kernel: WindowsKernel, processes: Processes, header: PoolHeader) -> None:
        self._kernel, self._processes, self._header = kernel, processes, header

    def in_blocks(self, blocks: Iterable[tuple[int, Block]]) -> list[RawProcess]:
        """The processes in pool blocks, given with their addresses. Raises OutOfTime, GuestGone."""
        step = self._header.size
        kept = [(va, min(block.size, HEADERS)) for va, block in blocks if block.tag == PROCESS_TAG]
        found: list[RawProcess] = []
        for at in range(0, len(kept), BATCH):
            found += self.at(
                [place for va, size in kept[at : at + BATCH] for place in range(va + step, va + size, step)]
            )
        return found

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
