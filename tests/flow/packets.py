"""Frames for the flow table, made by scapy; the guest is 10.0.0.2 or fd00::2."""

from __future__ import annotations

from dataclasses import dataclass

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from appliance.flow.table import FlowTable
from appliance.model import FlowEnded, FlowEvent, FlowPayload, FlowStarted, GuestId

GUEST, PEER = "52:54:00:00:00:02", "52:54:00:00:00:01"
A, B = "10.0.0.2", "10.0.0.1"
A6, B6 = "fd00::2", "fd00::1"
VM = GuestId("port:test")
T0 = 1_700_000_000_000_000_000
MS = 1_000_000
S = 1_000_000_000

__all__ = ["ICMP", "IP", "TCP", "UDP", "Ether", "FlowEnded", "FlowPayload", "FlowStarted", "IPv6"]


@dataclass
class Made:
    at_ns: int
    from_guest: bool
    data: bytes
    wire_len: int
    segments: int = 1
    vlan: int | None = None


class Wire:
    """A guest's port: builds frames, feeds them, keeps the events."""

    def __init__(self, v6: bool = False, **options) -> None:
        self.table = FlowTable(VM, **options)
        self.now = T0
        self.events: list[FlowEvent] = []
        self.v6 = v6

    def raw(
        self, data: bytes, out: bool, segments: int = 1, vlan: int | None = None, wire_len: int = 0
    ) -> list[FlowEvent]:
        self.now += MS
        events = self.table.feed(Made(self.now, out, data, wire_len or len(data), segments, vlan))
        self.events += events
        return events

    def ip(self, layer: Packet, out: bool, ether: dict | None = None, **raw) -> list[FlowEvent]:
        macs = {"src": GUEST, "dst": PEER} if out else {"src": PEER, "dst": GUEST}
        kind = IPv6 if self.v6 else IP
        ends = ((A6, B6) if self.v6 else (A, B))[:: 1 if out else -1]
        packet = Ether(**(macs | (ether or {}))) / kind(src=ends[0], dst=ends[1]) / layer
        return self.raw(bytes(packet), out, **raw)

    def tcp(
        self, out: bool, flags: str, seq: int = 0, ack: int = 0, data: bytes = b"", gp: int = 40000, pp: int = 80, **raw
    ):
        ports = {"sport": gp, "dport": pp} if out else {"sport": pp, "dport": gp}
        return self.ip(TCP(flags=flags, seq=seq, ack=ack, **ports) / data, out, **raw)

    def udp(self, out: bool, data: bytes = b"x", gp: int = 40000, pp: int = 9999, **raw):
        ports = {"sport": gp, "dport": pp} if out else {"sport": pp, "dport": gp}
        return self.ip(UDP(**ports) / data, out, **raw)

    def handshake(self, out: bool = True, isn: int = 1000, other: int = 5000, **ports) -> None:
        self.tcp(out, "S", isn, **ports)
        self.tcp(not out, "SA", other, isn + 1, **ports)
        self.tcp(out, "A", isn + 1, other + 1, **ports)

    def wait(self, seconds: float) -> list[FlowEvent]:
        self.now += int(seconds * S)
        events = self.table.sweep(self.now)
        self.events += events
        return events

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def flows(self) -> list:
        return [event.flow for event in self.of(FlowStarted)]

    @property
    def ends(self) -> list:
        return [event.reason for event in self.of(FlowEnded)]

    @property
    def states(self) -> list[str]:
        return [str(state) for _, state, _ in self.table.records()]

    @property
    def ignored(self) -> dict[str, int]:
        return dict(self.table.stats.ignored)
