"""Who a process runs as: ``_TOKEN.UserAndGroups[0]``, a SID, and its well-known name.

A name is told only where the SID alone proves it: a well-known one, or a service's or an application pool's, whose SID
is a hash of the name. Sources: _TOKEN, _SID_AND_ATTRIBUTES, _SID of ntkrnlmp.pdb; MS-DTYP 2.4.2 and 2.4.2.4
(well-known SIDs); LookupAccountSid's spelling; service SIDs: SHA-1 of the upper-case name (sc.exe showsid),
application pools: of the lower-case one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from appliance.errors import Implausible
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.record import Record

MAX_SUBAUTHORITIES: Final = 15  # winnt.h: SID_MAX_SUB_AUTHORITIES
MAX_SID: Final = 8 + 4 * MAX_SUBAUTHORITIES
MAX_SESSION: Final = 1 << 24
WELL_KNOWN: Final = {
    "S-1-0-0": "NULL SID",
    "S-1-1-0": "Everyone",
    "S-1-5-7": "NT AUTHORITY\\ANONYMOUS LOGON",
    "S-1-5-11": "NT AUTHORITY\\Authenticated Users",
    "S-1-5-17": "NT AUTHORITY\\IUSR",
    "S-1-5-18": "NT AUTHORITY\\SYSTEM",
    "S-1-5-19": "NT AUTHORITY\\LOCAL SERVICE",
    "S-1-5-20": "NT AUTHORITY\\NETWORK SERVICE",
    "S-1-5-32-544": "BUILTIN\\Administrators",
    "S-1-5-32-545": "BUILTIN\\Users",
    "S-1-5-32-546": "BUILTIN\\Guests",
    "S-1-5-32-547": "BUILTIN\\Power Users",
    "S-1-5-32-551": "BUILTIN\\Backup Operators",
    "S-1-5-32-555": "BUILTIN\\Remote Desktop Users",
    "S-1-5-32-568": "BUILTIN\\IIS_IUSRS",
}
SERVICES: Final = "S-1-5-80-"
POOLS: Final = "S-1-5-82-"
NUMBERED: Final = {"S-1-5-90-0-": "Window Manager\\DWM-", "S-1-5-96-0-": "Font Driver Host\\UMFD-"}
KNOWN_SERVICES: Final = ("TrustedInstaller", "MSSQLSERVER", "SQLSERVERAGENT", "W3SVC", "WdiServiceHost", "vmms")


class Token(NamedTuple):
    """What one access token says."""

    sid: str
    session: int | None


class Tokens:
    """Reads access tokens of one guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel = kernel
        known = kernel.types.has("_TOKEN.UserAndGroups")
        self._record = Record(kernel.types, "_TOKEN", ("UserAndGroups", "SessionId?")) if known else None
        self._has_session = kernel.types.has("_TOKEN.SessionId")
        self._flags = 15 if kernel.pointer_size == 8 else 7  # _EX_FAST_REF.RefCnt

    def pointer(self, fast_ref: int) -> int:
        """Where the token is that an ``_EX_FAST_REF`` names."""
        return fast_ref & ~self._flags

    def read(self, fast_refs: Sequence[int]) -> list[Token | None]:
        """Read tokens, one batch for each pointer on the way; None: unreadable, none, or unknown to the types."""
        space, kernel = self._kernel.space, self._kernel
        if self._record is None:
            return [None] * len(fast_refs)
        tokens = [self.pointer(each) for each in fast_refs]
        raws = space.readv([self._record.span(va) for va in tokens])
        found = [self._record.parse(raw) if raw is not None else (0, 0) for raw in raws]
        # _SID_AND_ATTRIBUTES[0].Sid is its first member.
        firsts = space.readv([(groups, kernel.pointer_size) for groups, _ in found])
        sids = [int.from_bytes(raw or b"", "little") for raw in firsts]
        heads = space.readv([(sid, 8) if kernel.is_kernel(sid) else (0, 8) for sid in sids])
        sizes = [8 + 4 * min(head[1], MAX_SUBAUTHORITIES) if head is not None else 8 for head in heads]
        texts = space.readv(
            [(sid, size) if kernel.is_kernel(sid) else (0, 8) for sid, size in zip(sids, sizes, strict=True)]
        )
        result: list[Token | None] = []
        for raw, (_, session) in zip(texts, found, strict=True):
            try:
                sid = parse_sid(raw or b"")
            except Implausible:
                result.append(None)
                continue
            result.append(Token(sid, session if self._has_session and session < MAX_SESSION else None))
        return result


def parse_sid(raw: bytes) -> str:
    """A ``_SID`` as text, S-1-5-18. Raises Implausible."""
    if len(raw) < 8 or raw[0] != 1 or not 0 < raw[1] <= MAX_SUBAUTHORITIES or len(raw) < 8 + 4 * raw[1]:
        raise Implausible("what should be a security identifier is none")
    authority = int.from_bytes(raw[2:8], "big")
    return "-".join(["S-1", str(authority), *map(str, struct.unpack_from(f"<{raw[1]}I", raw, 8))])


def well_known_name(sid: str, candidates: Iterable[str] = ()) -> str | None:
    """The name that a SID proves by itself; ``candidates`` are names of services and pools that it may be made of."""
    if sid in WELL_KNOWN:
        return WELL_KNOWN[sid]
    for prefix, name in NUMBERED.items():
        if sid.startswith(prefix) and sid[len(prefix) :].isdecimal():
            return name + sid[len(prefix) :]
    if sid.startswith(SERVICES):
        names = (*KNOWN_SERVICES, *candidates)
        return next((f"NT SERVICE\\{name}" for name in names if service_sid(name) == sid), None)
    if sid.startswith(POOLS):
        names = ("DefaultAppPool", *candidates)
        return next((f"IIS APPPOOL\\{name}" for name in names if pool_sid(name) == sid), None)
    return None


def is_account(sid: str) -> bool:
    """Whether a SID is a person's or a machine's account, whose name only its domain knows."""
    return sid.startswith(("S-1-5-21-", "S-1-12-1-"))


def service_sid(name: str) -> str:
    """The SID of a service by its name."""
    return SERVICES + _hash(name.upper())


def pool_sid(name: str) -> str:
    """The SID of an application pool by its name."""
    return POOLS + _hash(name.lower())


def _hash(name: str) -> str:
    digest = hashlib.sha1(name.encode("utf-16-le", "replace"), usedforsecurity=False).digest()
    return "-".join(map(str, struct.unpack("<5I", digest)))
