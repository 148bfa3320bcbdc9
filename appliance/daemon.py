"""Puts the rooms together: which tap, which eye, which rules for which guest, and who may give orders."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Protocol

from appliance.engine import Engine, Judge
from appliance.errors import HostError, ParasightError
from appliance.flow.names import Names
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.front import Front
from appliance.hosts.qemu import is_running
from appliance.hosts.targets import resolve
from appliance.model import Decoy, GuestInfo, HoldPolicy, Verdict
from appliance.opening import open_eye_or_none, open_eye_or_say, open_tap, teach
from appliance.pacemaker import Pacemaker
from appliance.plugging import Plugging
from appliance.ports import GuestEye, PacketTap
from appliance.respond.banning import Banning
from appliance.respond.control import ControlServer
from appliance.respond.mailbox import Mailbox
from appliance.respond.never import host_addresses, spare
from appliance.respond.place import control_path
from appliance.respond.room import ControlRoom, Words
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.pcap import PcapSource
from appliance.watch import POLL_S, GuestWatch, Summary, Tell

MAX_QUEUED = 100_000  # verdicts between the guests' threads and their reader
TICK_S = 0.5  # how often bans are seen to where no control socket does it
SWITCH_S = 0.0005  # a guest's thread must not wait 5 ms, Python's default, while a verdict is printed


class Rules(Judge, Protocol):
    """The rules, as a watch needs them."""

    def hold_policy(self, os: str = "", tags: tuple[str, ...] = ()) -> HoldPolicy | None:
        """Which new flows must wait for their verdict; None: nothing is enforced."""

    def decoys(self, os: str = "", tags: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Where denied connections are redirected to, by name."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an operator wants guests to be watched."""

    enforce: bool = False  # let rules with ``mode: enforce`` act; else they only report
    fail_closed: bool = False  # without us, what would have been held is dropped
    rung: str | None = None  # of the ladder of taps; None: the best
    decoys: tuple[Decoy, ...] = ()
    never_ban: Path | None = None
    bans: Path | None = None  # where bans outlive a restart


@dataclass(frozen=True, slots=True)
class _Guest:
    """One guest with everything that was opened for it."""

    watch: GuestWatch
    front: Front
    beat: Callable[[], None] | None


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
    options: Options = Options(),
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
        guests = _open_guests(targets, rules, offer, tell, options, opened)
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


def _has_begun(guest: _Guest, thread: threading.Thread) -> bool:
    """Its loop came round for the first time: new flows wait, where they shall; or its watch is over already."""
    return guest.watch.count_turns() > 0 or not thread.is_alive()


def _run(guest: _Guest, room: ControlRoom, stopping: Callable[[], bool]) -> None:
    """A guest's thread."""
    room.admit(guest.front)
    try:
        guest.watch.run(stopping)
    finally:
        room.dismiss(guest.front)
        guest.front.mailbox.close()


def _open_guests(
    targets: list[str],
    rules: Rules,
    offer: Callable[[Verdict], None],
    tell: Tell,
    options: Options,
    opened: contextlib.ExitStack,
) -> list[_Guest]:
    """Open every guest; where one cannot be opened, ``opened`` closes the others again.

    All memory eyes first, since attaching takes time in which an open tap's ring would fill.
    """
    named = [resolve(target) for target in targets]
    infos = list({info.id.instance or info.id: info for info in named}.values())  # a guest can have several names
    eyes: list[GuestEye | None] = []
    for info in infos:
        _say_notes(info, tell)
        eyes.append(open_eye_or_say(info, tell) if info.pid is not None else None)
        if (eye := eyes[-1]) is not None:
            opened.callback(eye.close)
    return [_open_guest(info, eye, rules, offer, tell, options, opened) for info, eye in zip(infos, eyes, strict=True)]


def _open_guest(
    info: GuestInfo,
    eye: GuestEye | None,
    rules: Rules,
    offer: Callable[[Verdict], None],
    tell: Tell,
    options: Options,
    opened: contextlib.ExitStack,
) -> _Guest:
    tap, rung, learn = open_tap(info, tell, rung=options.rung, fail_closed=options.fail_closed)
    opened.callback(tap.close)
    hand = tap if isinstance(tap, KernelTap) else None
    policy = rules.hold_policy(eye.os if eye else "")
    enforces = options.enforce and policy is not None and hand is not None
    _say_mode(info, tell, options, policy, tap)
    if enforces:
        _say_decoys(info, tell, options, rules.decoys(eye.os if eye else ""))
    watcher = partial(
        GuestWatch,
        info,
        tap,
        eye,
        Engine(rules, Names(), hold=policy if enforces else None),
        offer,
        time.time_ns,
        tell=tell,
        looked=partial(teach, learn),
        hand=hand if enforces else None,
        hold=policy,
        decoys={decoy.name: decoy for decoy in options.decoys},
        abandon=hand.abandon if enforces and hand is not None and options.fail_closed else None,
    )
    if info.pid is not None:
        watcher = partial(watcher, runs=partial(is_running, info), reopen=partial(open_eye_or_none, info))
        if hand is not None:
            plugging = Plugging(info, hand, tell)
            opened.callback(plugging.close)
            watcher = partial(watcher, ports=plugging.look)
    mailbox = Mailbox()
    one = watcher(serve=mailbox.serve)
    front = Front(one, hand, rung.name, enforces, time.time_ns(), mailbox)
    return _Guest(one, front, hand.beat if hand is not None else None)


def _say_notes(info: GuestInfo, tell: Tell) -> None:
    if not info.ports:
        raise HostError(f"{info.id.target} has no port to watch: {'; '.join(info.notes) or 'no network card'}")
    for note in info.notes:
        tell(f"{info.id.target}: {note}")


def _say_mode(info: GuestInfo, tell: Tell, options: Options, policy: HoldPolicy | None, tap: PacketTap) -> None:
    """What a person must know of enforcement: that it is on, that it is off although the rules ask for it, and why."""
    if policy is not None and not options.enforce:
        tell(f"{info.id.target}: rules ask to enforce and only report; start with --enforce to let them act")
    elif options.enforce and policy is None:
        tell(f"{info.id.target}: nothing to enforce: no rule for this guest says mode: enforce")
    elif options.enforce and not isinstance(tap, KernelTap):
        raise HostError(f"{info.id.target} cannot be held to its rules: this tap can only look; see: parasight doctor")
    elif options.enforce:
        fails = "closed: new connections are dropped" if options.fail_closed else "open: everything passes"
        tell(f"{info.id.target}: enforcing; if Parasight dies, the network fails {fails}")


def _say_decoys(info: GuestInfo, tell: Tell, options: Options, wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if name not in {decoy.name for decoy in options.decoys}:
            way = f"say where it is with --decoy {name}=IFNAME,MAC"
            tell(f"{info.id.target}: there is no decoy {name!r}, what is redirected to it is blocked; {way}")


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
def _heart(guests: list[_Guest]) -> Iterator[None]:
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
) -> Summary:
    """Judge a capture against a memory image. Time is the capture's own, so the same input gives the same verdicts."""
    info = resolve(f"file:{memory or pcap}")
    source = PcapSource(pcap, local=local or None)
    eye = open_eye_or_say(info, tell) if memory else None
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
