"""Opens everything that the watch of a guest is made of, and tells what a person must know of it before it begins."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from appliance.engine import Engine, Judge
from appliance.errors import GuestGone, HostError
from appliance.flow.community import community_id
from appliance.flow.names import Names
from appliance.front import Front
from appliance.hosts.inventory import is_running
from appliance.hosts.netns import find_index
from appliance.hosts.proc import read_cpu_s
from appliance.hosts.qemu import find_guest
from appliance.lately import Lately
from appliance.model import Decoy, GuestInfo, GuestState, HoldPolicy, Snapshot, Verdict
from appliance.opening import open_eye, open_eye_or_say, open_other, open_tap, teach
from appliance.plugging import Plugging
from appliance.ports import GuestEye, PacketTap
from appliance.respond.mailbox import Mailbox
from appliance.sight import at_once, in_a_thread
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.looks import LookTap
from appliance.watch import ENDED, GuestWatch, Tell

LOOKS: Final = "looks"  # the tap where no packet can be seen
Offer = Callable[[Verdict], None]


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
    opt_in: bool = False  # where no guest is named: only those whose metadata asks for it
    route: str | None = None  # to the guests' memory; None: the best
    change_domain: bool = False  # routes may change settings of a domain while they are open


@dataclass(frozen=True, slots=True)
class Watched:
    """One guest with everything that was opened for it."""

    watch: GuestWatch
    front: Front
    beat: Callable[[], None] | None
    how: str  # its packets are seen
    opened: contextlib.ExitStack

    @property
    def follows(self) -> bool:
        """Whether it keeps to ports that come and go by itself."""
        return self.front.hand is not None

    def close(self) -> None:
        """Give back what was opened; may be called twice."""
        self.opened.close()


@dataclass(frozen=True, slots=True)
class Builder:
    """Puts together the watch of one guest after the other."""

    rules: Rules
    tell: Tell
    options: Options

    def open_eye(self, info: GuestInfo, *, brief: bool = False) -> GuestEye:
        """Attach to its memory. Raises ParasightError."""
        options = self.options
        eye = open_eye(info, options.symbols, brief=brief, route=options.route, change_domain=options.change_domain)
        if _lives(info):
            return eye
        eye.close()  # of who has its pid, or its UUID, by now
        raise GuestGone(ENDED)

    def open_named(
        self, infos: list[GuestInfo], offer: Callable[[GuestInfo], Offer], stopping: Callable[[], bool]
    ) -> list[Watched]:
        """Open guests that a person has named: whatever keeps one from being watched is an error, and none is.

        All memory eyes first, since attaching takes time in which an open tap's ring would fill. When it is to stop
        meanwhile, no further memory is attached to. Memory that is not complete yet is attached to when it is.
        """
        with contextlib.ExitStack() as undo:
            eyes: list[GuestEye | None] = []
            for info in infos:
                self._say_notes(info)
                whole = bool(info.routes) and info.state is not GuestState.INCOMING
                eyes.append(self._open_eye_or_say(info) if whole and not stopping() else None)
                if (eye := eyes[-1]) is not None:
                    undo.callback(eye.close)
            opened: list[Watched] = []
            for info, eye in zip(infos, eyes, strict=True):
                opened.append(self._open(info, eye, offer(info), named=True, young=False))
                undo.callback(opened[-1].close)
            undo.pop_all()
        return opened

    def open_found(self, info: GuestInfo, offer: Offer, *, young: bool) -> Watched:
        """Open a guest that was found here. Its memory is attached to while it is watched already.

        ``young``: it has started just now. Raises ParasightError where nothing of it can be seen.
        """
        self._say_notes(info)
        return self._open(info, None, offer, named=False, young=young)

    def _open_eye_or_say(self, info: GuestInfo) -> GuestEye | None:
        options = self.options
        return open_eye_or_say(
            info, self.tell, options.symbols, route=options.route, change_domain=options.change_domain
        )

    def _open(self, info: GuestInfo, eye: GuestEye | None, offer: Offer, *, named: bool, young: bool) -> Watched:
        with contextlib.ExitStack() as undo:
            if eye is not None:
                undo.callback(eye.close)
            watched = self._put_together(info, eye, offer, undo, named=named, young=young)
            undo.pop_all()
        return watched

    def _put_together(
        self,
        info: GuestInfo,
        eye: GuestEye | None,
        offer: Offer,
        undo: contextlib.ExitStack,
        *,
        named: bool,
        young: bool,
    ) -> Watched:
        options, rules, tell = self.options, self.rules, self.tell
        tap, how, looked = self._open_tap(info, eye)
        undo.callback(tap.close)
        _check_same(info)
        hand = tap if isinstance(tap, KernelTap) else None
        system = eye.os if eye is not None else ""  # not known yet: then the rules for every system hold
        policy = rules.hold_policy(system, info.tags)
        _say_mode(info, tell, options, policy, tap, named=named)
        enforces = options.enforce and hand is not None
        if enforces and policy is not None:
            _say_decoys(info, tell, options, rules.decoys(system, info.tags))
        other = open_other(info, options.symbols, route=options.route) if options.second_opinion else None
        if other is not None:
            undo.callback(other.close)
        latest: list[GuestWatch] = []
        plugging = None
        if hand is not None and info.hypervisor is not None:
            find = partial(find_guest, info.pid) if info.pid is not None else lambda: latest[0].info
            plugging = Plugging(info, hand, tell, find)
            undo.callback(plugging.close)
        mailbox = Mailbox()
        attach = partial(self.open_eye, info)
        watch = GuestWatch(
            info,
            tap,
            eye,
            Engine(rules, Names(), tags=info.tags, hold=policy if enforces else None, other=other is not None),
            offer,
            time.time_ns,
            tell=tell,
            runs=_make_runs(info, named=named),
            looked=looked,
            use=tap.use if isinstance(tap, LookTap) else lambda eye: None,
            reopen=attach if info.routes else lambda: None,
            glance=partial(attach, brief=True) if info.routes else None,
            aside=in_a_thread if info.routes else at_once,
            work_s=partial(read_cpu_s, info.pid) if info.pid is not None else None,
            young=young,
            silent=(named and info.state is not GuestState.INCOMING) or not info.routes,
            other=other,
            hand=hand if enforces else None,
            hold=policy if enforces else None,
            policy=rules.hold_policy,
            decoys={decoy.name: decoy for decoy in options.decoys},
            serve=mailbox.serve,
            ports=plugging.look if plugging is not None else lambda *, changed: None,
            abandon=hand.abandon if enforces and hand and options.fail_closed else None,
        )
        latest.append(watch)
        front = Front(watch, hand, how, time.time_ns(), mailbox)
        return Watched(watch, front, hand.beat if hand is not None else None, how, undo.pop_all())

    def _open_tap(self, info: GuestInfo, eye: GuestEye | None) -> tuple[PacketTap, str, Callable[[Snapshot], None]]:
        """The tap, its name, and how it learns from a full look."""
        if info.ports:
            options = self.options
            tap, rung, learn = open_tap(info, self.tell, rung=options.rung, fail_closed=options.fail_closed)
            return tap, rung.name, partial(teach, learn)
        looks = LookTap(info.id, eye, time.time_ns, community_id=community_id)
        self.tell(f"{info.id.target}: its packets cannot be seen; {looks.note}")
        return looks, LOOKS, lambda snapshot: None

    def _say_notes(self, info: GuestInfo) -> None:
        if not info.ports and not info.routes:
            raise HostError(f"{info.id.target} has no port to watch: {'; '.join(info.notes) or 'no network card'}")
        for note in info.notes:
            self.tell(f"{info.id.target}: {' '.join(note.split())}")


def _make_runs(info: GuestInfo, *, named: bool) -> Callable[[], bool]:
    """Asked once a second in the guest's thread, in which flows wait. Who has no process is asked for aside."""
    if info.pid is not None or info.hypervisor is None:
        return partial(_lives, info)
    return Lately(partial(_lives, info), first=True) if named else lambda: True  # else the roster asks


def _check_same(info: GuestInfo) -> None:
    """Raise HostError unless its ports and itself are those that were found: opening takes time."""
    for port in info.ports:
        if port.ifindex is not None and find_index(port.netns, port.ifname) != port.ifindex:
            raise HostError(f"{info.id.target}: its port {port.ifname} is gone, or another one by now")
    if not _lives(info):
        raise HostError(f"{info.id.target}: {ENDED}")


def _lives(info: GuestInfo) -> bool:
    """Whether the guest has not ended, as far as anybody knows."""
    if info.hypervisor is None:
        return True
    try:
        return is_running(info)
    except HostError:
        return True


def _say_mode(
    info: GuestInfo, tell: Tell, options: Options, policy: HoldPolicy | None, tap: PacketTap, *, named: bool
) -> None:
    """What a person must know of enforcement: that it is on, that it is off although the rules ask for it, and why.

    For a guest that was ``named``, that it cannot be held to its rules is an error.
    """
    if policy is not None and not options.enforce:
        tell(f"{info.id.target}: rules ask to enforce and only report; start with --enforce to let them act")
    elif options.enforce and policy is None:
        tell(f"{info.id.target}: nothing to enforce: no rule for this guest says mode: enforce")
    elif options.enforce and not isinstance(tap, KernelTap):
        line = f"{info.id.target} cannot be held to its rules: this tap can only look; see: parasight doctor"
        if named:
            raise HostError(line)
        tell(f"{line}; it is watched all the same")
    elif options.enforce:
        fails = "closed: new connections are dropped" if options.fail_closed else "open: everything passes"
        tell(f"{info.id.target}: enforcing; if Parasight dies, the network fails {fails}")


def _say_decoys(info: GuestInfo, tell: Tell, options: Options, wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if name not in {decoy.name for decoy in options.decoys}:
            way = f"say where it is with --decoy {name}=IFNAME,MAC"
            tell(f"{info.id.target}: there is no decoy {name!r}, what is redirected to it is blocked; {way}")
