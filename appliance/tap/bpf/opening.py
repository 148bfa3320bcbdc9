"""What a flow's first packet says: whose it is, in which direction, by which name (as ``FlowTable._judge``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from appliance.model import Direction, Endpoint, FiveTuple, Flow, FlowId, GuestId, IpAddress, Transport
from appliance.tap.bpf.layout import KEY, SECOND_NS
from appliance.tap.bpf.talk import MAX_DNS, MAX_PAYLOADS, Talk

GRACE_NS: Final = 30 * SECOND_NS
MAX_SERVERS: Final = 4096
SIDES: Final = (Direction.OUT, Direction.IN)

CommunityId = Callable[[int, bytes, bytes, int, int], str]

_TRANSPORTS: Final = {6: Transport.TCP, 17: Transport.UDP, 1: Transport.ICMP, 58: Transport.ICMP}
_ICMP_REPLIES: Final = frozenset({0, 14, 16, 18, 129, 140, 145})
_SYN: Final = 0x02
_ACK: Final = 0x10


class First(NamedTuple):
    """The first packet of a flow, as an event or a sweep tells it."""

    side: int  # 0: sent by the guest
    flags: int  # TCP
    icmp_type: int
    icmp_code: int
    spoofed_mac: str | None = None


class Openings:
    """Numbers the flows of one tap, and remembers servers for the direction of flows picked up midstream."""

    def __init__(self, vm: GuestId, community_id: CommunityId, now_ns: int) -> None:
        self.flows = 0
        self._vm, self._community_id = vm, community_id
        self._grace_ns = now_ns + GRACE_NS
        self._servers: OrderedDict[tuple[int, bytes, int], None] = OrderedDict()

    def open(self, number: int, key: bytes, at_ns: int, first: First) -> Talk:
        """Make the flow of a key."""
        _, vlan, local_port, remote_port, protocol, version, _, local, remote = KEY.unpack(key)
        if version == 4:
            local, remote = local[:4], remote[:4]
        self.flows += 1
        direction, midstream = self._judge(protocol, first, at_ns, (local, local_port), (remote, remote_port))
        is_icmp = protocol in {1, 58}
        ends = ((local, local_port), (remote, remote_port))[:: -1 if first.side else 1]
        sorts = (first.icmp_type, first.icmp_code) if is_icmp else (ends[0][1], ends[1][1])
        flow = Flow(
            FlowId(self._vm, self.flows),
            FiveTuple(
                _TRANSPORTS.get(protocol, Transport.RAW),
                Endpoint(_address(local), local_port),
                Endpoint(_address(remote), remote_port),
            ),
            direction,
            at_ns,
            vlan or None,
            protocol,
            first.icmp_type if is_icmp else None,
            midstream,
            self._community_id(protocol, ends[0][0], ends[1][0], *sorts),
            first.spoofed_mac,
        )
        return Talk(number, flow, key, MAX_DNS if protocol == 17 and remote_port == 53 else MAX_PAYLOADS)

    def learn(self, key: bytes, seen: int) -> None:
        """Note which side the kernel saw answer a SYN."""
        _, _, local_port, remote_port, protocol, version, _, local, remote = KEY.unpack(key)
        size = 4 if version == 4 else 16
        for side, address, port in ((0, local, local_port), (1, remote, remote_port)):
            if seen >> side & 1:
                self.learn_server(protocol, address[:size], port)

    def learn_server(self, protocol: int, address: bytes, port: int) -> None:
        """Note a server; an empty address: of the guest, on all of its own."""
        server = (protocol, address, port)
        self._servers[server] = None
        self._servers.move_to_end(server)
        if len(self._servers) > MAX_SERVERS:
            self._servers.popitem(last=False)

    def _judge(
        self, protocol: int, first: First, at_ns: int, local: tuple[bytes, int], remote: tuple[bytes, int]
    ) -> tuple[Direction, bool]:
        """Who started it, and whether that is a guess."""
        sender, other = SIDES[first.side], SIDES[1 - first.side]
        if protocol == 6:
            if first.flags & _SYN:
                return (other, True) if first.flags & _ACK else (sender, False)
            here = (6, *local) in self._servers or (6, b"", local[1]) in self._servers
            there = (6, *remote) in self._servers
            if here != there:
                return (Direction.IN if here else Direction.OUT), True
            return (Direction.IN if local[1] < remote[1] else Direction.OUT), True
        if protocol == 17:
            source, target = (remote[1], local[1]) if first.side else (local[1], remote[1])
            if at_ns < self._grace_ns and source < 1024 <= target:
                return other, True  # an answer to a question that we did not see
            return sender, False
        if protocol in {1, 58}:
            answer = first.icmp_type in _ICMP_REPLIES
            return (other if answer else sender), answer
        return sender, False


@lru_cache(4096)
def _address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
