"""The loop of one guest: what the guest or we ourselves do wrong is told, and never looks like a quiet guest."""

import pytest

from appliance.engine import Engine
from appliance.errors import GuestGone, Implausible
from appliance.model import Evidence, Finding, FlowStarted, GuestInfo, GuestPort, Match, Reason, Snapshot, TapStats
from appliance.watch import CHECK_NS, STILL_NS, GuestWatch
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
