"""The second opinion in the engine: asked for once, told with the verdict it belongs to, never waited for."""

from appliance.engine import Engine
from appliance.messages import AskOther, EvidenceFound, GatherEvidence, LookedUp, OpinionFound, Report, SnapshotTaken
from appliance.model import Decision, Evidence, Finding, FlowCounts, FlowEnd, FlowEnded, FlowStarted, Match, Snapshot
from appliance.opinions import FRESH_NS, MAX_ASKED, MAX_TOLD
from tests.worlds.nouns import NoNames, Verbatim, flow, owner

OURS = Evidence("executable memory that belongs to no file", "anon-exec", 0x7F0000000000, 4096, weight=2)
THEIRS = Evidence("Volatility's malfind: executable memory", "volatility:malfind", 0x7F0000000000, 4096, weight=1)


def engine(decision=Decision.DENY, *, other=True):
    return Engine(Verbatim(decision), NoNames(), other=other)


def deny(one, number, at_ns=None, pid=100, found=(OURS,)):
    """One flow from its first packet to all that the engine says of it."""
    each = flow(number, local_port=40000 + number)
    at_ns = each.started_ns if at_ns is None else at_ns
    commands = list(one.feed(FlowStarted(each, at_ns)))
    commands += one.feed(LookedUp(each.id, Finding(Match.EXACT, (owner(pid),)), at_ns))
    if isinstance(commands[-1], GatherEvidence):
        commands += one.feed(EvidenceFound(each.id, found, at_ns))
    return each, commands


def asked(commands):
    return [command.process.pid for command in commands if isinstance(command, AskOther)]


def reports(commands):
    return [command for command in commands if isinstance(command, Report)]


def test_a_denied_flow_is_told_at_once_and_again_with_the_opinion():
    one = engine()
    each, commands = deny(one, 1)
    (first,) = reports(commands)
    assert (first.again, first.verdict.evidence) == (False, (OURS,))
    assert commands.index(first) < len(commands) - 1
    assert asked(commands) == [100]
    key = first.verdict.binding.process.key
    (second,) = one.feed(OpinionFound(key, (THEIRS,), each.started_ns + 1))
    assert (second.again, second.verdict.flow, second.verdict.evidence) == (True, each, (OURS, THEIRS))
    assert second.verdict.parasitic
    assert one.records[each.id] is second.verdict


def test_an_opinion_alone_makes_nobody_a_parasite():
    one = engine()
    each, commands = deny(one, 1, found=())
    (second,) = one.feed(OpinionFound(reports(commands)[0].verdict.binding.process.key, (THEIRS,), each.started_ns))
    assert second.verdict.evidence == (THEIRS,)
    assert not second.verdict.parasitic


def test_one_question_serves_all_flows_of_a_process_for_ten_minutes():
    one = engine()
    first, commands = deny(one, 1)
    second, more = deny(one, 2)
    assert asked(commands + more) == [100]
    key = reports(commands)[0].verdict.binding.process.key
    again = list(one.feed(OpinionFound(key, (THEIRS,), first.started_ns)))
    assert [command.verdict.flow for command in again] == [first, second]
    third, later = deny(one, 3, first.started_ns + FRESH_NS - 1)
    assert asked(later) == []
    assert reports(later)[0].verdict.flow == third
    assert reports(later)[0].verdict.evidence[-1] == THEIRS
    _, later = deny(one, 4, first.started_ns + FRESH_NS + 1)
    assert asked(later) == [100]
    assert THEIRS not in reports(later)[0].verdict.evidence


def test_what_is_allowed_is_nobody_elses_business():
    assert asked(deny(engine(Decision.ALLOW), 1)[1]) == []


def test_nobody_is_asked_where_there_is_nobody():
    assert asked(deny(engine(other=False), 1)[1]) == []


def test_an_opinion_without_evidence_tells_nothing_again_and_is_remembered():
    one = engine()
    each, commands = deny(one, 1)
    assert list(one.feed(OpinionFound(reports(commands)[0].verdict.binding.process.key, (), each.started_ns))) == []
    assert asked(deny(one, 2)[1]) == []


def test_an_opinion_that_nobody_asked_for_is_not_heard():
    one = engine()
    _, commands = deny(one, 1)
    key = reports(commands)[0].verdict.binding.process.key
    one.feed(OpinionFound(key, (THEIRS,), 1))
    list(one.feed(OpinionFound(key, (THEIRS,), 1)))
    assert list(one.feed(OpinionFound(key, (THEIRS,), 1))) == []


def test_a_kernel_that_was_replaced_takes_its_questions_with_it():
    one = engine()
    _, commands = deny(one, 1)
    list(one.feed(SnapshotTaken(Snapshot(0, (), ()), "linux")))
    assert list(one.feed(OpinionFound(reports(commands)[0].verdict.binding.process.key, (THEIRS,), 1))) == []


def test_the_opinion_is_told_of_a_flow_that_has_ended_meanwhile():
    one = engine()
    each, commands = deny(one, 1)
    list(one.feed(FlowEnded(each.id, FlowEnd.FIN, FlowCounts(), each.started_ns + 1)))
    (again,) = one.feed(OpinionFound(reports(commands)[0].verdict.binding.process.key, (THEIRS,), each.started_ns + 2))
    assert again.verdict.flow == each
    assert each.id not in one.records


def test_questions_and_what_waits_for_them_are_bounded():
    one = engine()
    pids = [pid for number in range(3 * MAX_ASKED) for pid in asked(deny(one, number, pid=100 + number)[1])]
    assert len(pids) == MAX_ASKED
    busy = engine()
    first, commands = deny(busy, 0)
    for number in range(1, 3 * MAX_TOLD):
        deny(busy, number)
    key = reports(commands)[0].verdict.binding.process.key
    assert len(list(busy.feed(OpinionFound(key, (THEIRS,), first.started_ns)))) == MAX_TOLD
