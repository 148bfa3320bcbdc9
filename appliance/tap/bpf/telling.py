"""Records of the ring become flow events; the hand hears of what waits."""

from __future__ import annotations

from typing import Final

from appliance.model import FlowEnd, FlowEvent, FlowPayload, FlowStarted
from appliance.tap.bpf import forge
from appliance.tap.bpf.hand import Hand
from appliance.tap.bpf.known import Known
from appliance.tap.bpf.layout import (
    DENY,
    END,
    EVENT,
    EVENT_COUNTS,
    EVENT_FLOW,
    EVENT_FRAME,
    EVENT_HEAD,
    FREE,
    HELD,
    HELD_PAYLOAD,
    PAYLOAD,
    REFUSED,
    START,
)
from appliance.tap.bpf.opening import SIDES, First, Openings
from appliance.tap.bpf.sweep import Sweep
from appliance.tap.bpf.talk import Talk

MAX_DATA: Final = 2048  # of a payload
_REASONS: Final = (FlowEnd.FIN, FlowEnd.RST, FlowEnd.IDLE)
_PASSING: Final = frozenset({FREE, REFUSED})


class Teller:
    """What the kernel tells, put into words."""

    def __init__(self, known: Known, openings: Openings, hand: Hand, sweep: Sweep) -> None:
        self._known, self._openings, self._hand, self._sweep = known, openings, hand, sweep
        self._macs: dict[bytes, bytes] = {}  # of the ports, by the first bytes of a flow's key

    def learn_mac(self, ifindex: int, mac: bytes) -> None:
        """The address that the guest was given at this port."""
        self._macs[ifindex.to_bytes(4, "little")] = mac

    def take(self, data: memoryview, at: int, events: list[FlowEvent]) -> None:
        """Turn one record into events."""
        number, kernel_ns, kind, side, reason, seen, offset, length, captured, hold = EVENT_HEAD.unpack_from(data, at)
        at_ns = kernel_ns + self._sweep.offset_ns
        talk = self._known.get(number)
        if talk is None:
            missed, first_side, first_flags, icmp_type, icmp_code, macs, key = EVENT_FLOW.unpack_from(data, at)
            first = First(first_side, first_flags, icmp_type, icmp_code, self._find_spoof(key, first_side, macs))
            if kind & START:
                talk = self._known.start(number, key, at_ns, first)
            elif missed & START:
                talk = self._known.recover(number, key, at_ns, first)
            if talk is None:
                return  # ended here already
            events.append(FlowStarted(talk.flow, at_ns, hold & ~DENY not in _PASSING))
        if seen != talk.seen:
            talk.seen = seen
            self._openings.learn(talk.key, seen)
        if hold:
            self._hand.note_waiting(talk, hold, kernel_ns)
        if kind & HELD:
            if captured:
                frame = data[at + EVENT.size : at + EVENT.size + captured].tobytes()
                tag, gso_size = EVENT_FRAME.unpack_from(data, at)
                self._hand.keep(talk, side, frame, tag, gso_size, length, kernel_ns)
                if hold & ~DENY == HELD_PAYLOAD:
                    self._tell_held(talk, side, frame, at_ns, events)
        elif kind & PAYLOAD and (index := talk.told[side]) < talk.limit:
            skip, stop = talk.fresh(side, offset, length) if talk.flow.ip_protocol == 6 else (0, captured)
            stop = min(stop, captured)
            if skip < stop:
                begin = at + EVENT.size
                payload = data[begin + skip : begin + stop].tobytes()
                events.append(FlowPayload(talk.flow.id, SIDES[side], index, payload, at_ns))
                talk.told[side] = index + 1
        if kind & END:
            if talk.hold is not None:
                self._hand.note_end(talk)
            events.append(self._known.end(talk, _REASONS[reason], EVENT_COUNTS.unpack_from(data, at), at_ns))

    def _tell_held(self, talk: Talk, side: int, frame: bytes, at_ns: int, events: list[FlowEvent]) -> None:
        """The first payload of a flow whose payload waits; when it goes on, it is known already."""
        shape = forge.parse(frame)
        if shape is None or talk.told[side]:
            return
        payload = frame[shape.payload : shape.end]
        skip, stop = talk.fresh(side, 0, len(payload))
        stop = min(stop, MAX_DATA)
        if skip < stop:
            events.append(FlowPayload(talk.flow.id, SIDES[side], 0, payload[skip:stop], at_ns))
            talk.told[side] += 1

    def _find_spoof(self, key: bytes, side: int, macs: bytes) -> str | None:
        given = self._macs.get(key[:4])
        if side or given is None or given == macs[6:]:
            return None
        return macs[6:].hex(":")
