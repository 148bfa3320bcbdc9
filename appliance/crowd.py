"""All watches of this appliance: of guests that a person named, of guests that were found; and their verdicts.

A guest named by name or UUID that a manager owns (libvirt, Xen) is waited for when it has ended; any other watch ends
with its guest.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from queue import Full, Queue
from typing import Final

from appliance.assembly import Builder, Watched
from appliance.hosts.inventory import Inventory
from appliance.hosts.targets import resolve
from appliance.life import Life, Open, Stopping, join_all, key_of
from appliance.model import GuestInfo, Verdict
from appliance.pacemaker import Pacemaker
from appliance.respond.room import ControlRoom
from appliance.roster import Choice, Roster
from appliance.summary import Ledger, Summary
from appliance.watch import Tell

MAX_QUEUED: Final = 100_000  # verdicts between the guests' threads and their reader
SETTLE_S: Final = 2.0  # so long the memory of guests is waited for before one is ready
OPEN_S: Final = 10.0  # so long their ports are


class Crowd:
    """Used by the daemon's thread; ``queue`` is filled by the guests' threads."""

    def __init__(self, builder: Builder, room: ControlRoom, heart: Pacemaker, stopping: Stopping, tell: Tell) -> None:
        self._builder, self._room, self._heart, self._stopping, self._tell = builder, room, heart, stopping, tell
        self.queue: Queue[tuple[Life, Verdict]] = Queue(MAX_QUEUED)
        self._named: list[Life] = []
        self._roster: Roster | None = None
        self._thread: threading.Thread | None = None
        self._inventory: Inventory | None = None
        self._waits = True  # for guests that are not here now
        self._ledger = Ledger()
        self._resting: list[Life] = []
        self._since_s = time.monotonic()

    def watch_named(self, targets: list[str], inventory: Inventory | None) -> None:
        """Watch what a person has named. Raises ParasightError where one of them cannot be watched."""
        named = [(target, resolve(target, inventory)) for target in targets]
        infos = {key_of(info): info for _, info in named}  # a guest can have several names
        opened: dict[str, Watched] = {}

        def take(life: Life) -> Watched:
            return opened[key_of(life.info)]

        lives = {key: self._make(info, take, named=True) for key, info in infos.items()}
        watched = self._builder.open_named(
            list(infos.values()), lambda info: partial(self._offer, lives[key_of(info)]), self._stopping
        )
        opened.update(zip(infos, watched, strict=True))
        followed = {key_of(info): info.id.uuid for target, info in named if _is_followed(target, info)}
        self._named = [life for key, life in lives.items() if key not in followed]
        self._waits = bool(followed)
        managed = [life for life in self._named if life.info.manager is not None]
        if followed or managed:
            uuids = frozenset(uuid for uuid in followed.values() if uuid is not None)
            roster = self._make_roster(inventory or Inventory.of_this_host(events=True), Choice(uuids=uuids))
            for key in followed:
                roster.adopt(lives[key])
            for life in managed:
                roster.accompany(life)
        for life in lives.values():
            life.start()
        self._start_roster()

    def watch_host(self, inventory: Inventory, choice: Choice) -> None:
        """Watch every guest that is here or comes."""
        self._make_roster(inventory, choice)
        self._start_roster()

    @property
    def goes_on(self) -> bool:
        """Whether there is, or will be, anything to watch."""
        roster = self._thread is not None and self._thread.is_alive()
        return (roster and self._waits) or any(not life.over for life in self._named)

    def has_begun(self) -> bool:
        """Whether the guests that were here are watched; one that keeps us waiting is not waited for."""
        if self._roster is None:
            return all(life.begun for life in self._named)
        waited_s = time.monotonic() - self._since_s
        if self._roster.looks == 0:
            return False
        lives = [*self._named, *self._roster.lives()]
        if waited_s < SETTLE_S:
            return all(life.settled for life in lives)
        return waited_s >= OPEN_S or all(life.begun for life in lives)

    def retire(self) -> None:
        """Take down the sums of watches that are over, once ``queue`` holds no verdict of theirs any more."""
        if self._roster is not None:
            self._resting += self._roster.take_ended()
        done = [life for life in self._resting if life.shown >= life.offered]
        if done:
            self._resting = [life for life in self._resting if life not in done]
            self._take_down(done)

    def _take_down(self, lives: list[Life]) -> None:
        for life in lives:
            summary = life.final()
            summary.awaited = True
            self._ledger.add(life.info.id, summary)

    def summaries(self) -> list[Summary]:
        """What every watch has seen and cost. After the end."""
        self.retire()
        self._take_down(self._resting)
        self._resting = []
        return [*(life.final() for life in self._named), *self._ledger.all()]

    def end(self, stop: threading.Event) -> None:
        """End all watches, and wait for them."""
        stop.set()
        join_all(self._named, self._tell)
        if self._thread is not None:
            self._thread.join()
        if self._inventory is not None:
            self._inventory.close()

    # -- private --

    def _make(self, info: GuestInfo, open_: Open, *, named: bool) -> Life:
        return Life(info, open_, self._room, self._heart, self._stopping, self._tell, named=named)

    def _make_roster(self, inventory: Inventory, choice: Choice) -> Roster:
        self._inventory = inventory
        self._roster = Roster(inventory, choice, self._begin, self._tell)
        return self._roster

    def _start_roster(self) -> None:
        if self._roster is not None:
            self._thread = threading.Thread(target=self._roster.run, args=(self._stopping,), name="roster", daemon=True)
            self._thread.start()

    def _begin(self, info: GuestInfo, young: bool) -> Life:
        """The life of a guest that was found, begun."""

        def open_found(life: Life) -> Watched:
            watched = self._builder.open_found(info, partial(self._offer, life), young=young)
            name = f" ({info.id.name})" if info.id.name else ""
            ports = ", ".join(port.ifname for port in info.ports) or "no port"
            self._tell(f"{info.id.target}: under watch{name}: {ports}, by {watched.how}")
            return watched

        life = self._make(info, open_found, named=False)
        life.start()
        return life

    def _offer(self, life: Life, verdict: Verdict) -> None:
        try:
            self.queue.put_nowait((life, verdict))
            life.offered += 1
        except Full:
            life.dropped += 1


def _is_followed(target: str, info: GuestInfo) -> bool:
    """Whether a person named the guest itself, and not this life of it, and somebody may start it again."""
    names = {text.lower() for text in (info.id.name, info.id.uuid) if text}
    return info.manager is not None and info.id.uuid is not None and target.removeprefix("xen:").lower() in names
