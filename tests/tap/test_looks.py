"""A tap that is made of looks at a guest's sockets: what is new has started, what is gone has ended."""

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import GuestGone, Implausible
from appliance.flow.community import community_id
from appliance.model import (
    Direction,
    Endpoint,
    FlowEnd,
    FlowEnded,
    FlowStarted,
    Gap,
    GuestSocket,
    Snapshot,
    Transport,
)
from appliance.ports import PacketTap
from appliance.tap.looks import LookTap
from tests.worlds.nouns import VM, owner

HERE, THERE = "10.0.2.15", "203.0.113.9"
NOT_DONE = Gap("full look", 0, "not done within 2 s: no process and no socket is told")
LOST_BUCKET = Gap("TCP sockets", 0xFFFF888000001000, "bucket changed three times while read")


def end(text, port):
    return Endpoint(ip_address(text), port)


def tcp(local_port=40000, remote_port=443, state="ESTABLISHED", *, local=HERE, remote=THERE, address=0, netns=1):
    ends = end(local, local_port), end(remote, remote_port)
    return GuestSocket(Transport.TCP, state, *ends, (owner(),), netns, address or 0xFFFF888000000000 + local_port)


def udp(local_port=50000, remote=THERE, remote_port=53, *, address=1):
    peer = end(remote, remote_port) if remote else None
    return GuestSocket(Transport.UDP, "ESTABLISHED", end(HERE, local_port), peer, (owner(),), 1, address)


def listener(port, ip="0.0.0.0", netns=1):
    return GuestSocket(Transport.TCP, "LISTEN", end(ip, port), None, (owner(),), netns, 7)


class Eye:
    """Shows one list of sockets after the other; the last one again and again."""

    os, live, describe = "linux", True, "a fake"

    def __init__(self, *looks):
        self.looks, self.taken = list(looks), 0

    def read_snapshot(self):
        look = self.looks[min(self.taken, len(self.looks) - 1)]
        self.taken += 1
        if isinstance(look, Exception):
            raise look
        return look if isinstance(look, Snapshot) else Snapshot(0, (), tuple(look))


class Clock:
    now_ns = 1_000_000_000

    def __call__(self):
        self.now_ns += 1_000_000_000
        return self.now_ns


def tap_of(*looks, **more):
    return LookTap(VM, Eye(*looks), Clock(), community_id=community_id, pace_s=0.0, **more)


def told(tap, looks):
    """What each of so many looks tells."""
    return [tap.poll(5.0) for _ in range(looks)]


def starts(events):
    return [event.flow for event in events if isinstance(event, FlowStarted)]


def ends(events):
    return [(event.flow.number, event.reason) for event in events if isinstance(event, FlowEnded)]


def gapped(sockets, *gaps, torn=0):
    return Snapshot(0, (), tuple(sockets), gaps, torn)


def test_it_is_a_packet_tap() -> None:
    tap: PacketTap = tap_of([])
    assert (tap.fileno(), tap.exhausted, tap.vm) == (-1, False, VM)


def test_what_is_new_has_started_and_what_is_gone_has_ended() -> None:
    first, second, third = told(tap_of([], [tcp(), udp()], [udp()]), 3)
    assert first == []
    connection, question = starts(second)
    assert str(connection.tuple) == f"tcp {HERE}:40000 -- {THERE}:443"
    assert (connection.direction, connection.midstream, connection.ip_protocol) == (Direction.OUT, False, 6)
    assert connection.started_ns == second[0].at_ns == 3_000_000_000
    address = ip_address(HERE).packed, ip_address(THERE).packed
    assert connection.community_id == community_id(6, *address, 40000, 443)
    assert (str(question.tuple), question.ip_protocol) == (f"udp {HERE}:50000 -- {THERE}:53", 17)
    assert ends(third) == [(1, FlowEnd.FIN)]


def test_connections_of_the_first_look_began_before_it() -> None:
    ((event,),) = told(tap_of([tcp()]), 1)
    assert event.flow.midstream


def test_a_local_port_that_is_listened_on_tells_who_began() -> None:
    sockets = [listener(22), tcp(22, 50001), tcp(40001, 22), udp(53, None), udp(53, remote_port=4000)]
    flows = starts(told(tap_of([], sockets), 2)[1])
    assert [(flow.tuple.local.port, flow.direction) for flow in flows] == [
        (22, Direction.IN),
        (40001, Direction.OUT),
        (53, Direction.IN),
    ]


def test_a_listener_of_another_address_or_container_says_nothing_of_a_port() -> None:
    other = [listener(40000, "10.0.2.16"), listener(40000, netns=2), tcp(40000)]
    assert [flow.direction for flow in starts(told(tap_of([], other), 2)[1])] == [Direction.OUT]
    mine = [listener(40000, HERE), tcp(40000)]
    assert [flow.direction for flow in starts(told(tap_of([], mine), 2)[1])] == [Direction.IN]


def test_a_listener_that_has_just_closed_still_tells_who_began() -> None:
    flows = starts(told(tap_of([listener(22)], [tcp(22, 50001)]), 2)[1])
    assert [flow.direction for flow in flows] == [Direction.IN]


def test_a_socket_that_is_only_bound_is_no_server() -> None:
    bound = GuestSocket(Transport.TCP, "CLOSE", end(HERE, 40000), None, (), 1, 9)
    assert [flow.direction for flow in starts(told(tap_of([], [bound, tcp()]), 2)[1])] == [Direction.OUT]


def test_the_same_tuple_in_two_containers_is_two_flows() -> None:
    assert len(starts(told(tap_of([], [tcp(netns=1), tcp(netns=2)]), 2)[1])) == 2


def test_loopback_listeners_and_what_is_no_connection_are_no_flows() -> None:
    raw = GuestSocket(Transport.RAW, "CLOSE", end(HERE, 1), end(THERE, 0), (), 1, 9)
    quiet = [tcp(local="127.0.0.1", remote="127.0.0.1"), tcp(local="::1", remote="::1"), listener(1), raw, udp(9, None)]
    assert told(tap_of([], quiet), 2) == [[], []]


def test_a_mapped_address_is_told_as_it_is_on_the_wire() -> None:
    sockets = [listener(80, "::"), tcp(80, local=f"::ffff:{HERE}", remote=f"::ffff:{THERE}")]
    (flow,) = starts(told(tap_of([], sockets), 2)[1])
    assert str(flow.tuple) == f"tcp {HERE}:80 -- {THERE}:443"
    assert flow.direction is Direction.IN


def test_what_lived_between_two_looks_is_told_by_the_time_wait_it_leaves_and_once() -> None:
    left = tcp(state="TIME_WAIT")
    first, second, third = told(tap_of([], [left], [left]), 3)
    assert (first, third) == ([], [])
    assert [flow.midstream for flow in starts(second)] == [False]
    assert ends(second) == [(1, FlowEnd.FIN)]


def test_what_was_over_before_the_first_look_is_not_told() -> None:
    left = tcp(state="TIME_WAIT")
    assert told(tap_of([left], [left], []), 3) == [[], [], []]


def test_a_time_wait_ends_its_flow() -> None:
    _, second, third = told(tap_of([tcp()], [tcp(state="TIME_WAIT", address=5)], []), 3)
    assert ends(second) == [(1, FlowEnd.FIN)]
    assert third == []


def test_a_tuple_that_is_used_afresh_is_another_flow() -> None:
    _, second = told(tap_of([tcp(address=1)], [tcp(address=2)]), 2)
    assert ends(second) == [(1, FlowEnd.FIN)]
    assert [flow.id.number for flow in starts(second)] == [2]


def test_an_accepted_connection_is_the_one_that_was_asked_for() -> None:
    looks = [tcp(22, 5001, "SYN_RECV", address=1)], [tcp(22, 5001, address=2)], [tcp(22, 5001, "CLOSE_WAIT", address=2)]
    assert told(tap_of([], *looks), 4)[2:] == [[], []]


def test_a_look_with_gaps_ends_nothing() -> None:
    for gap in (NOT_DONE, LOST_BUCKET, Gap("more gaps", 0, "9 not listed"), Gap("network namespaces", 5, "broken")):
        tap = tap_of([tcp()], gapped([], gap), gapped([], gap), [tcp()], [])
        assert [ends(events) for events in told(tap, 5)] == [[], [], [], [], [(1, FlowEnd.FIN)]]
        assert tap.stats().ignored == (("looks with gaps", 2),)


def test_a_gap_that_costs_no_connection_does_not_keep_flows() -> None:
    for gap in (Gap("owner of a socket", 5, "no listed process holds its file"), Gap("process list", 5, "cut short")):
        tap = tap_of([tcp()], gapped([], gap))
        assert ends(told(tap, 2)[1]) == [(1, FlowEnd.FIN)]
        assert tap.stats().ignored == ()


def test_a_gap_that_was_there_when_the_flow_was_seen_does_not_keep_it_for_ever() -> None:
    assert ends(told(tap_of(gapped([tcp()], LOST_BUCKET), gapped([], LOST_BUCKET)), 2)[1]) == [(1, FlowEnd.FIN)]


def test_after_a_look_with_gaps_a_beginning_was_not_seen() -> None:
    for before in (gapped([], LOST_BUCKET), Implausible("x")):
        _, _, third = told(tap_of([], before, [tcp()]), 3)
        assert [flow.midstream for flow in starts(third)] == [True]
        assert told(tap_of([], before, [tcp(state="TIME_WAIT")]), 3)[2] == []


def test_a_connection_that_changed_while_it_was_read_is_waited_for() -> None:
    tap = tap_of([tcp()], gapped([], torn=1), [tcp()], gapped([], torn=1), gapped([], torn=1))
    assert [ends(events) for events in told(tap, 5)] == [[], [], [], [], [(1, FlowEnd.FIN)]]
    assert tap.stats().ignored == (("looks with torn reads", 3),)


def test_errors_of_the_guest_are_counted_and_end_nothing() -> None:
    tap = tap_of([tcp()], Implausible("x"), Implausible("y"), [tcp()])
    assert [len(events) for events in told(tap, 4)] == [1, 0, 0, 0]
    assert tap.stats().ignored == (("looks: Implausible", 2),)


def test_a_guest_that_was_gone_for_a_moment_is_looked_at_again() -> None:
    tap = tap_of([tcp()], GuestGone("it ended"), [tcp(), tcp(40002)])
    assert [len(events) for events in told(tap, 3)] == [1, 0, 1]
    assert not tap.exhausted


def test_the_flows_of_another_kernel_are_others() -> None:
    tap = tap_of([tcp()], GuestGone("it ended"))
    assert [len(events) for events in told(tap, 2)] == [1, 0]
    tap.use(Eye([tcp(40001)]))
    events = tap.poll(5.0)
    assert ends(events) == [(1, FlowEnd.GUEST_GONE)]
    assert [(flow.tuple.local.port, flow.midstream) for flow in starts(events)] == [(40001, True)]


def test_the_same_kernel_attached_to_again_keeps_its_flows() -> None:
    tap = tap_of([tcp()])
    told(tap, 1)
    tap.use(Eye([tcp()], []))
    assert told(tap, 1) == [[]]
    assert ends(told(tap, 1)[0]) == [(1, FlowEnd.FIN)]


def test_without_an_eye_it_waits() -> None:
    tap = LookTap(VM, None, Clock(), community_id=community_id)
    assert tap.poll(0.01) == []


def test_many_connections_come_in_batches_and_before_the_next_look() -> None:
    tap = tap_of([tcp(port) for port in range(1, 3001)], [])
    sizes = [len(events) for events in told(tap, 3)]
    assert (sum(sizes), max(sizes), tap._eye.taken) == (3000, 1024, 1)
    assert tap.stats().flows == tap.stats().events == 3000


def test_more_flows_than_it_keeps_cost_the_oldest_and_the_new_ones_are_told() -> None:
    tap = tap_of([tcp(1), tcp(2)], [tcp(1), tcp(2), tcp(3)], max_flows=2)
    _, second = told(tap, 2)
    assert ends(second) == [(1, FlowEnd.EVICTED)]
    assert [flow.tuple.local.port for flow in starts(second)] == [3]
    assert tap.stats().evicted == 1


def test_closing_ends_what_is_open_once() -> None:
    tap = tap_of([tcp(), udp()])
    told(tap, 1)
    assert ends(tap.close()) == [(1, FlowEnd.WATCH_ENDED), (2, FlowEnd.WATCH_ENDED)]
    assert tap.close() == []
    assert tap.exhausted
    assert tap.stats().events == 4


def test_it_does_not_look_before_its_time() -> None:
    tap = LookTap(VM, eye := Eye([]), Clock(), community_id=community_id, pace_s=3600)
    assert [tap.poll(0.0) for _ in range(3)] == [[], [], []]
    assert eye.taken == 1
    assert "every 3600 s" in tap.note


sockets = st.builds(
    tcp,
    st.integers(1, 4),
    st.integers(1, 2),
    st.sampled_from(["ESTABLISHED", "SYN_SENT", "SYN_RECV", "TIME_WAIT", "CLOSE_WAIT", "LISTEN"]),
    local=st.sampled_from([HERE, "::ffff:10.0.2.15", "127.0.0.1"]),
    remote=st.sampled_from([THERE, "::ffff:203.0.113.9", "127.0.0.1", "2001:db8::1"]),
    address=st.integers(1, 3),
    netns=st.integers(1, 2),
)
some_looks = st.builds(
    gapped,
    st.lists(st.one_of(sockets, st.builds(listener, st.integers(1, 4))), max_size=8),
    st.sampled_from([NOT_DONE, LOST_BUCKET, Gap("process list", 1, "cut short")]),
    torn=st.integers(0, 1),
)
clean_looks = st.builds(gapped, st.lists(sockets, max_size=8))


@given(st.lists(st.one_of(clean_looks, some_looks, st.just(Implausible("x"))), min_size=1, max_size=8))
def test_whatever_the_guest_shows_each_flow_starts_once_and_ends_once(looks) -> None:
    tap = tap_of(*looks, max_flows=5)
    alive = {}
    for events in [*told(tap, len(looks)), tap.close()]:
        for event in events:
            if isinstance(event, FlowStarted):
                assert event.flow.id.number not in alive
                alive[event.flow.id.number] = True
                assert not event.flow.tuple.remote.ip.is_loopback
            else:
                assert alive[event.flow.number]
                alive[event.flow.number] = False
        assert sum(alive.values()) <= 5
    assert not any(alive.values())
    stats = tap.stats()
    assert (stats.flows, stats.events) == (len(alive), 2 * len(alive))
    assert list(alive) == sorted(alive)
