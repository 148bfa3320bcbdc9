"""What another engine is asked about denied processes, and which verdicts are told again with what it says. Pure.

A verdict does not wait for it: it is told at once with our own evidence, and again, by the same id, when the opinion
has come. What is denied to that process meanwhile, or for a while after, carries the same opinion.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from appliance.messages import AskOther, OpinionFound
from appliance.model import Evidence, FlowId, ProcessKey, Verdict

FRESH_NS = 600_000_000_000  # one process is asked about at most once in this time
MAX_ASKED = 32  # processes that are asked about at the same time
MAX_TOLD = 64  # verdicts of one process that are told again
MAX_KNOWN = 4096  # processes whose opinion is remembered


class Opinions:
    """Second opinions for one guest."""

    def __init__(self, *, wanted: bool) -> None:
        """``wanted``: there is an engine to ask."""
        self._wanted = wanted
        self._told: dict[ProcessKey, dict[FlowId, Verdict]] = {}  # to be told again
        self._known: OrderedDict[ProcessKey, tuple[int, tuple[Evidence, ...]]] = OrderedDict()

    def known(self, process: ProcessKey, at_ns: int) -> tuple[Evidence, ...]:
        """What was said of it, while that is fresh."""
        heard_ns, evidence = self._known.get(process, (0, ()))
        return evidence if at_ns - heard_ns < FRESH_NS else ()

    def ask(self, verdict: Verdict, at_ns: int) -> Iterator[AskOther]:
        """Ask about the process of a verdict that was just told, unless its opinion is fresh or under way."""
        process = verdict.binding.process
        if not self._wanted or process is None:
            return
        told = self._told.get(process.key)
        if told is not None:
            if len(told) < MAX_TOLD:
                told[verdict.flow.id] = verdict
            return
        heard_ns, _ = self._known.get(process.key, (None, ()))
        if (heard_ns is None or at_ns - heard_ns >= FRESH_NS) and len(self._told) < MAX_ASKED:
            self._told[process.key] = {verdict.flow.id: verdict}
            yield AskOther(process)

    def update(self, verdict: Verdict) -> None:
        """A verdict is told again for another reason: this is the one to tell once more."""
        process = verdict.binding.process
        told = self._told.get(process.key) if process else None
        if told is not None and verdict.flow.id in told:
            told[verdict.flow.id] = verdict

    def hear(self, found: OpinionFound) -> list[Verdict]:
        """The verdicts to tell again."""
        told = self._told.pop(found.process, None)
        if told is None:
            return []
        self._known[found.process] = (found.at_ns, found.evidence)
        self._known.move_to_end(found.process)
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        if not found.evidence:
            return []
        return [replace(one, evidence=one.evidence + found.evidence) for one in told.values()]

    def clear(self) -> None:
        """Forget all: another kernel runs."""
        self._told.clear()
        self._known.clear()
