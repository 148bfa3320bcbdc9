"""From a packet's tuple to the process, through the guest's own hash tables: a handful of reads.

The exact connection first, then a listener; for UDP a connected socket, then an unconnected one; for what has no socket
of its own, whoever could have sent it. Three tries, then TORN; in doubt nobody, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from appliance.guest.linux.facts import AF_INET, AF_INET6, LISTEN, NEW_SYN_RECV, SOCK_DEAD, TIME_WAIT
from appliance.guest.linux.fast import FastPath
from appliance.guest.linux.holding import Holding, everybody
from appliance.guest.linux.namespaces import REST_NS, REST_TIMES, Namespaces
from appliance.guest.linux.probe import Key, Probe, TornError, key_of
from appliance.guest.linux.record import is_object
from appliance.guest.linux.sockets import Raw, Sockets
from appliance.model import Direction, Evidence, Finding, Flow, Match, Reason, Transport

TRIES = 3
IPPROTO_RAW = 255  # a raw socket that builds its own IP headers may send anything (raw(7))
PROTOCOL_NUMBER = {Transport.TCP: 6, Transport.UDP: 17}  # IANA
MAX_GROUP = 256  # sockets of one SO_REUSEPORT group
MAX_HOLDERS = 64  # raw and packet sockets whose processes are sought for one packet

UDP_LITE: Final = 136
# What the kernel sends unasked. Transports: IGMP; tunnels (IP in IP, GRE, ESP, AH, EtherIP, L2TP, MPLS in IP).
KERNEL_PROTOCOLS: Final = frozenset({2, 4, 41, 47, 50, 51, 97, 115, 137})
KERNEL_ICMP: Final = frozenset({0, 3, 5, 11, 12, 14})  # replies, errors, redirects (net/ipv4/icmp.c)
# Errors, echo reply, MLD, neighbour discovery but for a router's advertisements, which come from a daemon
# (net/ipv6/icmp.c, mcast.c, ndisc.c).
KERNEL_ICMPV6: Final = frozenset({1, 2, 3, 4, 129, 131, 132, 133, 135, 136, 137, 143})
ICMP_NUMBERS: Final = frozenset({1, 58})
PORTED: Final = frozenset({33, 132, UDP_LITE})  # DCCP, SCTP and UDP-Lite belong to processes, never to the kernel


class Lookup:
    """Answers "who owns this tuple?" for one guest."""

    def __init__(
        self,
        namespaces: Namespaces,
        sockets: Sockets,
        probe: Probe,
        holding: Holding,
        fast: FastPath,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._fast = fast
        self._namespaces = namespaces
        self._sockets = sockets
        self._probe = probe
        self._holding = holding
        self._clock_ns = clock_ns
        self._rare: list[Raw] = []  # raw, ping and packet sockets
        self._rested_ns = 0
        self._looks = 0  # of namespaces, before the question at hand

    def find_quickly(self, flow: Flow) -> Finding | None:
        """The exact owner where a few reads can tell, None where they cannot. Needs no deadline."""
        return self._fast.find(flow) if flow.tuple.protocol in PROTOCOL_NUMBER else None

    def find(self, flow: Flow) -> Finding:
        """Who owns this flow's tuple now."""
        self._probe.torn = torn = 0
        self._looks = self._namespaces.looks
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
        raws = self._probe.connections(key)
        if not raws:
            started_here = flow.direction is Direction.OUT and not flow.midstream
            return (None if started_here else self._of_listener(key, None)) or self._nobody(flow, key)
        findings = [self._of_connection(raw, flow, key) for raw in raws]
        if len(findings) == 1:
            return findings[0]
        # The same tuple in several namespaces, and the address does not tell which one it is.
        owned = [finding for finding in findings if finding.owners] or findings
        first = owned[0]
        return replace(first, owners=everybody(owned), reason=Reason.AMBIGUOUS, final=False) if first.owners else first

    def _of_connection(self, raw: Raw, flow: Flow, key: Key) -> Finding:
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
        """One finding from the listeners of a group; None when there are none."""
        if not listeners:
            return None
        finding = self._of_all(listeners, Match.LISTENER)
        if raw is not None and finding.owners:
            return replace(finding, socket=self._sockets.build(raw))
        return finding

    def _of_all(self, group: list[Raw], match: Match) -> Finding:
        """One finding from several sockets, any of which it may be: everybody who holds one of them."""
        findings = [self._holding.of_socket(each, match) for each in group[:MAX_GROUP] if each.sk_socket]
        if not findings:  # all of them are being closed
            return Finding(Match.NONE, socket=self._sockets.build(group[0]), reason=Reason.ORPHAN)
        owners = everybody(findings)
        if len(findings) == 1 and len(group) <= MAX_GROUP:
            return findings[0]
        if not owners:
            return next((finding for finding in findings if finding.match is Match.NONE), findings[0])
        socket = next(finding.socket for finding in findings if finding.owners)
        complete = all(finding.owners for finding in findings) and len(group) <= MAX_GROUP
        programs = {owner.process.path for owner in owners}
        homes = {each.namespace.va for each in group}
        alike = len(programs) == 1 and (len(homes) == 1 or len(owners) == 1)
        evidence = tuple(claim for finding in findings for claim in finding.evidence)
        reason = None if complete and alike else Reason.AMBIGUOUS
        return Finding(match, owners, socket, reason, evidence)

    def _udp(self, flow: Flow, key: Key, lite: bool = False) -> Finding:
        found = self._probe.datagram(key, lite)
        if not found:
            return self._nobody(flow, key)
        return self._of_all(found, Match.EXACT if found[0].common.dport else Match.UNCONNECTED)

    def _other(self, flow: Flow, key: Key) -> Finding:
        """ICMP and other protocols: a process only if it holds a raw or ping socket that can have sent it."""
        number = _protocol_of(flow, key)
        if number == UDP_LITE:
            return self._udp(flow, key, lite=True)
        if self._namespaces.is_foreign(key.address, self._looks):
            return self._of_nobody_here(flow)
        if number in PORTED:
            return self._nobody(flow, key)
        if number in ICMP_NUMBERS and flow.direction is Direction.IN:
            return Finding(Match.KERNEL, final=True)
        holders = self._raw_holders(flow, key)
        better = [finding for finding in holders if finding.socket and finding.socket.protocol is not Transport.PACKET]
        owners = everybody(better)
        if owners:
            reason = Reason.RAW if len(owners) == 1 else Reason.AMBIGUOUS
            return Finding(Match.UNCONNECTED, owners, better[0].socket, reason)
        if _is_kernels(flow, number):
            return Finding(Match.KERNEL)
        return self._nobody(flow, key, holders)

    def _nobody(self, flow: Flow, key: Key, holders: list[Finding] | None = None) -> Finding:
        """No socket of this tuple: why. The reason stays open where only the flow's further life can tell."""
        if self._namespaces.is_foreign(key.address, self._looks):
            return self._of_nobody_here(flow)
        came_in = flow.direction is Direction.IN
        evidence = tuple(
            Evidence(
                f"process {owner.process.pid} holds a {finding.socket.protocol} socket",
                "raw-socket",
                finding.socket.address,
                detail=owner.process.name,
                weight=0 if came_in else 1,  # what came in, nobody need have asked for
            )
            for finding in (self._raw_holders(flow, key) if holders is None else holders)
            if finding.socket is not None
            for owner in finding.owners
        )
        if evidence:
            return Finding(Match.NONE, reason=Reason.RAW, evidence=evidence)
        transports = (Transport.TCP, Transport.UDP)
        closed = came_in and not flow.midstream and flow.tuple.protocol in transports
        certain = closed and not self._probe.torn and self._namespaces.of_address(key.address)
        return Finding(Match.NONE, reason=Reason.CLOSED if certain else None)

    def _of_nobody_here(self, flow: Flow) -> Finding:
        """None of the guest's own addresses: it passes this on for somebody else, or it has forged the address.

        With another MAC address than its own it may be a bridge of the guest's that passes it on; that is told anyway.
        """
        local = flow.tuple.local.ip
        evidence: tuple[Evidence, ...] = ()
        sent = flow.direction is Direction.OUT and not flow.midstream and flow.spoofed_mac is None
        if sent and not self._namespaces.is_relaying(local.version):
            claim = f"the guest sent this from {local}, which nothing in it has, and it forwards for nobody"
            evidence = (Evidence(claim, "spoofed-ip", detail=str(local), weight=1),)
        return Finding(Match.NONE, reason=Reason.FORWARDED, evidence=evidence)

    def _rare_sockets(self) -> list[Raw]:
        """Raw, ping and packet sockets, looked for again after a rest: misses come as often as any user likes."""
        began = self._clock_ns()
        if began >= self._rested_ns:
            self._namespaces.refresh()
            self._rare = self._sockets.walk_rare(self._namespaces.all)
            ended = self._clock_ns()
            self._rested_ns = ended + max(REST_NS, REST_TIMES * (ended - began))
        return self._rare

    def _raw_holders(self, flow: Flow, key: Key) -> list[Finding]:
        """Raw, ping and packet sockets that can send such a packet, with their owners."""
        number = _protocol_of(flow, key)
        icmp = number in ICMP_NUMBERS
        family = AF_INET6 if key.v6 else AF_INET
        spaces = {namespace.va for namespace in self._namespaces.of_address(key.address)}
        findings: list[Finding] = []
        for raw in self._rare_sockets():
            c = raw.common
            if c.net not in spaces or not raw.sk_socket:
                continue
            if raw.transport is Transport.RAW and not (c.num in (number, IPPROTO_RAW) and c.family == family):
                continue
            if raw.transport is Transport.ICMP and not (icmp and c.family == family):
                continue
            try:
                finding = self._holding.of_socket(raw, Match.UNCONNECTED)
            except TornError:
                continue  # closed since it was looked for
            if finding.owners:
                findings.append(finding)
            if len(findings) >= MAX_HOLDERS:
                break
        return findings


def _protocol_of(flow: Flow, key: Key) -> int:
    """The IANA number of a flow's protocol."""
    icmp = flow.tuple.protocol is Transport.ICMP
    return flow.ip_protocol or PROTOCOL_NUMBER.get(flow.tuple.protocol, (58 if key.v6 else 1) if icmp else 0)


def _is_kernels(flow: Flow, number: int) -> bool:
    """Whether the guest's kernel sends such packets of its own accord, and no process need have asked."""
    if number not in ICMP_NUMBERS:
        return number in KERNEL_PROTOCOLS
    if flow.midstream:
        return False  # an answer to the guest: somebody in it has asked
    return flow.icmp_type in (KERNEL_ICMPV6 if number == 58 else KERNEL_ICMP)
