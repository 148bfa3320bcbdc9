"""Others change traffic control on our ports while we watch: what is ours is hung again, what is theirs stays."""

import subprocess
import time
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.model import FlowStarted
from appliance.tap.bpf.guard import Guard, parse_ifindex
from appliance.tap.bpf.journal import Journal
from tests.tap.bpf.both import collect, open_kernel, udp_talk
from tests.tap.world import HOST_IP, PORT, ip, make_world

root = pytest.mark.root("network namespaces and bpf(2)")
U32 = ("protocol", "all", "pref", "9", "u32", "match", "u32", "0", "0", "flowid", "1:1")


@pytest.fixture
def world():
    with make_world("kg") as made:
        yield made


def tc(world, *words: str) -> str:
    command = ["ip", "netns", "exec", world.host, "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def seen(world) -> str:
    return tc(world, "-j", "qdisc", "show", "dev", PORT) + "".join(
        tc(world, "-j", "filter", "show", "dev", PORT, hook) for hook in ("ingress", "egress")
    )


def ours(world) -> int:
    return seen(world).count("parasight_tap")


def poll_until(tap, condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        tap.poll(0.05)


def sees_new_flows(world, tap, port: int) -> bool:
    udp_talk(world, HOST_IP, from_guest=True, port=port, timeout_s=30)
    told = collect(tap, lambda events: any(isinstance(event, FlowStarted) for event in events), timeout_s=30)
    return any(isinstance(event, FlowStarted) for event in told)


@root
def test_filters_that_somebody_takes_away_are_hung_again_and_said(world, caplog) -> None:
    before = seen(world)
    tap = open_kernel(world)
    assert sees_new_flows(world, tap, 7000)
    for number, words in enumerate((("qdisc", "del", "dev", PORT, "clsact"), ("filter", "del", "dev", PORT, "egress"))):
        tc(world, *words)
        assert ours(world) < 2
        poll_until(tap, lambda: ours(world) == 2)
        assert sees_new_flows(world, tap, 7001 + number)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"our filters on port {PORT} had been taken away: they hang again"] * 2
    tap.close()
    assert seen(world) == before
    assert Journal().notes() == []


@root
def test_what_others_hang_beside_ours_changes_nothing(world, caplog) -> None:
    tap = open_kernel(world)
    before = seen(world)
    tc(world, "filter", "add", "dev", PORT, "ingress", *U32)
    poll_until(tap, lambda: not tap._guard.has_changed({tap._hooks[0].ifindex}))
    tap.poll(0.3)
    tc(world, "filter", "del", "dev", PORT, "ingress", "protocol", "all", "pref", "9")
    tap.poll(0.3)
    assert seen(world) == before
    assert caplog.records == []
    tap.close()


@root
def test_a_foreign_qdisc_in_the_place_of_ours_is_used_and_left(world) -> None:
    tap = open_kernel(world)
    tc(world, "qdisc", "del", "dev", PORT, "clsact")
    tc(world, "qdisc", "add", "dev", PORT, "clsact")
    tc(world, "filter", "add", "dev", PORT, "ingress", *U32)
    before = seen(world)
    poll_until(tap, lambda: ours(world) == 2)
    tap.close()
    assert seen(world) == before
    assert Journal().notes() == []


@root
def test_where_there_is_no_room_for_us_any_more_that_is_said_and_tried_again_when_there_is(world, caplog) -> None:
    tap = open_kernel(world)
    tc(world, "qdisc", "del", "dev", PORT, "clsact")
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    theirs = seen(world)
    poll_until(tap, lambda: caplog.records)
    assert "nothing is seen or held any more" in caplog.records[0].getMessage()
    assert seen(world) == theirs
    tc(world, "qdisc", "del", "dev", PORT, "ingress")
    poll_until(tap, lambda: ours(world) == 2)
    assert sees_new_flows(world, tap, 7000)
    tap.close()


@root
def test_the_guard_hears_of_our_ports_only(world) -> None:
    ip("-n", world.host, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
    guard = Guard(world.host_path)
    index = int(subprocess.run(
        ["ip", "netns", "exec", world.host, "cat", f"/sys/class/net/{PORT}/ifindex"],
        check=True, capture_output=True, timeout=60,
    ).stdout)  # fmt: skip
    assert not guard.has_changed({index})
    tc(world, "qdisc", "add", "dev", "other0", "clsact")
    assert not guard.has_changed({index})
    tc(world, "qdisc", "add", "dev", PORT, "clsact")
    assert guard.has_changed({index})
    assert not guard.has_changed({index})
    guard.close()
    guard.close()


def test_a_message_that_is_no_change_of_traffic_control_is_none() -> None:
    body = pack("=BxHiIII", 0, 0, 5, 0, 0, 0)
    assert parse_ifindex(pack("=IHHII", 36, 45, 0, 0, 0) + body) == 5
    assert parse_ifindex(pack("=IHHII", 36, 16, 0, 0, 0) + body) is None
    assert parse_ifindex(pack("=IHHII", 36, 45, 0, 0, 0)) is None


@given(st.binary(max_size=64))
def test_any_bytes_are_read(data) -> None:
    parse_ifindex(data)
