"""The acts under way on the flows of one guest: what is asked of the hand, what it answered, who waits for a person.

A flow that waits in the host is sent on, stopped, or held for a person exactly once. What the hand could not hold or
divert is stopped: what is denied must not slip through. No I/O, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from appliance.bind import Case
from appliance.messages import Handle, Handled
from appliance.model import Act, Ask, Decision, Flow, FlowId, Handling, HoldPolicy, Judgement, Verdict
from appliance.rules.acts import Order, by_default, order_for, stop

MAX_WAITING = 4096  # flows held for a person; of more of them nobody will be asked
LEAD_NS = 25_000_000  # so long before a hold ends its flow is decided, or the tap would have decided already


@dataclass(slots=True)
class Waiting:
    """A flow that is held until a person decides, or until ``deadline_ns``."""

    verdict: Verdict
    since_ns: int
    deadline_ns: int
    fresh: bool  # it is held since its first packet: neither end knows of a connection


@dataclass(slots=True)
class Doing:
    """An act under way."""

    flow: Flow
    order: Order
    ask: Ask
    held: bool  # the flow has never gone on: to stop it is to refuse it
    since_ns: int | None = None  # since when it waits; None: it does not
    verdict: Verdict | None = None  # not reported yet; None: it goes on without one, because the hold is over
    again: bool = False  # its verdict was reported before
    handling: Handling | None = None  # what was done in the end


class Acts:
    """What is being done to the flows of one guest. ``hold`` is the policy by which the tap holds new ones."""

    def __init__(self, hold: HoldPolicy) -> None:
        self.hold = hold
        self.waiting: dict[FlowId, Waiting] = {}
        self._doing: dict[FlowId, Doing] = {}

    def order(self, case: Case, judgement: Judgement, at_ns: int) -> Order | None:
        """What the hand must do about a flow; whatever was held gets an answer."""
        protocol, held = case.flow.tuple.protocol, case.is_held(at_ns)
        if case.held and not case.attempts:  # nobody has answered who owns it
            order: Order | None = by_default(self.hold.default, protocol, held=held)
        else:
            order = order_for(judgement, protocol, held=held)
        if order is None:
            return Order(Act.RELEASE) if case.held else None
        if case.ended:  # nothing is left to be diverted, or to be asked about
            act = Act.RELEASE if order.act is Act.RELEASE else Act.BLOCK
            return Order(act) if case.held else None
        if order.act is Act.HOLD and len(self.waiting) >= MAX_WAITING:
            return by_default(judgement.ask.default, protocol, held=held)
        return order

    def begin(self, doing: Doing) -> Handle:
        """Ask it of the hand."""
        self._doing[doing.flow.id] = doing
        seconds = doing.ask.seconds if doing.order.act is Act.HOLD else None
        return Handle(doing.flow.id, doing.order.act, seconds, doing.ask.default, doing.order.target)

    def settle(self, event: Handled, *, living: bool) -> Handle | Doing | None:
        """Take the hand's answer: what to do instead, or what was done; None: nobody had asked.

        A person is asked about a ``living`` flow only.
        """
        doing = self._doing.get(event.flow)
        if doing is None or doing.order.act is not event.act:
            return None
        if event.done is False and event.act in (Act.HOLD, Act.REDIRECT):
            doing.order = Order(stop(doing.flow.tuple.protocol, held=doing.held))
            return self.begin(doing)
        del self._doing[event.flow]
        doing.handling = _handling(doing, event)
        if doing.verdict is not None:
            doing.verdict = replace(doing.verdict, handling=doing.handling)
            if event.act is Act.HOLD and event.done and living:
                since_ns = event.at_ns if doing.since_ns is None else doing.since_ns
                deadline_ns = event.at_ns + round(doing.ask.seconds * 1e9)
                self.waiting[event.flow] = Waiting(doing.verdict, since_ns, deadline_ns, doing.held)
        return doing

    def decide(self, flow_id: FlowId, allow: bool | None, who: str = "") -> Handle | None:
        """A person ends the waiting, or nobody did in time (``allow`` None); None: the flow does not wait."""
        waiting = self.waiting.pop(flow_id, None)
        if waiting is None:
            return None
        verdict, judgement = waiting.verdict, waiting.verdict.judgement
        if allow is None:
            allow = judgement.ask.default is Decision.ALLOW
            who = f"nobody decided within {judgement.ask.seconds:g} s"
        act = Act.RELEASE if allow else stop(verdict.flow.tuple.protocol, held=waiting.fresh)
        because = f"{judgement.because}; {who}: {'allow' if allow else 'block'}"
        verdict = replace(verdict, judgement=replace(judgement, because=because))
        order, since_ns = Order(act), waiting.since_ns
        return self.begin(Doing(verdict.flow, order, judgement.ask, waiting.fresh, since_ns, verdict, again=True))


def _handling(doing: Doing, event: Handled) -> Handling | None:
    """What was done, and how long the flow had waited for it, now or before it was let go without a verdict."""
    if event.done is None:
        return None
    before = doing.verdict.handling if doing.verdict else None
    held_ns = before.held_ns if before else None
    if doing.since_ns is not None:
        held_ns = max(0, event.at_ns - doing.since_ns)
    return Handling(event.act, event.done, None if event.act is Act.HOLD else held_ns)
