"""The same port seen by both taps at once: what the user-space tap tells is the measure of the kernel tap."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

from appliance.flow.community import community_id
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.model import FlowEnded, FlowEvent, FlowPayload, FlowStarted, GuestId, GuestPort
from appliance.tap.af_packet import PortSource
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.netns import call_in_netns
from tests.tap.world import GUEST_MAC, PORT, World

VM = GuestId("port:test")


def open_kernel(world: World, **options) -> KernelTap:
    port = GuestPort(PORT, GUEST_MAC, world.host_path)
    options = {"patience_s": 60, **options}  # a busy machine may stop us for seconds
    return KernelTap(VM, [port], time.time_ns, community_id=community_id, **options)


def collect(tap, until, timeout_s: float = 60) -> list[FlowEvent]:
    """Until the condition on what was told is met; a busy machine may need long."""
    events: list[FlowEvent] = []
    deadline = time.monotonic() + timeout_s
    while not until(events) and time.monotonic() < deadline:
        events += tap.poll(0.05)
    return events


def drain(tap) -> list[FlowEvent]:
    """Until it has been silent for 0.3 s, and was asked often enough in that time."""
    events: list[FlowEvent] = []
    quiet, asked = time.monotonic() + 0.3, 0
    while time.monotonic() < quiet or asked < 4:
        asked += 1
        if told := tap.poll(0.05):
            events += told
            quiet, asked = time.monotonic() + 0.3, 0
    return events


def wait_for(condition, timeout_s: float = 60):
    """What the condition returns, once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


class Both:
    """Both taps on one port."""

    def __init__(self, world: World) -> None:
        self.world = world
        source = PortSource(GuestPort(PORT, GUEST_MAC, world.host_path), ring_bytes=64 << 20)
        self.user = TrackedTap(VM, source, FlowTable(VM, [GUEST_MAC]), time.time_ns)
        self.kernel = open_kernel(world)

    def finish(self) -> tuple[list[FlowEvent], list[FlowEvent]]:
        return drain(self.user) + self.user.close(), drain(self.kernel) + self.kernel.close()


@contextlib.contextmanager
def both_taps(world: World) -> Iterator[Both]:
    both = Both(world)
    try:
        yield both
    finally:
        both.user.close()
        both.kernel.close()


def summary(events: list[FlowEvent]) -> list[tuple]:
    """What one tap told, without times, by flow in the order of their starts."""
    told: dict[int, list] = {}
    for event in events:
        if isinstance(event, FlowStarted):
            flow = event.flow
            head = (str(flow.tuple), flow.direction, flow.vlan, flow.ip_protocol, flow.icmp_type, flow.midstream)
            told[flow.id.number] = [flow.id.number, *head, flow.community_id]
        elif isinstance(event, FlowPayload):
            told[event.flow.number].append((event.direction, event.index, event.data))
        elif isinstance(event, FlowEnded):
            told[event.flow.number].append((event.reason, event.counts))
    return [tuple(entry) for entry in told.values()]


def packet_socket(path: str, device: str) -> socket.socket:
    sock = call_in_netns(path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))

    def bind() -> None:
        sock.bind((device, 0))

    call_in_netns(path, bind)
    return sock


def tcp_talk(world: World, address: str, *, from_guest: bool, ask: bytes = b"ask", answer: bytes = b"answer") -> int:
    server_side, client_side = (world.host_path, world.guest_path)[:: 1 if from_guest else -1]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with call_in_netns(server_side, lambda: socket.create_server((address, 8080), family=family)) as server:
        client = call_in_netns(client_side, lambda: socket.create_connection((address, 8080), timeout=30))
        with client, server.accept()[0] as accepted:
            sender = threading.Thread(target=client.sendall, args=(ask,))
            sender.start()
            pump(accepted, len(ask))
            sender.join()
            accepted.sendall(answer)
            pump(client, len(answer))
            return client.getsockname()[1]


def udp_talk(
    world: World, address: str, *, from_guest: bool, port: int = 9999, size: int = 3, timeout_s: float = 30
) -> None:
    server_side, client_side = (world.host_path, world.guest_path)[:: 1 if from_guest else -1]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        call_in_netns(server_side, lambda: socket.socket(family, socket.SOCK_DGRAM)) as server,
        call_in_netns(client_side, lambda: socket.socket(family, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((address, port))
        server.settimeout(timeout_s)
        client.settimeout(timeout_s)
        for _ in range(4):
            client.sendto(b"q" * size, (address, port))
            data, peer = server.recvfrom(65536)
            server.sendto(b"a" * len(data), peer)
            client.recv(65536)


def pump(sock: socket.socket, size: int) -> None:
    sock.settimeout(30)
    while size > 0:
        size -= len(sock.recv(min(size, 1 << 20)))
