"""Both ends of an established connection are told that it is over."""

from __future__ import annotations

import socket

import pytest

from appliance.model import FlowEnd
from tests.tap.bpf.both import wait_for
from tests.tap.bpf.holding import BOTH_WAYS, FAMILIES, V4, datagrams, ends_of, read
from tests.tap.bpf.lan import Judge, Sniffer, make_lan, nothing

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@pytest.fixture
def lan():
    with make_lan("kr") as made:
        yield made


def is_reset(sock) -> bool:
    sock.settimeout(30)
    try:
        return sock.recv(1 << 20) is None
    except ConnectionResetError:
        return True


@FAMILIES
@BOTH_WAYS
@pytest.mark.parametrize("talked", [False, True], ids=["idle", "talked"])
def test_both_ends_of_a_connection_are_told(lan, family, outgoing, talked) -> None:
    client, server = ends_of(lan, outgoing)
    with (
        Judge(lan.open_tap(), nothing) as judge,
        server.listen(family) as listener,
        client.socket(family, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((server.address(family), 80))
        with listener.accept()[0] as accepted:
            if talked:
                asker.sendall(b"x" * 100_000)
                assert len(read(accepted, 100_000)) == 100_000
                accepted.sendall(b"y" * 70_000)
                assert len(read(asker, 70_000)) == 70_000
            (start,) = wait_for(lambda: judge.starts(80))
            assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
            assert is_reset(asker)
            assert is_reset(accepted)
        (end,) = wait_for(lambda: judge.ends(start.flow.id))
        assert end.reason is FlowEnd.RST
        if not talked:
            assert end.counts.packets_out + end.counts.packets_in == 3, "our resets are not the guest's packets"


@FAMILIES
def test_no_other_connection_of_the_same_peer_is_touched(lan, family) -> None:
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.listen(family) as listener,
        lan.guest.socket(family, socket.SOCK_STREAM) as bad,
        lan.guest.socket(family, socket.SOCK_STREAM) as good,
    ):
        pairs = []
        for sock in (bad, good):
            sock.connect((lan.server.address(family), 80))
            pairs.append(listener.accept()[0])
        number = bad.getsockname()[1]
        (start,) = wait_for(lambda: judge.starts(number))
        assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
        assert is_reset(bad)
        good.sendall(b"still here")
        pairs[1].settimeout(30)
        assert pairs[1].recv(100) == b"still here"
        for sock in pairs:
            sock.close()


def test_a_tuple_that_is_used_again_is_another_flow(lan) -> None:
    with Judge(lan.open_tap(), nothing) as judge, lan.server.listen(V4) as listener:
        for turn in (1, 2):
            with lan.guest.socket(V4, socket.SOCK_STREAM) as asker:
                asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                asker.bind((lan.guest.address(V4), 5000))
                asker.connect((lan.server.address(V4), 80))
                with listener.accept()[0] as accepted:
                    wait_for(lambda n=turn: len(judge.starts(80)) == n)
                    start = judge.starts(80)[-1]
                    assert judge.do(lambda flow=start.flow.id: judge.tap.block(flow, reset=True))
                    assert is_reset(asker)
                    assert is_reset(accepted)


def test_a_connection_picked_up_in_the_middle_is_reset_from_what_was_seen(lan) -> None:
    with lan.server.listen(V4) as listener, lan.guest.socket(V4, socket.SOCK_STREAM) as asker:
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0] as accepted, Judge(lan.open_tap(), nothing) as judge:
            asker.sendall(b"hello")
            accepted.settimeout(30)
            assert accepted.recv(100) == b"hello"
            (start,) = wait_for(lambda: judge.starts(80))
            assert start.flow.midstream
            assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
            assert is_reset(asker)
            assert is_reset(accepted)


def test_bytes_that_were_dropped_do_not_mislead_the_reset(lan) -> None:
    """What was dropped never arrived: the receiver still expects the number before it."""
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.listen(V4) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0] as accepted:
            (start,) = wait_for(lambda: judge.starts(80))
            assert judge.do(lambda: judge.tap.block(start.flow.id))
            asker.sendall(b"lost")
            wait_for(lambda: judge.tap.dropped() >= 1)
            assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
            assert is_reset(asker)
            assert is_reset(accepted)


def test_a_challenge_is_answered(lan) -> None:
    """A reset at a number that is only near is challenged (RFC 5961); the challenge says which it should have been."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    from tests.tap.bpf.both import packet_socket

    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.listen(V4) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as asker,
        Sniffer(lan.server) as wire,
    ):
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0] as accepted, packet_socket(lan.guest.path, "eth0") as raw:
            (start,) = wait_for(lambda: judge.starts(80))
            frames = wait_for(lambda: [seen for seen in wire.frames(6) if len(wire.frames(6)) >= 2])
            syn = Ether(frames[0])
            # A forged segment of the guest, as if it had got further than it has, in both directions.
            head = Ether(src=lan.guest.mac, dst=lan.server.mac) / IP(src=syn[IP].src, dst=syn[IP].dst)
            last = Ether(frames[1])[TCP]
            raw.send(bytes(head / TCP(sport=last.sport, dport=80, flags="A", seq=last.seq + 1000, ack=last.ack + 1000)))
            wait_for(lambda: len(wire.frames(6)) >= 3)
            assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
            assert is_reset(asker)
            assert is_reset(accepted)


def test_a_block_is_undone(lan) -> None:
    with datagrams(lan) as (judge, start, receiver, sender):
        assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
        sender.sendto(b"second", (lan.server.address(V4), 53))
        wait_for(lambda: judge.tap.dropped() == 1)
        assert judge.do(lambda: judge.tap.release(start.flow.id))
        sender.sendto(b"third", (lan.server.address(V4), 53))
        assert receiver.recv(100) == b"third"
