"""The hand on single flows (``appliance.ports.PacketHand``): verdicts for the kernel, and what was held sent on.

A new flow is held by the kernel program itself, by the port's policy; its frame comes with the event that tells it.
Only exceptions have a verdict (``verdicts.py``): a released flow needs none.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from appliance.errors import HostError
from appliance.model import Decision, Decoy, Direction, FlowId, HoldPolicy
from appliance.tap.bpf import forge, layout
from appliance.tap.bpf.heart import Heart
from appliance.tap.bpf.inject import Injector
from appliance.tap.bpf.known import Known
from appliance.tap.bpf.layout import KEY, SECOND_NS
from appliance.tap.bpf.reset import Resets
from appliance.tap.bpf.syscalls import Map
from appliance.tap.bpf.talk import Hold, Talk
from appliance.tap.bpf.verdicts import Verdicts

MAX_HELD_BYTES: Final = 64 << 20  # beyond it, a released flow goes on by its repetition
DEFAULT_POLICY: Final = HoldPolicy()

FindPort = Callable[[str], int]  # ifindex of a name in the ports' namespace, 0: there is none


class Hand:
    """Acts on flows of one tap; used by the thread that polls. Methods that name a flow return whether it was done."""

    def __init__(
        self, maps: Mapping[str, Map], known: Known, heart: Heart, injector: Injector, find_port: FindPort
    ) -> None:
        self._known, self._heart, self._injector, self._find_port = known, heart, injector, find_port
        self.verdicts = Verdicts(maps, heart)
        self._swapped: set[int] = set()
        self._policy = DEFAULT_POLICY
        self._due: list[tuple[int, int]] = []  # deadlines of holds, and whose
        self._kept = 0  # bytes of held frames
        self._resets = Resets(maps["flows"], self._send)

    def set_swapped(self, ifindex: int) -> None:
        """What the guest sends leaves by this port (macvtap)."""
        self._swapped.add(ifindex)

    # -- PacketHand --

    def hold_new(self, policy: HoldPolicy | None) -> None:
        """From now on new flows wait for a verdict; None: they do not."""
        self._policy = policy or self._policy
        self._heart.hold_new(policy)

    def release(self, flow: FlowId) -> bool:
        """Let a flow go on: what was kept of it is sent on, in order; else its repetition passes."""
        talk = self._known.find(flow)
        return talk is not None and self._release(talk)

    def block(self, flow: FlowId, seconds: float | None = None, *, reset: bool = False) -> bool:
        """Drop its packets; a guest's held SYN is answered with a reset, so its program need not wait."""
        talk = self._known.find(flow)
        if talk is None:
            return False
        if not self.verdicts.put(talk, layout.DROP, seconds) and (seconds is not None or not self._say_no(talk)):
            return False
        hold = self._drop_hold(talk)
        self._note_decision(talk, goes_on=False)
        is_refused = hold is not None and self._refuse(talk, hold)
        if reset and not is_refused and talk.flow.ip_protocol == forge.TCP:
            self._resets.send(talk)
        return True

    def hold(self, flow: FlowId, seconds: float, default: Decision) -> bool:
        """Let its packets wait; after ``seconds`` without another act, ``default`` is what becomes of it."""
        talk = self._known.find(flow)
        otherwise = layout.DROP if default is Decision.DENY else layout.ALLOW
        if talk is None or not self.verdicts.put(talk, layout.HOLD, seconds, otherwise=otherwise):
            return False
        if talk.hold is None:
            talk.hold = Hold(0, default)
        talk.hold.default = default
        self._set_deadline(talk, talk.hold, time.monotonic_ns() + int(seconds * SECOND_NS))
        return True

    def redirect(self, flow: FlowId, decoy: Decoy) -> bool:
        """Send a held flow to the decoy instead. Raises HostError when the decoy's port is not there."""
        talk = self._known.find(flow)
        if talk is None or not talk.waits or talk.hold is None or not talk.hold.frames:
            return False
        ifindex = self._find_port(decoy.port.ifname)
        if not ifindex or decoy.port.ifindex not in {None, ifindex}:
            raise HostError(f"decoy {decoy.name}: there is no port {decoy.port.ifname} beside the guest's")
        if not self.verdicts.put(talk, layout.REDIRECT, ifindex=ifindex, mac=parse_mac(decoy.mac)):
            return False
        hold = self._drop_hold(talk)
        done = hold is not None and self._send_on(talk, hold)
        self._note_decision(talk, goes_on=True)
        return done

    def ban(self, peer: IPv4Network | IPv6Network, seconds: float | None = None) -> None:
        """Drop what comes from or goes to these addresses, existing flows too."""
        self.verdicts.ban(peer, seconds)

    def unban(self, peer: IPv4Network | IPv6Network) -> bool:
        """Lift a ban; whether there was one."""
        return self.verdicts.unban(peer)

    # -- what the tap tells --

    def note_waiting(self, talk: Talk, hold: int, at_ns: int) -> None:
        """The kernel holds this flow since ``at_ns`` (its clock); ``hold`` as in ``struct flow``."""
        if hold & ~layout.DENY in {layout.FREE, layout.REFUSED} or _is_decided(talk, at_ns):
            return
        talk.waits = True
        if talk.hold is None:
            talk.hold = Hold(0, Decision.DENY if hold & layout.DENY else Decision.ALLOW)
        if hold & ~layout.DENY != layout.ARMED and not talk.hold.deadline_ns:
            self._set_deadline(talk, talk.hold, at_ns + int(self._policy.deadline_s * SECOND_NS))

    def note_free(self, talk: Talk) -> None:
        """The kernel lets this flow pass: its deadline went by there."""
        talk.waits = False
        self.verdicts.lift_passing(talk)

    def keep(self, talk: Talk, side: int, frame: bytes, tag: int, gso_size: int, wire_len: int, at_ns: int) -> None:
        """Keep a frame of a flow that waits, as it will go on: at once, if it was on its way when that was said."""
        late = _is_decided(talk, at_ns)
        if talk.hold is None and not (late and talk.goes_on):
            return
        for piece in forge.complete(frame, tag, gso_size, wire_len):
            if late:
                self._send(talk.key, side == 0, piece, forged=False)
            elif talk.hold is not None and self._kept + len(piece) <= MAX_HELD_BYTES:
                talk.hold.frames.append((side, piece))
                talk.hold.size += len(piece)
                self._kept += len(piece)

    @property
    def next_due_ns(self) -> int:
        """When ``expire`` has work at the earliest (CLOCK_MONOTONIC); 0: it has none."""
        return min((due for due in (self._due[0][0] if self._due else 0, self._resets.next_due_ns) if due), default=0)

    def close(self) -> None:
        """Before the programs go: what waits goes on, where that is its default."""
        for talk in self._known:
            if talk.hold is not None and talk.hold.default is Decision.ALLOW:
                self._release(talk)

    def expire(self, now_ns: int) -> None:
        """Do what was to become of flows that waited long enough, and repeat resets that were challenged."""
        while self._due and self._due[0][0] <= now_ns:
            deadline_ns, number = heapq.heappop(self._due)
            talk = self._known.get(number)
            if talk is None or talk.hold is None or talk.hold.deadline_ns != deadline_ns:
                continue
            if talk.hold.default is Decision.ALLOW:
                self._release(talk)
            else:
                self.block(talk.flow.id)
        self._resets.repeat(now_ns)

    def note_end(self, talk: Talk) -> None:
        """The flow is over: nothing of it is sent on. Its verdict stays as long as the kernel knows the flow."""
        self._drop_hold(talk)

    # -- how --

    def _release(self, talk: Talk) -> bool:
        hold = self._drop_hold(talk)
        if self.verdicts.has_bans:  # its own verdict comes before a ban of its peer
            self.verdicts.put(talk, layout.ALLOW)
        else:
            self.verdicts.lift(talk)
        done = hold is not None and bool(hold.frames) and self._send_on(talk, hold)
        done = done or not talk.waits or self.verdicts.put(talk, layout.ALLOW)
        self._note_decision(talk, goes_on=True)
        return done

    def _note_decision(self, talk: Talk, *, goes_on: bool) -> None:
        talk.decided_ns, talk.goes_on = time.monotonic_ns(), goes_on

    def _send_on(self, talk: Talk, hold: Hold) -> bool:
        """Whether all that was kept went on; then the kernel holds the flow no longer."""
        sent = [self._send(talk.key, side == 0, frame, forged=False) for side, frame in hold.frames]
        talk.waits = talk.waits and not all(sent)
        return all(sent)

    def _refuse(self, talk: Talk, hold: Hold) -> bool:
        """Answer the guest's SYN, where one waits; False after a segment without SYN, which may need more than that."""
        for side, frame in hold.frames:
            if side == 0 and talk.flow.direction is Direction.OUT and (answer := forge.answer_syn(frame)) is not None:
                return self._send(talk.key, False, forge.make_reset(talk.key, frame[:12], True, 0, answer), forged=True)
            if side == 0 and talk.flow.midstream and (number := forge.expected_by(frame)) is not None:
                self._send(talk.key, False, forge.make_reset(talk.key, frame[:12], True, number, 0), forged=True)
                return False
        return False

    def _say_no(self, talk: Talk) -> bool:
        """Tell the kernel by a frame that waits that its flow is refused: where there is no room for a verdict."""
        if not talk.waits or talk.hold is None or not talk.hold.frames:
            return False
        side, frame = talk.hold.frames[0]
        return self._inject(talk.key, side == 0, frame, layout.REFUSE)

    def _send(self, key: bytes, from_guest: bool, frame: bytes, *, forged: bool) -> bool:
        return self._inject(key, from_guest, frame, layout.FORGED if forged else 0)

    def _inject(self, key: bytes, from_guest: bool, frame: bytes, kind: int) -> bool:
        ifindex = KEY.unpack(key)[0]
        return self._injector.send(frame, ifindex, ingress=from_guest != (ifindex in self._swapped), kind=kind)

    def _drop_hold(self, talk: Talk) -> Hold | None:
        hold, talk.hold = talk.hold, None
        self._kept -= hold.size if hold else 0
        return hold

    def _set_deadline(self, talk: Talk, hold: Hold, deadline_ns: int) -> None:
        hold.deadline_ns = deadline_ns
        heapq.heappush(self._due, (deadline_ns, talk.number))


def _is_decided(talk: Talk, at_ns: int) -> bool:
    """Whether what the kernel told of a hold at that time is old news.

    A frame of ours that frees a flow may wait in the kernel's backlog, and meanwhile the flow waits there.
    """
    return at_ns <= talk.decided_ns or (talk.goes_on and talk.hold is None)


def parse_mac(text: str) -> bytes:
    """Six bytes of ``aa:bb:cc:dd:ee:ff``. Raises HostError."""
    try:
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise HostError(f"{text!r} is no MAC address")
    return mac
