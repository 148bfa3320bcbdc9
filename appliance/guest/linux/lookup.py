"""From a packet's tuple to the process, through the guest's own hash tables: a handful of reads.

The order is the kernel's (net/ipv4/inet_hashtables.c, __inet_lookup; net/ipv4/udp.c, __udp4_lib_lookup): the exact
connection, then a listener; for UDP a connected socket, then an unconnected one. Every answer is confirmed: the tuple,
the way from socket to file, the descriptor and the process are read again together, and only an unchanged chain is an
owner. Three tries, then TORN; in doubt nobody, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import (
    AF_INET,
    AF_INET6,
    LISTEN,
    LISTENING_NULLS_BASE,
    NEW_SYN_RECV,
    SOCK_DEAD,
    TCP_STATES,
    TIME_WAIT,
    Facts,
)
from appliance.guest.linux.hashes import V4_MAPPED, portaddr4, portaddr6
from appliance.guest.linux.namespaces import Addresses, Namespace, Namespaces
from appliance.guest.linux.owners import Owners
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Common, Raw, Sockets
from appliance.model import Direction, Evidence, Finding, Flow, IpAddress, Match, Owner, Reason, Transport

TRIES = 3
MAX_CHAIN = 1024  # sockets followed in one bucket
MAX_LISTENERS = 64  # of one SO_REUSEPORT group
IPPROTO_RAW = 255  # a raw socket that builds its own IP headers may send anything
PROTOCOL_NUMBER = {Transport.TCP: 6, Transport.UDP: 17}


class Key(NamedTuple):
    """A tuple as the kernel holds it: IPv4 addresses and ports in network order, loaded little-endian."""

    v6: bool
    local: int | bytes
    remote: int | bytes
    lport: int  # host order, skc_num
    rport: int  # network order, skc_dport


class _TornError(Exception):
    """What was read contradicts itself: start over."""


class Lookup:
    """Answers "who owns this tuple?" for one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, namespaces: Namespaces, sockets: Sockets, owners: Owners) -> None:
        self._kernel = kernel
        self._facts = facts
        self._namespaces = namespaces
        self._sockets = sockets
        self._owners = owners
        self._addresses = Addresses(kernel, facts)
        self._common = facts.record("common")
        self._tail = facts.record("sock")
        self._socket = facts.record("socket")
        self._subflow = facts.record("subflow")
        self._ulp_data = facts.find("icsk.ulp_data")
        self._link = facts.offset("sk.node")
        self._low = self._common.low
        self._whole = self._tail.low + self._tail.size - self._low
        self._tail_at = self._tail.low - self._low
        self._own: dict[int, set[bytes]] = {}
        self._torn = 0

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now."""
        self._torn = 0
        key = _key(flow)
        for _ in range(TRIES):
            try:
                finding = self._find(flow, key)
            except _TornError:
                self._torn += 1
                continue
            return replace(finding, torn=self._torn) if self._torn else finding
        return Finding(Match.NONE, reason=Reason.TORN, torn=self._torn)

    def _find(self, flow: Flow, key: Key) -> Finding:
        match flow.tuple.protocol:
            case Transport.TCP:
                return self._tcp(flow, key)
            case Transport.UDP:
                return self._udp(flow, key)
            case _:
                return self._other(flow, key)

    # -- TCP --

    def _tcp(self, flow: Flow, key: Key) -> Finding:
        raw = self._find_connection(key)
        if raw is None:
            started_here = flow.direction is Direction.OUT and not flow.midstream
            return (None if started_here else self._of_listener(key, None)) or self._nobody(flow, key)
        if raw.common.state == NEW_SYN_RECV:
            finding = self._of_request(raw, key)
        elif raw.common.state != TIME_WAIT and raw.sk_socket:
            return self._of_socket(raw, Match.EXACT)
        else:
            # nobody holds it: not yet accepted, already closed, or over; what came in came to the listener
            waiting = raw.common.state != TIME_WAIT and not raw.common.flags >> SOCK_DEAD & 1
            finding = self._of_listener(key, raw) if waiting or flow.direction is Direction.IN else None
        if finding is not None:
            return finding
        reason = Reason.TIME_WAIT if raw.common.state == TIME_WAIT else Reason.ORPHAN
        return Finding(Match.NONE, socket=self._sockets.build(raw), reason=reason, final=True)

    def _find_connection(self, key: Key) -> Raw | None:
        """The socket with exactly this tuple, in any network namespace."""
        raw = self._probe(key, list(self._namespaces.all.values()))
        if raw is not None:
            return raw
        known = set(self._namespaces.all)
        self._namespaces.look()  # a namespace may be new
        fresh = [namespace for va, namespace in self._namespaces.all.items() if va not in known]
        return self._probe(key, fresh) if fresh else None

    def _probe(self, key: Key, namespaces: Sequence[Namespace]) -> Raw | None:
        hashes = self._sockets.hashes
        if not (hashes.ready6 if key.v6 else hashes.ready4):
            return self._search(key)
        places: list[tuple[Namespace, int, int]] = []
        for namespace in namespaces:
            table = namespace.tcp
            if table is not None:
                value = self._hash(key, namespace.mix)
                places.append((namespace, value, table.ehash + 8 * (value & table.ehash_mask)))
        heads = self._kernel.readv([(place, 8) for _, _, place in places])
        for (namespace, value, place), head in zip(places, heads, strict=True):
            if head is None:
                continue
            raw = self._follow(key, namespace, value, place, int.from_bytes(head, "little"))
            if raw is not None:
                return raw
        return None

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
                raw = self._read_sock(va, namespace)
                if raw is None:
                    break
                c = raw.common
                if c.hash == value and _matches(c, key) and c.net == namespace.va:
                    return raw
                node = c.next
            if node >> 1 == bucket and node & 1:
                return None
            self._torn += 1  # carried off to another bucket, or the chain broke: start over
            node = self._kernel.u64(place)
        return None

    def _read_sock(self, va: int, namespace: Namespace) -> Raw | None:
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

    def _search(self, key: Key) -> Raw | None:
        """Without a confirmed hash: look at every connection. The first one found also teaches us the hash."""
        for namespace in self._namespaces.all.values():
            if namespace.tcp is None:
                continue
            nodes = self._sockets.walk_ehash(namespace.tcp).nodes
            self._sockets.calibrate(nodes, self._namespaces.all)
            for node in nodes:
                c = Common(*node.fields)
                owner = self._namespaces.all.get(c.net)
                if owner is not None and _matches(c, key):
                    return self._read_sock(node.va, owner)
        return None

    # -- listeners --

    def _of_request(self, raw: Raw, key: Key) -> Finding | None:
        """A handshake under way: ``skc_listener`` is the listening socket."""
        listener = self._read_sock(raw.common.flags, raw.namespace) if is_object(raw.common.flags) else None
        if listener is None or listener.common.state != LISTEN or listener.common.num != key.lport:
            return self._of_listener(key, raw)
        return self._merge([listener], raw)

    def _of_listener(self, key: Key, raw: Raw | None) -> Finding | None:
        """The listening socket (or SO_REUSEPORT group) that this incoming connection goes to."""
        spaces = [raw.namespace] if raw is not None else list(self._namespaces.all.values())
        if raw is None:
            spaces = self._spaces_of(key, spaces)
        for namespace in spaces:
            best = self._best(key, list(self._listeners(key, namespace)))
            if best:
                return self._merge(best, raw)
        return None

    def _listeners(self, key: Key, namespace: Namespace) -> Iterator[Raw]:
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
            for _ in range(TRIES):
                found, end = self._chain(place, link, old, namespace)
                if old or end >> 1 in (bucket, bucket + LISTENING_NULLS_BASE):
                    break
                self._torn += 1
            for raw in found:
                if raw.common.state == LISTEN and raw.common.num == port and raw.common.net == namespace.va:
                    yield raw

    def _chain(self, place: int, link: int, old: bool, namespace: Namespace) -> tuple[list[Raw], int]:
        found: list[Raw] = []
        try:
            node = self._kernel.u64(place)
            for _ in range(MAX_CHAIN):
                if node & 1 or not is_object(node):
                    break
                raw = self._read_sock(node - link, namespace)
                if raw is None:
                    break
                found.append(raw)
                node = self._kernel.u64(node) if old else raw.common.next
        except UnreadableMemory:
            return found, 0
        return found, node

    def _best(self, key: Key, found: Sequence[Raw]) -> list[Raw]:
        """The best scores of ``compute_score``: a bound address beats the wildcard, the packet's family the other."""
        only = self._facts.ipv6only
        scored = [(score, raw) for raw in found if (score := _score(raw.common, key, only)) > 0]
        top = max((score for score, _ in scored), default=0)
        return [raw for score, raw in scored if score == top][:MAX_LISTENERS]

    def _merge(self, listeners: list[Raw], raw: Raw | None) -> Finding | None:
        """One finding from the sockets of a group; None when none of them has an owner."""
        owners: dict[int, Owner] = {}
        for listener in listeners:
            finding = self._of_socket(listener, Match.LISTENER) if listener.sk_socket else None
            if finding is not None and finding.match is Match.KERNEL:
                return finding
            for owner in finding.owners if finding is not None else ():
                owners.setdefault(owner.process.task_va, owner)
        if not owners:
            return None
        everybody = tuple(sorted(owners.values(), key=lambda owner: owner.process.key.started_ns))
        socket = self._sockets.build(raw) if raw is not None else self._sockets.build(listeners[0], everybody)
        return Finding(Match.LISTENER, everybody, socket, _ambiguous(everybody))

    # -- UDP --

    def _udp(self, flow: Flow, key: Key) -> Finding:
        found = self._find_datagram(key)
        if not found:
            return self._nobody(flow, key)
        raw = found[0]
        if not raw.sk_socket:
            return Finding(Match.NONE, socket=self._sockets.build(raw), reason=Reason.ORPHAN, final=True)
        match = Match.EXACT if raw.common.dport else Match.UNCONNECTED
        findings = [self._of_socket(each, match) for each in found]
        return findings[0] if len(findings) == 1 else _merged(findings)

    def _find_datagram(self, key: Key) -> list[Raw]:
        everybody = list(self._namespaces.all.values())
        found = self._datagrams(key, self._spaces_of(key, everybody))
        if not found:
            known = set(self._namespaces.all)
            self._namespaces.look()
            fresh = [namespace for va, namespace in self._namespaces.all.items() if va not in known]
            found = self._datagrams(key, fresh)
        return found

    def _datagrams(self, key: Key, namespaces: Sequence[Namespace]) -> list[Raw]:
        stride, head = self._facts.size("udp_hslot"), self._facts.offset("udp_hslot.head")
        for namespace in namespaces:
            table = namespace.udp
            if table is None:
                continue
            place = table.hash + ((key.lport + namespace.mix) & table.mask) * stride + head
            found, _ = self._chain(place, self._link, False, namespace)
            own = [
                raw._replace(transport=Transport.UDP, mapped=False)
                for raw in found
                if raw.common.num == key.lport and raw.common.net == namespace.va
            ]
            best = self._best(key, own)
            if best:
                return best
        return []

    # -- from a socket to its processes --

    def _of_socket(self, raw: Raw, match: Match) -> Finding:
        """Owners of a full socket. Raises _TornError when it changed meanwhile: the whole lookup must start over."""
        socket, common = raw.sk_socket, raw.common
        if not is_object(socket):
            raise _TornError
        (data,) = self._kernel.readv((self._socket.span(socket),))
        if data is None:
            raise _TornError
        file, _ = self._socket.parse(data)
        guards = [(raw.va + self._low, self._common.size), self._tail.span(raw.va), self._socket.span(socket)]
        if not file:
            parent = self._parent(raw)
            if parent is None:
                if not self._unchanged(raw, socket, 0, self._kernel.readv(guards)):
                    raise _TornError
                return Finding(Match.KERNEL, (), self._sockets.build(raw), final=True)
            socket, file, more = parent
            guards = [guards[0], guards[1], self._socket.span(socket), *more]
        held = self._owners.find(file, guards) if is_object(file) else None
        values: Sequence[bytes | None] = held.guards if held is not None else self._kernel.readv(guards)
        if not self._unchanged(raw, raw.sk_socket, file, values):
            raise _TornError
        if held is None:
            return self._hidden(raw, file)
        public = self._sockets.build(raw, held.owners)
        reason = _ambiguous(held.owners) if len(held.owners) > 1 else None
        return Finding(match, held.owners, public, reason, (), 0, match is Match.EXACT and common.state != LISTEN)

    def _unchanged(self, raw: Raw, socket: int, file: int, values: Sequence[bytes | None]) -> bool:
        first, second, third = values[:3]
        if first is None or second is None or third is None:
            return False
        again = Common(*self._common.parse(first))
        return (
            again.tuple == raw.common.tuple
            and again.state not in (TIME_WAIT, NEW_SYN_RECV)
            and self._tail.parse(second)[0] == socket
            and self._socket.parse(third)[0] == file
        )

    def parent_file(self, raw: Raw) -> int:
        """Of an MPTCP subflow, the file of its connection; 0 for every other socket."""
        parent = self._parent(raw)
        return 0 if parent is None else parent[1]

    def _parent(self, raw: Raw) -> tuple[int, int, list[tuple[int, int]]] | None:
        """Of an MPTCP subflow, socket and file of the connection it belongs to (net/mptcp/subflow.c)."""
        if raw.transport is not Transport.TCP or self._ulp_data is None or self._subflow.size <= 8:
            return None
        try:
            context = self._kernel.u64(raw.va + self._ulp_data)
            if not is_object(context):
                return None
            own, parent = self._subflow.parse(self._kernel.read(*self._subflow.span(context)))
            if own != raw.va or not is_object(parent):
                return None
            socket, _ = self._tail.parse(self._kernel.read(*self._tail.span(parent)))
            if not is_object(socket):
                return None
            file, _ = self._socket.parse(self._kernel.read(*self._socket.span(socket)))
        except UnreadableMemory:
            return None
        return (socket, file, [self._tail.span(parent)]) if is_object(file) else None

    def _hidden(self, raw: Raw, file: int) -> Finding:
        text = f"the socket is open (file {file:#x}, uid {raw.uid}) and no listed process holds it"
        evidence = Evidence(text, "hidden-owner", raw.va, weight=1)
        return Finding(Match.NONE, (), self._sockets.build(raw), Reason.HIDDEN, (evidence,))

    # -- everything else --

    def _other(self, flow: Flow, key: Key) -> Finding:
        """ICMP and other protocols: a process only if it holds a raw or ping socket that can have sent it."""
        holders = self._raw_holders(flow, key)
        owners = tuple(owner for finding in holders for owner in finding.owners)
        if owners and flow.direction is Direction.OUT:
            distinct = tuple({owner.process.task_va: owner for owner in owners}.values())
            if len(distinct) == 1:
                return Finding(Match.UNCONNECTED, distinct, holders[0].socket, Reason.RAW)
            return Finding(Match.UNCONNECTED, distinct, holders[0].socket, Reason.AMBIGUOUS)
        if self._is_forwarded(flow):
            return Finding(Match.NONE, reason=Reason.FORWARDED)
        return Finding(Match.KERNEL, final=flow.direction is Direction.IN)

    def _nobody(self, flow: Flow, key: Key) -> Finding:
        if self._is_forwarded(flow):
            return Finding(Match.NONE, reason=Reason.FORWARDED)
        if flow.direction is Direction.IN and not flow.midstream:
            return Finding(Match.NONE, reason=Reason.CLOSED)
        holders = self._raw_holders(flow, key)
        evidence = tuple(
            Evidence(
                f"{owner.process.name} (pid {owner.process.pid}) holds a {finding.socket.protocol} socket",
                "raw-socket",
                finding.socket.address,
                detail=str(owner.process.pid),
                weight=1,
            )
            for finding in holders
            if finding.socket is not None
            for owner in finding.owners
        )
        return Finding(Match.NONE, reason=Reason.RAW if evidence else Reason.LATE, evidence=evidence)

    def _raw_holders(self, flow: Flow, key: Key) -> list[Finding]:
        """Raw, ping and packet sockets that can send such a packet, with their owners."""
        wanted = {flow.ip_protocol or PROTOCOL_NUMBER.get(flow.tuple.protocol, 0), IPPROTO_RAW}
        spaces = {namespace.va for namespace in self._spaces_of(key, list(self._namespaces.all.values()))}
        family = AF_INET6 if key.v6 else AF_INET
        findings = []
        for raw in self._sockets.walk_rare(self._namespaces.all):
            if raw.common.net not in spaces or not raw.sk_socket:
                continue
            if raw.transport is Transport.RAW and not (raw.common.num in wanted and raw.common.family == family):
                continue
            if raw.transport is Transport.ICMP and flow.tuple.protocol is not Transport.ICMP:
                continue
            finding = self._of_socket(raw, Match.UNCONNECTED)
            if finding.owners:
                findings.append(finding)
        return findings

    # -- addresses --

    def _spaces_of(self, key: Key, namespaces: list[Namespace]) -> list[Namespace]:
        """The namespaces that have the local address as their own; all of them if none has."""
        if len(namespaces) == 1:
            return namespaces
        address = key.local if isinstance(key.local, bytes) else key.local.to_bytes(4, "little")
        own = [namespace for namespace in namespaces if address in self._own_addresses(namespace)]
        return own or namespaces

    def _own_addresses(self, namespace: Namespace) -> set[bytes]:
        found = self._own.get(namespace.va)
        if found is None:
            found = self._own[namespace.va] = self._addresses.read(namespace)
        return found

    def _is_forwarded(self, flow: Flow) -> bool:
        """Whether no namespace has the local address as its own: then the guest routes or translates it."""
        ip = flow.tuple.local.ip
        if ip.is_multicast or ip.is_unspecified or ip.packed == b"\xff" * 4:
            return False
        if self._has(ip):
            return False
        self._own.clear()  # addresses come and go: look again before saying so
        self._namespaces.look()
        return not self._has(ip)

    def _has(self, ip: IpAddress) -> bool:
        return any(ip.packed in self._own_addresses(namespace) for namespace in self._namespaces.all.values())


def _key(flow: Flow) -> Key:
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


def _ambiguous(owners: Sequence[Owner]) -> Reason | None:
    """Several owners are one thing when they run the same program or one started the other."""
    paths = {str(owner.process.path) for owner in owners}
    if len(paths) <= 1:
        return None
    pids = {owner.process.pid for owner in owners}
    strangers = [owner for owner in owners if owner.process.parent_pid not in pids]
    return Reason.AMBIGUOUS if len(strangers) > 1 else None


def _merged(findings: Sequence[Finding]) -> Finding:
    """Several sockets of one SO_REUSEPORT group: any of them may get the packet."""
    owners = {owner.process.task_va: owner for finding in findings for owner in finding.owners}
    everybody = tuple(sorted(owners.values(), key=lambda owner: owner.process.key.started_ns))
    if not everybody:
        return findings[0]
    reason = Reason.AMBIGUOUS if len(everybody) > 1 and _ambiguous(everybody) else None
    return Finding(findings[0].match, everybody, findings[0].socket, reason, (), 0, findings[0].final)
