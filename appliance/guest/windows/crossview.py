"""One view of a guest against another: what its lists and tables say, and what lies in its pools.

Whoever hides something takes it off a list; the object itself stays in a pool, since it is needed. A sweep of RAM for
pool tags finds it there, among the rests of what is long gone. This page finds processes that way, and the blocks with
other tags that nothing known lies in; what those hold is for each era's network to say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.pools import PROCESS_TAG, Block, PoolHeader, Sweep
from appliance.guest.windows.processes import Processes, ProcessList
from appliance.guest.windows.reverse import find_pages
from appliance.guest.windows.space import PAGE
from appliance.guest.windows.unlisted import Unlisted
from appliance.model import Flag, Gap, GuestProcess

Placed = tuple[int, Block]  # the address of a block's header, and the block


class Sighted(NamedTuple):
    """What a sweep has found: blocks in which nothing known lies, with their addresses."""

    blocks: list[Placed]
    gaps: list[Gap]


class CrossView:
    """Compares the views of one guest."""

    def __init__(self, kernel: WindowsKernel, processes: Processes, clock: Callable[[], float]) -> None:
        self._kernel, self._processes, self._clock = kernel, processes, clock
        self.header = PoolHeader(kernel.types, kernel.pointer_size)
        self._unlisted = Unlisted(kernel, processes, self.header)
        self._others = OtherViews(kernel, processes)

    def hidden(self, listing: ProcessList) -> tuple[list[GuestProcess], list[Gap]]:
        """Living processes off the list that the kernel's other tables know. Raises GuestError."""
        sightings, gaps = self._others.find_hidden(listing)
        return self._processes.describe_all([each.process for each in sightings], hidden=True), gaps

    def sweep(self, known: Collection[int], tags: Collection[bytes], seconds: float) -> Sighted:
        """Go through RAM for blocks of these tags, and of processes, that hold none of the ``known`` addresses.

        For so many seconds at most; what was left out is told. Raises GuestGone, OutOfTime.
        """
        until = self._clock() + seconds

        def expired() -> bool:
            return self._clock() > until

        gaps: list[Gap] = []
        sweep = Sweep(self._kernel.memory, self.header, (*tags, PROCESS_TAG))
        blocks = sweep.run(expired)
        if not sweep.done or sweep.overflow:
            why = "more blocks than can be true" if sweep.overflow else "not looked at, it takes too long"
            left = sweep.bytes_all - sweep.bytes_seen
            gaps.append(Gap("pools", 0, f"{left >> 20} of {sweep.bytes_all >> 20} MiB of RAM: {why}"))
        if sweep.unreadable:
            gaps.append(Gap("pools", 0, f"{sweep.unreadable >> 10} KiB of RAM cannot be read"))
        to_gpa = self._kernel.space.to_gpa
        places = sorted(gpa for va in known if (gpa := to_gpa(va)) is not None)
        blocks = [block for block in blocks if not _holds(block, places)]
        at, complete = find_pages(self._kernel.space, {block.at for block in blocks}, expired)
        if not complete:
            gaps.append(Gap("pools", 0, "where some blocks are mapped was not found in time"))
        return Sighted(
            [(at[page] + block.at - page, block) for block in blocks if (page := block.at & -PAGE) in at], gaps
        )

    def processes_in(self, blocks: Iterable[Placed]) -> list[GuestProcess]:
        """The processes in pool blocks: hidden ones, and of a guest that stands still also what has ended."""
        found: dict[bool, list[RawProcess]] = {True: [], False: []}
        for raw in self._unlisted.in_blocks(blocks):
            flags = self._unlisted.flags(raw) or ()
            if Flag.HIDDEN_PROCESS in flags:
                found[True].append(raw)
            elif Flag.STALE in flags and not self._kernel.memory.live:
                found[False].append(raw)
        describe = self._processes.describe_all
        return [*describe(found[True], hidden=True), *describe(found[False])]


def _holds(block: Block, places: Sequence[int]) -> bool:
    """Whether one of these places, in order, lies in a block."""
    index = bisect_left(places, block.at)
    return index < len(places) and places[index] < block.at + block.size
