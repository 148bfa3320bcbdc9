"""What the tests of the hand share: a tap that holds, and connections through it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from appliance.model import HoldPolicy
from tests.tap.bpf.both import wait_for
from tests.tap.bpf.lan import Judge, nothing, release

V4, V6 = socket.AF_INET, socket.AF_INET6
BOTH_WAYS = pytest.mark.parametrize("outgoing", [True, False], ids=["out", "in"])
FAMILIES = pytest.mark.parametrize("family", [V4, V6], ids=["v4", "v6"])
LONG = HoldPolicy(deadline_s=300)


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


@contextmanager
def datagrams(lan) -> Iterator[tuple]:
    """A flow of the guest to port 53 whose first datagram has passed: its judge and start, who takes and who sends."""
    with (
        Judge(lan.open_tap(), nothing) as judge,
        lan.server.socket(V4, socket.SOCK_DGRAM) as receiver,
        lan.guest.socket(V4, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((lan.server.address(V4), 53))
        sender.sendto(b"first", (lan.server.address(V4), 53))
        assert receiver.recv(100) == b"first"
        (start,) = wait_for(lambda: judge.starts(53))
        yield judge, start, receiver, sender


def read(sock, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(1 << 20)):
        data += more
    return data


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
