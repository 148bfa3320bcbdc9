"""What is watched follows what runs: a hypervisor that is played, and real threads that watch its guests."""

import contextlib
import fcntl
import itertools
import os
import resource
import socket
import threading
import time
from dataclasses import replace

import pytest

from appliance.assembly import Watched, _check_same
from appliance.crowd import Crowd
from appliance.engine import Engine
from appliance.errors import HostError
from appliance.front import Front
from appliance.hosts.inventory import Inventory
from appliance.life import Life
from appliance.model import Change, GuestChange, GuestId, GuestInfo, GuestPort, GuestState
from appliance.pacemaker import Pacemaker
from appliance.respond import Banning, ControlRoom, Mailbox, Words
from appliance.roster import AGAIN_S, PACE_S, SETTLE_S, Choice, Roster
from appliance.summary import Ledger, Summary
from appliance.watch import GuestWatch
from tests.respond.desks import eventually
from tests.test_watch import Eye, Tap
from tests.worlds.nouns import NoNames, Verbatim


def guest(name, life=1, *, port=True, **more):
    """A guest that no process on this host belongs to: what its source says is all there is."""
    uuid = f"11111111-2222-3333-4444-{name:>012}"
    ports = (GuestPort(f"tap-{name}-{life}"),) if port else ()
    return GuestInfo(GuestId(uuid, uuid, name, f"{uuid}-{life}"), ports=ports, **more)


class Source:
    """A hypervisor that is told what it runs."""

    name = "played"

    def __init__(self):
        self.guests, self.told, self.silent = [], [], False

    def find_guests(self):
        if self.silent:
            raise HostError("libvirt cannot be asked: it does not answer")
        return list(self.guests)

    def fileno(self):
        return -1

    def changes(self):
        return ()

    def close(self):
        pass


class SlowTap(Tap):
    """A port on which nothing happens; ``gone`` ends it."""

    gone = False

    def poll(self, timeout_s):
        time.sleep(0.002)
        return []

    @property
    def exhausted(self):
        return self.gone


class Hinting(Inventory):
    """Tells changes that the test makes up, without waiting."""

    def __init__(self, source):
        super().__init__([source])
        self.told = []

    def wait(self, timeout_s=0.0):
        told, self.told = tuple(self.told), []
        return told


class Host:
    """A host, and the roster that follows it, one look at a time."""

    def __init__(self, choice=None):
        self.source, self.said, self.now_s = Source(), [], 1000.0
        self.inventory = Hinting(self.source)
        self.tried = []
        self.opened, self.refuses, self.slow = [], {}, threading.Event()
        self.taps = {}
        self.stopping = threading.Event()
        self.room = ControlRoom(Words(str, str), Banning(time.time_ns, self.said.append), self.stopping.set)
        self.heart = Pacemaker()
        self.roster = Roster(
            self.inventory, choice or Choice(), self.begin, self.said.append, clock_s=lambda: self.now_s
        )

    def begin(self, info, young):
        if info.id.name == "threadless":
            raise RuntimeError("can't start new thread")

        def open_(life):
            self.tried.append(info.id.instance)
            if info.id.name in self.refuses:
                raise HostError(self.refuses[info.id.name])
            if info.id.name == "broken":
                raise ZeroDivisionError("a defect of ours")
            if info.id.name == "slow":
                self.slow.wait(60)
            tap = self.taps[info.id.instance] = SlowTap()
            engine, mailbox = Engine(Verbatim(), NoNames(), tags=info.tags), Mailbox()
            watch = GuestWatch(
                info, tap, Eye(), engine, print, time.time_ns, tell=self.said.append, serve=mailbox.serve
            )
            front = Front(watch, None, "played", 0, mailbox)
            self.opened.append(info.id.instance)
            return Watched(watch, front, None, "played", contextlib.ExitStack())

        life = Life(info, open_, self.room, self.heart, self.stopping.is_set, self.said.append, named=False)
        life.start()
        return life

    def look(self, *guests, passed_s=0.5):
        """What the roster does when these run; then every watch that was begun has come round."""
        self.source.guests = list(guests)
        self.now_s += passed_s
        self.roster.look(0)
        slow = [life for life in self.roster.lives() if life.info.id.name == "slow" and not self.slow.is_set()]
        eventually(lambda: all(life.begun for life in self.roster.lives() if life not in slow))

    def names(self):
        """Who is under watch, by what the people at the control socket see."""
        body = self.room.answer({"do": "status"}, "root")
        return sorted(one["name"] for one in body["guests"] if one["answers"])

    def settle(self):
        """Wait until the watches that were told to end have."""
        eventually(lambda: all(life.over for life in self.roster.lives() if life.sent_off))


@pytest.fixture
def host():
    made = Host()
    yield made
    made.stopping.set()
    made.slow.set()
    for life in made.roster.lives():
        life.join()


def test_guests_are_watched_as_they_come_and_not_any_more_when_they_have_gone(host):
    host.look()
    assert host.said == ["no guest to watch runs here yet; those that start will be watched"]
    host.look(guest("a"))
    host.look(guest("a"), guest("b"))
    assert host.names() == ["a", "b"]
    host.look(guest("b"))
    host.settle()
    assert host.names() == ["b"]
    assert host.opened == [guest("a").id.instance, guest("b").id.instance]


def test_another_life_of_a_guest_is_another_watch_of_its_new_ports(host):
    host.look(guest("a", 1))
    host.look(guest("a", 2))
    host.settle()
    host.look(guest("a", 2))
    lives = host.roster.lives()
    assert [life.info.ports[0].ifname for life in lives] == ["tap-a-2"]
    assert [life.info.id for life in host.roster.take_ended()] == [guest("a", 1).id]


def test_what_the_metadata_says_decides_also_while_a_guest_runs(host):
    host.look(guest("a", wanted=False), guest("b"))
    host.look(guest("a", wanted=False), guest("b"))
    assert host.names() == ["b"]
    assert len([line for line in host.said if "left out" in line]) == 1
    host.look(guest("a", wanted=True), guest("b", wanted=False))
    host.settle()
    assert host.names() == ["a"]
    assert any("asks for no watch any more" in line for line in host.said)


def test_where_guests_must_ask_for_it_only_those_that_do_are_watched():
    host = Host(Choice(opt_in=True))
    host.look(guest("a"), guest("b", wanted=True), guest("c", wanted=False))
    assert host.names() == ["b"]
    host.look(guest("b"))
    host.settle()
    assert host.names() == []


def test_a_named_guest_is_watched_again_in_each_of_its_lives_and_no_other_by_its_uuid():
    uuid = guest("a").id.uuid
    host = Host(Choice(uuids=frozenset({uuid})))
    host.look(guest("a", 1, manager="libvirt"), guest("b", manager="libvirt"))
    host.look()
    host.settle()
    host.look(guest("a", 2), guest("a", 3, manager="libvirt", wanted=False))  # the first was started by hand
    assert host.opened == [f"{uuid}-1", f"{uuid}-3"]
    host.stopping.set()


def test_a_guest_that_cannot_be_watched_is_told_once_and_tried_when_it_has_changed(host):
    host.refuses["a"] = "a has no port to watch"
    for _ in range(5):
        host.look(guest("a"), guest("b"))
    assert [line for line in host.said if "no port" in line] == ["a has no port to watch; it is not watched"]
    assert host.names() == ["b"]
    host.refuses.clear()
    host.look(guest("a"), guest("b"))
    assert host.names() == ["b"]
    host.look(guest("a", state=GuestState.PAUSED), guest("b"))
    assert host.names() == ["a", "b"]


def test_a_guest_that_keeps_us_waiting_keeps_no_other_waiting(host):
    host.look(guest("slow"), *(guest(f"g{number}") for number in range(20)))
    assert len(host.names()) == 20


def test_a_watch_that_ended_by_an_error_is_not_begun_again_and_again(host):
    host.look(guest("a"))
    host.taps[guest("a").id.instance].stats = None  # a defect of ours
    host.taps[guest("a").id.instance].gone = True
    eventually(lambda: host.roster.lives()[0].over)
    for _ in range(5):
        host.look(guest("a"))
    assert len(host.opened) == 1


def test_a_port_that_comes_later_is_waited_for_and_is_better_than_none(host):
    host.look(guest("b"))
    host.look(guest("a", port=False), passed_s=0)
    assert len(host.opened) == 1
    host.look(guest("a", port=False), passed_s=SETTLE_S)
    assert len(host.opened) == 2
    host.look(guest("a"))
    host.settle()
    host.look(guest("a"))
    assert [life.info.ports for life in host.roster.lives()] == [guest("a").ports]
    assert host.opened[1:] == [guest("a").id.instance] * 2


def test_a_hypervisor_that_does_not_answer_ends_no_watch_and_is_told_once(host):
    host.look(guest("a"))
    host.source.silent = True
    for _ in range(3):
        host.look()
    assert host.names() == ["a"]
    host.source.silent = False
    host.look(guest("a"))
    trouble = "libvirt cannot be asked: it does not answer"
    assert [line for line in host.said if trouble in line] == [trouble, f"no longer so: {trouble}"]


def test_a_watch_learns_what_is_told_of_its_guest(host):
    host.look(guest("a"), guest("b"))
    watches = {life.info.id.name: life.watched.watch for life in host.roster.lives()}
    host.inventory.told = [GuestChange(Change.REBOOTED, guest("a").id.uuid)]
    host.look(guest("a"), replace(guest("b"), tags=("web",)))
    eventually(lambda: any("it reboots" in line for line in host.said))
    eventually(lambda: watches["b"].info.tags == ("web",))
    assert not [line for line in host.said if "reboots" in line and guest("b").id.target in line]


def test_what_is_remembered_of_guests_that_come_and_go_is_bounded(host):
    for number in range(60):
        host.look(guest("a", number, wanted=None if number % 2 else False))
        host.settle()
    host.look()
    host.settle()
    host.look()
    assert len(host.roster.take_ended()) == 30
    assert all(len(held) <= 60 for held in (host.roster._lives, host.roster._refused, host.roster._portless_s))
    assert len(host.roster._refused) == len(host.roster._lives) == 0


def test_sums_of_many_lives_fit_and_nothing_is_lost_of_them():
    ledger = Ledger(max_lives=3, max_guests=2)
    for number in range(20):
        summary = Summary(f"qemu:{number}", torn=1, unshown=2, defect=number == 0)
        summary.verdicts["deny"] = 1
        ledger.add(guest(f"g{number % 5}", number).id, summary)
    told = ledger.all()
    assert len(told) == 3 + 2 + 1
    assert sum(one.lives for one in told) == sum(one.torn for one in told) == 20
    assert sum(one.verdicts["deny"] for one in told) == 20
    assert sum(one.unshown for one in told) == 40
    assert any(one.defect for one in told)


def test_a_descriptor_above_1023_is_waited_for():
    source = Source()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    reader, writer = os.pipe()
    try:
        high = fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, 1500)
        source.fileno, source.changes = lambda: high, lambda: (GuestChange(Change.STARTED),)
        with Inventory([source]) as inventory:
            assert inventory.wait(0) == ()
            os.write(writer, b"x")
            assert inventory.wait(0) == (GuestChange(Change.STARTED),)
        os.close(high)
    finally:
        os.close(reader)
        os.close(writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_source_with_a_defect_hides_no_guests_of_others_nor_what_it_told_before():
    broken, sound = Source(), Source()
    broken.guests, sound.guests = [guest("a")], [guest("b")]
    with Inventory([broken, sound]) as inventory:
        assert len(inventory.find_guests()) == 2
        broken.guests = None  # a defect of ours
        assert [one.id.name for one in inventory.find_guests()] == ["a", "b"]
        assert "a defect of Parasight" in inventory.troubles[0]


def test_a_guest_that_could_not_be_watched_is_tried_again_less_and_less_often(host):
    host.refuses["a"] = "too many open files"
    tries = []
    for _ in range(1200):
        before = len(host.tried)
        host.look(guest("a"))
        if len(host.tried) > before:
            tries.append(host.now_s)
    gaps = [round(b - a) for a, b in itertools.pairwise(tries)]
    assert gaps[:4] == sorted(gaps[:4])
    assert 5 <= gaps[0] <= 7
    assert max(gaps) > 100
    assert len([line for line in host.said if "too many open files" in line]) == 1
    host.refuses.clear()
    host.look(guest("a"), passed_s=AGAIN_S[1])
    assert host.names() == ["a"]


def test_a_port_that_is_unplugged_and_plugged_in_again_is_watched_again(host):
    host.look(guest("a"))
    host.taps[guest("a").id.instance].gone = True  # its only port
    eventually(lambda: host.roster.lives()[0].over)
    host.look(guest("a", port=False))
    host.look(guest("a", port=False), passed_s=SETTLE_S)
    host.look(guest("a"))
    host.settle()
    host.look(guest("a"))
    assert [life.info.ports for life in host.roster.lives()] == [guest("a").ports]
    assert host.names() == ["a"]


def test_a_port_that_was_made_anew_under_its_name_is_another_port(host):
    host.refuses["a"] = "its port is gone"
    host.look(replace(guest("a"), ports=(GuestPort("tap", ifindex=7),)))
    host.refuses.clear()
    host.look(replace(guest("a"), ports=(GuestPort("tap", ifindex=8),)))
    host.look(replace(guest("a"), ports=(GuestPort("tap", ifindex=8),)))
    assert host.names() == ["a"]


def test_where_a_tap_cannot_follow_its_ports_the_watch_is_opened_again_when_they_change(host):
    host.look(guest("a"))
    more = replace(guest("a"), ports=(*guest("a").ports, GuestPort("tap-new")))
    host.look(more)
    host.settle()
    host.look(more)
    assert [life.info.ports for life in host.roster.lives()] == [more.ports]
    assert len(host.opened) == 2


def test_a_domain_whose_process_is_found_later_is_not_watched_twice(host, monkeypatch):
    monkeypatch.setattr("appliance.roster.is_running", lambda info: True)  # libvirt says so of the domain
    host.look(guest("a"))
    host.look()
    assert host.names() == ["a"]
    host.inventory.has_process = lambda info: True
    host.look()
    host.settle()
    assert host.names() == []


def test_a_guest_for_which_there_is_no_thread_keeps_no_other_from_being_watched(host):
    host.look(guest("threadless"), guest("b"))
    assert host.names() == ["b"]
    assert any("can't start new thread" in line for line in host.said)


def test_a_defect_in_opening_a_guest_is_counted(host):
    host.look(guest("broken"))
    host.look(guest("broken"))
    (life,) = host.roster.take_ended()
    assert life.final().defect


def test_changes_that_never_end_do_not_have_the_host_looked_at_without_end(host):
    asked = []
    host.source.find_guests = lambda: asked.append(1) or []
    began_s = time.monotonic()
    running = threading.Thread(target=host.roster.run, args=(host.stopping.is_set,))  # `wait` always returns at once
    running.start()
    eventually(lambda: len(asked) > 3)
    host.stopping.set()
    running.join()
    assert len(asked) <= (time.monotonic() - began_s) / PACE_S + 2


def test_a_thread_that_hangs_keeps_nothing_from_its_end(host, monkeypatch):
    monkeypatch.setattr("appliance.life.PATIENCE_S", 0.2)
    host.look(guest("slow"), guest("b"))
    host.stopping.set()
    host.roster.run(host.stopping.is_set)
    assert [line for line in host.said if "hangs" in line] == [
        f"{guest('slow').id.target}: its watch hangs and is left behind; what it held is released with our end"
    ]


def test_a_watch_that_is_over_is_put_away_once_its_own_verdicts_were_shown(host):
    crowd = Crowd(None, host.room, host.heart, host.stopping.is_set, host.said.append)
    crowd._roster = host.roster
    host.look(guest("a"), guest("b"))
    over, other = host.roster.lives()
    crowd._offer(over, "a verdict")
    host.look(guest("b"))
    host.settle()
    host.look(guest("b"))
    crowd._offer(other, "there is always another verdict")
    crowd.retire()
    assert crowd._resting == [over]
    over.shown += 1
    crowd.retire()
    assert crowd._resting == []
    assert [one.vm for one in crowd.summaries()] == [guest("a").id.target]


def test_a_watch_that_a_person_began_by_its_process_learns_what_is_told_and_goes_on_whatever_its_metadata_says(host):
    life = host.begin(guest("a", manager="libvirt"), False)
    host.roster.accompany(life)
    eventually(lambda: life.begun)
    told = replace(guest("a", manager="libvirt"), tags=("web",), wanted=False)
    host.inventory.told = [GuestChange(Change.REBOOTED, guest("a").id.uuid)]
    host.look(replace(told, ports=(GuestPort("tap-new"),)))
    eventually(lambda: life.watched.watch.info.tags == ("web",))
    eventually(lambda: any("it reboots" in line for line in host.said))
    assert any("its ports are tap-new now" in line for line in host.said)
    host.look()
    assert not life.sent_off
    assert host.roster.lives() == []


@pytest.mark.parametrize(
    "info",
    [
        GuestInfo(GuestId("qemu:1"), ports=(GuestPort("lo", ifindex=4711),)),
        GuestInfo(GuestId("qemu:1"), ports=(GuestPort("lo", netns="/proc/0/ns/net", ifindex=1),)),
        GuestInfo(GuestId("qemu:1", instance="1-4711"), 1, hypervisor="qemu"),
    ],
    ids=["another port", "another namespace", "another process"],
)
def test_what_took_a_guests_place_while_it_was_opened_is_not_taken_for_it(info):
    with pytest.raises(HostError, match=r"another one by now|has ended"):
        _check_same(info)


def test_a_guest_is_what_it_was_while_it_was_opened():
    _check_same(GuestInfo(GuestId("qemu:1"), ports=(GuestPort("lo", ifindex=socket.if_nametoindex("lo")),)))


def test_nothing_is_begun_again_once_the_end_was_told(host):
    host.look(guest("a"))

    def ending():
        host.stopping.set()
        for life in host.roster.lives():
            life.join()
        return [guest("a")]

    host.source.find_guests = ending
    host.roster.run(host.stopping.is_set)
    assert host.opened == [guest("a").id.instance]


@pytest.mark.parametrize(("choice", "words"), [(Choice(), "are watched"), (Choice(opt_in=True), "are not watched")])
def test_what_an_unknown_metadata_leads_to_is_said(choice, words):
    host = Host(choice)
    host.source.silent = True
    host.look()
    assert [line for line in host.said if words in line]
