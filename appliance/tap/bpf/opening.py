"""What a flow's first packet says: whose it is, in which direction, by which name (as ``FlowTable._judge``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
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
_ICMP: Final = frozenset({1, 58})
_SERVER: Final = Struct("=HBB16s")  # port, protocol, IP version (0: any address), address
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
        self._servers: OrderedDict[bytes, None] = OrderedDict()

    def open(self, number: int, key: bytes, at_ns: int, first: First) -> Talk:
        """Make the flow of a key."""
        _, vlan, local_port, remote_port, protocol, version, _, local, remote = KEY.unpack(key)
        if version == 4:
            local, remote = local[:4], remote[:4]
        self.flows += 1
        side, flags, icmp_type, icmp_code, spoofed_mac = first
        if protocol == 6 and flags & (_SYN | _ACK) == _SYN:
            direction, midstream = SIDES[side], False
        else:
            direction, midstream = self._judge(key, first, at_ns, local_port, remote_port)
        source, target, ports = (
            (remote, local, (remote_port, local_port)) if side else (local, remote, (local_port, remote_port))
        )
        community = self._community_id(
            protocol, source, target, *((icmp_type, icmp_code) if protocol in _ICMP else ports)
        )
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
            icmp_type if protocol in _ICMP else None,
            midstream,
            community,
            spoofed_mac,
        )
        return Talk(number, flow, key, MAX_DNS if protocol == 17 and remote_port == 53 else MAX_PAYLOADS)

    def learn(self, key: bytes, seen: int) -> None:
        """Note which side the kernel saw answer a SYN."""
        if seen & 1:
            self._note(_local_of(key))
        if seen & 2:
            self._note(_remote_of(key))

    def learn_server(self, protocol: int, address: bytes, port: int) -> None:
        """Note a server; an empty address: of the guest, on all of its own."""
        version = {0: 0, 4: 4, 16: 6}[len(address)]
        self._note(_SERVER.pack(port, protocol, version, address))

    def _note(self, server: bytes) -> None:
        self._servers[server] = None
        self._servers.move_to_end(server)
        if len(self._servers) > MAX_SERVERS:
            self._servers.popitem(last=False)

    def _judge(self, key: bytes, first: First, at_ns: int, local_port: int, remote_port: int) -> tuple[Direction, bool]:
        """Who started it, and whether that is a guess."""
        sender, other = SIDES[first.side], SIDES[1 - first.side]
        protocol = key[12]
        if protocol == 6:
            if first.flags & _SYN:
                return (other, True) if first.flags & _ACK else (sender, False)
            anywhere = _SERVER.pack(local_port, 6, 0, b"")
            here = _local_of(key) in self._servers or anywhere in self._servers
            there = _remote_of(key) in self._servers
            if here != there:
                return (Direction.IN if here else Direction.OUT), True
            return (Direction.IN if local_port < remote_port else Direction.OUT), True
        if protocol == 17:
            source, target = (remote_port, local_port) if first.side else (local_port, remote_port)
            if at_ns < self._grace_ns and source < 1024 <= target:
                return other, True  # an answer to a question that we did not see
            return sender, False
        if protocol in _ICMP:
            answer = first.icmp_type in _ICMP_REPLIES
            return (other if answer else sender), answer
        return sender, False


def _local_of(key: bytes) -> bytes:
    """The guest's end of a key as ``_SERVER``."""
    return key[8:10] + key[12:14] + key[16:32]


def _remote_of(key: bytes) -> bytes:
    return key[10:14] + key[32:48]


@lru_cache(4096)
def _address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
