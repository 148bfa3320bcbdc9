"""TCP resets to both ends of a connection, from the sequence numbers that the kernel program saw last.

A receiver believes a reset only at the very number that it expects next (RFC 5961, section 3.2). That is what it
acknowledged last, or the end of what was sent to it since; where it is neither, it answers with a challenge, whose
acknowledgement says which: the reset is then repeated.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from typing import Final, Protocol

from appliance.tap.bpf.forge import make_reset
from appliance.tap.bpf.layout import HAS_ACK, HAS_TOP, SEQUENCES
from appliance.tap.bpf.syscalls import Map
from appliance.tap.bpf.talk import Talk

AGAIN_NS: Final = (20_000_000, 200_000_000, 1_000_000_000)  # looks for a challenge, since the reset


class Send(Protocol):
    """Sends a frame at the port of a flow."""

    def __call__(self, key: bytes, from_guest: bool, frame: bytes, *, forged: bool) -> bool:
        """Whether the kernel took it."""
        ...


@dataclass(slots=True)
class _Reset:
    key: bytes
    number: int
    began_ns: int
    looks: int = 0
    sent: set[tuple[bool, int]] = field(default_factory=set)


class Resets:
    """Resets of one tap. The flow has a verdict that drops its packets: no number moves any more."""

    def __init__(self, flows: Map, send: Send) -> None:
        self._flows, self._send = flows, send
        self._open: list[tuple[int, int, _Reset]] = []
        self._count = 0

    @property
    def next_due_ns(self) -> int:
        """When ``repeat`` has work (CLOCK_MONOTONIC); 0: it has none."""
        return self._open[0][0] if self._open else 0

    def send(self, talk: Talk) -> None:
        """Tell both ends that it is over."""
        self._look(_Reset(talk.key, talk.number, time.monotonic_ns()))

    def repeat(self, now_ns: int) -> None:
        """Answer challenges."""
        while self._open and self._open[0][0] <= now_ns:
            self._look(heapq.heappop(self._open)[2])

    def _look(self, reset: _Reset) -> None:
        value = self._flows.lookup(reset.key)
        if value is None:
            return
        number, top0, top1, ack0, ack1, _, _, has, _, macs = SEQUENCES.unpack(value)
        if number != reset.number:
            return
        tops, acks = (top0, top1), (ack0, ack1)
        for side in (0, 1):  # who is told
            expected = set()
            if has & HAS_ACK << side:
                expected.add(acks[side])
            if has & HAS_TOP << 1 - side and not reset.looks:
                expected.add(tops[1 - side])
            ack = tops[side] if has & HAS_TOP << side else 0
            for seq in expected:
                if (side == 0, seq) not in reset.sent:
                    reset.sent.add((side == 0, seq))
                    frame = make_reset(reset.key, macs, side == 0, seq, ack)
                    self._send(reset.key, side == 1, frame, forged=True)
        if reset.looks < len(AGAIN_NS):
            self._count += 1
            heapq.heappush(self._open, (reset.began_ns + AGAIN_NS[reset.looks], self._count, reset))
            reset.looks += 1
