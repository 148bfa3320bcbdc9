"""From a judgement to what the hand does.

    judgement                flow that waits for its verdict     flow that is under way
    allow, or monitor        RELEASE                             nothing
    deny and enforce         REDIRECT, HOLD or BLOCK             HOLD, RESET or BLOCK

The one place where enforcement is decided. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.model import Act, Decision, Judgement, Transport

REDIRECT = "redirect:"  # followed by the name of a decoy


@dataclass(frozen=True, slots=True)
class Order:
    """One act on one flow; ``target`` names the decoy of a REDIRECT."""

    act: Act
    target: str | None = None


def order_for(judgement: Judgement, protocol: Transport, *, held: bool) -> Order | None:
    """What becomes of a flow that was judged so; None: nothing. ``held``: it waits for this verdict in the host.

    Of several actions the one that keeps most possibilities counts: a decoy before a person, a person before a reset, a
    reset before a silent block. Enforcement that names none of them stops the flow all the same.
    """
    if judgement.decision is Decision.ALLOW or not judgement.enforce:
        return Order(Act.RELEASE) if held else None
    decoy = next((action.removeprefix(REDIRECT) for action in judgement.actions if action.startswith(REDIRECT)), None)
    if decoy is not None and held:  # one under way has a TCP state that no decoy knows
        return Order(Act.REDIRECT, decoy)
    if "hold" in judgement.actions:
        return Order(Act.HOLD)
    silent = "block" in judgement.actions and "reset" not in judgement.actions
    return Order(Act.BLOCK if silent else stop(protocol, held=held))


def stop(protocol: Transport, *, held: bool) -> Act:
    """How to stop a flow so that both ends notice: one that still waits is refused, a TCP connection is reset."""
    return Act.BLOCK if held or protocol is not Transport.TCP else Act.RESET


def by_default(default: Decision, protocol: Transport, *, held: bool) -> Order:
    """What becomes of a flow of which nobody said anything in time."""
    return Order(Act.RELEASE if default is Decision.ALLOW else stop(protocol, held=held))
