"""What a question that may take long was answered last: asked aside, so that whoever wants to know need not wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

MOMENT_S: Final = 0.05  # an answer that is there so soon is waited for


class Lately:
    """Asks in threads of its own, one at a time. What the question raises is no answer. Used by one thread."""

    def __init__(self, ask: Callable[[], bool], first: bool) -> None:
        """``first`` is told until there is an answer."""
        self._ask, self._answer = ask, first
        self._asking: threading.Thread | None = None

    def __call__(self) -> bool:
        """The last answer; ask again where nobody does."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=self._run, name="asking", daemon=True)
            self._asking.start()
        self._asking.join(MOMENT_S)
        return self._answer

    def _run(self) -> None:
        self._answer = self._ask()
