"""Opens everything that the watch of a guest is made of, and tells what a person must know of it before it begins."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from appliance.engine import Engine, Judge
from appliance.errors import HostError
from appliance.evidence.volatility import probe as probe_other
from appliance.flow.names import Names
from appliance.front import Front
from appliance.hosts.inventory import is_running
from appliance.hosts.targets import resolve
from appliance.model import Decoy, GuestInfo, HoldPolicy, Verdict
from appliance.opening import open_eye_or_none, open_eye_or_say, open_other, open_tap, teach
from appliance.plugging import Plugging
from appliance.ports import GuestEye, PacketTap
from appliance.respond.mailbox import Mailbox
from appliance.tap.bpf.tap import KernelTap
from appliance.watch import GuestWatch, Tell


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
    symbols: tuple[Path, ...] = ()  # folders with symbol tables of Windows
    second_opinion: bool = False  # ask Volatility about denied processes, where it is installed


@dataclass(frozen=True, slots=True)
class Watched:
    """One guest with everything that was opened for it."""

    watch: GuestWatch
    front: Front
    beat: Callable[[], None] | None


def open_guests(
    targets: list[str],
    rules: Rules,
    offer: Callable[[Verdict], None],
    tell: Tell,
    options: Options,
    opened: contextlib.ExitStack,
) -> list[Watched]:
    """Open every guest; where one cannot be opened, ``opened`` closes the others again.

    All memory eyes first, since attaching takes time in which an open tap's ring would fill.
    """
    if options.second_opinion and not (other := probe_other()).ok:
        tell(f"no second opinion on denied processes: {other.reason}")
    named = [resolve(target) for target in targets]
    infos = list({info.id.instance or info.id: info for info in named}.values())  # a guest can have several names
    eyes: list[GuestEye | None] = []
    for info in infos:
        _say_notes(info, tell)
        eyes.append(open_eye_or_say(info, tell, options.symbols) if info.pid is not None else None)
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
) -> Watched:
    tap, rung, learn = open_tap(info, tell, rung=options.rung, fail_closed=options.fail_closed)
    opened.callback(tap.close)
    hand = tap if isinstance(tap, KernelTap) else None
    policy = rules.hold_policy(eye.os if eye else "")
    enforces = options.enforce and policy is not None and hand is not None
    _say_mode(info, tell, options, policy, tap)
    if enforces:
        _say_decoys(info, tell, options, rules.decoys(eye.os if eye else ""))
    other = open_other(info, options.symbols) if options.second_opinion else None
    if other is not None:
        opened.callback(other.close)
    watcher = partial(
        GuestWatch,
        info,
        tap,
        eye,
        Engine(rules, Names(), hold=policy if enforces else None, other=other is not None),
        offer,
        time.time_ns,
        tell=tell,
        looked=partial(teach, learn),
        other=other,
        hand=hand if enforces else None,
        hold=policy,
        decoys={decoy.name: decoy for decoy in options.decoys},
        abandon=hand.abandon if enforces and hand is not None and options.fail_closed else None,
    )
    if info.pid is not None:
        watcher = partial(
            watcher, runs=partial(is_running, info), reopen=partial(open_eye_or_none, info, options.symbols)
        )
        if hand is not None:
            plugging = Plugging(info, hand, tell)
            opened.callback(plugging.close)
            watcher = partial(watcher, ports=plugging.look)
    mailbox = Mailbox()
    one = watcher(serve=mailbox.serve)
    front = Front(one, hand, rung.name, enforces, time.time_ns(), mailbox)
    return Watched(one, front, hand.beat if hand is not None else None)


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
