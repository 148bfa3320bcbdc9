"""How much one part of a look into a guest may cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

MAX_CUT: Final = 256  # notes of what was cut off


class Budget:
    """How much one part of a look may cost: pages and time. What it cuts off is told in ``cut``."""

    def __init__(self, pages: int, seconds: float, cut: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._pages, self._clock, self._end, self._cut = pages, clock, clock() + seconds, cut

    @property
    def over(self) -> bool:
        """Nothing is left."""
        return self._pages <= 0 or self._clock() >= self._end

    def spend(self, pages: int) -> None:
        """Count pages that were looked at."""
        self._pages -= pages

    def cut_off(self, what: str) -> None:
        """Note what is not looked at any more."""
        if len(self._cut) < MAX_CUT:
            self._cut.append(what)
