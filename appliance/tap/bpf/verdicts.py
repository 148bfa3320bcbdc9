"""The exceptions that the kernel program looks up: verdicts on single flows, and banned peers.

User space is the only writer. An entry names the kernel's number of its flow, so it never touches another flow of the
same tuple; while there is none, the kernel is spared the look-up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from itertools import islice
from struct import pack
from typing import Final

from appliance.errors import HostError
from appliance.tap.bpf import layout
from appliance.tap.bpf.heart import Heart
from appliance.tap.bpf.layout import SECOND_NS
from appliance.tap.bpf.syscalls import Map
from appliance.tap.bpf.talk import Talk

MAX_TIDIED: Final = 2048  # at some microseconds each
_NO_MAC: Final = bytes(6)


class Verdicts:
    """Verdicts and bans of one tap."""

    def __init__(self, maps: Mapping[str, Map], heart: Heart) -> None:
        self._maps, self._verdicts, self._heart = maps, maps["verdicts"], heart
        self._entries: dict[bytes, tuple[int, int]] = {}  # key of a verdict: the flow's number, action
        self._bans: dict[tuple[str, bytes], int] = {}  # and their deadlines, 0: none

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_bans(self) -> bool:
        """Whether a flow may need a verdict of its own to pass."""
        return bool(self._bans)

    def put(
        self,
        talk: Talk,
        action: int,
        seconds: float | None = None,
        *,
        otherwise: int = layout.NOTHING,
        ifindex: int = 0,
        mac: bytes = _NO_MAC,
    ) -> bool:
        """Decide on a flow; ``otherwise`` after ``seconds``. False: there is no room for another verdict."""
        value = layout.VERDICT.pack(action, ifindex, _deadline(seconds), talk.number, mac, otherwise)
        try:
            self._verdicts.update(talk.key, value)
        except OSError:  # E2BIG
            return False
        self._entries[talk.key] = (talk.number, action)
        self._set_flags()
        return True

    def lift(self, talk: Talk) -> None:
        """No verdict on this flow any more."""
        entry = self._entries.get(talk.key)
        if entry is not None and entry[0] == talk.number:
            self._forget(talk.key)

    def lift_passing(self, talk: Talk) -> None:
        """The kernel lets this flow pass: that needs no verdict, unless its peer may be banned."""
        if self._entries.get(talk.key) == (talk.number, layout.ALLOW) and not self._bans:
            self._forget(talk.key)

    def ban(self, peer: IPv4Network | IPv6Network, seconds: float | None) -> None:
        """Drop what comes from or goes to these addresses. Raises HostError when there is no room for another ban."""
        name, key = _peer_key(peer)
        deadline_ns = _deadline(seconds)
        try:
            self._maps[name].update(key, layout.VERDICT.pack(layout.DROP, 0, deadline_ns, 0, _NO_MAC, layout.NOTHING))
        except OSError as error:
            raise HostError(f"cannot ban {peer}: {error.strerror}; {len(self._bans)} bans are in force") from error
        self._bans[name, key] = deadline_ns
        self._set_flags()

    def unban(self, peer: IPv4Network | IPv6Network) -> bool:
        """Lift a ban; whether there was one."""
        name, key = _peer_key(peer)
        self._bans.pop((name, key), None)
        done = self._maps[name].delete(key)
        self._set_flags()
        return done

    def tidy(self) -> None:
        """Remove verdicts on flows that the kernel has forgotten, and bans that are over.

        Some each time, in turn: a guest that is denied often fills the map, and must not hold us up by that.
        """
        flows = self._maps["flows"]
        for key in list(islice(self._entries, MAX_TIDIED)):
            number, _ = entry = self._entries.pop(key)
            self._entries[key] = entry  # the last one now
            value = flows.lookup(key)
            if value is None or int.from_bytes(value[:8], "little") != number:
                self._forget(key)
        now_ns = time.monotonic_ns()
        for (name, key), deadline_ns in list(self._bans.items()):
            if deadline_ns and deadline_ns < now_ns:
                self._maps[name].delete(key)
                del self._bans[name, key]
        self._set_flags()

    def _forget(self, key: bytes) -> None:
        del self._entries[key]
        self._verdicts.delete(key)
        self._set_flags()

    def _set_flags(self) -> None:
        flags = (layout.HAS_VERDICTS if self._entries else 0) | (layout.HAS_BANS if self._bans else 0)
        self._heart.set(layout.HAS_VERDICTS | layout.HAS_BANS, flags)


def _deadline(seconds: float | None) -> int:
    return 0 if seconds is None else time.monotonic_ns() + int(seconds * SECOND_NS)


def _peer_key(peer: IPv4Network | IPv6Network) -> tuple[str, bytes]:
    name = "peers4" if peer.version == 4 else "peers6"
    return name, pack("=II", 32 + peer.prefixlen, 0) + peer.network_address.packed
