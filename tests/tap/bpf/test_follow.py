"""Ports that come to a guest and leave it while its tap is open."""

import subprocess

import pytest

from appliance.model import FlowStarted, GuestPort
from tests.tap.bpf.both import collect, open_kernel, udp_talk
from tests.tap.world import GUEST_MAC, HOST_IP, PORT, ip, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@pytest.fixture
def world():
    with make_world("kf") as made:
        yield made


@pytest.fixture
def tap(world):
    made = open_kernel(world)
    yield made
    made.close()


def filters(world, port: str) -> str:
    shown = subprocess.run(
        ["tc", "-n", world.host, "filter", "show", "dev", port, "ingress"], check=True, capture_output=True, text=True
    )
    return shown.stdout


def test_a_port_that_comes_is_hung_on_and_one_that_goes_is_forgotten(world, tap) -> None:
    ip("-n", world.host, "link", "add", "second0", "type", "veth", "peer", "name", "second1")
    ports = [GuestPort(name, None, world.host_path) for name in (PORT, "second0")]
    assert [port.ifname for port in tap.follow(ports)] == ["second0"]
    assert tap.follow(ports) == []
    assert "parasight" in filters(world, "second0")
    ip("-n", world.host, "link", "del", "second0")
    assert tap.follow(ports[:1]) == []
    assert not tap.exhausted
    udp_talk(world, HOST_IP, from_guest=True)
    events = collect(tap, lambda told: any(isinstance(event, FlowStarted) for event in told))
    assert any(isinstance(event, FlowStarted) for event in events)


def test_a_port_that_was_replaced_under_its_name_is_hung_on_again(world, tap) -> None:
    peer = ("peer", "name", "eth0", "netns", world.guest, "address", GUEST_MAC)
    ip("-n", world.host, "link", "del", PORT)
    ip("-n", world.host, "link", "add", PORT, "type", "veth", *peer)
    for name, dev, address in ((world.host, PORT, "10.77.0.1/24"), (world.guest, "eth0", "10.77.0.2/24")):
        ip("-n", name, "addr", "add", address, "dev", dev)
        ip("-n", name, "link", "set", dev, "up")
    assert [port.ifname for port in tap.follow([GuestPort(PORT, GUEST_MAC, world.host_path)])] == [PORT]
    udp_talk(world, HOST_IP, from_guest=True)
    events = collect(tap, lambda told: any(isinstance(event, FlowStarted) for event in told))
    assert [event.flow.tuple.remote.port for event in events if isinstance(event, FlowStarted)] == [9999]
