"""New flows wait for a verdict: released, refused, forgotten, at a deadline, without an appliance."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time

import pytest

from appliance.model import Act, Decision, FlowEnd, HoldPolicy
from tests.tap.bpf.both import collect, wait_for
from tests.tap.bpf.lan import Judge, Sniffer, make_lan, nothing, release
from tests.tap.world import ip

pytestmark = pytest.mark.root("network namespaces and bpf(2)")

V4, V6 = socket.AF_INET, socket.AF_INET6
BOTH_WAYS = pytest.mark.parametrize("outgoing", [True, False], ids=["out", "in"])
FAMILIES = pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
LONG = HoldPolicy(deadline_s=300)


@pytest.fixture
def lan():
    with make_lan("kh") as made:
        yield made


def held(lan, decide=release, policy=LONG, **options) -> Judge:
    tap = lan.open_tap(**options)
    tap.hold_new(policy)
    return Judge(tap, decide)


def ends_of(lan, outgoing: bool):
    return (lan.guest, lan.server) if outgoing else (lan.server, lan.guest)


def talk(client, server, family, ask: bytes = b"ask", answer: bytes = b"answer") -> None:
    """One TCP connection, whole."""
    with server.listen(family) as listener, client.socket(family, socket.SOCK_STREAM) as asker:
        asker.connect((server.address(family), 80))
        with listener.accept()[0] as accepted:
            accepted.settimeout(30)
            sender = threading.Thread(target=asker.sendall, args=(ask,))
            sender.start()
            assert read(accepted, len(ask)) == ask
            sender.join()
            accepted.sendall(answer)
            assert read(asker, len(answer)) == answer


def read(sock, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(1 << 20)):
        data += more
    return data


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


def forge_syn(reset: bytes) -> bytes:
    """The SYN that this reset answered, once more."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    answer = Ether(reset)
    head = Ether(src=answer.dst, dst=answer.src) / IP(src=answer[IP].dst, dst=answer[IP].src)
    layer = TCP(sport=answer[TCP].dport, dport=answer[TCP].sport, flags="S", seq=answer[TCP].ack - 1)
    return bytes(head / layer)


def packet_socket(host):
    from tests.tap.bpf.both import packet_socket

    return packet_socket(host.path, "eth0")


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
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.socket(V4, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(V4, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((lan.server.address(V4), 53))
        sender.sendto(b"first", (lan.server.address(V4), 53))
        assert receiver.recv(100) == b"first"
        (start,) = wait_for(lambda: judge.starts(53))
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
