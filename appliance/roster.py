"""Which guests shall be watched against which are: one comparison again and again, levels and not edges.

What runs is what the inventory says when it is asked; what it tells meanwhile only makes us ask at once. Each life of a
guest has a thread, from opening to closing, so that none waits for another. A life is told from the next one of the
same guest by `GuestId.instance`, never by its name, port, pid or domid.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from appliance.assembly import Watched
from appliance.errors import ParasightError
from appliance.hosts.inventory import Inventory, is_running
from appliance.hosts.proc import read_age_s
from appliance.life import Life, Shape, Stopping, join_all, key_of
from appliance.model import GuestInfo
from appliance.watch import ENDED, Tell

POLL_S: Final = 0.5
SETTLE_S: Final = 1.0  # a machine opens its ports a moment after its start, and closes them one before its end
YOUNG_S: Final = 300.0
REST_S: Final = 1.0  # after an error of ours
PACE_S: Final = 0.1  # from one look to the next, at least: a guest can have changes told as often as it likes
AGAIN_S: Final = (5.0, 300.0)  # until a guest that could not be watched is tried again: the first time, at most
MAX_SAID: Final = 1000  # lines that are remembered, to be said once

Begin = Callable[[GuestInfo, bool], Life]


@dataclass(frozen=True, slots=True)
class Choice:
    """Which guests shall be watched. ``uuids``: only these of a manager, whatever they want; None: all that want it."""

    opt_in: bool = False
    uuids: frozenset[str] | None = None

    def takes(self, info: GuestInfo) -> bool:
        """Whether this guest is to be watched."""
        if self.uuids is not None:
            return info.id.uuid in self.uuids and info.manager is not None
        return info.wanted is True if self.opt_in else info.wanted is not False


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A guest that could not be watched, or whose watch ended by itself."""

    shape: Shape
    pause_s: float
    until_s: float


class Roster:
    """Keeps the watches of this host's guests to what runs here. One thread calls `look`; `lives` any may read."""

    def __init__(
        self,
        inventory: Inventory,
        choice: Choice,
        begin: Begin,
        tell: Tell,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``begin`` makes the life of a guest, which is young or not, and starts it."""
        self._inventory, self._choice, self._begin, self._tell, self._clock_s = inventory, choice, begin, tell, clock_s
        self._stopping: Stopping = lambda: False
        self._lives: dict[str, Life] = {}
        self._portless_s: dict[str, float] = {}  # since when
        self._beside: list[Life] = []
        self._refused: dict[str, _Refusal] = {}
        self._begun_s: dict[str, float] = {}
        self._said: dict[str, str] = {}  # by what it is about
        self._ended: list[Life] = []
        self._troubles: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self.looks = 0

    # -- any thread --

    def adopt(self, life: Life) -> None:
        """Take a life that was begun elsewhere. Before the first look."""
        self._lives[key_of(life.info)] = life

    def accompany(self, life: Life) -> None:
        """Tell a watch what is known of its guest, and nothing else: it ends by itself. Before the first look."""
        self._beside.append(life)

    def lives(self) -> list[Life]:
        """Those under watch."""
        with self._lock:
            return list(self._lives.values())

    def take_ended(self) -> list[Life]:
        """Those that have ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    # -- the roster's thread --

    def run(self, stopping: Stopping) -> None:
        """Look until told to stop, and then wait for the guests' threads."""
        self._stopping = stopping
        try:
            while not stopping():
                began_s = time.monotonic()
                try:
                    self.look(POLL_S if self.looks else 0.0)
                    time.sleep(max(0.0, began_s + PACE_S - time.monotonic()))
                except Exception:  # a defect of ours: guests that come later must not go unseen for it
                    self._say("defect", f"a defect of Parasight, please report it:\n{traceback.format_exc()}")
                    time.sleep(REST_S)
        finally:
            join_all(self.lives(), self._tell)
            self._bury({})

    def look(self, timeout_s: float = POLL_S) -> None:
        """Wait for a change, at most ``timeout_s``; then make what is watched what shall be."""
        for change in self._inventory.wait(timeout_s):
            for life in (*self.lives(), *self._beside):
                if change.uuid is not None and change.uuid == life.info.id.uuid and life.watched is not None:
                    life.watched.watch.hint(change.what)
        try:
            guests = self._inventory.find_guests()
        except ParasightError as error:
            self._say("inventory", str(error))
            return
        self._tell_troubles()
        self._reconcile({key_of(info): info for info in guests})
        if self.looks == 0 and not self._lives and self._choice.uuids is None:
            self._tell("no guest to watch runs here yet; those that start will be watched")
        self.looks += 1

    def _tell_troubles(self) -> None:
        """What a hypervisor could not be asked, and that it can be again."""
        before, self._troubles = self._troubles, self._inventory.troubles
        for trouble in self._troubles:
            if trouble not in before:
                self._tell(trouble)
        for trouble in before:
            if trouble not in self._troubles:
                self._tell(f"no longer so: {trouble}")
        if self.looks == 0 and self._choice.uuids is None and any(one.startswith("libvirt") for one in self._troubles):
            done = "not watched" if self._choice.opt_in else "watched, whatever their metadata says"
            self._tell(f"until libvirt can be asked, its guests are {done}")

    def _reconcile(self, here: dict[str, GuestInfo]) -> None:
        self._bury(here)
        for key, life in list(self._lives.items()):
            self._tend(life, here.get(key))
        for life in self._beside:
            if (info := here.get(key_of(life.info))) is not None and life.watched is not None:
                self._inform(life, life.watched, info)
        now_s = self._clock_s()
        self._portless_s = {key: self._portless_s.get(key, now_s) for key, info in here.items() if not info.ports}
        self._refused = {key: refusal for key, refusal in self._refused.items() if key in here}
        for key, info in here.items():
            if key in self._lives or self._rests(key, info, now_s):
                continue
            if not self._choice.takes(info):
                if self._choice.uuids is None and info.wanted is False:
                    self._say(f"wanted {key}", f"{info.id.target}: {_name(info)}is left out, as its metadata says")
                continue
            if not info.ports and self.looks > 0 and now_s - self._portless_s[key] < SETTLE_S:
                continue
            if self._stopping():  # the ends of the lives that are over now ask for no others
                return
            try:
                life = self._begin(info, self._is_new(info))
            except Exception:  # a defect of ours, or no thread to be had: the others shall be watched all the same
                self._say(f"begin {key}", f"{info.id.target} cannot be watched:\n{traceback.format_exc()}")
                self._refuse(key, Shape.of(info), now_s)
                continue
            self._begun_s[key] = now_s
            with self._lock:
                self._lives[key] = life

    def _rests(self, key: str, info: GuestInfo, now_s: float) -> bool:
        """Whether it could not be watched as it is a short while ago."""
        refusal = self._refused.get(key)
        if refusal is not None and refusal.shape != Shape.of(info):
            del self._refused[key]
            return False
        return refusal is not None and now_s < refusal.until_s

    def _refuse(self, key: str, shape: Shape, now_s: float) -> None:
        """Leave it alone for a while, for longer each time; as at first where it was watched for long."""
        before, begun_s = self._refused.get(key), self._begun_s.pop(key, now_s)
        least_s, most_s = AGAIN_S
        again = before is not None and before.shape == shape and now_s - begun_s < most_s
        pause_s = min(2 * before.pause_s, most_s) if before is not None and again else least_s
        self._refused[key] = _Refusal(shape, pause_s, now_s + pause_s)

    def _is_new(self, info: GuestInfo) -> bool:
        """Whether its machine has just started, so that its kernel may not run yet."""
        age_s = read_age_s(info.pid) if info.pid is not None else None
        return age_s < YOUNG_S if age_s is not None else self.looks > 0

    def _tend(self, life: Life, info: GuestInfo | None) -> None:
        """Tell a watch what is known of its guest now; end it when it is over."""
        if info is None:
            if not self._lives_on(life.info):
                life.end(ENDED)
        elif info.wanted is False and self._choice.uuids is None:
            life.end("its metadata asks for no watch any more")
        elif self._choice.opt_in and not self._choice.takes(info):
            life.end("its metadata does not ask for a watch any more")
        elif info.ports and not life.info.ports:
            life.end("it has a port now")  # and is opened again
        elif info.ports and life.watched is not None and not life.watched.follows and _moved(life.info, info):
            life.end("its ports have changed")  # and is opened again
        elif life.watched is not None:
            life.info = info
            life.watched.watch.renew(info)

    def _inform(self, life: Life, watched: Watched, info: GuestInfo) -> None:
        """Tell a watch that nobody opens again what is known of its guest now."""
        if info.ports and not watched.follows and _moved(life.info, info):
            ports = ", ".join(port.ifname for port in info.ports)
            self._say(
                f"ports {key_of(info)}", f"{info.id.target}: its ports are {ports} now: watch it anew to see them"
            )
        watched.watch.renew(info)

    def _lives_on(self, info: GuestInfo) -> bool:
        """A guest that is not listed may still run, where its hypervisor could not be asked."""
        if self._inventory.has_process(info):
            return False
        try:
            return is_running(info)
        except ParasightError:
            return True

    def _bury(self, here: dict[str, GuestInfo]) -> None:
        """Take the lives that are over off the list; a guest that could not be watched is tried when it changes."""
        for key, life in list(self._lives.items()):
            if not life.over:
                continue
            with self._lock:
                del self._lives[key]
                if not life.refused or life.summary.defect:
                    self._ended.append(life)
            if life.sent_off:
                self._refused.pop(key, None)
            elif key in here:
                self._refuse(key, life.shape, self._clock_s())
            self._begun_s.pop(key, None)
            if life.refused:
                self._say(f"refused {key}", f"{life.refused}; it is not watched")

    def _say(self, subject: str, line: str) -> None:
        """Say something once, until it is about something else."""
        if self._said.get(subject) == line:
            return
        if len(self._said) >= MAX_SAID:
            del self._said[next(iter(self._said))]
        self._said[subject] = line
        self._tell(line)


def _moved(before: GuestInfo, info: GuestInfo) -> bool:
    """Whether it has other ports."""
    return set(Shape.of(before).ports) != set(Shape.of(info).ports)


def _name(info: GuestInfo) -> str:
    return f"{info.id.name} " if info.id.name else ""
