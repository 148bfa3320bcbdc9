"""The packet eye in the kernel (``appliance.ports.PacketTap``): events of a ring become flow events.

Numbers, directions and ends are those of ``appliance/flow/table.py``; packets are only ever counted by the kernel. A
sweep over the kernel's flows ends the silent ones and finds what the ring had no room for. The price of a sweep is
bounded: the next one waits fifty times as long as the last one took.

One writer for each value: the kernel writes flows, user space writes verdicts and ports. A sweep removes flows that are
over; should a packet of the same tuple come between its look and its removal, that flow is told as two.
"""

from __future__ import annotations

import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fcntl import ioctl
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from struct import pack
from typing import Final

from appliance.errors import HostError, UsageError
from appliance.model import (
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowCounts,
    FlowEnd,
    FlowEnded,
    FlowEvent,
    FlowId,
    FlowPayload,
    FlowStarted,
    GuestId,
    GuestPort,
    IpAddress,
    TapStats,
    Transport,
)
from appliance.tap.bpf import layout
from appliance.tap.bpf.hook import Hook, hang, open_ring
from appliance.tap.bpf.layout import CLOSED, CLOSING, END, EVENT, IGNORED, KEY, PAYLOAD, SECOND_NS, START, TIMEOUT_NS
from appliance.tap.bpf.loader import MAX_FLOWS, PROGRAMS, RING_BYTES, Loaded
from appliance.tap.bpf.syscalls import count_cpus
from appliance.tap.bpf.talk import MAX_DNS, MAX_PAYLOADS, Talk
from appliance.tap.netns import call_in_netns

BATCH: Final = 256
BEAT_NS: Final = 250_000_000
PATIENCE_NS: Final = 2 * SECOND_NS  # without a heartbeat for so long, verdicts are lifted
SWEEP_NS: Final = SECOND_NS
SWEEP_SHARE: Final = 50
GRACE_NS: Final = 30 * SECOND_NS
MAX_SERVERS: Final = 4096

CommunityId = Callable[[int, bytes, bytes, int, int], str]

_TRANSPORTS: Final = {6: Transport.TCP, 17: Transport.UDP, 1: Transport.ICMP, 58: Transport.ICMP}
_SIDES: Final = (Direction.OUT, Direction.IN)
_REASONS: Final = (FlowEnd.FIN, FlowEnd.RST, FlowEnd.IDLE)
_ICMP_REPLIES: Final = frozenset({0, 14, 16, 18, 129, 140, 145})
_SYN: Final = 0x02
_ACK: Final = 0x10


class KernelTap:
    """The packet eye on the ports of one guest, all in one network namespace; used by one thread.

    ``clock`` tells the time since the Unix epoch; ``community_id`` is ``appliance.flow.community.community_id``. Raises
    UsageError, PermissionRefused and HostError; then nothing of ours is left on the ports.
    """

    def __init__(
        self,
        vm: GuestId,
        ports: Sequence[GuestPort],
        clock: Callable[[], int],
        *,
        community_id: CommunityId,
        max_flows: int = MAX_FLOWS,
        ring_bytes: int = RING_BYTES,
        fail_closed: bool = False,
        transport: layout.Transport = layout.Transport.RING,
        programs: tuple[str, ...] = PROGRAMS,
    ) -> None:
        if len({port.netns for port in ports}) != 1:
            raise UsageError("a kernel tap needs ports, all of one network namespace")
        self.vm = vm
        self.recovered = 0  # flows whose start was lost and which were found later
        self._clock, self._community_id = clock, community_id
        self._talks: dict[int, Talk] = {}
        self._by_number: dict[int, bytes] = {}  # keys of living flows, for verdicts
        self._handled: set[int] = set()  # ids whose lost events were made up for
        self._servers: OrderedDict[tuple[int, bytes, int], None] = OrderedDict()
        self._pending: deque[FlowEvent] = deque()
        self._flows = self._events = self._evicted = 0
        self._flags = layout.FAIL_CLOSED if fail_closed else 0
        self._gone = self._closed = False
        self._final: TapStats | None = None
        self._cpus = count_cpus()
        now_ns = clock()
        self._offset_ns = now_ns - time.monotonic_ns()
        self._grace_ns = now_ns + GRACE_NS
        self._next_beat_ns = 0
        self._next_sweep_ns = time.monotonic_ns() + SWEEP_NS
        with ExitStack() as undo:
            self._loaded = Loaded(max_flows, ring_bytes, transport=transport, programs=programs)
            undo.callback(self._loaded.close)
            self._maps = self._loaded.maps
            self._ring = open_ring(transport, self._maps["events"], ring_bytes)
            undo.callback(self._ring.close)
            # A socket stays in its namespace: asked whether the ports are still there.
            self._socket = call_in_netns(ports[0].netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            undo.callback(self._socket.close)
            self._attached: list[Hook] = []
            for port in ports:
                attached = hang(port, self._loaded.programs)
                undo.callback(attached.detach)
                self._attached.append(attached)
                if port.mac:
                    self._seed_mac(attached.ifindex, port.mac)
            self._beat(time.monotonic_ns())  # only now do the programs begin to look
            undo.pop_all()

    # -- PacketTap --

    def poll(self, timeout_s: float) -> list[FlowEvent]:
        """Wait at most ``timeout_s``, then return a batch of events; at once when a flow has started."""
        if self._closed:
            return []
        events: list[FlowEvent] = []
        if self._pending:
            self._flush(events)
        elif not self._ring.ready and not self._ring.wait(timeout_s):
            self._check_ports()
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_beat_ns:
            self._beat(now_ns)
        for at in self._ring.records(BATCH):
            if self._take(at, events):
                break
        late_ns = now_ns - self._next_sweep_ns
        if late_ns >= 0 and (late_ns >= SWEEP_NS or not self._ring.ready):  # what waits in the ring tells more
            self._sweep()
        self._events += len(events)
        return events

    @property
    def exhausted(self) -> bool:
        """All ports are gone and everything they told was read."""
        return self._closed or (self._gone and not self._pending and not self._ring.ready)

    def fileno(self) -> int:
        """The ring: readable while events wait."""
        return self._ring.fileno()

    def stats(self) -> TapStats:
        """Counters since the start. ``lost`` counts events that found the ring full; a sweep makes up for them."""
        if self._final is not None:
            return self._final
        packets, size, _, _, lost, unmade, _, _, *ignored = self._read_stats()
        reasons = tuple(sorted((name, count) for name, count in zip(IGNORED, ignored, strict=True) if count))
        return TapStats(packets, size, self._flows, self._events, lost + unmade, self._evicted, reasons)

    def close(self) -> list[FlowEvent]:
        """Detach, read what waits, and end the flows still open."""
        if self._closed:
            return []
        self._check_ports()
        for attached in self._attached:
            attached.detach()
        events = list(self._pending)
        self._pending.clear()
        for at in self._ring.records(1 << 20):
            self._take(at, events)
        self._sweep()
        events += self._pending
        self._pending.clear()
        now_ns = self._clock()
        reason = FlowEnd.GUEST_GONE if self._gone else FlowEnd.WATCH_ENDED
        for talk in self._talks.values():
            events.append(FlowEnded(talk.flow.id, reason, _counts(*talk.counts), max(now_ns, talk.last_ns)))
        self._talks.clear()
        self._events += len(events)
        self._final = self.stats()
        self._closed = True
        self._ring.close()
        self._loaded.close()
        self._socket.close()
        return events

    # -- the hand --

    def drop(self, flow: FlowId, seconds: float | None = None) -> bool:
        """Drop the packets of one living flow, both ways; whether it lives."""
        return self._decide(flow, layout.DROP, seconds)

    def allow(self, flow: FlowId, seconds: float | None = None) -> bool:
        """Let one flow pass, also where its peer is banned."""
        return self._decide(flow, layout.ALLOW, seconds)

    def forget(self, flow: FlowId) -> bool:
        """Lift the verdict on a living flow."""
        key = self._by_number.get(flow.number)
        return key is not None and self._maps["verdicts"].delete(key)

    def ban(self, peer: IPv4Network | IPv6Network, seconds: float | None = None) -> None:
        """Drop what comes from or goes to these addresses, existing flows too."""
        name, key = _peer_key(peer)
        self._maps[name].update(key, _verdict(layout.DROP, seconds))
        self._set_flags(layout.HAS_BANS)

    def unban(self, peer: IPv4Network | IPv6Network) -> bool:
        """Lift a ban; whether there was one."""
        name, key = _peer_key(peer)
        return self._maps[name].delete(key)

    def dropped(self) -> int:
        """Packets dropped by verdict or ban."""
        return self._read_stats()[6]

    def learn_listener(self, protocol: int, local_ip: IpAddress | None, port: int) -> None:
        """Note a server of the guest: a better direction for flows picked up midstream."""
        self._learn_server((protocol, local_ip.packed if local_ip else b"", port))

    # -- events of the ring --

    def _take(self, at: int, events: list[FlowEvent]) -> bool:
        """Turn one record into events; whether a flow has started."""
        (
            number, at_ns, kind, side, reason, _, missed, seen, first_side, first_flags, offset, length, captured,
            icmp_type, icmp_code, key, packets_out, packets_in, bytes_out, bytes_in,
        ) = EVENT.unpack_from(self._ring.data, at)  # fmt: skip
        at_ns += self._offset_ns
        started = False
        talk = self._talks.get(number)
        if talk is None:
            if not kind & START:
                if not missed & START or number in self._handled:
                    return False  # ended here already
                self._handled.add(number)
                self.recovered += 1
            talk = self._start(number, key, at_ns, first_side, first_flags, icmp_type, icmp_code)
            events.append(FlowStarted(talk.flow, at_ns))
            started = True
        if seen != talk.seen:
            talk.seen = seen
            self._learn_servers(key, seen)
        if kind & PAYLOAD and talk.told[side] < talk.limit:
            skip, stop = (0, captured) if talk.flow.ip_protocol != 6 else talk.fresh(side, offset, length)
            stop = min(stop, captured)
            if skip < stop:
                begin = at + EVENT.size
                data = bytes(self._ring.data[begin + skip : begin + stop])
                events.append(FlowPayload(talk.flow.id, _SIDES[side], talk.told[side], data, at_ns))
                talk.told[side] += 1
        if kind & END:
            counts = FlowCounts(packets_out, packets_in, bytes_out, bytes_in)
            self._end(number, talk, _REASONS[reason], counts, at_ns, events)
        return started

    def _start(
        self, number: int, key: bytes, at_ns: int, side: int, flags: int, icmp_type: int, icmp_code: int
    ) -> Talk:
        _, vlan, local_port, remote_port, protocol, version, _, local, remote = KEY.unpack(key)
        if version == 4:
            local, remote = local[:4], remote[:4]
        self._flows += 1
        direction, midstream = self._judge(
            protocol, side, flags, icmp_type, at_ns, (local, local_port), (remote, remote_port)
        )
        is_icmp = protocol in {1, 58}
        ends = ((local, local_port), (remote, remote_port))[:: -1 if side else 1]
        sorts = (icmp_type, icmp_code) if is_icmp else (ends[0][1], ends[1][1])
        flow = Flow(
            FlowId(self.vm, self._flows),
            FiveTuple(
                _TRANSPORTS.get(protocol, Transport.RAW),
                Endpoint(_address(local), local_port),
                Endpoint(_address(remote), remote_port),
            ),
            direction,
            at_ns,
            vlan or None,
            protocol,
            icmp_type if is_icmp else None,
            midstream,
            self._community_id(protocol, ends[0][0], ends[1][0], *sorts),
        )
        talk = Talk(flow, key, MAX_DNS if protocol == 17 and remote_port == 53 else MAX_PAYLOADS)
        self._talks[number] = talk
        self._by_number[self._flows] = key
        return talk

    def _judge(
        self,
        protocol: int,
        side: int,
        flags: int,
        icmp_type: int,
        at_ns: int,
        local: tuple[bytes, int],
        remote: tuple[bytes, int],
    ) -> tuple[Direction, bool]:
        """Who started it, and whether that is a guess (``FlowTable._judge``)."""
        sender, other = _SIDES[side], _SIDES[1 - side]
        if protocol == 6:
            if flags & _SYN:
                return (other, True) if flags & _ACK else (sender, False)
            here = (6, *local) in self._servers or (6, b"", local[1]) in self._servers
            there = (6, *remote) in self._servers
            if here != there:
                return (Direction.IN if here else Direction.OUT), True
            return (Direction.IN if local[1] < remote[1] else Direction.OUT), True
        if protocol == 17:
            source, target = (remote[1], local[1]) if side else (local[1], remote[1])
            if at_ns < self._grace_ns and source < 1024 <= target:
                return other, True  # an answer to a question that we did not see
            return sender, False
        if protocol in {1, 58}:
            answer = icmp_type in _ICMP_REPLIES
            return (other if answer else sender), answer
        return sender, False

    def _end(
        self, number: int, talk: Talk, reason: FlowEnd, counts: FlowCounts, at_ns: int, events: list[FlowEvent]
    ) -> None:
        del self._talks[number]
        key = self._by_number.pop(talk.flow.id.number)
        if self._flags & layout.HAS_VERDICTS:
            self._maps["verdicts"].delete(key)
        events.append(FlowEnded(talk.flow.id, reason, counts, at_ns))

    def _learn_servers(self, key: bytes, seen: int) -> None:
        _, _, local_port, remote_port, protocol, version, _, local, remote = KEY.unpack(key)
        size = 4 if version == 4 else 16
        for side, address, port in ((0, local, local_port), (1, remote, remote_port)):
            if seen >> side & 1:
                self._learn_server((protocol, address[:size], port))

    def _learn_server(self, server: tuple[int, bytes, int]) -> None:
        self._servers[server] = None
        self._servers.move_to_end(server)
        if len(self._servers) > MAX_SERVERS:
            self._servers.popitem(last=False)

    # -- sweeps --

    def _sweep(self) -> None:
        """Look at every flow of the kernel: end the silent ones, make up for lost events, remove what is over."""
        began_ns = time.monotonic_ns()
        self._offset_ns = self._clock() - began_ns
        seen: set[int] = set()
        over: list[bytes] = []
        lost: set[int] = set()
        for keys, values in self._maps["flows"].read_batches():
            for index, value in enumerate(layout.SWEPT.iter_unpack(values)):
                key = keys[index * KEY.size : (index + 1) * KEY.size]
                self._look_at(key, value, began_ns, seen, over, lost)
        self._find_evicted(began_ns + self._offset_ns, seen)
        self._maps["flows"].delete_batch(over)
        self._handled &= lost
        took_ns = time.monotonic_ns() - began_ns
        self._next_sweep_ns = began_ns + took_ns + max(SWEEP_NS, SWEEP_SHARE * took_ns)

    def _look_at(
        self, key: bytes, value: tuple[int, ...], now_ns: int, seen: set[int], over: list[bytes], lost: set[int]
    ) -> None:
        number, first_ns, last_ns, p0, p1, b0, b1, state, first_side, flags, itype, icode, fins, _, _, missed, _ = value
        silent = now_ns - last_ns > TIMEOUT_NS[state]
        talk = self._talks.get(number)
        if missed:
            lost.add(number)
            if talk is None and missed & START and number not in self._handled:
                self._handled.add(number)
                self.recovered += 1
                talk = self._start(number, key, first_ns + self._offset_ns, first_side, flags, itype, icode)
                self._pending.append(FlowStarted(talk.flow, talk.flow.started_ns))
        if talk is None:
            if silent:
                over.append(key)
            return
        seen.add(number)
        talk.counts = (p0, p1, b0, b1)
        talk.last_ns = last_ns + self._offset_ns
        if state == CLOSED:
            if missed & END:
                reason = FlowEnd.FIN if fins == 3 else FlowEnd.RST
                self._end_pending(number, talk, reason, talk.last_ns)
        elif silent:
            over.append(key)
            reason = FlowEnd.FIN if state == CLOSING else FlowEnd.IDLE
            self._end_pending(number, talk, reason, talk.last_ns + TIMEOUT_NS[state])

    def _find_evicted(self, before_ns: int, seen: set[int]) -> None:
        """Flows that we know and the kernel does not: the map was full. Their counters are those of the last sweep."""
        if len(seen) >= len(self._talks):
            return
        for number, talk in list(self._talks.items()):
            if number in seen or talk.flow.started_ns >= before_ns:
                continue
            if self._ring.ready:  # its end may wait there
                return
            reused = self._maps["flows"].lookup(talk.key) is not None  # another flow has its tuple; its end was lost
            self._evicted += not reused
            self._end_pending(number, talk, FlowEnd.IDLE if reused else FlowEnd.EVICTED, before_ns)

    def _end_pending(self, number: int, talk: Talk, reason: FlowEnd, at_ns: int) -> None:
        events: list[FlowEvent] = []
        self._end(number, talk, reason, _counts(*talk.counts), at_ns, events)
        self._pending.extend(events)

    def _flush(self, events: list[FlowEvent]) -> None:
        while self._pending and len(events) < BATCH:
            events.append(self._pending.popleft())

    # -- the kernel's side --

    def _beat(self, now_ns: int) -> None:
        self._next_beat_ns = now_ns + BEAT_NS
        for attached in self._attached:
            flags = self._flags | (layout.SWAPPED if attached.swapped else 0)
            value = layout.PORT.pack(now_ns, PATIENCE_NS, flags)
            self._maps["ports"].update(attached.ifindex.to_bytes(4, "little"), value)

    def _set_flags(self, flags: int) -> None:
        if self._flags & flags != flags:
            self._flags |= flags
            self._beat(time.monotonic_ns())

    def _decide(self, flow: FlowId, action: int, seconds: float | None) -> bool:
        key = self._by_number.get(flow.number)
        if key is None or flow.vm != self.vm:
            return False
        self._maps["verdicts"].update(key, _verdict(action, seconds))
        self._set_flags(layout.HAS_VERDICTS)
        return True

    def _seed_mac(self, ifindex: int, text: str) -> None:
        mac = bytes.fromhex(text.replace(":", "").replace("-", ""))
        for address in (mac, bytes(6)):  # zero: at least one is known
            self._maps["macs"].update(layout.MAC.pack(ifindex, address), bytes(8))

    def _check_ports(self) -> None:
        self._gone = all(not self._is_there(attached) for attached in self._attached)

    def _is_there(self, attached: Hook) -> bool:
        request = pack("=16si20x", attached.port.ifname.encode()[:15], 0)
        try:
            answer = ioctl(self._socket, 0x8933, request)  # SIOCGIFINDEX
        except OSError:
            return False
        return int.from_bytes(answer[16:20], "little") == attached.ifindex

    def _read_stats(self) -> tuple[int, ...]:
        size = layout.STATS.size
        value = self._maps["stats"].lookup(bytes(4), size * self._cpus)
        if value is None:
            raise HostError("kernel tap: its counters are gone")
        return tuple(map(sum, zip(*layout.STATS.iter_unpack(value), strict=True)))


@lru_cache(4096)
def _address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _counts(packets_out: int, packets_in: int, bytes_out: int, bytes_in: int) -> FlowCounts:
    return FlowCounts(packets_out, packets_in, bytes_out, bytes_in)


def _verdict(action: int, seconds: float | None) -> bytes:
    deadline_ns = 0 if seconds is None else time.monotonic_ns() + int(seconds * SECOND_NS)
    return layout.VERDICT.pack(action, 0, deadline_ns, bytes(6))


def _peer_key(peer: IPv4Network | IPv6Network) -> tuple[str, bytes]:
    name = "peers4" if peer.version == 4 else "peers6"
    return name, pack("=II", 32 + peer.prefixlen, 0) + peer.network_address.packed
