"""QEMU's options as words and dicts. Parses text only.

Sources: util/qemu-option.c (``a=b,c,,d``: a doubled comma stands for one), qemu-options.hx (-m), hw/core/machine.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

_NO_VALUE: Final = frozenset({"S", "nodefaults", "no-user-config", "snapshot", "daemonize", "enable-kvm", "nographic"})
# Their value may look like anything, a name like an option: QEMU takes the next word.
_VALUE: Final = frozenset(
    {"name", "uuid", "m", "machine", "M", "netdev", "nic", "net", "device", "object", "qmp", "chardev"}
)
_UNITS: Final = {"": 20, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50}
_DEFAULT_MEMORY: Final = 128 << 20  # hw/core/machine.c


def iter_options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values; ``--option`` is ``-option``."""
    at = 1
    while at < len(argv):
        word = argv[at]
        at += 1
        if not _is_option(word):
            continue
        key, value = word.lstrip("-"), ""
        if at < len(argv) and (key in _VALUE or (key not in _NO_VALUE and not _is_option(argv[at]))):
            value = argv[at]
            at += 1
        yield key, value


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def parse_properties(text: str, implied: str) -> dict[str, Any]:
    """``a,b=c`` or a JSON object to a dict; the first word without ``=`` is the value of ``implied``."""
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
    properties: dict[str, Any] = {}
    for index, word in enumerate(re.split(r"(?<!,),(?!,)", text)):
        key, equals, value = word.replace(",,", ",").partition("=")
        if not equals and index == 0:
            key, value = implied, key
        properties[key] = value if equals or index == 0 else "on"
    return properties


def merge_options(options: list[tuple[str, str]], keys: tuple[str, ...], implied: str) -> dict[str, Any]:
    """All uses of an option together: the last word wins."""
    merged: dict[str, Any] = {}
    for key, text in options:
        if key in keys:
            merged |= parse_properties(text, implied)
    return merged


def as_text(value: object) -> str | None:
    """A word or a number as text; None for what JSON holds besides."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None


def parse_size(text: str | None) -> int:
    """Memory size: a number of MiB, or one with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([bkmgtp]?)", (text or "").lower())
    return int(float(found[1]) * (1 << _UNITS[found[2]])) if found else _DEFAULT_MEMORY
