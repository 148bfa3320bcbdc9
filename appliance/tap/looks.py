"""A tap without a port: flows told by looking at the guest's own sockets again and again.

For guests whose packets cross no port of this host (user networking, SR-IOV, DPDK) while their memory can be read. It
sees what the guest's kernel keeps, once in a pace: see ``connections.py`` for what that tells and what it cannot.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from appliance.errors import GuestError, HostError
from appliance.model import FlowEnd, FlowEvent, GuestId, TapStats
from appliance.ports import GuestEye
from appliance.tap.connections import MAX_FLOWS, Connections
from appliance.tap.ladder import CommunityId

PACE_S: Final = 1.0
BATCH: Final = 1024  # events by one poll: a hostile guest has as many sockets as it likes


class LookTap:
    """Implements ``ports.PacketTap`` by an eye, which stays its owner's and is not closed here.

    ``clock`` is nanoseconds since the Unix epoch. Looks that take long come less often: at most half of the time is
    spent looking.
    """

    def __init__(
        self,
        vm: GuestId,
        eye: GuestEye | None,
        clock: Callable[[], int],
        *,
        community_id: CommunityId,
        pace_s: float = PACE_S,
        max_flows: int = MAX_FLOWS,
    ) -> None:
        self.vm = vm
        self._eye, self._clock, self._pace_s = eye, clock, pace_s
        self._connections = Connections(vm, community_id, max_flows)
        self._waiting: deque[FlowEvent] = deque()
        self._next_s = 0.0
        self._events = 0
        self._looks: Counter[str] = Counter()
        self._closed = False

    @property
    def note(self) -> str:
        """What a person must know of such a watch, as one line."""
        return (
            f"its connections are read from memory every {self._pace_s:g} s; not seen: most shorter ones, UDP without "
            "a fixed peer, how much a connection carries"
        )

    def use(self, eye: GuestEye | None) -> None:
        """Look through another eye from now on: the guest was attached to again. None: do not look."""
        self._eye, self._next_s = eye, 0.0
        self._connections.start_afresh()

    def poll(self, timeout_s: float) -> list[FlowEvent]:
        """Wait at most ``timeout_s`` for the next look; return what it tells, at most a batch."""
        if not self._waiting:
            wait_s = self._next_s - time.monotonic()
            if self._eye is None or self._closed or wait_s > timeout_s:
                time.sleep(max(0.0, timeout_s))
                return []
            time.sleep(max(0.0, wait_s))
            self._look(self._eye)
        events = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        self._events += len(events)
        return events

    @property
    def exhausted(self) -> bool:
        """Whether it was closed: a guest that cannot be looked at now may be attached to again."""
        return self._closed

    def fileno(self) -> int:
        """Nothing tells of a guest's sockets: they are looked at again."""
        return -1

    def stats(self) -> TapStats:
        """Flows and events. No packet was seen; ``ignored`` counts the looks that saw less than everything."""
        return TapStats(
            flows=self._connections.told,
            events=self._events,
            evicted=self._connections.evicted,
            ignored=tuple(sorted(self._looks.items())),
        )

    def close(self) -> list[FlowEvent]:
        """Stop; the events that end the flows still open."""
        if self._closed:
            return []
        self._closed = True
        events = [*self._waiting, *self._connections.end_all(FlowEnd.WATCH_ENDED, self._clock())]
        self._waiting.clear()
        self._events += len(events)
        return events

    def _look(self, eye: GuestEye) -> None:
        began_s = time.monotonic()
        try:
            snapshot = eye.read_snapshot()
        except (GuestError, HostError) as error:  # also one that is gone: whose eye it is will know
            self._looks[f"looks: {type(error).__name__}"] += 1
            self._connections.miss_look()
        else:
            self._waiting += self._connections.compare(snapshot, self._clock())
            if self._connections.partial:
                self._looks["looks with gaps"] += 1
            if snapshot.torn:
                self._looks["looks with torn reads"] += 1
        now_s = time.monotonic()
        if now_s - began_s > self._pace_s / 2 > 0:
            self._looks["looks slower than the pace"] += 1
        self._next_s = now_s + max(self._pace_s - (now_s - began_s), now_s - began_s)
