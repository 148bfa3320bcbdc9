"""Who listens at the port in the benchmarks of the packet eye: ours, and others, each in processes of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.tap.netns import call_in_netns
from tests.bench.stage import GUEST_MAC, HERE, PORT, Stage, cpu_s, family

ROOT = HERE.parents[1]
READY_S = 60  # nfstream imports pandas


@dataclass
class Listener:
    """One listener at work. ``said``: what it has printed, once it has ended."""

    process: subprocess.Popen[str]
    said: str = ""

    def cpu_s(self) -> float:
        """CPU seconds so far, of its children too."""
        return cpu_s(family(self.process.pid))

    def settle(self) -> float:
        """Wait until it has dealt with what it was given; its CPU seconds then."""
        before, deadline = -1.0, time.monotonic() + 30
        while (now := self.cpu_s()) - before > 0.01 and time.monotonic() < deadline:
            before = now
            time.sleep(0.25)
        return now

    def signal(self, number: int) -> None:
        """Send one to the listener itself: what starts it has become it."""
        self.process.send_signal(number)

    def wait_for(self, word: str) -> None:
        """Until ours has said it."""
        assert self.process.stdout is not None
        assert word in self.process.stdout.readline(), f"our listener ended before it said {word}"

    def report(self) -> dict:
        """The JSON that ours prints at its end."""
        return json.loads(self.said.splitlines()[-1])


OURS = (sys.executable, "-m", "tests.bench.listen", "kernel", PORT, GUEST_MAC)
COMMANDS = {
    "tcpdump -w": ("tcpdump", "-n", "-i", PORT, "-s", "256", "-w", "/dev/null"),
    "tshark": (
        "tshark",
        "-n",
        "-Q",
        "-i",
        PORT,
        "-T",
        "fields",
        "-e",
        "ip.src",
        "-e",
        "tcp.srcport",
        "-e",
        "frame.len",
    ),
    "nfstream": (sys.executable, "-m", "tests.bench.listen", "nfstream", PORT),
    "scapy": (sys.executable, "-m", "tests.bench.listen", "scapy", PORT),
    "ours": OURS,
    "ours, blocking": (*OURS, "block"),
    "ours, holding": (*OURS, "hold"),
}


def is_here(name: str) -> bool:
    """Whether this listener can be started."""
    if name in {"nfstream", "scapy"}:
        return importlib.util.find_spec(name) is not None
    return shutil.which(COMMANDS[name][0]) is not None


@contextlib.contextmanager
def listening(stage: Stage, name: str) -> Iterator[Listener]:
    """Start it, wait until it listens; end it, and only it."""
    ours = COMMANDS[name][: len(OURS)] == OURS
    process = subprocess.Popen(
        stage.inside(*COMMANDS[name]),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE if ours else subprocess.DEVNULL,
        stderr=None if ours else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    listener = Listener(process)
    try:
        if ours:
            listener.wait_for("ready")
        else:
            _wait_for_socket(stage, process)
        yield listener
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT if name == "tcpdump -w" else signal.SIGTERM)
        try:
            listener.said = process.communicate(timeout=30)[0] or ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)


def _wait_for_socket(stage: Stage, process: subprocess.Popen[str]) -> None:
    """Until a packet socket is there (packet(7), ``/proc/net/packet``) and its owner has come to rest."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{process.args} ended before it listened"
        if len(call_in_netns(stage.host_path, _read_packet_sockets).splitlines()) > 1:
            time.sleep(0.5)
            return
        time.sleep(0.05)
    raise AssertionError(f"{process.args} does not listen")


def _read_packet_sockets() -> str:
    with open("/proc/thread-self/net/packet", encoding="ascii") as file:  # noqa: PTH123 (of this very thread)
        return file.read()
