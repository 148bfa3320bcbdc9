"""Jobs from any thread, run by the one thread to which a guest belongs. Bounded; nobody waits for ever."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from appliance.errors import GuestError, GuestGone

MAX_JOBS = 64  # jobs that wait; people and programs at a socket do not make more
MAX_SERVED = 8  # jobs run in one go, so that a guest's packets never wait for a crowd

T = TypeVar("T")


class NoAnswer(GuestError):
    """The guest's thread did not come to it in time; the text says whether the job can still be done."""


class Mailbox:
    """The letter box at the door of one guest's thread."""

    def __init__(self, limit: int = MAX_JOBS) -> None:
        self._limit = limit
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()
        self._closed: str | None = None

    # -- any thread --

    def post(self, job: Callable[[], T]) -> Future[T]:
        """Ask for ``job`` without waiting. Raises NoAnswer when too many wait, GuestGone when nobody will serve."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed is not None:
                raise GuestGone(self._closed)
            if len(self._jobs) >= self._limit:
                self._jobs = deque(entry for entry in self._jobs if not entry[0].cancelled())
            if len(self._jobs) >= self._limit:
                raise NoAnswer(f"{self._limit} requests wait for this guest already; nothing was done")
            self._jobs.append((future, job))
        return future

    def call(self, job: Callable[[], T], timeout_s: float) -> T:
        """Run ``job`` in the guest's thread and give its result, or raise what it raised.

        Raises NoAnswer after ``timeout_s``: a job that has not begun by then is never run. Not for the guest's own
        thread, which would wait for itself.
        """
        future = self.post(job)
        wait([future], timeout_s)
        if not future.done():
            if future.cancel():
                raise NoAnswer(f"the guest's watch was busy for {timeout_s:g} s; nothing was done")
            wait([future], timeout_s)  # it is being done: its result is worth as long a wait again
        if not future.done():
            raise NoAnswer(f"the guest's watch is at it for more than {timeout_s:g} s; it may still be done")
        return future.result()

    # -- the guest's thread --

    def serve(self, at_most: int = MAX_SERVED) -> int:
        """Run the jobs at hand, oldest first, and never wait for one; how many were run.

        What a job raises goes to the thread that asked, never to the guest's.
        """
        served = 0
        while served < at_most:
            with self._lock:
                if not self._jobs:
                    break
                future, job = self._jobs.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            served += 1
            try:
                result = job()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
        return served

    def close(self, why: str = "the watch of this guest has ended") -> None:
        """Serve no more: whoever waits or comes later is told ``why``. May be called twice."""
        with self._lock:
            self._closed = self._closed or why
            left, self._jobs = self._jobs, deque()
        for future, _ in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(GuestGone(self._closed))
