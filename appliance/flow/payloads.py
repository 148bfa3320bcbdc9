"""The first payloads of a flow: which bytes of a segment were not told before.

A TCP segment may repeat, overlap or precede others (RFC 9293, section 3.4). Payloads are told in the order of arrival;
bytes that were told are not told again.
"""

from __future__ import annotations

from typing import Final

from appliance.flow.decode import SYN, TCP, UDP, Decoded
from appliance.flow.records import Record

MAX_PAYLOADS: Final = 3  # per direction
MAX_DNS: Final = 256  # one socket of a resolver asks many questions, and each answer names addresses
MAX_BYTES: Final = 2048  # of each
_MASK: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000


def wants_more(record: Record, side: int) -> bool:
    """Whether a further payload of this side would be told."""
    told = record.payloads[side]
    if told < MAX_PAYLOADS:
        return True
    _, protocol, _, _, _, remote_port = record.key
    return remote_port == 53 and protocol == UDP and told < MAX_DNS


def read_payload(record: Record, side: int, packet: Decoded, data: bytes) -> bytes | None:
    """Return the bytes of this packet that are a new first payload of the flow, else None."""
    if packet.payload_len <= 0 or not wants_more(record, side):
        return None
    skip, stop = (0, packet.payload_len) if packet.protocol != TCP else _fresh(record, side, packet)
    stop = min(stop, skip + MAX_BYTES, len(data) - packet.payload_at)
    if skip >= stop:
        return None
    record.payloads[side] += 1
    return data[packet.payload_at + skip : packet.payload_at + stop]


def _fresh(record: Record, side: int, packet: Decoded) -> tuple[int, int]:
    """``[skip, stop)`` of a TCP segment's payload that no earlier segment carried."""
    sequence = packet.seq + 1 if packet.flags & SYN else packet.seq  # TCP Fast Open: data in the SYN (RFC 7413)
    base = record.bases[side]
    if base is None:
        isn = record.isn[side]
        base = record.bases[side] = (sequence if isn is None else isn + 1) & _MASK
    begin = (sequence - base) & _MASK
    if begin >= _HALF:
        begin -= 1 << 32
    stop = begin + packet.payload_len
    if begin == -1 and stop == 0:
        return 0, 0  # a keep-alive probe repeats the byte before the first one (RFC 1122, section 4.2.3.6)
    skip = begin
    for low, high in record.ranges[side]:
        if low <= skip < high:
            skip = high
        elif skip < low < stop:
            stop = low
    if skip < stop:
        record.ranges[side] = sorted([*record.ranges[side], (skip, stop)])
    return skip - begin, stop - begin
