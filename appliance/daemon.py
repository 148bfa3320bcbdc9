"""Runs the watch of all guests, and says who may give orders; replays a capture. Knows every room."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue

from appliance.assembly import Options, Rules, Watched, open_guests
from appliance.engine import Engine, Judge
from appliance.errors import ParasightError
from appliance.flow.names import Names
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.hosts.targets import resolve
from appliance.model import Verdict
from appliance.opening import open_eye_or_say, teach
from appliance.pacemaker import Pacemaker
from appliance.respond.banning import Banning
from appliance.respond.control import ControlServer
from appliance.respond.never import host_addresses, spare
from appliance.respond.place import control_path
from appliance.respond.room import ControlRoom, Words
from appliance.summary import Summary
from appliance.tap.pcap import PcapSource
from appliance.watch import POLL_S, GuestWatch, Tell

MAX_QUEUED = 100_000  # verdicts between the guests' threads and their reader
TICK_S = 0.5  # how often bans are seen to where no control socket does it
SWITCH_S = 0.0005  # a guest's thread must not wait 5 ms, Python's default, while a verdict is printed


def watch(
    targets: list[str],
    rules: Rules,
    report: Callable[[Verdict], str],
    *,
    stop: threading.Event,
    ready: Callable[[], None],
    idle: Callable[[], None],
    tell: Tell,
    words: Words,
    options: Options,
    until: float | None = None,
    version: str = "",
) -> list[Summary]:
    """Watch running guests until ``stop`` is set or the monotonic time ``until`` has come.

    ``report`` is called in the caller's thread and returns the verdict's id, ``idle`` there when no verdict waits,
    ``ready`` once every guest is watched and held to its rules, ``tell`` with one line for a person. Raises UsageError
    or HostError when a target cannot be watched at all from the start.
    """
    sys.setswitchinterval(SWITCH_S)
    queue: Queue[Verdict] = Queue(MAX_QUEUED)
    dropped, failed = Counter[str](), set[str]()

    def offer(verdict: Verdict) -> None:
        try:
            queue.put_nowait(verdict)
        except Full:
            dropped[verdict.flow.id.vm.target] += 1

    def show(verdict: Verdict) -> None:
        """A verdict that we fail to show must not end the watch that made it; a reader who has left may."""
        try:
            room.known.remember(report(verdict), verdict.flow.id)
        except OSError:
            raise
        except Exception:
            vm = verdict.flow.id.vm.target
            dropped[vm] += 1
            if vm not in failed:
                failed.add(vm)
                tell(f"{vm}: a defect of Parasight, please report it: a verdict is not shown\n{traceback.format_exc()}")

    def stopping() -> bool:
        return stop.is_set() or (until is not None and time.monotonic() >= until)

    with contextlib.ExitStack() as opened:
        room = ControlRoom(words, _open_bans(options, tell), stop.set, version=version)
        served = opened.enter_context(_control(room, tell, needed=options.enforce))
        guests = open_guests(targets, rules, offer, tell, options, opened)
        opened.enter_context(_heart(guests))
        threads = [
            threading.Thread(target=_run, args=(one, room, stopping), name=one.watch.info.id.target) for one in guests
        ]
        for thread in threads:
            thread.start()
        starting, next_tick_s = True, 0.0
        try:
            while any(thread.is_alive() for thread in threads) or not queue.empty():
                if starting and all(_has_begun(*one) for one in zip(guests, threads, strict=True)):
                    starting = False
                    ready()
                if not served and time.monotonic() >= next_tick_s:
                    next_tick_s = time.monotonic() + TICK_S
                    room.tick()
                with contextlib.suppress(Empty):
                    show(queue.get(timeout=POLL_S))
                if queue.empty():
                    idle()
        finally:  # also when the reader of our output has left: the guests' threads must not outlive it
            stop.set()
            for thread in threads:
                thread.join()
    for one in guests:
        one.watch.summary.unshown = dropped[one.watch.info.id.target]
        one.watch.summary.defect |= one.watch.info.id.target in failed
    return [one.watch.summary for one in guests]


def _has_begun(guest: Watched, thread: threading.Thread) -> bool:
    """Its loop came round for the first time: new flows wait, where they shall; or its watch is over already."""
    return guest.watch.count_turns() > 0 or not thread.is_alive()


def _run(guest: Watched, room: ControlRoom, stopping: Callable[[], bool]) -> None:
    """A guest's thread."""
    room.admit(guest.front)
    try:
        guest.watch.run(stopping)
    finally:
        room.dismiss(guest.front, guest.watch.summary.ended)
        guest.front.mailbox.close()


def _open_bans(options: Options, tell: Tell) -> Banning:
    return Banning(time.time_ns, tell, spared=spare(host_addresses(), options.never_ban), path=options.bans)


@contextlib.contextmanager
def _control(room: ControlRoom, tell: Tell, *, needed: bool) -> Iterator[bool]:
    """Serve the control socket, if it can be had: a watch without one still watches.

    But rules that act are ``needed`` to take orders: nobody could decide, or let go on what was stopped by mistake.
    """
    try:
        server = ControlServer(control_path(), room.answer, tell, tick=room.tick)
    except ParasightError as error:
        if needed:
            raise
        tell(f"{error}; this watch takes no orders")
        yield False
        return
    try:
        yield True
    finally:
        server.close()


@contextlib.contextmanager
def _heart(guests: list[Watched]) -> Iterator[None]:
    heart = Pacemaker()
    for guest in guests:
        if guest.beat is not None:
            heart.add(guest.watch.count_turns, guest.beat)
    heart.start()
    try:
        yield
    finally:
        heart.stop()


def replay(
    pcap: Path,
    memory: Path | None,
    judge: Judge,
    report: Callable[[Verdict], str],
    *,
    tell: Tell,
    local: frozenset[str],
    symbols: Sequence[Path] = (),
) -> Summary:
    """Judge a capture against a memory image. Time is the capture's own, so the same input gives the same verdicts."""
    info = resolve(f"file:{memory or pcap}")
    source = PcapSource(pcap, local=local or None)
    eye = open_eye_or_say(info, tell, symbols) if memory else None
    table = FlowTable(info.id)
    tap = TrackedTap(info.id, source, table)
    looked = partial(teach, table.learn_listener)
    watcher = GuestWatch(info, tap, eye, Engine(judge, Names()), report, lambda: table.now_ns, tell=tell, looked=looked)
    watcher.run(lambda: False)
    for reason, count in source.skipped.items():
        tell(f"{pcap}: {count} packets were left out: {reason}")
    if source.truncation is not None:
        watcher.summary.ended = str(source.truncation)
    return watcher.summary
