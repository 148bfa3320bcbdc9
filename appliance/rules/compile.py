"""From a validated file to the frozen objects that judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain
from typing import Any

from appliance.model import (
    Ask,
    Binding,
    Decision,
    Direction,
    Endpoint,
    FiveTuple,
    Flow,
    FlowId,
    GuestId,
    GuestProcess,
    Match,
    Missing,
    Owner,
    ProcessKey,
    Reason,
    RuleRef,
    Severity,
    Transport,
)
from appliance.rules import schema as file
from appliance.rules.book import RuleSet
from appliance.rules.conditions import Condition, ContainedIs, DeletedIs, ParentIs, TextIs, UserIs
from appliance.rules.globs import Glob, looks_windows
from appliance.rules.match import Entry, Hold, Peers, Profile, Rank, Section, Subject, Unbound
from appliance.rules.nets import DomainSet, IpSet, PortSet
from appliance.rules.suite import TestCase
from appliance.rules.text import Document, Path

POINTS = {"image": 4, "service": 2, "user": 2, "name": 1}
_REFINING = ("command", "parent", "container", "deleted")  # decide only between equals
_EPHEMERAL = 49152
_HERE = {4: "192.0.2.10", 6: "2001:db8::10"}


def compile_set(rules: file.RuleSet, document: Document, text: str) -> RuleSet:
    """Compile one file. Its list names are known to exist."""
    return _Compiler(rules, document, text).build()


def conditions_of(matching: file.Matching) -> list[tuple[Glob | None, tuple[Condition, ...]]]:
    """The ways to satisfy a match: each image pattern (None: no image is asked for) with all the other conditions."""
    rest: list[Condition] = [
        TextIs(what, tuple(Glob(pattern.removesuffix(".service") if what == "service" else pattern, False)
                           for pattern in patterns))
        for what in ("name", "service", "command")
        if (patterns := getattr(matching, what))
    ]  # fmt: skip
    if matching.user:
        rest.append(UserIs.of(matching.user))
    if matching.parent:
        images = tuple(Glob(p, True) for p in matching.parent if "/" in p or "\\" in p)
        names = tuple(Glob(p, False) for p in matching.parent if not ("/" in p or "\\" in p))
        rest.append(ParentIs(images, names))
    if matching.container:
        rest.extend(_container(matching.container))
    if matching.deleted is not None:
        rest.append(DeletedIs(matching.deleted))
    if not matching.image:
        return [(None, tuple(rest))]
    return [(Glob(pattern, True), tuple(rest)) for pattern in dict.fromkeys(matching.image)]


def _container(wanted: Sequence[bool | str]) -> list[Condition]:
    """Several kinds are alternatives: any container swallows its names, and any with none is no condition."""
    if True in wanted and False in wanted:
        return []
    if True in wanted or False in wanted:
        return [ContainedIs(True in wanted)]
    return [TextIs("container", tuple(Glob(str(name), False) for name in wanted))]


def rank_of(matching: file.Matching, image: Glob | None, priority: int) -> Rank:
    """How specific a profile is: points, then priority, then how much of its image is fixed, then other conditions."""
    points = sum(POINTS[key] for key in matching.model_fields_set if key in POINTS)
    refined = sum(key in matching.model_fields_set for key in _REFINING)
    return points, priority, image.fixed if image else 0, refined


class _Compiler:
    def __init__(self, rules: file.RuleSet, document: Document, text: str) -> None:
        self.rules, self.spec, self.document = rules, rules.spec, document
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.version = f"{rules.metadata.version}+{self.digest[:12]}"

    def build(self) -> RuleSet:
        spec = self.spec
        return RuleSet(
            name=self.rules.metadata.name,
            file=self.document.file,
            version=self.version,
            digest=self.digest,
            ref=self._ref(("spec",), "none"),
            os=spec.applies_to.os,
            tags=frozenset(spec.applies_to.tags),
            profiles=tuple(
                chain.from_iterable(self._profile(p, ("spec", "processes", i)) for i, p in enumerate(spec.processes))
            ),
            otherwise=self._section(spec.otherwise, "otherwise", ("spec", "otherwise")) if spec.otherwise else None,
            kernel=self._section(spec.kernel, "kernel", ("spec", "kernel")) if spec.kernel else None,
            unbound=self._unbound(spec.unbound) if spec.unbound else None,
            cases=tuple(self._case(case, ("tests", i)) for i, case in enumerate(self.rules.tests)),
            enforce=spec.mode == "enforce",
            draft=self.rules.metadata.status == "draft",
        )

    def _ref(self, path: Path, name: str) -> RuleRef:
        return RuleRef(self.document.file, self.document.line(path), name, self.rules.metadata.name, self.version)

    def _profile(self, profile: file.Profile, path: Path) -> list[Profile]:
        section = self._section(profile, profile.name, path)
        until = _end_of(profile.expires)
        return [
            Profile(
                section,
                image,
                conditions,
                rank_of(profile.match, image, profile.priority),
                until,
            )
            for image, conditions in conditions_of(profile.match)
        ]

    def _section(self, section: file.Section, name: str, path: Path) -> Section:
        return Section(
            name,
            self._ref((*path, "default"), name),
            Decision(section.default),
            tuple(self._entry(e, name, (*path, "allow", i)) for i, e in enumerate(section.allow)),
            tuple(self._entry(e, name, (*path, "deny", i)) for i, e in enumerate(section.deny)),
            Severity(section.severity or self.spec.severity),
            tuple(dict.fromkeys((*self.spec.tags, *section.tags))),
            tuple(section.on_deny if section.on_deny is not None else self.spec.on_deny),
            (section.mode or self.spec.mode) == "enforce",
            self._hold(section),
        )

    def _unbound(self, unbound: file.Unbound) -> Unbound:
        deny = frozenset(map(Reason, unbound.deny))
        return Unbound(
            self._ref(("spec", "unbound"), "unbound"),
            Decision(unbound.action),
            unbound.alert,
            frozenset(map(Reason, unbound.quiet)) - deny,
            deny,
            Severity(unbound.severity) if unbound.severity else None,
            tuple(dict.fromkeys((*self.spec.tags, *unbound.tags))),
            tuple(unbound.on_deny if unbound.on_deny is not None else self.spec.on_deny),
            (unbound.mode or self.spec.mode) == "enforce",
            self._hold(unbound),
        )

    def _hold(self, block: file.Verdicts) -> Hold:
        """What a block says of holding; what it leaves out, the spec says."""
        said: dict[str, Any] = {}
        for hold in (self.spec.hold, block.hold):
            if hold is not None:
                said.update({key: getattr(hold, key) for key in hold.model_fields_set})
        plain = Hold()
        default = Decision(said.get("default", plain.default))
        return Hold(
            said.get("deadline", plain.deadline_s),
            default,
            said.get("incoming", plain.incoming),
            Ask(said.get("ask", plain.ask.seconds), default),
        )

    def _entry(self, entry: file.Entry, name: str, path: Path) -> Entry:
        inbound = None if entry.direction is None else entry.direction == "in"
        if entry.to is not None or entry.from_ is not None:
            inbound = entry.from_ is not None
        return Entry(
            self._ref(path, name),
            inbound,
            frozenset(map(Transport, entry.protocol)) if entry.protocol else None,
            PortSet.of(entry.ports) if entry.ports else None,
            PortSet.of(entry.local_ports) if entry.local_ports else None,
            PortSet.of(entry.remote_ports) if entry.remote_ports else None,
            self._peers(entry.to or entry.from_),
            Severity(entry.severity) if entry.severity else None,
            tuple(entry.tags),
            _end_of(entry.expires),
        )

    def _peers(self, peers: file.Peers | file.Excluded | None) -> Peers | None:
        if peers is None:
            return None
        members = [member for name in peers.lists or () for member in self.spec.lists[name]]
        networks = [*(peers.ips or ()), *(member for member in members if not isinstance(member, str))]
        domains = [*(peers.domains or ()), *(member for member in members if isinstance(member, str))]
        excluded = self._peers(peers.excluded) if isinstance(peers, file.Peers) else None
        if peers.ips is None and peers.domains is None and peers.lists is None:
            return Peers(excluded=excluded)
        return Peers(IpSet.of(networks), DomainSet.of(domains), excluded)

    # -- tests --

    def _case(self, case: file.Case, path: Path) -> TestCase:
        return TestCase(
            case.name,
            self.document.file,
            self.document.line(path),
            self.rules.metadata.name,
            self._subject(case.given),
            Decision(case.expect.action),
            case.expect.rule,
            Severity(case.expect.severity) if case.expect.severity else None,
            case.expect.alert,
        )

    def _subject(self, given: file.Given) -> Subject:
        os = given.os or self.spec.applies_to.os or ""
        owners: tuple[Owner, ...] = ()
        match = Match.KERNEL if given.kernel else Match.NONE
        parent = None
        if given.process is not None:
            owners, match = (Owner(_process(given.process, os == "windows"), (3,)),), Match.EXACT
            parent = _parent(given.process.parent)
        return Subject(
            _flow(given.connection),
            Binding(match, Reason(given.unbound) if given.unbound else None, owners, 0),
            tuple(given.connection.names),
            os,
            parent,
            tuple(given.tags if given.tags is not None else self.spec.applies_to.tags),
        )


def _end_of(day: date | None) -> int | None:
    """The first nanosecond after that day, in UTC."""
    if day is None:
        return None
    midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return (int(midnight.timestamp()) + int(timedelta(days=1).total_seconds())) * 1_000_000_000


def _flow(connection: file.GivenConnection) -> Flow:
    inbound = connection.direction == "in"
    port = connection.port[0] if connection.port else 0
    ports = connection.protocol in ("tcp", "udp")
    near = connection.local_port[0] if connection.local_port else port if inbound else _EPHEMERAL
    far = connection.remote_port[0] if connection.remote_port else _EPHEMERAL if inbound else port
    remote = ip_address(connection.remote)
    local: IPv4Address | IPv6Address = ip_address(_HERE[remote.version])
    five = FiveTuple(
        Transport(connection.protocol), Endpoint(local, near if ports else 0), Endpoint(remote, far if ports else 0)
    )
    at_ns = (_end_of(connection.on) or 1) - 1
    return Flow(FlowId(GuestId("test"), 1), five, Direction.IN if inbound else Direction.OUT, at_ns)


def _process(given: file.GivenProcess, windows: bool) -> GuestProcess:
    path = given.image
    windows = windows or (path is not None and looks_windows(path))
    name = given.name or (path or "unknown").replace("\\", "/").rpartition("/")[2]
    command = given.command
    if command is None and given.service and windows:
        command = f"{path or name} -k netsvcs -p -s {given.service}"
    return GuestProcess(
        ProcessKey(4321, 1),
        name if windows else name[:15],
        path if path is not None else Missing.NOT_APPLICABLE,
        command if command is not None else path or "",
        1 if given.parent is None else 1000,
        given.user if isinstance(given.user, int) else 0 if given.user == "root" else 65534,
        given.user if isinstance(given.user, str) else "root" if given.user == 0 else "nobody",
        given.deleted,
        container=given.container,
        cgroup=f"/system.slice/{given.service.removesuffix('.service')}.service" if given.service else "/",
    )


def _parent(given: str | None) -> GuestProcess | None:
    if given is None:
        return GuestProcess(ProcessKey(1, 1), "init", Missing.NOT_APPLICABLE, "", 0, 0, "root")
    is_path = "/" in given or "\\" in given
    name = given.replace("\\", "/").rpartition("/")[2]
    return GuestProcess(ProcessKey(1000, 1), name, given if is_path else Missing.NOT_APPLICABLE, given, 1, 0, "root")
