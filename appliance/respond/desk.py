"""What the control room may ask of one guest's watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.model import Act, Decision, FlowId, GuestId, IpNetwork, Verdict
from appliance.respond.mailbox import Mailbox


@dataclass(frozen=True, slots=True)
class HeldFlow:
    """A flow that waits for a person; at ``until_ns`` (Unix epoch) ``default`` is what becomes of it."""

    verdict: Verdict
    until_ns: int
    default: Decision


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """How one guest is watched right now."""

    rung: str  # how its packets are seen, as doctor names it
    acts: bool  # there is a hand: its flows can be held, blocked, banned
    enforces: bool  # its rules act; False: they only report
    started_ns: int  # Unix epoch
    flows: int = 0  # seen since then
    held: int = 0  # flows that wait for a person
    blocked: int = 0  # flows stopped since then


class GuestDesk(Protocol):
    """One guest, as the control room sees it.

    ``vm`` and ``mailbox`` may be read from any thread. The methods are called in the guest's own thread only, through
    the mailbox; they must be short, and may raise ParasightError, whose text goes to the person who asked.
    """

    @property
    def vm(self) -> GuestId:
        """Which guest."""
        ...

    @property
    def mailbox(self) -> Mailbox:
        """Served by the guest's thread between two batches of packets, closed when its watch ends."""
        ...

    def status(self) -> GuestStatus:
        """How it is watched right now."""
        ...

    def held(self) -> Sequence[HeldFlow]:
        """The flows that wait for a person, oldest first."""
        ...

    def decide(self, flow: FlowId, allow: bool, who: str) -> bool:
        """A person's answer for a held flow; False: it does not wait any more."""
        ...

    def act(self, flow: FlowId, act: Act, who: str) -> bool:
        """RELEASE, BLOCK or RESET one flow, by a person's order; False: it is over, or the act cannot be done to it."""
        ...

    def ban(self, peer: IpNetwork, seconds: float | None) -> None:
        """Drop this guest's packets from and to ``peer``; the ban ends by itself after ``seconds``, None: never."""
        ...

    def unban(self, peer: IpNetwork) -> bool:
        """Lift a ban; whether there was one."""
        ...
