"""The heartbeat: for guests whose thread makes progress, each by itself."""

from appliance.pacemaker import HANGS_S, Pacemaker


class Guest:
    def __init__(self, error=None):
        self.turns, self.beats, self.error = 0, 0, error

    def count(self):
        return self.turns

    def beat(self):
        self.beats += 1
        if self.error:
            raise self.error


def test_a_guest_whose_thread_hangs_is_given_up_and_taken_up_again_when_it_goes_on():
    now_s, guest = [100.0], Guest()
    heart = Pacemaker(lambda: now_s[0])
    heart.add(guest.count, guest.beat)
    heart.beat()
    now_s[0] += HANGS_S
    heart.beat()
    now_s[0] += 0.1
    heart.beat()
    assert guest.beats == 2
    guest.turns += 1
    heart.beat()
    assert guest.beats == 3


def test_a_kernel_that_refuses_a_beat_costs_no_other_guest_its_own():
    sick, well = Guest(OSError("out of memory")), Guest()
    heart = Pacemaker()
    for guest in (sick, well):
        heart.add(guest.count, guest.beat)
    heart.beat()
    heart.beat()
    assert (sick.beats, well.beats) == (2, 2)


def test_a_guest_that_has_gone_is_not_beaten_for_and_the_others_are():
    gone, stays = Guest(), Guest()
    heart = Pacemaker()
    for guest in (gone, stays):
        heart.add(guest.count, guest.beat)
    heart.beat()
    heart.remove(gone.beat)
    heart.beat()
    assert (gone.beats, stays.beats) == (1, 2)
