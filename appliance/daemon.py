"""The shell around the engine: opens the eyes of each guest and lets them run, one thread per guest.

The only place, with the command line, that knows every room.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue

from appliance.engine import Engine, Judge
from appliance.errors import ConfigError, GuestError, HostError, UsageError
from appliance.flow.names import Names
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.guest.attach import attach
from appliance.guest.linux.eye import LinuxEye
from appliance.hosts.qemu import is_running
from appliance.hosts.targets import resolve
from appliance.memory.file import open_file
from appliance.memory.qemu import open_qemu
from appliance.model import GuestInfo, Snapshot, Transport, Verdict
from appliance.ports import GuestEye, GuestMemory
from appliance.tap.af_packet import PortSource
from appliance.tap.merged import MergedSource
from appliance.tap.pcap import PcapSource
from appliance.watch import POLL_S, GuestWatch, Summary, Tell

_TCP = 6  # IANA protocol number
MAX_QUEUED = 100_000  # verdicts between the guests' threads and their reader
SWITCH_S = 0.0005  # a guest's thread must not wait 5 ms, Python's default, while a verdict is printed


def open_eye(info: GuestInfo) -> GuestEye:
    """Attach to a guest's memory. Raises GuestError, HostError, ConfigError or UsageError with what to do."""
    target = info.id.target
    if target.startswith("file:"):
        return _open_image(Path(target.removeprefix("file:")))
    if info.pid is None:
        raise UsageError(f"{target} has no memory to read: only its packets can be watched")
    return _attach_to(open_qemu(info.pid))


def _open_image(path: Path) -> GuestEye:
    """Attach to a memory image; where that fails and the image has holes, they are the reason to tell."""
    memory = open_file(path)
    gaps = memory.gaps
    try:
        return _attach_to(memory)
    except GuestError as error:
        if gaps:
            raise ConfigError(f"{path}: {gaps[0].why}; {error}") from error
        raise


def _attach_to(memory: GuestMemory) -> GuestEye:
    try:
        vcpus = memory.vcpus()  # an ELF core carries them; a running QEMU is not asked
        return LinuxEye(attach(memory, cr3=vcpus[0].cr3 if vcpus else None))
    except BaseException:
        memory.close()
        raise


def watch(
    targets: list[str],
    judge: Judge,
    report: Callable[[Verdict], None],
    *,
    stop: threading.Event,
    ready: Callable[[], None],
    idle: Callable[[], None],
    tell: Tell,
    until: float | None = None,
) -> list[Summary]:
    """Watch running guests until ``stop`` is set or the monotonic time ``until`` has come.

    ``report`` is called in the caller's thread, ``idle`` there when no verdict waits, ``ready`` once every tap sees
    packets, ``tell`` with one line for a person. Raises UsageError or HostError when a target cannot be watched at all
    from the start.
    """
    sys.setswitchinterval(SWITCH_S)
    queue: Queue[Verdict] = Queue(MAX_QUEUED)
    dropped = Counter[str]()

    def offer(verdict: Verdict) -> None:
        try:
            queue.put_nowait(verdict)
        except Full:
            dropped[verdict.flow.id.vm.target] += 1

    def stopping() -> bool:
        return stop.is_set() or (until is not None and time.monotonic() >= until)

    watches = _open_watches(targets, judge, offer, tell)
    threads = [threading.Thread(target=one.run, args=(stopping,), name=one.info.id.target) for one in watches]
    for thread in threads:
        thread.start()
    ready()
    try:
        while any(thread.is_alive() for thread in threads) or not queue.empty():
            with contextlib.suppress(Empty):
                report(queue.get(timeout=POLL_S))
            if queue.empty():
                idle()
    finally:  # also when the reader of our output has left: the guests' threads must not outlive it
        stop.set()
        for thread in threads:
            thread.join()
    for one in watches:
        one.summary.unshown = dropped[one.info.id.target]
    return [one.summary for one in watches]


def _open_watches(targets: list[str], judge: Judge, offer: Callable[[Verdict], None], tell: Tell) -> list[GuestWatch]:
    """Open every guest; where one cannot be opened, close the others again.

    All memory eyes first, since attaching takes time in which an open tap's ring would fill.
    """
    infos = [resolve(target) for target in dict.fromkeys(targets)]
    with contextlib.ExitStack() as opened:
        eyes: list[GuestEye | None] = []
        for info in infos:
            _say_notes(info, tell)
            eyes.append(_open_eye_or_say(info, tell) if info.pid is not None else None)
            if (eye := eyes[-1]) is not None:
                opened.callback(eye.close)
        watches = []
        for info, eye in zip(infos, eyes, strict=True):
            tap, table = _open_tap(info)
            opened.callback(tap.close)
            watches.append(_live_watch(info, tap, table, eye, judge, offer, tell))
        opened.pop_all()
    return watches


def replay(
    pcap: Path,
    memory: Path | None,
    judge: Judge,
    report: Callable[[Verdict], None],
    *,
    tell: Tell,
    local: frozenset[str],
) -> Summary:
    """Judge a capture against a memory image. Time is the capture's own, so the same input gives the same verdicts."""
    info = resolve(f"file:{memory or pcap}")
    source = PcapSource(pcap, local=local or None)
    eye = _open_eye_or_say(info, tell) if memory else None
    table = FlowTable(info.id)
    tap = TrackedTap(info.id, source, table)
    engine = Engine(judge, Names())
    watcher = GuestWatch(info, tap, eye, engine, report, lambda: table.now_ns, tell=tell, looked=partial(_teach, table))
    watcher.run(lambda: False)
    for reason, count in source.skipped.items():
        tell(f"{pcap}: {count} packets were left out: {reason}")
    if source.truncation is not None:
        watcher.summary.ended = str(source.truncation)
    return watcher.summary


def _say_notes(info: GuestInfo, tell: Tell) -> None:
    if not info.ports:
        raise HostError(f"{info.id.target} has no port to watch: {'; '.join(info.notes) or 'no network card'}")
    for note in info.notes:
        tell(f"{info.id.target}: {note}")


def _open_tap(info: GuestInfo) -> tuple[TrackedTap, FlowTable]:
    table = FlowTable(info.id, [port.mac for port in info.ports if port.mac])
    sources: list[PortSource] = []
    try:
        for port in info.ports:
            sources.append(PortSource(port))
        return TrackedTap(info.id, MergedSource(sources), table, time.time_ns), table
    except BaseException:
        for source in sources:
            source.close()
        raise


def _live_watch(
    info: GuestInfo,
    tap: TrackedTap,
    table: FlowTable,
    eye: GuestEye | None,
    judge: Judge,
    offer: Callable[[Verdict], None],
    tell: Tell,
) -> GuestWatch:
    engine = Engine(judge, Names())
    watcher = partial(GuestWatch, info, tap, eye, engine, offer, time.time_ns, tell=tell, looked=partial(_teach, table))
    if info.pid is None:
        return watcher()
    return watcher(runs=partial(is_running, info), reopen=partial(_open_eye_or_none, info))


def _teach(table: FlowTable, snapshot: Snapshot) -> None:
    """The guest's own listeners tell who is the server of a connection whose beginning was not seen."""
    for socket in snapshot.sockets:
        if socket.protocol is Transport.TCP and socket.state == "LISTEN":
            ip = None if socket.local.ip.is_unspecified else socket.local.ip
            table.learn_listener(_TCP, ip, socket.local.port)


def _open_eye_or_say(info: GuestInfo, tell: Tell) -> GuestEye | None:
    start_s = time.monotonic()
    try:
        eye = open_eye(info)
    except GuestError as error:
        tell(f"{info.id.target}: {error}; watching its packets only")
        return None
    tell(f"{info.id.target}: {eye.describe}, attached in {time.monotonic() - start_s:.2f} s")
    return eye


def _open_eye_or_none(info: GuestInfo) -> GuestEye | None:
    """Attach once more, without a word where that fails: it was said before."""
    try:
        return open_eye(info)
    except (GuestError, HostError, UsageError):
        return None
