"""The memory eye through a guest's life: when its kernel is looked for, and that no dead kernel is believed."""

import threading
from collections import Counter
from concurrent.futures import Future

import pytest

from appliance.errors import GuestGone, PermissionRefused, UnsupportedGuest
from appliance.model import Change, GuestState
from appliance.sight import BRISK_STILL_NS, CHECK_NS, FULL_NS, MAX_RETRY_NS, STILL_NS, YOUNG_NS, Sight, Slots
from tests.test_watch import Eye

SECOND = CHECK_NS
NOTHING = UnsupportedGuest(("no running x86-64 Linux kernel was found in its memory",))


class World:
    """A guest's machine: what attaching finds there, the CPU seconds it has used, and time, which passes in steps."""

    def __init__(self, eye=None, *, step_ns=SECOND // 10, **more):
        self.now_ns, self.step_ns = 1000 * SECOND, step_ns
        self.finds, self.tries, self.worked_s, self.works = None, [], 0.0, False
        self.said, self.errors = [], Counter()
        self.sight = Sight("qemu:1", eye, self.attach, self.now_ns, tell=self.said.append, errors=self.errors, **more)

    def attach(self):
        self.tries.append(self.now_ns)
        if isinstance(self.finds, Exception):
            raise self.finds
        return self.finds() if callable(self.finds) else self.finds

    def work_s(self):
        return self.worked_s

    def live(self, seconds):
        """Let time pass; how often another eye was adopted."""
        adopted, end_ns = 0, self.now_ns + round(seconds * SECOND)
        while self.now_ns < end_ns:
            self.now_ns += self.step_ns
            self.worked_s += self.step_ns / SECOND if self.works else 0.0
            adopted += self.sight.look(self.now_ns)
        return adopted

    @property
    def gaps_s(self):
        return [(b - a) / SECOND for a, b in zip(self.tries, self.tries[1:], strict=False)]


def ticking():
    return Eye()


def still(pulse=7):
    return Eye(pulse=pulse)


# -- a young machine --


def test_a_young_machine_is_tried_every_second_and_an_old_one_less_and_less():
    young = World(young=True)
    young.finds = NOTHING
    young.live(30)
    assert max(young.gaps_s) <= 1.2
    old = World()
    old.finds = NOTHING
    old.live(900)
    assert old.gaps_s == sorted(old.gaps_s)
    assert old.gaps_s[0] <= 4.2
    assert old.gaps_s[-1] >= 200
    assert all(gap <= MAX_RETRY_NS / SECOND + 1 for gap in old.gaps_s)


def test_a_machine_that_stays_without_a_kernel_is_left_in_peace_when_it_is_no_longer_young():
    one = World(young=True, silent=False)
    one.finds = NOTHING
    one.live(YOUNG_NS / SECOND + 900)
    assert one.gaps_s[-1] > 100
    assert [line.partition(": ")[2][:38] for line in one.said] == [
        "no kernel can be read in it yet; watch",
        "this guest's kernel cannot be read: no",
    ]


def test_what_a_kernel_has_found_is_adopted_within_two_seconds_of_its_being_there():
    one = World(young=True, silent=False)
    one.finds = NOTHING
    one.live(47.3)
    one.finds = ticking
    since_ns = one.now_ns
    while not one.live(0.1):
        assert one.now_ns - since_ns < 2 * SECOND
    assert "a fake, attached in" in one.said[-1]


def test_a_try_that_costs_much_is_made_less_often(monkeypatch):
    one = World(young=True)

    def slowly():
        spent[0] += 0.7  # seconds of CPU
        raise NOTHING

    spent = [0.0]
    monkeypatch.setattr("appliance.sight.time.thread_time", lambda: spent[0])
    one.finds = slowly
    one.live(60)
    assert min(one.gaps_s) >= 4 * 0.7


def test_a_young_machine_is_mostly_only_glanced_at():
    glances = []
    one = World(young=True, glance=lambda: glances.append(1))
    one.finds = NOTHING
    one.live(60)
    assert len(glances) > 40
    assert 4 <= len(one.tries) <= 60 / (FULL_NS / SECOND)


def test_a_machine_that_does_nothing_is_not_tried_twice_and_one_that_wakes_is_at_once():
    one = World(young=True, work_s=lambda: one.worked_s)
    one.finds = NOTHING
    one.live(60)
    assert len(one.tries) == 1
    one.works = True
    one.finds = ticking
    assert one.live(2) == 1


def test_a_guest_that_comes_in_is_not_attached_to_before_it_is_all_here():
    one = World(young=True)
    one.finds = ticking
    one.sight.learn_state(GuestState.INCOMING, one.now_ns)
    one.live(30)
    assert one.tries == []
    one.sight.learn_state(GuestState.RUNNING, one.now_ns)
    assert one.live(0.2) == 1
    eye = one.sight.eye
    one.sight.learn_state(GuestState.INCOMING, one.now_ns)
    assert eye.closed
    assert World(young=True, state=GuestState.INCOMING, silent=False).live(10) == 0


def test_attaching_that_hangs_keeps_no_other_guest_waiting_for_ever():
    slots, hanging, done = Slots(count=2, seconds=0.2), threading.Event(), []

    def hang():
        with slots.take():
            hanging.wait(60)

    def go():
        with slots.take():
            done.append(1)

    threads = [threading.Thread(target=work) for work in (hang, hang, go)]
    for thread in threads:
        thread.start()
    threads[2].join(60)
    assert done == [1]
    hanging.set()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize("change", [Change.RESUMED, Change.MIGRATED])
def test_a_guest_that_goes_on_is_tried_at_once(change):
    one = World()
    one.finds = NOTHING
    one.live(600)
    one.finds = ticking
    one.sight.hint(change, one.now_ns)
    assert one.live(0.2) == 1


def test_what_the_host_refuses_is_told_at_once_and_once():
    one = World(young=True, silent=False)
    one.finds = PermissionRefused("not allowed; run as root")
    one.live(600)
    assert one.said == ["qemu:1: not allowed; run as root; watching its packets only"]


# -- pauses, reboots, reverts --


def test_a_paused_guest_keeps_its_eye_and_is_not_attached_to_while_that_is_known():
    one = World(still())
    one.sight.learn_state(GuestState.PAUSED, one.now_ns)
    one.finds = still
    one.live(600)
    assert one.tries == []
    assert one.sight.eye is not None
    one.sight.learn_state(GuestState.RUNNING, one.now_ns)
    one.live(STILL_NS / SECOND - 1)
    assert one.tries == []


def test_a_guest_that_may_be_paused_is_looked_at_less_and_less():
    one = World(still(), work_s=lambda: 0.0)
    one.finds = still
    one.live(900)
    assert 0 < len(one.tries) < 10
    assert not one.sight.eye.closed
    assert one.said == []


def test_a_kernel_that_stands_still_in_a_machine_that_works_is_over():
    """A reboot of which nobody told: what is left of the old kernel in RAM is not believed again."""
    eye = still()
    one = World(eye, work_s=lambda: one.worked_s)
    one.works, one.finds = True, still
    one.live(BRISK_STILL_NS / SECOND + 3)
    assert eye.closed
    assert one.sight.eye is None
    one.live(20)
    assert one.sight.eye is None
    assert max(one.gaps_s) <= 1.3
    one.finds = ticking
    assert one.live(1.2) == 1
    assert one.said == ["qemu:1: its kernel does not run any more", "qemu:1: a fake, attached again"]


def test_after_a_reboot_that_was_told_the_old_kernel_is_not_read_any_more_and_the_new_one_as_soon_as_it_runs():
    eye = ticking()
    one = World(eye)
    one.live(5)
    left = Eye(pulse=eye.beats + 1)  # its last pulse is the one that is read when the reboot is told
    one.finds = lambda: left
    one.sight.hint(Change.REBOOTED, one.now_ns)
    assert eye.closed
    one.live(30)
    assert one.sight.eye is None
    assert left.closed
    one.finds = ticking
    assert one.live(1.2) == 1


def test_a_clock_that_goes_backwards_is_another_kernel_or_another_time():
    eye = Eye(pulse=1000)
    one = World(eye)
    one.live(3)
    eye.pulse = 400
    one.finds = ticking
    assert one.live(1.2) == 1
    assert eye.closed


def test_what_a_try_found_that_began_before_the_revert_is_thrown_away():
    pending = []

    def aside(job):
        pending.append((job, Future()))
        return pending[-1][1]

    one = World(None, aside=aside, silent=False)
    one.live(0.2)
    assert one.sight.opening
    for _ in range(50):
        one.sight.hint(Change.REVERTED, one.now_ns)
        one.live(0.2)
    assert len(pending) == 1  # a guest that resets all the time has no more than one try
    assert one.sight.opening
    before, after = ticking(), ticking()
    pending[0][1].set_result(before)
    one.live(0.2)
    pending[1][1].set_result(after)
    assert one.live(0.2) == 1
    assert before.closed
    assert one.sight.eye is after


def test_an_eye_that_is_found_when_the_watch_is_over_is_closed():
    future = Future()
    one = World(None, aside=lambda job: future, silent=False)
    one.live(0.2)
    one.sight.close()
    late = ticking()
    future.set_result(late)
    assert late.closed


def test_a_guest_that_is_gone_while_it_is_looked_at_costs_the_eye_only():
    eye = ticking()
    one = World(eye)
    with one.sight.guard("look-up"):
        raise GuestGone("process 1 has ended")
    assert eye.closed
    assert one.errors == {"gone": 1}


def test_a_defect_while_attaching_is_not_taken_for_a_guest_that_cannot_be_read():
    one = World(silent=False)
    one.finds = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        one.live(1)


def test_a_clock_that_is_set_back_by_hours_does_not_stop_the_tries():
    one = World()
    one.finds = NOTHING
    one.live(10)
    one.now_ns -= 7200 * SECOND
    tries = len(one.tries)
    one.live(10)
    assert len(one.tries) > tries
