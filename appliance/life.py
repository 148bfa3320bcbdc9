"""One life of one guest under watch: a thread from opening to closing."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from appliance.assembly import Watched
from appliance.errors import ParasightError
from appliance.model import GuestInfo
from appliance.pacemaker import Pacemaker
from appliance.respond.room import ControlRoom
from appliance.summary import Summary
from appliance.watch import ENDED, Tell

PATIENCE_S: Final = 10.0  # a thread can hang in the kernel, in a read of a guest's memory

Open = Callable[["Life"], Watched]
Stopping = Callable[[], bool]


def join_all(lives: Iterable[Life], tell: Tell) -> None:
    """Wait for threads that were told to end; one that hangs is told of and left behind."""
    until_s = time.monotonic() + PATIENCE_S
    for life in lives:
        if not life.join(max(0.0, until_s - time.monotonic())):
            tell(f"{life.info.id.target}: its watch hangs and is left behind; what it held is released with our end")


def key_of(info: GuestInfo) -> str:
    """Names one life of one guest."""
    return info.id.instance or info.id.target


@dataclass(frozen=True, slots=True)
class Shape:
    """What a guest is to us: where that changes, one that could not be watched is worth another try."""

    ports: tuple[tuple[str, int | None, str | None], ...]  # name, index, network namespace
    routes: tuple[str, ...]
    state: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, info: GuestInfo) -> Shape:
        """That of a guest as the inventory knows it."""
        return cls(
            tuple((port.ifname, port.ifindex, port.netns) for port in info.ports),
            info.routes,
            info.state.value,
            info.notes,
        )


class Life:
    """The watch of one life of one guest, in a thread of its own. ``open`` is called there."""

    def __init__(
        self,
        info: GuestInfo,
        open_: Open,
        room: ControlRoom,
        heart: Pacemaker,
        stopping: Stopping,
        tell: Tell,
        *,
        named: bool,
    ) -> None:
        """``named``: a person asked for this guest, and shall know when its watch is over."""
        self.info, self._open, self._room, self._heart = info, open_, room, heart
        self.shape = Shape.of(info)
        self._stopping, self._tell, self._named = stopping, tell, named
        self.watched: Watched | None = None
        self.summary = Summary(info.id.target, uuid=info.id.uuid, name=info.id.name)
        self.offered = 0  # verdicts that wait to be shown, or were; counted by its own thread
        self.shown = 0  # of these; counted by whoever shows them
        self.dropped = 0  # verdicts for which there was no room; counted by its own thread
        self.unwritten = 0  # for which there was no place where they go; as ``failed``
        self.failed = 0  # verdicts that could not be shown; counted by whoever shows them
        self.refused = ""  # why it could not be opened
        self._ending = ""
        self._thread = threading.Thread(target=self._run, name=info.id.target, daemon=True)  # one can hang

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for its end, for so long at most; whether it has ended, or never begun."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def begun(self) -> bool:
        """Whether its loop came round: new flows wait, where they shall; or it is over already."""
        return self.over or (self.watched is not None and self.watched.watch.count_turns() > 0)

    @property
    def settled(self) -> bool:
        """Whether it has begun, and its memory was found or will not be found at once."""
        return self.begun and not (self.watched is not None and not self.over and self.watched.watch.opening)

    def final(self) -> Summary:
        """Its summary, with what became of its verdicts. After its end."""
        self.summary.unshown = self.dropped + self.failed + self.unwritten
        self.summary.defect |= self.failed > 0
        return self.summary

    @property
    def sent_off(self) -> bool:
        """Whether it was told to end, by another thread."""
        return bool(self._ending)

    def end(self, why: str) -> None:
        """Let it end soon; any thread."""
        self._ending = self._ending or why
        if self.watched is not None:
            self.watched.watch.end(self._ending)

    def _explain(self) -> str:
        """Why it ended before its time; "" where that is how it should be."""
        expected = self._ending or (not self._named and self.summary.ended == ENDED)
        return "" if expected else self.summary.ended

    def _run(self) -> None:
        try:
            watched = self._open(self)
        except ParasightError as error:
            self.refused = self.summary.ended = str(error)
            return
        except Exception as error:  # a defect of ours with this guest must not cost another one
            self.refused = self.summary.ended = f"a defect of Parasight, please report it: {error!r}"
            self.summary.defect = True
            self._tell(f"{self.info.id.target}: {self.refused}\n{traceback.format_exc()}")
            return
        self.watched, self.summary = watched, watched.watch.summary
        if self._ending:
            watched.watch.end(self._ending)
        try:
            self._room.admit(watched.front)
            if watched.beat is not None:
                self._heart.add(watched.watch.count_turns, watched.beat)
            watched.watch.run(self._stopping)
        finally:
            if watched.beat is not None:
                self._heart.remove(watched.beat)
            self._room.dismiss(watched.front, self._explain())
            watched.front.mailbox.close()
            watched.close()
