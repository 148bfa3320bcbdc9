"""The loop of one guest and the other engine: it is asked, heard when it has answered, and ends with the watch."""

from appliance.engine import Engine
from appliance.model import Decision, Evidence, Finding, FlowStarted, Match, Opinion
from appliance.watch import GuestWatch
from tests.test_watch import LIVE, Clock, Eye, Tap
from tests.worlds.nouns import NoNames, Verbatim, flow, owner

THEIRS = Evidence("Volatility's malfind: executable memory", "volatility:malfind", weight=1)


class Other:
    """Answers after so many polls of the loop; None: it takes no questions."""

    def __init__(self, after, trouble=None):
        self.after, self.trouble, self.asked, self.closed = after, trouble, [], False

    def ask(self, system, process):
        self.asked.append((system, process.pid))
        self.key = process.key
        return self.after is not None

    def heard(self):
        if not self.asked or self.after is None:
            return []
        self.after -= 1
        return [Opinion(self.key, () if self.trouble else (THEIRS,), self.trouble)] if self.after == 0 else []

    def close(self):
        self.closed = True


def watch(other, *, polls=50, eye=None):
    """One denied flow, and all that is told of it."""
    told, said = [], []
    tap = Tap([FlowStarted(flow(1), 1)], lasts=polls)
    eye = eye or Eye(Finding(Match.EXACT, (owner(),)))
    engine = Engine(Verbatim(Decision.DENY), NoNames(), other=True)
    one = GuestWatch(LIVE, tap, eye, engine, told.append, Clock(), tell=said.append, other=other)
    one.run(lambda: False)
    return one, told, said


def test_a_verdict_is_told_before_the_other_engine_answers_and_once_more_then():
    other = Other(after=20)
    one, told, _ = watch(other)
    assert other.asked == [("linux", 100)]
    assert [THEIRS in verdict.evidence for verdict in told] == [False, True]
    assert one.summary.verdicts["deny"] == 1
    assert one.summary.opinions == {"answered": 1}


def test_the_other_engine_ends_with_the_watch_and_what_it_did_not_say_is_not_waited_for():
    other = Other(after=1000)
    one, told, _ = watch(other)
    assert len(told) == 1
    assert other.closed
    assert one.summary.opinions == {"not waited for": 1}


def test_what_keeps_it_from_answering_is_counted_and_said_once():
    one, told, said = watch(Other(after=3, trouble="it died"))
    assert one.summary.opinions == {"failed": 1}
    assert sum("it died" in line for line in said) == 1
    assert len(told) == 1


def test_where_it_takes_no_question_the_verdict_stands_as_it_was_told():
    one, told, _ = watch(Other(after=None))
    assert len(told) == 1
    assert one.summary.opinions == {"not asked": 1}
