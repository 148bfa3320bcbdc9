"""New flows wait for a verdict: released, refused, in the directions that a policy names."""

from __future__ import annotations

import socket

import pytest

from appliance.model import Act, Decision, FlowEnd, HoldPolicy
from tests.tap.bpf.both import collect, wait_for
from tests.tap.bpf.holding import BOTH_WAYS, FAMILIES, LONG, V4, ends_of, forge_syn, held, packet_socket, talk
from tests.tap.bpf.lan import Sniffer, nothing

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@FAMILIES
@BOTH_WAYS
def test_a_released_connection_goes_on_with_the_very_syn_that_was_held(lan, family, outgoing) -> None:
    client, server = ends_of(lan, outgoing)
    with held(lan) as judge:
        talk(client, server, family)
        (start,) = wait_for(judge.starts)
        assert start.held
        (end,) = wait_for(lambda: judge.ends(start.flow.id))
        assert end.reason is FlowEnd.FIN
        assert (end.counts.packets_out, end.counts.packets_in) == (5, 5), (
            "no SYN had to be repeated, none counted twice"
        )


@FAMILIES
@BOTH_WAYS
def test_datagrams_of_a_released_flow_arrive_in_order_and_unchanged(lan, family, outgoing) -> None:
    client, server = ends_of(lan, outgoing)
    sent = [bytes([number]) * (number * 97 + 1) for number in range(5)]
    with (
        held(lan, nothing) as judge,
        server.socket(family, socket.SOCK_DGRAM) as receiver,
        client.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((server.address(family), 53))
        for data in sent:
            sender.sendto(data, (server.address(family), 53))
        wait_for(lambda: judge.tap.held() >= 5)
        (start,) = wait_for(judge.starts)
        receiver.settimeout(0)
        with pytest.raises(BlockingIOError):
            receiver.recv(100)
        wait_for(lambda: not judge.tap._ring.ready)
        assert judge.do(lambda: judge.tap.release(start.flow.id))
        receiver.settimeout(30)
        assert [receiver.recv(2000) for _ in sent] == sent
        receiver.sendto(b"answer", sender.getsockname()[:2])
        sender.sendto(b"more", (server.address(family), 53))
        assert receiver.recv(100) == b"more"
    wait_for(lambda: len(judge.payloads(start.flow.id)) >= 3)


@pytest.mark.parametrize("lets", [True, False], ids=["released", "blocked"])
def test_a_datagram_that_was_held_while_the_first_was_judged_shares_its_fate(lan, lets) -> None:
    """A resolver asks for A and AAAA at once; the second waits in the ring when the verdict on the first falls."""
    tap = lan.open_tap()
    tap.hold_new(LONG)
    with (
        lan.server.socket(V4, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(V4, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((lan.server.address(V4), 53))
        sender.sendto(b"A", (lan.server.address(V4), 53))
        (start,) = collect(tap, bool)
        sender.sendto(b"AAAA", (lan.server.address(V4), 53))
        wait_for(lambda: tap.held() == 2)
        assert tap._ring.ready
        flow = start.flow.id
        assert tap.release(flow) if lets else tap.block(flow)
        wait_for(lambda: tap.poll(0.01) is not None and not tap._ring.ready)
        assert tap._known.find(flow).hold is None, "it does not wait again"
        if lets:
            assert [receiver.recv(100), receiver.recv(100)] == [b"A", b"AAAA"]
        else:
            receiver.settimeout(0)
            with pytest.raises(BlockingIOError):
                receiver.recv(100)
    tap.close()


@FAMILIES
def test_a_blocked_guest_is_refused_at_once_and_nothing_leaves(lan, family) -> None:
    def block(tap, event) -> None:
        assert tap.block(event.flow.id)

    with held(lan, block) as judge, Sniffer(lan.server) as wire, lan.server.listen(family):
        for _ in range(3):
            with (
                lan.guest.socket(family, socket.SOCK_STREAM) as client,
                pytest.raises(ConnectionRefusedError),
            ):
                client.connect((lan.server.address(family), 80))
        assert len(judge.starts(80)) == 3
        assert all(wait_for(lambda f=start.flow.id: judge.ends(f))[0].reason is FlowEnd.RST for start in judge.starts())
        assert wire.frames(6) == []


@FAMILIES
def test_a_blocked_visitor_hears_nothing(lan, family) -> None:
    def block(tap, event) -> None:
        assert tap.block(event.flow.id)

    with held(lan, block) as judge, Sniffer(lan.guest) as wire, Sniffer(lan.server) as back, lan.guest.listen(family):
        with lan.server.socket(family, socket.SOCK_STREAM, 0.5) as client, pytest.raises(TimeoutError):
            client.connect((lan.guest.address(family), 80))
        assert len(judge.starts(80)) == 1
        assert wire.frames(6) == back.frames(6) == []


def test_a_refused_flow_stays_refused_whatever_is_repeated(lan) -> None:
    """The kernel keeps it also after our verdict has ended with the flow."""

    def block(tap, event) -> None:
        assert tap.block(event.flow.id)

    with held(lan, block) as judge, Sniffer(lan.guest) as seen, Sniffer(lan.server) as wire:
        with lan.guest.socket(V4, socket.SOCK_STREAM) as client, pytest.raises(ConnectionRefusedError):
            client.connect((lan.server.address(V4), 80))
        (start,) = wait_for(judge.starts)
        wait_for(lambda: judge.ends(start.flow.id))
        (reset,) = seen.frames(6)
        syn = forge_syn(reset)
        before = judge.tap.dropped()
        with packet_socket(lan.guest) as raw:
            for _ in range(5):
                raw.send(syn)
        wait_for(lambda: judge.tap.dropped() >= before + 5)
        assert len(judge.starts()) == 1
        assert wire.frames(6) == []


def test_only_the_directions_that_the_policy_names_wait(lan) -> None:
    with held(lan, nothing, HoldPolicy(incoming=False, deadline_s=300)) as judge:
        talk(lan.server, lan.guest, V4)
        assert judge.tap.held() == 0
    with held(lan, nothing, HoldPolicy(outgoing=False, deadline_s=300)) as judge:
        talk(lan.guest, lan.server, V4)
        assert judge.tap.held() == 0
        judge.do(lambda: judge.tap.hold_new(None))
        talk(lan.server, lan.guest, V4)


def test_what_waits_goes_on_when_the_watch_ends(lan) -> None:
    tap = lan.open_tap()
    tap.hold_new(LONG)
    with lan.server.listen(V4) as listener, lan.guest.socket(V4, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        client.connect_ex((lan.server.address(V4), 80))
        collect(tap, bool)
        tap.close()
        listener.accept()[0].close()


def test_unknown_flows_are_not_acted_on(lan) -> None:
    from appliance.model import FlowId

    tap = lan.open_tap()
    stranger = FlowId(tap.vm, 77)
    assert not tap.release(stranger)
    assert not tap.block(stranger, reset=True)
    assert not tap.hold(stranger, 1, Decision.ALLOW)
    assert {act.value for act in Act} == {"release", "block", "reset", "hold", "redirect"}
    tap.close()
