"""Every socket of every network namespace, found through the kernel's own hash tables.

TCP connections, TIME_WAIT mini sockets and request sockets share ``inet_hashinfo.ehash``, listeners are in ``lhash2``
(net/ipv4/inet_hashtables.c); UDP in ``udp_table.hash`` (net/ipv4/udp.c), raw in ``raw_v4_hashinfo`` and
``raw_v6_hashinfo``, ping in ``ping_table``, packet in ``net->packet.sklist``. An entry is believed when its tuple
hashes to the ``skc_hash`` stored beside it, or, where there is no such hash, to the bucket it was found in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Any, NamedTuple

from appliance.errors import OutOfTime
from appliance.guest.kernel import Kernel
from appliance.guest.linux.chains import Chains, ChainWalker, Node
from appliance.guest.linux.facts import AF_INET6, LISTEN, NEW_SYN_RECV, TCP_STATES, TIME_WAIT, Facts
from appliance.guest.linux.hashes import V4_MAPPED, Sample, TupleHash
from appliance.guest.linux.namespaces import Hashinfo, Namespace, UdpTable
from appliance.guest.linux.record import is_object
from appliance.model import Endpoint, Gap, GuestSocket, Transport

MAX_ENDPOINTS = 65_536  # cached Endpoint objects
TRIES = 3


class Common(NamedTuple):
    """``struct sock_common``, as read at one instant. Ports: ``num`` host order, ``dport`` network order."""

    next: int
    hash: int
    rcv_saddr: int
    daddr: int
    num: int
    dport: int
    family: int
    state: int
    net: int
    flags: int  # of a request socket: its listener
    v6_rcv_saddr: bytes
    v6_daddr: bytes
    bits: int  # the byte with skc_ipv6only
    bound: int = 0  # index of the only device it uses (SO_BINDTODEVICE)

    @property
    def tuple(self) -> tuple[Any, ...]:
        """What makes it this connection and no other."""
        return self[1:7] + self[8:9] + self[10:12]


class Raw(NamedTuple):
    """A socket as found: not yet with its owners."""

    transport: Transport
    va: int
    common: Common
    namespace: Namespace
    state: int  # as ss shows it: tw_substate for a mini socket
    mapped: bool  # an IPv4 connection of an AF_INET6 socket
    sk_socket: int = 0  # struct socket, 0 for mini sockets and for connections not yet accepted
    uid: int | None = None
    bucket: int = 0
    data: bytes = b""  # the bytes behind ``common``
    more: bytes = b""  # the bytes behind ``sk_socket`` and ``uid``, or behind the substate

    @property
    def full(self) -> bool:
        """A ``struct sock``; the others end after ``sock_common``."""
        return self.transport is not Transport.TCP or self.common.state not in (TIME_WAIT, NEW_SYN_RECV)


class RawSockets(NamedTuple):
    """What a full walk found."""

    found: list[Raw]
    gaps: list[Gap]
    torn: int


class Sockets:
    """Walks the socket tables of one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, hashes: TupleHash) -> None:
        self._kernel = kernel
        self._facts = facts
        self.hashes = hashes
        self.common = facts.record("common")
        self.tail = facts.record("sock")
        self._link = facts.offset("sk.node")
        self._substate = facts.offset("tw.substate")
        self._walker = {t: ChainWalker(kernel, f"{t} sockets", self.common, self._link) for t in Transport}
        self._endpoints: dict[tuple[int | bytes, int], Endpoint] = {}
        self._last: dict[int, Raw] = {}  # what the walk before found: unchanged bytes need no second look

    def walk(self, namespaces: dict[int, Namespace]) -> RawSockets:
        """Read everything."""
        gaps: list[Gap] = []
        found: list[Raw] = []
        torn = 0
        for step in (self._tcp, self._listeners, self._udp, self._raw, self._ping, self._packet):
            try:
                raws, more, lost = step(namespaces)
            except OutOfTime:
                gaps.append(Gap("sockets", 0, "out of time"))
                break
            found += raws
            gaps += more
            torn += lost
        self._last = {raw.va: raw for raw in found}
        return RawSockets(found, gaps, torn)

    def complete(self, walked: RawSockets) -> list[Raw]:
        """What :meth:`walk` found, with what lies behind ``sock_common``: sockets and users."""
        found = self._complete(walked.found, walked.gaps)
        self._last = {raw.va: raw for raw in found}
        return found

    def walk_rare(self, namespaces: dict[int, Namespace]) -> list[Raw]:
        """Raw, ping and packet sockets only."""
        found: list[Raw] = []
        for step in (self._raw, self._ping, self._packet):
            found += step(namespaces)[0]
        return self._complete(found, [])

    def parse(self, raw: bytes) -> Common:
        """A ``sock_common`` from the bytes of its span."""
        return Common(*self.common.parse(raw))

    def confirm(self, common: Common, mix: int, bucket: int, mask: int) -> bool | None:
        """Whether a TCP tuple hashes to its own skc_hash; returns whether it is v4-mapped, None when it is torn."""
        if common.hash & mask != bucket:
            return None
        hashes = self.hashes
        if common.family == AF_INET6:
            mapped = common.v6_daddr.startswith(V4_MAPPED)
            if not mapped:
                if not hashes.ready6:
                    return False
                v6 = hashes.v6(common.v6_rcv_saddr, common.num, common.v6_daddr, common.dport, mix)
                if v6 == common.hash:
                    return False
            if not hashes.ready4:
                return True if mapped else None
            v4 = hashes.v4(common.rcv_saddr, common.num, common.daddr, common.dport, mix)
            return True if v4 == common.hash else None  # a request socket may carry its IPv4 tuple only
        if not hashes.ready4:
            return False
        v4 = hashes.v4(common.rcv_saddr, common.num, common.daddr, common.dport, mix)
        return False if v4 == common.hash else None

    def calibrate(self, nodes: Iterable[Node], namespaces: dict[int, Namespace]) -> None:
        """Learn the guest's hash functions from its live connections."""
        if self.hashes.ready4 and self.hashes.ready6:
            return
        v4: list[Sample] = []
        v6: list[Sample] = []
        for node in nodes:
            c = self.parse(node.raw)
            namespace = namespaces.get(c.net)
            if namespace is None:
                continue
            if c.family == AF_INET6 and not c.v6_daddr.startswith(V4_MAPPED):
                v6.append(Sample(c.v6_rcv_saddr, c.num, c.v6_daddr, c.dport, namespace.mix, c.hash))
            else:
                v4.append(Sample(c.rcv_saddr, c.num, c.daddr, c.dport, namespace.mix, c.hash))
        self.hashes.calibrate4(v4)
        self.hashes.calibrate6(v6)

    def walk_ehash(self, table: Hashinfo) -> Chains:
        """All nodes of one connection table."""
        stride = self._facts.size("inet_ehash_bucket")
        return self._walker[Transport.TCP].walk(table.ehash, table.ehash_mask + 1, stride, 0, nulls=True)

    def build(self, raw: Raw, owners: tuple[Any, ...] = ()) -> GuestSocket:
        """The public form of a socket."""
        local, remote = self.endpoints(raw)
        state = TCP_STATES.get(raw.state, str(raw.state))
        return GuestSocket(raw.transport, state, local, remote, owners, raw.namespace.inum, raw.va, raw.uid)

    def endpoints(self, raw: Raw) -> tuple[Endpoint, Endpoint | None]:
        """Local and remote end; no remote end for listeners and unconnected sockets."""
        c = raw.common
        if raw.transport is Transport.PACKET:
            return self._endpoint(0, 0), None
        local: int | bytes
        remote: int | bytes
        if raw.mapped:
            local, remote = V4_MAPPED + c.rcv_saddr.to_bytes(4, "little"), V4_MAPPED + c.daddr.to_bytes(4, "little")
        elif c.family == AF_INET6:
            local, remote = c.v6_rcv_saddr, c.v6_daddr
        else:
            local, remote = c.rcv_saddr, c.daddr
        port = (c.dport & 0xFF) << 8 | c.dport >> 8
        connected = port or (raw.transport is Transport.RAW and remote not in (0, bytes(16)))
        if raw.state == LISTEN or not connected:
            return self._endpoint(local, c.num), None
        return self._endpoint(local, c.num), self._endpoint(remote, port)

    def _endpoint(self, address: int | bytes, port: int) -> Endpoint:
        key = address, port
        endpoint = self._endpoints.get(key)
        if endpoint is None:
            if len(self._endpoints) >= MAX_ENDPOINTS:
                self._endpoints.clear()
            ip = IPv4Address(address.to_bytes(4, "little")) if isinstance(address, int) else IPv6Address(address)
            endpoint = self._endpoints[key] = Endpoint(ip, port)
        return endpoint

    # -- one table each --

    def _tcp(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        found: list[Raw] = []
        gaps: list[Gap] = []
        torn = 0
        for table in _distinct(namespaces, lambda n: n.tcp, lambda t: t.ehash):
            chains = self.walk_ehash(table)
            self.calibrate(chains.nodes, namespaces)
            gaps += chains.gaps
            torn += chains.torn
            for node in chains.nodes:
                raw = self._connection(node, namespaces, table.ehash_mask)
                if raw is None:
                    torn += 1
                    raw = self._again(node, namespaces, table.ehash_mask)
                if raw is not None:
                    found.append(raw)
        return found, gaps, torn

    def _known(self, node: Node, namespaces: dict[int, Namespace], transport: Transport) -> Raw | None:
        """What the walk before made of the very same bytes at the same place."""
        last = self._last.get(node.va)
        if last is None or last.data != node.raw or last.bucket != node.bucket or last.transport is not transport:
            return None
        return last if namespaces.get(last.namespace.va) is last.namespace else None

    def _connection(self, node: Node, namespaces: dict[int, Namespace], mask: int) -> Raw | None:
        known = self._known(node, namespaces, Transport.TCP)
        if known is not None:
            return known
        c = self.parse(node.raw)
        namespace = namespaces.get(c.net)
        if namespace is None or c.state not in TCP_STATES:
            return None
        mapped = self.confirm(c, namespace.mix, node.bucket, mask)
        if mapped is None:
            return None
        mapped = mapped or is_mapped(c)
        return Raw(Transport.TCP, node.va, c, namespace, c.state, mapped, bucket=node.bucket, data=node.raw)

    def _again(self, node: Node, namespaces: dict[int, Namespace], mask: int) -> Raw | None:
        """Read a torn entry once more: recycled for another connection it is found there, freed it is gone."""
        for _ in range(TRIES - 1):
            (raw,) = self._kernel.readv([self.common.span(node.va)])
            if raw is None:
                return None
            again = self._connection(Node(node.bucket, node.va, raw), namespaces, mask)
            if again is not None:
                return again
        return None

    def _listeners(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        found: list[Raw] = []
        gaps: list[Gap] = []
        torn = 0
        stride, head = self._facts.size("inet_listen_hashbucket"), self._facts.offset("lhash2.head")
        for table in _distinct(namespaces, lambda n: n.tcp, lambda t: t.lhash2):
            if self._facts.find("hashinfo.listening_hash") is not None:
                link, nulls = self._facts.offset("icsk.listen_node"), False
                # chains through another node: the link is read on its own
                chains = self._by_foreign_link(table, stride, head, link)
            else:
                walker, nulls = self._walker[Transport.TCP], True
                chains = walker.walk(table.lhash2, table.lhash2_mask + 1, stride, head, nulls)
            gaps += chains.gaps
            torn += chains.torn
            for node in chains.nodes:
                c = self.parse(node.raw)
                namespace = namespaces.get(c.net)
                if c.state == LISTEN and namespace is not None:
                    found.append(_plain(Transport.TCP, node, c, namespace))
                else:
                    torn += 1
        return found, gaps, torn

    def _by_foreign_link(self, table: Hashinfo, stride: int, head: int, link: int) -> Chains:
        """Listeners of kernels before 5.19: linked by ``icsk_listen_portaddr_node``, which lies far behind."""
        record = self._facts.record("listen_node")
        walker = ChainWalker(self._kernel, "TCP listeners", record, link)
        chains = walker.walk(table.lhash2, table.lhash2_mask + 1, stride, head, nulls=False)
        raws = self._kernel.readv([self.common.span(node.va) for node in chains.nodes])
        pairs = zip(chains.nodes, raws, strict=True)
        nodes = [Node(node.bucket, node.va, raw) for node, raw in pairs if raw is not None]
        return Chains(nodes, chains.gaps, chains.torn)

    def _udp(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        found: list[Raw] = []
        gaps: list[Gap] = []
        torn = 0
        stride, head = self._facts.size("udp_hslot"), self._facts.offset("udp_hslot.head")
        table: UdpTable
        for table in _distinct(namespaces, lambda n: n.udp, lambda t: t.hash):
            chains = self._walker[Transport.UDP].walk(table.hash, table.mask + 1, stride, head, nulls=False)
            gaps += chains.gaps
            torn += chains.torn
            for node in chains.nodes:
                known = self._known(node, namespaces, Transport.UDP)
                if known is not None:
                    found.append(known)
                    continue
                c = self.parse(node.raw)
                namespace = namespaces.get(c.net)
                if namespace is not None and (c.num + namespace.mix) & table.mask == node.bucket:  # udp_hashfn
                    found.append(_plain(Transport.UDP, node, c, namespace))
                else:
                    torn += 1
        return found, gaps, torn

    def _raw(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        return self._flat(namespaces, Transport.RAW, ("raw_v4_hashinfo", "raw_v6_hashinfo"), "raw.ht")

    def _ping(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        return self._flat(namespaces, Transport.ICMP, ("ping_table",), "ping.hash")

    def _flat(
        self, namespaces: dict[int, Namespace], transport: Transport, symbols: tuple[str, ...], array: str
    ) -> tuple[list[Raw], list[Gap], int]:
        """A table that is an array of list heads inside a static structure."""
        found: list[Raw] = []
        gaps: list[Gap] = []
        torn = 0
        offset, count = self._facts.find(array), self._facts.length(array)
        for symbol in symbols:
            base = self._facts.symbol(symbol)
            if base is None or offset is None or not count:
                gaps.append(Gap(f"{transport} sockets", 0, f"this kernel offers no {symbol}"))
                continue
            chains = self._flat_chains(transport, base + offset, count)
            gaps += chains.gaps
            torn += chains.torn
            for node in chains.nodes:
                c = self.parse(node.raw)
                namespace = namespaces.get(c.net)
                if namespace is not None:
                    found.append(_plain(transport, node, c, namespace))
                else:
                    torn += 1
        return found, gaps, torn

    def _flat_chains(self, transport: Transport, base: int, count: int) -> Chains:
        """These tables were lists of either kind over time: an odd first head tells (hlist_nulls)."""
        (first,) = self._kernel.readv([(base, 8)])
        nulls = first is not None and bool(first[0] & 1)
        return self._walker[transport].walk(base, count, 8, 0, nulls)

    def _packet(self, namespaces: dict[int, Namespace]) -> tuple[list[Raw], list[Gap], int]:
        found: list[Raw] = []
        gaps: list[Gap] = []
        offset = self._facts.find("net.packet.sklist")
        if offset is None:
            return [], [Gap("packet sockets", 0, "this kernel offers no net.packet.sklist")], 0
        for namespace in namespaces.values():
            if not namespace.packet:
                continue
            chains = self._walker[Transport.PACKET].walk(namespace.va + offset, 1, 8, 0, nulls=False)
            gaps += chains.gaps
            for node in chains.nodes:
                c = self.parse(node.raw)
                if c.net == namespace.va:
                    found.append(_plain(Transport.PACKET, node, c, namespace))
        return found, gaps, 0

    def _complete(self, found: list[Raw], gaps: list[Gap]) -> list[Raw]:
        """Add what lies behind ``sock_common``: of full sockets socket and uid, of TIME_WAIT ones the substate."""
        tail = self.tail
        spans = []
        for raw in found:
            if raw.full:
                spans.append(tail.span(raw.va))
            elif raw.common.state == TIME_WAIT:
                spans.append((raw.va + self._substate, 1))
        values = iter(self._kernel.readv(spans))
        complete: list[Raw] = []
        for raw in found:
            if raw.common.state == NEW_SYN_RECV and not raw.full:
                complete.append(raw)
                continue
            data = next(values)
            if data is None and raw.full:
                gaps.append(Gap(f"{raw.transport} sockets", raw.va, "unreadable"))
            elif data is None or data == raw.more:
                complete.append(raw)
            elif raw.full:
                sk_socket, uid = tail.parse(data)
                complete.append(raw._replace(sk_socket=sk_socket, uid=uid, more=data))
            else:
                state = data[0] if data[0] in TCP_STATES else TIME_WAIT
                complete.append(raw._replace(state=state, more=data))
        return complete


def _distinct(
    namespaces: dict[int, Namespace], table: Callable[[Namespace], Any], key: Callable[[Any], int]
) -> list[Any]:
    """The tables of all namespaces, each one once."""
    tables = (table(namespace) for namespace in namespaces.values())
    return list({key(found): found for found in tables if found is not None and is_object(key(found))}.values())


def _plain(transport: Transport, node: Node, c: Common, namespace: Namespace) -> Raw:
    return Raw(transport, node.va, c, namespace, c.state, mapped=False, bucket=node.bucket, data=node.raw)


def is_mapped(c: Common) -> bool:
    """Whether it is an IPv4 connection of an AF_INET6 socket."""
    return c.family == AF_INET6 and c.v6_daddr.startswith(V4_MAPPED)
