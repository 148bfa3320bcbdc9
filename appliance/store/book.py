"""Verdicts on disk, so that ``explain ID`` can tell later what was seen. Bounded: the oldest rows go first.

One row is the JSON object that ``watch`` printed. Guest text inside it is attacker input and stays data.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.errors import ConfigError

MAX_ROWS = 200_000  # about 200 MB at 1 kB a row
_COMMIT_EVERY = 64
_TRIM_EVERY = 4096
_SCHEMA = "CREATE TABLE IF NOT EXISTS verdict (id TEXT PRIMARY KEY, at_ns INTEGER NOT NULL, body TEXT NOT NULL)"


def default_path() -> Path:
    """``$PARASIGHT_STATE``, ``/var/lib/parasight`` for root, else the user's XDG state folder."""
    if folder := os.environ.get("PARASIGHT_STATE"):
        return Path(folder) / "book.sqlite"
    if os.geteuid() == 0:
        return Path("/var/lib/parasight/book.sqlite")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "parasight" / "book.sqlite"


class Book:
    """Append and look up verdicts. Belongs to one thread; raises ConfigError where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path, self._uncommitted, self._written = path, 0, _TRIM_EVERY
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._db = sqlite3.connect(path, timeout=5.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_SCHEMA)
            self._db.execute("CREATE INDEX IF NOT EXISTS verdict_at ON verdict (at_ns)")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot use {path}: {error}; set PARASIGHT_STATE to a folder you may write") from error

    def write(self, verdict_id: str, at_ns: int, body: dict[str, Any]) -> None:
        """Append one verdict; the same id again replaces it (a replay of the same capture).

        Raises ConfigError. What another process is writing at the same time is waited for, at most five seconds.
        """
        row = (verdict_id, at_ns, json.dumps(body, separators=(",", ":")))
        with self._explained():
            self._db.execute("INSERT OR REPLACE INTO verdict VALUES (?, ?, ?)", row)
            self._uncommitted += 1
            self._written += 1
        if self._uncommitted >= _COMMIT_EVERY:
            self.commit()

    def find(self, prefix: str) -> list[dict[str, Any]]:
        """Verdicts whose id begins with ``prefix``, newest first, at most two (one is an answer, two an ambiguity)."""
        query = "SELECT body FROM verdict WHERE substr(id, 1, ?) = ? ORDER BY at_ns DESC LIMIT 2"
        with self._explained():
            return [json.loads(body) for (body,) in self._db.execute(query, (len(prefix), prefix))]

    def read_since(self, at_ns: int) -> Iterator[dict[str, Any]]:
        """Every verdict since a time (nanoseconds since the Unix epoch), oldest first."""
        with self._explained():
            for (body,) in self._db.execute("SELECT body FROM verdict WHERE at_ns >= ? ORDER BY at_ns", (at_ns,)):
                yield json.loads(body)

    def commit(self) -> None:
        """Make what was written readable by others, and let the oldest rows go now and then."""
        if not self._uncommitted:
            return
        with self._explained():
            if self._written >= _TRIM_EVERY:
                self._written = 0
                (rows,) = self._db.execute("SELECT count(*) FROM verdict").fetchone()
                oldest = "DELETE FROM verdict WHERE id IN (SELECT id FROM verdict ORDER BY at_ns LIMIT ?)"
                self._db.execute(oldest, (max(0, rows - MAX_ROWS),))
            self._db.commit()
            self._uncommitted = 0

    def close(self) -> None:
        """Commit and let go."""
        try:
            self.commit()
        finally:
            self._db.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise ConfigError(f"cannot use {self._path}: {error}") from error
