"""The kernel program on a packet socket: sees what tc sees, beside whatever hangs there, and changes nothing."""

import contextlib
import fcntl
import os
import struct
import subprocess
import time
from dataclasses import replace

import pytest

from appliance.errors import HostError, UsageError
from appliance.flow.community import community_id
from appliance.model import Decision, Direction, FlowStarted, GuestId, GuestPort, HoldPolicy
from appliance.tap.bpf.attach import Attachment
from appliance.tap.bpf.layout import Transport
from appliance.tap.bpf.loader import OBSERVE, PROGRAMS
from appliance.tap.bpf.syscalls import load_program
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.netns import call_in_netns
from tests.tap.bpf import both
from tests.tap.bpf.both import open_kernel, tcp_talk, udp_talk
from tests.tap.bpf.test_attach import seen, tc
from tests.tap.world import GUEST_IP, GUEST_IP6, GUEST_MAC, HOST_IP, HOST_IP6, PORT, ip, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")
PATIENCE_S = 60


@pytest.fixture
def world():
    with make_world("ko") as made:
        yield made


def collect_starts(tap, count: int) -> list:
    flows: list = []
    give_up_s = time.monotonic() + PATIENCE_S
    while len(flows) < count and time.monotonic() < give_up_s:
        flows += [event.flow for event in tap.poll(0.05) if isinstance(event, FlowStarted)]
    return flows


@pytest.mark.parametrize("transport", Transport)
def test_beside_a_foreign_ingress_qdisc_both_ways_are_seen(world, transport) -> None:
    tc(world, "qdisc", "add", "dev", PORT, "ingress")
    before = seen(world)
    tap = open_kernel(world, transport=transport, programs=OBSERVE)
    tcp_talk(world, HOST_IP, from_guest=True)
    tcp_talk(world, GUEST_IP6, from_guest=False)
    udp_talk(world, HOST_IP6, from_guest=True)
    udp_talk(world, GUEST_IP, from_guest=False)
    flows = collect_starts(tap, 4)
    assert [flow.direction for flow in flows] == [Direction.OUT, Direction.IN] * 2
    locals_ = [str(flow.tuple.local.ip) for flow in flows]
    assert locals_ == [GUEST_IP, GUEST_IP6, GUEST_IP6, GUEST_IP]
    assert seen(world) == before
    tap.close()
    assert seen(world) == before


def test_what_a_foreign_filter_drops_is_seen_nevertheless(world) -> None:
    shot, unspecified = (
        load_program("other", struct.pack("=BBhiBBhi", 0xB7, 0, 0, answer, 0x95, 0, 0, 0), b"GPL") for answer in (2, -1)
    )  # r0 = answer; exit
    Attachment(GuestPort(PORT, netns=world.host_path), shot, unspecified)
    tap = open_kernel(world, programs=OBSERVE)
    with both.packet_socket(world.guest_path, "eth0") as guest:
        dropped = frame(GUEST_MAC, "52:54:00:77:00:01", (GUEST_IP, 4000), (HOST_IP, 9999))
        assert tell_of(tap, lambda: guest.send(dropped)).tuple.remote.port == 9999
    tap.close()
    os.close(shot)
    os.close(unspecified)


def test_nothing_is_queued_and_nobody_else_is_disturbed(world) -> None:
    first = open_kernel(world, programs=OBSERVE)
    second = open_kernel(world)
    udp_talk(world, HOST_IP, from_guest=True)
    first_flows, second_flows = collect_starts(first, 1), collect_starts(second, 1)
    assert [str(flow.tuple) for flow in first_flows] == [str(flow.tuple) for flow in second_flows]
    (hook,) = first._hooks
    with pytest.raises(BlockingIOError):
        hook.detach.__self__._socket.recv(65536)
    first.close()
    second.close()


@pytest.mark.parametrize("programs", [PROGRAMS, OBSERVE], ids=["tc", "socket"])
def test_a_port_that_was_down_is_seen_when_it_is_up_again(world, programs) -> None:
    tap = open_kernel(world, programs=programs)
    ip("-n", world.host, "link", "set", PORT, "down")
    tap.poll(0)
    assert not tap.exhausted
    ip("-n", world.host, "link", "set", PORT, "up")
    udp_talk(world, HOST_IP, from_guest=True, timeout_s=PATIENCE_S)
    assert collect_starts(tap, 1)
    ip("-n", world.host, "link", "del", PORT)
    give_up_s = time.monotonic() + PATIENCE_S
    while not tap.exhausted and time.monotonic() < give_up_s:
        tap.poll(0.05)
    assert tap.exhausted
    tap.close()


def test_a_wrong_port_is_named(world) -> None:
    for changes, words in (({"host": world.guest}, "there is no port"), ({"host": "nosuch"}, "cannot open network")):
        with pytest.raises(UsageError, match=words):
            open_kernel(replace(world, **changes), programs=OBSERVE)
    port = GuestPort(PORT, netns=world.host_path, ifindex=4711)
    with pytest.raises(HostError, match="another interface by now"):
        KernelTap(both.VM, [port], time.time_ns, community_id=community_id, programs=OBSERVE)
    ip("-n", world.host, "tuntap", "add", "pstun9", "mode", "tun")
    ip("-n", world.host, "link", "set", "pstun9", "up")
    with pytest.raises(UsageError, match="no Ethernet interface"):
        KernelTap(
            both.VM, [GuestPort("pstun9", netns=world.host_path)], time.time_ns,
            community_id=community_id, programs=OBSERVE,
        )  # fmt: skip


# -- a macvtap: what the guest sends leaves by the port --

MACVTAP_MAC = "52:54:00:77:00:33"


@pytest.fixture
def macvtap(world, tmp_path):
    """A macvtap on the port, and the descriptor that QEMU would hold."""
    words = ("name", "psmvt0", "address", MACVTAP_MAC, "type", "macvtap", "mode", "bridge")
    made = subprocess.run(
        ["ip", "-n", world.host, "link", "add", "link", PORT, *words], check=False, capture_output=True, text=True
    )
    assert made.returncode == 0, f"this kernel has no macvtap (CONFIG_MACVTAP): {made.stderr}"
    ip("-n", world.host, "link", "set", "psmvt0", "up")
    show = ["ip", "netns", "exec", world.host, "sh", "-c", "cat /sys/class/net/psmvt0/macvtap/*/dev"]
    numbers = subprocess.run(show, check=True, capture_output=True, text=True, timeout=10).stdout
    node = tmp_path / "tap"
    os.mknod(node, 0o600 | 0o020000, os.makedev(*map(int, numbers.split(":"))))
    descriptor = call_in_netns(world.host_path, lambda: os.open(node, os.O_RDWR | os.O_NONBLOCK))
    fcntl.ioctl(descriptor, 0x400454CA, struct.pack("16sH22x", b"psmvt0", 0x1002))  # TUNSETIFF: IFF_TAP | IFF_NO_PI
    yield descriptor
    os.close(descriptor)


def frame(src_mac: str, dst_mac: str, src: tuple[str, int], dst: tuple[str, int]) -> bytes:
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    layers = IP(src=src[0], dst=dst[0]) / UDP(sport=src[1], dport=dst[1]) / b"hello"
    return bytes(Ether(src=src_mac, dst=dst_mac) / layers)


def tell_of(tap, send):
    """The next UDP flow, of a frame sent until it was seen: an interface that has just come up may still drop it."""
    give_up_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_s:
        send()
        for event in tap.poll(0.2):
            if isinstance(event, FlowStarted) and event.flow.ip_protocol == 17:
                return event.flow
    pytest.fail("no flow was told")


@pytest.mark.parametrize("programs", [PROGRAMS, OBSERVE], ids=["tc", "socket"])
def test_the_sides_of_a_macvtap_are_turned_round(world, macvtap, programs) -> None:
    port = GuestPort("psmvt0", MACVTAP_MAC, world.host_path)
    tap = KernelTap(GuestId("port:x"), [port], time.time_ns, community_id=community_id, programs=programs)
    mine, peer = ("10.77.0.33", 4000), (GUEST_IP, 53)
    with both.packet_socket(world.guest_path, "eth0") as other:
        asked = tell_of(tap, lambda: os.write(macvtap, frame(MACVTAP_MAC, GUEST_MAC, mine, peer)))
        other.send(frame(GUEST_MAC, MACVTAP_MAC, peer, mine))  # its answer
        question = frame(GUEST_MAC, MACVTAP_MAC, (GUEST_IP, 4001), ("10.77.0.33", 80))
        was_asked = tell_of(tap, lambda: other.send(question))
    told = [(flow.direction, str(flow.tuple.local), str(flow.tuple.remote)) for flow in (asked, was_asked)]
    assert told == [
        (Direction.OUT, "10.77.0.33:4000", f"{GUEST_IP}:53"),
        (Direction.IN, "10.77.0.33:80", f"{GUEST_IP}:4001"),
    ]
    tap.close()


def test_what_a_macvtap_guest_sends_and_gets_can_be_held_and_released(world, macvtap) -> None:
    port = GuestPort("psmvt0", MACVTAP_MAC, world.host_path)
    tap = KernelTap(GuestId("port:x"), [port], time.time_ns, community_id=community_id)
    tap.hold_new(HoldPolicy(deadline_s=3, default=Decision.DENY))
    mine, peer = ("10.77.0.33", 4000), (GUEST_IP, 53)
    with both.packet_socket(world.guest_path, "eth0") as other:
        other.bind(("eth0", 3))  # ETH_P_ALL
        other.settimeout(0.2)
        out = frame(MACVTAP_MAC, GUEST_MAC, mine, peer)
        asked = tell_of(tap, lambda: os.write(macvtap, out))
        assert not arrives(out, lambda: other.recv(2048), 0.2)
        assert tap.release(asked.id)
        assert arrives(out, lambda: other.recv(2048), PATIENCE_S)
        back = frame(GUEST_MAC, MACVTAP_MAC, (GUEST_IP, 4001), ("10.77.0.33", 80))
        was_asked = tell_of(tap, lambda: other.send(back))
        assert not arrives(back, lambda: os.read(macvtap, 2048), 0.2)
        assert tap.release(was_asked.id)
        assert arrives(back, lambda: os.read(macvtap, 2048), PATIENCE_S)
    tap.close()


def arrives(frame: bytes, receive, timeout_s: float) -> bool:
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        with contextlib.suppress(BlockingIOError, TimeoutError):
            if receive() == frame:
                return True
            continue
        time.sleep(0.01)
    return False
