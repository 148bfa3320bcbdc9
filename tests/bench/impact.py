"""What watching costs the guest: a CPU loop in an otherwise quiet guest, watched and unwatched in turn.

`parasight watch` stays attached all the time; between the watched rounds it is stopped (SIGSTOP), which on the quiet
guest's side is the same as absent. The loop counts inside the guest, by the guest's clock; rounds are short and in
ABBA order, so that the machine's own moods fall on both alike.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lab.guest import Guest
from tests.bench.lab import Lab, say
from tests.bench.measure import Sample
from tests.bench.report import Line
from tests.bench.tap import ROOT, environment, wait_for

ROUND_S, MARGIN_S = 0.5, 0.05
TICK_HZ = os.sysconf("SC_CLK_TCK")

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
        periods, cpu_s = alternate(watch.pid, rounds)
        offset = guest_clock(guest) - time.monotonic()
        loop.kill(signal.SIGTERM)
        loop.wait(20)
        marks = json.loads(guest.get("/tmp/marks.json"))
    speeds = {True: [], False: []}
    for watched, begin, end in periods:
        speeds[watched].append(speed(marks, begin + offset + MARGIN_S, end + offset - MARGIN_S))
    # As durations: seconds for a million turns, so that less is better as in every other line.
    ours, theirs = (Sample([1e6 / value for value in speeds[watched]]) for watched in (True, False))
    pairs = sorted(a / b for a, b in zip(speeds[True], speeds[False], strict=True))
    quarter = len(pairs) // 4
    spread = f"pair by pair {statistics.median(pairs):.3f} [{pairs[quarter]:.3f} to {pairs[-1 - quarter]:.3f}]"
    share = cpu_s / sum(end - begin for watched, begin, end in periods if watched)
    note = f"{spread}; watch took {100 * share:.1f} % of one CPU of the host"
    yield Line("impact", "a million turns of a loop", "ms", ours, "unwatched", theirs, at_least=0.98, note=note)


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


def alternate(pid: int, rounds: int) -> tuple[list[tuple[bool, float, float]], float]:
    """Watched and unwatched periods by the host's clock, and the CPU seconds of the watched ones."""
    periods, used = [], 0.0
    order = [(number % 4) in (0, 3) for number in range(2 * rounds)]
    for watched in order:
        os.kill(pid, signal.SIGCONT if watched else signal.SIGSTOP)
        before, begin = cpu_seconds(pid), time.monotonic()
        time.sleep(ROUND_S)
        periods.append((watched, begin, time.monotonic()))
        if watched:
            used += cpu_seconds(pid) - before
    os.kill(pid, signal.SIGCONT)
    return periods, used


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK_HZ


def guest_clock(guest: Guest) -> float:
    """The guest's monotonic clock now, to a few milliseconds: half of the fastest of some round trips."""
    best = (float("inf"), 0.0)
    for _ in range(5):
        start = time.monotonic()
        uptime = float(guest.run("cut -d' ' -f1 /proc/uptime").stdout)
        took = time.monotonic() - start
        best = min(best, (took, uptime + took / 2 + 0.005))
    return best[1]


def speed(marks: list[tuple[float, int]], begin: float, end: float) -> float:
    """Turns a second between two times of the guest's clock."""
    inside = [(at, count) for at, count in marks if begin <= at <= end]
    assert len(inside) >= 3, "the loop did not run"
    (first, low), (last, high) = inside[0], inside[-1]
    return (high - low) / (last - first)
