"""One guest under watch, as the control room sees it (``appliance.respond.desk.GuestDesk``)."""

from __future__ import annotations

from dataclasses import dataclass

from appliance.errors import UsageError
from appliance.messages import Decided
from appliance.model import Act, FlowId, GuestId, IpNetwork
from appliance.ports import PacketHand
from appliance.respond.desk import GuestStatus, HeldFlow
from appliance.respond.mailbox import Mailbox
from appliance.watch import GuestWatch

_STOPS = (Act.BLOCK, Act.RESET, Act.REDIRECT)


@dataclass(slots=True)
class Front:
    """Orders from outside for one guest's watch. Its methods run in the guest's thread, by ``mailbox.serve``."""

    watch: GuestWatch
    hand: PacketHand | None  # also where the rules do not act: a person may
    rung: str
    started_ns: int
    mailbox: Mailbox

    @property
    def vm(self) -> GuestId:
        """Which guest."""
        return self.watch.info.id

    def status(self) -> GuestStatus:
        """How it is watched right now."""
        acts = self.watch.summary.acts
        return GuestStatus(
            rung=self.rung,
            acts=self.hand is not None,
            enforces=self.watch.enforces,
            started_ns=self.started_ns,
            flows=self.watch.flows,
            held=len(self.watch.engine.waiting),
            blocked=sum(acts[act.value] for act in _STOPS),
        )

    def held(self) -> list[HeldFlow]:
        """The flows that wait for a person, oldest first."""
        waiting = self.watch.engine.waiting.values()
        return [HeldFlow(one.verdict, one.deadline_ns, one.verdict.judgement.ask.default) for one in waiting]

    def decide(self, flow: FlowId, allow: bool, who: str) -> bool:
        """A person's answer for a held flow."""
        if flow not in self.watch.engine.waiting:
            return False
        self.watch.take(Decided(flow, allow, who, self.watch.clock()))
        return True

    def act(self, flow: FlowId, act: Act, who: str) -> bool:
        """RELEASE, BLOCK or RESET one flow. One that waits for a person is decided on so."""
        if self.decide(flow, act is Act.RELEASE, who):
            return True
        hand = self._hand()
        done = hand.release(flow) if act is Act.RELEASE else hand.block(flow, reset=act is Act.RESET)
        if done:
            self.watch.summary.acts[act.value] += 1
        return done

    def ban(self, peer: IpNetwork, seconds: float | None) -> None:
        """Drop this guest's packets from and to ``peer``."""
        self._hand().ban(peer, seconds)

    def unban(self, peer: IpNetwork) -> bool:
        """Lift a ban; whether there was one."""
        return self._hand().unban(peer)

    def _hand(self) -> PacketHand:
        if self.hand is None:
            raise UsageError(f"the tap of this guest ({self.rung}) can only look; see: parasight doctor")
        return self.hand
