"""The lookup of a connection with one holder, TCP or connected UDP, by six small reads and no detours.

It proves the same chain as holding.py and owners.py do, in the direction in which it is cheapest: bucket, socket; then
process, descriptor slot, file and its ``private_data`` (the ``struct socket`` that the ``sock`` points to); then the
socket once more. Whatever does not fit at once is left to them: None says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.descriptors import Holder
from appliance.guest.linux.facts import AF_INET6, NEW_SYN_RECV, TIME_WAIT, Facts
from appliance.guest.linux.hashes import TupleHash
from appliance.guest.linux.namespaces import Namespace, Namespaces
from appliance.guest.linux.owners import Owners
from appliance.guest.linux.record import KERNEL_HALF
from appliance.guest.linux.sockets import Common, Raw, Sockets, is_mapped
from appliance.model import Finding, Flow, Match, Owner, Transport

MAX_CHAIN = 16
MAX_KNOWN = 16_384
MAX_HOMES = 4
CRED = 5  # of the record "identity"
Span = tuple[int, int]


@dataclass(slots=True)
class _Known:
    """What the last full confirmation of a socket's owner has found. All of it is read again.

    The ``_was`` are the bytes that were confirmed last: the same bytes need no second parsing.
    """

    socket: int  # struct socket
    file: Span
    task: Span
    uid: Span  # in the credentials: those before last may lie at the same place
    identity: tuple[Any, ...]
    links: tuple[tuple[Span, bytes], ...]  # from files_struct to the slot, where the table is not embedded
    table: Span  # the files_struct, where it is
    place: tuple[int, int]  # fdt and fdt->fd
    slot: slice  # of the descriptor, in the array
    expected: bytes  # what the slot holds
    owner: Owner
    table_was: bytes = b""
    file_was: bytes = b""
    task_was: bytes = b""
    socket_was: bytes = b""
    transport: Transport | None = None
    finding: Finding | None = None  # the answer, for a socket of these bytes


class FastPath:
    """Answers for connections whose owner was confirmed before, or whose file the index of the last look has."""

    def __init__(
        self, kernel: Kernel, facts: Facts, namespaces: Namespaces, sockets: Sockets, owners: Owners, hashes: TupleHash
    ) -> None:
        self._read = kernel.read_unlimited  # at most some hundred times
        self._namespaces, self._sockets, self._owners, self._hashes = namespaces, sockets, owners, hashes
        common, tail = facts.record("common"), facts.record("sock")
        self._parse, self._parse_tail = common.parse, tail.parse
        self._node = facts.offset("sk.node")
        self._low = common.low - self._node  # chains point to nodes
        self._size, self._cut = common.size, tail.low - common.low
        self._whole = self._cut + tail.size
        self._slot_size, self._slot_head = facts.size("udp_hslot"), facts.offset("udp_hslot.head")
        self._only = facts.ipv6only
        self._identity = facts.record("identity")
        self._files = facts.record("files")
        self._file = facts.record("file")
        self._uid = facts.offset("cred.uid")
        self._socket = facts.record("socket")
        self._bias = 0 if facts.find("file.f_ref") is None else 1
        self._pointer = Struct("<Q").unpack
        self._known: dict[int, _Known] = {}
        self._homes_of: dict[bytes, tuple[Namespace, ...]] = {}
        self._homes_at = -1  # the look at the namespaces that they are of

    def find(self, flow: Flow) -> Finding | None:
        """The exact owner of a connection, or None: then the long way must say."""
        try:
            return self._udp(flow) if flow.tuple.protocol is Transport.UDP else self._tcp(flow)
        except UnreadableMemory:
            return None

    def _tcp(self, flow: Flow) -> Finding | None:
        local, remote = flow.tuple.local, flow.tuple.remote
        port = (remote.port & 0xFF) << 8 | remote.port >> 8
        lport = local.port
        here, there = local.ip.packed, remote.ip.packed
        v6 = len(here) == 16
        read = self._read
        if not (self._hashes.ready6 if v6 else self._hashes.ready4):
            return None
        found: tuple[int, Namespace, tuple[Any, ...], bytes] | None = None
        for namespace in self._homes(here):
            table = namespace.tcp
            if table is None:
                continue
            if v6:
                value = self._hashes.v6(here, lport, there, port, namespace.mix)
            else:
                laddr, faddr = int.from_bytes(here, "little"), int.from_bytes(there, "little")
                value = self._hashes.v4(laddr, lport, faddr, port, namespace.mix)
            bucket = value & table.ehash_mask
            (node,) = self._pointer(read(table.ehash + 8 * bucket, 8))
            for _ in range(MAX_CHAIN):
                if node & 1 or node < KERNEL_HALF:
                    break
                data = read(node + self._low, self._whole)
                c = self._parse(data[: self._size])
                if c[1] == value and c[4] == lport and c[5] == port and c[8] == namespace.va:
                    same = (c[10] == here and c[11] == there) if v6 else (c[2] == laddr and c[3] == faddr)
                    if same:
                        if found is not None or c[7] in (TIME_WAIT, NEW_SYN_RECV):
                            return None  # the long way lists the owners in both namespaces
                        found = node - self._node, namespace, c, data
                        break
                node = c[0]
            else:
                return None
            if (found is None or found[1] is not namespace) and node != bucket << 1 | 1:
                return None  # not the chain's own end: nothing is known of this namespace
        return self._of_socket(Transport.TCP, *found) if found is not None else None

    def _homes(self, address: bytes) -> Sequence[Namespace]:
        """The namespaces that have this address: in each of them the same tuple may be another connection.

        None where they are too many for a short way.
        """
        if self._homes_at != self._namespaces.looks:
            self._homes_of.clear()
            self._homes_at = self._namespaces.looks
        homes = self._homes_of.get(address)
        if homes is None:
            everyone = self._namespaces.all
            own = everyone.values() if len(everyone) == 1 else self._namespaces.having(address)
            homes = tuple(own) if len(own) <= MAX_HOMES else ()
            if len(self._homes_of) < MAX_KNOWN:
                self._homes_of[address] = homes
        return homes

    def _udp(self, flow: Flow) -> Finding | None:
        """A connected socket, if it is the only one on this port that can be meant (see Probe.datagram)."""
        local, remote = flow.tuple.local, flow.tuple.remote
        port = (remote.port & 0xFF) << 8 | remote.port >> 8
        lport = local.port
        here, there = local.ip.packed, remote.ip.packed
        v6 = len(here) == 16
        laddr, faddr = int.from_bytes(here, "little"), int.from_bytes(there, "little")
        read = self._read
        homes = self._homes(here)
        if not port or len(homes) > 1:
            return None
        for namespace in homes:
            table = namespace.udp
            if table is None:
                continue
            bucket = (lport + namespace.mix) & table.mask
            (node,) = self._pointer(read(table.hash + bucket * self._slot_size + self._slot_head, 8))
            found: tuple[int, tuple[Any, ...], bytes] | None = None
            others = False
            for _ in range(MAX_CHAIN):
                if node < KERNEL_HALF or node & 7:
                    break
                data = read(node + self._low, self._whole)
                c = self._parse(data[: self._size])
                if c[4] == lport and c[8] == namespace.va:
                    if c[5] != port:
                        others = True  # it may be meant, if no connected one is
                    elif found is not None:
                        return None
                    else:
                        found = node, c, data
                node = c[0]
            if node:
                return None  # a long chain, or a broken one
            if found is not None:
                node, c, data = found
                if v6:
                    same = c[6] == AF_INET6 and c[10] == here and c[11] == there
                else:
                    same = c[2] == laddr and c[3] == faddr and not (c[6] == AF_INET6 and c[12] & self._only)
                if same:
                    return self._of_socket(Transport.UDP, node - self._node, namespace, c, data)
            if found is not None or others:
                return None
        return None

    def _of_socket(
        self, transport: Transport, sk: int, namespace: Namespace, c: tuple[Any, ...], data: bytes
    ) -> Finding | None:
        sk_socket, uid = self._parse_tail(data[self._cut :])
        known = self._known.get(sk)
        if known is None or known.socket != sk_socket:
            known = self._learn(sk, sk_socket) if sk_socket >= KERNEL_HALF else None
            if known is None:
                return None
        if not self._is_confirmed(known):
            del self._known[sk]
            return None
        again = self._read(sk + self._low + self._node, self._whole)
        if again != data and (again[: self._size] != data[: self._size] or again[self._cut :] != data[self._cut :]):
            return None
        if known.finding is not None and known.socket_was == data and known.transport is transport:
            return known.finding
        common = Common(*c)
        mapped = transport is Transport.TCP and is_mapped(common)
        raw = Raw(transport, sk, common, namespace, common.state, mapped, sk_socket, uid)
        owners = (known.owner,)
        known.finding = Finding(Match.EXACT, owners, self._sockets.build(raw, owners), None, (), 0, True)
        known.socket_was, known.transport = data, transport
        return known.finding

    def _is_confirmed(self, known: _Known) -> bool:
        """Whether process, descriptor and file are what they were. From the process towards the socket."""
        read = self._read
        if known.links:
            for (va, size), expected in known.links:
                if read(va, size) != expected:
                    return False
        else:
            table = read(*known.table)
            if table != known.table_was:
                fdt, _, fd, slots = self._files.parse(table)
                if slots[known.slot] != known.expected or (fdt, fd) != known.place:
                    return False
                known.table_was = table
        file = read(*known.file)
        if file != known.file_was:
            references, private = self._file.parse(file)
            if private != known.socket or references + self._bias != 1:
                return False
            known.file_was = file
        task = read(*known.task)
        if task != known.task_was:
            if self._identity.parse(task) != known.identity:
                return False
            known.task_was = task
        return int.from_bytes(read(*known.uid), "little") == known.owner.process.uid

    def _learn(self, sk: int, sk_socket: int) -> _Known | None:
        """Who is said to hold the socket; the caller confirms it."""
        file, _ = self._socket.parse(self._read(*self._socket.span(sk_socket)))
        known = self._of_index(sk_socket, file) or self._of_search(sk_socket, file)
        if known is not None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[sk] = known
        return known

    def _of_index(self, sk_socket: int, file: int) -> _Known | None:
        """What the last look saw: no read at all, since all of it is confirmed by the caller."""
        descriptors = self._owners.descriptors
        holders = descriptors.index.get(file, [])
        users = descriptors.users.get(holders[0].table.files, []) if len(holders) == 1 else []
        if len(users) != 1 or users[0].via is not users[0].leader:
            return None
        leader = users[0].leader
        process = self._owners.processes.describe_quickly(leader)
        if process is None:
            return None
        owner = self._owners.owner_of(process, holders[0].number)
        return self._make(sk_socket, file, leader.identity, holders[0], owner)

    def _of_search(self, sk_socket: int, file: int) -> _Known | None:
        """What the tables of the processes found lately hold."""
        owner = self._owners.find_quickly(file, sk_socket)
        holders = self._owners.descriptors.index.get(file, ())
        if owner is None or len(holders) != 1:
            return None
        identity = self._identity.parse(self._read(*self._identity.span(owner.process.task_va)))
        if identity[:3] != (owner.process.pid, owner.process.key.started_ns, holders[0].table.files):
            return None
        if self._owners.find_quickly(file, sk_socket) is not owner:  # described anew: it has changed meanwhile
            return None
        return self._make(sk_socket, file, identity, holders[0], owner)

    def _make(self, sk_socket: int, file: int, identity: tuple[Any, ...], holder: Holder, owner: Owner) -> _Known:
        table, number = holder
        slot, expected = slice(8 * number, 8 * number + 8), file.to_bytes(8, "little")
        links: tuple[tuple[Span, bytes], ...] = ()
        if not self._owners.descriptors.is_embedded(table):
            values = table.fdt.to_bytes(8, "little"), table.fd.to_bytes(8, "little"), expected
            links = tuple(zip(self._owners.descriptors.checks(holder), values, strict=True))
        return _Known(
            socket=sk_socket,
            file=self._file.span(file),
            task=self._identity.span(owner.process.task_va),
            uid=(identity[CRED] + self._uid, 4),
            identity=identity,
            links=links,
            table=self._files.span(table.files),
            place=(table.fdt, table.fd),
            slot=slot,
            expected=expected,
            owner=owner,
        )
