"""Calls that may hang, made by a thread of their own, so that whoever asks waits for a bounded time only."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from appliance.errors import HostError

_T = TypeVar("_T")


class _Job:
    """One call, and what came of it: nobody else can take it for the answer to another call."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.done = work, Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Worker:
    """Runs one thing at a time in a thread of its own. What takes too long is left to end when it can.

    Several threads may ask: each waits for its turn, and no longer than it would for its answer.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._turn = Lock()
        self._last: _Job | None = None
        self._ended = False
        self._thread = Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether its thread is there; behind `end` that means that it hangs."""
        return self._thread.is_alive()

    def run(self, work: Callable[[], _T], seconds: float) -> _T:
        """The result of ``work``, or what it raised. Raises TimeoutError: at once while a call before is still out."""
        end_s = time.monotonic() + seconds
        if not self._turn.acquire(timeout=seconds):
            raise TimeoutError
        try:
            if self._ended:
                raise HostError("it was closed")
            if self._last is not None and not self._last.done.is_set():
                raise TimeoutError
            job = self._last = _Job(work)
            self._jobs.put(job)
            if not job.done.wait(max(0.0, end_s - time.monotonic())):
                raise TimeoutError
        finally:
            self._turn.release()
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[no-any-return]

    def end(self, last: Callable[[], None]) -> None:
        """Have the thread do one last thing and end; wait for that unless it hangs. May be called twice."""
        hangs = self._last is not None and not self._last.done.is_set()
        if not self._ended:
            self._ended = True
            self._jobs.put(_Job(last))
            self._jobs.put(None)
        if not hangs:
            self._thread.join(1.0)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.work()
            except BaseException as error:
                job.error = error
            job.done.set()
