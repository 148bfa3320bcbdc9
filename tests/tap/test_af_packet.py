"""A live port: real packets between two namespaces."""

import contextlib
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Dot1Q, Ether

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.model import Direction, FlowEnd, FlowEnded, FlowPayload, FlowStarted, GuestId, GuestPort
from appliance.tap.af_packet import PortSource, probe
from appliance.tap.frame import SNAP, count_segments
from appliance.tap.merged import MergedSource
from appliance.tap.netns import call_in_netns
from tests.tap.world import GUEST_IP, GUEST_IP6, GUEST_MAC, HOST_IP, HOST_IP6, PORT, World, ip, make_world

pytestmark = pytest.mark.root("network namespaces and packet sockets")
VM = GuestId("port:test")


@pytest.fixture
def world() -> Iterator[World]:
    with make_world("tap") as made:
        yield made


@contextlib.contextmanager
def tapping(world: World, **options) -> Iterator[TrackedTap]:
    source = PortSource(GuestPort(PORT, GUEST_MAC, world.host_path), **options)
    tap = TrackedTap(VM, source, FlowTable(VM, [GUEST_MAC]), time.time_ns)
    try:
        yield tap
    finally:
        tap.close()


def collect(tap: TrackedTap, until, timeout_s: float = 10) -> list:
    events: list = []
    deadline = time.monotonic() + timeout_s
    while not until(events) and time.monotonic() < deadline:
        events += tap.poll(0.1)
    return events


def ended(count: int = 1):
    return lambda events: sum(isinstance(event, FlowEnded) for event in events) >= count


def talk(world: World, address: str, *, from_guest: bool, ask: bytes = b"ask", answer: bytes = b"answer") -> int:
    """One TCP conversation; returns the client's port."""
    server_side, client_side = (world.host_path, world.guest_path)[:: 1 if from_guest else -1]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in_netns(server_side, lambda: socket.create_server((address, 8080), family=family)) as server:
        client = call_in_netns(client_side, lambda: socket.create_connection((address, 8080), timeout=5))
        with client, server.accept()[0] as accepted:
            sender = threading.Thread(target=client.sendall, args=(ask,))
            sender.start()
            pump(accepted, len(ask))
            sender.join()
            accepted.sendall(answer)
            pump(client, len(answer))
            return client.getsockname()[1]


def pump(sock: socket.socket, size: int) -> None:
    sock.settimeout(5)
    while size > 0:
        size -= len(sock.recv(min(size, 1 << 20)))


@pytest.mark.parametrize(
    ("address", "from_guest"),
    [(HOST_IP, True), (HOST_IP6, True), (GUEST_IP, False), (GUEST_IP6, False)],
    ids=["v4-out", "v6-out", "v4-in", "v6-in"],
)
def test_a_real_connection_becomes_flow_events(world, address: str, from_guest: bool) -> None:
    with tapping(world) as tap:
        before = time.time_ns()
        port = talk(world, address, from_guest=from_guest)
        events = collect(tap, ended())
        (start,) = [event for event in events if isinstance(event, FlowStarted)]
        side = Direction.OUT if from_guest else Direction.IN
        assert start.flow.direction is side
        assert str(start.flow.tuple.local.ip) == (GUEST_IP6 if ":" in address else GUEST_IP)
        client = start.flow.tuple.local if from_guest else start.flow.tuple.remote
        assert client.port == port
        assert before <= start.at_ns <= time.time_ns()
        told = [(event.direction is side, event.data) for event in events if isinstance(event, FlowPayload)]
        assert told == [(True, b"ask"), (False, b"answer")]
        assert [event.reason for event in events if isinstance(event, FlowEnded)] == [FlowEnd.FIN]
        assert tap.stats().lost == 0


def test_bulk_with_segmentation_offload_counts_wire_packets_and_tells_few_events(world) -> None:
    size = 8_000_000
    sender = threading.Thread(target=talk, args=(world, HOST_IP), kwargs={"from_guest": True, "ask": b"x" * size})
    with tapping(world, ring_bytes=32 << 20) as tap:
        sender.start()
        events = collect(tap, ended())
        sender.join()
        counts = events[-1].counts
        stats = tap.stats()
        assert len(events) <= 8
        if not stats.lost:
            assert counts.bytes_out >= size + 40 * (size // 1500)
            assert counts.packets_out >= size // 1500
            assert counts.bytes_out - counts.packets_out * 52 < size + 10_000
        assert all(len(event.data) <= 2048 for event in events if isinstance(event, FlowPayload))


def test_a_vlan_tag_that_the_host_keeps_out_of_band_is_seen(world) -> None:
    packet = IP(src=GUEST_IP, dst=HOST_IP) / TCP(sport=4000, dport=80, flags="S")
    frame = Ether(src=GUEST_MAC, dst="52:54:00:77:00:01") / Dot1Q(vlan=7) / packet
    with tapping(world) as tap:
        guest = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        with guest:
            guest.bind(("eth0", 0))
            guest.send(bytes(frame))
        events = collect(tap, bool)
        assert [event.flow.vlan for event in events if isinstance(event, FlowStarted)] == [7]


def test_fragments_of_a_large_datagram_belong_to_one_flow(world) -> None:
    with tapping(world) as tap:
        guest = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with guest:
            guest.sendto(b"f" * 5000, (HOST_IP, 9999))
        collect(tap, lambda _: sum(counts_out(tap)) >= 4, 3)
        assert counts_out(tap) == [4]
        ends = [event for event in tap.close() if isinstance(event, FlowEnded)]
        assert (ends[0].reason, ends[0].counts.packets_out) == (FlowEnd.WATCH_ENDED, 4)


def counts_out(tap: TrackedTap) -> list[int]:
    return [record.packets[0] for record in tap.table._records.values() if record.key[1] == 17]


def test_a_full_ring_counts_what_it_loses(world) -> None:
    with tapping(world, ring_bytes=1 << 18) as tap:
        guest = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with guest:
            for _ in range(600):
                guest.sendto(b"x", (HOST_IP, 9999))
        time.sleep(0.2)
        collect(tap, lambda _: False, 0.5)
        stats = tap.stats()
        assert stats.lost > 100
        assert tap.stats().lost == stats.lost  # reading resets the kernel's counter, not ours
        guest_packets = stats.packets + stats.lost
        assert guest_packets >= 600


@pytest.mark.parametrize("merged", [False, True])
def test_a_port_that_disappears_ends_the_tap(world, merged: bool) -> None:
    with tapping(world) as single:
        tap = single
        if merged:
            tap = TrackedTap(VM, MergedSource([PortSource(GuestPort(PORT, None, world.host_path))]), clock=time.time_ns)
        guest = call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with guest:
            guest.sendto(b"x", (HOST_IP, 9999))
        assert collect(tap, bool, 3)
        ip("-n", world.host, "link", "set", PORT, "down")
        tap.poll(0.05)
        assert not tap.exhausted
        ip("-n", world.host, "link", "del", PORT)
        deadline = time.monotonic() + 5
        while not tap.exhausted and time.monotonic() < deadline:
            tap.poll(0.05)
        assert tap.exhausted
        assert FlowEnd.GUEST_GONE in {event.reason for event in tap.close()}
        assert tap.close() == []


def test_several_ports_are_one_source(world) -> None:
    ip("-n", world.host, "link", "add", "second", "type", "veth", "peer", "name", "eth1", "netns", world.guest)
    for name, dev, address in ((world.guest, "eth1", "10.79.0.2/24"), (world.host, "second", "10.79.0.1/24")):
        ip("-n", name, "addr", "add", address, "dev", dev)
        ip("-n", name, "link", "set", dev, "up")
    sources = [PortSource(GuestPort(name, None, world.host_path)) for name in (PORT, "second")]
    tap = TrackedTap(VM, MergedSource(sources), FlowTable(VM), time.time_ns)
    talk(world, HOST_IP, from_guest=True)
    talk(world, "10.79.0.1", from_guest=True)
    assert select.select([tap.fileno()], [], [], 1)[0]
    events = collect(tap, ended(2))
    assert {str(event.flow.tuple.local.ip) for event in events if isinstance(event, FlowStarted)} == {
        GUEST_IP,
        "10.79.0.2",
    }
    tap.close()
    tap.close()


def test_an_idle_port_waits_no_longer_than_told(world) -> None:
    with tapping(world) as tap:
        while tap.poll(0.2):
            pass
        began = time.monotonic()
        tap.poll(0.05)
        assert time.monotonic() - began < 20


def test_a_wrong_port_or_namespace_is_named(world) -> None:
    with pytest.raises(UsageError, match="there is no port nosuch0 in network namespace"):
        PortSource(GuestPort("nosuch0", netns=world.host_path))
    with pytest.raises(UsageError, match="cannot open network namespace"):
        PortSource(GuestPort(PORT, netns="/run/netns/nosuch"))
    with pytest.raises(HostError, match="another interface by now"):
        PortSource(GuestPort(PORT, netns=world.host_path, ifindex=999))
    with pytest.raises(HostError, match="cannot enter network namespace"):
        PortSource(GuestPort(PORT, netns="/proc/self/ns/uts"))


CODE = """
import sys
from appliance.model import GuestPort
from appliance.tap.af_packet import PortSource, probe
from appliance.errors import PermissionRefused
print(probe().remedy)
try:
    PortSource(GuestPort("lo"))
except PermissionRefused as error:
    sys.exit(print(error) or error.exit_code)
"""


def test_without_the_right_the_remedy_is_named() -> None:
    import sys

    assert probe().ok
    command = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == PermissionRefused.exit_code, done.stderr
    assert done.stdout.count("CAP_NET_RAW") == 2


def test_what_a_frame_may_be_is_as_large_as_the_slot() -> None:
    from appliance.tap.ring import BLOCK, SLOT

    assert SLOT % 16 == 0
    assert SLOT >= 32 + 20 + 12 + 16 + 10 + SNAP
    assert BLOCK % 4096 == 0


@pytest.mark.parametrize(("wire", "gso", "udp", "segments"), [(54 + 2896, 1448, False, 2), (54 + 1, 1448, False, 1)])
def test_segments_are_counted_by_the_payload_of_each(wire: int, gso: int, udp: bool, segments: int) -> None:
    head = bytes(12) + b"\x08\0\x45" + bytes(19) + bytes(12) + b"\x50" + bytes(7)
    assert count_segments(head, wire, gso, udp=udp) == segments
    assert count_segments(struct.pack("20x"), wire, gso, udp=udp) == 1
