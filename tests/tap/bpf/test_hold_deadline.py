"""Flows that wait for a verdict that comes late or not at all, and an appliance that falls silent."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time

import pytest

from appliance.model import Decision, HoldPolicy
from tests.tap.bpf.holding import LONG, V4, held, talk
from tests.tap.bpf.lan import Judge, nothing, release

pytestmark = pytest.mark.root("network namespaces and bpf(2)")


@pytest.mark.parametrize("default", [Decision.ALLOW, Decision.DENY])
def test_the_kernel_keeps_the_deadline_when_nobody_polls(lan, default) -> None:
    tap = lan.open_tap()
    tap.hold_new(HoldPolicy(deadline_s=0.2, default=default))
    try:
        with lan.server.listen(V4), lan.guest.socket(V4, socket.SOCK_STREAM, 30) as client:
            if default is Decision.ALLOW:
                client.connect((lan.server.address(V4), 80))
            else:
                client.settimeout(2.5)  # two repetitions
                with pytest.raises(TimeoutError):
                    client.connect((lan.server.address(V4), 80))
                assert tap.dropped() >= 1
            assert tap.held() >= 1
    finally:
        tap.close()


@pytest.mark.parametrize("default", [Decision.ALLOW, Decision.DENY])
def test_without_a_verdict_the_default_is_carried_out_at_the_deadline(lan, default) -> None:
    policy = HoldPolicy(deadline_s=0.3, default=default)
    with held(lan, nothing, policy) as judge, lan.server.listen(V4):
        began = time.monotonic()
        with lan.guest.socket(V4, socket.SOCK_STREAM) as client:
            outcome = client.connect_ex((lan.server.address(V4), 80))
        assert outcome == (0 if default is Decision.ALLOW else errno.ECONNREFUSED)
        assert time.monotonic() - began >= 0.3
        assert len(judge.starts()) == 1


def test_an_appliance_that_is_silent_fails_open(lan) -> None:
    tap = lan.open_tap(patience_s=0.3)
    tap.hold_new(LONG)
    try:
        time.sleep(0.4)
        talk(lan.guest, lan.server, V4)
        assert tap.held() == 0
    finally:
        tap.close()


def test_what_waits_when_the_appliance_falls_silent_passes_when_it_is_repeated(lan) -> None:
    tap = lan.open_tap(patience_s=0.3)
    try:
        tap.hold_new(LONG)
        talk(lan.guest, lan.server, V4)
    finally:
        tap.close()


def test_an_appliance_that_is_silent_fails_closed_where_that_was_chosen(lan) -> None:
    tap = lan.open_tap(patience_s=0.3, fail_closed=True)
    try:
        with lan.server.listen(V4) as listener, lan.guest.socket(V4, socket.SOCK_STREAM) as old:
            old.connect((lan.server.address(V4), 80))
            with listener.accept()[0] as accepted:
                tap.hold_new(HoldPolicy(deadline_s=0.2))
                time.sleep(0.4)
                with lan.guest.socket(V4, socket.SOCK_STREAM, 2.5) as client, pytest.raises(TimeoutError):
                    client.connect((lan.server.address(V4), 80))
                old.sendall(b"living connections go on")
                accepted.settimeout(30)
                assert accepted.recv(100)
    finally:
        tap.close()


def test_a_heartbeat_of_another_thread_keeps_the_holds(lan) -> None:
    tap = lan.open_tap(patience_s=1.5)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            tap.beat()

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        tap.hold_new(LONG)
        with lan.guest.socket(V4, socket.SOCK_STREAM, 2.5) as client, pytest.raises(TimeoutError):
            client.connect((lan.server.address(V4), 80))
        assert tap.held() >= 2
    finally:
        stop.set()
        heart.join()
        tap.close()
    tap.beat()


def test_flows_whose_verdict_comes_after_the_deadline_are_not_lost(lan) -> None:
    """A long walk kept us from looking: what was held waits in the ring, and a late yes still counts."""
    tap = lan.open_tap()
    tap.hold_new(HoldPolicy(deadline_s=0.2, default=Decision.DENY))
    with lan.server.listen(V4) as listener, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(lan.guest.socket(V4, socket.SOCK_STREAM)) for _ in range(20)]
        for client in clients:
            client.setblocking(False)
            assert client.connect_ex((lan.server.address(V4), 80)) == errno.EINPROGRESS
        time.sleep(1)
        with Judge(tap, release) as judge:
            for _ in clients:
                listener.accept()[0].close()
            assert len(judge.starts(80)) == 20
