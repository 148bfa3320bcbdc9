"""Remembers symbol tables in their compact form, so that the next attach to the same build reads no JSON.

A file is named after the PDB, its GUID and its age, and remembers the SHA-256 of what it was made from. A folder or
file that others may write is not used: whoever writes a table decides which bytes of a guest are believed.
Layout: magic, SHA-256 of the rest, length of the JSON head, head, types, symbols (see `isf.Compact`).
Sources: XDG Base Directory Specification.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

from appliance.guest.windows.isf import Compact, PdbId, SymbolTable

MAGIC = b"parasight symbols 1\n"
MAX_FILES = 64
MAX_SIZE = 64 << 20


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/parasight/symbols``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "parasight" / "symbols"


def load(folder: Path, pdb: PdbId) -> tuple[SymbolTable, str] | None:
    """A remembered table and the hash of its source; None where there is no sound one."""
    try:
        if not _is_ours(folder.stat()):
            return None
        with (folder / _name(pdb)).open("rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            data = file.read(MAX_SIZE)
    except OSError:
        return None
    start = len(MAGIC) + 32
    if not data.startswith(MAGIC) or hashlib.sha256(memoryview(data)[start:]).digest() != data[len(MAGIC) : start]:
        return None
    try:
        middle = start + 4 + int.from_bytes(data[start : start + 4], "little")
        head = json.loads(data[start + 4 : middle])
        end = middle + int(head["types"])
        content = Compact(data[middle:end], data[end:])
        return SymbolTable(pdb, content, int(head["pointer_size"])), str(head["source"])
    except (ValueError, KeyError, TypeError):
        return None  # written by another version


def save(folder: Path, table: SymbolTable, source: str) -> None:
    """Remember a table; the oldest beyond `MAX_FILES` go. Silently does nothing where the folder cannot be used."""
    head = {"types": len(table.content.types), "pointer_size": table.pointer_size, "source": source}
    text = json.dumps(head).encode()
    body = len(text).to_bytes(4, "little") + text + table.content.types + table.content.symbols
    if len(body) > MAX_SIZE - 64:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder.stat()):
            return
        with tempfile.NamedTemporaryFile(dir=folder, prefix="new-", delete=False) as file:
            file.write(MAGIC + hashlib.sha256(body).digest() + body)
        Path(file.name).rename(folder / _name(table.pdb))
        others = [path for path in folder.iterdir() if not path.name.startswith("new-")]
        for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-MAX_FILES]:
            path.unlink(missing_ok=True)
    except OSError:
        return  # a full or read-only disk costs the next attach some time, nothing else


def _name(pdb: PdbId) -> str:
    return f"{pdb.name}.{pdb.guid}-{pdb.age}"


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
