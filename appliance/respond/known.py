"""Which flow a verdict's id names: the ids that people were told of late. Bounded; the oldest are forgotten."""

from __future__ import annotations

import threading

from appliance.errors import UsageError
from appliance.model import FlowId

MAX_KNOWN = 50_000


class KnownFlows:
    """Filled by whoever tells verdicts, asked by the control room; any thread."""

    def __init__(self, limit: int = MAX_KNOWN) -> None:
        self._limit = limit
        self._flows: dict[str, FlowId] = {}
        self._lock = threading.Lock()

    def remember(self, verdict_id: str, flow: FlowId) -> None:
        """Note that this id was told; it replaces an older flow of the same id."""
        with self._lock:
            self._flows[verdict_id] = flow
            if len(self._flows) > self._limit:
                del self._flows[next(iter(self._flows))]

    def find(self, prefix: str) -> tuple[str, FlowId]:
        """The one id that begins so, and its flow. Raises UsageError for none and for several."""
        with self._lock:
            if prefix in self._flows:
                return prefix, self._flows[prefix]
            ids = tuple(self._flows)
        return self._one(prefix, [found for found in ids if found.startswith(prefix)])

    def _one(self, prefix: str, found: list[str]) -> tuple[str, FlowId]:
        if len(found) > 1:
            raise UsageError(f"{prefix!r} begins several ids: give more of its digits")
        with self._lock:
            flow = self._flows.get(found[0]) if found else None
        if flow is None:
            raise UsageError(f"{prefix!r} names no connection of this run; ids are printed by watch")
        return found[0], flow
