"""Text of the guest: ``_UNICODE_STRING`` and UTF-16. It is attacker input: bounded, and never trusted to be text.

Source: _UNICODE_STRING (ntdef.h): Length and MaximumLength in bytes, then, aligned to a pointer, Buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance.errors import Implausible
from appliance.guest.windows.space import AddressSpace

MAX_PATH: Final = 2048  # bytes of a path that we keep
MAX_COMMAND: Final = 8192  # bytes of a command line that we keep


class Wide(NamedTuple):
    """A ``_UNICODE_STRING``: where its text lies, and how many bytes it has."""

    buffer: int
    size: int


def parse_wide(raw: bytes, pointer_size: int) -> Wide:
    """A ``_UNICODE_STRING`` from its 16 (x86: 8) bytes. Raises Implausible."""
    size, room = int.from_bytes(raw[:2], "little"), int.from_bytes(raw[2:4], "little")
    if size > room or size & 1:
        raise Implausible(f"a string of {size} bytes in {room}")
    return Wide(int.from_bytes(raw[pointer_size : 2 * pointer_size], "little"), size)


def decode_wide(raw: bytes) -> str:
    """UTF-16 as text; what is no text, and NUL, becomes U+FFFD."""
    return raw[: len(raw) & -2].decode("utf-16-le", "replace").rstrip("\0").replace("\0", "\ufffd")


def wide_text(space: AddressSpace, va: int, limit: int) -> str:
    """The text of the ``_UNICODE_STRING`` at an address, at most ``limit`` bytes. Raises GuestError."""
    found = parse_wide(space.read(va, 2 * space.pointer_size), space.pointer_size)
    return decode_wide(space.read(found.buffer, min(found.size, limit))) if found.size else ""


def wide_texts(space: AddressSpace, vas: Sequence[int], limit: int) -> list[str | None]:
    """The text of many ``_UNICODE_STRING`` at once; None where one cannot be read."""
    strings: list[Wide | None] = []
    for raw in space.readv([(va, 2 * space.pointer_size) for va in vas]):
        try:
            strings.append(None if raw is None else parse_wide(raw, space.pointer_size))
        except Implausible:
            strings.append(None)
    wanted = [(each.buffer, min(each.size, limit)) for each in strings if each is not None and each.size]
    texts = iter(space.readv(wanted))
    found: list[str | None] = []
    for each in strings:
        text = None if each is None else next(texts) if each.size else b""
        found.append(None if text is None else decode_wide(text))
    return found


def file_name(path: str) -> str:
    """The last component of a path of Windows."""
    return path.replace("/", "\\").rstrip("\\").rsplit("\\", 1)[-1]
