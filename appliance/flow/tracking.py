"""A frame source and a flow table make a ``PacketTap``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from appliance.flow.table import FlowTable
from appliance.model import FlowEnd, FlowEvent, FlowStarted, GuestId, TapStats
from appliance.ports import Frame, FrameSource

SWEEP_NS: Final = 250_000_000
DRAIN_BATCHES: Final = 16  # 4,096 frames: more than a port's ring holds


class TrackedTap:
    """The packet eye of one guest. ``clock`` ages flows while the port is silent; a capture file needs none.

    Several ports are one source: see ``appliance.tap.merged``.
    """

    def __init__(
        self, vm: GuestId, source: FrameSource, table: FlowTable | None = None, clock: Callable[[], int] | None = None
    ) -> None:
        self.vm = vm
        self.table = FlowTable(vm) if table is None else table
        self._source = source
        self._clock = clock
        self._live = source.fileno() >= 0
        self._closed = False
        self._frames: Iterator[Frame] | None = None  # of the batch at hand
        self._next_sweep_ns = 0

    def poll(self, timeout_s: float) -> list[FlowEvent]:
        """Wait at most ``timeout_s`` for packets, then return the events they make.

        Handles a batch of frames, but returns as soon as a flow has started: its process may not live for long.
        """
        events: list[FlowEvent] = []
        feed = self.table.feed
        frames = self._source.frames(timeout_s) if self._frames is None else self._frames
        self._frames = None
        for frame in frames:
            if told := feed(frame):
                events += told
                if any(type(event) is FlowStarted for event in told):
                    self._frames = frames
                    break
        if self._clock is not None and (now_ns := self._clock()) >= self._next_sweep_ns:
            self._next_sweep_ns = now_ns + SWEEP_NS
            events += self.table.sweep(now_ns)
        return events

    @property
    def exhausted(self) -> bool:
        """No further event will come: the end of a file, or the port is gone."""
        return self._frames is None and self._source.exhausted

    def fileno(self) -> int:
        """A descriptor that is readable when ``poll`` has work; -1 for a source that is always ready."""
        return self._source.fileno()

    def stats(self) -> TapStats:
        """Counters since the start."""
        return replace(self.table.stats, lost=self._source.lost())

    def close(self) -> list[FlowEvent]:
        """Stop; the events that end the flows still open."""
        if self._closed:
            return []
        self._closed = True
        events = self._drain()
        gone = self._live and self._source.exhausted
        self._source.close()
        now_ns = self.table.now_ns if self._clock is None else self._clock()
        return events + self.table.close(now_ns, FlowEnd.GUEST_GONE if gone else FlowEnd.WATCH_ENDED)

    def _drain(self) -> list[FlowEvent]:
        """Take what a live port has already delivered, within bounds; a file that is given up is not read on."""
        events: list[FlowEvent] = []
        waiting: list[Iterator[Frame]] = [] if self._frames is None else [self._frames]
        self._frames = None
        for _ in range(DRAIN_BATCHES if self._live else 0):
            frames = waiting.pop() if waiting else self._source.frames(0)
            before = self.table.stats.packets
            for frame in frames:
                events += self.table.feed(frame)
            if self.table.stats.packets == before:
                break
        return events
