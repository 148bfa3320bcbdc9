"""All rule sets together: which of them apply to a guest, and the verdicts they give. Pure like the judge itself."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from appliance.errors import Problem
from appliance.model import Decision, HoldPolicy, Judgement, Reason, RuleRef
from appliance.rules import match, suite
from appliance.rules.acts import REDIRECT
from appliance.rules.match import Profile, Section, Subject, Unbound, View

QUIET_REASONS = frozenset(
    (Reason.CLOSED, Reason.LATE, Reason.TORN, Reason.TIME_WAIT, Reason.FORWARDED, Reason.NO_MEMORY)
)
_MAX_VIEWS = 256  # kinds of guests whose profiles are kept sorted


@dataclass(frozen=True, slots=True)
class RuleSet:
    """One compiled rule file. Sections are None where the file is silent about them."""

    name: str
    file: str
    version: str  # its own version and the hash of its text
    digest: str
    ref: RuleRef  # its ``spec``
    os: str | None = None
    tags: frozenset[str] = frozenset()
    profiles: tuple[Profile, ...] = ()
    otherwise: Section | None = None
    kernel: Section | None = None
    unbound: Unbound | None = None
    cases: tuple[suite.TestCase, ...] = ()
    enforce: bool = False
    draft: bool = False  # nobody has reviewed it

    @property
    def profile_names(self) -> tuple[str, ...]:
        """The profiles as the author wrote them; ``profiles`` holds one for each of their image patterns."""
        return tuple(dict.fromkeys(profile.section.name for profile in self.profiles))

    @property
    def enforcing(self) -> list[Section | Unbound]:
        """The blocks whose denials are carried out."""
        blocks = (*(profile.section for profile in self.profiles), self.otherwise, self.kernel, self.unbound)
        return [block for block in blocks if block is not None and block.enforce]

    def applies(self, os: str, tags: Iterable[str]) -> bool:
        """Whether it is for such a guest; a guest whose system is not known gets every system's rules."""
        if self.os is not None and os and os != self.os:
            return False
        return not self.tags or any(tag in self.tags for tag in tags)


@dataclass(frozen=True, slots=True)
class RuleBook:
    """Every rule set that was loaded. Judging changes nothing that can be seen from outside."""

    sets: tuple[RuleSet, ...] = ()
    warnings: tuple[Problem, ...] = ()
    version: str = field(init=False)
    _views: dict[tuple[str, tuple[str, ...]], View] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = ",".join(rules.name for rules in self.sets) or "empty"
        content = "\n".join(f"{rules.name} {rules.digest}" for rules in self.sets)
        digest = hashlib.sha256(content.encode()).hexdigest()
        object.__setattr__(self, "version", f"{names}@sha256:{digest[:16]}")

    def judge(self, subject: Subject) -> Judgement:
        """Say what the rules think of one flow. Never raises, reads nothing, knows no time but the flow's."""
        return match.judge(self._view(subject.os, subject.tags), subject)

    def hold_policy(self, os: str = "", tags: tuple[str, ...] = ()) -> HoldPolicy | None:
        """Which new flows of such a guest must wait for their verdict; None: nothing is enforced there.

        Before its process is known, nobody can say which profile a flow belongs to: the longest deadline holds, and the
        strictest default.
        """
        blocks = self._enforcing(os, tags)
        outgoing = [block for block in blocks if block.can_deny(inbound=False)]
        incoming = [block for block in blocks if block.hold.incoming and block.can_deny(inbound=True)]
        holding = [block.hold for block in (*outgoing, *incoming)]
        if not holding:
            return None
        strict = any(hold.default is Decision.DENY for hold in holding)
        return HoldPolicy(
            outgoing=bool(outgoing),
            incoming=bool(incoming),
            deadline_s=max(hold.deadline_s for hold in holding),
            default=Decision.DENY if strict else Decision.ALLOW,
        )

    def decoys(self, os: str = "", tags: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The decoys that connections of such a guest are redirected to, by name."""
        actions = (action for block in self._enforcing(os, tags) for action in block.actions)
        return tuple(dict.fromkeys(name.removeprefix(REDIRECT) for name in actions if name.startswith(REDIRECT)))

    def _enforcing(self, os: str, tags: tuple[str, ...]) -> list[Section | Unbound]:
        return [block for rules in self.sets if rules.applies(os, tags) for block in rules.enforcing]

    def test(self) -> tuple[suite.TestResult, ...]:
        """Run the tests inside the files; each file is judged by its own rules alone."""
        results: list[suite.TestResult] = []
        for rules in self.sets:
            alone = RuleBook((rules,))
            results.extend(suite.run(case, alone.judge) for case in rules.cases)
        return tuple(results)

    def _view(self, os: str, tags: tuple[str, ...]) -> View:
        found = self._views.get((os, tags))
        if found is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            found = self._views[os, tags] = _build_view([r for r in self.sets if r.applies(os, tags)], os)
        return found


def _build_view(sets: list[RuleSet], os: str) -> View:
    fold = os == "windows"
    profiles = sorted((p for rules in sets for p in rules.profiles), key=lambda p: p.rank, reverse=True)
    literal: dict[str, list[Profile]] = defaultdict(list)
    for profile in profiles:
        if profile.image is not None and profile.image.literal:
            path = profile.image.pattern
            literal[path.lower() if fold or profile.image.windows else path].append(profile)
    refs = [rules.ref for rules in sets] or [RuleRef("", 0, "none")]
    return View(
        fold,
        {path: tuple(named) for path, named in literal.items()},
        tuple(p for p in profiles if p.image is None or not p.image.literal),
        tuple(profiles),
        tuple(r.otherwise for r in sets if r.otherwise)
        or tuple(Section("otherwise", _named(ref, "otherwise"), Decision.ALLOW) for ref in refs),
        tuple(r.kernel for r in sets if r.kernel)
        or tuple(Section("kernel", _named(ref, "kernel"), Decision.ALLOW) for ref in refs),
        tuple(r.unbound for r in sets if r.unbound)
        or tuple(Unbound(_named(ref, "unbound"), quiet=QUIET_REASONS) for ref in refs),
    )


def _named(ref: RuleRef, name: str) -> RuleRef:
    return replace(ref, profile=name)
