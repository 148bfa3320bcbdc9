"""The hand: what a hold adds to a connection, what held flows cost the others, and what dropping costs.

Real connections between two network stacks over three equal wires in turn: one that nobody watches, one that is
watched, and one where every new connection is held until our listener, in a process of its own, has said yes.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

from appliance.tap.netns import call_in_netns
from tests.bench.lab import Lab, say
from tests.bench.listeners import Listener, listening
from tests.bench.measure import Sample
from tests.bench.report import Line
from tests.bench.stage import Stage, make_stage, missing, send
from tests.tap.world import ip

PEER_IP, SERVICE = "10.78.0.3", 7000
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no TIME_WAIT is left
PINGS = 2000


def run(lab: Lab) -> Iterator[Line]:
    if lack := missing():
        say(f"hand: {lack} is missing; left out")
        return
    with ExitStack() as stack:
        stages = [stack.enter_context(make_stage(tag)) for tag in "abc"]
        yield from drop(stages, lab.sizes.eye_slices, lab.sizes.eye_packets)
        services = [stack.enter_context(serve(stage)) for stage in stages]
        yield from hold(stages, services, lab.sizes.hold_rounds)
        yield crowd(stages[2], services[2], max(1, lab.sizes.hold_rounds // 30), lab.sizes.held)


def drop(stages: list[Stage], slices: int, count: int) -> Iterator[Line]:
    """A flood of one flow: dropped by verdict, against watched and forwarded."""
    _, watched, blocked = stages
    with listening(watched, "ours"), listening(blocked, "ours, blocking") as ours:
        send(stages, "flood", 2, 2000)
        ours.settle()
        plain, passed, dropped = (Sample(list(wire.costs)) for wire in send(stages, "flood", slices, count))
    said = ours.report()
    assert said["dropped"] > slices * count, f"only {said['dropped']} packets were dropped"
    note = f"{plain.p50 * 1e9:.0f} ns unwatched; CPU time, the sender's own included"
    yield Line("hand", "a flooded packet, dropped", "ns", dropped, "forwarded", passed, at_least=1, note=note)


def hold(stages: list[Stage], services: list[socket.socket], rounds: int) -> Iterator[Line]:
    """``connect()`` in turn over the three wires."""
    _, watched, held = stages
    times = [Sample() for _ in stages]
    with listening(watched, "ours"), listening(held, "ours, holding") as ours:
        for number in range(-3, rounds):
            for index in range(len(stages)) if number % 2 else reversed(range(len(stages))):
                took = connect(stages[index], services[index])
                if number >= 0:
                    times[index].values.append(took)
    assert ours.report()["held"] == rounds + 3, "not every connection was held"
    plain, seen, waited = times
    yield Line("hand", "connect(), watched", "ms", seen, "unwatched", plain)
    added = Sample([after - before for after, before in zip(waited.values, plain.values, strict=True)])
    note = f"held {waited.p50 * 1e3:.3f} ms, p99 {waited.p99 * 1e3:.3f} ms; an instant yes, and the SYN sent on"
    yield Line("hand", "what a hold adds to connect()", "ms", added, "unwatched", plain, below=0.0003, note=note)


def crowd(stage: Stage, service: socket.socket, rounds: int, many: int) -> Line:
    """The slowest of the other flows' round trips while many new ones wait, and while none does."""
    quiet, crowded = Sample(), Sample()  # the 99th percentile of each round
    with listening(stage, "ours, holding") as ours, ExitStack() as stack:
        near, far = stack.enter_context(pair(stage, service))
        for _ in range(rounds):
            quiet.values.append(ping(near, far))
            toggle(ours, "keeping")
            with ExitStack() as waiting:
                for _ in range(many):
                    one = waiting.enter_context(client(stage))
                    one.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        one.connect((PEER_IP, SERVICE))
                crowded.values.append(ping(near, far))
                toggle(ours, "releasing")
                for _ in range(many):
                    reset(service.accept()[0])
    held = ours.report()["held"]
    assert held == rounds * many + 1, f"{held} of {rounds * many + 1} connections were held"
    note = f"median of {rounds} rounds of {PINGS:,}, {many:,} new connections held at once"
    return Line("hand", "round trip of others, p99", "us", crowded, "none held", quiet, at_least=0.9, note=note)


# -- connections --


@contextlib.contextmanager
def serve(stage: Stage) -> Iterator[socket.socket]:
    """Addresses for both ends of a wire, and a listener at the far one."""
    for netns, address in ((stage.guest, "10.78.0.2/24"), (stage.peer, f"{PEER_IP}/24")):
        ip("-n", netns, "addr", "add", address, "dev", "eth0")
    path = f"/run/netns/{stage.peer}"
    with call_in_netns(path, lambda: socket.create_server((PEER_IP, SERVICE), backlog=4096)) as service:
        service.settimeout(10)
        yield service


def client(stage: Stage) -> socket.socket:
    """A socket of the guest."""
    made = call_in_netns(f"/run/netns/{stage.guest}", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    made.settimeout(10)
    return made


def reset(connection: socket.socket) -> None:
    """Close it without a trace."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def connect(stage: Stage, service: socket.socket) -> float:
    """Seconds of one ``connect()``."""
    with client(stage) as one:
        start = time.perf_counter()
        one.connect((PEER_IP, SERVICE))
        took = time.perf_counter() - start
        reset(service.accept()[0])
    return took


@contextlib.contextmanager
def pair(stage: Stage, service: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of an established connection."""
    with client(stage) as near:
        near.connect((PEER_IP, SERVICE))
        with service.accept()[0] as far:
            for end in (near, far):
                end.settimeout(10)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield near, far


def ping(near: socket.socket, far: socket.socket) -> float:
    """The 99th percentile of round trips, both ends served by this one thread: only the wire and its tap are timed."""
    sample = Sample()
    for _ in range(PINGS):
        start = time.perf_counter()
        near.send(b"ping")
        far.recv(16)
        far.send(b"pong")
        near.recv(16)
        sample.values.append(time.perf_counter() - start)
    return sample.p99


def toggle(ours: Listener, word: str) -> None:
    """Let new flows wait, or let all that wait go on; until our listener says that it does."""
    ours.signal(signal.SIGUSR1)
    ours.wait_for(word)
