"""Whatever waits goes on as it came: long frames, fragments, VLAN tags, many at once."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest

from tests.tap.bpf.both import wait_for
from tests.tap.bpf.holding import BOTH_WAYS, FAMILIES, LONG, V4, ends_of, held, packet_socket
from tests.tap.bpf.lan import Judge, Sniffer, nothing, release
from tests.tap.world import ip

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@pytest.mark.parametrize("size", [3000, 8000, 16000])
def test_frames_of_any_length_that_a_page_cannot_hold(lan, size) -> None:
    set_mtu(lan, 17000)
    data = os.urandom(size)
    with (
        held(lan) as judge,
        lan.server.socket(V4, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(V4, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((lan.server.address(V4), 53))
        sender.sendto(data, (lan.server.address(V4), 53))
        assert receiver.recv(1 << 16) == data
        assert judge.starts()[0].held


def test_a_frame_that_is_too_long_passes_when_it_is_repeated(lan) -> None:
    set_mtu(lan, 40000)
    with (
        held(lan, nothing) as judge,
        lan.server.socket(V4, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(V4, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((lan.server.address(V4), 53))
        sender.sendto(bytes(30000), (lan.server.address(V4), 53))
        (start,) = wait_for(judge.starts)
        assert judge.do(lambda: judge.tap.release(start.flow.id))
        sender.sendto(b"again" * 6000, (lan.server.address(V4), 53))
        assert receiver.recv(1 << 16) == b"again" * 6000


def set_mtu(lan, size: int) -> None:
    for host in (lan.guest, lan.server):
        ip("-n", host.netns, "link", "set", "eth0", "mtu", str(size))
        ip("-n", lan.bridge, "link", "set", host.port, "mtu", str(size))
    ip("-n", lan.bridge, "link", "set", "br0", "mtu", str(size))


@FAMILIES
def test_fragments_of_a_held_datagram_are_held_too(lan, family) -> None:
    data = os.urandom(20000)
    with (
        held(lan, nothing) as judge,
        lan.server.socket(family, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(family, socket.SOCK_DGRAM) as sender,
        Sniffer(lan.server) as wire,
    ):
        receiver.bind((lan.server.address(family), 53))
        sender.sendto(data, (lan.server.address(family), 53))
        wait_for(lambda: judge.tap.held() >= 14)
        (start,) = wait_for(judge.starts)
        wait_for(lambda: not judge.tap._ring.ready)
        assert wire.frames(17) == wire.frames(44) == []
        assert judge.do(lambda: judge.tap.release(start.flow.id))
        assert receiver.recv(1 << 16) == data


@pytest.mark.parametrize("tags", [(7,), (5, 7)], ids=["one", "two"])
@BOTH_WAYS
def test_vlan_tags_stay_as_they_are(lan, tags, outgoing) -> None:
    """The outer one is out of band at the port, an inner one in the frame."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Dot1AD, Dot1Q, Ether

    client, server = ends_of(lan, outgoing)
    head = Ether(src=client.mac, dst=server.mac)
    for index, tag in enumerate(tags):
        head = head / (Dot1Q(vlan=tag, prio=3) if index == len(tags) - 1 else Dot1AD(vlan=tag))
    layers = IP(src=client.address(V4), dst=server.address(V4)) / UDP(sport=5, dport=6) / b"deep"
    frame = bytes(head / layers)
    with held(lan) as judge, Sniffer(server) as wire, packet_socket(client) as raw:
        raw.send(frame)
        (start,) = wait_for(judge.starts)
        assert (start.held, start.flow.vlan) == (True, tags[0] if len(tags) == 1 else 5 << 12 | 7)
        (seen,) = wait_for(lambda: [seen for seen in wire.tagged() if seen.endswith(b"deep")])
        assert seen == frame


def test_flows_whose_start_was_lost_are_found_and_can_be_released(lan) -> None:
    with contextlib.ExitStack() as stack:
        tap = lan.open_tap(ring_bytes=4096)
        tap.hold_new(LONG)
        listener = stack.enter_context(lan.server.listen(V4))
        clients = [stack.enter_context(lan.guest.socket(V4, socket.SOCK_STREAM)) for _ in range(60)]
        for client in clients:
            client.setblocking(False)
            assert client.connect_ex((lan.server.address(V4), 80)) == errno.EINPROGRESS
        wait_for(lambda: tap.stats().lost > 20)
        stack.enter_context(Judge(tap, release))
        for _ in clients:
            listener.accept()[0].close()
        assert tap.recovered > 0


def test_a_thousand_flows_wait_at_once_and_disturb_no_other(lan) -> None:
    count = 1000
    raise_files(3 * count)
    lan.run(lan.server, "sysctl", "-qw", "net.core.somaxconn=4096", "net.ipv4.tcp_max_syn_backlog=8192")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(lan.server.listen(V4))
        tap = lan.open_tap()
        other = stack.enter_context(lan.guest.socket(V4, socket.SOCK_STREAM))
        other.connect((lan.server.address(V4), 80))
        accepted = stack.enter_context(listener.accept()[0])
        tap.hold_new(LONG)
        judge = stack.enter_context(Judge(tap, nothing))
        clients = [stack.enter_context(lan.guest.socket(V4, socket.SOCK_STREAM)) for _ in range(count)]
        for client in clients:
            client.setblocking(False)
            assert client.connect_ex((lan.server.address(V4), 80)) == errno.EINPROGRESS
        wait_for(lambda: sum(start.held for start in judge.starts()) == count)
        assert tap.stats().lost == 0
        other.sendall(b"meanwhile")
        accepted.settimeout(30)
        assert accepted.recv(100) == b"meanwhile"
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        flows = [start.flow.id for start in judge.starts() if start.held]
        assert all(judge.do(lambda: [tap.release(flow) for flow in flows]))
        listener.settimeout(60)
        for _ in range(count):
            listener.accept()[0].close()


def raise_files(count: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
