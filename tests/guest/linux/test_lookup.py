"""Which socket a packet belongs to, and when nobody may be named: on socket tables made of bytes."""

import pytest

from appliance.guest.linux import namespaces as bounds
from appliance.model import Direction, Match, Reason, Transport
from tests.guest.linux.tables import BASE, BUCKETS, World, flow, program

HERE, HERE6, OTHER, ELSEWHERE = "10.0.0.5", "fd00::5", "10.0.0.6", "10.99.0.1"
IN, OUT = Direction.IN, Direction.OUT
WEB, DNS, SHELL = program(10), program(20, "/usr/sbin/named"), program(30, "/tmp/shell")


@pytest.fixture
def world():
    made = World()
    made.device(made.init, HERE, HERE6, "fe80::5")
    return made


def pids(finding):
    return [owner.process.pid for owner in finding.owners]


def answer(finding):
    return finding.match, finding.reason, pids(finding)


# -- whose address --


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("direction", Direction)
def test_a_socket_of_every_address_does_not_own_what_is_forwarded(world, protocol, direction):
    world.listener("0.0.0.0", 80, by=WEB)
    world.datagram("0.0.0.0", 80, by=WEB)
    world.build()
    assert answer(world.find(flow(protocol, ELSEWHERE, 80, direction=direction))) == (Match.NONE, Reason.FORWARDED, [])
    own = Match.NONE if (protocol, direction) == ("tcp", OUT) else Match.LISTENER
    own = Match.UNCONNECTED if protocol == "udp" else own
    assert world.find(flow(protocol, HERE, 80, direction=direction)).match is own


def test_an_exact_socket_owns_its_tuple_whatever_the_address(world):
    world.tcp(ELSEWHERE, 80, "192.0.2.9", 99, by=WEB)
    world.datagram(ELSEWHERE, 80, remote="192.0.2.9", rport=99, by=DNS)
    world.build()
    assert answer(world.find(flow("tcp", ELSEWHERE, 80))) == (Match.EXACT, None, [10])
    assert answer(world.find(flow("udp", ELSEWHERE, 80))) == (Match.EXACT, None, [20])


def forged(finding):
    return [(claim.kind, claim.detail) for claim in finding.evidence]


@pytest.mark.parametrize(("address", "remote"), [(ELSEWHERE, "192.0.2.9"), ("fd99::1", "2001:db8::9")])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "icmp"])
def test_an_address_of_nobody_in_a_guest_that_forwards_nothing_is_forged(world, protocol, address, remote):
    world.build()
    found = world.find(flow(protocol, address, 80, remote))
    assert answer(found) == (Match.NONE, Reason.FORWARDED, [])
    assert forged(found) == [("spoofed-ip", address)]


@pytest.mark.parametrize(
    "more",
    [{"direction": IN}, {"midstream": True}, {"spoofed_mac": "02:00:00:00:00:66"}],
    ids=["incoming", "midstream", "of another MAC address"],
)
def test_what_the_guest_may_only_have_passed_on_is_not_called_forged(world, more):
    assert forged(world.build().find(flow("tcp", ELSEWHERE, 80, **more))) == []


@pytest.mark.parametrize(
    ("device", "v4", "v6"), [({"forwards": (4,)}, 0, 1), ({"forwards": (6,)}, 1, 0), ({"promiscuity": 1}, 0, 0)]
)
def test_a_guest_that_forwards_or_bridges_forges_nothing(world, device, v4, v6):
    other = world.namespace()
    world.device(other, "10.1.0.1", **device)
    world.build()
    assert len(forged(world.find(flow("udp", ELSEWHERE, 80)))) == v4
    assert len(forged(world.find(flow("udp", "fd99::1", 80, "2001:db8::9")))) == v6


@pytest.mark.parametrize("address", ["255.255.255.255", "224.0.0.251", "0.0.0.0", "127.0.0.1"])
def test_groups_broadcasts_and_no_address_yet_are_everybodys(world, address):
    world.datagram("0.0.0.0", 68, by=DNS)
    assert answer(world.build().find(flow("udp", address, 68))) == (Match.UNCONNECTED, None, [20])


@pytest.mark.parametrize("address", [HERE6, "fe80::5"])
def test_addresses_of_ipv6_are_known_too(world, address):
    world.datagram("::", 53, by=DNS)
    world.build()
    assert pids(world.find(flow("udp", address, 53, "2001:db8::9"))) == [20]
    assert world.find(flow("udp", "fe80::6", 53, "2001:db8::9")).reason is Reason.FORWARDED


def test_a_new_address_is_looked_for_before_it_is_called_foreign(world):
    world.datagram("0.0.0.0", 53, by=DNS)
    world.build()
    assert world.find(flow("udp", ELSEWHERE, 53)).reason is Reason.FORWARDED
    world.device(world.init, ELSEWHERE)
    soon = world.find(flow("udp", ELSEWHERE, 53), wait_s=0.001)  # too soon to look again, so nothing is certain
    assert answer(soon) == (Match.NONE, None, [])
    assert pids(world.find(flow("udp", ELSEWHERE, 53), wait_s=0.1)) == [20]


def test_an_address_list_that_cannot_be_read_to_its_end_makes_nothing_foreign(world):
    device = world.device(world.init)
    world.poke(device, device)
    assert answer(world.build().find(flow("udp", ELSEWHERE, 53))) == (Match.NONE, None, [])


# -- nobody --


def test_a_miss_stays_open_for_what_went_out_and_is_closed_for_what_came_in(world):
    world.build()
    for protocol in ("tcp", "udp"):
        assert answer(world.find(flow(protocol, HERE, 80))) == (Match.NONE, None, [])
        assert answer(world.find(flow(protocol, HERE, 80, direction=IN))) == (Match.NONE, Reason.CLOSED, [])
        assert world.find(flow(protocol, HERE, 80, direction=IN, midstream=True)).reason is None


def test_a_raw_socket_makes_a_miss_suspicious_not_owned(world):
    world.raw(255, by=SHELL)
    world.build()
    for direction, weight in ((OUT, 1), (IN, 0)):
        finding = world.find(flow("tcp", HERE, 80, direction=direction))
        assert answer(finding) == (Match.NONE, Reason.RAW, [])
        assert [(each.detail, each.weight) for each in finding.evidence] == [("shell", weight)]


def test_a_listener_that_no_listed_process_holds_is_hidden_not_closed(world):
    world.listener("0.0.0.0", 80, by=None)
    assert world.build().find(flow("tcp", HERE, 80, direction=IN)).reason is Reason.HIDDEN


# -- neither TCP nor UDP --


@pytest.mark.parametrize(
    ("number", "kind", "direction", "match"),
    [
        (1, 8, IN, Match.KERNEL),
        (1, 8, OUT, Match.NONE),
        (1, 0, OUT, Match.KERNEL),
        (1, 3, OUT, Match.KERNEL),
        (1, 11, OUT, Match.KERNEL),
        (1, 13, OUT, Match.NONE),
        (2, None, OUT, Match.KERNEL),
        (47, None, OUT, Match.KERNEL),
        (132, None, OUT, Match.NONE),
        (33, None, OUT, Match.NONE),
        (136, None, OUT, Match.NONE),
        (132, None, IN, Match.NONE),
        (253, None, OUT, Match.NONE),
    ],
)
def test_the_kernel_speaks_for_itself_only(world, number, kind, direction, match):
    protocol = Transport.ICMP if number == 1 else Transport.RAW
    asked = flow(protocol, HERE, 7, direction=direction, number=number, kind=kind)
    assert answer(world.build().find(asked)) == (match, None, [])
    world.raw(number, by=SHELL)
    world.now_ns += 10**9
    finding = world.find(asked)
    if direction is OUT and number not in (33, 132, 136):
        assert answer(finding) == (Match.UNCONNECTED, Reason.RAW, [30])
    elif number != 1:
        assert answer(finding) == (Match.NONE, Reason.RAW, [])
    else:
        assert finding.match is Match.KERNEL


def test_an_echo_reply_to_the_guest_was_asked_for_by_a_process(world):
    reply = flow("icmp", HERE, 7, number=1, kind=0, midstream=True)
    assert world.build().find(reply).match is Match.NONE


@pytest.mark.parametrize(("kind", "match"), [(128, Match.NONE), (129, Match.KERNEL), (135, Match.KERNEL)])
def test_icmpv6_by_its_own_numbers(world, kind, match):
    assert world.build().find(flow("icmp", HERE6, 7, "2001:db8::9", number=58, kind=kind)).match is match


def test_udp_lite_has_a_table_of_its_own(world):
    world.datagram("0.0.0.0", 53, by=DNS)
    world.datagram("0.0.0.0", 53, lite=True, by=SHELL)
    world.build()
    assert answer(world.find(flow("raw", HERE, 53, number=136))) == (Match.UNCONNECTED, None, [30])
    assert answer(world.find(flow("udp", HERE, 53))) == (Match.UNCONNECTED, None, [20])


# -- torn --


def test_a_torn_chain_of_datagram_sockets_is_not_believed(world):
    last = world.datagram("0.0.0.0", 53, by=DNS)
    world.datagram("0.0.0.0", 53 + BUCKETS, by=WEB)
    world.build()
    assert pids(world.find(flow("udp", HERE, 53))) == [20]
    for broken in (BASE + (1 << 40), 3, last):  # unreadable, another kind of end, a circle
        world.poke(last, broken)
        finding = world.find(flow("udp", HERE, 53))
        assert (answer(finding), finding.torn) == ((Match.NONE, Reason.TORN, []), 3)


def test_a_chain_that_strays_into_another_bucket_is_not_believed(world):
    first = world.datagram("0.0.0.0", 53, by=DNS)
    stray = world.datagram("0.0.0.0", 54, by=WEB)
    world.poke(first, stray)
    assert world.build().find(flow("udp", HERE, 53)).reason is Reason.TORN


def test_a_torn_chain_of_listeners_or_connections_is_not_believed(world):
    for va in (world.listener("0.0.0.0", 80, by=WEB), world.tcp(HERE, 81, "192.0.2.9", 99, by=WEB)):
        world.poke(va, (BUCKETS + 1) << 1 | 1)
    world.build()
    assert world.find(flow("tcp", HERE, 80, direction=IN)).reason is Reason.TORN
    assert world.find(flow("tcp", HERE, 81)).match is Match.EXACT  # found before the chain's end


# -- devices, namespaces, groups --


@pytest.mark.parametrize("kind", ["datagram", "listener"])
def test_a_socket_of_one_device_neither_wins_nor_loses_silently(world, kind):
    make, protocol = getattr(world, kind), "udp" if kind == "datagram" else "tcp"
    match = Match.UNCONNECTED if protocol == "udp" else Match.LISTENER
    make("0.0.0.0", 53, by=DNS)
    make("0.0.0.0", 53, bound=1, by=SHELL)  # of the loop-back device
    asked = flow(protocol, HERE, 53, direction=IN)
    assert answer(world.build().find(asked)) == (match, None, [20])
    make("0.0.0.0", 53, bound=7, by=program(21, "/usr/sbin/named"))
    found = world.find(asked)
    assert (found.match, found.reason, sorted(pids(found))) == (match, None, [20, 21])
    make("0.0.0.0", 53, bound=2, by=SHELL)
    found = world.find(asked)
    assert (found.match, found.reason, sorted(pids(found))) == (match, Reason.AMBIGUOUS, [20, 21, 30])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_equal_tuples_of_two_namespaces(world, protocol):
    first, second = world.namespace(OTHER), world.namespace()
    for net, by in ((second, WEB), (first, SHELL)):
        world.tcp(OTHER, 80, "192.0.2.9", 99, net=net, by=by)
        world.datagram(OTHER, 80, net=net, remote="192.0.2.9", rport=99, by=by)
    world.build()
    asked = flow(protocol, OTHER, 80)
    assert answer(world.find(asked)) == (Match.EXACT, None, [30])  # its namespace has the address
    world.device(second, OTHER)
    found = world.find(asked)
    assert (found.match, found.reason, sorted(pids(found))) == (Match.EXACT, Reason.AMBIGUOUS, [10, 30])


def test_the_same_program_in_two_namespaces_is_two_owners(world):
    other = world.namespace(HERE)
    world.listener("0.0.0.0", 80, by=WEB)
    world.listener("0.0.0.0", 80, net=other, by=program(11))
    assert world.build().find(flow("tcp", HERE, 80, direction=IN)).reason is Reason.AMBIGUOUS


@pytest.mark.parametrize("kind", ["datagram", "listener"])
def test_all_members_of_a_reuseport_group_are_listed(world, kind):
    make, protocol = getattr(world, kind), "udp" if kind == "datagram" else "tcp"
    for pid in range(100, 220):
        make("0.0.0.0", 53, by=program(pid))
    asked = flow(protocol, HERE, 53, direction=IN)
    found = world.build().find(asked)
    assert (found.reason, sorted(pids(found))) == (None, list(range(100, 220)))
    make("0.0.0.0", 53, by=SHELL)
    assert world.find(asked).reason is Reason.AMBIGUOUS


def test_a_hidden_member_of_a_group_is_told(world):
    world.datagram("0.0.0.0", 53, by=DNS)
    world.datagram("0.0.0.0", 53, by=None)
    found = world.build().find(flow("udp", HERE, 53))
    assert (answer(found), found.evidence[0].kind) == ((Match.UNCONNECTED, Reason.AMBIGUOUS, [20]), "hidden-owner")


# -- what an unprivileged user of the guest can make expensive --


def test_misses_do_not_walk_the_namespaces_each_time(world):
    for _ in range(500):
        world.namespace()
    world.build()
    world.find(flow("tcp", HERE, 80))
    looks, before = world.namespaces.looks, world.reads
    for _ in range(20):
        world.find(flow("tcp", HERE, 80), wait_s=0.001)
    assert world.namespaces.looks == looks
    assert world.reads - before < 20 * 600  # the heads of each namespace's bucket, in one batch
    world.find(flow("tcp", HERE, 80), wait_s=0.1)
    assert world.namespaces.looks == looks + 1


def test_a_rest_is_longer_than_the_look_it_follows(world, monkeypatch):
    world.build()
    read = world.read

    def slow_read(va, size):
        world.now_ns += 20_000_000
        return read(va, size)

    began = world.now_ns
    monkeypatch.setattr(world, "read", slow_read)
    world.namespaces.look()
    took = world.now_ns - began
    world.now_ns += bounds.REST_TIMES * took - 1
    assert not world.namespaces.refresh()
    world.now_ns += 1
    assert world.namespaces.refresh()


def test_lists_of_devices_and_addresses_are_bounded_and_a_circle_ends(world, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_ADDRESSES", 50)
    monkeypatch.setattr(bounds, "MAX_DEVICES", 20)
    world.build()
    many = [f"10.1.{i // 250}.{i % 250}" for i in range(500)]
    world.device(world.init, *many)
    before = world.reads
    world.now_ns += 10**9
    assert world.namespaces.of_address(b"\x0a\x63\x00\x01") == []
    assert world.reads - before < 200
    for _ in range(100):
        world.device(world.init)
    world.now_ns += 10**9
    before = world.reads
    assert world.namespaces.of_address(b"\x0a\x63\x00\x01") == []
    assert world.reads - before < 200
