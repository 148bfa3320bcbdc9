"""The record queue: frames in, flow events out (P3, P8). No clock: time comes with the frames.

``local`` is always the guest: the port's side decides, never an address. Direction: a SYN's sender started it; a
SYN-ACK without its SYN means the other side did; else it is a guess (``midstream``) from known servers and port
numbers. What is no flow of the guest is counted by reason.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from appliance.flow import icmp
from appliance.flow.community import community_id
from appliance.flow.decode import ACK, FIN, ICMP, ICMPV6, IGMP, RST, SYN, TCP, UDP, Decoded, decode
from appliance.flow.fastpath import FastPath
from appliance.flow.fragments import Fragments
from appliance.flow.payloads import read_payload
from appliance.flow.records import SECOND_NS, Key, Queues, Record, State
from appliance.flow.tcp import absorbs, is_new_connection, step
from appliance.model import (
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowEnd,
    FlowEnded,
    FlowEvent,
    FlowId,
    FlowPayload,
    FlowStarted,
    GuestId,
    IpAddress,
    TapStats,
    Transport,
)
from appliance.ports import Frame

MAX_FLOWS: Final = 65536
MAX_MACS: Final = 64
MAX_SERVERS: Final = 4096
MAX_EXPIRED: Final = 4096  # per sweep, so that one call stays short
GRACE_NS: Final = 30 * SECOND_NS  # at first, a UDP packet may belong to a talk that began before we looked
NO_MAC: Final = bytes(6)  # the source had no Ethernet header

_TRANSPORTS: Final = {TCP: Transport.TCP, UDP: Transport.UDP, ICMP: Transport.ICMP, ICMPV6: Transport.ICMP}
_SIDES: Final = (Direction.OUT, Direction.IN)


class FlowTable:
    """Flows of one guest. ``macs`` seeds its addresses; further ones are learnt from what it sends."""

    def __init__(self, vm: GuestId, macs: Iterable[str] = (), max_flows: int = MAX_FLOWS) -> None:
        self.vm = vm
        self.now_ns = 0  # the newest time seen
        self._max_flows = max_flows
        self._queues = Queues()
        self._records = self._queues.by_key
        self._fragments = Fragments()
        self._fast = FastPath()
        self._macs: OrderedDict[bytes, None] = OrderedDict((_parse_mac(mac), None) for mac in macs)
        self._servers: OrderedDict[tuple[int, bytes, int], None] = OrderedDict()
        self._ignored: Counter[str] = Counter()
        self._packets = self._bytes = self._flows = self._events = self._evicted = 0
        self._next_sweep_ns = self._grace_ns = 0

    # -- in --

    def feed(self, frame: Frame) -> list[FlowEvent]:
        """Take one frame; return what it tells, in order."""
        self._packets += frame.segments
        self._bytes += frame.wire_len
        events: list[FlowEvent] = []
        if frame.at_ns > self.now_ns:
            self.now_ns = frame.at_ns
            if frame.at_ns >= self._next_sweep_ns:
                self._grace_ns = self._grace_ns or frame.at_ns + GRACE_NS
                events = self.sweep(frame.at_ns)
        if (found := self._fast.find(frame)) is not None:
            self._count(*found, frame)
            return events
        swept = len(events)
        group = frame.data[:1] > b"" and frame.data[0] & 1
        if not group and self._is_foreign(frame):
            self._ignored["flooded"] += 1
            return events
        packet = decode(frame.data, frame.wire_len, frame.vlan)
        reason = packet if isinstance(packet, str) else self._place(frame, packet, bool(group), events)
        if reason is not None:
            self._ignored[reason] += 1
        self._events += len(events) - swept
        return events

    def sweep(self, now_ns: int) -> list[FlowEvent]:
        """End the flows that have been silent for too long. Called by ``feed`` once a second of frame time as well."""
        self.now_ns = max(self.now_ns, now_ns)
        self._next_sweep_ns = self.now_ns + SECOND_NS
        events: list[FlowEvent] = []
        for record in self._queues.iter_expired(self.now_ns):
            self._expire(record, events)
            if len(events) >= MAX_EXPIRED:
                self._next_sweep_ns = self.now_ns
                break
        self._events += len(events)
        return events

    def close(self, now_ns: int, reason: FlowEnd = FlowEnd.WATCH_ENDED) -> list[FlowEvent]:
        """End every flow still open."""
        events: list[FlowEvent] = []
        for record in list(self._records.values()):
            self._drop(record, reason, max(now_ns, record.last_ns), events)
        self._events += len(events)
        return events

    def learn_listener(self, protocol: int, local_ip: IpAddress | None, port: int) -> None:
        """Note a server of the guest (the guest eye knows them): a better direction for flows picked up midstream."""
        self._learn_server((protocol, local_ip.packed if local_ip else b"", port))

    # -- seen from outside --

    @property
    def stats(self) -> TapStats:
        """Counters since the start; a source's losses are not known here."""
        ignored = tuple(sorted(self._ignored.items()))
        return TapStats(self._packets, self._bytes, self._flows, self._events, 0, self._evicted, ignored)

    @property
    def evicted(self) -> int:
        """How many living flows were given up because the table was full."""
        return self._evicted

    def __len__(self) -> int:
        return len(self._queues) - self._queues.count(State.CLOSED)

    def records(self) -> Iterator[tuple[Flow, State, int]]:
        """Every flow in the table with its state and the time of its last packet."""
        for record in self._records.values():
            yield record.flow, record.state, record.last_ns

    # -- one packet --

    def _is_foreign(self, frame: Frame) -> bool:
        """A bridge floods unicast to all ports; learns the guest's addresses on the way."""
        if frame.from_guest:
            source = frame.data[6:12]
            if source not in self._macs and source != NO_MAC and len(source) == 6:
                self._macs[source] = None
                if len(self._macs) > MAX_MACS:
                    self._macs.popitem(last=False)
            return False
        target = frame.data[:6]
        return bool(self._macs) and target not in self._macs and target != NO_MAC

    def _place(self, frame: Frame, packet: Decoded, group: bool, events: list[FlowEvent]) -> str | None:
        """Find or make the packet's flow and note it there; return why it is none, if so."""
        side = 0 if frame.from_guest else 1
        if not packet.first:
            key = self._fragments.find(packet, frame.at_ns)
            record = self._records.get(key) if key else None
            if record is None:
                return "fragment-without-first"
            self._count(record, side, packet.ip_bytes, 0, frame)
            return None
        protocol = packet.protocol
        if protocol in {ICMP, ICMPV6} and (reason := icmp.control_reason(packet)) is not None:
            return self._error(frame, packet, side) if reason == icmp.ERROR else reason
        if protocol == IGMP:
            return "igmp"
        key = _key(packet, side)
        record = self._records.get(key)
        if record is not None:
            record = self._still(record, side, frame.at_ns, packet, events)
        if record is None:
            if side and (group or _is_multicast(packet.dst)):
                return "multicast"
            if protocol == TCP and packet.flags & (FIN | RST) and not packet.flags & SYN and not packet.payload_len:
                return "stray-close"
            record = self._start(key, side, frame.at_ns, packet, events)
        self._count(record, side, packet.ip_bytes, packet.header_len, frame)
        if packet.fragment is not None:
            self._fragments.note(packet, key, frame.at_ns)
        self._advance(record, side, frame, packet, events)
        return None

    def _still(self, record: Record, side: int, at_ns: int, packet: Decoded, events: list[FlowEvent]) -> Record | None:
        """The record, unless this packet cannot belong to it any more: then it is ended."""
        if at_ns - record.last_ns > record.timeout_ns:
            self._expire(record, events)
            return None
        if packet.protocol != TCP:
            return record
        if packet.flags & SYN and is_new_connection(record, side, packet):
            self._drop(record, FlowEnd.FIN if record.fins else FlowEnd.IDLE, at_ns, events)
            return None
        if record.state is State.CLOSED and not absorbs(record, side, packet):
            self._queues.remove(record)
            return None
        return record

    def _advance(self, record: Record, side: int, frame: Frame, packet: Decoded, events: list[FlowEvent]) -> None:
        """State, first payload and end."""
        state, ended = record.state, None
        if state is State.CLOSED:
            return
        if packet.protocol == TCP:
            state, ended = step(record, side, packet)
            if packet.flags & (SYN | ACK) == SYN | ACK:
                self._learn_server((TCP, packet.src, packet.src_port))
        elif state is State.UDP_ONEWAY and record.packets[0] and record.packets[1]:
            state = State.UDP_BIDIR
        if packet.payload_len and (data := read_payload(record, side, packet, frame.data)):
            index = record.payloads[side] - 1
            events.append(FlowPayload(record.flow.id, _SIDES[side], index, data, frame.at_ns))
        if ended is not None:
            events.append(FlowEnded(record.flow.id, ended, record.counts, frame.at_ns))
        if state is not record.state:
            self._queues.move(record, state)
            self._fast.remove(record)
        if packet.payload_len and packet.fragment is None:
            self._fast.add(record, side, frame.data)

    def _count(self, record: Record, side: int, size: int, headers: int, frame: Frame) -> None:
        """Add to the counters; every segment of a GSO packet repeats its headers on the wire."""
        record.packets[side] += frame.segments
        record.bytes[side] += size + (frame.segments - 1) * headers
        self._queues.touch(record, frame.at_ns)

    def _error(self, frame: Frame, packet: Decoded, side: int) -> str | None:
        """An ICMP error belongs to the flow that it quotes; the quoted packet went the other way."""
        quoted = icmp.read_quoted(frame.data, packet)
        if quoted is None:
            return "icmp-error-unreadable"
        record = self._records.get(_key(quoted._replace(vlan=packet.vlan), 1 - side))
        if record is None:
            return "icmp-error-unmatched"
        record.icmp_errors += 1
        return None

    # -- beginnings and ends --

    def _start(self, key: Key, side: int, at_ns: int, packet: Decoded, events: list[FlowEvent]) -> Record:
        if len(self._queues) >= self._max_flows and (victim := self._queues.find_victim()) is not None:
            self._evicted += victim.state is not State.CLOSED
            self._drop(victim, FlowEnd.EVICTED, at_ns, events)
        self._flows += 1
        state, direction, midstream = self._judge(key, side, at_ns, packet)
        vlan, protocol, local_ip, local_port, remote_ip, remote_port = key
        is_icmp = protocol in {ICMP, ICMPV6}
        ports = (packet.icmp_type, packet.icmp_code) if is_icmp else (packet.src_port, packet.dst_port)
        flow = Flow(
            FlowId(self.vm, self._flows),
            FiveTuple(
                _TRANSPORTS.get(protocol, Transport.RAW),
                Endpoint(_address(local_ip), local_port),
                Endpoint(_address(remote_ip), remote_port),
            ),
            direction,
            at_ns,
            vlan,
            protocol,
            packet.icmp_type if is_icmp else None,
            midstream,
            community_id(protocol, packet.src, packet.dst, *ports),
        )
        record = Record(flow, key, state, at_ns)
        self._queues.add(record)
        events.append(FlowStarted(flow, at_ns))
        return record

    def _judge(self, key: Key, side: int, at_ns: int, packet: Decoded) -> tuple[State, Direction, bool]:
        """First state, who started it, and whether that is a guess."""
        sender, other = _SIDES[side], _SIDES[1 - side]
        if packet.protocol == TCP:
            if packet.flags & SYN:
                if packet.flags & ACK:
                    return State.SYN_RECV, other, True
                return State.SYN_SENT, sender, False
            return State.MIDSTREAM, self._guess(key), True
        if packet.protocol == UDP:
            if at_ns < self._grace_ns and packet.src_port < 1024 <= packet.dst_port:
                return State.UDP_ONEWAY, other, True  # an answer to a question that we did not see
            return State.UDP_ONEWAY, sender, False
        if packet.protocol in {ICMP, ICMPV6}:
            answer = packet.icmp_type in icmp.REPLIES
            return State.ICMP, other if answer else sender, answer
        return State.RAW, sender, False

    def _guess(self, key: Key) -> Direction:
        """Who is the server of a TCP connection whose beginning we missed."""
        _, protocol, local_ip, local_port, remote_ip, remote_port = key
        here = (protocol, local_ip, local_port) in self._servers or (protocol, b"", local_port) in self._servers
        there = (protocol, remote_ip, remote_port) in self._servers
        if here != there:
            return Direction.IN if here else Direction.OUT
        return Direction.IN if local_port < remote_port else Direction.OUT

    def _learn_server(self, server: tuple[int, bytes, int]) -> None:
        self._servers[server] = None
        self._servers.move_to_end(server)
        if len(self._servers) > MAX_SERVERS:
            self._servers.popitem(last=False)

    def _expire(self, record: Record, events: list[FlowEvent]) -> None:
        reason = FlowEnd.FIN if record.state is State.CLOSING else FlowEnd.IDLE
        self._drop(record, reason, record.last_ns + record.timeout_ns, events)

    def _drop(self, record: Record, reason: FlowEnd, at_ns: int, events: list[FlowEvent]) -> None:
        """Forget a record; tell its end unless that was told."""
        self._queues.remove(record)
        self._fast.remove(record)
        if record.state is not State.CLOSED:
            events.append(FlowEnded(record.flow.id, reason, record.counts, at_ns))


def _key(packet: Decoded, side: int) -> Key:
    protocol = packet.protocol
    src_port, dst_port = packet.src_port, packet.dst_port
    if packet.icmp_type >= 0:  # the one who asks owns the identifier: it is the local port of a Linux ping socket
        src_port, dst_port = (0, src_port) if packet.icmp_type in icmp.REPLIES else (src_port, 0)
    if side:
        return packet.vlan, protocol, packet.dst, dst_port, packet.src, src_port
    return packet.vlan, protocol, packet.src, src_port, packet.dst, dst_port


def _address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _is_multicast(packed: bytes) -> bool:
    return 224 <= packed[0] < 240 or packed == b"\xff\xff\xff\xff" if len(packed) == 4 else packed[0] == 0xFF


def _parse_mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", "").replace("-", ""))
