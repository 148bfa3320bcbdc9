"""The lookup of an established connection with one holder, by six small reads and no detours.

It proves the same chain as holding.py and owners.py do, in the direction in which it is cheapest: bucket, socket; then
process, descriptor slot, file and its ``private_data`` (the ``struct socket`` that the ``sock`` points to); then the
socket once more. Whatever does not fit at once is left to them: None says nothing.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.descriptors import Holder
from appliance.guest.linux.facts import NEW_SYN_RECV, TIME_WAIT, Facts
from appliance.guest.linux.hashes import TupleHash
from appliance.guest.linux.namespaces import Namespace, Namespaces
from appliance.guest.linux.owners import Owners
from appliance.guest.linux.record import KERNEL_HALF
from appliance.guest.linux.sockets import Common, Raw, Sockets, is_mapped
from appliance.model import Finding, Flow, Match, Owner, Transport

MAX_NAMESPACES = 8  # with more of them one batch is cheaper than this
MAX_CHAIN = 16
MAX_KNOWN = 16_384


class _Known(NamedTuple):
    """What the last full confirmation of a socket's owner has found. All of it is read again."""

    socket: int  # struct socket
    file: int
    task: tuple[int, int]  # span of the task
    identity: tuple[Any, ...]
    table: tuple[int, int]  # span of the files_struct
    place: tuple[int, int]  # fdt and fdt->fd
    slot: slice  # of the descriptor, in the array
    expected: bytes  # what the slot holds
    owner: Owner


class FastPath:
    """Answers for connections whose owner was confirmed before, or whose file the index of the last look has."""

    def __init__(
        self, kernel: Kernel, facts: Facts, namespaces: Namespaces, sockets: Sockets, owners: Owners, hashes: TupleHash
    ) -> None:
        self._read = kernel.read
        self._namespaces, self._sockets, self._owners, self._hashes = namespaces, sockets, owners, hashes
        common, tail = facts.record("common"), facts.record("sock")
        self._parse, self._parse_tail = common.parse, tail.parse
        self._low = common.low - facts.offset("sk.node")  # chains point to nodes
        self._node = facts.offset("sk.node")
        self._size, self._cut = common.size, tail.low - common.low
        self._whole = self._cut + tail.size
        self._identity = facts.record("identity")
        self._files = facts.record("files")
        self._file = facts.record("file")
        self._socket = facts.record("socket")
        self._bias = 0 if facts.find("file.f_ref") is None else 1
        self._pointer = Struct("<Q").unpack
        self._known: dict[int, _Known] = {}
        self._answers: dict[int, tuple[bytes, Owner, Finding]] = {}

    def find(self, flow: Flow) -> Finding | None:
        """The exact owner of a TCP connection, or None: then the long way must say."""
        try:
            return self._find(flow)
        except UnreadableMemory:
            return None

    def _find(self, flow: Flow) -> Finding | None:
        local, remote = flow.tuple.local, flow.tuple.remote
        port = (remote.port & 0xFF) << 8 | remote.port >> 8
        lport = local.port
        v6 = local.ip.version == 6
        here, there = local.ip.packed, remote.ip.packed
        read = self._read
        namespaces = self._namespaces.all
        if not (self._hashes.ready6 if v6 else self._hashes.ready4) or len(namespaces) > MAX_NAMESPACES:
            return None
        for namespace in namespaces.values():
            table = namespace.tcp
            if table is None:
                continue
            if v6:
                value = self._hashes.v6(here, lport, there, port, namespace.mix)
            else:
                laddr, faddr = int.from_bytes(here, "little"), int.from_bytes(there, "little")
                value = self._hashes.v4(laddr, lport, faddr, port, namespace.mix)
            (node,) = self._pointer(read(table.ehash + 8 * (value & table.ehash_mask), 8))
            for _ in range(MAX_CHAIN):
                if node & 1 or node < KERNEL_HALF:
                    break
                data = read(node + self._low, self._whole)
                c = self._parse(data[: self._size])
                if c[1] == value and c[4] == lport and c[5] == port and c[8] == namespace.va:
                    same = (c[10] == here and c[11] == there) if v6 else (c[2] == laddr and c[3] == faddr)
                    if same:
                        return self._of_socket(node - self._node, namespace, c, data)
                node = c[0]
        return None

    def _of_socket(self, sk: int, namespace: Namespace, c: tuple[Any, ...], data: bytes) -> Finding | None:
        if c[7] in (TIME_WAIT, NEW_SYN_RECV):
            return None
        sk_socket, uid = self._parse_tail(data[self._cut :])
        known = self._known.get(sk)
        if known is None or known.socket != sk_socket:
            known = self._learn(sk, sk_socket) if sk_socket >= KERNEL_HALF else None
            if known is None:
                return None
        read = self._read
        fdt, _, fd, slots = self._files.parse(read(*known.table))
        references, private = self._file.parse(read(*self._file.span(known.file)))
        if (
            self._identity.parse(read(*known.task)) != known.identity
            or slots[known.slot] != known.expected
            or (fdt, fd) != known.place
            or private != sk_socket
            or references + self._bias != 1
        ):
            del self._known[sk]
            return None
        again = read(sk + self._low + self._node, self._whole)
        if again != data and (again[: self._size] != data[: self._size] or again[self._cut :] != data[self._cut :]):
            return None
        answer = self._answers.get(sk)
        if answer is not None and answer[0] == data and answer[1] is known.owner:
            return answer[2]
        common = Common(*c)
        raw = Raw(Transport.TCP, sk, common, namespace, common.state, is_mapped(common), sk_socket, uid)
        owners = (known.owner,)
        finding = Finding(Match.EXACT, owners, self._sockets.build(raw, owners), None, (), 0, True)
        if len(self._answers) >= MAX_KNOWN:
            self._answers.clear()
        self._answers[sk] = data, known.owner, finding
        return finding

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
        if len(users) != 1 or users[0].via is not users[0].leader or not descriptors.is_embedded(holders[0].table):
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
        if owner is None or len(holders) != 1 or not self._owners.descriptors.is_embedded(holders[0].table):
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
        task, span = self._identity.span(owner.process.task_va), self._files.span(table.files)
        return _Known(sk_socket, file, task, identity, span, (table.fdt, table.fd), slot, expected, owner)
