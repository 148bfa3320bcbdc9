"""Changes bytes of a guest at random and looks at it, again and again: nothing may hang, crash or raise but GuestError.

The bytes that are changed are those that a clean look reads, so every structure on the way is hit, whatever the guest.
One round in ``fresh`` attaches anew to the damaged guest; the others go on with an eye that knows it from before.
"""

from __future__ import annotations

import random
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

from appliance.errors import GuestError
from appliance.model import Direction, FiveTuple, Flow, FlowId, GuestId, GuestProcess, GuestSocket, Snapshot
from appliance.ports import GuestEye, GuestMemory
from tests.worlds.overlay import PAGE, Overlay

FRESH = 16  # attaching takes as long as several looks
TELL = 2000  # rounds between two signs of life
HANG_S = 30.0  # of processor time in one round: far beyond what a look takes
MAX_CHANGES = 6
MAX_EVIDENCE = 2  # processes that are looked through in one round
VM = GuestId("file:fuzz")


class HangError(Exception):
    """One round took longer than any deadline allows."""


@dataclass
class Target:
    """One guest: its memory, and how to open an eye on it."""

    name: str
    memory: GuestMemory
    open: Callable[[GuestMemory], GuestEye]


@dataclass
class Result:
    """What became of all rounds of one target."""

    name: str
    rounds: int = 0
    spans: int = 0  # reads of a clean look, whose bytes were changed
    outcomes: Counter[str] = field(default_factory=Counter)
    gaps: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def fuzz(target: Target, rounds: int, seed: int = 0, fresh: int = FRESH) -> Result:
    """Do so many rounds; ``failures`` tells each seed that reproduces one."""
    memory = Overlay(target.memory, live=False)
    result = Result(target.name)
    memory.spans = set()
    eye = target.open(memory)
    snapshot = _look(eye, random.Random(seed), None)
    spans = sorted(memory.spans)
    memory.spans = None
    result.spans = len(spans)
    for number in range(rounds):
        chance = random.Random((seed << 32) | number)
        memory.pages = dict(_damage(chance, target.memory, spans))
        start = time.process_time()
        try:
            with _watched(HANG_S):
                if number % fresh == 0:
                    memory.live = number // fresh % 2 == 1  # an eye takes other ways on a guest that runs
                    eye = target.open(memory)
                found = _look(eye, chance, snapshot)
            result.outcomes["looked"] += 1
            result.gaps += len(found.gaps)
        except GuestError as error:
            result.outcomes[type(error).__name__] += 1
        except Exception:  # the very thing that is looked for
            result.failures.append(f"{target.name}, seed {seed}, round {number}:\n{traceback.format_exc()}")
        result.rounds += 1
        result.slowest_s = max(result.slowest_s, time.process_time() - start)
        if result.rounds % TELL == 0:
            print(f"{target.name}: {result.rounds:,} of {rounds:,} rounds", flush=True)
        if number % fresh == fresh - 1:  # what an eye remembers of the damage is part of the trial, but not for ever
            memory.pages = {}
            eye = target.open(memory)
    return result


def _look(eye: GuestEye, chance: random.Random, before: Snapshot | None) -> Snapshot:
    """Everything an eye is asked in its life."""
    found = eye.read_snapshot()
    known = before or found
    sockets = [socket for socket in known.sockets if socket.remote is not None]
    for socket in chance.sample(sockets, min(4, len(sockets))) if before else sockets:
        eye.find_owner(_flow(socket, chance))
    processes = _chosen(known.processes, chance, everything=before is None)
    for process in processes:
        eye.read_process(process.key)
        eye.find_foreign(process)
    eye.read_pulse()
    return found


def _chosen(processes: tuple[GuestProcess, ...], chance: random.Random, *, everything: bool) -> list[GuestProcess]:
    return list(processes) if everything else chance.sample(processes, min(MAX_EVIDENCE, len(processes)))


def _flow(socket: GuestSocket, chance: random.Random) -> Flow:
    assert socket.remote is not None
    direction = chance.choice((Direction.IN, Direction.OUT))
    return Flow(FlowId(VM, 1), FiveTuple(socket.protocol, socket.local, socket.remote), direction, 0)


def _damage(chance: random.Random, memory: GuestMemory, spans: list[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """Pages with some bytes changed, all in places that are read."""
    pages: dict[int, bytearray] = {}
    for _ in range(chance.randint(1, MAX_CHANGES)):
        gpa, size = chance.choice(spans)
        at = gpa + chance.randrange(size)
        width = chance.choice((1, 1, 2, 4, 8, 8))
        at -= at % width
        old = memory.readv([(at, width)])[0] or bytes(width)
        for offset, value in enumerate(_changed(chance, old, memory, spans)):
            number, place = divmod(at + offset, PAGE)
            if number not in pages:
                pages[number] = bytearray(memory.readv([(number * PAGE, PAGE)])[0] or bytes(PAGE))
            pages[number][place] = value
    return ((number, bytes(page)) for number, page in pages.items())


def _changed(chance: random.Random, old: bytes, memory: GuestMemory, spans: list[tuple[int, int]]) -> bytes:
    """Noise, a flipped bit, a border case, a small step, or what stands elsewhere in the guest (a pointer, likely)."""
    width = len(old)
    number = int.from_bytes(old, "little")
    match chance.randrange(6):
        case 0:
            return chance.randbytes(width)
        case 1:
            return (number ^ 1 << chance.randrange(8 * width)).to_bytes(width, "little")
        case 2:
            edges = (0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1)
            return chance.choice(edges).to_bytes(width, "little")
        case 3:
            step = chance.choice((-64, -16, -8, -1, 1, 8, 16, 64))
            return ((number + step) % (1 << 8 * width)).to_bytes(width, "little")
        case 4:
            return struct.pack("<Q", 0xDDDD_DDDD_DDDD_DDDD)[:width]
        case _:
            gpa, size = chance.choice(spans)
            at = gpa + chance.randrange(max(1, size - width))
            return memory.readv([(at - at % width, width)])[0] or old


@contextmanager
def _watched(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError(f"a round takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, ring)  # processor time: others may have the machine for a while
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def print_result(result: Result) -> None:
    """For people."""
    outcomes = ", ".join(f"{name} {count}" for name, count in result.outcomes.most_common())
    print(
        f"{result.name}: {result.rounds:,} rounds over {result.spans:,} places, {len(result.failures)} failures; "
        f"{outcomes}; {result.gaps:,} gaps named; slowest {result.slowest_s:.2f} s",
        flush=True,
    )
    for failure in chain(result.failures[:5]):
        print(failure, flush=True)
