"""The loop of one guest: what the guest or we ourselves do wrong is told, and never looks like a quiet guest."""

import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest

from appliance.engine import Engine
from appliance.errors import GuestGone, HostError, Implausible
from appliance.lately import Lately
from appliance.model import (
    Act,
    Change,
    Decision,
    Decoy,
    Evidence,
    Finding,
    FlowStarted,
    GuestInfo,
    GuestPort,
    HoldPolicy,
    Judgement,
    Match,
    Reason,
    RuleRef,
    Snapshot,
    TapStats,
)
from appliance.sight import STILL_NS
from appliance.watch import AGAIN_NS, CHECK_NS, MAX_PUT_OFF, GuestWatch
from tests.respond.desks import eventually
from tests.worlds.nouns import VM, NoNames, Verbatim, flow, owner

LIVE = GuestInfo(VM, 4242, ports=(GuestPort("tap1"),))


class Clock:
    now_ns = 1_000_000_000

    def __call__(self):
        self.now_ns += 1_000_000
        return self.now_ns


class Tap:
    """Tells one batch of events per poll, then nothing; the port is gone after ``lasts`` polls."""

    def __init__(self, *batches, lasts=1_000_000):
        self.batches, self.lasts, self.closed = list(batches), lasts, False

    vm = VM

    def poll(self, timeout_s):
        self.lasts -= 1
        return self.batches.pop(0) if self.batches else []

    @property
    def exhausted(self):
        return self.lasts <= 0

    def stats(self):
        return TapStats(packets=1, flows=1)

    def close(self):
        self.closed = True
        return []


class Eye:
    os, live, describe = "linux", True, "a fake"

    def __init__(self, finding=None, error=None, pulse=None):
        self.finding, self.error, self.closed, self.beats = finding, error, False, 0
        self.pulse = pulse

    def read_snapshot(self):
        return Snapshot(0, (), ())

    def find_owner(self, flow_):
        if self.error:
            raise self.error
        return self.finding

    def find_foreign(self, process):
        return (Evidence("x"),)

    def read_pulse(self):
        self.beats += 1
        return self.beats if self.pulse is None else self.pulse

    def close(self):
        self.closed = True


def started(number=1):
    one = flow(number)
    return FlowStarted(one, one.started_ns)


def watch(tap, eye, *, info=LIVE, polls=50, **more):
    reports, said, left = [], [], [polls]
    one = GuestWatch(info, tap, eye, Engine(Verbatim(), NoNames()), reports.append, Clock(), tell=said.append, **more)

    def stop():
        left[0] -= 1
        return left[0] < 0

    one.run(stop)
    return one.summary, reports, said


def test_a_flow_is_looked_up_and_reported():
    summary, reports, _ = watch(Tap([started()]), Eye(Finding(Match.EXACT, (owner(),))))
    assert [verdict.binding.process.pid for verdict in reports] == [100]
    assert summary.bound == {"exact": 1}
    assert not summary.ended


def test_a_guest_that_lies_is_counted_and_watched_on():
    summary, reports, _ = watch(Tap([started()]), Eye(error=Implausible("a list of 2**60 entries")), polls=3000)
    assert summary.guest_errors["look-up: Implausible"] >= 1
    assert not summary.ended
    assert [verdict.binding.reason for verdict in reports] == [Reason.TORN]


def test_a_guest_whose_memory_is_gone_is_watched_by_its_packets():
    eye = Eye(error=GuestGone("process 4242 has ended"))
    summary, reports, said = watch(Tap([started(1)], [started(2)]), eye, polls=3000)
    assert eye.closed
    assert any("packets only" in line for line in said)
    assert reports[-1].binding.reason is Reason.NO_MEMORY
    assert not summary.ended


def test_a_defect_of_ours_is_told_and_does_not_look_like_a_quiet_guest():
    tap = Tap([started()])
    summary, _, said = watch(tap, Eye(error=KeyError("cmd")))
    assert summary.defect
    assert "KeyError" in summary.ended
    assert any("report it" in line for line in said)
    assert tap.closed


def test_a_port_that_goes_away_ends_the_watch_with_a_word():
    summary, _, said = watch(Tap(lasts=3), Eye())
    assert "gone" in summary.ended
    assert said


def test_a_capture_that_is_read_to_its_end_is_no_loss():
    summary, _, _ = watch(Tap(lasts=3), Eye(), info=GuestInfo(VM))
    assert not summary.ended


def test_a_guest_that_has_ended_ends_its_watch():
    summary, _, _ = watch(Tap(), Eye(), runs=lambda: False, polls=2000)
    assert summary.ended == "the guest has ended"


def test_a_paused_guest_keeps_its_eye_and_nothing_is_said_again_and_again():
    stopped = Eye(pulse=7)
    polls = 5 * STILL_NS // 1_000_000
    _, _, said = watch(Tap(), stopped, reopen=lambda: Eye(pulse=7), polls=polls)
    assert said == []


def test_an_image_does_not_tick_and_is_believed_all_the_same():
    image = Eye(Finding(Match.EXACT, (owner(),)), pulse=7)
    image.live = False
    silence = [[] for _ in range(2 * STILL_NS // 1_000_000)]
    _, reports, _ = watch(Tap(*silence, [started()]), image, polls=3 * STILL_NS // 1_000_000)
    assert reports[0].binding.match is Match.EXACT


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_kernel_that_stopped_ticking_is_looked_for_again(comes_back):
    stopped, fresh = Eye(pulse=7), Eye(Finding(Match.EXACT, (owner(9),)))
    tries = []

    def reopen():
        tries.append(1)
        return fresh if comes_back else None

    polls = (STILL_NS + 3 * CHECK_NS) // 1_000_000
    summary, _, _ = watch(Tap(), stopped, reopen=reopen, polls=polls)
    assert stopped.closed
    assert len(tries) == 1 if comes_back else len(tries) >= 1
    assert fresh.closed == comes_back
    assert not summary.ended


def test_a_fresh_kernel_that_lies_at_once_costs_an_eye_and_not_the_watch():
    stopped, fresh = Eye(pulse=7), Eye()

    def lie():
        raise Implausible("a clock that stands at 2**64")

    fresh.read_pulse = lie
    summary, _, said = watch(Tap(), stopped, reopen=lambda: fresh, polls=(STILL_NS + 3 * CHECK_NS) // 1_000_000)
    assert not summary.ended, said
    assert stopped.closed
    assert fresh.closed
    assert summary.guest_errors["pulse: Implausible"] >= 1


def test_a_clock_that_is_set_back_does_not_hide_that_the_guest_has_ended():
    clock, runs = Clock(), []

    def ended():
        runs.append(1)
        if len(runs) == 1:
            clock.now_ns -= 3600 * 10**9  # as the host's time is corrected
        return len(runs) < 3

    clock.now_ns = 7200 * 10**9
    left = [5000]

    def stop():
        left[0] -= 1
        return left[0] < 0

    one = GuestWatch(LIVE, Tap(), Eye(), Engine(Verbatim(), NoNames()), print, clock, runs=ended)
    one.run(stop)
    assert one.summary.ended == "the guest has ended"


# -- its memory is attached to while it is watched --


class Later:
    """Does what it is asked to when the test says so."""

    def __init__(self):
        self.asked = []

    def __call__(self, job):
        self.asked.append((job, Future()))
        return self.asked[-1][1]

    def do(self):
        job, future = self.asked.pop(0)
        future.set_result(job())


def watch_while(steps, tap, eye=None, **more):
    """Run a watch; ``steps``: by the count of turns, what is done before it."""
    reports, said = [], []
    engine = Engine(Verbatim(), NoNames(), tags=("db",))
    one = GuestWatch(LIVE, tap, eye, engine, reports.append, Clock(), tell=said.append, **more)

    def stop():
        steps.get(one.count_turns(), lambda watch: None)(one)
        return one.count_turns() >= max(steps)

    one.run(stop)
    return one, reports, said


def test_a_connection_that_begins_while_the_memory_is_being_attached_to_gets_its_process():
    later, eye = Later(), Eye(Finding(Match.EXACT, (owner(),)))
    steps = {20: lambda watch: later.do(), 400: lambda watch: None}
    _, reports, _ = watch_while(steps, Tap([], [started()]), reopen=lambda: eye, aside=later, silent=False)
    assert [verdict.binding.match for verdict in reports] == [Match.EXACT]


def test_where_no_memory_can_be_attached_to_that_is_the_reason_and_nobody_waits_for_it():
    later = Later()
    steps = {20: lambda watch: later.do(), 4000: lambda watch: None}
    _, reports, _ = watch_while(steps, Tap([], [started()]), reopen=lambda: None, aside=later, silent=False)
    assert [verdict.binding.reason for verdict in reports] == [Reason.NO_MEMORY]


def test_after_a_revert_no_owner_is_named_by_what_was_read_before_it():
    old, new = Eye(Finding(Match.EXACT, (owner(7),))), Eye(Finding(Match.EXACT, (owner(8),)))
    later = Later()
    tap = Tap(*[[]] * 10, [started()])
    steps = {5: lambda watch: watch.hint(Change.REVERTED), 30: lambda watch: later.do(), 400: lambda watch: None}
    _, reports, said = watch_while(steps, tap, old, reopen=lambda: new, aside=later)
    assert [verdict.binding.process.pid for verdict in reports] == [8]
    assert old.closed
    assert any("reverted" in line for line in said)


def test_a_kernel_that_has_just_begun_is_looked_at_again_while_it_grows():
    eye, looks = Eye(), []
    eye.read_snapshot = lambda: looks.append(1) or Snapshot(0, (), ())
    steps = {AGAIN_NS[-1] // 1_000_000 + 1000: lambda watch: None}
    watch_while(steps, Tap(), reopen=lambda: eye, young=True, silent=False)
    assert len(looks) == 1 + len(AGAIN_NS)


def test_ports_and_tags_that_change_reach_the_tap_and_the_rules_at_once():
    seen, policies = [], []

    def policy(system, tags):
        policies.append((system, tags))
        return HoldPolicy(incoming="web" in tags)

    hand = Hand()
    more = {"ports": lambda *, changed: seen.append(changed), "policy": policy, "hand": hand, "hold": HoldPolicy()}
    renamed = replace(LIVE, ports=(*LIVE.ports, GuestPort("tap2")), tags=("web",))
    steps = {
        3: lambda watch: watch.renew(renamed),
        6: lambda watch: watch.renew(replace(renamed, tags=("db",))),
        8: lambda watch: watch.hint(Change.DEVICES),
        12: lambda watch: None,
    }
    watch_while(steps, Tap(), Eye(), **more)
    assert seen == [False, True, True]
    assert policies[-2:] == [("linux", ("web",)), ("linux", ("db",))]
    assert [policy.incoming for policy in hand.policies[-3:]] == [False, True, False]


def test_a_watch_that_is_told_to_end_says_why():
    one, _, said = watch_while({3: lambda watch: watch.end("it is not wanted any more"), 99: lambda watch: None}, Tap())
    assert one.summary.ended == "it is not wanted any more"
    assert said[-1].endswith("the watch has ended: it is not wanted any more")


# -- with a hand --


class Enforced:
    """Denies everything, and asks for these actions."""

    version = "test"

    def __init__(self, *actions):
        self.actions = actions

    def judge(self, subject):
        return Judgement(Decision.DENY, RuleRef("test.yaml", 1, "test"), True, actions=self.actions, enforce=True)


class Hand:
    """Remembers what it was asked to do; refuses what it is told to refuse."""

    def __init__(self, *, refuses=(), fails=False):
        self.done, self.refuses, self.fails, self.policies = [], refuses, fails, []

    def _do(self, what, flow_id, *more):
        if self.fails:
            raise HostError("the map is full")
        self.done.append((what, flow_id.number, *more))
        return what not in self.refuses

    def hold_new(self, policy):
        self.policies.append(policy)

    def release(self, flow):
        return self._do("release", flow)

    def block(self, flow, seconds=None, *, reset=False):
        return self._do("reset" if reset else "block", flow)

    def hold(self, flow, seconds, default):
        return self._do("hold", flow, seconds, default)

    def redirect(self, flow, decoy):
        return self._do("redirect", flow, decoy.name)


def held(number=1):
    return FlowStarted(flow(number), flow(number).started_ns, held=True)


def watch_with(hand, *events, actions=(), decoys=None, polls=50, eye=None):
    eye, reports, said = eye or Eye(Finding(Match.EXACT, (owner(),))), [], []
    engine, left = Engine(Enforced(*actions), NoNames()), [polls]
    more = {"hand": hand, "hold": HoldPolicy(), "decoys": decoys or {}}
    one = GuestWatch(LIVE, Tap(*events), eye, engine, reports.append, Clock(), tell=said.append, **more)

    def stop():
        left[0] -= 1
        return left[0] < 0

    one.run(stop)
    return one.summary, reports, said


def test_the_hand_holds_from_the_first_look_on_and_does_what_the_rules_say():
    hand = Hand()
    summary, reports, said = watch_with(hand, [held(1), started(2)])
    assert hand.policies == [HoldPolicy()]
    assert hand.done == [("block", 1), ("reset", 2)]
    assert summary.acts == {"block": 1, "reset": 1}
    assert [verdict.handling.act for verdict in reports] == [Act.BLOCK, Act.RESET]
    assert said == []


def test_a_redirect_goes_to_its_decoy_and_an_unknown_decoy_is_told_and_blocks():
    trap = Decoy("trap", GuestPort("decoy0"), "02:00:00:00:00:09")
    hand = Hand()
    watch_with(hand, [held()], actions=("redirect:trap",), decoys={"trap": trap})
    assert hand.done == [("redirect", 1, "trap")]
    hand = Hand()
    summary, reports, said = watch_with(hand, [held()], actions=("redirect:trap",))
    assert hand.done == [("block", 1)]
    assert any("trap" in line for line in said)
    assert summary.acts_failed == 1
    assert reports[0].handling.act is Act.BLOCK


def test_a_flow_that_a_person_decides_on_is_held_with_its_deadline():
    hand = Hand()
    watch_with(hand, [held()], actions=("hold",))
    assert hand.done == [("hold", 1, 60.0, Decision.ALLOW)]


def test_a_host_that_refuses_is_told_once_and_the_watch_goes_on():
    summary, reports, said = watch_with(Hand(fails=True), [held(1), held(2)])
    assert summary.acts_failed == 2
    assert not summary.ended
    assert [verdict.handling.done for verdict in reports] == [False, False]
    assert len([line for line in said if "the map is full" in line]) == 1


def test_without_a_hand_the_same_rules_only_report():
    summary, reports, said = watch_with(None, [started(1)], [started(2)])
    assert [verdict.handling for verdict in reports] == [None, None]
    assert (summary.acts, summary.acts_failed, said) == ({}, 0, [])


def test_nobody_waits_while_foreign_code_is_looked_for():
    """Every flow at hand is answered before the first search; then the searches are made up for."""
    order, hand, eye = [], Hand(), Eye()
    hand._do = lambda what, flow_id, *more: order.append(what) or True
    eye.find_owner = lambda one: Finding(Match.EXACT, (owner(one.id.number),))
    eye.find_foreign = lambda process: order.append("search") or ()
    _, reports, _ = watch_with(hand, [held(1)], [held(2)], [held(3)], eye=eye)
    assert order == ["block"] * 3 + ["search"] * 3
    assert len(reports) == 3


def test_a_search_is_not_put_off_for_ever():
    order, hand, eye = [], Hand(), Eye()
    hand._do = lambda what, flow_id, *more: order.append(what) or True
    eye.find_owner = lambda one: Finding(Match.EXACT, (owner(one.id.number),))
    eye.find_foreign = lambda process: order.append("search") or ()
    watch_with(hand, *([held(number)] for number in range(200)), eye=eye, polls=1000)
    assert order.index("search") < 150
    assert order.count("search") == 200


def test_searches_that_are_too_many_are_left_out_and_counted():
    eye = Eye()
    eye.find_owner = lambda one: Finding(Match.EXACT, (owner(one.id.number),))
    burst = [held(number) for number in range(MAX_PUT_OFF + 50)]
    summary, reports, _ = watch_with(Hand(), burst, eye=eye, polls=1000)
    assert len(reports) == MAX_PUT_OFF + 50
    assert summary.guest_errors == {"evidence: too much to look for": 50}


def test_what_was_put_off_is_done_before_the_watch_ends():
    hand = Hand()
    _, reports, _ = watch_with(hand, [held(1)], [held(2)], polls=2)
    assert len(reports) == 2


@pytest.mark.parametrize(
    ("error", "closed"),
    [(KeyError("x"), False), (HostError("the counters are gone"), False), (GuestGone("the guest has ended"), True)],
)
def test_where_a_network_shall_fail_closed_an_error_of_ours_leaves_the_tap_on_the_port(error, closed):
    abandoned = []

    def runs():
        raise error

    tap = Tap()
    more = {"hand": Hand(), "hold": HoldPolicy(), "abandon": lambda: abandoned.append(1)}
    summary, _, said = watch(tap, Eye(), runs=runs, **more)
    assert (tap.closed, abandoned) == (closed, [] if closed else [1])
    assert any("stop --clean" in line for line in said) is not closed
    assert str(error) in summary.ended
    assert summary.tap.packets == 1


def test_an_error_of_ours_shuts_no_network_in_which_nothing_waits_for_us():
    def runs():
        raise KeyError("x")

    abandoned, tap = [], Tap()
    watch(tap, Eye(), runs=runs, hand=Hand(), abandon=lambda: abandoned.append(1))
    assert (tap.closed, abandoned) == (True, [])


def test_tags_that_come_later_are_enforced_and_shut_the_network_when_we_fail():
    abandoned, tap, hold = [], Tap(), HoldPolicy()

    def policy(os, tags):
        return hold if "web" in tags else None

    one = GuestWatch(
        LIVE, tap, Eye(), Engine(Verbatim(), NoNames()), print, Clock(), hand=Hand(), policy=policy,
        runs=lambda: [1][one.enforces], abandon=lambda: abandoned.append(1),
    )  # fmt: skip
    assert not one.enforces
    one.renew(replace(LIVE, tags=("web",)))
    one.run(lambda: False)
    assert abandoned == [1]


def test_a_last_port_that_goes_ends_the_watch_with_a_word_although_that_was_told_before():
    tap, said = Tap(lasts=3), []
    one = GuestWatch(LIVE, tap, Eye(), Engine(Verbatim(), NoNames()), print, Clock(), tell=said.append)
    one.renew(replace(LIVE, ports=()))
    one.run(lambda: False)
    assert one.summary.ended == "its ports are gone"


def test_a_question_that_takes_long_keeps_nobody_waiting_and_its_answer_is_told_later():
    answers, go_on = [], threading.Event()
    runs = Lately(lambda: go_on.wait(60) and False, first=True)
    for _ in range(3):
        answers.append(runs())
    assert answers == [True, True, True]
    go_on.set()
    eventually(lambda: not runs())
