"""The memory eye on one guest through its whole life: lost with the kernel it was opened for, and opened again.

Attaching takes from a tenth of a second to many, so it is done aside: packets, and who waits for a verdict, do not wait
for it. A machine that has just started, or in which another kernel will soon run, is tried again every second or so;
one in which nothing can be read is left in peace more and more.

A kernel is known by its pulse. One that stands still is paused, or what is left in RAM of a kernel that is over.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Final

from appliance.errors import GuestError, GuestGone, ParasightError
from appliance.model import Change, GuestState
from appliance.ports import GuestEye

CHECK_NS: Final = 1_000_000_000  # how often a kernel's pulse is felt
STILL_NS: Final = 10 * CHECK_NS  # a kernel that does not tick for so long is paused, or is over
BRISK_STILL_NS: Final = 2 * CHECK_NS  # the same for a guest that sends something, or whose machine works
RETRY_NS: Final = 2 * CHECK_NS  # first pause before another try to attach; doubled with each failure
MAX_RETRY_NS: Final = 300 * CHECK_NS
YOUNG_NS: Final = 300 * CHECK_NS  # so long after a start another kernel is looked for eagerly
EAGER_NS: Final = CHECK_NS  # then this is the pause, or
COST_FACTOR: Final = 4  # so many times the CPU time of the last try, or as long as it took
FULL_NS: Final = 10 * CHECK_NS  # and so often everything is tried then, or
FULL_COST: Final = 10  # so many times what that took; else only what shows at a glance
BUSY: Final = 0.05  # share of one CPU that a paused machine does not use
IDLE_S: Final = 0.02  # CPU time in which no kernel can have started
MAX_AT_ONCE: Final = 4  # tries under way in one process: each holds some ten MiB
HANGS_S: Final = 60.0  # one that takes longer (a read can hang in the kernel) keeps no other from beginning

_UPSET: Final = {
    Change.REBOOTED: "it reboots",
    Change.REVERTED: "it was reverted to a snapshot",
}
_MOVES: Final = {Change.RESUMED, Change.MIGRATED, Change.STARTED}

Attach = Callable[[], GuestEye | None]
Aside = Callable[[Attach], "Future[GuestEye | None]"]


class Slots:
    """Lets so many in at once; who stays for longer than ``seconds`` does not count any more."""

    def __init__(self, count: int = MAX_AT_ONCE, seconds: float = HANGS_S) -> None:
        self._count, self._seconds = count, seconds
        self._changed = threading.Condition()
        self._since_s: dict[object, float] = {}

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Wait for a place, and hold it."""
        mark = object()
        with self._changed:
            while self._is_full():
                self._changed.wait(min(1.0, self._seconds))
            self._since_s[mark] = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                del self._since_s[mark]
                self._changed.notify()

    def _is_full(self) -> bool:
        now_s = time.monotonic()
        return sum(now_s - since_s < self._seconds for since_s in self._since_s.values()) >= self._count


_slots: Final = Slots()


def at_once(job: Attach) -> Future[GuestEye | None]:
    """Do it here and now."""
    future: Future[GuestEye | None] = Future()
    _fulfil(future, job)
    return future


def in_a_thread(job: Attach) -> Future[GuestEye | None]:
    """Do it in a thread of its own, which nobody has to wait for, not even at the end."""
    future: Future[GuestEye | None] = Future()

    def run() -> None:
        with _slots.take():
            _fulfil(future, job)

    threading.Thread(target=run, name="attach", daemon=True).start()
    return future


def _fulfil(future: Future[GuestEye | None], job: Attach) -> None:
    try:
        future.set_result(job())
    except Exception as error:  # told, or raised, in the guest's own thread
        future.set_exception(error)


class Sight:
    """Holds the eye on a guest's memory as long as its kernel runs. Used by the guest's thread."""

    def __init__(
        self,
        vm: str,
        eye: GuestEye | None,
        attach: Attach,
        now_ns: int,
        *,
        tell: Callable[[str], None],
        errors: Counter[str],
        aside: Aside = at_once,
        work_s: Callable[[], float] | None = None,
        state: GuestState = GuestState.RUNNING,
        young: bool = False,
        silent: bool = True,
        glance: Attach | None = None,
        without: str = "watching its packets only",
    ) -> None:
        """``errors`` counts what the guest does to us. ``work_s`` tells the CPU seconds that its machine has used.

        ``state``: what the guest does now. ``young``: its kernel may not run yet. ``silent``: that no kernel can be
        read was said already. ``glance`` is a cheaper ``attach`` which does not find everything. ``without``: what is
        done while nothing can be read.
        """
        self.eye, self._vm, self._attach, self._tell, self._errors = eye, vm, attach, tell, errors
        self._glance, self._without = glance, without
        self._next_full_ns = now_ns + FULL_NS if young else 0
        self._aside, self._work_s, self._silent = aside, work_s, silent
        self.state = state
        self._trying: Future[GuestEye | None] | None = None
        self._useless: Future[GuestEye | None] | None = None  # a try that was given up and is not over
        self._took_ns = self._cost_ns = 0
        self._was_full = False
        self._young_until_ns = now_ns + YOUNG_NS if young else 0
        self._retry_ns, self._next_try_ns = RETRY_NS, now_ns + (RETRY_NS if silent else 0)
        self._pulse, self._beat_ns, self._spoke_ns, self._still_ns = -1, now_ns, 0, STILL_NS
        self._next_check_ns = 0
        self._over: int | None = None  # the last pulse of a kernel that is over, and of which much may be left in RAM
        self._worked_s, self._measured_ns, self._works = 0.0, now_ns, False
        self._tried_at_s: float | None = None  # CPU seconds used when the last try began
        self._had, self._waits = eye is not None, False
        self._trouble: ParasightError | None = None

    def is_young(self, now_ns: int) -> bool:
        """Whether its machine has just started, or another kernel in it."""
        return now_ns < self._young_until_ns

    @property
    def opening(self) -> bool:
        """No kernel is seen, and perhaps one is in a moment."""
        return self.eye is None and (self._trying is not None or self._is_held_up())

    def heard(self, at_ns: int) -> None:
        """The guest has sent something: it is not paused."""
        self._spoke_ns = at_ns

    # -- what is told of it --

    def hint(self, change: Change, now_ns: int) -> None:
        """The hypervisor tells of a change."""
        if change in _UPSET:
            self._upset(_UPSET[change], now_ns)
        elif change in _MOVES:
            self._rest(now_ns)
            self._hurry(now_ns)

    def learn_state(self, state: GuestState, now_ns: int) -> None:
        """What the guest does now."""
        before, self.state = self.state, state
        if before is state:
            return
        self._rest(now_ns)
        if state is GuestState.RUNNING:
            self._hurry(now_ns)
        elif state is GuestState.INCOMING:  # who reads a page that is still on its way waits for it in the kernel
            self._forget_try()
            self.drop()
        elif state is GuestState.CRASHED:
            self._say("its kernel has crashed, as the hypervisor says")

    def _upset(self, why: str, now_ns: int) -> None:
        """Another kernel will run here, or the same one at another time: nothing that was read before holds."""
        if self.eye is not None:
            with contextlib.suppress(GuestError):
                self._over = self.eye.read_pulse()
            self.drop()
            self._say(f"{why}; its memory is looked at afresh")
        self._forget_try()
        self._hurry(now_ns)

    def _hurry(self, now_ns: int) -> None:
        self._young_until_ns = now_ns + YOUNG_NS
        self._next_full_ns = now_ns + FULL_NS
        self._retry_ns, self._tried_at_s = RETRY_NS, None
        if self.eye is None:
            self._next_try_ns = now_ns

    def _rest(self, now_ns: int) -> None:
        """A new beginning for its pulse: nothing follows from when it ticked last."""
        self._beat_ns = now_ns

    # -- every turn of the guest's loop --

    def look(self, now_ns: int) -> bool:
        """See to the eye, without waiting for anything; whether it is another one now."""
        self._mind_clock(now_ns)
        if self.state is GuestState.INCOMING:
            return False
        if self._trying is None and not self._is_held_up():
            if self.eye is None:
                if now_ns >= self._next_try_ns and not self._idle():
                    self._try(now_ns)
            elif self.eye.live and now_ns >= self._next_check_ns:
                self._next_check_ns = now_ns + CHECK_NS
                self._feel(self.eye, now_ns)
        if self._trying is None or not self._trying.done():
            return False
        future, self._trying = self._trying, None
        fresh = None
        try:
            fresh = future.result()
        except ParasightError as error:
            self._trouble = error
        return self._settle(fresh, now_ns)

    def _mind_clock(self, now_ns: int) -> None:
        """The host's clock may be set back."""
        if self._next_check_ns > now_ns + CHECK_NS:
            self._next_check_ns, self._beat_ns, self._measured_ns = now_ns, now_ns, now_ns
            self._next_try_ns = min(self._next_try_ns, now_ns + RETRY_NS)

    def _idle(self) -> bool:
        """Whether the machine has done nothing since the last try: then nothing else can be found in it."""
        if self._work_s is None or self._tried_at_s is None:
            return False
        return self._work_s() - self._tried_at_s < IDLE_S

    def _try(self, now_ns: int) -> None:
        """Attach aside. In a young machine mostly by a glance, which need not find everything."""
        self._tried_at_s = self._work_s() if self._work_s is not None else None
        full = self._glance is None or now_ns >= min(self._next_full_ns, self._young_until_ns)
        self._trying = self._aside(partial(self._attach_timed, full=full))

    def _attach_timed(self, *, full: bool) -> GuestEye | None:
        """In whatever thread ``aside`` chose; nobody else looks at these costs before it is done."""
        start_s, start_cpu_s = time.monotonic(), time.thread_time()
        try:
            return self._attach() if full or self._glance is None else self._glance()
        finally:
            self._took_ns = round((time.monotonic() - start_s) * 1e9)
            self._cost_ns = max(round(COST_FACTOR * (time.thread_time() - start_cpu_s) * 1e9), self._took_ns)
            self._was_full = full

    def _feel(self, eye: GuestEye, now_ns: int) -> None:
        """Feel the kernel's pulse; attach once more where that has stopped, to learn why.

        A paused guest sends nothing and its machine does nothing, so one that does is waited for less.
        """
        self._measure(now_ns)
        pulse = self._pulse
        with self.guard("pulse"):
            pulse = eye.read_pulse()
        if self.eye is None:
            return
        if pulse != self._pulse:
            backwards = pulse < self._pulse
            self._pulse, self._beat_ns, self._still_ns = pulse, now_ns, STILL_NS
            if backwards:
                self._upset("it went back in time", now_ns)
        elif self.state is not GuestState.RUNNING:
            self._rest(now_ns)
        else:
            brisk = self._works or self._spoke_ns - self._beat_ns > CHECK_NS
            limit_ns = min(self._still_ns, BRISK_STILL_NS) if brisk else self._still_ns
            if now_ns - self._beat_ns > limit_ns and now_ns >= self._next_try_ns:
                self._try(now_ns)

    def _measure(self, now_ns: int) -> None:
        if self._work_s is not None and now_ns > self._measured_ns:
            worked_s, passed_s = self._work_s(), (now_ns - self._measured_ns) / 1e9
            self._works = worked_s - self._worked_s > BUSY * passed_s
            self._worked_s, self._measured_ns = worked_s, now_ns

    # -- what a try has found --

    def _settle(self, fresh: GuestEye | None, now_ns: int) -> bool:
        if self.eye is None:
            if fresh is not None and self._over is not None and self._read_pulse(fresh) in {None, self._over}:
                fresh.close()
                fresh = None
            return self._adopt(fresh, now_ns)
        theirs = self._read_pulse(fresh) if fresh is not None else None
        mine = self._read_pulse(self.eye)
        if mine is not None and (mine != self._pulse or (mine == theirs and not self._works)):
            if fresh is not None:  # it ticks again; or it is the same kernel, and paused
                fresh.close()
            self._still_ns = min(2 * self._still_ns, MAX_RETRY_NS)
            self._spoke_ns = self._beat_ns
            self._put_off(now_ns)
            return False
        if fresh is not None and mine is not None and mine == theirs:  # the machine works, but this kernel does not
            fresh.close()
            fresh = None
        self._over = mine if fresh is None else None
        self.drop()
        self._say("its kernel does not run any more")
        self._young_until_ns = now_ns + YOUNG_NS
        return self._adopt(fresh, now_ns)

    def _read_pulse(self, eye: GuestEye) -> int | None:
        with self.guard("pulse"):
            return eye.read_pulse()
        return None

    def _adopt(self, eye: GuestEye | None, now_ns: int) -> bool:
        if eye is None:
            self._put_off(now_ns)
            self._complain(now_ns)
            return False
        how = "attached again" if self._had else f"attached in {self._took_ns / 1e9:.2f} s"
        self._say(f"{eye.describe}, {how}")
        self.eye, self._had, self._silent, self._over = eye, True, True, None
        self._retry_ns, self._still_ns, self._beat_ns, self._pulse = RETRY_NS, STILL_NS, now_ns, -1
        return True

    def _put_off(self, now_ns: int) -> None:
        """The next try: soon in a young machine, later and later in any other."""
        if self._was_full:
            self._next_full_ns = now_ns + max(FULL_NS, FULL_COST * self._took_ns)
        if self.state is GuestState.PAUSED:  # nothing changes in it; when it goes on, that is told
            self._next_try_ns = now_ns + MAX_RETRY_NS
        elif now_ns < self._young_until_ns:
            self._next_try_ns = now_ns + max(EAGER_NS, self._cost_ns)
        else:
            self._retry_ns = min(2 * self._retry_ns, MAX_RETRY_NS)
            self._next_try_ns = now_ns + self._retry_ns

    def _complain(self, now_ns: int) -> None:
        """Say once that no kernel can be read yet, and once why, when it is not to be expected any more."""
        error = self._trouble
        if self._silent or error is None:
            return
        if isinstance(error, GuestError) and now_ns < self._young_until_ns:
            if not self._waits:
                self._waits = True
                self._say(f"no kernel can be read in it yet; {self._without}")
            return
        self._silent = True
        self._say(f"{error}; {self._without}")

    # -- its end --

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Count what the guest does to us; a guest that is gone takes its eye with it, nothing else."""
        try:
            yield
        except GuestGone as error:
            self._errors["gone"] += 1
            self._say(f"{error}; {self._without}")
            self.drop()
        except GuestError as error:
            self._errors[f"{what}: {type(error).__name__}"] += 1

    def drop(self) -> None:
        """Close the eye."""
        if self.eye is not None:
            self.eye.close()
            self.eye = None

    def close(self) -> None:
        """See nothing any more; may be called twice."""
        self._forget_try()
        self.drop()

    def _forget_try(self) -> None:
        """What is under way is of no use any more. No other is begun before it is over."""
        if self._trying is not None:
            self._useless, self._trying = self._trying, None
            self._useless.add_done_callback(_close_found)

    def _is_held_up(self) -> bool:
        return self._useless is not None and not self._useless.done()

    def _say(self, line: str) -> None:
        self._tell(line if line.startswith(self._vm) else f"{self._vm}: {line}")  # some errors name it themselves


def _close_found(future: Future[GuestEye | None]) -> None:
    if future.exception() is None and (eye := future.result()) is not None:
        eye.close()
