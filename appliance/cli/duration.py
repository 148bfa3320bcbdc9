"""Lengths of time as a person writes them."""

from __future__ import annotations

import re

from appliance.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", re.ASCII)
_UNIT_S = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str | None, option: str = "--for") -> float | None:
    """Seconds in ``500ms``, ``30s``, ``5m``, ``1h``, ``7d`` or a bare number; None stays None. Raises UsageError."""
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r} is no duration: say 30s, 5m, 1h")
    return float(match[1]) * _UNIT_S[match[2]]


def duration_text(seconds: float | None) -> str:
    """``1 d 2 h``, ``5 m 3 s``, ``0.4 s``: the two units that matter; ``-`` for None."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {name}" if count else "")
    return " ".join(part for part in parts[:2] if part)
