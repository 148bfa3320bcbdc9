"""What user space keeps of one flow, and which payload bytes were not told yet (as appliance/flow/payloads.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from appliance.model import Decision, Flow

MAX_PAYLOADS: Final = 3  # per direction
MAX_DNS: Final = 256
_HALF: Final = 0x80000000


@dataclass(slots=True)
class Hold:
    """A flow that waits: what was kept of it, to be sent on."""

    deadline_ns: int  # CLOCK_MONOTONIC; 0: it has not begun to wait
    default: Decision
    frames: list[tuple[int, bytes]] = field(default_factory=list)  # side, as it goes on the wire
    size: int = 0  # of the frames, in bytes


class Talk:
    """One flow that was told and has not ended. ``number``: by which the kernel knows it."""

    __slots__ = (
        "counts", "decided_ns", "flow", "goes_on", "hold", "key", "last_ns", "limit", "number", "ranges", "seen",
        "told", "waits",
    )  # fmt: skip

    def __init__(self, number: int, flow: Flow, key: bytes, limit: int) -> None:
        self.number = number
        self.flow = flow
        self.key = key
        self.limit = limit
        self.last_ns = flow.started_ns
        self.counts = (0, 0, 0, 0)  # packets out, in, bytes out, in: as the last sweep found them
        self.told = [0, 0]
        self.seen = 0  # what the kernel has said of it so far
        self.ranges: list[tuple[tuple[int, int], ...]] = [(), ()]  # told payload bytes, by side
        self.hold: Hold | None = None
        self.waits = False  # the kernel holds it until a packet of ours or a verdict says otherwise
        self.decided_ns = 0  # when that was said (CLOCK_MONOTONIC): what is told of its hold from before is old news
        self.goes_on = False  # and what was said

    def fresh(self, side: int, offset: int, length: int) -> tuple[int, int]:
        """``[skip, stop)`` of a TCP segment's payload that no earlier one carried; ``offset`` from the first byte."""
        begin = offset - (1 << 32) if offset >= _HALF else offset
        stop = begin + length
        if begin == -1 and stop == 0:
            return 0, 0  # a keep-alive probe repeats the byte before the first one (RFC 1122, section 4.2.3.6)
        if not self.ranges[side]:
            self.ranges[side] = ((begin, stop),)
            return 0, length
        skip = begin
        for low, high in self.ranges[side]:
            if low <= skip < high:
                skip = high
            elif skip < low < stop:
                stop = low
        if skip < stop:
            self.ranges[side] = tuple(sorted((*self.ranges[side], (skip, stop))))
        return skip - begin, stop - begin
