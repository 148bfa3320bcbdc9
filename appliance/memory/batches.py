"""Turns many small reads into few large ones, for routes where each call costs milliseconds. Pure arithmetic.

Owns: which guest-physical addresses are RAM at all, so that a route that answers zeros for anything is never asked for
anything else; and which spans of one batch lie near enough to each other to be read in one go.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.model import Region


class Read(NamedTuple):
    """One read of ``[gpa, gpa + size)`` that serves several spans: their numbers in the batch."""

    gpa: int
    size: int
    serves: tuple[int, ...]


class Ram:
    """Where RAM is; regions that touch are one."""

    def __init__(self, regions: Iterable[Region]) -> None:
        joined: list[Region] = []
        for region in sorted(regions, key=lambda one: one.gpa):
            last = joined[-1] if joined else None
            if last is not None and region.gpa <= last.gpa + last.size:
                joined[-1] = Region(last.gpa, max(last.size, region.gpa + region.size - last.gpa))
            elif region.size > 0:
                joined.append(region)
        self.regions = tuple(joined)
        self._starts = [region.gpa for region in joined]

    def end_of(self, gpa: int) -> int:
        """Where the RAM ends that ``gpa`` lies in; -1 where it is no RAM."""
        region = self.regions[index] if (index := bisect_right(self._starts, gpa) - 1) >= 0 else None
        return region.gpa + region.size if region and gpa < region.gpa + region.size else -1

    def holds(self, gpa: int, size: int) -> bool:
        """Whether all of the span is RAM."""
        return size >= 0 and gpa + size <= self.end_of(gpa)

    def check(self, gpa: int, size: int) -> None:
        """Raise UnreadableMemory unless all of the span is RAM."""
        if not self.holds(gpa, size):
            raise UnreadableMemory(gpa, size, "not RAM")

    def plan(self, spans: Sequence[tuple[int, int]], *, gap: int, limit: int) -> Iterator[Read]:
        """Reads that together hold every span that is RAM, in order.

        Spans are joined across at most ``gap`` bytes of RAM that nobody asked for, up to ``limit`` bytes; one that is
        larger by itself is left whole.
        """
        order = sorted(number for number, (gpa, size) in enumerate(spans) if self.holds(gpa, size))
        order.sort(key=spans.__getitem__)
        serves: list[int] = []
        start = end = ram_end = 0
        for number in order:
            gpa, size = spans[number]
            if serves and gpa <= min(end + gap, ram_end) and max(end, gpa + size) - start <= limit:
                serves.append(number)
                end = max(end, gpa + size)
                continue
            if serves:
                yield Read(start, end - start, tuple(serves))
            serves, start, end, ram_end = [number], gpa, gpa + size, self.end_of(gpa)
        if serves:
            yield Read(start, end - start, tuple(serves))


def gather(
    reads: Iterable[Read], spans: Sequence[tuple[int, int]], fetch: Callable[[int, int], bytes | None]
) -> list[bytes | None]:
    """Do the reads and cut them up; None where a span is no RAM or ``fetch`` has no bytes."""
    found: list[bytes | None] = [None] * len(spans)
    for read in reads:
        data = fetch(read.gpa, read.size)
        if data is not None:
            for number in read.serves:
                gpa, size = spans[number]
                found[number] = data[gpa - read.gpa : gpa - read.gpa + size]
    return found
