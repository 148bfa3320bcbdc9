"""The heartbeat: as long as it goes on, the kernel carries out a guest's verdicts; when it ends, it fails as chosen.

A thread of its own, because a guest's thread may be busy for longer than the kernel's patience. It beats only for
guests whose thread makes progress, so that a watch that hangs counts as dead too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

BEAT_S = 0.25
HANGS_S = 5.0  # a thread that has not come round for so long is not waited for any more

Turns = Callable[[], int]


@dataclass(slots=True, eq=False)
class _Pulse:
    turns: Turns
    beat: Callable[[], None]
    seen: int = -1
    since_s: float = 0.0


class Pacemaker:
    """Beats for the watches it was given, from ``start`` to ``stop``."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._pulses: list[_Pulse] = []
        self._lock = threading.Lock()  # held while a beat is under way
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def add(self, turns: Turns, beat: Callable[[], None]) -> None:
        """``turns`` counts how often a guest's thread came round, ``beat`` says so to the kernel. Any thread."""
        with self._lock:
            self._pulses.append(_Pulse(turns, beat))

    def remove(self, beat: Callable[[], None]) -> None:
        """Beat no more for this one; when this returns, its ``beat`` is not under way. Any thread."""
        with self._lock:
            self._pulses = [pulse for pulse in self._pulses if pulse.beat != beat]

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Beat no more; when this returns, no ``beat`` is under way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """One beat for every guest whose thread makes progress."""
        with self._lock:
            pulses = list(self._pulses)
        for pulse in pulses:
            self._beat_one(pulse)

    def _beat_one(self, pulse: _Pulse) -> None:
        with self._lock:
            if pulse not in self._pulses:
                return
            now_s, turns = self._clock_s(), pulse.turns()
            if turns != pulse.seen:
                pulse.seen, pulse.since_s = turns, now_s
            if now_s - pulse.since_s <= HANGS_S:
                with contextlib.suppress(OSError):  # the guest's own thread beats too, and tells what is wrong
                    pulse.beat()

    def _run(self) -> None:
        while not self._stopping.wait(BEAT_S):
            self.beat()
