"""The port watcher tells what comes and goes in a network namespace."""

import select
import subprocess
import time
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import UsageError
from appliance.tap.netns import call_in_netns
from appliance.tap.watcher import LOOK_AGAIN, PortChange, PortState, PortWatcher, parse_changes
from tests.tap.world import ip, make_world

root = pytest.mark.root("network namespaces")
UP, DOWN, GONE = PortState.UP, PortState.DOWN, PortState.GONE


@pytest.fixture
def world():
    with make_world("pw") as made:
        yield made


@pytest.fixture
def watcher(world):
    with PortWatcher(world.host_path) as made:
        yield made


def link(world, *words: str) -> None:
    ip("-n", world.host, "link", *words)


def index_of(world, name: str) -> int:
    import socket

    return call_in_netns(world.host_path, lambda: socket.if_nametoindex(name))


def wait(watcher, until, timeout_s: float = 30) -> list[PortChange]:
    """Changes up to the one that is looked for."""
    told: list[PortChange] = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        told += watcher.changes()
        if any(until(change) for change in told):
            return told
        select.select([watcher], [], [], 0.2)
    raise AssertionError(f"not told within {timeout_s} s; told: {told}")


@root
def test_nothing_is_told_where_nothing_changes(watcher) -> None:
    assert watcher.changes() == []


@root
def test_a_port_that_comes_and_goes_is_told_with_its_index(world, watcher) -> None:
    link(world, "add", "vnet0", "type", "veth", "peer", "name", "vnet0p")
    link(world, "set", "vnet0", "up")
    index = index_of(world, "vnet0")
    told = wait(watcher, lambda change: change == PortChange(UP, "vnet0", index))
    assert next(change.state for change in told if change.ifindex == index) is DOWN
    link(world, "del", "vnet0")
    told = wait(watcher, lambda change: change == PortChange(GONE, "vnet0", index))
    assert LOOK_AGAIN not in told


@root
def test_the_bridge_of_a_port_is_told_and_leaving_it_is_not_being_gone(world, watcher) -> None:
    link(world, "add", "br0", "type", "bridge")
    link(world, "add", "vnet0", "type", "veth", "peer", "name", "vnet0p")
    link(world, "set", "vnet0", "master", "br0", "up")
    index, bridge = index_of(world, "vnet0"), index_of(world, "br0")
    wait(watcher, lambda change: change == PortChange(UP, "vnet0", index, bridge))
    link(world, "set", "vnet0", "nomaster")
    told = wait(watcher, lambda change: change == PortChange(UP, "vnet0", index))
    link(world, "set", "vnet0", "down")
    told += wait(watcher, lambda change: change == PortChange(DOWN, "vnet0", index))
    assert GONE not in {change.state for change in told}


@root
def test_a_renamed_port_keeps_its_index(world, watcher) -> None:
    link(world, "add", "vnet0", "type", "veth", "peer", "name", "vnet0p")
    index = index_of(world, "vnet0")
    link(world, "set", "vnet0", "name", "other0")
    told = wait(watcher, lambda change: change.ifname == "other0")
    assert {change.ifindex for change in told if change.ifname in {"vnet0", "other0"}} == {index}
    assert GONE not in {change.state for change in told}


@root
def test_a_port_that_moves_away_is_gone_here_and_comes_there(world, watcher) -> None:
    link(world, "add", "vnet0", "type", "veth", "peer", "name", "vnet0p")
    index = index_of(world, "vnet0")
    with PortWatcher(world.guest_path) as there:
        link(world, "set", "vnet0", "netns", world.guest)
        wait(watcher, lambda change: (change.state, change.ifname, change.ifindex) == (GONE, "vnet0", index))
        wait(there, lambda change: change.ifname == "vnet0" and change.state is DOWN)


@root
def test_another_interface_under_the_same_name_has_another_index(world, watcher) -> None:
    for _ in range(2):
        link(world, "add", "vnet0", "type", "veth", "peer", "name", "vnet0p")
        link(world, "del", "vnet0")
    told: list[PortChange] = []
    deadline = time.monotonic() + 30
    while sum(one.state is GONE and one.ifname == "vnet0" for one in told) < 2 and time.monotonic() < deadline:
        told += watcher.changes()
    states = [(change.ifindex, change.state) for change in told if change.ifname == "vnet0"]
    first, second = dict.fromkeys(index for index, _ in states)
    assert states.index((first, GONE)) < states.index((second, DOWN))


@root
def test_an_overrun_is_told_as_unknown_and_later_changes_are_told_again(world) -> None:
    with PortWatcher(world.host_path, buffer_bytes=4096) as watcher:
        batch = "".join(f"link add d{number} type bridge\nlink del d{number}\n" for number in range(40))
        command = ["ip", "-n", world.host, "-batch", "-"]
        subprocess.run(command, input=batch, text=True, check=True, capture_output=True, timeout=60)
        assert watcher.changes()[0] == LOOK_AGAIN
        link(world, "add", "vnet0", "type", "bridge")
        told = wait(watcher, lambda change: change.ifname == "vnet0" and change.state is DOWN)
        assert LOOK_AGAIN not in told


@root
def test_changes_elsewhere_are_not_told(world, watcher) -> None:
    ip("-n", world.guest, "link", "add", "vnet0", "type", "bridge")
    link(world, "add", "vnet1", "type", "bridge")
    told = wait(watcher, lambda change: change.ifname == "vnet1")
    assert "vnet0" not in {change.ifname for change in told}


@root
def test_a_wrong_namespace_is_named() -> None:
    with pytest.raises(UsageError, match="cannot open network namespace /run/netns/nosuch"):
        PortWatcher("/run/netns/nosuch")


def test_a_watcher_of_our_own_namespace_needs_no_path() -> None:
    watcher = PortWatcher()
    watcher.changes()
    watcher.close()
    watcher.close()


def message(kind: int, family: int, index: int, flags: int, attributes: bytes) -> bytes:
    body = pack("=BxHiII", family, 1, index, flags, 0) + attributes
    return pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    return pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def test_messages_of_a_bridge_about_its_ports_are_not_taken_for_links() -> None:
    name = attribute(3, b"vnet0\0")
    assert parse_changes(message(17, 7, 5, 1, name)) == []  # AF_BRIDGE, RTM_DELLINK: it left the bridge
    assert parse_changes(message(17, 0, 5, 1, name)) == [PortChange(GONE, "vnet0", 5)]
    both = message(16, 0, 5, 1, name + attribute(10, pack("=I", 9))) + message(16, 0, 6, 0, attribute(3, b"b\0"))
    assert parse_changes(both) == [PortChange(UP, "vnet0", 5, 9), PortChange(DOWN, "b", 6)]


def test_a_message_that_was_cut_short_means_look_again() -> None:
    whole = message(16, 0, 5, 1, attribute(3, b"vnet0\0"))
    assert parse_changes(whole + whole[:-4]) == [PortChange(UP, "vnet0", 5), LOOK_AGAIN]
    assert parse_changes(pack("=IHHII", 20, 16, 0, 0, 0) + bytes(4)) == [LOOK_AGAIN]


@given(st.binary(max_size=256))
def test_any_bytes_are_read_to_an_end(data) -> None:
    assert len(parse_changes(data)) <= len(data) // 16 + 1
