"""A look at every flow of the kernel: it ends the silent ones, and makes up for events that found the ring full.

The price of a sweep is bounded: the next one waits two hundred times as long as the last one took.

One writer for each value: the kernel writes flows, user space writes verdicts and ports. A sweep removes flows that are
over; should a packet of the same tuple come between its look and its removal, that flow is told as two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from appliance.model import FlowEnd, FlowStarted
from appliance.tap.bpf.known import Known
from appliance.tap.bpf.layout import (
    CLOSED,
    CLOSING,
    DENY,
    END,
    FLOW,
    FREE,
    GLANCE,
    KEY,
    REFUSED,
    SECOND_NS,
    START,
    SWEPT,
    TIMEOUT_NS,
)
from appliance.tap.bpf.opening import First
from appliance.tap.bpf.syscalls import Map
from appliance.tap.bpf.talk import Talk

SWEEP_NS: Final = SECOND_NS
SWEEP_SHARE: Final = 200
HURRY_NS: Final = 100_000_000
HURRY_SHARE: Final = 5


class Keeper(Protocol):
    """Who is told of flows that wait (``hand.py``)."""

    def note_waiting(self, talk: Talk, hold: int, at_ns: int) -> None:
        """The kernel holds this flow; ``hold`` as in ``struct flow``."""
        ...

    def note_free(self, talk: Talk) -> None:
        """The kernel lets this flow pass."""
        ...


class Sweep:
    """The sweeps of one tap. ``offset_ns``: from the kernel's clock to the Unix epoch."""

    def __init__(self, flows: Map, known: Known, keeper: Keeper, clock: Callable[[], int]) -> None:
        self.evicted = 0
        self.offset_ns = _measure_offset(clock)
        self._flows, self._known, self._keeper, self._clock = flows, known, keeper, clock
        self._next_ns = time.monotonic_ns() + SWEEP_NS
        self._soonest_ns = 0

    def is_due(self, now_ns: int, *, busy: bool) -> bool:
        """Whether it is time; not while events wait, which tell more, but a second later at the latest."""
        late_ns = now_ns - self._next_ns
        return late_ns >= 0 and (late_ns >= SWEEP_NS or not busy)

    def hurry(self) -> None:
        """Something was lost that should not wait."""
        self._next_ns = min(self._next_ns, max(self._soonest_ns, time.monotonic_ns()))

    def run(self, is_told: Callable[[], bool]) -> None:
        """Look once; events go to ``Known.pending``. ``is_told``: nothing waits in the ring."""
        began_ns = time.monotonic_ns()
        self.offset_ns = _measure_offset(self._clock)
        seen: set[int] = set()
        over: list[bytes] = []
        lost: set[int] = set()
        living = self._known.numbers
        for keys, values in self._flows.read_batches():
            for index, (number, last_ns, state, missed) in enumerate(GLANCE.iter_unpack(values)):
                if not missed and number not in living and began_ns - last_ns <= TIMEOUT_NS[state]:
                    continue  # told, over, and not yet forgotten by the kernel: after a burst, nearly all
                key = keys[index * KEY.size : (index + 1) * KEY.size]
                value = SWEPT.unpack_from(values, index * FLOW.size)
                self._look_at(key, value, began_ns, seen, over, lost)
        self._find_evicted(began_ns + self.offset_ns, seen, is_told)
        self._flows.delete_batch(over)
        self._known.handled &= lost
        took_ns = time.monotonic_ns() - began_ns
        self._next_ns = began_ns + took_ns + max(SWEEP_NS, SWEEP_SHARE * took_ns)
        self._soonest_ns = began_ns + took_ns + max(HURRY_NS, HURRY_SHARE * took_ns)

    def _look_at(
        self, key: bytes, value: tuple[int, ...], now_ns: int, seen: set[int], over: list[bytes], lost: set[int]
    ) -> None:
        number, first_ns, last_ns, p0, p1, b0, b1, state, side, flags, itype, icode, fins, _, _, missed, _, hold, _ = (
            value
        )
        silent = now_ns - last_ns > TIMEOUT_NS[state]
        talk = self._known.get(number)
        if missed:
            lost.add(number)
            if talk is None and missed & START:
                talk = self._recover(number, key, first_ns, First(side, flags, itype, icode), hold)
        if talk is None:
            if silent:
                over.append(key)
            return
        seen.add(number)
        if talk.waits and hold == FREE:
            self._keeper.note_free(talk)
        talk.counts = (p0, p1, b0, b1)
        talk.last_ns = last_ns + self.offset_ns
        if state == CLOSED:
            if silent:  # an end that came before its start, by way of another CPU's buffer, was not understood
                over.append(key)
            if silent or missed & END:
                self._end(talk, FlowEnd.FIN if fins == 3 else FlowEnd.RST, talk.last_ns)
        elif silent and talk.hold is None:
            over.append(key)
            self._end(talk, FlowEnd.FIN if state == CLOSING else FlowEnd.IDLE, talk.last_ns + TIMEOUT_NS[state])

    def _recover(self, number: int, key: bytes, first_ns: int, first: First, hold: int) -> Talk | None:
        talk = self._known.recover(number, key, first_ns + self.offset_ns, first)
        if talk is not None:
            held = hold & ~DENY not in {FREE, REFUSED}
            if held:
                self._keeper.note_waiting(talk, hold, first_ns)
            self._known.pending.append(FlowStarted(talk.flow, talk.flow.started_ns, held))
        return talk

    def _find_evicted(self, before_ns: int, seen: set[int], is_told: Callable[[], bool]) -> None:
        """Flows that we know and the kernel does not: the map was full. Their counters are those of the last sweep."""
        if len(seen) >= len(self._known):
            return
        for talk in self._known:
            if talk.number in seen or talk.flow.started_ns >= before_ns:
                continue
            if not is_told():  # its end may wait there
                return
            reused = self._flows.lookup(talk.key) is not None  # another flow has its tuple; its end was lost
            self.evicted += not reused
            self._end(talk, FlowEnd.IDLE if reused else FlowEnd.EVICTED, before_ns)

    def _end(self, talk: Talk, reason: FlowEnd, at_ns: int) -> None:
        self._known.pending.append(self._known.end(talk, reason, talk.counts, at_ns))


def _measure_offset(clock: Callable[[], int]) -> int:
    """From CLOCK_MONOTONIC to ``clock``; the tightest of a few tries, since we may be interrupted between the two."""
    tries = []
    for _ in range(3):
        before_ns = time.monotonic_ns()
        now_ns = clock()
        after_ns = time.monotonic_ns()
        tries.append((after_ns - before_ns, now_ns - (before_ns + after_ns) // 2))
    return min(tries)[1]
