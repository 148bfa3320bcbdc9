"""Bans carried out: the book, its file, and each guest's kernel kept to what the book says.

Nothing is sent twice on purpose and nothing is lost: what a guest has not been told yet is *due*, and stays due until
its own thread has done it. Every ban carries its end into the kernel, so it ends there also when we are gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from appliance.errors import ConfigError, GuestGone, ParasightError
from appliance.model import GuestId, IpNetwork
from appliance.respond.banfile import read_bans, write_bans
from appliance.respond.bans import FOREVER, Ban, BanBook, BanRefused, Spared
from appliance.respond.desk import GuestDesk

_BATCH = 256  # entries told to a guest in one job: about a millisecond of its thread
_LIFT = 0.0  # seconds of an order: the ban is over
_WAIT_S = 2.0  # how long a person waits for the guests to have done it

Clock = Callable[[], int]
Tell = Callable[[str], None]


def identify(vm: GuestId) -> str:
    """The identity of a guest, for a ban that outlives us: never a name or a pid alone, they are reused."""
    return vm.uuid or f"{vm.target} {vm.instance}"


def _life(desk: GuestDesk) -> str:
    """Tells guests apart that run at the same time: two can have one UUID by mistake."""
    return f"{desk.vm.target} {desk.vm.instance}"


@dataclass(slots=True)
class _Guest:
    desk: GuestDesk
    due: set[IpNetwork] = field(default_factory=set)
    batch: set[IpNetwork] = field(default_factory=set)  # what the job under way is about
    told: set[IpNetwork] = field(default_factory=set)  # the peers of which its kernel has an entry by us
    job: Future[None] | None = None
    trouble: str | None = None  # why what is due was not done
    rests: bool = False  # it has just failed: not tried again before the next tick


class Banning:
    """The bans of this appliance. ``ban`` and ``unban`` wait for the guests' threads; all else any thread may call."""

    def __init__(
        self,
        clock: Clock,
        tell: Tell,
        *,
        spared: Sequence[Spared] = (),
        path: Path | None = None,
        wait_s: float = _WAIT_S,
    ) -> None:
        """``path`` is the file by which bans outlive a restart; None: they do not. Raises ConfigError."""
        self._clock, self._tell, self._path, self._wait_s = clock, tell, path, wait_s
        self._book = BanBook(spared)
        self._guests: dict[str, _Guest] = {}
        self._lock = threading.Lock()  # over the book and the guests; held for computing only
        self._file_lock = threading.Lock()
        self._unsaved = False
        self._load()

    # -- guests --

    def admit(self, desk: GuestDesk) -> None:
        """From now on keep this guest to the book."""
        with self._lock:
            self._guests[_life(desk)] = _Guest(desk, self._book.entries(identify(desk.vm)))
        self.tick()

    def dismiss(self, desk: GuestDesk) -> None:
        """The watch of this guest is over; its bans stay in the book."""
        key = _life(desk)
        with self._lock:
            if key in self._guests and self._guests[key].desk is desk:
                del self._guests[key]

    def count(self, vm: GuestId) -> int:
        """How many bans apply to a guest."""
        with self._lock:
            return self._book.count(identify(vm))

    # -- bans --

    def bans(self) -> list[Ban]:
        """The bans that stand, by address."""
        with self._lock:
            self._expire()
            found = list(self._book)
        return sorted(found, key=lambda ban: (ban.peer.version, ban.peer.network_address, ban.peer.prefixlen))

    def ban(
        self, peer: IpNetwork, vm: GuestId | None, seconds: float | None, reason: str, who: str
    ) -> tuple[Ban, Ban | None]:
        """Ban ``peer`` for one guest or (None) for all; the ban, and the one it replaces. Raises BanRefused."""
        now_ns = self._clock()
        until_ns = FOREVER if seconds is None else now_ns + max(1, round(seconds * 1e9))
        scope, target = (None, None) if vm is None else (identify(vm), vm.target)
        ban = Ban(peer, scope, now_ns, until_ns, reason, who, target)
        with self._lock:
            self._expire()
            old = self._book.add(ban)
            self._touch(peer)
            self._unsaved = True
        self._settle()
        return ban, old

    def unban(self, peer: IpNetwork, vm: GuestId | None) -> tuple[list[Ban], list[Ban]]:
        """Lift the bans of exactly ``peer``; those lifted, and those that cover it still."""
        with self._lock:
            self._expire()
            lifted = self._book.lift(peer, None if vm is None else identify(vm), everywhere=vm is None)
            if lifted:
                self._touch(peer)
                self._unsaved = True
            left = self._book.covering(peer)
        if lifted:
            self._settle()
        return lifted, left

    def troubles(self) -> dict[str, str]:
        """By target: why a guest is not kept to the book at this moment. Empty when all are."""
        with self._lock:
            return {
                guest.desk.vm.target: guest.trouble or "its watch is busy; it is told as soon as it answers"
                for guest in self._guests.values()
                if guest.due or guest.job is not None
            }

    def tick(self) -> None:
        """Let bans end, try again what is due, write the file. Never waits for a guest."""
        with self._lock:
            self._expire()
            for guest in self._guests.values():
                guest.rests = False
        self._advance()
        self._save()

    # -- private; those above "save" with the lock held --

    def _expire(self) -> None:
        """Let bans end. That alone is no reason to write the file: it is read with the same clock."""
        for ban in self._book.expire(self._clock()):
            self._touch(ban.peer)

    def _touch(self, peer: IpNetwork) -> None:
        """Every guest is due to hear of a change: one whose entry it does not alter is told the same once more."""
        peers = self._book.touched(peer)
        for guest in self._guests.values():
            guest.due |= peers
            guest.rests = False

    def _push(self, guest: _Guest) -> None:
        """Post a job for what is due, one at a time, so that a guest hears of changes in their order."""
        if guest.job is not None or guest.rests or not guest.due:
            return
        key, now_ns = identify(guest.desk.vm), self._clock()
        guest.batch = set(list(guest.due)[:_BATCH])
        orders: list[tuple[IpNetwork, float | None]] = []
        for peer in guest.batch:
            until_ns = self._book.until(peer, key)
            if until_ns is None or until_ns <= now_ns:
                if peer in guest.told:
                    orders.append((peer, _LIFT))
            else:
                orders.append((peer, None if until_ns == FOREVER else (until_ns - now_ns) / 1e9))
        try:
            guest.job = guest.desk.mailbox.post(lambda: _carry_out(guest, orders))
        except ParasightError as error:
            self._note(guest, error)
        else:
            guest.due -= guest.batch

    def _collect(self, guest: _Guest) -> None:
        """Take the outcome of the job under way, if there is one; what failed is due again."""
        if guest.job is None or not guest.job.done():
            return
        error = guest.job.exception()
        guest.job = None
        if error is None:
            guest.trouble = None
            return
        guest.due |= guest.batch
        self._note(guest, error)

    def _note(self, guest: _Guest, error: BaseException) -> None:
        words = str(error) if isinstance(error, ParasightError) else f"a defect of Parasight: {error!r}"
        if words != guest.trouble and not isinstance(error, GuestGone):
            self._tell(f"{guest.desk.vm.target}: its bans are not in force: {words}")
        guest.trouble, guest.rests = words, True

    def _settle(self) -> None:
        """Push, and give the guests a moment to have done it, so that an answer tells what is so."""
        deadline_s = time.monotonic() + self._wait_s
        while jobs := self._advance():
            if not wait(jobs, max(0.0, deadline_s - time.monotonic()), FIRST_COMPLETED).done:
                break
        self._save()

    def _advance(self) -> list[Future[None]]:
        """Collect and push; the jobs under way after that."""
        with self._lock:
            for guest in self._guests.values():
                self._collect(guest)
                self._push(guest)
            return [guest.job for guest in self._guests.values() if guest.job is not None]

    def _save(self) -> None:
        with self._file_lock:
            with self._lock:
                unsaved, self._unsaved = self._unsaved, False
                bans = list(self._book) if unsaved else []
            if not unsaved or self._path is None:
                return
            try:
                write_bans(self._path, bans)
            except ConfigError as error:
                self._tell(str(error))

    def _load(self) -> None:
        if self._path is None:
            return
        bans, notes = read_bans(self._path)
        now_ns = self._clock()
        for ban in bans:
            if ban.until_ns <= now_ns:
                continue
            try:
                self._book.add(ban)
            except BanRefused as error:  # the never-ban list has grown since
                notes.append(str(error))
        for note in notes:
            self._tell(note)


def _carry_out(guest: _Guest, orders: Iterable[tuple[IpNetwork, float | None]]) -> None:
    """Carry out the orders, in the guest's thread; one job at a time, so nobody else writes ``told`` meanwhile."""
    for peer, seconds in orders:
        if seconds == _LIFT:
            guest.desk.unban(peer)
            guest.told.discard(peer)
        else:
            guest.desk.ban(peer, seconds)
            guest.told.add(peer)
