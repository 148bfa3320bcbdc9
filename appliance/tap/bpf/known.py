"""The flows that were told and have not ended, by the kernel's number and by ours."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, KeysView

from appliance.model import FlowCounts, FlowEnd, FlowEnded, FlowEvent, FlowId
from appliance.tap.bpf.opening import First, Openings
from appliance.tap.bpf.talk import Talk


class Known:
    """Living flows of one tap; ``pending`` are events that a sweep found."""

    def __init__(self, openings: Openings) -> None:
        self.pending: deque[FlowEvent] = deque()
        self.recovered = 0  # flows whose start was lost and which were found later
        self.handled: set[int] = set()  # numbers whose lost events were made up for
        self._openings = openings
        self._talks: dict[int, Talk] = {}
        self._by_flow: dict[int, Talk] = {}

    def __len__(self) -> int:
        return len(self._talks)

    def __iter__(self) -> Iterator[Talk]:
        return iter(list(self._talks.values()))

    @property
    def numbers(self) -> KeysView[int]:
        """By which the kernel knows them."""
        return self._talks.keys()

    def get(self, number: int) -> Talk | None:
        """The flow that the kernel calls so."""
        return self._talks.get(number)

    def find(self, flow: FlowId) -> Talk | None:
        """The flow that we told so."""
        talk = self._by_flow.get(flow.number)
        return talk if talk is not None and talk.flow.id == flow else None

    def start(self, number: int, key: bytes, at_ns: int, first: First) -> Talk:
        """A flow that nobody has heard of."""
        talk = self._openings.open(number, key, at_ns, first)
        self._talks[number] = talk
        self._by_flow[talk.flow.id.number] = talk
        return talk

    def recover(self, number: int, key: bytes, at_ns: int, first: First) -> Talk | None:
        """A flow whose start was lost; None when it is known to be over."""
        if number in self.handled:
            return None
        self.handled.add(number)
        self.recovered += 1
        return self.start(number, key, at_ns, first)

    def end(self, talk: Talk, reason: FlowEnd, counts: tuple[int, int, int, int], at_ns: int) -> FlowEnded:
        """It is over."""
        del self._talks[talk.number]
        del self._by_flow[talk.flow.id.number]
        talk.hold = None
        return FlowEnded(talk.flow.id, reason, FlowCounts(*counts), at_ns)
