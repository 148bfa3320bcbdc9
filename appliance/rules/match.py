"""The judge: one flow and its process against compiled profiles. Pure: no I/O, no clock, no randomness.

The most specific matching profile decides; inside it deny beats allow beats default (P12-P14). Without a profile the
``otherwise`` section decides, without a process the ``unbound`` policy. What the guest did not let us know never
turns into silence: an allow that a stricter profile might have denied is an alert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from appliance.model import (
    Ask,
    Binding,
    Decision,
    Direction,
    Endpoint,
    Flow,
    GuestProcess,
    Judgement,
    Match,
    Owner,
    Reason,
    RuleRef,
    Severity,
    Transport,
    ip_text,
)
from appliance.rules.conditions import Actor, Condition, all_hold, image_of
from appliance.rules.globs import Glob, looks_windows
from appliance.rules.nets import DomainSet, IpSet, PortSet, unmapped

SEVERITIES = tuple(Severity)
_LOUDNESS = {severity: i for i, severity in enumerate(SEVERITIES)}
_WITH_PORTS = (Transport.TCP, Transport.UDP)
Rank = tuple[int, int, int, int]  # points, priority, length of the fixed part of the image, other conditions
_KEPT_PATHS = 1024  # image paths whose profiles are remembered
_KEPT_LENGTH = 256
_NOBODY_SAID = Ask()
_SHOWN = 120  # characters of guest text in a sentence


@dataclass(frozen=True, slots=True)
class Subject:
    """What is judged: a flow, the process that it was bound to, and what is known around them."""

    flow: Flow
    binding: Binding
    names: tuple[str, ...] = ()  # DNS names of the remote address, as this guest saw them
    os: str = ""  # "linux", "windows" or "" (not known)
    parent: GuestProcess | None = None  # of ``binding.process``
    tags: tuple[str, ...] = ()  # of the guest


class Talk:
    """One flow, taken apart once for all entries."""

    __slots__ = ("at_ns", "flow", "inbound", "local_port", "names", "protocol", "remote", "remote_port", "with_ports")

    def __init__(self, flow: Flow, names: tuple[str, ...]) -> None:
        self.flow = flow
        self.names = names
        self.protocol = flow.tuple.protocol
        self.with_ports = self.protocol in _WITH_PORTS
        self.inbound = flow.direction is Direction.IN
        self.remote = unmapped(flow.tuple.remote.ip)
        self.remote_port = flow.tuple.remote.port
        self.local_port = flow.tuple.local.port
        self.at_ns = flow.started_ns

    def __str__(self) -> str:
        remote = ip_text(self.remote)
        if self.with_ports and self.inbound:
            text = f"{self.protocol} in to port {self.local_port} from {remote}"
        elif self.with_ports:
            text = f"{self.protocol} out to {Endpoint(self.remote, self.remote_port)}"
        else:
            text = f"{self.protocol} {'in from' if self.inbound else 'out to'} {remote}"
        if self.names:
            text += f" ({shown(self.names[0])})"
        return text + " (seen midstream, so its direction is a guess)" if self.flow.midstream else text


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the far end may be: an address or a DNS name of it, except some."""

    ips: IpSet | None = None
    domains: DomainSet | None = None
    excluded: Peers | None = None

    def has(self, talk: Talk) -> bool:
        """Whether the flow's far end belongs to it."""
        if self.ips is None and self.domains is None:
            inside = True
        else:
            inside = (self.ips is not None and self.ips.has(talk.remote)) or (
                self.domains is not None and self.domains.find(talk.names) is not None
            )
        return inside and (self.excluded is None or not self.excluded.has(talk))


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of ``allow`` or ``deny``. A condition that is None holds for every flow."""

    ref: RuleRef
    inbound: bool | None = None
    protocols: frozenset[Transport] | None = None
    ports: PortSet | None = None  # the service's port: local for in, remote for out
    local_ports: PortSet | None = None
    remote_ports: PortSet | None = None
    peers: Peers | None = None
    severity: Severity | None = None
    tags: tuple[str, ...] = ()
    until_ns: int | None = None  # from this instant on it does not count any more

    def covers(self, talk: Talk) -> bool:
        """Whether this entry speaks about this flow."""
        if self.inbound is not None and self.inbound is not talk.inbound:
            return False
        if self.protocols is not None and talk.protocol not in self.protocols:
            return False
        if self.ports is not None and not (
            talk.with_ports and self.ports.has(talk.local_port if talk.inbound else talk.remote_port)
        ):
            return False
        if self.local_ports is not None and not (talk.with_ports and self.local_ports.has(talk.local_port)):
            return False
        if self.remote_ports is not None and not (talk.with_ports and self.remote_ports.has(talk.remote_port)):
            return False
        if self.until_ns is not None and talk.at_ns >= self.until_ns:
            return False
        return self.peers is None or self.peers.has(talk)


@dataclass(frozen=True, slots=True)
class Hold:
    """How new flows wait for their verdict where it is enforced, and how long a person may think."""

    deadline_s: float = 1.0
    default: Decision = Decision.ALLOW
    incoming: bool = True
    ask: Ask = _NOBODY_SAID


@dataclass(frozen=True, slots=True)
class Section:
    """A default and its exceptions: a profile's body, ``otherwise``, or ``kernel``."""

    name: str
    ref: RuleRef  # of the default
    default: Decision
    allow: tuple[Entry, ...] = ()
    deny: tuple[Entry, ...] = ()
    severity: Severity = Severity.MEDIUM
    tags: tuple[str, ...] = ()
    actions: tuple[str, ...] = ("alert",)
    enforce: bool = False
    hold: Hold = Hold()

    def can_deny(self, *, inbound: bool) -> bool:
        """Whether it may deny any flow of this direction at all."""
        return self.default is Decision.DENY or any(entry.inbound in (None, inbound) for entry in self.deny)

    def judge(self, talk: Talk, whom: str = "") -> Judgement:
        """Deny beats allow beats default; the order of entries means nothing. ``whom`` begins the sentence."""
        denied = [entry for entry in self.deny if entry.covers(talk)]
        if denied:
            entry = max(denied, key=lambda e: (_LOUDNESS[e.severity or self.severity], -e.ref.line))
            because = f"{whom}{self.name}: {talk} matches a deny entry"
            return self._deny(entry.ref, because, entry.severity or self.severity, entry.tags)
        allowed = next((entry for entry in self.allow if entry.covers(talk)), None)
        if allowed is not None:
            return Judgement(Decision.ALLOW, allowed.ref, because=f"{whom}{self.name}: {talk} matches an allow entry")
        if self.default is Decision.ALLOW:
            return Judgement(
                Decision.ALLOW, self.ref, because=f"{whom}{self.name} (default allow): {talk} matches no deny entry"
            )
        because = f"{whom}{self.name} (default deny): {talk} matches no allow entry"
        if not talk.names and any(entry.peers and entry.peers.domains for entry in self.allow):
            because += "; no DNS answer for this address was seen"
        return self._deny(self.ref, because, self.severity, ())

    def _deny(self, ref: RuleRef, because: str, severity: Severity, tags: tuple[str, ...]) -> Judgement:
        return Judgement(
            Decision.DENY,
            ref,
            alert=True,
            severity=severity,
            tags=tuple(dict.fromkeys(self.tags + tags)),
            actions=self.actions,
            because=because,
            enforce=self.enforce,
            ask=self.hold.ask,
        )


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to recognise a process, and the section that judges it."""

    section: Section
    image: Glob | None
    conditions: tuple[Condition, ...]  # what else must hold
    rank: Rank
    until_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Unbound:
    """What to do with a flow that has no process, by the reason why."""

    ref: RuleRef
    action: Decision = Decision.ALLOW
    alert: bool = True
    quiet: frozenset[Reason] = frozenset()
    deny: frozenset[Reason] = frozenset()
    severity: Severity | None = None
    tags: tuple[str, ...] = ()
    actions: tuple[str, ...] = ("alert",)
    enforce: bool = False
    hold: Hold = Hold()

    def can_deny(self, *, inbound: bool) -> bool:
        """Whether it may deny any flow of this direction at all: nobody but a peer can meet a closed port."""
        return self.action is Decision.DENY or bool(self.deny if inbound else self.deny - {Reason.CLOSED})

    def judge(self, talk: Talk, reason: Reason | None) -> Judgement:
        """Never silently allow, except for the reasons that the policy calls quiet."""
        denied = reason in self.deny or self.action is Decision.DENY
        alert = reason in self.deny or (self.alert and reason not in self.quiet)
        loud = self.severity or (Severity.HIGH if reason is Reason.HIDDEN else Severity.MEDIUM)
        return Judgement(
            Decision.DENY if denied else Decision.ALLOW,
            self.ref,
            alert=alert,
            severity=loud if alert or denied else Severity.INFO,
            tags=self.tags if alert or denied else (),
            actions=self.actions if denied else ("alert",) if alert else (),
            because=f"unbound ({reason or 'no reason given'}): no process of the guest is known for {talk}",
            enforce=denied and self.enforce,
            ask=self.hold.ask,
        )


@dataclass(frozen=True, slots=True)
class View:
    """All that applies to one kind of guest (its system and tags), most specific first."""

    fold: bool
    literal: Mapping[str, tuple[Profile, ...]]  # whose image is this very path
    patterns: tuple[Profile, ...]  # whose image is a pattern, and those without an image
    everything: tuple[Profile, ...]
    otherwise: tuple[Section, ...]
    kernel: tuple[Section, ...]
    unbound: tuple[Unbound, ...]
    _seen: dict[str, tuple[Profile, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def with_image(self, path: str) -> tuple[Profile, ...]:
        """The profiles whose image fits this path, or that ask for none; the answers for short paths are kept."""
        found = self._seen.get(path)
        if found is None:
            found = self._find(path)
            if len(path) <= _KEPT_LENGTH:
                if len(self._seen) >= _KEPT_PATHS:
                    self._seen.clear()
                self._seen[path] = found
        return found

    def _find(self, path: str) -> tuple[Profile, ...]:
        literal = self.literal.get(path.lower() if self.fold or looks_windows(path) else path, ())
        fitting = [p for p in self.patterns if p.image is None or p.image.matches(path, fold=self.fold)]
        return tuple(sorted((*literal, *fitting), key=lambda p: p.rank, reverse=True))


def judge(view: View, subject: Subject) -> Judgement:
    """Judge one flow: every owner of its socket is judged and the worst verdict wins."""
    talk = Talk(subject.flow, subject.names)
    binding = subject.binding
    if len(binding.owners) == 1:
        return _judge_process(view, Actor(binding.owners[0].process, subject.parent, view.fold), talk)
    if binding.owners:
        return _judge_owners(view, subject, talk)
    if binding.match is Match.KERNEL:
        return worst(section.judge(talk) for section in view.kernel)
    return worst(policy.judge(talk, binding.reason) for policy in view.unbound)


def _judge_owners(view: View, subject: Subject, talk: Talk) -> Judgement:
    owners = subject.binding.owners
    actors = [Actor(owner.process, _parent(owner.process, subject, owners), view.fold) for owner in owners]
    return worst(_judge_process(view, actor, talk) for actor in actors)


def _parent(process: GuestProcess, subject: Subject, owners: tuple[Owner, ...]) -> GuestProcess | None:
    known = (subject.parent, *(owner.process for owner in owners))
    return next((parent for parent in known if parent is not None and parent.pid == process.parent_pid), None)


def _judge_process(view: View, actor: Actor, talk: Talk) -> Judgement:
    image = image_of(actor.process)
    doubted = []
    chosen = None
    for profile in view.with_image(image) if isinstance(image, str) else view.everything:
        if profile.until_ns is not None and talk.at_ns >= profile.until_ns:
            continue
        if isinstance(image, str) or profile.image is None:
            answer = all_hold(profile.conditions, actor) if profile.conditions else True
        elif image is None:
            continue
        else:
            answer = None if all_hold(profile.conditions, actor) is not False else False
        if answer:
            chosen = profile.section
            break
        if answer is None:
            doubted.append(profile.section)
    if chosen is not None:
        judgement = chosen.judge(talk)
    else:
        whom = f"{_naming(actor.process)} has no profile; "
        judgement = worst(section.judge(talk, whom) for section in view.otherwise)
    return _with_doubts(judgement, doubted, talk) if doubted else judgement


def _with_doubts(judgement: Judgement, doubted: list[Section], talk: Talk) -> Judgement:
    """An allow stays one, but a person must see it if a profile that could not be ruled out says deny."""
    if judgement.decision is Decision.DENY:
        return judgement
    denials = [(section, denial) for section in doubted if (denial := section.judge(talk)).decision is Decision.DENY]
    if not denials:
        return judgement
    section, denial = max(denials, key=lambda pair: _LOUDNESS[pair[1].severity])
    return replace(
        judgement,
        alert=True,
        severity=min(denial.severity, Severity.MEDIUM, key=lambda severity: _LOUDNESS[severity]),
        tags=denial.tags,
        actions=("alert",),
        because=f"{judgement.because}; but it may be {section.name}, which denies this: "
        "what tells them apart could not be read",
    )


def worst(judgements: Iterable[Judgement]) -> Judgement:
    """Deny beats allow, then what a person must see, then the louder; the first of equals."""
    return max(judgements, key=lambda j: (j.decision is Decision.DENY, j.alert, _LOUDNESS[j.severity]))


def louder(judgement: Judgement, severity: Severity, why: str) -> Judgement:
    """The same judgement as an alert of at least this severity; guest text in ``why`` is made harmless."""
    loud = max(judgement.severity, severity, key=lambda one: _LOUDNESS[one])
    return replace(judgement, alert=True, severity=loud, because=f"{judgement.because}; {shown(why)}")


def _naming(process: GuestProcess) -> str:
    return shown(process.path if isinstance(process.path, str) else process.name) or "the process"


def shown(text: str) -> str:
    """Guest text for a sentence: short, and without control characters."""
    short = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return (
        short if short.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in short)
    )
