"""Tokens and SIDs: who a process runs as."""

from __future__ import annotations

import struct

from tests.worlds.windows.boot import Kernel

SYSTEM_SID = "S-1-5-18"
ADMINISTRATORS, EVERYONE = "S-1-5-32-544", "S-1-1-0"


def token(kernel: Kernel, sid: str, session: int) -> int:
    """A _TOKEN of one user; its address."""
    types = kernel.types
    sids = (sid, ADMINISTRATORS, EVERYONE)
    blobs = [pack_sid(each) for each in sids]
    array = kernel.paged.take(b"SeSd", 16 * len(sids) + sum(map(len, blobs)))
    at = array + 16 * len(sids)
    for number, blob in enumerate(blobs):
        kernel.space.write(array + 16 * number, struct.pack("<QI", at, 7 if number else 0))
        kernel.space.write(at, blob)
        at += len(blob)
    values = {
        "SessionId": session,
        "UserAndGroupCount": len(sids),
        "UserAndGroups": array,
        "TokenType": 1,
        "Privileges.Present": 0x1E_7330_0800,
        "Privileges.Enabled": 0x80_0000,
    }
    return kernel.object("Token", b"Toke", types.pack("_TOKEN", values), pool=kernel.paged)


def pack_sid(text: str) -> bytes:
    """``S-1-5-18`` as the kernel keeps it: the authority big-endian, the rest little-endian."""
    _, revision, authority, *rest = text.split("-")
    head = struct.pack("<BB", int(revision), len(rest)) + int(authority).to_bytes(6, "big")
    return head + b"".join(struct.pack("<I", int(part)) for part in rest)
