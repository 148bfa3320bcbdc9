"""The verb ``stop``: end the appliances that run here, and take what crashed ones left off the ports."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from struct import unpack
from typing import Annotated, Any, Final

import typer

from appliance.cli.progress import tell, working
from appliance.cli.render import Output, Printer, console, safe
from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.hosts.netns import iter_namespaces
from appliance.hosts.proc import read_argv
from appliance.respond.place import control_path
from appliance.tap.bpf.clsact import Ours
from appliance.tap.bpf.journal import Journal
from appliance.tap.bpf.leftovers import clean as clean_namespace
from appliance.tap.bpf.leftovers import list_ours
from appliance.tap.bpf.owner import Owner

PATIENCE_S: Final = 10.0  # an appliance detaches within some milliseconds; a walk through a guest ends in seconds

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print the result.")]
CleanOption = Annotated[
    bool, typer.Option("--clean", help="Also remove what is left of ours on every port of every network namespace.")
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One thing of ours and what became of it. ``failed``: it is still there, and somebody has to see to it."""

    what: str  # "appliance", "filter", "qdisc"
    pid: int | None
    netns: str | None
    port: str | None
    hook: str | None
    done: bool
    detail: str
    failed: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """The object of the JSON contract."""
        names = ("what", "pid", "netns", "port", "hook", "done", "detail")
        return {name: getattr(self, name) for name in names}


def stop(clean: CleanOption = False, output: OutputOption = Output.TABLE) -> None:
    """End the appliances that run on this host; with --clean also remove what crashed ones left on the ports."""
    with working("looking at every network namespace"):
        namespaces = list(iter_namespaces(os.getpid()))
        outcomes = list(_end_all(_find_owners(namespaces)))
        if clean:
            outcomes += _clean_all(namespaces)
    if output is Output.TABLE:
        for one in outcomes:
            console().print(safe(one.detail, 400))
        if not outcomes:
            console().print("nothing of ours was found" if clean else "no running appliance was found")
    else:
        printer = Printer(output)
        printer.start()
        for one in outcomes:
            printer.add(one.body)
        printer.end()
    raise typer.Exit(1 if any(one.failed for one in outcomes) else 0)


# -- processes --


def _find_owners(namespaces: list[str | None]) -> list[Owner]:
    """Find who says to own something on a port, by the names of filters and by the journal, and who serves commands."""
    owners = {one.owner for _, one in _list_all(namespaces) if one.owner is not None}
    owners |= {note.owner for note in Journal().notes()}
    owners |= {server for server in (_find_server(),) if server is not None}
    return sorted(owners, key=lambda owner: owner.pid)


def _find_server() -> Owner | None:
    """Find who listens on the control socket: an appliance that only observes has nothing on a port."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(control_path()))
            pid, _, _ = unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))  # struct ucred
        except OSError:
            return None
    return Owner.of(pid)


def _end_all(owners: list[Owner]) -> Iterator[Outcome]:
    """SIGTERM to each, then wait for all of them. A pidfd names one life: nobody else can get the signal."""
    with ExitStack() as opened:
        waited: dict[int, int] = {}
        for owner in owners:
            pid = owner.find()
            if pid is None or pid == os.getpid():
                continue
            if not _is_appliance(pid):
                detail = f"process {pid} uses our filters but is no parasight by its command line: left alone"
                yield Outcome("appliance", pid, None, None, None, done=False, detail=detail, failed=True)
                continue
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                opened.callback(os.close, descriptor)
                if owner.find() == pid:
                    _terminate(descriptor, pid)
                    waited[descriptor] = pid
        deadline = time.monotonic() + PATIENCE_S
        for descriptor, pid in waited.items():
            yield _wait_for(descriptor, pid, deadline)


def _terminate(descriptor: int, pid: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except PermissionError as error:
        raise PermissionRefused(f"cannot stop process {pid}: {error.strerror}; run as root") from error


def _wait_for(descriptor: int, pid: int, deadline: float) -> Outcome:
    ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    if ended:
        return Outcome("appliance", pid, None, None, None, done=True, detail=f"stopped appliance {pid}")
    detail = (
        f"appliance {pid} still runs after {PATIENCE_S:.0f} s; mend it with 'kill -KILL {pid}' and 'stop --clean' again"
    )
    return Outcome("appliance", pid, None, None, None, done=False, detail=detail, failed=True)


def _is_appliance(pid: int) -> bool:
    words = read_argv(pid)[:8]  # options of the interpreter may come first
    as_module = any(pair == ("-m", "appliance.cli") for pair in pairwise(words))
    return as_module or any(PurePath(word).name == "parasight" for word in words)


# -- ports --


def _clean_all(namespaces: list[str | None]) -> list[Outcome]:
    """Remove what nobody uses, then name what is left and why."""
    outcomes = []
    for netns in namespaces:
        with suppress(UsageError):  # it is gone by now
            outcomes += [_describe(netns, one, done=True) for one in clean_namespace(netns)]
    return outcomes + [_describe(netns, one, done=False) for netns, one in _list_all(namespaces)]


def _list_all(namespaces: list[str | None]) -> Iterator[tuple[str | None, Ours]]:
    for netns in namespaces:
        try:
            yield from ((netns, one) for one in list_ours(netns))
        except UsageError:  # it is gone by now
            continue
        except PermissionRefused:
            raise
        except HostError as error:
            tell(f"{netns or 'our network namespace'} was not looked at: {error}")


def _describe(netns: str | None, one: Ours, *, done: bool) -> Outcome:
    pid = one.owner.pid if one.owner else None
    name = f"{one.hook} filter" if one.what == "filter" else "clsact qdisc"
    where = f"{name} of port {one.ifname}" + (f" in {netns}" if netns else "")
    who = f"process {pid}" if pid is not None else "an unknown process"
    living = not done and not one.orphaned
    if done:
        detail = f"removed {where}, left by {who}"
    elif living:
        detail = f"kept {where}: {who} uses it"
    else:
        detail = f"kept {where}, left by {who}: filters of others hang on it"
    return Outcome(one.what, pid, netns, one.ifname, one.hook or None, done=done, detail=detail, failed=living)
