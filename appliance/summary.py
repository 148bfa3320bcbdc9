"""What watches have seen and cost. Every loss is a figure here, also of guests that are long gone."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Final

from appliance.model import GuestId, Match, Reason, TapStats, Verdict

MAX_LIVES: Final = 256  # that have ended and are told one by one; older ones of a guest are told in one sum
MAX_GUESTS: Final = 256  # whose earlier lives have a sum each; older ones are in one sum of all
OTHERS: Final = "others"

_FIGURES: Final = ("packets", "bytes", "flows", "events", "lost", "evicted")


@dataclass(slots=True)
class Summary:
    """What one watch has seen and cost, or the sum of several (``lives``)."""

    vm: str
    tap: TapStats = field(default_factory=TapStats)
    bound: Counter[str] = field(default_factory=Counter)
    unbound: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    gaps: int = 0  # what the full looks could not see
    guest_errors: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)  # what the hand did
    acts_failed: int = 0  # what it could not do: the flow was gone, the decoy is unknown, the host refused
    opinions: Counter[str] = field(default_factory=Counter)  # of the other engine, by what became of the question
    cpu_s: float = 0.0
    unshown: int = 0  # verdicts dropped because their reader was too slow
    defect: bool = False  # it ended by an error of ours
    ended: str = ""  # why the watch of this guest ended early; "" when it did not
    awaited: bool = False  # when the guest comes back it is watched again
    lives: int = 1  # how many watches this is the sum of
    uuid: str | None = None
    name: str | None = None

    def count(self, verdict: Verdict) -> None:
        """Count one judged flow by how it was bound and what was decided."""
        binding = verdict.binding
        if binding.match is Match.NONE:
            self.unbound[(binding.reason or Reason.LATE).value] += 1
        else:
            self.bound[binding.match.value] += 1
        self.verdicts[verdict.judgement.decision.value] += 1

    def add(self, other: Summary) -> None:
        """Take another one into this sum."""
        ignored = Counter(dict(self.tap.ignored))
        ignored.update(dict(other.tap.ignored))
        figures = {name: getattr(self.tap, name) + getattr(other.tap, name) for name in _FIGURES}
        self.tap = TapStats(**figures, ignored=tuple(sorted(ignored.items())))
        for name in ("bound", "unbound", "verdicts", "guest_errors", "acts", "opinions"):
            getattr(self, name).update(getattr(other, name))
        for name in ("torn", "gaps", "acts_failed", "cpu_s", "unshown", "lives"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.defect |= other.defect
        self.ended, self.awaited = other.ended, other.awaited


class Ledger:
    """The summaries of all that was watched, in bounded room: a host may start guests for years."""

    def __init__(self, max_lives: int = MAX_LIVES, max_guests: int = MAX_GUESTS) -> None:
        self._max_lives, self._max_guests = max_lives, max_guests
        self._lives: OrderedDict[int, tuple[str, Summary]] = OrderedDict()
        self._sums: OrderedDict[str, Summary] = OrderedDict()
        self._others: Summary | None = None
        self._count = 0

    def add(self, guest: GuestId, summary: Summary) -> None:
        """Take the summary of a watch that is over."""
        self._count += 1
        self._lives[self._count] = guest.uuid or guest.name or guest.target, summary
        if len(self._lives) > self._max_lives:
            _, (identity, oldest) = self._lives.popitem(last=False)
            self._fold(identity, oldest)

    def _fold(self, identity: str, summary: Summary) -> None:
        if (found := self._sums.get(identity)) is None:
            found = self._sums[identity] = Summary(identity, lives=0)
        found.add(summary)
        self._sums.move_to_end(identity)
        if len(self._sums) > self._max_guests:
            _, oldest = self._sums.popitem(last=False)
            self._others = self._others or Summary(OTHERS, lives=0)
            self._others.add(oldest)

    def all(self) -> list[Summary]:
        """Sums of what is long over first, then one by one, oldest first."""
        others = [self._others] if self._others is not None else []
        return [*others, *self._sums.values(), *(summary for _, summary in self._lives.values())]
