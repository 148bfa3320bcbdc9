"""What the kernel is told of a port: that we live, which verdicts there are, which new flows wait.

The only writer of the map ``ports``. ``beat`` may be called by any thread: while nobody beats, the kernel fails open or
closed, as the operator chose.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable
from typing import Final

from appliance.model import Decision, HoldPolicy
from appliance.tap.bpf import layout
from appliance.tap.bpf.syscalls import Map

BEAT_NS: Final = 250_000_000
PATIENCE_S: Final = 1.5  # without a heartbeat for so long, verdicts are lifted
_HOLDS: Final = layout.HOLD_OUT | layout.HOLD_IN | layout.HOLD_PAYLOAD | layout.HOLD_DENY


class Heart:
    """The ports of one tap, by ifindex with the flags of each."""

    def __init__(self, ports: Map, *, fail_closed: bool, patience_s: float = PATIENCE_S) -> None:
        self.mark = secrets.randbelow((1 << 30) - 1) + 1 << 2  # the low bits say what kind of packet it is
        self._map = ports
        self._ports: dict[int, int] = {}
        self._flags = layout.FAIL_CLOSED if fail_closed else 0
        self._patience_ns = int(patience_s * layout.SECOND_NS)
        self._hold_ns = 0
        self._next_ns = 0
        self._lock = threading.Lock()
        self._stopped = False

    def add(self, ifindexes: Iterable[tuple[int, int]]) -> None:
        """Begin on these: with the first beat the programs begin to look."""
        with self._lock:
            self._ports.update(ifindexes)
            self._write()

    def forget(self, ifindex: int) -> None:
        """A port is gone."""
        with self._lock:
            self._ports.pop(ifindex, None)
            self._map.delete(ifindex.to_bytes(4, "little"))

    def beat(self) -> None:
        """Say that we live; from any thread."""
        with self._lock:
            if not self._stopped:
                self._write()

    def beat_if_due(self, now_ns: int) -> None:
        """Beat, unless we did a moment ago."""
        if now_ns >= self._next_ns:
            self.beat()

    def hold_new(self, policy: HoldPolicy | None) -> None:
        """Which new flows wait from now on."""
        flags = 0
        if policy is not None:
            flags |= layout.HOLD_OUT if policy.outgoing else 0
            flags |= layout.HOLD_IN if policy.incoming else 0
            flags |= layout.HOLD_PAYLOAD if policy.payload else 0
            flags |= layout.HOLD_DENY if policy.default is Decision.DENY else 0
            self._hold_ns = int(policy.deadline_s * layout.SECOND_NS)
        self.set(_HOLDS, flags)

    def set(self, which: int, flags: int) -> None:
        """Set ``which`` of the flags to ``flags``; the kernel knows when this returns."""
        with self._lock:
            wanted = self._flags & ~which | flags
            if (wanted != self._flags or which == _HOLDS) and not self._stopped:
                self._flags = wanted
                self._write()

    def stop(self) -> None:
        """No beat after this."""
        with self._lock:
            self._stopped = True

    def _write(self) -> None:
        now_ns = time.monotonic_ns()
        self._next_ns = now_ns + BEAT_NS
        for ifindex, flags in self._ports.items():
            value = layout.PORT.pack(now_ns, self._patience_ns, self._hold_ns, self._flags | flags, self.mark)
            self._map.update(ifindex.to_bytes(4, "little"), value)
