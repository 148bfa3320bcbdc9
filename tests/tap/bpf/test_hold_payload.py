"""What waits later than its first packet: a first payload, an established connection."""

from __future__ import annotations

import os
import select
import socket
import threading

import pytest

from appliance.model import Decision, HoldPolicy
from tests.tap.bpf.both import wait_for
from tests.tap.bpf.holding import BOTH_WAYS, FAMILIES, V4, datagrams, ends_of, held, read
from tests.tap.bpf.lan import Judge, nothing

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


PAYLOAD = HoldPolicy(payload=True, deadline_s=300)


@FAMILIES
@BOTH_WAYS
def test_the_first_payload_waits_and_the_handshake_does_not(lan, family, outgoing) -> None:
    client, server = ends_of(lan, outgoing)
    with (
        held(lan, nothing, PAYLOAD) as judge,
        server.listen(family) as listener,
        client.socket(family, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((server.address(family), 80))
        with listener.accept()[0] as accepted:
            accepted.sendall(b"banner")  # who answers need not wait
            assert asker.recv(100) == b"banner"
            asker.sendall(b"GET / HTTP/1.1\r\n\r\n")
            (start,) = wait_for(lambda: judge.starts(80))
            assert start.held
            wait_for(lambda: any(event.data.startswith(b"GET") for event in judge.payloads(start.flow.id)))
            accepted.settimeout(0)
            with pytest.raises(BlockingIOError):
                accepted.recv(100)
            assert judge.do(lambda: judge.tap.release(start.flow.id))
            accepted.settimeout(30)
            assert accepted.recv(100) == b"GET / HTTP/1.1\r\n\r\n"
            asker.sendall(b"second")
            assert accepted.recv(100) == b"second"
        wait_for(lambda: len(judge.payloads(start.flow.id)) >= 3)
        assert [event.data for event in judge.payloads(start.flow.id)].count(b"GET / HTTP/1.1\r\n\r\n") == 1


@FAMILIES
def test_a_first_payload_of_many_segments_goes_on_whole(lan, family) -> None:
    data = os.urandom(300_000)
    with (
        held(lan, nothing, PAYLOAD) as judge,
        lan.server.listen(family) as listener,
        lan.guest.socket(family, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((lan.server.address(family), 80))
        with listener.accept()[0] as accepted:
            accepted.settimeout(30)
            sender = threading.Thread(target=asker.sendall, args=(data,))
            sender.start()
            (start,) = wait_for(judge.starts)
            wait_for(lambda: judge.tap.held() >= 1 and judge.payloads(start.flow.id))
            assert judge.do(lambda: judge.tap.release(start.flow.id))
            assert read(accepted, len(data)) == data
            sender.join()


def test_a_flow_that_is_released_before_its_first_payload_never_waits(lan) -> None:
    released: list[object] = []
    with (
        held(lan, lambda tap, event: released.append(tap.release(event.flow.id)), PAYLOAD) as judge,
        lan.server.listen(V4) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((lan.server.address(V4), 80))
        wait_for(lambda: released == [True])
        asker.sendall(b"at once")
        with listener.accept()[0] as accepted:
            accepted.settimeout(30)
            assert accepted.recv(100) == b"at once"
        assert judge.tap.held() == 0


def test_a_blocked_payload_never_leaves(lan) -> None:
    with (
        held(lan, nothing, PAYLOAD) as judge,
        lan.server.listen(V4) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((lan.server.address(V4), 80))
        with listener.accept()[0] as accepted:
            asker.sendall(b"secret")
            (start,) = wait_for(judge.starts)
            wait_for(lambda: judge.payloads(start.flow.id))
            assert judge.do(lambda: judge.tap.block(start.flow.id, reset=True))
            accepted.settimeout(30)
            with pytest.raises(ConnectionResetError):
                accepted.recv(100)
            with pytest.raises(ConnectionResetError):
                asker.recv(100)


@FAMILIES
def test_an_established_connection_is_paused_and_resumed(lan, family) -> None:
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.listen(family) as listener,
        lan.guest.socket(family, socket.SOCK_STREAM) as asker,
    ):
        asker.connect((lan.server.address(family), 80))
        with listener.accept()[0] as accepted:
            (start,) = wait_for(lambda: judge.starts(80))
            assert judge.do(lambda: judge.tap.hold(start.flow.id, 300, Decision.DENY))
            asker.sendall(b"question")
            accepted.sendall(b"remark")
            wait_for(lambda: judge.tap.held() >= 2)
            accepted.settimeout(0)
            asker.settimeout(0)
            for sock in (accepted, asker):
                with pytest.raises(BlockingIOError):
                    sock.recv(100)
            wait_for(lambda: not judge.tap._ring.ready)
            assert judge.do(lambda: judge.tap.release(start.flow.id))
            assert select.select([accepted], [], [], 30)[0]
            assert select.select([asker], [], [], 30)[0]
            assert (accepted.recv(100), asker.recv(100)) == (b"question", b"remark")


@pytest.mark.parametrize("default", [Decision.ALLOW, Decision.DENY])
def test_a_pause_ends_with_its_default(lan, default) -> None:
    with datagrams(lan) as (judge, start, receiver, sender):
        assert judge.do(lambda: judge.tap.hold(start.flow.id, 1, default))
        sender.sendto(b"second", (lan.server.address(V4), 53))
        wait_for(lambda: judge.tap.held() == 1)
        if default is Decision.ALLOW:
            assert receiver.recv(100) == b"second"
        else:
            talk_id = start.flow.id
            wait_for(lambda: judge.tap._known.find(talk_id).hold is None)
            sender.sendto(b"third", (lan.server.address(V4), 53))
            wait_for(lambda: judge.tap.dropped() == 1)
            receiver.settimeout(0)
            with pytest.raises(BlockingIOError):
                receiver.recv(100)


def test_a_person_may_take_longer_than_the_policy(lan) -> None:
    with (
        held(lan, nothing, HoldPolicy(deadline_s=2)) as judge,
        lan.server.listen(V4) as listener,
        lan.guest.socket(V4, socket.SOCK_STREAM) as client,
    ):
        client.setblocking(False)
        client.connect_ex((lan.server.address(V4), 80))
        (start,) = wait_for(judge.starts)
        assert judge.do(lambda: judge.tap.hold(start.flow.id, 300, Decision.DENY))
        wait_for(lambda: judge.tap.held() >= 3)  # after the policy's deadline
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert judge.do(lambda: judge.tap.release(start.flow.id))
        listener.settimeout(30)
        listener.accept()[0].close()
