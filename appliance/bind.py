"""The knot: a flow and what the guest eye found become a Binding, an honest answer with its reason.

The eye answers for one instant; this room knows the flow's life. It decides whether to ask again, and what a miss
means: a socket that was gone before we looked (late), or a connection that lives on without one (hidden). A flow that
is held in the host does not live yet: its silence says nothing, and somebody waits for each answer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from appliance.model import (
    Binding,
    Direction,
    Evidence,
    Finding,
    Flag,
    Flow,
    Handling,
    Match,
    Owner,
    Reason,
    Transport,
)

MS = 1_000_000

# When to ask again after a miss, counted from the first packet. Connections of a busy guest live some 30 ms, so the
# first tries are close together; the last two tell a hidden connection from a short one.
TCP_RETRIES_NS = (1 * MS, 5 * MS, 30 * MS, 150 * MS, 1200 * MS, 2000 * MS)
UDP_RETRIES_NS = (1 * MS, 10 * MS, 2000 * MS)

# An incoming connection is first owned by its listener; the process that accepts it holds it a moment later. The
# guest's first answer makes one more look, and a better one: by then the connection was accepted.
ACCEPT_RETRIES_NS = (3 * MS, 15 * MS, 100 * MS)

# While a flow is held its socket cannot go away unseen, and a person waits: close together, up to the longest hold.
HELD_RETRIES_NS = (1 * MS, 3 * MS, 10 * MS, 30 * MS, 100 * MS, 300 * MS, 1000 * MS, 2000 * MS, 3000 * MS)

PROMPT_NS = 20 * MS  # an answer that took longer says nothing of the moment it was asked about
OLD_PROMPT_NS = 100 * MS  # of a connection that lives on for seconds it says enough
BEHIND_NS = 50 * MS  # so far behind, asking again soon would only put us further behind
SETTLED_NS = 200 * MS  # by then a flow is no longer one question and one answer
OLD_NS = 1000 * MS  # a socket cannot be gone from a TCP connection of this age that has not ended

SPOOFED_MAC, SPOOFED_IP = "spoofed-mac", "spoofed-ip"  # kinds of evidence
ALARM_REST_NS = 60_000 * MS  # one forged address is one alarm a minute, whatever is sent from it
MAX_ALARMS = 32  # and so many of them in that time: who forges one address forges a million

_ANSWER_RANK = {Match.EXACT: 4, Match.KERNEL: 3, Match.LISTENER: 2, Match.UNCONNECTED: 2, Match.NONE: 0}
_LASTING_MISSES = (Reason.CLOSED, Reason.FORWARDED, Reason.TIME_WAIT, Reason.ORPHAN)
# "No socket" or "no listed holder" of one instant. A DHCP client's packet socket is there all day, so RAW is no more
# than a suspicion either, until the flow is known to live on.
_DOUBTFUL_MISSES = (None, Reason.HIDDEN, Reason.RAW)


@dataclass(slots=True)
class Case:
    """Everything known of one flow while its process is sought. Mutable: it is the engine's working memory."""

    flow: Flow
    best: Finding | None = None
    best_at_ns: int = 0
    attempts: int = 0
    retries: int = 0  # looks made because of their time
    torn: int = 0
    ended: bool = False
    sent: int = 0  # payloads the guest sent
    received: int = 0
    settled_misses: int = 0  # "no socket", found right after the guest sent something on a settled flow
    old_misses: int = 0  # "no socket", found on a flow of some age
    first_lag_ns: int = 0
    asked_ns: int = 0  # the moment the look under way asks about
    on_packet: bool = False  # it was made because the guest has just sent something
    looking: bool = False
    due_ns: int = 0  # when the next look is due by time
    judged: bool = field(default=False)
    held: bool = False  # it waits in the host for its verdict
    deadline_ns: int = 0  # of the hold
    released_ns: int = 0  # when it was let go without a verdict; 0: it was not
    handling: Handling | None = None  # how it was let go

    @property
    def since_ns(self) -> int:
        """When its life on the wire began: ages and the times to ask again count from here."""
        return max(self.flow.started_ns, self.released_ns)

    def is_held(self, at_ns: int) -> bool:
        """Whether it waits for us; when its time was up, the tap did what the operator wants by default."""
        return self.held and at_ns < self.deadline_ns

    def release(self, at_ns: int) -> None:
        """It goes on without a verdict: from now on its life tells what it is."""
        self.held, self.released_ns, self.retries, self.due_ns = False, at_ns, 0, 0

    def learn(self, finding: Finding, at_ns: int) -> None:
        """Take one answer in; the best answer so far stays."""
        lag_ns = at_ns - self.asked_ns
        if self.attempts == 0:
            self.first_lag_ns = lag_ns
        self.attempts += 1
        self.torn += finding.torn
        doubtful = finding.match is Match.NONE and finding.reason in _DOUBTFUL_MISSES
        if doubtful and not self.held:
            age_ns = self.asked_ns - self.since_ns
            self.settled_misses += lag_ns <= PROMPT_NS and self.on_packet and age_ns >= SETTLED_NS
            self.old_misses += lag_ns <= OLD_PROMPT_NS and age_ns >= OLD_NS
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
        if case.held:
            return None  # nobody can accept it before it is let in
        schedule: tuple[int, ...] = ACCEPT_RETRIES_NS
    elif finding.reason in _LASTING_MISSES:
        return None
    elif case.held:
        later = (case.since_ns + wait_ns for wait_ns in HELD_RETRIES_NS)
        return next((at_ns for at_ns in later if at_ns > case.asked_ns), None)
    else:
        tcp = case.flow.tuple.protocol is Transport.TCP
        schedule = TCP_RETRIES_NS if tcp else UDP_RETRIES_NS
        if case.first_lag_ns > BEHIND_NS:
            schedule = schedule[-2:] if tcp else schedule[-1:]
    if case.retries >= len(schedule):
        return None
    return case.since_ns + schedule[case.retries]


def tie(case: Case, remembered: tuple[Owner, ...] = ()) -> Binding:
    """Tie the knot with the best answer. ``remembered`` are the owners an earlier look saw of this very tuple."""
    finding = case.best or Finding(Match.NONE)
    latency_ns = max(0, case.best_at_ns - case.flow.started_ns)
    flow, match, reason, owners = case.flow, finding.match, finding.reason, finding.owners
    if match is Match.NONE and remembered and reason in (None, Reason.TIME_WAIT, Reason.ORPHAN):
        match, reason, owners = Match.EXACT, None, remembered
    if match is Match.NONE and reason in _DOUBTFUL_MISSES and flow.tuple.protocol in (Transport.TCP, Transport.UDP):
        reason = _miss(case, finding)
    elif len({owner.process.path for owner in owners}) > 1:
        reason = Reason.AMBIGUOUS
    elif reason is None and any(Flag.HIDDEN_PROCESS in owner.process.flags for owner in owners):
        reason = Reason.HIDDEN
    owners = tuple(sorted(owners, key=lambda owner: (owner.process.key.started_ns, owner.process.pid)))
    return Binding(match, reason, owners, latency_ns, case.attempts, finding.socket)


def concealed(binding: Binding) -> str | None:
    """What the guest hides of a flow that was bound all the same, in words; None: nothing."""
    for owner in binding.owners:
        if Flag.HIDDEN_PROCESS in owner.process.flags:
            return f"process {owner.process.pid} is not on the guest's own list of processes"
    flags = binding.socket.flags if binding.socket is not None else ()
    if Flag.UNLINKED_ENDPOINT in flags:
        return "the guest's own tables do not have this connection"
    if Flag.ONE_TABLE_ONLY in flags:
        return "only one of two tables of the guest has this connection"
    return None


def forged(flow: Flow) -> tuple[Evidence, ...]:
    """What the flow's own packets say against it."""
    mac = flow.spoofed_mac
    if mac is None:
        return ()
    claim = f"the guest sent this from the MAC address {mac}, which its port was not given"
    return (Evidence(claim, SPOOFED_MAC, detail=mac, weight=1),)


class Forgeries:
    """Which forged addresses were told of lately, so that a flood of packets is not a flood of alarms."""

    def __init__(self) -> None:
        self._told: OrderedDict[tuple[str, str | None], int] = OrderedDict()

    def loudest(self, evidence: tuple[Evidence, ...], at_ns: int) -> Evidence | None:
        """The first claim of a forged address that is worth an alarm now; None: there is none, or it was told."""
        while self._told and at_ns - next(iter(self._told.values())) >= ALARM_REST_NS:
            self._told.popitem(last=False)
        found = None
        for item in evidence:
            key = item.kind, item.detail
            if item.kind in (SPOOFED_MAC, SPOOFED_IP) and key not in self._told and len(self._told) < MAX_ALARMS:
                self._told[key] = at_ns
                found = found or item
        return found


def _better(new: Finding, old: Finding) -> bool:
    """Prefer the stronger match; among misses, one that knows a reason."""
    if _ANSWER_RANK[new.match] != _ANSWER_RANK[old.match]:
        return _ANSWER_RANK[new.match] > _ANSWER_RANK[old.match]
    return new.match is Match.NONE and new.reason is not None and old.reason in (None, Reason.TORN)


def _miss(case: Case, finding: Finding) -> Reason:
    """Say why no process was ever found: too late, or hidden (raw, where somebody holds a socket that can do it).

    Hidden needs a connection that demonstrably lives on without one: data both ways on a TCP connection that has not
    ended, and no socket in the guest's tables at two moments, both long after its beginning; or a UDP conversation in
    which the guest keeps sending, and no socket right after each packet.
    """
    if case.flow.tuple.protocol is Transport.TCP:
        hidden = not case.ended and bool(case.sent and case.received) and case.old_misses >= 2
    else:
        hidden = case.settled_misses >= 2
    if hidden:
        return Reason.RAW if finding.reason is Reason.RAW else Reason.HIDDEN
    if case.flow.direction is Direction.IN and case.sent == 0:
        return Reason.CLOSED
    return Reason.LATE
