"""TCP as an onlooker sees it: the state of a flow after one more segment (RFC 9293, figure 5; RFC 5961 for RST).

Both ends may lie to an onlooker (a reset that never arrives, data after the end): a reset counts only inside the
window, and a closed flow in which new data flows again is reported as a new flow by the table.
"""

from __future__ import annotations

from typing import Final

from appliance.flow.decode import ACK, FIN, RST, SYN, Decoded
from appliance.flow.records import Record, State
from appliance.model import FlowEnd

_MASK: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000
_SLACK: Final = 1 << 20  # segments that we lost may have moved the window
MAX_LATE: Final = 1024  # segments of new data, in one direction, after which a closed flow is not closed


def is_new_connection(record: Record, side: int, packet: Decoded) -> bool:
    """Whether this SYN opens another connection on the same tuple (a retransmission has the same ISN)."""
    if packet.flags & (SYN | ACK) != SYN:
        return False
    isn = record.isn[side]
    if isn is not None:
        return isn != packet.seq
    return record.state not in {State.SYN_SENT, State.SYN_RECV}  # there: a simultaneous open


def step(record: Record, side: int, packet: Decoded) -> tuple[State, FlowEnd | None]:
    """Return the state after this segment and, when it ends the flow, why. Keeps sequence numbers in the record."""
    flags, state, other = packet.flags, record.state, 1 - side
    if flags & RST:
        return (State.CLOSED, FlowEnd.RST) if _is_valid_reset(record, side, packet) else (state, None)
    if flags & SYN:
        record.isn[side] = packet.seq
        if record.isn[other] is not None or flags & ACK:
            state = State.SYN_RECV if state in {State.SYN_SENT, State.SYN_RECV} else state
    top = packet.seq + packet.payload_len + (flags & FIN) + (flags >> 1 & 1)
    known = record.tops[side]
    if known is None or 0 < (top - known) & _MASK < _HALF:
        record.tops[side] = top & _MASK
    if flags & ACK:
        record.acks[side] = packet.ack
        if not flags & SYN:
            state = _confirm(record, side, state)
    if flags & FIN:
        record.fins |= 1 << side
        record.last_fin = side
        return State.CLOSING if record.fins == 3 else State.HALF_CLOSED, None
    if state is State.CLOSING and side != record.last_fin and flags & ACK:
        return State.CLOSED, FlowEnd.FIN
    return state, None


def absorbs(record: Record, side: int, packet: Decoded) -> bool:
    """Whether a closed flow explains this segment: a late ACK, a retransmission, data that was under way."""
    if packet.flags & RST:
        return True
    top = record.tops[1 - side]
    if packet.flags & ACK and top is not None and 0 < (packet.ack - top) & _MASK < _HALF:
        return False  # it acknowledges what was sent after the end
    top = record.tops[side]
    if packet.payload_len and (top is None or 0 < (packet.seq + packet.payload_len - top) & _MASK < _HALF):
        record.late[side] += 1
    return 0 in record.late and max(record.late) <= MAX_LATE


def _confirm(record: Record, side: int, state: State) -> State:
    """The state after a plain ACK."""
    if state is State.SYN_RECV:
        return State.ESTABLISHED
    if state in {State.SYN_SENT, State.MIDSTREAM} and record.acks[1 - side] is not None:
        return State.ESTABLISHED  # part of the handshake was lost, or began before we looked
    return state


def _is_valid_reset(record: Record, side: int, packet: Decoded) -> bool:
    other = 1 - side
    if record.tops[side] is None:  # its first word: the refusal of a SYN says which SYN (RFC 9293, section 3.5.2)
        isn = record.isn[other]
        return isn is None or not packet.flags & ACK or 0 < (packet.ack - isn) & _MASK <= _SLACK
    floor = record.acks[other]
    if floor is None:
        floor = record.isn[side]
    return floor is None or (packet.seq - floor + 1) & _MASK <= _SLACK
