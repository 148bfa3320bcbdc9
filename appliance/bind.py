"""The knot: a flow and what the guest eye found become a Binding, an honest answer with its reason.

The eye answers for one instant; this room knows the flow's life. It decides whether to ask again, and what a miss
means: a socket that was gone before we looked (late), or a connection that lives on without one (hidden).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from appliance.model import Binding, Direction, Finding, Flow, Match, Owner, Reason, Transport

MS = 1_000_000

# When to ask again after a miss, counted from the first packet. Connections of a busy guest live some 30 ms, so the
# first tries are close together; the last one is what tells a hidden connection from a short one.
MISS_RETRIES_NS = (1 * MS, 3 * MS, 10 * MS, 30 * MS, 100 * MS, 400 * MS, 1200 * MS)

# An incoming connection is first owned by its listener; the process that accepts it holds it a moment later.
ACCEPT_RETRIES_NS = (2 * MS, 6 * MS, 15 * MS, 40 * MS, 100 * MS)

_ANSWER_RANK = {Match.EXACT: 4, Match.KERNEL: 3, Match.LISTENER: 2, Match.UNCONNECTED: 2, Match.NONE: 0}


@dataclass(slots=True)
class Case:
    """Everything known of one flow while its process is sought. Mutable: it is the engine's working memory."""

    flow: Flow
    best: Finding | None = None
    best_at_ns: int = 0
    attempts: int = 0
    torn: int = 0
    ended: bool = False
    fresh_misses: int = 0  # answers "no socket" given right after the guest itself sent something
    sent: int = 0  # payloads the guest sent
    received: int = 0
    looking: bool = False
    judged: bool = field(default=False)

    def learn(self, finding: Finding, at_ns: int, *, fresh: bool) -> None:
        """Take one answer in; the best answer so far stays."""
        self.attempts += 1
        self.torn += finding.torn
        if fresh and finding.match is Match.NONE and finding.reason is None:
            self.fresh_misses += 1
        if self.best is None or _better(finding, self.best):
            self.best, self.best_at_ns = finding, at_ns


def next_look_ns(case: Case) -> int | None:
    """When to ask again (absolute time), or None: the answer stands."""
    finding = case.best
    if finding is None:
        return case.flow.started_ns
    if finding.final or finding.match in (Match.EXACT, Match.KERNEL, Match.UNCONNECTED) or case.ended:
        return None
    if finding.match is Match.LISTENER:
        schedule: tuple[int, ...] = ACCEPT_RETRIES_NS
    elif finding.reason in (Reason.CLOSED, Reason.FORWARDED, Reason.NO_MEMORY):
        return None
    else:
        schedule = MISS_RETRIES_NS
    if case.attempts > len(schedule):
        return None
    return case.flow.started_ns + schedule[case.attempts - 1]


def tie(case: Case, remembered: tuple[Owner, ...] = ()) -> Binding:
    """Tie the knot with the best answer. ``remembered`` are the owners an earlier look saw of this very tuple."""
    finding = case.best or Finding(Match.NONE)
    latency_ns = max(0, case.best_at_ns - case.flow.started_ns)
    match, reason, owners = finding.match, finding.reason, finding.owners
    if match is Match.NONE and remembered and reason in (None, Reason.TIME_WAIT, Reason.ORPHAN):
        match, reason, owners = Match.EXACT, None, remembered
    if match is Match.NONE and reason is None:
        reason = _miss(case)
    elif len({owner.process.path for owner in owners}) > 1:
        reason = Reason.AMBIGUOUS
    owners = tuple(sorted(owners, key=lambda owner: (owner.process.key.started_ns, owner.process.pid)))
    return Binding(match, reason, owners, latency_ns, case.attempts, finding.socket)


def _better(new: Finding, old: Finding) -> bool:
    """Prefer the stronger match; among misses, one that knows a reason."""
    if _ANSWER_RANK[new.match] != _ANSWER_RANK[old.match]:
        return _ANSWER_RANK[new.match] > _ANSWER_RANK[old.match]
    return new.match is Match.NONE and new.reason is not None and old.reason in (None, Reason.TORN)


def _miss(case: Case) -> Reason:
    """Say why no socket was ever seen: too late, or hidden.

    Hidden needs a connection that demonstrably lives on: it has not ended, the guest sent data on it after the first
    look, and every later look, also those made right after such a packet, found nothing.
    """
    talks = case.sent >= 1 and (case.received >= 1 or case.flow.tuple.protocol is not Transport.TCP)
    looked_long = case.attempts > len(MISS_RETRIES_NS)
    if not case.ended and looked_long and talks and case.fresh_misses >= 2:
        return Reason.HIDDEN
    if case.flow.direction is Direction.IN and case.sent == 0:
        return Reason.CLOSED
    return Reason.LATE
