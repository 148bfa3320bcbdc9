"""Rows of Volatility's plugins as claims about a process. Pure; every value is checked, none is believed to be there.

A row of a listing plugin is a claim only where it says that something is odd. Sources: the columns of volatility3
2.28's windows.malware.* and linux.malware.* plugins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from appliance.model import Evidence

Row = dict[str, Any]
MAX_CLAIMS = 16  # of one plugin
MAX_TEXT = 200
SHOWN_BYTES = 16
_LAST = (1 << 64) - 1
_VOLUME = re.compile(r"(\\\?\?\\)?([a-z]:|\\device\\[^\\]+)(?=\\)")


def claims_of(plugin: str, rows: Iterable[object]) -> list[Evidence]:
    """What a plugin's rows say of the process it was asked about; ``kind`` is ``volatility:`` and its short name."""
    make = _CLAIMS.get(plugin)
    if make is None:
        return []
    found: list[Evidence] = []
    left_out = 0
    for row in rows:
        claim = make(row, f"volatility:{plugin.rpartition('.')[2]}") if isinstance(row, dict) else None
        if claim is None or claim in found:
            continue
        if len(found) < MAX_CLAIMS:
            found.append(claim)
        else:
            left_out += 1
    if left_out:
        text = f"Volatility's {plugin.rpartition('.')[2]} says {left_out} more of that kind"
        found.append(Evidence(text, found[0].kind))
    return found


def _number(row: Row, name: str) -> int:
    value = row.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST else 0


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _bytes(row: Row) -> str | None:
    start = _text(row, "Hexdump")[: 2 * SHOWN_BYTES]
    return f"begins with {start}" if start else None


def _windows_malfind(row: Row, kind: str) -> Evidence | None:
    start, last = _number(row, "Start VPN"), _number(row, "End VPN")
    protection, notes = _text(row, "Protection"), _text(row, "Notes")
    claim = f"Volatility's malfind: private memory is executable ({protection or 'protection unknown'})"
    if notes and notes != "N/A":
        claim += f"; {notes}"
    return Evidence(claim, kind, start, max(0, last + 1 - start), detail=_bytes(row), weight=1)


def _linux_malfind(row: Row, kind: str) -> Evidence | None:
    start, end = _number(row, "Start"), _number(row, "End")
    where = _text(row, "Path") or "no file"
    claim = f"Volatility's malfind: executable memory ({_text(row, 'Protection')}; {where}) that may be injected"
    return Evidence(claim, kind, start, max(0, end - start), detail=_bytes(row), weight=1)


def _ldrmodules(row: Row, kind: str) -> Evidence | None:
    lists = [row.get(name) for name in ("InLoad", "InInit", "InMem")]
    if any(lists) or any(one is None for one in lists):
        return None  # in one of them, or nobody knows; the program itself is never in InInit
    path = _text(row, "MappedPath") or "an image without a name"
    claim = f"Volatility's ldrmodules: {path} is mapped and in none of the loader's lists"
    return Evidence(claim, kind, _number(row, "Base"), weight=1)


def _threads(row: Row, kind: str) -> Evidence | None:
    note = _text(row, "Note")
    claim = f"Volatility's suspicious_threads: thread {_number(row, 'TID')}: {note}"
    return Evidence(claim, kind, _number(row, "Address"), detail=_text(row, "VAD Path") or None, weight=1)


def _hollow(row: Row, kind: str) -> Evidence | None:
    return Evidence(f"Volatility's hollowprocesses: {_text(row, 'Notes')}", kind, weight=1)


def _peb(row: Row, kind: str) -> Evidence | None:
    """It compares lengths only, and its two flags are mixed up in 2.28.2; the paths that it shows are compared here."""
    told, true = _text(row, "PEB_ImageFilePath"), _text(row, "EPROCESS_SeAudit_ImageFileName")
    if told and true and "~" not in told + true and _tail(told) != _tail(true):
        claim = f"Volatility's pebmasquerade: the process calls itself {told}, the kernel knows it as {true}"
        return Evidence(claim, kind, weight=1)
    if row.get("PEB_ImageFilePath_Spoofed") is True or row.get("PEB_CommandLine_Spoofed") is True:
        claim = "Volatility's pebmasquerade: path or command line in the process's PEB have other lengths than they say"
        return Evidence(claim, kind, detail=told or None, weight=1)
    return None


def _tail(path: str) -> str:
    """A path without its volume, which is a device to the kernel and a letter to the process."""
    return _VOLUME.sub("", path.lower().replace("\\systemroot\\", "\\windows\\"), count=1)


def _spoofing(row: Row, kind: str) -> Evidence | None:
    """Many honest programs rename themselves: context only, and only where both names differ from the file's."""
    if row.get("Comm_Spoofed") is not True or row.get("Cmdline_Spoofed") is not True:
        return None
    names = f"{_text(row, 'Comm')!r} and {_text(row, 'Cmdline_Basename')!r}, its file is {_text(row, 'Exe_Path')!r}"
    return Evidence(f"Volatility's process_spoofing: the process calls itself {names}", kind)


_CLAIMS: Final[dict[str, Callable[[Row, str], Evidence | None]]] = {
    "windows.malware.malfind": _windows_malfind,
    "windows.malware.ldrmodules": _ldrmodules,
    "windows.malware.suspicious_threads": _threads,
    "windows.malware.hollowprocesses": _hollow,
    "windows.malware.pebmasquerade": _peb,
    "linux.malware.malfind": _linux_malfind,
    "linux.malware.process_spoofing": _spoofing,
}
