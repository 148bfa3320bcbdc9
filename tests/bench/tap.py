"""A live port: what the tap and the flow table cost for a packet, against ``tcpdump -w`` on the same kind of traffic.

Own network namespaces, a bounded rate, one listener at a time, in turn.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench.lab import Lab, say
from tests.bench.measure import Sample
from tests.bench.report import Line
from tests.tap.world import GUEST_MAC, HOST_IP, PORT, World, make_world

ROOT = Path(__file__).resolve().parents[2]
RATE, ROUNDS = 1500, 4  # messages a second; one makes three or four packets


def run(lab: Lab) -> Iterator[Line]:
    if shutil.which("tcpdump") is None:
        say("tap: tcpdump is missing; left out")
        return
    ours, theirs, packets, lost = Sample(), Sample(), 0, 0
    with ExitStack() as stack:
        world = stack.enter_context(make_world("bench"))
        server = start(world.host, "-m", "tests.bench.traffic", "serve", HOST_IP)
        stack.callback(finish, server, signal.SIGKILL)
        wait_for(server.stdout, "ready")
        for _ in range(ROUNDS):
            seen = listen_ourselves(world, lab.sizes.tap_s)
            ours.values.append(seen["cpu_s"] / seen["packets"])
            packets, lost = packets + seen["packets"], lost + seen["lost"]
            theirs.values.append(listen_with_tcpdump(world, lab.sizes.tap_s))
    note = f"{packets:,} packets in {ROUNDS} rounds, {lost} lost; CPU time, tcpdump only writes them to /dev/null"
    yield Line("tap", "one packet, port to flow table", "us", ours, "tcpdump -w", theirs, note=note)


def listen_ourselves(world: World, seconds: float) -> dict:
    """Our listener's own account: packets, CPU seconds, losses."""
    command = (sys.executable, "-m", "tests.bench.tapper", world.host_path, PORT, GUEST_MAC)
    listener = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    wait_for(listener.stdout, "ready")
    make_traffic(world, seconds)
    listener.send_signal(signal.SIGTERM)
    said = json.loads(listener.communicate(timeout=20)[0])
    assert said["packets"] > 0, "the tap saw nothing"
    return said


def listen_with_tcpdump(world: World, seconds: float) -> float:
    """CPU seconds for a packet, start-up included: that is a few milliseconds."""
    command = ["ip", "netns", "exec", world.host, "tcpdump", "-n", "-i", PORT, "-s", "2304", "-w", "/dev/null"]
    before = children_s()
    listener = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(listener.stderr, "listening on")
    sender_s = make_traffic(world, seconds)
    listener.send_signal(signal.SIGINT)
    said = listener.communicate(timeout=20)[1]
    return (children_s() - before - sender_s) / int(re.search(r"(\d+) packets? captured", said)[1])


def make_traffic(world: World, seconds: float) -> float:
    """Send, wait for the end; the CPU seconds that the sender used."""
    before = children_s()
    sender = start(world.guest, "-m", "tests.bench.traffic", "send", HOST_IP, str(seconds), str(RATE))
    assert sender.wait(timeout=seconds + 30) == 0, "the sender failed"
    sender.stdout.close()
    used = children_s() - before
    time.sleep(0.2)
    return used


def children_s() -> float:
    """CPU seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def start(netns: str, *words: str) -> subprocess.Popen:
    command = ["ip", "netns", "exec", netns, sys.executable, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'vm-images'}:{ROOT}"}


def wait_for(stream, text: str) -> None:
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"a process of the benchmark ended before it said {text!r}")


def finish(process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)
    process.communicate(timeout=20)
