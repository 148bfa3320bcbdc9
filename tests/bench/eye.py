"""The packet eye in the kernel: what watching a port costs, kernel and user space together, against others.

A tap in the kernel slows down whoever sends. So one sender serves three ports in turn, slice by slice: one that nobody
watches, ours and tcpdump's. The cost of a listener is the CPU time by which the sender's grew, and its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from tests.bench.lab import Lab, say
from tests.bench.listeners import is_here, listening
from tests.bench.measure import Sample
from tests.bench.report import Line
from tests.bench.stage import Stage, make_stage, missing, send

SHORT_RATE = 20_000  # new flows a second
SHORT_PACKETS = 10
# Who dissects; what they can bear without losing much, in flows a second; how many times our price theirs shall be.
PEERS = (("nfstream", 1_000, 5), ("tshark", 2_000, 15), ("scapy", 150, 100))
TCPDUMP = "tcpdump -w"


@dataclass
class Cost:
    """Of one listener, in seconds for a packet: what it adds to the sender, slice by slice, and its own."""

    kernel: Sample
    user: float

    @property
    def total(self) -> Sample:
        return Sample([spent + self.user for spent in self.kernel.values])

    def __str__(self) -> str:
        return f"{self.kernel.p50 * 1e9:.0f} + {self.user * 1e9:.0f} ns"


def run(lab: Lab) -> Iterator[Line]:
    if lack := missing() or (None if is_here(TCPDUMP) else "tcpdump"):
        say(f"eye: {lack} is missing; left out")
        return
    sizes = lab.sizes
    with ExitStack() as stack:
        stages = [stack.enter_context(make_stage(tag)) for tag in "abc"]
        send(stages, "flood", 2, 2000)  # caches, the bridges' tables
        ours, theirs, note = compare(stages, "bulk", sizes.eye_slices, sizes.eye_packets, 0)
        yield Line("eye", "a packet, bulk of 1,514 B", "ns", ours.total, TCPDUMP, theirs.total, at_least=1, note=note)
        slices = max(2, sizes.eye_slices // 10)
        ours, theirs, note = compare(stages, "short", slices, sizes.eye_flows, SHORT_RATE)
        what = f"a packet, {SHORT_PACKETS}-packet flows"
        yield Line("eye", what, "ns", ours.total, TCPDUMP, theirs.total, at_least=1 / 3, note=note)
        if sizes.peers:
            yield from compare_dissectors(stages[0], what, slices * sizes.eye_flows, sizes.eye_rounds)


def compare(stages: list[Stage], kind: str, slices: int, count: int, rate: int) -> tuple[Cost, Cost, str]:
    """Ours and tcpdump's."""
    unwatched, one, other = stages
    with listening(one, "ours") as ours, listening(other, TCPDUMP) as theirs:
        before = ours.settle(), theirs.settle()
        sent = send([unwatched, one, other], kind, slices, count, rate)
        used = ours.settle() - before[0], theirs.settle() - before[1]
    costs = [
        Cost(
            Sample([with_it - without for with_it, without in zip(wire.costs, sent[0].costs, strict=True)]),
            own / wire.packets,
        )
        for wire, own in zip(sent[1:], used, strict=True)
    ]
    told = check(ours.report(), kind, slices * count, sent[1].packets)
    base = Sample(list(sent[0].costs)).p50 * 1e9
    note = f"{costs[0]}, tcpdump {costs[1]} (kernel + user), {base:.0f} ns unwatched; {told}"
    return costs[0], costs[1], note


def compare_dissectors(stage: Stage, what: str, flows: int, rounds: int) -> Iterator[Line]:
    """User CPU against those who take every packet apart: all in turn, every second round backwards."""
    turns = [("ours", flows, SHORT_RATE)]
    for name, rate, _ in PEERS:
        if is_here(name):
            turns.append((name, 4 * rate, rate))
        else:
            say(f"eye: {name} is missing; left out")
    samples = {name: Sample() for name, _, _ in turns}
    notes = []
    for number in range(rounds):
        for name, count, rate in turns if number % 2 == 0 else reversed(turns):
            spent, told = own_cost(stage, name, count, rate)
            samples[name].values.append(spent)
            notes += [told] if told else []
    for name, rate, aim in PEERS:
        if name in samples:
            note = f"ours at {SHORT_RATE:,} flows/s, {name} at {rate:,}; ours: {' | '.join(dict.fromkeys(notes))}"
            yield Line("eye", f"{what}, user CPU", "ns", samples["ours"], name, samples[name], at_least=aim, note=note)


def own_cost(stage: Stage, name: str, flows: int, rate: int) -> tuple[float, str]:
    """A listener's own CPU seconds for a packet of short flows, which come without a pause."""
    with listening(stage, name) as listener:
        before = listener.settle()
        (sent,) = send([stage], "short", 1, flows, rate)
        used = listener.settle() - before
    return used / sent.packets, check(listener.report(), "short", flows, sent.packets) if name == "ours" else ""


def check(said: dict, kind: str, count: int, packets: int) -> str:
    """Our counters hold every flow and every packet, whatever the ring has lost."""
    flows = 1 if kind == "bulk" else count
    assert said["flows"] == flows, f"{flows} flows were sent, {said['flows']} told"
    assert said["packets"] == packets, f"{packets} packets were sent, {said['packets']} counted"
    events = said["events"]
    if kind == "bulk":
        assert events <= 10, f"{events} events for one flow"
    return f"{events / flows:.3g} events a flow, {said['lost']} lost, {said['recovered']} flows found by the sweep"
