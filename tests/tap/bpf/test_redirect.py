"""A held flow goes to a decoy instead, with the addresses it has."""

from __future__ import annotations

import socket
import struct

import pytest

from appliance.errors import HostError
from appliance.model import Decoy, GuestPort, HoldPolicy
from tests.tap.bpf.both import wait_for
from tests.tap.bpf.holding import FAMILIES, V4, held
from tests.tap.bpf.lan import Judge, Sniffer, make_lan, nothing, release

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

COUNT = 100
DECOY_PORT = 8022


@pytest.fixture
def lan():
    with make_lan("kd") as made:
        made.run(made.decoy, "nft", "add table inet trap")
        made.run(made.decoy, "nft", "add chain inet trap in { type nat hook prerouting priority dstnat; }")
        made.run(made.decoy, "nft", f"add rule inet trap in tcp dport 22 redirect to :{DECOY_PORT}")
        yield made


def decoy_of(lan, **changes) -> Decoy:
    return Decoy("honey", GuestPort(**{"ifname": lan.decoy.port, **changes}), lan.decoy.mac)


def original_target(sock: socket.socket, family: int) -> tuple[str, int]:
    """SO_ORIGINAL_DST (linux/netfilter_ipv4.h), IP6T_SO_ORIGINAL_DST."""
    if family == socket.AF_INET:
        raw = sock.getsockopt(socket.SOL_IP, 80, 16)
        return socket.inet_ntop(family, raw[4:8]), struct.unpack("!H", raw[2:4])[0]
    raw = sock.getsockopt(socket.IPPROTO_IPV6, 80, 28)
    return socket.inet_ntop(family, raw[8:24]), struct.unpack("!H", raw[2:4])[0]


def listen_anywhere(host, family: int) -> socket.socket:
    made = host.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("" if family == socket.AF_INET else "::", DECOY_PORT))
    made.listen(256)
    return made


@FAMILIES
def test_every_connection_reaches_the_decoy_with_its_addresses_and_the_server_sees_nothing(lan, family) -> None:
    decoy = decoy_of(lan)

    def redirect(tap, event) -> None:
        assert tap.redirect(event.flow.id, decoy)

    server = (lan.server.address(family), 22)
    with (
        held(lan, redirect) as judge,
        Sniffer(lan.server) as wire,
        listen_anywhere(lan.decoy, family) as trap,
        lan.server.listen(family, 22),
    ):
        for number in range(COUNT):
            with lan.guest.socket(family, socket.SOCK_STREAM) as client:
                client.connect(server)
                with trap.accept()[0] as caught:
                    caught.settimeout(30)
                    assert client.getpeername()[:2] == server
                    assert caught.getpeername()[:2] == client.getsockname()[:2]
                    assert original_target(caught, family) == server
                    client.sendall(b"login %d" % number)
                    assert caught.recv(100) == b"login %d" % number
                    caught.sendall(b"welcome" * 1000)
                    assert client.recv(7) == b"welcome"
        assert wire.frames(6) == []
        assert len(judge.starts(22)) == COUNT
        counts = [wait_for(lambda f=start.flow.id: judge.ends(f))[0].counts for start in judge.starts(22)]
        assert all(count.packets_in >= 3 for count in counts), "answers are counted on the flow"


@FAMILIES
def test_the_guest_sees_its_peer_behind_the_same_mac_address(lan, family) -> None:
    def redirect(tap, event) -> None:
        assert tap.redirect(event.flow.id, decoy_of(lan))

    with (
        held(lan, redirect),
        Sniffer(lan.guest) as seen,
        listen_anywhere(lan.decoy, family) as trap,
        lan.guest.socket(family, socket.SOCK_STREAM) as client,
    ):
        client.connect((lan.server.address(family), 22))
        trap.accept()[0].close()
        assert client.recv(100) == b""
        sources = {frame[6:12].hex(":") for frame in seen.frames(6)}
        assert sources == {lan.server.mac}


@FAMILIES
def test_a_visitor_of_the_guest_is_redirected_too(lan, family) -> None:
    def redirect(tap, event) -> None:
        assert tap.redirect(event.flow.id, decoy_of(lan))

    with (
        held(lan, redirect),
        Sniffer(lan.guest) as wire,
        listen_anywhere(lan.decoy, family) as trap,
        lan.server.socket(family, socket.SOCK_STREAM) as visitor,
    ):
        visitor.connect((lan.guest.address(family), 22))
        with trap.accept()[0] as caught:
            assert original_target(caught, family) == (lan.guest.address(family), 22)
            caught.sendall(b"hello")
            assert visitor.recv(100) == b"hello"
        assert wire.frames(6) == []


def test_other_connections_of_the_guest_still_reach_the_server(lan) -> None:
    def some(tap, event) -> None:
        if event.flow.tuple.remote.port == 22:
            assert tap.redirect(event.flow.id, decoy_of(lan))
        else:
            release(tap, event)

    with (
        held(lan, some),
        lan.server.listen(V4, 80) as listener,
        listen_anywhere(lan.decoy, V4) as trap,
        lan.guest.socket(V4, socket.SOCK_STREAM) as bad,
        lan.guest.socket(V4, socket.SOCK_STREAM) as good,
    ):
        bad.connect((lan.server.address(V4), 22))
        good.connect((lan.server.address(V4), 80))
        trap.accept()[0].close()
        listener.accept()[0].close()


def test_an_established_connection_is_not_redirected(lan) -> None:
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.listen(V4, 22) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as client,
    ):
        client.connect((lan.server.address(V4), 22))
        listener.accept()[0].close()
        (start,) = wait_for(lambda: judge.starts(22))
        assert judge.do(lambda: judge.tap.redirect(start.flow.id, decoy_of(lan))) is False


def test_a_decoy_that_is_not_there_is_named_and_the_flow_waits_on(lan) -> None:
    errors: list[str] = []

    def redirect(tap, event) -> None:
        for wrong in (decoy_of(lan, ifname="nosuch"), decoy_of(lan, ifindex=4711)):
            with pytest.raises(HostError, match="decoy honey: there is no port") as caught:
                tap.redirect(event.flow.id, wrong)
            errors.append(str(caught.value))
        assert tap.redirect(event.flow.id, decoy_of(lan))

    with (
        held(lan, redirect, HoldPolicy(deadline_s=300)),
        listen_anywhere(lan.decoy, V4) as trap,
        lan.guest.socket(V4, socket.SOCK_STREAM) as client,
    ):
        client.connect((lan.server.address(V4), 22))
        trap.accept()[0].close()
    assert len(errors) == 2


@FAMILIES
def test_datagrams_are_redirected_too(lan, family) -> None:
    def redirect(tap, event) -> None:
        assert tap.redirect(event.flow.id, decoy_of(lan))

    server = (lan.server.address(family), 53)
    lan.run(lan.decoy, "nft", "add rule inet trap in udp dport 53 redirect to :5353")
    with (
        held(lan, redirect),
        Sniffer(lan.server) as wire,
        lan.decoy.socket(family, socket.SOCK_DGRAM) as trap,
        lan.guest.socket(family, socket.SOCK_DGRAM) as client,
    ):
        trap.bind(("" if family == V4 else "::", 5353))
        for question in (b"A", b"AAAA", b"MX"):
            client.sendto(question, server)
            data, peer = trap.recvfrom(100)
            assert (data, peer[0]) == (question, lan.guest.address(family))
            trap.sendto(b"answer to " + question, peer)
            answer, source = client.recvfrom(100)
            assert (answer, source[:2]) == (b"answer to " + question, server)
        assert wire.frames(17) == []
