"""Ranges of memory in which no thread of a process should run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Suspect(NamedTuple):
    """A range of code that a thread should not run in."""

    start: int
    end: int
    what: str
    weight: int = 2  # of the evidence that tells of it


class Suspects:
    """Suspect ranges, of which a hostile process may have very many."""

    def __init__(self, ranges: Sequence[Suspect]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [suspect.start for suspect in self._ranges]

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def at(self, address: int) -> Suspect | None:
        """The one that holds an address."""
        number = bisect_right(self._starts, address) - 1
        return self._ranges[number] if number >= 0 and address < self._ranges[number].end else None
