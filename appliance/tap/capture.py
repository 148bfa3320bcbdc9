"""Packets out of pcap and pcapng files.

Own reader, since a capture is untrusted input: lengths are bounded, and the only exception is ConfigError for a file
that is no capture at all.

Sources: draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng, tcpdump.org/linktypes.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import BinaryIO, Final, NamedTuple

from appliance.errors import ConfigError

MAX_PACKET: Final = 1 << 20
MAX_BLOCK: Final = 16 << 20
MAX_INTERFACES: Final = 4096

# Magic number as it stands in the file -> byte order, nanoseconds per unit of the second time field.
_PCAP: Final = {
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\x3c\x4d": (">", 1),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
}
_SECTION: Final = b"\x0a\x0d\x0d\x0a"
_INTERFACE, _PACKET_OLD, _SIMPLE, _ENHANCED = 1, 2, 3, 6
_OPTION_TSRESOL, _OPTION_TSOFFSET = 9, 14
_HINTS: Final = {
    b"\x1f\x8b": "it is gzip-compressed; gunzip it first",
    b"\x28\xb5": "it is compressed; unzstd it first",
}


class Captured(NamedTuple):
    """One packet as the file has it."""

    at_ns: int
    link_type: int
    data: bytes
    wire_len: int


@dataclass(slots=True)
class _Interface:
    link_type: int
    snap: int
    units_per_s: int = 1_000_000
    offset_s: int = 0


@dataclass(slots=True)
class CaptureFile:
    """A capture that is read once, front to back. ``truncation`` says where its readable part ended, if it did."""

    file: BinaryIO
    name: str
    truncation: str | None = None
    number: int = 0  # packets read so far
    _interfaces: list[_Interface] = field(default_factory=list)
    _last_ns: int = 0

    def packets(self) -> Iterator[Captured]:
        """Yield what is readable. Raises ConfigError when the file is no capture."""
        magic = self.file.read(4)
        if magic in _PCAP:
            yield from self._pcap(*_PCAP[magic])
        elif magic == _SECTION:
            yield from self._pcapng()
        else:
            hint = _HINTS.get(magic[:2], f"it begins with {magic.hex() or 'nothing'}")
            raise ConfigError(f"{self.name}: no pcap or pcapng file: {hint}")

    def _pcap(self, order: str, unit_ns: int) -> Iterator[Captured]:
        head = self.file.read(20)
        if len(head) < 20:
            raise ConfigError(f"{self.name}: the file header is cut short")
        link_type = Struct(order + "16xI").unpack(head)[0] & 0x03FFFFFF  # above: FCS length and its flag
        record = Struct(order + "IIII")
        while True:
            at = self.file.tell()
            head = self.file.read(16)
            if not head:
                return
            if len(head) < 16:
                return self._stop(at, f"a packet header of 16 bytes was begun, {len(head)} are there")
            seconds, part, captured, wire = record.unpack(head)
            if captured > MAX_PACKET:
                return self._stop(at, f"it claims to be {captured} bytes long")
            data = self.file.read(captured)
            if len(data) < captured:
                return self._stop(at, f"{captured} bytes were announced, {len(data)} are there")
            self.number += 1
            yield Captured(seconds * 1_000_000_000 + part * unit_ns, link_type, data, max(wire, captured))

    def _pcapng(self) -> Iterator[Captured]:
        order, at = "<", 0
        self.file.seek(0)
        while True:
            at = self.file.tell()
            head = self.file.read(12)
            if not head:
                return
            if len(head) < 12:
                return self._stop(at, f"a block header of 12 bytes was begun, {len(head)} are there")
            if head[:4] == _SECTION:
                order = ">" if head[8:] == b"\x1a\x2b\x3c\x4d" else "<"
                if head[8:] not in {b"\x1a\x2b\x3c\x4d", b"\x4d\x3c\x2b\x1a"}:
                    return self._stop(at, "the section's byte-order magic is wrong")
                self._interfaces.clear()
            kind, length = Struct(order + "II").unpack_from(head)
            if length < 12 or length & 3 or length > MAX_BLOCK:
                return self._stop(at, f"a block claims to be {length} bytes long")
            body = head[8:] + self.file.read(length - 12)
            if len(body) < length - 8:
                return self._stop(at, f"a block of {length} bytes was announced, {len(body) + 8} are there")
            if Struct(order + "I").unpack_from(body, len(body) - 4)[0] != length:
                return self._stop(at, "the two lengths of a block differ")
            try:
                packet = self._block(order, kind, body[:-4])
            except ValueError as error:
                return self._stop(at, str(error))
            if packet is not None:
                self.number += 1
                yield packet

    def _block(self, order: str, kind: int, body: bytes) -> Captured | None:
        """One pcapng block; ValueError says what is wrong with it."""
        if kind == _INTERFACE and len(body) >= 8:
            if len(self._interfaces) >= MAX_INTERFACES:
                raise ValueError(f"more than {MAX_INTERFACES} interfaces")
            self._interfaces.append(_read_interface(order, body))
        elif kind in {_ENHANCED, _PACKET_OLD} and len(body) >= 20:
            first = "I" if kind == _ENHANCED else "H2x"
            number, high, low, captured, wire = Struct(order + first + "IIII").unpack_from(body)
            interface = self._interface(number)
            units = high << 32 | low
            seconds, part = divmod(units, interface.units_per_s)
            part_ns = part * 1_000_000_000 // interface.units_per_s
            self._last_ns = (seconds + interface.offset_s) * 1_000_000_000 + part_ns
            return self._captured(interface, body[20 : 20 + captured], captured, wire)
        elif kind == _SIMPLE and len(body) >= 4:
            wire = Struct(order + "I").unpack_from(body)[0]
            interface = self._interface(0)
            captured = min(wire, interface.snap or wire, len(body) - 4)
            return self._captured(interface, body[4 : 4 + captured], captured, wire)
        return None

    def _captured(self, interface: _Interface, data: bytes, captured: int, wire: int) -> Captured:
        if len(data) < captured:
            raise ValueError(f"a packet of {captured} bytes does not fit into its block")
        return Captured(self._last_ns, interface.link_type, data, max(wire, captured))

    def _interface(self, number: int) -> _Interface:
        if number >= len(self._interfaces):
            raise ValueError(f"a packet of interface {number}, which was not described")
        return self._interfaces[number]

    def _stop(self, offset: int, why: str) -> None:
        self.truncation = f"{self.name}: packet {self.number + 1}, at byte {offset}: {why}; what is before it was read"


def _read_interface(order: str, body: bytes) -> _Interface:
    """Interface Description Block, section 4.2: link type, snap length, options."""
    link_type, snap = Struct(order + "H2xI").unpack_from(body)
    interface = _Interface(link_type, snap)
    at, option = 8, Struct(order + "HH")
    while at + 4 <= len(body):
        code, length = option.unpack_from(body, at)
        value = body[at + 4 : at + 4 + length]
        if code == _OPTION_TSRESOL and length >= 1 and value:
            exponent = value[0] & 0x7F
            interface.units_per_s = (2 if value[0] & 0x80 else 10) ** min(exponent, 63)
        elif code == _OPTION_TSOFFSET and len(value) >= 8:
            interface.offset_s = Struct(order + "q").unpack_from(value)[0]
        elif code == 0:
            break
        at += 4 + (length + 3 & ~3)
    return interface
