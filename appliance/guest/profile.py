"""Remembers what attaching to a kernel build found, so that the next attach to the same build need not search.

A profile holds places and indices, never content: symbols and types are read from the guest again, and a profile whose
places do not hold what they should is dropped. Files are keyed by build id and by where the build id's note lies in the
image, so one batched read of the guest tells which file fits. Layout: magic, SHA-256 of the rest, length of the JSON
head, head, starts of the types, types by name, order of the symbols.
A folder or file that others may write is not used: whoever writes a profile decides which bytes are believed.
Sources: include/linux/elfnote.h, kernel/notes (the GNU build id note), XDG Base Directory Specification.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

from appliance.guest.kallsyms import Places
from appliance.guest.kernel import Image
from appliance.guest.layout import Index
from appliance.ports import GuestMemory

MAGIC = b"parasight profile 2\n"
MAX_FILES = 64
MAX_SIZE = 32 << 20
NOTE = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"
_NAME = re.compile(r"([0-9a-f]{40})\.([0-9a-f]{1,8})")


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kernel build looks like. Places are offsets into its read-only data, ``note_at`` into its image."""

    release: str
    build_id: str
    note_at: int
    rodata_at: int
    rodata_size: int
    symbols: Places
    types_at: int
    types_size: int
    types_crc: int
    index: Index
    order: bytes | None  # the symbols in order of their names, where the kernel itself does not list them

    def matches(self, blob: bytes) -> bool:
        """Whether the index was made from these types."""
        return zlib.crc32(blob) == self.types_crc


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/parasight/profiles``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "parasight" / "profiles"


def load(folder: Path, memory: GuestMemory, image: Image) -> Profile | None:
    """The profile of the build in this image, if there is a sound one."""
    if not _is_private(folder):
        return None
    names = [found for path in sorted(folder.iterdir())[: 4 * MAX_FILES] if (found := _NAME.fullmatch(path.name))]
    notes = memory.readv([(image.gpa + int(name[2], 16), len(NOTE) + 20) for name in names])
    for name, note in zip(names, notes, strict=True):
        if note == NOTE + bytes.fromhex(name[1]):
            return _parse(folder / name[0])
    return None


def save(folder: Path, profile: Profile) -> None:
    """Write a profile; the oldest ones beyond `MAX_FILES` go. Silently does nothing where the folder cannot be used."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            return
        with tempfile.NamedTemporaryFile(dir=folder, prefix="new-", delete=False) as file:
            file.write(_serialise(profile))
        Path(file.name).rename(folder / f"{profile.build_id}.{profile.note_at:x}")
        others = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-MAX_FILES]:
            path.unlink(missing_ok=True)
    except OSError:
        return  # a full or read-only disk costs the next attach some time, nothing else


def _serialise(profile: Profile) -> bytes:
    head = {name: getattr(profile, name) for name in _PLAIN}
    head["symbols"] = list(profile.symbols)
    head["types"], head["named"] = len(profile.index.starts), len(profile.index.named)
    head["order"] = len(profile.order or b"")
    text = json.dumps(head).encode()
    body = len(text).to_bytes(4, "little") + text
    body += profile.index.starts.tobytes() + profile.index.named.tobytes() + (profile.order or b"")
    return MAGIC + hashlib.sha256(body).digest() + body


_PLAIN = ("release", "build_id", "note_at", "rodata_at", "rodata_size", "types_at", "types_size", "types_crc")


def _parse(path: Path) -> Profile | None:
    """Read one file back; None unless it is whole and ours."""
    try:
        with path.open("rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            data = file.read(MAX_SIZE)
    except OSError:
        return None
    start = len(MAGIC) + 32
    if not data.startswith(MAGIC) or hashlib.sha256(data[start:]).digest() != data[len(MAGIC) : start]:
        return None
    try:
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        head = json.loads(data[start + 4 : end])
        middle = end + 4 * int(head["types"])
        last = middle + 4 * int(head["named"])
        starts, named, rest = array("I", data[end:middle]), array("I", data[middle:last]), data[last:]
        if len(rest) != int(head["order"]):
            return None
        plain = {name: head[name] for name in _PLAIN}
        return Profile(symbols=Places(*head["symbols"]), index=Index(starts, named), order=rest or None, **plain)
    except (ValueError, KeyError, TypeError):
        return None  # written by another version


def _is_private(folder: Path) -> bool:
    try:
        return folder.is_dir() and _is_ours(folder.stat())
    except OSError:
        return False


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
