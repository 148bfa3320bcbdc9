"""Where the symbols of a Windows build come from: our cache, folders, the fleet's share, and a person with a browser.

All hold ``windows/PDB/GUID-AGE.json`` (or ``.json.xz``), as volatility3 does; a folder may also be that ``windows``
itself. Nothing is ever fetched from Microsoft by us: where a table is lacking, the error is the command that gets it on
a host which may go online. What the guest says about its symbols becomes part of a path only after it was checked.
Sources: volatility3's ``pdbconv`` (flags -p, -g, -o); symbol server names: PDB/GUID + age in hexadecimal.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

from appliance.errors import Implausible, UnsupportedGuest
from appliance.guest.windows import cache
from appliance.guest.windows.isf import MAX_JSON, PdbId, SymbolTable, parse_isf

FOLDERS, SHARE = "PARASIGHT_SYMBOLS", "PARASIGHT_SYMBOL_SHARE"  # environment
MAX_FILE = 64 << 20  # compressed, or of a share
TIMEOUT_S = 5.0
RETRY_S = 60.0  # a share is asked again for what it lacked
_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]{0,59}\.pdb")
_GUID = re.compile(r"[0-9A-F]{32}")
_MAX_AGE = 0xFFFF
_SUFFIXES = (".json.xz", ".json")


class SymbolStore:
    """Finds symbol tables: in the cache, in ``dirs``, on the share (a path or http(s) URL). One per thread."""

    def __init__(
        self,
        dirs: Sequence[Path] = (),
        cache_dir: Path | None = None,
        share: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dirs, self.cache_dir, self.share = tuple(dirs), cache_dir, share
        self._clock = clock
        self._lacks: dict[PdbId, float] = {}  # what the share did not have, and when it was asked

    @classmethod
    def default(cls, dirs: Sequence[Path] = (), *, use_cache: bool = True) -> SymbolStore:
        """The store as options and environment describe it; ``dirs`` come first."""
        named = [Path(text) for text in os.environ.get(FOLDERS, "").split(os.pathsep) if text]
        folder = cache.default_folder() if use_cache else None
        return cls((*dirs, *named, default_folder()), folder, os.environ.get(SHARE) or None)

    def find(self, pdb: PdbId) -> SymbolTable:
        """The table of one build of one binary. Raises UnsupportedGuest with the command that gets it."""
        pdb = PdbId(pdb.name.lower(), pdb.guid.upper(), pdb.age)
        if not _NAME.fullmatch(pdb.name) or not _GUID.fullmatch(pdb.guid) or not 0 <= pdb.age <= _MAX_AGE:
            raise UnsupportedGuest(("its image names symbols that cannot be: " + repr(str(pdb))[:120],))
        troubles: list[str] = []
        known = cache.load(self.cache_dir, pdb) if self.cache_dir else None
        for path in self._files(pdb):
            try:
                raw = path.read_bytes() if path.stat().st_size <= MAX_FILE else b""
            except OSError as error:
                troubles.append(f"{path} cannot be read ({error.strerror})")
                continue
            source = hashlib.sha256(raw).hexdigest()
            if known and known[1] == source:
                return known[0]
            try:
                return self._take(raw, pdb, source)
            except Implausible as error:
                troubles.append(f"{path} cannot be used ({error})")
        if known:
            return known[0]
        fetched = self._fetch(pdb, troubles)
        if fetched:
            try:
                return self._take(fetched, pdb, hashlib.sha256(fetched).hexdigest())
            except Implausible as error:
                troubles.append(f"what {self.share} has cannot be used ({error})")
        raise UnsupportedGuest((self.how_to_get(pdb), *troubles))

    def how_to_get(self, pdb: PdbId) -> str:
        """What to type where, to have this table next time."""
        folder = self.dirs[0] if self.dirs else default_folder()
        place = f"{folder}/windows/{pdb.name}"
        return (
            f"no symbols for {pdb}; on a host with internet access and volatility3 run: "
            f"python3 -m volatility3.framework.symbols.windows.pdbconv -p {pdb.name} -g {pdb.guid}{pdb.age:X} "
            f"-o {pdb.guid}-{pdb.age}.json.xz; put that file into {place}/ (or any folder given by --symbols "
            f"or {FOLDERS}, below windows/{pdb.name}/)"
        )

    def _files(self, pdb: PdbId) -> Iterator[Path]:
        for folder in self.dirs:
            for place in (folder / "windows" / pdb.name, folder / pdb.name):
                yield from _named(place, pdb)

    def _take(self, raw: bytes, pdb: PdbId, source: str) -> SymbolTable:
        """Parse a file, see that it is the one that was asked for, and remember it."""
        table = parse_isf(_unpack(raw))
        if table.pdb.guid and (table.pdb.guid, table.pdb.age) != (pdb.guid, pdb.age):
            raise Implausible(f"it holds the symbols of {table.pdb}")
        table.pdb = pdb
        if self.cache_dir:
            cache.save(self.cache_dir, table, source)
        return table

    def _fetch(self, pdb: PdbId, troubles: list[str]) -> bytes | None:
        if not self.share:
            return None
        now = self._clock()
        if now < self._lacks.get(pdb, -RETRY_S) + RETRY_S:
            return None
        for suffix in _SUFFIXES:
            where = f"windows/{pdb.name}/{pdb.guid}-{pdb.age}{suffix}"
            try:
                raw = _read_share(self.share, where)
            except (OSError, ValueError, HTTPException) as error:
                troubles.append(f"{self.share} cannot be asked ({error})")
                break
            if raw:
                return raw
        if len(self._lacks) > 1024:
            self._lacks.clear()
        self._lacks[pdb] = now
        return None


def default_folder() -> Path:
    """``$XDG_DATA_HOME/parasight/symbols``: where a person may put tables for good."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/share") / "parasight" / "symbols"


def _named(place: Path, pdb: PdbId) -> Iterator[Path]:
    """The files of one table in a folder, whatever the case of the GUID's letters."""
    wanted = [f"{pdb.guid}-{pdb.age}{suffix}".lower() for suffix in _SUFFIXES]
    try:
        found = {entry.name.lower(): entry for entry in place.iterdir()}
    except OSError:
        return
    yield from (found[name] for name in wanted if name in found)


def _unpack(raw: bytes) -> bytes:
    if not raw.startswith(b"\xfd7zXZ\0"):
        return raw
    try:
        data = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=256 << 20).decompress(raw, MAX_JSON + 1)
    except lzma.LZMAError as error:
        raise Implausible(f"it is damaged: {error}") from None
    return data


def _read_share(share: str, where: str) -> bytes | None:
    """A file of the share, None where it has none. Raises OSError, ValueError, HTTPException."""
    if not re.match(r"https?://", share):
        path = Path(share.removeprefix("file://")) / where
        return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_FILE else None
    try:
        with _opener().open(f"{share.rstrip('/')}/{where}", timeout=TIMEOUT_S) as answer:
            raw = answer.read(MAX_FILE + 1)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (403, 404, 410):
            return None
        raise
    if len(raw) > MAX_FILE:
        raise ValueError("its answer is too large")
    return bytes(raw)


def _opener() -> urllib.request.OpenerDirector:
    """Only http and https, whatever a redirect says."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
