"""The control room: answers the requests of the control socket.

What concerns a guest is done by its own thread, through its mailbox; a guest that does not answer costs the one who
asked two seconds and nobody else anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from appliance.errors import GuestGone, ParasightError, UsageError
from appliance.model import Act, GuestId, Verdict
from appliance.respond.banning import Banning
from appliance.respond.bans import FOREVER, Ban
from appliance.respond.desk import GuestDesk, GuestStatus, HeldFlow
from appliance.respond.known import KnownFlows
from appliance.respond.mailbox import NoAnswer
from appliance.respond.requests import (
    Bans,
    Decide,
    Handle,
    Held,
    LiftBan,
    MakeBan,
    Status,
    Stop,
    parse,
)

Json = dict[str, Any]
T = TypeVar("T")

MAX_ENDED = 64  # watches that are over and of which status tells why
_WAIT_S = 2.0  # how long a guest's thread may take to come to a request


@dataclass(frozen=True, slots=True)
class Words:
    """How nouns are said in JSON: the contract of the command line, given by it."""

    verdict: Callable[[Verdict], Json]
    moment: Callable[[int], str]  # nanoseconds since the Unix epoch to ISO 8601


@dataclass(slots=True)
class ControlRoom:
    """One per appliance. ``answer`` and the guests' coming and going may be called from any thread but a guest's."""

    words: Words
    banning: Banning
    stop: Callable[[], None]
    clock: Callable[[], int] = time.time_ns
    version: str = ""
    known: KnownFlows = field(default_factory=KnownFlows)
    wait_s: float = _WAIT_S
    _desks: dict[str, GuestDesk] = field(default_factory=dict)
    _ended: dict[str, tuple[GuestId, str]] = field(default_factory=dict)  # watches that ended before their time
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started_ns: int = 0

    def __post_init__(self) -> None:
        """Note when it opened."""
        self._started_ns = self.clock()

    def admit(self, desk: GuestDesk) -> None:
        """A guest is under watch from now on."""
        with self._lock:
            self._desks[desk.vm.target] = desk
            uuid = desk.vm.uuid
            back = [target for target, (vm, _) in self._ended.items() if uuid is not None and vm.uuid == uuid]
            for target in (desk.vm.target, *back):
                self._ended.pop(target, None)
        self.banning.admit(desk)

    def dismiss(self, desk: GuestDesk, why: str = "") -> None:
        """The watch of a guest has ended; ``why``, if that was before its time."""
        with self._lock:
            if self._desks.get(desk.vm.target) is desk:
                del self._desks[desk.vm.target]
                if why:
                    self._ended[desk.vm.target] = desk.vm, f"its watch has ended: {why.splitlines()[0]}"
                    if len(self._ended) > MAX_ENDED:
                        del self._ended[next(iter(self._ended))]
        self.banning.dismiss(desk)

    def tick(self) -> None:
        """Housekeeping, twice a second or so."""
        self.banning.tick()

    def answer(self, body: object, who: str) -> object:
        """Do what is asked and give the result as JSON. Raises ParasightError."""
        match parse(body):
            case Status():
                return self._status()
            case Held():
                return [self._held_body(desk, one) for desk, one in self._held()]
            case Decide(prefix, allow):
                return self._decide(prefix, allow, who)
            case Handle(prefix, act):
                return self._handle(prefix, act, who)
            case MakeBan(peer, guest, seconds, reason):
                ban, old = self.banning.ban(peer, self._find(guest), seconds, reason, who)
                return {"ban": self._ban_body(ban), "replaced": self._ban_body(old) if old else None} | self._rest()
            case LiftBan(peer, guest):
                lifted, left = self.banning.unban(peer, self._find(guest))
                if not lifted:
                    others = ", ".join(str(ban.peer) for ban in left)
                    hint = f"; it is covered by the ban of {others}" if others else "; see `parasight bans`"
                    raise UsageError(f"{peer} is not banned itself" + hint)
                bodies = [[self._ban_body(ban) for ban in bans] for bans in (lifted, left)]
                return {"lifted": bodies[0], "still": bodies[1]} | self._rest()
            case Bans():
                return [self._ban_body(ban) for ban in self.banning.bans()]
            case Stop():
                self.stop()
                return {"stopping": True, "pid": os.getpid()}

    # -- guests --

    def _all(self) -> list[GuestDesk]:
        with self._lock:
            return list(self._desks.values())

    def _find(self, named: str | None) -> GuestId | None:
        """The guest that a person named by target, UUID or name. Raises UsageError."""
        if named is None:
            return None
        guests = [desk.vm for desk in self._all()]
        found = [vm for vm in guests if named in {vm.target, vm.name} or named.lower() == vm.uuid]
        if len(found) == 1:
            return found[0]
        known = ", ".join(vm.target for vm in (found or guests)) or "none"
        raise UsageError(f"{named!r} is {'more than one guest' if found else 'not under watch'}; say one of: {known}")

    def _call(self, desk: GuestDesk, job: Callable[[], T]) -> T:
        return desk.mailbox.call(job, self.wait_s)

    def _ask_all(self, question: Callable[[GuestDesk], T]) -> list[tuple[GuestDesk, T | ParasightError]]:
        """Ask every guest at once; one that does not answer costs the time of one, and its answer is the error."""
        asked: list[tuple[GuestDesk, Future[T] | ParasightError]] = []
        for desk in self._all():
            try:
                asked.append((desk, desk.mailbox.post(partial(question, desk))))
            except ParasightError as error:
                asked.append((desk, error))
        wait([future for _, future in asked if isinstance(future, Future)], self.wait_s)
        answers: list[tuple[GuestDesk, T | ParasightError]] = []
        for desk, future in asked:
            try:
                answers.append((desk, future.result(0) if isinstance(future, Future) else future))
            except ParasightError as error:
                answers.append((desk, error))
            except TimeoutError:
                if isinstance(future, Future):
                    future.cancel()
                answers.append((desk, NoAnswer(f"the guest's watch was busy for {self.wait_s:g} s")))
        return answers

    # -- status --

    def _status(self) -> Json:
        guests = [self._guest_body(desk.vm, status) for desk, status in self._ask_all(lambda desk: desk.status())]
        with self._lock:
            ended = list(self._ended.values())
        return {
            "pid": os.getpid(),
            "version": self.version,
            "started": self.words.moment(self._started_ns),
            "uptime_s": round((self.clock() - self._started_ns) / 1e9, 3),
            "guests": guests + [self._guest_body(vm, GuestGone(why)) for vm, why in ended],
        }

    def _guest_body(self, vm: GuestId, answer: GuestStatus | ParasightError) -> Json:
        status = None if isinstance(answer, ParasightError) else answer
        trouble = self.banning.troubles().get(vm.target) if status else str(answer)
        body: Json = {"vm": vm.target, "name": vm.name, "uuid": vm.uuid}
        body |= {"answers": status is not None, "banned": self.banning.count(vm), "trouble": trouble}
        for key in ("rung", "acts", "enforces", "flows", "held", "blocked"):
            body[key] = getattr(status, key, None)
        body["started"] = self.words.moment(status.started_ns) if status else None
        body["uptime_s"] = round((self.clock() - status.started_ns) / 1e9, 3) if status else None
        return body

    # -- a person's decision --

    def _held(self) -> list[tuple[GuestDesk, HeldFlow]]:
        """All that wait, most urgent first. Raises NoAnswer where a guest does not say."""
        found, silent = self._ask_held()
        if silent is not None:
            raise silent  # an incomplete list must not look like a whole one
        return found

    def _ask_held(self) -> tuple[list[tuple[GuestDesk, HeldFlow]], NoAnswer | None]:
        """What waits in the guests that say so, most urgent first; and that there is one that does not."""
        found: list[tuple[GuestDesk, HeldFlow]] = []
        silent: NoAnswer | None = None
        for desk, answer in self._ask_all(lambda desk: desk.held()):
            if isinstance(answer, NoAnswer):
                silent = silent or NoAnswer(f"{desk.vm.target}: {answer}")
            elif isinstance(answer, GuestGone):
                continue
            elif isinstance(answer, ParasightError):
                raise answer
            else:
                found += [(desk, one) for one in answer]
        return sorted(found, key=lambda pair: pair[1].until_ns), silent

    def _held_body(self, desk: GuestDesk, one: HeldFlow) -> Json:
        left_s = max(0.0, (one.until_ns - self.clock()) / 1e9)
        return self.words.verdict(one.verdict) | {
            "deadline": self.words.moment(one.until_ns),
            "left_s": round(left_s, 3),
            "default": one.default.value,
        }

    def _decide(self, prefix: str, allow: bool, who: str) -> Json:
        held, silent = self._ask_held()
        waiting = [(desk, one, self.words.verdict(one.verdict)["id"]) for desk, one in held]
        found = [entry for entry in waiting if entry[2].startswith(prefix)]
        if silent is not None and [verdict_id for _, _, verdict_id in found] != [prefix]:
            raise silent  # of a whole id there is no second; of its first digits there may be, in that guest
        if len(found) > 1:
            raise UsageError(f"{prefix!r} begins several ids: give more of its digits")
        if not found:
            raise UsageError(f"no connection {prefix!r} waits for a decision (any more); see `parasight held`")
        desk, one, verdict_id = found[0]
        done = self._call(desk, lambda: desk.decide(one.verdict.flow.id, allow, who))
        if not done:
            raise UsageError(f"{verdict_id} does not wait any more: its time was up, or somebody else has decided")
        return {"id": verdict_id, "vm": desk.vm.target, "decision": "allow" if allow else "block", "who": who}

    def _handle(self, prefix: str, act: Act, who: str) -> Json:
        verdict_id, flow = self.known.find(prefix)
        life = flow.vm.target, flow.vm.instance  # its name may have changed since
        desk = next((desk for desk in self._all() if (desk.vm.target, desk.vm.instance) == life), None)
        if desk is None:
            raise UsageError(f"{flow.vm.target} is not under watch any more")
        done = self._call(desk, lambda: desk.act(flow, act, who))
        return {"id": verdict_id, "vm": desk.vm.target, "act": act.value, "done": done}

    # -- bans --

    def _rest(self) -> Json:
        """Which guests are not kept to the book yet, and why."""
        troubles = self.banning.troubles()
        return {"not_yet": [{"vm": vm, "why": why} for vm, why in sorted(troubles.items())]}

    def _ban_body(self, ban: Ban) -> Json:
        forever = ban.until_ns == FOREVER
        return {
            "peer": str(ban.peer),
            "guest": ban.target,
            "since": self.words.moment(ban.since_ns),
            "until": None if forever else self.words.moment(ban.until_ns),
            "left_s": None if forever else round(max(0.0, (ban.until_ns - self.clock()) / 1e9), 3),
            "reason": ban.reason,
            "who": ban.who,
        }
