"""The guest's own `ss -tuanp` and a Snapshot as comparable rows."""

from typing import NamedTuple

from appliance.model import GuestSocket, Snapshot, Transport, ip_text
from lab.truth import Socket, Truth

STATES = {
    "ESTAB": "ESTABLISHED",
    "SYN-SENT": "SYN_SENT",
    "SYN-RECV": "SYN_RECV",
    "FIN-WAIT-1": "FIN_WAIT1",
    "FIN-WAIT-2": "FIN_WAIT2",
    "TIME-WAIT": "TIME_WAIT",
    "UNCONN": "CLOSE",
    "CLOSE-WAIT": "CLOSE_WAIT",
    "LAST-ACK": "LAST_ACK",
    "LISTEN": "LISTEN",
    "CLOSING": "CLOSING",
}


class Row(NamedTuple):
    netns: int
    protocol: str
    state: str
    local: str
    lport: int
    remote: str | None
    rport: int | None
    owners: tuple[tuple[int, int], ...]  # (pid, fd)


def of_truth(truth: Truth) -> set[Row]:
    return {_of_ss(socket) for socket in truth.sockets}


def of_snapshot(snapshot: Snapshot) -> set[Row]:
    return {_of_guest(socket) for socket in snapshot.sockets if socket.protocol in (Transport.TCP, Transport.UDP)}


def _of_ss(s: Socket) -> Row:
    owners = tuple(sorted((owner.pid, owner.fd) for owner in s.owners))
    return Row(s.netns, s.protocol, STATES.get(s.state, s.state), s.local, s.lport, s.remote, s.rport, owners)


def _of_guest(s: GuestSocket) -> Row:
    owners = tuple(sorted((owner.process.pid, fd) for owner in s.owners for fd in owner.fds))
    remote, rport = (None, None) if s.remote is None else (ip_text(s.remote.ip), s.remote.port)
    return Row(s.netns, str(s.protocol), s.state, ip_text(s.local.ip), s.local.port, remote, rport, owners)


def differences(before: set[Row], seen: set[Row], after: set[Row]) -> list[str]:
    """What contradicts the guest: a row it had all along and we lack, or one we have and it never had."""
    missing = [f"missing {row}" for row in sorted((before & after) - seen, key=str)]
    return missing + [f"invented {row}" for row in sorted(seen - (before | after), key=str)]
