"""From a packet's tuple to sockets: into the right bucket, along its chain, to the best match.

The order and the scores are the kernel's: ``__inet_lookup_established``, ``inet_lhash2_lookup`` with ``compute_score``
(net/ipv4/inet_hashtables.c, net/ipv6/inet6_hashtables.c), ``__udp4_lib_lookup`` (net/ipv4/udp.c).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import (
    AF_INET,
    AF_INET6,
    LISTEN,
    LISTENING_NULLS_BASE,
    NEW_SYN_RECV,
    TCP_STATES,
    TIME_WAIT,
    Facts,
)
from appliance.guest.linux.hashes import V4_MAPPED, portaddr4, portaddr6
from appliance.guest.linux.namespaces import Namespace, Namespaces
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Common, Raw, Sockets
from appliance.model import Flow, Transport

TRIES = 3
FEW = 8  # a single read costs a tenth of a batch
MAX_CHAIN = 4096  # sockets followed in one bucket
LOOPBACK_IFINDEX = 1  # include/net/net_namespace.h: of the loop-back device in every namespace


class Key(NamedTuple):
    """A tuple as the kernel holds it: IPv4 addresses and ports in network order, loaded little-endian."""

    v6: bool
    local: int | bytes
    remote: int | bytes
    lport: int  # host order, skc_num
    rport: int  # network order, skc_dport

    @property
    def address(self) -> bytes:
        """The local address in network order."""
        return self.local if isinstance(self.local, bytes) else self.local.to_bytes(4, "little")


class TornError(Exception):
    """What was read contradicts itself: start over."""


class Probe:
    """Finds sockets by tuple in one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, namespaces: Namespaces, sockets: Sockets) -> None:
        self._kernel = kernel
        self._facts = facts
        self._namespaces = namespaces
        self._sockets = sockets
        self._common = facts.record("common")
        self._tail = facts.record("sock")
        self._link = facts.offset("sk.node")
        self._low = self._common.low
        self._whole = self._tail.low + self._tail.size - self._low
        self._tail_at = self._tail.low - self._low
        self.torn = 0  # chains that contradicted themselves, since the count was last reset

    def connections(self, key: Key) -> list[Raw]:
        """The socket with exactly this tuple; those of several network namespaces if it cannot be told which one."""
        raws = self._probe(key, list(self._namespaces.all.values()))
        if not raws:
            known = set(self._namespaces.all)
            self._namespaces.refresh()  # a namespace may be new
            fresh = [namespace for va, namespace in self._namespaces.all.items() if va not in known]
            raws = self._probe(key, fresh) if fresh else []
        return self._at_home(key, raws)

    def _at_home(self, key: Key, raws: list[Raw]) -> list[Raw]:
        """Of equal tuples, the one whose namespace has the address."""
        if len({raw.namespace.va for raw in raws}) < 2:
            return raws
        own = {namespace.va for namespace in self._namespaces.of_address(key.address)}
        return [raw for raw in raws if raw.namespace.va in own] or raws

    def _probe(self, key: Key, namespaces: Sequence[Namespace]) -> list[Raw]:
        hashes = self._sockets.hashes
        if not (hashes.ready6 if key.v6 else hashes.ready4):
            return self._search(key)
        places: list[tuple[Namespace, int, int]] = []
        for namespace in namespaces:
            table = namespace.tcp
            if table is not None:
                value = self._hash(key, namespace.mix)
                places.append((namespace, value, table.ehash + 8 * (value & table.ehash_mask)))
        raws = (self._follow(key, *found) for found in self._heads(places))
        return [raw for raw in raws if raw is not None]

    def _heads(self, places: list[tuple[Namespace, int, int]]) -> Iterator[tuple[Namespace, int, int, int]]:
        """First pointers of buckets: one by one where they are few, in one batch where they are many."""
        if len(places) <= FEW:
            for namespace, value, place in places:
                yield namespace, value, place, self._kernel.u64(place)
            return
        heads = self._kernel.readv([(place, 8) for _, _, place in places])
        for (namespace, value, place), head in zip(places, heads, strict=True):
            if head is not None:
                yield namespace, value, place, int.from_bytes(head, "little")

    def _hash(self, key: Key, mix: int) -> int:
        hashes = self._sockets.hashes
        if isinstance(key.local, bytes) and isinstance(key.remote, bytes):
            return hashes.v6(key.local, key.lport, key.remote, key.rport, mix)
        assert isinstance(key.local, int) and isinstance(key.remote, int)
        return hashes.v4(key.local, key.lport, key.remote, key.rport, mix)

    def _follow(self, key: Key, namespace: Namespace, value: int, place: int, node: int) -> Raw | None:
        assert namespace.tcp is not None
        bucket = value & namespace.tcp.ehash_mask
        for _ in range(TRIES):
            for _ in range(MAX_CHAIN):
                if node & 1 or not is_object(node):
                    break
                va = node - self._link
                raw = self.read(va, namespace)
                if raw is None:
                    break
                c = raw.common
                if c.hash == value and _matches(c, key) and c.net == namespace.va:
                    return raw
                node = c.next
            if node >> 1 == bucket and node & 1:
                return None
            self.torn += 1  # carried off to another bucket, or the chain broke: start over
            node = self._kernel.u64(place)
        raise TornError

    def read(self, va: int, namespace: Namespace) -> Raw | None:
        """A socket in one read. What lies behind ``sock_common`` is only looked at where it is a ``struct sock``."""
        try:
            data = self._kernel.read(va + self._low, self._whole)
        except UnreadableMemory:
            try:
                data = self._kernel.read(va + self._low, self._common.size)
            except UnreadableMemory:
                return None
        c = Common(*self._common.parse(data[: self._common.size]))
        if c.state not in TCP_STATES:
            return None
        mapped = c.family == AF_INET6 and c.v6_daddr.startswith(V4_MAPPED)
        if c.state in (TIME_WAIT, NEW_SYN_RECV) or len(data) < self._whole:
            return Raw(Transport.TCP, va, c, namespace, c.state, mapped)
        sk_socket, uid = self._tail.parse(data[self._tail_at :])
        return Raw(Transport.TCP, va, c, namespace, c.state, mapped, sk_socket, uid)

    def _search(self, key: Key) -> list[Raw]:
        """Without a confirmed hash: look at every connection. The first one found also teaches us the hash."""
        found: dict[int, Raw] = {}
        for table in {namespace.tcp for namespace in self._namespaces.all.values() if namespace.tcp is not None}:
            nodes = self._sockets.walk_ehash(table).nodes
            self._sockets.calibrate(nodes, self._namespaces.all)
            for node in nodes:
                c = self._sockets.parse(node.raw)
                owner = self._namespaces.all.get(c.net)
                if owner is not None and _matches(c, key) and (raw := self.read(node.va, owner)) is not None:
                    found[node.va] = raw
        return list(found.values())

    def listeners(self, key: Key, namespaces: Sequence[Namespace]) -> list[Raw]:
        """The listening socket, or the SO_REUSEPORT group, that a connection to this address goes to.

        Of more than one namespace, or more than one device, if it cannot be told which one. Raises TornError.
        """
        return [raw for namespace in namespaces for raw in self._best(key, list(self._listening(key, namespace)))]

    def _listening(self, key: Key, namespace: Namespace) -> Iterator[Raw]:
        """Listeners on this port in the two buckets where they can be: this address, and any address."""
        table = namespace.tcp
        if table is None or not is_object(table.lhash2):
            return
        mix, port = namespace.mix, key.lport
        if isinstance(key.local, bytes):
            hashes = {portaddr6(mix, key.local, port), portaddr4(mix, 0, port)}
        else:
            hashes = {portaddr4(mix, key.local, port), portaddr4(mix, 0, port)}
        stride, head = self._facts.size("inet_listen_hashbucket"), self._facts.offset("lhash2.head")
        old = self._facts.find("hashinfo.listening_hash") is not None  # chains of another kind before 5.19
        link = self._facts.offset("icsk.listen_node") if old else self._link
        for bucket in {value & table.lhash2_mask for value in hashes}:
            place = table.lhash2 + bucket * stride + head
            found, end = self._chain(place, link, old, namespace)
            if end not in ((0,) if old else (bucket << 1 | 1, (bucket + LISTENING_NULLS_BASE) << 1 | 1)):
                raise TornError
            for raw in found:
                if raw.common.state == LISTEN and raw.common.num == port and raw.common.net == namespace.va:
                    yield raw

    def _chain(self, place: int, link: int, old: bool, namespace: Namespace) -> tuple[list[Raw], int]:
        """The sockets of a bucket, and what stands at its end: -1 where it could not be reached."""
        found: list[Raw] = []
        try:
            node = self._kernel.u64(place)
            for _ in range(MAX_CHAIN):
                if node & 1 or not is_object(node):
                    break
                raw = self.read(node - link, namespace)
                if raw is None:
                    break
                found.append(raw)
                node = self._kernel.u64(node) if old else raw.common.next
        except UnreadableMemory:
            return found, -1
        return found, node

    def _best(self, key: Key, found: Sequence[Raw]) -> list[Raw]:
        """The best scores of ``compute_score``: a bound address beats the wildcard, the packet's family the other.

        Which of the guest's devices the packet goes through is not known, so the best ones of each device that sockets
        are bound to (SO_BINDTODEVICE) stand beside the best ones that are bound to none.
        """
        only = self._facts.ipv6only
        scored = [(score, raw) for raw in found if (score := _score(raw.common, key, only)) > 0]
        top: dict[int, int] = {}
        for score, raw in scored:
            top[raw.common.bound] = max(score, top.get(raw.common.bound, 0))
        top.pop(LOOPBACK_IFINDEX, None)  # no packet of the guest's port goes through it
        return [raw for score, raw in scored if score == top.get(raw.common.bound)]

    def datagram(self, key: Key, lite: bool = False) -> list[Raw]:
        """The UDP socket, or the SO_REUSEPORT group, of this tuple: a connected one before an unconnected one.

        An unconnected one counts only where its namespace has the address. Raises TornError.
        """
        found = self._datagrams(key, self._namespaces.of_address(key.address), lite)
        if found:
            return found
        self._namespaces.refresh()  # a namespace may be new
        others = [raw for raw in self._datagrams(key, list(self._namespaces.all.values()), lite) if raw.common.dport]
        return others or self._datagrams(key, self._namespaces.of_address(key.address), lite)

    def _datagrams(self, key: Key, namespaces: Sequence[Namespace], lite: bool) -> list[Raw]:
        """The best ones of each namespace; only connected ones, if there is any."""
        stride, head = self._facts.size("udp_hslot"), self._facts.offset("udp_hslot.head")
        places: list[tuple[Namespace, int, int]] = []
        for namespace in namespaces:
            table = self._namespaces.lite if lite else namespace.udp
            if table is not None:
                bucket = (key.lport + namespace.mix) & table.mask  # udp_hashfn
                places.append((namespace, bucket, table.hash + bucket * stride + head))
        best: list[Raw] = []
        for namespace, bucket, place, first in self._heads(places):
            if first:
                best += self._best(key, self._slot(key, namespace, bucket, place, lite))
        return [raw for raw in best if raw.common.dport] or best

    def _slot(self, key: Key, namespace: Namespace, bucket: int, place: int, lite: bool) -> list[Raw]:
        """The sockets on a port. A chain that ends elsewhere, or strays into another bucket, says nothing."""
        table = self._namespaces.lite if lite else namespace.udp
        assert table is not None
        found, end = self._chain(place, self._link, False, namespace)
        if end:
            raise TornError
        transport = Transport.RAW if lite else Transport.UDP
        own = []
        for raw in found:
            home = self._namespaces.all.get(raw.common.net)
            if home is not None and (raw.common.num + home.mix) & table.mask != bucket:
                raise TornError
            if raw.common.net == namespace.va and raw.common.num == key.lport:
                own.append(raw._replace(transport=transport, mapped=False))
        return own


def key_of(flow: Flow) -> Key:
    """The key of a flow's tuple."""
    local, remote = flow.tuple.local, flow.tuple.remote
    port = (remote.port & 0xFF) << 8 | remote.port >> 8
    if local.ip.version == 6:
        return Key(True, local.ip.packed, remote.ip.packed, local.port, port)
    here, there = int.from_bytes(local.ip.packed, "little"), int.from_bytes(remote.ip.packed, "little")
    return Key(False, here, there, local.port, port)


def _matches(c: Common, key: Key) -> bool:
    """``inet_match`` and ``inet6_match``: the whole tuple (include/net/inet_hashtables.h)."""
    if c.num != key.lport or c.dport != key.rport:
        return False
    if key.v6:
        return c.family == AF_INET6 and c.v6_daddr == key.remote and c.v6_rcv_saddr == key.local
    return c.daddr == key.remote and c.rcv_saddr == key.local


def _score(c: Common, key: Key, ipv6only: int) -> int:
    """How well a listening or unconnected socket fits; 0: not at all (compute_score of inet, inet6 and udp)."""
    if c.family == AF_INET6 and (key.v6 or not c.bits & ipv6only):
        local, remote = c.v6_rcv_saddr, c.v6_daddr
        here = key.local if isinstance(key.local, bytes) else V4_MAPPED + key.local.to_bytes(4, "little")
        there = key.remote if isinstance(key.remote, bytes) else V4_MAPPED + key.remote.to_bytes(4, "little")
        score = 1
    elif c.family == AF_INET and not key.v6:
        local, remote = c.rcv_saddr.to_bytes(4, "little"), c.daddr.to_bytes(4, "little")
        here, there = (
            value.to_bytes(4, "little") if isinstance(value, int) else value for value in (key.local, key.remote)
        )
        score = 2
    else:
        return 0
    if any(local):
        if local != here:
            return 0
        score += 4
    if c.dport:
        if c.dport != key.rport or (any(remote) and remote != there):
            return 0
        score += 8
    elif any(remote) and c.state != LISTEN and remote != there:
        return 0
    return score
