"""The control room: each request does what it says, in the guest's own thread, and says so when it could not."""

import contextlib
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.cli import contract
from appliance.errors import HostError, ParasightError, UsageError
from appliance.model import Act, GuestId
from appliance.respond import Banning, ControlRoom, NoAnswer, Words, spare
from appliance.respond.banfile import read_bans
from appliance.respond.room import MAX_ENDED
from tests.respond.desks import NOW_NS, PATIENCE_S, Clock, FakeDesk, Serving, eventually, verdict
from tests.worlds.nouns import VM

OTHER = GuestId("qemu:77", uuid="99999999-2222-3333-4444-555555555555", name="db-01")
PEER = ip_network("203.0.113.9")


class Setting:
    """A room with two guests, a clock that is told the time, and a state folder."""

    def __init__(self, folder, wait_s=PATIENCE_S):
        self.clock, self.told, self.stopped = Clock(), [], []
        self.path = folder / "bans.json"
        self.wait_s = wait_s
        self.desks = [FakeDesk(VM), FakeDesk(OTHER)]
        self.room = self.open()

    def open(self, spared=()):
        banning = Banning(self.clock, self.told.append, spared=spared, path=self.path, wait_s=self.wait_s)
        words = Words(contract.verdict, contract.iso)
        room = ControlRoom(words, banning, lambda: self.stopped.append(1), self.clock, version="1", wait_s=self.wait_s)
        for desk in self.desks:
            room.admit(desk)
        return room

    def ask(self, do, **keys):
        return self.room.answer({"do": do, **keys}, "ada")


@pytest.fixture
def world(tmp_path):
    made = Setting(tmp_path)
    with Serving(*made.desks) as serving:
        made.thread = serving.thread.ident
        yield made


def test_status_tells_every_guest(world):
    world.clock.sleep(12)
    body = world.ask("status")
    assert (body["uptime_s"], body["version"]) == (12.0, "1")
    first, second = body["guests"]
    assert (first["vm"], second["vm"], first["name"]) == ("qemu:4242", "qemu:77", "web-01")
    assert (first["rung"], first["acts"], first["answers"], first["trouble"]) == ("tc+ring", True, True, None)
    assert (first["flows"], first["held"], first["blocked"], first["banned"], first["uptime_s"]) == (7, 0, 2, 0, 12.0)


def test_everything_of_a_guest_is_done_by_its_own_thread(world):
    world.ask("status")
    world.ask("held")
    world.ask("ban", peer="203.0.113.9")
    world.ask("unban", peer="203.0.113.9")
    assert all(desk.threads == {world.thread} for desk in world.desks)


def test_a_guest_that_does_not_answer_is_told_and_the_others_are_seen(tmp_path):
    world = Setting(tmp_path, wait_s=0.05)
    with Serving(world.desks[1]):
        first, second = eventually(lambda: [g for g in [world.ask("status")["guests"]] if g[1]["answers"]])[0]
    assert (first["answers"], first["rung"], first["held"]) == (False, None, None)
    assert "busy" in first["trouble"]
    assert second["flows"] == 7


def test_a_guest_whose_watch_ended_early_does_not_vanish_without_a_word(world):
    world.room.dismiss(world.desks[0], "a defect\nTraceback ...")
    world.room.dismiss(world.desks[1])  # as it was to
    (body,) = world.ask("status")["guests"]
    assert (body["vm"], body["answers"], body["enforces"], body["uptime_s"]) == ("qemu:4242", False, None, None)
    assert body["trouble"] == "its watch has ended: a defect"
    world.room.admit(world.desks[0])
    assert [guest["answers"] for guest in world.ask("status")["guests"]] == [True]


def test_a_guest_that_is_watched_again_under_another_name_is_not_missed_any_more(world):
    world.room.dismiss(world.desks[0], "the guest has ended")
    again = FakeDesk(replace(VM, target="qemu:4343"))
    with Serving(again):
        world.room.admit(again)
        assert {one["vm"]: one["answers"] for one in world.ask("status")["guests"]} == {
            "qemu:77": True,
            "qemu:4343": True,
        }


def test_watches_that_are_over_are_told_of_within_bounds(world):
    for number in range(3 * MAX_ENDED):
        world.room.dismiss(world.desks[0], "a defect")
        world.desks[0].vm = GuestId(f"qemu:{number}", instance=str(number))
        world.room.admit(world.desks[0])
    world.room.dismiss(world.desks[0], "a defect")
    ended = [one["vm"] for one in world.ask("status")["guests"] if not one["answers"]]
    assert len(ended) == MAX_ENDED
    assert ended[-1] == f"qemu:{3 * MAX_ENDED - 1}"


def test_two_guests_that_have_one_uuid_are_both_kept_to_the_bans(world):
    twin = FakeDesk(replace(VM, target="qemu:4343", instance="4343-1"))
    with Serving(twin):
        world.room.admit(twin)
        world.ask("ban", peer="203.0.113.9", seconds=60)
        eventually(lambda: [desk.kernel for desk in (*world.desks, twin)] == [{PEER: 60.0}] * 3)
        world.room.dismiss(world.desks[0])
        world.ask("unban", peer="203.0.113.9")
        eventually(lambda: twin.kernel == {})


def test_a_list_of_held_flows_is_whole_or_none(tmp_path):
    world = Setting(tmp_path, wait_s=0.05)
    with pytest.raises(NoAnswer, match="qemu:4242"):
        world.ask("held")


def test_a_guest_that_does_not_answer_keeps_nobody_from_deciding_on_another(tmp_path):
    world = Setting(tmp_path, wait_s=0.5)
    wanted = contract.verdict_id(world.desks[1].hold(1))
    with Serving(world.desks[1]):
        with pytest.raises(NoAnswer, match="qemu:4242"):
            world.ask("decide", id=wanted[:6], allow=True)  # these digits may begin another id there
        eventually(lambda: decides(world, wanted) or world.desks[1].decided)
    assert [one[1:] for one in world.desks[1].decided] == [(True, "ada")]


def decides(world, wanted):
    with contextlib.suppress(NoAnswer):  # on a busy machine, the guest that answers may be late as well
        return world.ask("decide", id=wanted, allow=True)


def test_held_flows_are_told_most_urgent_first_in_words_of_the_contract(world):
    world.desks[0].hold(1, until_ns=NOW_NS + 9 * 10**9)
    world.desks[1].hold(2, until_ns=NOW_NS + 4 * 10**9)
    world.clock.sleep(1)
    late, soon = (contract.verdict(verdict(number)) for number in (1, 2))
    bodies = world.ask("held")
    assert bodies == [
        soon | {"deadline": contract.iso(NOW_NS + 4 * 10**9), "left_s": 3.0, "default": "deny"},
        late | {"deadline": contract.iso(NOW_NS + 9 * 10**9), "left_s": 8.0, "default": "deny"},
    ]


@pytest.mark.parametrize("allow", [True, False])
def test_a_decision_reaches_the_one_flow_that_was_named(world, allow):
    flows = [world.desks[0].hold(number) for number in range(3)]
    wanted = contract.verdict_id(flows[1])
    answer = world.ask("decide", id=wanted[:6], allow=allow)
    assert answer == {"id": wanted, "vm": "qemu:4242", "decision": "allow" if allow else "block", "who": "ada"}
    assert world.desks[0].decided == [(flows[1].flow.id, allow, "ada")]
    assert not world.desks[1].decided
    with pytest.raises(UsageError, match="waits for a decision"):
        world.ask("decide", id=wanted, allow=allow)


def test_a_decision_on_a_flow_that_has_just_run_out_is_told_so(world):
    wanted = contract.verdict_id(world.desks[0].hold(1))
    world.desks[0].decide = lambda *_: False
    with pytest.raises(UsageError, match="its time was up"):
        world.ask("decide", id=wanted, allow=True)


def test_a_prefix_of_several_ids_decides_nothing(world):
    many = [world.desks[0].hold(number) for number in range(400)]
    prefixes = [contract.verdict_id(one)[:1] for one in many]
    assert len(prefixes) > len(set(prefixes))
    with pytest.raises(UsageError, match="four digits"):
        world.ask("decide", id=prefixes[0], allow=True)
    world.desks[1].hold(399)  # the same verdict at another desk: ambiguous as well
    with pytest.raises(UsageError, match="several"):
        world.ask("decide", id=contract.verdict_id(many[399]), allow=True)
    assert not world.desks[0].decided


@pytest.mark.parametrize("act", [Act.BLOCK, Act.RESET, Act.RELEASE])
def test_an_act_on_a_flow_that_was_told_reaches_it(world, act):
    one = verdict(5)
    wanted = contract.verdict_id(one)
    world.room.known.remember(wanted, one.flow.id)
    assert world.ask(act.value, id=wanted[:8]) == {"id": wanted, "vm": "qemu:4242", "act": act.value, "done": True}
    assert world.desks[0].acts == [(one.flow.id, act, "ada")]


def test_an_act_on_a_flow_that_is_over_is_told_as_not_done(world):
    one = verdict(500)
    world.room.known.remember(contract.verdict_id(one), one.flow.id)
    assert world.ask("block", id=contract.verdict_id(one))["done"] is False


def test_an_act_on_a_flow_nobody_was_told_of_is_refused(world):
    with pytest.raises(UsageError, match="names no connection"):
        world.ask("block", id="abcdef")


def test_an_act_on_a_flow_reaches_its_guest_also_when_that_was_renamed_since(world):
    one = verdict(5)
    world.room.known.remember("abcdef012345", one.flow.id)
    world.desks[0].vm = replace(VM, name="web-02")
    assert world.ask("block", id="abcdef")["done"] is True
    world.desks[0].vm = replace(VM, instance="another life")
    with pytest.raises(UsageError, match="not under watch any more"):
        world.ask("block", id="abcdef")


def test_an_act_on_a_guest_that_has_gone_is_refused(world):
    one = verdict(5)
    world.room.known.remember("abcdef012345", one.flow.id)
    world.room.dismiss(world.desks[0])
    with pytest.raises(UsageError, match="not under watch any more"):
        world.ask("block", id="abcdef")


def test_only_so_many_ids_are_remembered(world):
    world.room.known._limit = 3
    for number in range(5):
        world.room.known.remember(f"{number:012x}", verdict(number).flow.id)
    assert world.room.known.find("000000000004")[1].number == 4
    with pytest.raises(UsageError, match="several"):
        world.room.known.find("0000")
    with pytest.raises(UsageError, match="names no"):
        world.room.known.find("000000000001")


def test_stop_stops(world):
    assert world.ask("stop")["stopping"] is True
    assert world.stopped == [1]


# -- bans --


def test_a_ban_reaches_every_guest_and_ends_by_itself(world):
    answer = world.ask("ban", peer="203.0.113.9", seconds=60, reason="scans us")
    assert [desk.kernel for desk in world.desks] == [{PEER: 60.0}] * 2
    assert answer["not_yet"] == []
    assert answer["replaced"] is None
    assert answer["ban"] == {
        "peer": "203.0.113.9/32",
        "guest": None,
        "since": contract.iso(NOW_NS),
        "until": contract.iso(NOW_NS + 60 * 10**9),
        "left_s": 60.0,
        "reason": "scans us",
        "who": "ada",
    }
    world.clock.sleep(59)
    world.room.tick()
    assert len(world.ask("bans")) == 1
    world.clock.sleep(1)
    assert world.ask("bans") == []
    world.room.tick()
    eventually(lambda: all(desk.kernel == {} for desk in world.desks))


def test_a_ban_without_end_has_none(world):
    answer = world.ask("ban", peer="2001:db8::/48")
    assert (answer["ban"]["until"], answer["ban"]["left_s"]) == (None, None)
    assert world.desks[0].kernel == {ip_network("2001:db8::/48"): None}
    world.clock.sleep(10**9)
    assert len(world.ask("bans")) == 1


@pytest.mark.parametrize("named", ["qemu:77", "db-01", OTHER.uuid, OTHER.uuid.upper()])
def test_a_ban_for_one_guest_reaches_only_that_one(world, named):
    answer = world.ask("ban", peer="203.0.113.9", guest=named)
    assert answer["ban"]["guest"] == "qemu:77"
    assert [desk.kernel for desk in world.desks] == [{}, {PEER: None}]
    assert [guest["banned"] for guest in world.ask("status")["guests"]] == [0, 1]


def test_a_guest_that_is_not_watched_cannot_be_named(world):
    with pytest.raises(UsageError, match="not under watch; say one of: qemu:4242, qemu:77"):
        world.ask("ban", peer="203.0.113.9", guest="qemu:5")


def test_unban_lifts_and_tells_what_still_covers_the_peer(world):
    world.ask("ban", peer="203.0.113.0/24", seconds=100)
    world.ask("ban", peer="203.0.113.9", seconds=10)
    assert world.desks[0].kernel[PEER] == 100.0
    with pytest.raises(UsageError, match=r"covered by the ban of 203\.0\.113\.0/24"):
        world.ask("unban", peer="203.0.113.8")
    answer = world.ask("unban", peer="203.0.113.9")
    assert [ban["peer"] for ban in answer["lifted"]] == ["203.0.113.9/32"]
    assert [ban["peer"] for ban in answer["still"]] == ["203.0.113.0/24"]
    assert world.desks[0].kernel == {ip_network("203.0.113.0/24"): 100.0}
    with pytest.raises(UsageError, match="not banned itself; it is covered"):
        world.ask("unban", peer="203.0.113.9")


def test_lifting_the_wide_ban_leaves_the_narrow_one_its_own_time(world):
    world.ask("ban", peer="203.0.113.0/24", seconds=100)
    world.ask("ban", peer="203.0.113.9", seconds=10)
    world.ask("unban", peer="203.0.113.0/24")
    assert world.desks[0].kernel == {PEER: 10.0}


def test_a_replaced_ban_is_told(world):
    world.ask("ban", peer="203.0.113.9", reason="first")
    answer = world.ask("ban", peer="203.0.113.9", seconds=5, reason="second")
    assert answer["replaced"]["reason"] == "first"
    assert world.desks[0].kernel == {PEER: 5.0}


def test_what_is_never_banned_is_refused_with_the_reason(world):
    world.room = world.open(spare())
    with pytest.raises(UsageError, match="never-ban list"):
        world.ask("ban", peer="0.0.0.0/0")
    assert world.ask("bans") == []
    assert world.desks[0].kernel == {}


def test_a_guest_that_comes_later_is_told_the_bans_that_stand(world):
    world.room.dismiss(world.desks[1])
    world.ask("ban", peer="203.0.113.9", seconds=60)
    assert world.desks[1].kernel == {}
    world.clock.sleep(20)
    world.room.admit(world.desks[1])
    eventually(lambda: world.desks[1].kernel == {PEER: 40.0})


def test_a_guest_that_cannot_act_is_told_and_tried_again(world):
    world.desks[1].refuses = HostError("its packets are only seen: rung packets")
    answer = world.ask("ban", peer="203.0.113.9")
    assert answer["not_yet"] == [{"vm": "qemu:77", "why": "its packets are only seen: rung packets"}]
    assert world.desks[0].kernel == {PEER: None}
    for _ in range(3):
        world.room.tick()
    assert len(world.told) == 1, "it is said once"
    world.desks[1].refuses = None
    eventually(lambda: (world.room.tick(), world.desks[1].kernel == {PEER: None})[1])
    eventually(lambda: (world.room.tick(), not world.room.banning.troubles())[1])


def test_a_ban_that_never_came_into_force_is_lifted_without_further_trouble(world):
    world.desks[1].refuses = HostError("its packets are only seen")
    world.ask("ban", peer="203.0.113.9")
    assert world.ask("unban", peer="203.0.113.9")["not_yet"] == []
    assert world.desks[0].kernel == {}


def test_the_end_of_a_ban_alone_does_not_write_the_file(world):
    world.ask("ban", peer="203.0.113.9", seconds=5)
    before = world.path.read_bytes()
    world.clock.sleep(6)
    world.room.tick()
    assert world.ask("bans") == []
    assert world.path.read_bytes() == before
    world.room = world.open()
    assert world.ask("bans") == []


def test_a_guest_that_is_busy_gets_the_ban_as_soon_as_it_answers(tmp_path):
    world = Setting(tmp_path, wait_s=0.05)
    answer = world.ask("ban", peer="203.0.113.9", seconds=60)
    assert {one["vm"] for one in answer["not_yet"]} == {"qemu:4242", "qemu:77"}
    with Serving(*world.desks):
        eventually(lambda: all(desk.kernel == {PEER: 60.0} for desk in world.desks))


def test_a_ban_and_its_end_while_the_guest_is_busy_leave_it_unbanned(tmp_path):
    world = Setting(tmp_path, wait_s=0.01)
    world.ask("ban", peer="203.0.113.9", seconds=60)
    world.ask("unban", peer="203.0.113.9")
    with Serving(*world.desks):
        eventually(lambda: (world.room.tick(), not world.room.banning.troubles())[1])
    assert all(desk.kernel == {} for desk in world.desks)


def test_thousands_of_bans_reach_the_guest_in_small_jobs(world):
    for number in range(1000):
        world.room.banning._book.add(world_ban(number))
    world.room.dismiss(world.desks[0])
    world.room.admit(world.desks[0])
    eventually(lambda: (world.room.tick(), len(world.desks[0].kernel) == 1000)[1])


def world_ban(number):
    from appliance.respond.bans import Ban

    return Ban(ip_network((0x0B000000 + number, 32)), None, NOW_NS)


# -- a restart --


def test_bans_outlive_a_restart_with_the_time_they_have_left(world):
    world.ask("ban", peer="203.0.113.9", seconds=60, reason="r")
    world.ask("ban", peer="203.0.113.10", seconds=5)
    world.ask("ban", peer="203.0.113.11", guest="qemu:77")
    before = world.ask("bans")
    for desk in world.desks:
        desk.kernel.clear()
    world.clock.sleep(10)
    world.room = world.open()
    eventually(lambda: world.desks[0].kernel == {PEER: 50.0})
    eventually(lambda: world.desks[1].kernel == {PEER: 50.0, ip_network("203.0.113.11"): None})
    after = world.ask("bans")
    assert [(ban["peer"], ban["reason"], ban["until"]) for ban in after] == [
        (ban["peer"], ban["reason"], ban["until"]) for ban in before if ban["peer"] != "203.0.113.10/32"
    ]


def test_a_ban_for_a_guest_follows_its_identity_not_its_name(world):
    world.ask("ban", peer="203.0.113.9", guest="db-01")
    reborn = FakeDesk(replace(OTHER, target="qemu:901", name="renamed"))
    stranger = FakeDesk(replace(OTHER, uuid="00000000-0000-0000-0000-000000000001"))
    world.desks[:] = [reborn, stranger]
    with Serving(reborn, stranger):
        world.room = world.open()
        eventually(lambda: (world.room.tick(), not world.room.banning.troubles())[1])
    assert (reborn.kernel, stranger.kernel) == ({PEER: None}, {})


def test_a_ban_that_the_grown_never_ban_list_forbids_does_not_come_back(world, tmp_path):
    world.ask("ban", peer="203.0.113.9")
    listed = tmp_path / "never-ban.yaml"
    listed.write_text("never_ban: [{net: 203.0.113.0/24, why: our office}]\n")
    world.room = world.open(spare(path=listed))
    assert world.ask("bans") == []
    assert "our office" in world.told[-1]


def test_what_is_lifted_stays_lifted_after_a_restart(world):
    world.ask("ban", peer="203.0.113.9")
    world.ask("unban", peer="203.0.113.9")
    assert read_bans(world.path) == ([], [])


def test_a_state_folder_that_cannot_be_written_costs_memory_not_protection(world, tmp_path):
    world.path = tmp_path / "gone" / "bans.json"
    world.room = world.open()
    (tmp_path / "gone").write_text("in the way")
    world.ask("ban", peer="203.0.113.9")
    assert world.desks[0].kernel == {PEER: None}
    assert any("forgotten" in line for line in world.told)


# -- what is asked wrongly --

json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
verbs = st.sampled_from(["status", "held", "decide", "block", "reset", "release", "ban", "unban", "bans"])
keys = st.sampled_from(["id", "allow", "peer", "guest", "seconds", "reason", "more"])
peers = st.sampled_from(["203.0.113.9", "10.0.0.0/8", "::ffff:1.2.3.4", "fe80::1%eth0", "10.0.0.1/8", "x", "", "1"])


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        json_values,
        st.builds(lambda do, rest: {**rest, "do": do}, verbs, st.dictionaries(keys, peers | json_values, max_size=4)),
    )
)
def test_any_json_is_answered_or_refused_with_words(body):
    room = ControlRoom(Words(contract.verdict, contract.iso), Banning(Clock(), lambda line: None), lambda: None)
    try:
        room.answer(body, "ada")
    except ParasightError as error:
        assert str(error)
        assert error.exit_code == 2


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("10.0.0.1/8", r"the network 10\.0\.0\.0/8 or the address 10\.0\.0\.1"),
        ("fe80::1%eth0", "no zone"),
        ("example.org", "no address"),
        (None, "address or a network"),
        (167772161, "address or a network"),
    ],
)
def test_a_peer_that_is_none_is_refused_with_what_was_meant(world, peer, words):
    with pytest.raises(UsageError, match=words):
        world.ask("ban", peer=peer)


def test_a_mapped_peer_is_the_address_on_the_wire(world):
    assert world.ask("ban", peer="::ffff:203.0.113.9")["ban"]["peer"] == "203.0.113.9/32"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1h", 1e12])
def test_a_time_that_is_none_is_refused(world, seconds):
    with pytest.raises(UsageError, match=r"seconds|ten years"):
        world.ask("ban", peer="203.0.113.9", seconds=seconds)


@pytest.mark.parametrize("reason", ["x" * 201, "two\nlines", "\x1b[2J", 7, "\ud800"])
def test_a_reason_that_would_harm_a_terminal_is_refused(world, reason):
    with pytest.raises(UsageError, match="printable"):
        world.ask("ban", peer="203.0.113.9", reason=reason)
