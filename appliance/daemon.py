"""Runs the watch of all guests, and says who may give orders; replays a capture. Knows every room."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty

from appliance.assembly import Builder, Options, Rules
from appliance.crowd import Crowd
from appliance.engine import Engine, Judge
from appliance.errors import ParasightError
from appliance.evidence.volatility import probe as probe_other
from appliance.flow.names import Names
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.hosts.inventory import Inventory
from appliance.hosts.targets import resolve
from appliance.life import Life
from appliance.model import Verdict
from appliance.opening import open_eye_or_say, teach
from appliance.pacemaker import Pacemaker
from appliance.respond.banning import Banning
from appliance.respond.control import ControlServer
from appliance.respond.never import host_addresses, spare
from appliance.respond.place import control_path
from appliance.respond.room import ControlRoom, Words
from appliance.roster import Choice
from appliance.summary import Summary
from appliance.tap.pcap import PcapSource
from appliance.watch import POLL_S, GuestWatch, Tell

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
    inventory: Inventory | None = None,
) -> list[Summary]:
    """Watch running guests until ``stop`` is set or the monotonic time ``until`` has come.

    Without ``targets``: all that ``inventory`` (None: this host's) has, and those that come later.

    ``report`` is called in the caller's thread and returns the verdict's id, ``idle`` there when no verdict waits,
    ``ready`` once every guest is watched and held to its rules, ``tell`` with one line for a person. Raises UsageError
    or HostError when a target cannot be watched at all from the start.
    """
    sys.setswitchinterval(SWITCH_S)
    _raise_limit()

    def stopping() -> bool:
        return stop.is_set() or (until is not None and time.monotonic() >= until)

    with contextlib.ExitStack() as opened:
        room = ControlRoom(words, _open_bans(options, tell), stop.set, version=version)
        served = opened.enter_context(_control(room, tell, needed=options.enforce))
        if options.second_opinion and not (other := probe_other()).ok:
            tell(f"no second opinion on denied processes: {other.reason}")
        heart = Pacemaker()
        heart.start()
        opened.callback(heart.stop)
        crowd = Crowd(Builder(rules, tell, options), room, heart, stopping, tell)
        opened.callback(crowd.end, stop)
        if targets:
            crowd.watch_named(targets, inventory)
        else:
            crowd.watch_host(inventory or Inventory.of_this_host(events=True), Choice(options.opt_in))
        desk = _Desk(crowd, room, report, tell)
        starting, next_tick_s = True, 0.0
        while crowd.goes_on or not crowd.queue.empty():
            if starting and crowd.has_begun():
                starting = False
                ready()
            if not served and time.monotonic() >= next_tick_s:
                next_tick_s = time.monotonic() + TICK_S
                room.tick()
            crowd.retire()
            if desk.show_next():
                idle()
    return crowd.summaries()


def _raise_limit() -> None:
    """Each guest takes some 25 open files; the usual limit is 1024, and what we may have much more."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _Desk:
    """Shows verdicts as they come."""

    def __init__(self, crowd: Crowd, room: ControlRoom, report: Callable[[Verdict], str], tell: Tell) -> None:
        self._crowd, self._room, self._report, self._tell = crowd, room, report, tell

    def show_next(self) -> bool:
        """Wait a little for a verdict and show it; whether none is left."""
        with contextlib.suppress(Empty):
            self._show(*self._crowd.queue.get(timeout=POLL_S))
        return self._crowd.queue.empty()

    def _show(self, life: Life, verdict: Verdict) -> None:
        """A verdict that we fail to show must not end the watch that made it; a reader who has left may."""
        try:
            self._room.known.remember(self._report(verdict), verdict.flow.id)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, as a rule
            life.unwritten += 1
            if life.unwritten == 1:
                self._tell(f"{verdict.flow.id.vm.target}: a verdict is not shown: {error}")
        except Exception:
            life.failed += 1
            if life.failed == 1:
                vm, why = verdict.flow.id.vm.target, "a verdict is not shown"
                self._tell(f"{vm}: a defect of Parasight, please report it: {why}\n{traceback.format_exc()}")
        finally:
            life.shown += 1


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
