"""From a socket to the processes that hold it: ``sk_socket -> socket.file -> descriptors``.

An answer is given only for a chain that was read twice with the same result: the tuple, the socket's file, and together
with them every descriptor slot and every process behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import LISTEN, NEW_SYN_RECV, TIME_WAIT, Facts
from appliance.guest.linux.owners import Owners, Span
from appliance.guest.linux.probe import TornError
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Common, Raw, Sockets
from appliance.model import Evidence, Finding, Match, Owner, Reason, Transport

MAX_FILES = 65_536


class Holding:
    """Finds and confirms the owners of sockets in one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, sockets: Sockets, owners: Owners) -> None:
        self._kernel = kernel
        self._sockets = sockets
        self._owners = owners
        self._common = facts.record("common")
        self._tail = facts.record("sock")
        self._socket = facts.record("socket")
        self._whole = self._tail.low + self._tail.size - self._common.low
        self._tail_at = self._tail.low - self._common.low
        self._file_of: dict[int, int] = {}  # struct socket -> struct file, a hint like all that is remembered
        self._subflow = facts.record("subflow")
        self._ulp_data = facts.find("icsk.ulp_data") if self._subflow.size > 8 else None

    def of_socket(self, raw: Raw, match: Match, quick: bool = True) -> Finding:
        """Owners of a full socket. Raises TornError when it changed meanwhile."""
        if not is_object(raw.sk_socket):
            raise TornError
        owner = self._quickly(raw) if quick else None
        if owner is not None:
            final = match is Match.EXACT and raw.common.state != LISTEN
            owners = (owner,)
            return Finding(match, owners, self._sockets.build(raw, owners), None, (), 0, final)
        (data,) = self._kernel.readv((self._socket.span(raw.sk_socket),))
        if data is None:
            raise TornError
        file, _ = self._socket.parse(data)
        guards: list[Span] = [self._common.span(raw.va), self._tail.span(raw.va), self._socket.span(raw.sk_socket)]
        if not file:
            parent = self._parent(raw)
            if parent is None:
                self._check(raw, 0, self._kernel.readv(guards))
                return Finding(Match.KERNEL, (), self._sockets.build(raw), final=True)
            socket, file = parent
            guards[2] = self._socket.span(socket)
        held = self._owners.find(file, guards) if is_object(file) else None
        self._check(raw, file, held.guards if held is not None else self._kernel.readv(guards))
        if held is None:
            return self._hidden(raw, file)
        if len(self._file_of) >= MAX_FILES:
            self._file_of.clear()
        self._file_of[raw.sk_socket] = file
        public = self._sockets.build(raw, held.owners)
        final = match is Match.EXACT and raw.common.state != LISTEN
        return Finding(match, held.owners, public, ambiguous(held.owners), (), 0, final)

    def _quickly(self, raw: Raw) -> Owner | None:
        """The usual case, by few and small reads: one process, one descriptor, as the index has it."""
        try:
            file = self._file_of.get(raw.sk_socket)
            if file is None:
                file, _ = self._socket.parse(self._kernel.read(*self._socket.span(raw.sk_socket)))
                if not file:
                    return None
            owner = self._owners.find_quickly(file, raw.sk_socket)
            if owner is None:
                self._file_of.pop(raw.sk_socket, None)
                return None
            data = self._kernel.read(raw.va + self._common.low, self._whole)
        except UnreadableMemory:
            return None
        again = self._sockets.parse(data[: self._common.size])
        if (
            again.tuple != raw.common.tuple
            or again.state in (TIME_WAIT, NEW_SYN_RECV)
            or self._tail.parse(data[self._tail_at :])[0] != raw.sk_socket
        ):
            raise TornError
        if len(self._file_of) >= MAX_FILES:
            self._file_of.clear()
        self._file_of[raw.sk_socket] = file
        return owner

    def parent_file(self, raw: Raw) -> int:
        """Of an MPTCP subflow, the file of its connection; 0 for every other socket."""
        parent = self._parent(raw)
        return 0 if parent is None else parent[1]

    def _check(self, raw: Raw, file: int, guards: Sequence[bytes | None]) -> None:
        """Raise TornError unless tuple, ``sk_socket`` and its file are what they were."""
        first, second, third = guards
        if first is None or second is None or third is None:
            raise TornError
        again = Common(*self._common.parse(first))
        if (
            again.tuple != raw.common.tuple
            or again.state in (TIME_WAIT, NEW_SYN_RECV)
            or self._tail.parse(second)[0] != raw.sk_socket
            or self._socket.parse(third)[0] != file
        ):
            raise TornError

    def _parent(self, raw: Raw) -> tuple[int, int] | None:
        """Of an MPTCP subflow, socket and file of the connection it belongs to (net/mptcp/subflow.c)."""
        if raw.transport is not Transport.TCP or self._ulp_data is None:
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
        return (socket, file) if is_object(file) else None

    def _hidden(self, raw: Raw, file: int) -> Finding:
        claim = f"the socket is open (file {file:#x}, uid {raw.uid}) and no listed process holds it"
        evidence = Evidence(claim, "hidden-owner", raw.va, weight=1)
        return Finding(Match.NONE, (), self._sockets.build(raw), Reason.HIDDEN, (evidence,))


def ambiguous(owners: Sequence[Owner]) -> Reason | None:
    """Several owners are one thing when they run the same program or one started the other."""
    if len(owners) < 2 or len({str(owner.process.path) for owner in owners}) == 1:
        return None
    pids = {owner.process.pid for owner in owners}
    strangers = [owner for owner in owners if owner.process.parent_pid not in pids]
    return Reason.AMBIGUOUS if len(strangers) > 1 else None


def everybody(findings: Sequence[Finding]) -> tuple[Owner, ...]:
    """All owners of several sockets, each process once, oldest first."""
    owners: dict[int, Owner] = {}
    for finding in findings:
        for owner in finding.owners:
            owners.setdefault(owner.process.task_va, owner)
    return tuple(sorted(owners.values(), key=lambda owner: owner.process.key.started_ns))
