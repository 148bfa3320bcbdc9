"""What watching costs the guest: a CPU loop in an otherwise quiet guest, watched and unwatched in turn.

`parasight watch` stays attached all the time; between the watched rounds it is stopped (SIGSTOP), which on the quiet
guest's side is the same as absent. The loop counts inside the guest, by the guest's clock. Rounds are short, in ABBA
order, and compared pair by pair, so that the machine's own moods fall on both alike; where others use the machine too,
the same turns by QEMU's own CPU time tell what is theirs and what is ours.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lab.guest import Guest
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample
from tests.bench.report import Line
from tests.bench.tap import ROOT, environment, wait_for

ROUND_S, MARGIN_S = 0.25, 0.03

# Counts as fast as it can; notes (time, count) about every 10 ms.
LOOP = """
import json, signal, time
done, marks, count = [], [], 0
signal.signal(signal.SIGTERM, lambda *_: done.append(1))
print("READY", flush=True)
clock = time.monotonic
while not done:
    until = clock() + 0.01
    while clock() < until:
        for _ in range(200):
            count += 1
    marks.append((round(clock(), 5), count))
with open("/tmp/marks.json", "w") as file:
    json.dump(marks, file)
"""


class Period(NamedTuple):
    """One round by the host's clock; ``guest_share`` is QEMU's CPU time in it, per second."""

    watched: bool
    begin: float
    end: float
    guest_share: float
    watch_cpu_s: float


def run(lab: Lab) -> Iterator[Line]:
    with ExitStack() as stack:
        guest = lab.quiet(stack)
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="parasight-bench-"))
        watch = start_watch(guest, Path(home))
        stack.callback(end_watch, watch)
        guest.put("/tmp/loop.py", LOOP.encode())
        loop = guest.spawn("exec /usr/bin/python3 -S -E /tmp/loop.py")
        loop.wait_for("READY")
        rounds = lab.sizes.impact_rounds
        say(f"impact: {rounds} rounds of {ROUND_S} s, watched and unwatched in turn")
        early = clock_offset(guest)
        periods = alternate(watch.pid, guest.pid, rounds)
        late = clock_offset(guest)
        if watch.poll() is not None or any(period.watched and not period.watch_cpu_s for period in periods[-8:]):
            raise RuntimeError("the watch has ended early, or does nothing: nothing was measured")
        loop.kill(signal.SIGTERM)
        loop.wait(20)
        marks = json.loads(guest.get("/tmp/marks.json"))
    turns = []
    for period in periods:
        # The two clocks drift apart a little.
        share = (period.begin - periods[0].begin) / (periods[-1].end - periods[0].begin)
        offset = early + share * (late - early)
        turns.append(speed(marks, period.begin + offset + MARGIN_S, period.end + offset - MARGIN_S))
    pairs, by_cpu = [], []
    for number in range(0, len(periods), 2):
        watched, unwatched = (number, number + 1) if periods[number].watched else (number + 1, number)
        if turns[watched] and turns[unwatched]:
            pairs.append(turns[unwatched] / turns[watched])
            by_cpu.append(pairs[-1] * periods[watched].guest_share / periods[unwatched].guest_share)
    yield Line("impact", "time for the same turns", "x", Sample(pairs), "unwatched", Sample([1.0]), at_least=0.98)
    cpu_s = sum(period.watch_cpu_s for period in periods)
    cost = cpu_s / sum(period.end - period.begin for period in periods if period.watched)
    note = f"half of the pairs are within {spread(pairs)}, by CPU time {spread(by_cpu)}"
    note += f"; watch took {100 * cost:.2f} % of one CPU of the host"
    yield Line("impact", "the same, by QEMU's CPU time", "x", Sample(by_cpu), "unwatched", Sample([1.0]), note=note)


def spread(values: list[float]) -> str:
    """The quartiles."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return f"{ordered[quarter]:.3f} to {ordered[-1 - quarter]:.3f}"


def start_watch(guest: Guest, home: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "appliance.cli", "watch", f"qemu:{guest.pid}", "--output", "jsonl"]
    env = {**environment(), "PARASIGHT_STATE": str(home), "XDG_CACHE_HOME": str(home)}
    watch = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    wait_for(watch.stderr, "ready")
    return watch


def end_watch(watch: subprocess.Popen) -> None:
    watch.send_signal(signal.SIGCONT)
    watch.terminate()
    watch.communicate(timeout=20)


def alternate(watch: int, qemu: int, rounds: int) -> list[Period]:
    """Watched and unwatched periods in turn: A B, B A, A B ..."""
    periods = []
    for number in range(2 * rounds):
        watched = number % 4 in (0, 3)
        os.kill(watch, signal.SIGCONT if watched else signal.SIGSTOP)
        begin, watch_s, qemu_s = time.monotonic(), cpu_seconds(watch), cpu_seconds(qemu)
        time.sleep(ROUND_S)
        end = time.monotonic()
        share = (cpu_seconds(qemu) - qemu_s) / (end - begin)
        periods.append(Period(watched, begin, end, share, cpu_seconds(watch) - watch_s if watched else 0.0))
    os.kill(watch, signal.SIGCONT)
    return periods


def cpu_seconds(pid: int) -> float:
    """Time on a CPU of all threads, to the nanosecond (Documentation/scheduler/sched-stats.rst)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def clock_offset(guest: Guest) -> float:
    """The guest's monotonic clock less ours, to a few milliseconds: by the fastest of some round trips."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        start = time.monotonic()
        uptime = float(guest.run("cut -d' ' -f1 /proc/uptime").stdout)
        end = time.monotonic()
        best = min(best, (end - start, uptime + 0.005 - (start + end) / 2))
    return best[1]


def speed(marks: list[tuple[float, int]], begin: float, end: float) -> float:
    """Turns a second between two times of the guest's clock; 0 if the guest hardly ran then."""
    inside = [(at, count) for at, count in marks if begin <= at <= end]
    if len(inside) < 3:
        return 0.0
    (first, low), (last, high) = inside[0], inside[-1]
    return (high - low) / (last - first)
