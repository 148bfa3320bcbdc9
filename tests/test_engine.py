"""The engine as a script: events in, commands out."""

from dataclasses import replace

import pytest

from appliance.engine import Engine
from appliance.messages import EvidenceFound, GatherEvidence, LookedUp, LookUp, Report, SnapshotTaken, Tick
from appliance.model import (
    Decision,
    Direction,
    Evidence,
    Finding,
    Flag,
    FlowCounts,
    FlowEnd,
    FlowEnded,
    FlowPayload,
    FlowStarted,
    GuestSocket,
    Match,
    Owner,
    Reason,
    Severity,
    Snapshot,
    Transport,
)
from tests.worlds.nouns import NoNames, Verbatim, flow, owner

MS = 1_000_000


def engine(decision=Decision.ALLOW):
    return Engine(Verbatim(decision), NoNames())


def say(one, event):
    return list(one.feed(event))


def started(flow_):
    return FlowStarted(flow_, flow_.started_ns)


def ended(flow_, at_ns):
    return FlowEnded(flow_.id, FlowEnd.FIN, FlowCounts(), at_ns)


def test_a_new_flow_is_looked_up_judged_and_reported_in_that_order():
    one, first = engine(), flow()
    assert say(one, started(first)) == [LookUp(first)]
    (report,) = say(one, LookedUp(first.id, Finding(Match.EXACT, (owner(),)), first.started_ns + 300_000))
    assert isinstance(report, Report)
    assert report.verdict.binding.process.pid == 100
    assert report.verdict.binding.latency_ns == 300_000


def test_the_first_connection_of_a_brand_new_process_is_judged_too():
    one, first = engine(Decision.DENY), flow()
    say(one, started(first))
    (gather,) = say(one, LookedUp(first.id, Finding(Match.EXACT, (owner(),)), first.started_ns))
    (report,) = say(one, EvidenceFound(first.id, (), first.started_ns))
    assert isinstance(gather, GatherEvidence)
    assert report.verdict.new_process
    assert report.verdict.judgement.decision is Decision.DENY
    assert [process.pid for process in one.processes.values()] == [100]


def test_a_known_process_is_not_new_a_second_time():
    one, first, second = engine(), flow(1), flow(2, local_port=40001)
    for each in (first, second):
        say(one, started(each))
        (report,) = say(one, LookedUp(each.id, Finding(Match.EXACT, (owner(),)), each.started_ns))
    assert not report.verdict.new_process


def test_a_pid_that_is_used_again_is_another_process():
    one, first, second = engine(), flow(1), flow(2, local_port=40001)
    for each, began in ((first, 5), (second, 9)):
        say(one, started(each))
        (report,) = say(one, LookedUp(each.id, Finding(Match.EXACT, (owner(started_ns=began),)), each.started_ns))
    assert report.verdict.new_process


def test_foreign_code_in_a_denied_process_makes_it_parasitic():
    one, first = engine(Decision.DENY), flow()
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.EXACT, (owner(),)), first.started_ns))
    found = (Evidence("executable memory that belongs to no file", "anon-exec", 0x7F0000000000, 4096, weight=2),)
    (report,) = say(one, EvidenceFound(first.id, found, first.started_ns))
    assert report.verdict.parasitic
    assert report.verdict.evidence == found


def test_many_denied_flows_of_one_process_cost_one_search_for_foreign_code():
    one = engine(Decision.DENY)
    commands = []
    for number in range(50):
        each = flow(number, local_port=40000 + number)
        say(one, started(each))
        commands += say(one, LookedUp(each.id, Finding(Match.EXACT, (owner(),)), each.started_ns))
        if isinstance(commands[-1], GatherEvidence):
            commands += say(one, EvidenceFound(each.id, (), each.started_ns))
    assert sum(isinstance(command, GatherEvidence) for command in commands) == 1
    assert sum(isinstance(command, Report) for command in commands) == 50


def test_a_young_miss_is_asked_again_and_bound_when_the_socket_shows():
    one, first = engine(), flow()
    say(one, started(first))
    assert say(one, LookedUp(first.id, Finding(Match.NONE), first.started_ns)) == []
    due_ns = one.next_due_ns
    assert say(one, Tick(due_ns - 1)) == []
    assert say(one, Tick(due_ns)) == [LookUp(first)]
    (report,) = say(one, LookedUp(first.id, Finding(Match.EXACT, (owner(),)), due_ns + 1))
    assert report.verdict.binding.match is Match.EXACT
    assert report.verdict.binding.attempts == 2


def test_a_flow_that_ends_unbound_is_late_and_still_judged():
    one, first = engine(), flow()
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.NONE), first.started_ns))
    (report,) = say(one, ended(first, first.started_ns + 20 * MS))
    assert report.verdict.binding.reason is Reason.LATE


def run_to_the_end(one, first, finding, lag_ns=0):
    """Answer every look with one finding, ``lag_ns`` later; the guest sends a payload now and then; the reports."""
    reports, at_ns = [], first.started_ns
    waiting = say(one, started(first))
    for index in range(40):
        while waiting:
            command = waiting.pop(0)
            if isinstance(command, LookUp):
                waiting += say(one, LookedUp(first.id, finding, at_ns + lag_ns))
            elif isinstance(command, Report):
                reports.append(command.verdict)
        at_ns += 100 * MS
        if index in (1, 3, 5):
            for direction in Direction:
                waiting += say(one, FlowPayload(first.id, direction, index // 2, b"x", at_ns))
        waiting += say(one, Tick(at_ns))
    return reports


def test_a_connection_that_lives_on_without_any_socket_is_hidden():
    (verdict,) = run_to_the_end(engine(), flow(), Finding(Match.NONE))
    assert verdict.binding.reason is Reason.HIDDEN


@pytest.mark.parametrize(("lag_ms", "reason"), [(60, Reason.HIDDEN), (600, Reason.LATE)])
def test_an_eye_that_needs_a_moment_for_a_miss_still_tells_hidden_from_late(lag_ms, reason):
    (verdict,) = run_to_the_end(engine(), flow(), Finding(Match.NONE), lag_ms * MS)
    assert verdict.binding.reason is reason


def test_a_process_that_is_not_on_the_guests_own_list_is_an_alert_whatever_the_rules_say_of_it():
    one, first = engine(Decision.ALLOW), flow()
    unlisted = Owner(replace(owner().process, flags=(Flag.HIDDEN_PROCESS,)))
    say(one, started(first))
    (gather,) = say(one, LookedUp(first.id, Finding(Match.EXACT, (unlisted,)), first.started_ns))
    assert isinstance(gather, GatherEvidence)
    code = Evidence("foreign code", "anon-exec", weight=2)
    (report,) = say(one, EvidenceFound(first.id, (code,), first.started_ns))
    assert (report.verdict.evidence, report.verdict.parasitic) == ((code,), False)
    binding, judged = report.verdict.binding, report.verdict.judgement
    assert (binding.match, binding.reason, binding.process.pid) == (Match.EXACT, Reason.HIDDEN, 100)
    assert (judged.decision, judged.alert, judged.severity) == (Decision.ALLOW, True, Severity.HIGH)
    assert "process 100 is not on the guest's own list" in judged.because


@pytest.mark.parametrize(
    ("flag", "alert"), [(Flag.UNLINKED_ENDPOINT, True), (Flag.ONE_TABLE_ONLY, True), (Flag.OWNER_EXITED, False)]
)
def test_a_connection_that_the_guests_own_tables_conceal_is_an_alert(flag, alert):
    one, first = engine(Decision.ALLOW), flow()
    socket = GuestSocket(
        Transport.TCP, "ESTABLISHED", first.tuple.local, first.tuple.remote, (owner(),), 1, 0, flags=(flag,)
    )
    say(one, started(first))
    (told,) = say(one, LookedUp(first.id, Finding(Match.EXACT, (owner(),), socket), first.started_ns))
    assert isinstance(told, GatherEvidence) is alert
    if alert:
        (told,) = say(one, EvidenceFound(first.id, (), first.started_ns))
    assert told.verdict.judgement.alert is alert


def test_what_is_left_of_a_closed_connection_says_nothing_of_the_next_one():
    one, first = engine(), flow(midstream=True)
    ends = first.tuple.local, first.tuple.remote
    socket = GuestSocket(Transport.TCP, "CLOSE", *ends, (owner(),), 1, 0, flags=(Flag.STALE,))
    say(one, SnapshotTaken(Snapshot(0, (), (socket,)), "windows"))
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.NONE), first.started_ns))
    (report,) = say(one, ended(first, first.started_ns + 20 * MS))
    assert report.verdict.binding.match is Match.NONE


def test_a_packet_socket_that_is_always_there_is_no_reason_to_suspect_a_short_connection():
    one, first = engine(), flow()
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.NONE, reason=Reason.RAW), first.started_ns))
    (report,) = say(one, ended(first, first.started_ns + 20 * MS))
    assert report.verdict.binding.reason is Reason.LATE


def test_a_connection_that_lives_on_by_a_raw_socket_is_raw():
    (verdict,) = run_to_the_end(engine(), flow(), Finding(Match.NONE, reason=Reason.RAW))
    assert verdict.binding.reason is Reason.RAW


def test_one_question_and_its_answer_are_late_and_never_hidden():
    one, first = engine(), flow(protocol=Transport.UDP, remote_port=53)
    reports, at_ns = [], first.started_ns
    script = [
        started(first),
        FlowPayload(first.id, Direction.OUT, 0, b"q", at_ns),
        FlowPayload(first.id, Direction.OUT, 1, b"q", at_ns + MS),
        FlowPayload(first.id, Direction.IN, 0, b"a", at_ns + 2 * MS),
        *(Tick(at_ns + step * 50 * MS) for step in range(80)),
    ]
    for event in script:
        at_ns = max(at_ns, getattr(event, "at_ns", 0))
        for command in say(one, event):
            answers = (
                say(one, LookedUp(first.id, Finding(Match.NONE), at_ns)) if isinstance(command, LookUp) else [command]
            )
            reports += [answer.verdict for answer in answers]
    assert [verdict.binding.reason for verdict in reports] == [Reason.LATE]


def test_an_appliance_that_is_behind_does_not_fall_further_behind_by_asking_again():
    one, first = engine(), flow()
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.NONE), first.started_ns + 300 * MS))
    assert one.next_due_ns >= first.started_ns + 1000 * MS


def test_every_flow_is_reported_exactly_once_whatever_the_eye_says():
    for match in Match:
        for reason in (None, *Reason):
            owners = (owner(),) if match in (Match.EXACT, Match.LISTENER) else ()
            finding = Finding(match, owners, reason=reason)
            for direction in Direction:
                reports = run_to_the_end(engine(), flow(direction=direction), finding)
                assert len(reports) == 1, (match, reason, direction)


def test_an_incoming_connection_is_refined_from_its_listener_to_the_process_that_accepts_it():
    one, first = engine(), flow(direction=Direction.IN, local_port=80)
    say(one, started(first))
    assert say(one, LookedUp(first.id, Finding(Match.LISTENER, (owner(1),)), first.started_ns)) == []
    (look,) = say(one, Tick(one.next_due_ns))
    (report,) = say(one, LookedUp(look.flow.id, Finding(Match.EXACT, (owner(7),)), first.started_ns + 3 * MS))
    assert report.verdict.binding.match is Match.EXACT
    assert report.verdict.binding.process.pid == 7


def test_an_incoming_connection_that_ends_early_keeps_its_listener():
    one, first = engine(), flow(direction=Direction.IN, local_port=80)
    say(one, started(first))
    say(one, LookedUp(first.id, Finding(Match.LISTENER, (owner(1),)), first.started_ns))
    (report,) = say(one, ended(first, first.started_ns + MS))
    assert report.verdict.binding.match is Match.LISTENER
    assert report.verdict.binding.process.pid == 1


def test_owners_with_different_programs_are_called_ambiguous_and_all_listed():
    one, first = engine(), flow()
    say(one, started(first))
    both = (owner(1, path="/usr/bin/a"), owner(2, path="/usr/bin/b"))
    (report,) = say(one, LookedUp(first.id, Finding(Match.EXACT, both), first.started_ns))
    assert report.verdict.binding.reason is Reason.AMBIGUOUS
    assert len(report.verdict.binding.owners) == 2


def test_a_connection_older_than_the_watch_keeps_the_owner_of_the_first_look():
    one, first = engine(), flow(midstream=True)
    socket = GuestSocket(Transport.TCP, "ESTABLISHED", first.tuple.local, first.tuple.remote, (owner(3),), 1, 0xFFFF)
    say(one, SnapshotTaken(Snapshot(0, (owner(3).process,), (socket,))))
    say(one, started(first))
    (report,) = say(one, LookedUp(first.id, Finding(Match.NONE, reason=Reason.TIME_WAIT, final=True), first.started_ns))
    assert report.verdict.binding.process.pid == 3


def test_what_the_first_look_saw_is_forgotten_when_the_tuple_is_used_again():
    one, old, new, later = engine(), flow(1, midstream=True), flow(2), flow(3, midstream=True)
    socket = GuestSocket(Transport.TCP, "ESTABLISHED", old.tuple.local, old.tuple.remote, (owner(3),), 1, 0xFFFF)
    say(one, SnapshotTaken(Snapshot(0, (owner(3).process,), (socket,))))
    for each in (new, later):
        say(one, started(each))
        finding = Finding(Match.NONE, reason=Reason.TIME_WAIT, final=True)
        (report,) = say(one, LookedUp(each.id, finding, each.started_ns))
    assert report.verdict.binding.reason is Reason.TIME_WAIT
    assert report.verdict.binding.process is None


def test_the_queues_are_empty_when_all_flows_have_ended():
    one = engine()
    for number in range(100):
        each = flow(number)
        say(one, started(each))
        say(one, LookedUp(each.id, Finding(Match.EXACT, (owner(),)), each.started_ns))
        say(one, ended(each, each.started_ns + MS))
    assert not one.records
    assert one.next_due_ns is None
