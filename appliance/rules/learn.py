"""Learns from recorded verdicts what single-purpose programs do on the network, for a person to review (P11).

A program is an executable (on Windows a svchost with its service). Its behaviour is a handful of kinds of access:
direction, transport and the service's port, each with the peers that were seen. A program with few kinds, seen often
enough, whose kinds stopped being news long ago, is a candidate for default deny; every other one is told with the
reason why not. What was flagged when it was seen is never learnt from: it would teach the parasite's ways.
Pure: values in, values out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

from appliance.model import IpAddress

MAX_PROGRAMS = 4096
MAX_KINDS_KEPT = 256  # of one program; one with more is not single-purpose by any measure
MAX_PEERS = 4096  # of one kind of access
LISTED = 8  # peers or names that a person still reads one by one
FEW_PORTS = 2  # more dynamic ports than this become one range
DYNAMIC = 32768  # net.ipv4.ip_local_port_range of Linux; RFC 6335 and Windows begin at 49152
IANA_DYNAMIC = 49152
NAMED_SHARE = 0.95  # of the connections that must have had a DNS name before names are what is allowed
SETTLED = 2  # the last new kind must have come before 1/SETTLED of all connections
PRIVATE = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "fc00::/7",
        "fe80::/10",
    )
)  # RFC 1918, 6598, 3927, 4193, 4291
# Programs whose behaviour is that of the script, the page or the component they were given.
_INTERPRETERS = re.compile(
    r"(python|perl|ruby|node|nodejs|java|javaw|php|lua|guile|tclsh|bash|sh|dash|zsh|busybox|powershell|pwsh|cmd|wscript"
    r"|cscript|mshta|rundll32|regsvr32|dllhost|msiexec|conhost|curl|wget)[\w.\-]*?(\.exe)?",
    re.IGNORECASE,
)
_WILDCARDS = re.compile(r"[*?]")


class Program(NamedTuple):
    """What behaviour is learnt of."""

    image: str
    service: str | None = None  # Windows: of a svchost


class Kind(NamedTuple):
    """One kind of access. ``ports`` of the service: the remote one of outgoing, the local one of incoming flows."""

    direction: str
    protocol: str
    ports: tuple[int, int] | None  # first and last; None: a protocol without


@dataclass(slots=True)
class Seen:
    """What was seen of one kind of access."""

    connections: int = 0
    guests: set[str] = field(default_factory=set)
    peers: Counter[IpAddress] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    named: int = 0  # connections whose peer had a name
    first: int = 0  # which of the program's connections was the first of this kind

    def add(self, other: Seen) -> None:
        """Take in another kind's counts."""
        self.first = min(self.first, other.first) if self.connections else other.first
        self.connections += other.connections
        self.named += other.named
        self.guests |= other.guests
        self.peers.update(other.peers)
        self.names.update(other.names)


@dataclass(slots=True)
class Behaviour:
    """All that was seen of one program."""

    program: Program
    connections: int = 0
    guests: set[str] = field(default_factory=set)
    processes: set[tuple[str, int, str | None]] = field(default_factory=set)
    kinds: dict[Kind, Seen] = field(default_factory=dict)
    first: str = ""  # ISO 8601
    last: str = ""
    flagged: int = 0  # connections that were denied or alerted, and not learnt from
    too_many: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a person asks of a suggestion."""

    connections: int = 20
    kinds: int = 4


@dataclass(frozen=True, slots=True)
class Learnt:
    """What the record says: candidates, the others with the reason, and what was not used."""

    suggested: tuple[Behaviour, ...]
    others: tuple[tuple[Behaviour, str], ...]
    used: int
    unused: Mapping[str, int]


def learn(bodies: Iterable[Mapping[str, Any]], limits: Limits = Limits()) -> Learnt:
    """Learn from verdicts (the JSON objects of ``watch``), oldest first; one told twice counts once."""
    found: dict[Program, Behaviour] = {}
    unused: Counter[str] = Counter()
    used = 0
    latest = {str(body.get("id", number)): body for number, body in enumerate(bodies)}
    for body in latest.values():
        try:
            why = _take(body, found)
        except (KeyError, TypeError, ValueError):
            why = "not a verdict"
        if why:
            unused[why] += 1
        else:
            used += 1
    for behaviour in found.values():
        behaviour.kinds = merge_dynamic(behaviour.kinds)
    judged = [(one, _why_not(one, limits)) for one in sorted(found.values(), key=lambda one: one.program)]
    return Learnt(
        tuple(one for one, why in judged if why is None),
        tuple((one, why) for one, why in judged if why is not None),
        used,
        dict(sorted(unused.items())),
    )


def _take(body: Mapping[str, Any], found: dict[Program, Behaviour]) -> str | None:
    """Count one verdict; the reason why it teaches nothing, or None."""
    flow, process = body["flow"], body["process"]
    if process is None:
        return "no process"
    if process["path"] is None:
        return "no image"
    if body["binding"]["match"] not in ("exact", "unconnected") or body["binding"]["reason"] == "ambiguous":
        return "owner in doubt"
    program = Program(process["path"], _service_of(process))
    behaviour = found.get(program)
    if behaviour is None:
        if len(found) >= MAX_PROGRAMS:
            return "too many programs"
        behaviour = found[program] = Behaviour(program)
    if body["verdict"] == "deny" or body["alert"] or any(item["weight"] >= 2 for item in body["evidence"]):
        behaviour.flagged += 1
        return "flagged"
    if flow["midstream"]:
        return "beginning not seen"
    behaviour.connections += 1
    guest = body.get("vm_uuid") or body["vm"]  # a pid or a domain's number will be another guest's some day
    behaviour.guests.add(guest)
    behaviour.processes.add((guest, int(process["pid"]), process["started"]))
    behaviour.first, behaviour.last = behaviour.first or flow["started"], flow["started"]
    kind = _kind_of(flow)
    if kind not in behaviour.kinds and len(behaviour.kinds) >= MAX_KINDS_KEPT:
        behaviour.too_many = True
        return None
    seen = behaviour.kinds.setdefault(kind, Seen(first=behaviour.connections))
    seen.connections += 1
    seen.guests.add(guest)
    peer = ip_address(flow["remote"]["ip"])
    if peer in seen.peers or len(seen.peers) < MAX_PEERS:
        seen.peers[peer] += 1
    if flow["names"]:
        seen.named += 1
        name = str(flow["names"][-1]).lower().rstrip(".")
        if name in seen.names or len(seen.names) < MAX_PEERS:
            seen.names[name] += 1
    return None


def _service_of(process: Mapping[str, Any]) -> str | None:
    services: list[str] = list(process.get("services") or [])
    return str(services[0]) if len(services) == 1 else None


def _kind_of(flow: Mapping[str, Any]) -> Kind:
    direction, protocol = str(flow["direction"]), str(flow["protocol"])
    port = int(flow["local" if direction == "in" else "remote"]["port"])
    return Kind(direction, protocol, (port, port) if protocol in ("tcp", "udp") else None)


def merge_dynamic(kinds: Mapping[Kind, Seen]) -> dict[Kind, Seen]:
    """Many dynamic ports of one direction and protocol are one kind of access: RPC, passive FTP, WebRTC."""
    merged = dict(kinds)
    groups: dict[tuple[str, str], dict[Kind, int]] = defaultdict(dict)
    for kind in kinds:
        if kind.ports is not None and kind.ports[0] >= DYNAMIC:
            groups[kind.direction, kind.protocol][kind] = kind.ports[0]
    for (direction, protocol), members in groups.items():
        if len(members) <= FEW_PORTS:
            continue
        lowest = min(members.values())
        whole = Seen()
        for kind in members:
            whole.add(merged.pop(kind))
        merged[Kind(direction, protocol, (IANA_DYNAMIC if lowest >= IANA_DYNAMIC else DYNAMIC, 65535))] = whole
    return merged


def _why_not(one: Behaviour, limits: Limits) -> str | None:
    """Why a program's behaviour makes no default-deny profile, or None."""
    name = base_name(one.program.image)
    if _INTERPRETERS.fullmatch(name):
        return "it does what its script or component says; match it by command in a rule of your own"
    if name.lower() == "svchost.exe" and one.program.service is None:
        return "its services are not known"
    if _WILDCARDS.search(one.program.image) or not one.program.image.isprintable():
        return "its path has characters that a rule cannot take literally"
    if one.connections < limits.connections:
        return f"only {one.connections} connections; {limits.connections} are asked for"
    if one.too_many or len(one.kinds) > limits.kinds:
        return f"{len(one.kinds)} kinds of access; a single-purpose program has at most {limits.kinds}"
    news = max(seen.first for seen in one.kinds.values())
    if news * SETTLED > one.connections:
        return f"not settled: a new kind of access came with connection {news} of {one.connections}"
    return None


def base_name(image: str) -> str:
    """The last part of a path of either system."""
    return re.split(r"[/\\]", image)[-1]


class Allowed(NamedTuple):
    """Who the far end may be: addresses, or names, or (both empty) anybody."""

    ips: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()


def allowed_peers(kind: Kind, seen: Seen) -> Allowed:
    """The narrowest description of the peers that a person can still read."""
    outgoing = kind.direction == "out"
    if outgoing and seen.connections and seen.named >= NAMED_SHARE * seen.connections:
        names = _generalised(seen.names)
        if len(names) <= LISTED:
            return Allowed(domains=names)
    if outgoing and len(seen.peers) <= LISTED and seen.connections >= 3 * len(seen.peers):
        return Allowed(ips=tuple(str(ip) for ip in sorted(seen.peers, key=lambda ip: (ip.version, int(ip)))))
    blocks = {next((net for net in PRIVATE if net.version == ip.version and ip in net), None) for ip in seen.peers}
    if None not in blocks:
        return Allowed(ips=tuple(str(net) for net in PRIVATE if net in blocks))
    return Allowed()


def _generalised(names: Iterable[str]) -> tuple[str, ...]:
    """Names, those with a common parent as ``*.parent`` where there are three or more of them."""
    parents: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        parents[name.partition(".")[2]].append(name)
    found: list[str] = []
    for parent, children in parents.items():
        # co.uk and its like: a parent of two short labels belongs to everybody.
        shared = parent.count(".") == 0 or re.fullmatch(r"[a-z]{2,3}\.[a-z]{2}", parent) is not None
        found += children if len(children) < 3 or shared else [f"*.{parent}"]
    return tuple(sorted(found))
