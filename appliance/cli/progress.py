"""What goes to stderr: lines for a person, and a sign of life for anything longer than a second."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

QUIET_S = 1.0  # nothing is said about work that takes less


def tell(line: str) -> None:
    """Print one line to stderr, if somebody reads it: a watch must not end because a log was restarted.

    A guest's text may be in it: what would steer a terminal is escaped.
    """
    clean = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in line)
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: started without a stderr
        sys.stderr.write(f"{clean}\n")  # at once: guests' threads say things, too
        sys.stderr.flush()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say what is going on if it takes longer than a second."""
    timer = threading.Timer(QUIET_S, lambda: tell(f"{what} ..."))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
