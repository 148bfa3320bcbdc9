"""The kernel tap tells what the user-space tap tells, of the same traffic at the same port."""

import subprocess

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP, Dot1Q, Ether

from appliance.model import FlowEnd, FlowEnded, FlowStarted
from tests.tap.bpf.both import both_taps, packet_socket, summary, tcp_talk, udp_talk
from tests.tap.world import GUEST_IP, GUEST_IP6, GUEST_MAC, HOST_IP, HOST_IP6, PORT, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")
HOST_MAC = "52:54:00:77:00:01"


@pytest.fixture
def world():
    with make_world("kp") as made:
        yield made


@pytest.mark.parametrize(
    ("address", "from_guest"),
    [(HOST_IP, True), (HOST_IP6, True), (GUEST_IP, False), (GUEST_IP6, False)],
    ids=["v4-out", "v6-out", "v4-in", "v6-in"],
)
def test_real_connections_and_datagrams(world, address, from_guest) -> None:
    with both_taps(world) as both:
        for _ in range(3):
            tcp_talk(world, address, from_guest=from_guest)
        udp_talk(world, address, from_guest=from_guest)
        udp_talk(world, address, from_guest=from_guest, port=53)
        user, kernel = both.finish()
        assert summary(kernel) == summary(user)
        assert len(summary(user)) >= 5
        ours, theirs = both.kernel.stats(), both.user.stats()
        assert (count_data(ours), ours.flows, ours.events) == (count_data(theirs), theirs.flows, theirs.events)
        assert ours.lost == 0
        times = [[e.at_ns for e in told if isinstance(e, FlowStarted)] for told in (user, kernel)]
        assert all(abs(one - two) < 20_000_000 for one, two in zip(*times, strict=True))


def count_data(stats) -> int:
    """Without IPv6's own talk, which may fall between the two attachments."""
    return stats.packets - sum(count for name, count in stats.ignored if name in {"nd", "mld"})


@pytest.mark.parametrize("address", [HOST_IP, HOST_IP6])
def test_bulk_with_segmentation_offload(world, address) -> None:
    size = 8_000_000
    with both_taps(world) as both:
        tcp_talk(world, address, from_guest=True, ask=b"x" * size, answer=b"y" * 500_000)
        user, kernel = both.finish()
        assert len(kernel) <= 10
        assert not both.user.stats().lost, "its ring holds all of it, also in segments"
        assert summary(kernel) == summary(user)


def test_fragments(world) -> None:
    with both_taps(world) as both:
        udp_talk(world, HOST_IP, from_guest=True, size=5000)
        udp_talk(world, HOST_IP6, from_guest=True, size=5000)
        user, kernel = both.finish()
        assert summary(kernel) == summary(user)
        counts = [event.counts.packets_out for event in kernel if isinstance(event, FlowEnded)]
        assert counts.count(16) == 2  # 4 datagrams of 4 fragments each


def tcp(out: bool, flags: str, seq: int, ack: int = 0, data: bytes = b"", sport: int = 4000, dport: int = 80, **outer):
    """One segment of a connection that the guest (port ``sport``) has with port ``dport``."""
    ends = (sport, dport) if out else (dport, sport)
    layer = TCP(sport=ends[0], dport=ends[1], flags=flags, seq=seq, ack=ack) / data
    return out, packet(out, layer, **outer)


def packet(out: bool, layer, v6: bool = False, tags: tuple[int, ...] = ()):
    kind, ends = (IPv6, (GUEST_IP6, HOST_IP6)) if v6 else (IP, (GUEST_IP, HOST_IP))
    macs = (GUEST_MAC, HOST_MAC)[:: 1 if out else -1]
    frame = Ether(src=macs[0], dst=macs[1])
    for tag in tags:
        frame = frame / Dot1Q(vlan=tag)
    ends = ends[:: 1 if out else -1]
    return frame / kind(src=ends[0], dst=ends[1]) / layer


def inject(world, frames) -> None:
    with packet_socket(world.guest_path, "eth0") as guest, packet_socket(world.host_path, PORT) as host:
        for out, frame in frames:
            (guest if out else host).send(bytes(frame))


OPEN = [tcp(True, "S", 100), tcp(False, "SA", 500, 101), tcp(True, "A", 101, 501)]
CASES = {
    "vlan": [
        tcp(True, "S", 1, tags=(7,)), tcp(False, "SA", 1, 2, tags=(7,)), tcp(True, "S", 1, sport=4001, tags=(9,)),
    ],
    "qinq": [tcp(True, "S", 1, tags=(7, 11)), tcp(False, "SA", 1, 2, tags=(7, 11))],
    "many-tags": [tcp(True, "S", 1, tags=tags) for tags in ((0, 0, 0), (1, 0, 0, 7), (0,) * 6)],
    "midstream": [tcp(True, "PA", 10, 20, b"hello"), tcp(False, "A", 20, 15), tcp(False, "PA", 20, 15, b"there")],
    "midstream-server": [tcp(False, "PA", 10, 20, b"hello", 22, 5000), tcp(True, "A", 20, 15, b"", 22, 5000)],
    "syn-ack-first": [tcp(False, "SA", 500, 101), tcp(True, "A", 101, 501), tcp(True, "PA", 101, 501, b"x")],
    "retransmitted-syn": [tcp(True, "S", 100), tcp(True, "S", 100), tcp(True, "S", 100)],
    "port-reuse": [*OPEN, tcp(True, "S", 90000), tcp(False, "SA", 7, 90001), tcp(True, "A", 90001, 8)],
    "reset": [*OPEN, tcp(True, "PA", 101, 501, b"bye"), tcp(False, "RA", 501, 104), tcp(True, "A", 104, 501)],
    "refused": [tcp(True, "S", 100), tcp(False, "RA", 0, 101)],
    "reset-outside-the-window": [*OPEN, tcp(False, "R", 3_000_000_000), tcp(True, "PA", 101, 501, b"on")],
    "fin-then-reuse": [
        *OPEN, tcp(True, "FA", 101, 501), tcp(False, "FA", 501, 102), tcp(True, "A", 102, 502),
        tcp(False, "FA", 501, 102), tcp(True, "S", 70000), tcp(False, "SA", 9, 70001),
    ],
    "overlapping-payloads": [
        *OPEN, tcp(True, "PA", 101, 501, b"abcdef"), tcp(True, "PA", 101, 501, b"abcdef"),
        tcp(True, "PA", 104, 501, b"defghi"), tcp(True, "PA", 113, 501, b"later"), tcp(True, "PA", 110, 501, b"gap"),
        tcp(True, "PA", 118, 501, b"more"),
    ],
    "keep-alive": [*OPEN, tcp(True, "A", 100, 501, b"\0"), tcp(True, "PA", 101, 501, b"data")],
    "fast-open": [tcp(True, "S", 100, 0, b"early"), tcp(False, "SA", 500, 106), tcp(True, "PA", 106, 501, b"next")],
    "late-data-on-a-closed-flow": [
        *OPEN, tcp(False, "RA", 501, 101), tcp(True, "PA", 101, 501, b"a"), tcp(False, "PA", 501, 102, b"b"),
        tcp(True, "PA", 102, 502, b"c"),
    ],
    "stray-close": [tcp(True, "FA", 5, 5), tcp(False, "R", 5)],
    "icmp": [(out, packet(out, ICMP(type=8 * out, id=77) / b"ping")) for out in (True, False)],
    "icmp-answer-first": [(False, packet(False, ICMP(type=0, id=5)))],
    "udp-answer-first": [(False, packet(False, UDP(sport=53, dport=40000) / b"answer"))],
    "extension-headers": [(True, packet(True, IPv6ExtHdrDestOpt() / UDP(sport=5, dport=6) / b"deep", v6=True))],
    "padding": [(True, packet(True, UDP(sport=5, dport=6) / b"x") / (b"\0" * 17))],
    "ignored": [
        (True, Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP()),
        (False, Ether(src=HOST_MAC, dst="52:54:00:99:99:99") / IP(dst="10.77.0.9") / UDP()),
        (False, Ether(src=HOST_MAC, dst="01:00:5e:00:00:fb") / IP(dst="224.0.0.251") / UDP(sport=5353, dport=5353)),
        (True, Ether(src=GUEST_MAC, dst=HOST_MAC, type=0x88B5) / b"own"),
        (True, Ether(src=GUEST_MAC, dst=HOST_MAC, type=0x0800) / b"\x45\0\0"),
        (True, Ether(src=GUEST_MAC, dst=HOST_MAC, type=0x0800) / bytes(40)),
    ],
}  # fmt: skip
CASES["other-protocol"] = [
    (True, Ether(src=GUEST_MAC, dst=HOST_MAC) / IP(src=GUEST_IP, dst=HOST_IP, proto=47) / b"gre")
]


@pytest.mark.parametrize("case", CASES)
def test_made_frames(world, case) -> None:
    silence(world)
    with both_taps(world) as both:
        inject(world, CASES[case])
        user, kernel = both.finish()
        assert summary(kernel) == summary(user)
        ours, theirs = both.kernel.stats(), both.user.stats()
        assert (ours.packets, ours.bytes, ours.ignored) == (theirs.packets, theirs.bytes, theirs.ignored)
        if case not in {"stray-close", "ignored"}:
            assert kernel


def silence(world) -> None:
    """Neither side may answer made frames: its kernel knows nothing of them."""
    hook = "{{ type filter hook ingress device {} priority 0; policy drop; }}"
    for name, device in ((world.host, PORT), (world.guest, "eth0")):
        for command in (
            ["sysctl", "-q", "-w", "net.ipv6.conf.all.disable_ipv6=1"],
            ["nft", "add", "table", "netdev", "quiet"],
            ["nft", "add", "chain", "netdev", "quiet", "in", hook.format(device)],
        ):
            subprocess.run(["ip", "netns", "exec", name, *command], check=True, capture_output=True, timeout=10)


def test_the_end_of_the_watch_and_of_the_guest_are_told(world) -> None:
    with both_taps(world) as both:
        udp_talk(world, HOST_IP, from_guest=True)
        user, kernel = both.finish()
        assert {event.reason for event in kernel if isinstance(event, FlowEnded)} == {FlowEnd.WATCH_ENDED}
        assert summary(kernel) == summary(user)
