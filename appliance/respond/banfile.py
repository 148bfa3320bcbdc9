"""The ban book on disk: one JSON file, replaced as a whole, so that bans outlive a restart and a crash."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from appliance.errors import ConfigError
from appliance.respond.bans import FOREVER, Ban

_VERSION = 1
_MAX_BYTES = 64 << 20


def write_bans(path: Path, bans: Iterable[Ban]) -> None:
    """Replace the file in one step. Raises ConfigError; the old content then stands."""
    body = {"version": _VERSION, "bans": [_to_json(ban) for ban in bans]}
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123 - mode from the start
            json.dump(body, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}; bans will be forgotten at the next start") from error


def read_bans(path: Path) -> tuple[list[Ban], list[str]]:
    """The bans written down, and what is wrong with the file (one line each). Never raises for its content.

    A file that is no ban book is set aside under another name: an appliance must start all the same. Raises ConfigError
    where the file exists and cannot be opened.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        body = json.loads(content)
        if body["version"] != _VERSION or not isinstance(body["bans"], list):
            raise ValueError(f"its version is {body['version']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        aside = path.with_name(f"{path.name}.broken")
        with contextlib.suppress(OSError):
            path.replace(aside)
        return [], [f"{path} is no ban book ({error}); it was set aside as {aside.name}, no ban of it stands"]
    bans, notes = [], []
    for number, entry in enumerate(body["bans"], 1):
        try:
            bans.append(_from_json(entry))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            notes.append(f"{path}: ban {number} cannot be read and does not stand: {error!r}")
    return bans, notes


def _to_json(ban: Ban) -> dict[str, Any]:
    return {
        "peer": str(ban.peer),
        "guest": ban.guest,
        "target": ban.target,
        "since_ns": ban.since_ns,
        "until_ns": None if ban.until_ns == FOREVER else ban.until_ns,
        "reason": ban.reason,
        "who": ban.who,
    }


def _from_json(entry: dict[str, Any]) -> Ban:
    until = entry["until_ns"]
    return Ban(
        ip_network(_text(entry["peer"]) or ""),
        _text(entry["guest"]),
        int(entry["since_ns"]),
        FOREVER if until is None else min(int(until), FOREVER),
        _text(entry["reason"]) or "",
        _text(entry["who"]) or "",
        _text(entry["target"]),
    )


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
