"""Calls that may hang, made by a thread of their own, so that whoever asks waits for a bounded time only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from appliance.errors import HostError

_T = TypeVar("_T")


class Worker:
    """Runs one thing at a time in a thread of its own. What takes too long is left to end when it can."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._late = self._ended = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], _T], seconds: float) -> _T:
        """The result of ``work``, or what it raised. Raises TimeoutError: at once while a call before is still out."""
        if self._ended:
            raise HostError("it was closed")
        if self._late:
            try:
                self._results.get_nowait()
            except Empty:
                raise TimeoutError from None
            self._late = False
        self._work.put(work)
        try:
            result, error = self._results.get(timeout=seconds)
        except Empty:
            self._late = True
            raise TimeoutError from None
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def end(self, last: Callable[[], None]) -> None:
        """Have the thread do one last thing and end; wait for that unless it hangs. May be called twice."""
        if not self._ended:
            self._ended = True
            self._work.put(last)
            self._work.put(None)
        if not self._late:
            self._thread.join(1.0)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            result: tuple[Any, BaseException | None]
            try:
                self._results.put((work(), None))
            except BaseException as error:
                self._results.put((None, error))
