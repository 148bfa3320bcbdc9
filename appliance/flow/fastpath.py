"""The short way for most packets: those of a flow in full swing whose first payloads have been told.

Only counters, time and TCP sequence numbers are left to keep, so the packet is recognised by its raw address and port
bytes, without decoding. Whatever is unusual (IP options, tags, fragments, SYN, FIN, RST) goes the long way.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from appliance.flow.decode import TCP, UDP
from appliance.flow.payloads import wants_more
from appliance.flow.records import Record, State
from appliance.ports import Frame

_V4: Final = b"\x08\0\x45"  # EtherType, version 4, no options
_V6: Final = b"\x86\xdd"
_SETTLED: Final = frozenset({State.ESTABLISHED, State.MIDSTREAM, State.UDP_ONEWAY, State.UDP_BIDIR})
_SEQ_ACK = Struct(">II").unpack_from
_MASK: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000


class FastPath:
    """Settled flows by their raw bytes, one map per side. The table tells when a flow leaves."""

    def __init__(self) -> None:
        self._known: tuple[dict[bytes, Record], dict[bytes, Record]] = ({}, {})

    def add(self, record: Record, side: int, data: bytes) -> None:
        """Take the flow in, if its last packet ``data`` shows that it is one for the short way."""
        if record.state not in _SETTLED or wants_more(record, side):
            return
        if data[12:15] == _V4 and data[23] == record.key[1]:
            raw = data[23:24] + data[26:38]
        elif data[12:14] == _V6 and data[20] == record.key[1]:
            raw = data[20:21] + data[22:58]
        else:
            return
        record.raw[side] = raw
        self._known[side][raw] = record

    def remove(self, record: Record) -> None:
        """The flow is over or has changed its state."""
        for side in (0, 1):
            if (raw := record.raw[side]) and self._known[side].get(raw) is record:
                del self._known[side][raw]
                record.raw[side] = b""

    def find(self, frame: Frame) -> tuple[Record, int, int, int] | None:
        """The flow of a plain packet, with its side, IP size and header length; notes TCP sequence numbers."""
        data = frame.data
        side = 0 if frame.from_guest else 1
        if data[12:15] == _V4:
            if len(data) < 42 or data[20] & 0x3F or data[21]:
                return None
            record = self._known[side].get(data[23:24] + data[26:38])
            at, size = 34, data[16] << 8 | data[17]
        elif data[12:14] == _V6 and len(data) >= 62:
            record = self._known[side].get(data[20:21] + data[22:58])
            at, size = 54, data[18] << 8 | data[19]
            size += 40 if size else 0
        else:
            return None
        if record is None or record.key[0] != frame.vlan or frame.at_ns - record.last_ns > record.timeout_ns:
            return None
        room = frame.wire_len - 14
        if size > room or not size:
            size = room
        if record.key[1] == UDP:
            return record, side, size, at - 6
        if record.key[1] != TCP or len(data) < at + 20 or data[at + 13] & 0x17 != 0x10:
            return None
        headers = at - 14 + (data[at + 12] >> 4 << 2)
        sequence, record.acks[side] = _SEQ_ACK(data, at + 4)
        top = (sequence + size - headers) & _MASK
        known = record.tops[side]
        if known is None or (top - known) & _MASK < _HALF:
            record.tops[side] = top
        return record, side, size, headers
