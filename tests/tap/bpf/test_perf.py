"""The perf event array: for the kernels that have no ring buffer, told and lost as by the ring."""

import os
import select
import socket
import struct
import threading
import time

import pytest

from appliance.model import Direction, FlowEnd, FlowEnded, FlowPayload, FlowStarted, HoldPolicy
from appliance.tap.bpf import perf, sweep
from appliance.tap.bpf.layout import Transport
from appliance.tap.bpf.perf import choose_size, read_online
from appliance.tap.netns import call_in_netns
from tests.tap.bpf.both import open_kernel, tcp_talk
from tests.tap.world import HOST_IP, make_world

pytestmark = pytest.mark.root("network namespaces and bpf(2)")
PATIENCE_S = 60


@pytest.fixture
def world():
    with make_world("kf") as made:
        yield made


@pytest.fixture
def guest(world):
    with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as made:
        yield made


def collect_until(tap, condition) -> list:
    events: list = []
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition(events):
        assert time.monotonic() < give_up_s, f"only {len(events)} events came: {tap.stats()}, held {tap.held()}"
        events += tap.poll(0.05)
    return events


def starts(events) -> list:
    return [event.flow for event in events if isinstance(event, FlowStarted)]


def ends(events) -> list:
    return [event for event in events if isinstance(event, FlowEnded)]


def test_a_flow_on_two_processors_is_told_from_its_start(world, guest) -> None:
    """The guest asks on one processor and is answered on another, while we read."""
    tap = open_kernel(world, transport=Transport.PERF)
    processors = sorted(os.sched_getaffinity(0))
    server = call_in_netns(world.host_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    ports = range(20000, 20300)

    def answer() -> None:
        os.sched_setaffinity(0, {processors[-1]})
        for _ in ports:
            data, peer = server.recvfrom(100)
            server.sendto(data, peer)

    def ask() -> None:
        os.sched_setaffinity(0, {processors[0]})
        for port in ports:
            with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
                sock.bind(("", port))
                sock.settimeout(PATIENCE_S)
                sock.sendto(b"ask", (HOST_IP, 7))
                sock.recv(100)

    server.bind((HOST_IP, 7))
    server.settimeout(PATIENCE_S)
    threads = [threading.Thread(target=work) for work in (answer, ask)]
    for thread in threads:
        thread.start()
    events = collect_until(tap, lambda told: sum(isinstance(one, FlowPayload) for one in told) >= 2 * len(ports))
    for thread in threads:
        thread.join()
    server.close()
    told: dict[int, list] = {}
    for event in events:
        number = event.flow.id.number if isinstance(event, FlowStarted) else event.flow.number
        told.setdefault(number, []).append(event)
    assert len(told) == len(ports)
    for first, asked, answered in told.values():
        assert isinstance(first, FlowStarted)
        assert (asked.direction, answered.direction) == (Direction.OUT, Direction.IN)
        assert first.at_ns <= asked.at_ns <= answered.at_ns
    assert tap.stats().lost == tap.recovered == 0
    tap.close()


def test_records_that_wrap_round_the_end_of_the_buffer_are_whole(world, guest) -> None:
    tap = open_kernel(world, transport=Transport.PERF, ring_bytes=perf.PAGE)  # for each processor
    for index in range(120):
        data = bytes((index + offset) % 251 for offset in range(1 + index * 13 % 1400))
        guest.sendto(data, (HOST_IP, 9000 + index))
        events = collect_until(tap, lambda told: any(isinstance(one, FlowPayload) for one in told))
        (payload,) = [event.data for event in events if isinstance(event, FlowPayload)]
        assert payload == data
    assert tap.stats().lost == 0
    tap.close()


def test_events_that_found_a_buffer_full_are_counted_and_made_up_for(world, guest) -> None:
    tap = open_kernel(world, transport=Transport.PERF, ring_bytes=perf.PAGE)
    for port in range(8000, 8100):
        guest.sendto(b"x" * 100, (HOST_IP, port))
    tcp_talk(world, HOST_IP, from_guest=True)  # its start and its end are lost
    lost = tap.stats().lost
    assert lost > 30
    events = collect_until(tap, lambda told: len(starts(told)) >= 101 and ends(told))
    flows = starts(events)
    assert sorted(flow.tuple.remote.port for flow in flows if flow.ip_protocol == 17) == list(range(8000, 8100))
    (end,) = ends(events)
    assert end.reason is FlowEnd.FIN
    assert end.counts.packets_out >= 5
    assert tap.recovered > 30
    processors = os.sched_getaffinity(0)
    try:  # what a buffer lost, it says before its next record
        for port, processor in enumerate(sorted(processors), 8200):
            os.sched_setaffinity(0, {processor})
            guest.sendto(b"x", (HOST_IP, port))
            collect_until(tap, starts)
    finally:
        os.sched_setaffinity(0, processors)
    assert 0 < tap._ring.lost <= tap.stats().lost
    assert sum(end.counts.packets_out == 1 for end in ends(tap.close())) >= 100, "no flow lost in the counters"


def test_an_end_that_was_not_understood_is_found_by_the_sweep(world, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "TIMEOUT_NS", (200_000_000,) * 11)
    tap = open_kernel(world, transport=Transport.PERF)
    tcp_talk(world, HOST_IP, from_guest=True)
    events = collect_until(tap, starts)
    for _ in tap._ring.records(1 << 10):  # as if they had come before the start
        pass
    if not ends(events):  # on a very slow machine a sweep was faster
        events += collect_until(tap, ends)
    (end,) = ends(events)
    assert end.reason is FlowEnd.FIN
    tap.close()


def test_its_descriptor_is_readable_as_long_as_something_waits(world, guest) -> None:
    tap = open_kernel(world, transport=Transport.PERF)
    while tap.poll(0.2):
        pass
    for port in range(9000, 9003):
        guest.sendto(b"x", (HOST_IP, port))
    seen = 0
    while seen < 3:
        readable, _, _ = select.select([tap], [], [], PATIENCE_S)
        assert readable
        seen += len(starts(tap.poll(0)))
    tap.poll(0)
    assert not select.select([tap], [], [], 0)[0]
    tap.close()


def test_a_connection_is_held_with_its_whole_frame_and_released_or_refused(world) -> None:
    tap = open_kernel(world, transport=Transport.PERF, patience_s=PATIENCE_S)
    tap.hold_new(HoldPolicy(deadline_s=PATIENCE_S))
    results: list[str] = []

    def connect() -> None:
        with call_in_netns(world.guest_path, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as client:
            client.settimeout(PATIENCE_S)
            try:
                client.connect((HOST_IP, 8080))
                results.append("connected")
            except ConnectionRefusedError:
                results.append("refused")

    with call_in_netns(world.host_path, lambda: socket.create_server((HOST_IP, 8080))):
        for act in (tap.release, tap.block):
            client = threading.Thread(target=connect)
            client.start()
            is_held = lambda told: any(isinstance(one, FlowStarted) and one.held for one in told)  # noqa: E731
            events = collect_until(tap, is_held)
            (flow,) = [event.flow for event in events if isinstance(event, FlowStarted) and event.held]
            assert act(flow.id)
            client.join()
    assert results == ["connected", "refused"]
    tap.close()


class _Head:
    def __init__(self, at_ns: int, starts: bool = False) -> None:
        self.at_ns, self.starts = at_ns, starts


def test_a_young_record_waits_for_older_ones_of_other_processors() -> None:
    now = 1_000_000_000
    old, young, start = _Head(now - 2 * perf.SLACK_NS), _Head(now - 10), _Head(now - 5, starts=True)
    choose = perf._choose
    assert choose([young, old], now, alone=False) is old
    assert choose([young], now, alone=False) is None
    assert choose([young], now, alone=True) is young, "nobody can have an older one"
    assert choose([young, start], now, alone=False) is start, "a start is told at once"


@pytest.mark.parametrize(
    ("text", "cpus"), [("0\n", {0}), ("0-3\n", {0, 1, 2, 3}), ("0-1,4,6-7\n", {0, 1, 4, 6, 7}), ("2,5", {2, 5})]
)
def test_the_processors_that_run_are_read(text, cpus, tmp_path, monkeypatch) -> None:
    path = tmp_path / "online"
    path.write_text(text)
    monkeypatch.setattr(perf, "ONLINE", path)
    assert read_online() == cpus


@pytest.mark.parametrize(
    ("total", "cpus", "each"),
    [(8 << 20, 2, 4 << 20), (8 << 20, 3, 2 << 20), (8 << 20, 256, perf.CPU_BYTES), (4096, 8, 4096), (1, 1, perf.PAGE)],
)
def test_a_buffer_is_a_power_of_two_and_never_tiny_on_large_hosts(total, cpus, each) -> None:
    assert choose_size(total, cpus) == each


def test_a_processor_that_comes_and_goes_is_followed(world, guest, tmp_path, monkeypatch) -> None:
    every = perf.ONLINE.read_text("ascii")
    path = tmp_path / "online"
    path.write_text("0\n")
    monkeypatch.setattr(perf, "ONLINE", path)
    monkeypatch.setattr(perf, "ONLINE_NS", 0)
    tap = open_kernel(world, transport=Transport.PERF)
    assert set(tap._ring._buffers) == {0}
    path.write_text(every)
    tap.poll(0)
    assert set(tap._ring._buffers) == read_online()
    path.write_text("0\n")
    give_up_s = time.monotonic() + PATIENCE_S
    while set(tap._ring._buffers) != {0} and time.monotonic() < give_up_s:
        tap.poll(0)
    assert set(tap._ring._buffers) == {0}
    tap.close()


def test_the_attribute_is_as_the_first_kernels_took_it() -> None:
    assert len(perf._ATTR) == struct.unpack_from("=I", perf._ATTR, 4)[0] == 64  # PERF_ATTR_SIZE_VER0
