"""From a packet's tuple to the process, through the guest's own hash tables: a handful of reads.

The exact connection first, then a listener; for UDP a connected socket, then an unconnected one; for what has no socket
of its own, whoever could have sent it. Three tries, then TORN; in doubt nobody, with the reason.
"""

from __future__ import annotations

from dataclasses import replace

from appliance.guest.linux.facts import AF_INET, AF_INET6, LISTEN, NEW_SYN_RECV, SOCK_DEAD, TIME_WAIT
from appliance.guest.linux.fast import FastPath
from appliance.guest.linux.holding import Holding, TornError, ambiguous, everybody
from appliance.guest.linux.namespaces import Namespaces
from appliance.guest.linux.probe import Key, Probe, key_of
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Raw, Sockets
from appliance.model import Direction, Evidence, Finding, Flow, Match, Reason, Transport

TRIES = 3
IPPROTO_RAW = 255  # a raw socket that builds its own IP headers may send anything (raw(7))
PROTOCOL_NUMBER = {Transport.TCP: 6, Transport.UDP: 17}  # IANA


class Lookup:
    """Answers "who owns this tuple?" for one guest."""

    def __init__(
        self, namespaces: Namespaces, sockets: Sockets, probe: Probe, holding: Holding, fast: FastPath
    ) -> None:
        self._fast = fast
        self._namespaces = namespaces
        self._sockets = sockets
        self._probe = probe
        self._holding = holding

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now."""
        if flow.tuple.protocol in PROTOCOL_NUMBER:
            quick = self._fast.find(flow)
            if quick is not None:
                return quick
        self._probe.torn = torn = 0
        key = key_of(flow)
        hidden = 0
        for _ in range(TRIES):
            try:
                finding = self._find(flow, key)
            except TornError:
                torn += 1
                continue
            if finding.reason is Reason.HIDDEN and hidden < TRIES - 1:
                hidden += 1  # a descriptor is gone a moment before its socket is: only what stays so is hidden
                continue
            torn += self._probe.torn
            return replace(finding, torn=torn) if torn else finding
        return Finding(Match.NONE, reason=Reason.TORN, torn=torn + self._probe.torn)

    def _find(self, flow: Flow, key: Key) -> Finding:
        match flow.tuple.protocol:
            case Transport.TCP:
                return self._tcp(flow, key)
            case Transport.UDP:
                return self._udp(flow, key)
            case _:
                return self._other(flow, key)

    def _tcp(self, flow: Flow, key: Key) -> Finding:
        raw = self._probe.connection(key)
        if raw is None:
            started_here = flow.direction is Direction.OUT and not flow.midstream
            return (None if started_here else self._of_listener(key, None)) or self._nobody(flow, key)
        if raw.common.state == NEW_SYN_RECV:
            finding = self._of_request(raw, key)
        elif raw.common.state != TIME_WAIT and raw.sk_socket:
            return self._holding.of_socket(raw, Match.EXACT, quick=False)  # the fast path has just tried
        else:
            # nobody holds it: not yet accepted, already closed, or over; what came in came to the listener
            waiting = raw.common.state != TIME_WAIT and not raw.common.flags >> SOCK_DEAD & 1
            finding = self._of_listener(key, raw) if waiting or flow.direction is Direction.IN else None
        if finding is not None:
            return finding
        reason = Reason.TIME_WAIT if raw.common.state == TIME_WAIT else Reason.ORPHAN
        return Finding(Match.NONE, socket=self._sockets.build(raw), reason=reason, final=True)

    def _of_request(self, raw: Raw, key: Key) -> Finding | None:
        """A handshake under way: ``skc_listener`` is the listening socket."""
        listener = self._probe.read(raw.common.flags, raw.namespace) if is_object(raw.common.flags) else None
        if listener is None or listener.common.state != LISTEN or listener.common.num != key.lport:
            return self._of_listener(key, raw)
        return self._of_group([listener], raw)

    def _of_listener(self, key: Key, raw: Raw | None) -> Finding | None:
        """The listening socket (or SO_REUSEPORT group) that this incoming connection goes to."""
        spaces = self._namespaces.of_address(key.address) if raw is None else [raw.namespace]
        return self._of_group(self._probe.listeners(key, spaces), raw)

    def _of_group(self, listeners: list[Raw], raw: Raw | None) -> Finding | None:
        """One finding from the listeners of a group; None when none of them has an owner."""
        findings = [self._holding.of_socket(each, Match.LISTENER) for each in listeners if each.sk_socket]
        kernel = next((finding for finding in findings if finding.match is Match.KERNEL), None)
        owners = everybody(findings)
        if kernel is not None or not owners:
            return kernel
        socket = self._sockets.build(raw) if raw is not None else self._sockets.build(listeners[0], owners)
        return Finding(Match.LISTENER, owners, socket, ambiguous(owners))

    def _udp(self, flow: Flow, key: Key) -> Finding:
        found = self._probe.datagram(key)
        if not found:
            return self._nobody(flow, key)
        if not found[0].sk_socket:
            return Finding(Match.NONE, socket=self._sockets.build(found[0]), reason=Reason.ORPHAN, final=True)
        match = Match.EXACT if found[0].common.dport else Match.UNCONNECTED
        findings = [self._holding.of_socket(each, match) for each in found if each.sk_socket]
        owners = everybody(findings)
        if len(findings) == 1 or not owners:
            return findings[0]
        return replace(findings[0], owners=owners, reason=ambiguous(owners))

    def _other(self, flow: Flow, key: Key) -> Finding:
        """ICMP and other protocols: a process only if it holds a raw or ping socket that can have sent it."""
        holders = self._raw_holders(flow, key) if flow.direction is Direction.OUT else []
        owners = everybody(holders)
        if owners:
            reason = Reason.RAW if len(owners) == 1 else Reason.AMBIGUOUS
            return Finding(Match.UNCONNECTED, owners, holders[0].socket, reason)
        if not self._namespaces.has(flow.tuple.local.ip):
            return Finding(Match.NONE, reason=Reason.FORWARDED)
        return Finding(Match.KERNEL, final=flow.direction is Direction.IN)

    def _nobody(self, flow: Flow, key: Key) -> Finding:
        """No socket of this tuple: why."""
        if not self._namespaces.has(flow.tuple.local.ip):
            return Finding(Match.NONE, reason=Reason.FORWARDED)
        if flow.direction is Direction.IN and not flow.midstream:
            return Finding(Match.NONE, reason=Reason.CLOSED)
        evidence = tuple(
            Evidence(
                f"process {owner.process.pid} holds a {finding.socket.protocol} socket",
                "raw-socket",
                finding.socket.address,
                detail=owner.process.name,
                weight=1,
            )
            for finding in self._raw_holders(flow, key)
            if finding.socket is not None
            for owner in finding.owners
        )
        return Finding(Match.NONE, reason=Reason.RAW if evidence else Reason.LATE, evidence=evidence)

    def _raw_holders(self, flow: Flow, key: Key) -> list[Finding]:
        """Raw, ping and packet sockets that can send such a packet, with their owners."""
        icmp = flow.tuple.protocol is Transport.ICMP
        number = flow.ip_protocol or PROTOCOL_NUMBER.get(flow.tuple.protocol, (58 if key.v6 else 1) if icmp else 0)
        family = AF_INET6 if key.v6 else AF_INET
        spaces = {namespace.va for namespace in self._namespaces.of_address(key.address)}
        findings = []
        for raw in self._sockets.walk_rare(self._namespaces.all):
            c = raw.common
            if c.net not in spaces or not raw.sk_socket:
                continue
            if raw.transport is Transport.RAW and not (c.num in (number, IPPROTO_RAW) and c.family == family):
                continue
            if raw.transport is Transport.ICMP and not (icmp and c.family == family):
                continue
            if raw.transport is Transport.PACKET and icmp:
                continue  # many a daemon holds one; what pings has a better one
            finding = self._holding.of_socket(raw, Match.UNCONNECTED)
            if finding.owners:
                findings.append(finding)
        return findings
