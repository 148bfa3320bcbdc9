"""What user space keeps of one flow, and which payload bytes were not told yet (as appliance/flow/payloads.py)."""

from __future__ import annotations

from typing import Final

from appliance.model import Flow

MAX_PAYLOADS: Final = 3  # per direction
MAX_DNS: Final = 256
_HALF: Final = 0x80000000


class Talk:
    """One flow that was told and has not ended."""

    __slots__ = ("counts", "flow", "key", "last_ns", "limit", "ranges", "seen", "told")

    def __init__(self, flow: Flow, key: bytes, limit: int) -> None:
        self.flow = flow
        self.key = key
        self.limit = limit
        self.last_ns = flow.started_ns
        self.counts = (0, 0, 0, 0)  # packets out, in, bytes out, in: as the last sweep found them
        self.told = [0, 0]
        self.seen = 0  # what the kernel has said of it so far
        self.ranges: list[list[tuple[int, int]]] = [[], []]

    def fresh(self, side: int, offset: int, length: int) -> tuple[int, int]:
        """``[skip, stop)`` of a TCP segment's payload that no earlier one carried; ``offset`` from the first byte."""
        begin = offset - (1 << 32) if offset >= _HALF else offset
        stop = begin + length
        if begin == -1 and stop == 0:
            return 0, 0  # a keep-alive probe repeats the byte before the first one (RFC 1122, section 4.2.3.6)
        skip = begin
        for low, high in self.ranges[side]:
            if low <= skip < high:
                skip = high
            elif skip < low < stop:
                stop = low
        if skip < stop:
            self.ranges[side] = sorted([*self.ranges[side], (skip, stop)])
        return skip - begin, stop - begin
