"""The ban book: which peers are banned, for which guests, until when. Pure: the time comes with each call.

In the kernel the longest prefix that matches decides alone (BPF_MAP_TYPE_LPM_TRIE), so a short ban inside a wider one
that lasts longer would end both for that address. The book therefore tells for each entry the time until which *any*
ban covers the whole of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from appliance.errors import UsageError
from appliance.model import IpNetwork

FOREVER: Final = 2**63 - 1  # ``until_ns`` of a ban that stands until it is lifted
MAX_BANS: Final = 16_384  # for each IP version: what the kernel's map holds

_Prefix = tuple[int, int, int]  # IP version, prefix length, the leading bits


@dataclass(frozen=True, slots=True)
class Ban:
    """One ban. ``guest`` is the identity of the guest it is for (never a name that is reused), None: all guests."""

    peer: IpNetwork
    guest: str | None
    since_ns: int
    until_ns: int = FOREVER
    reason: str = ""
    who: str = ""
    target: str | None = None  # how the guest was named when it was made; for people


@dataclass(frozen=True, slots=True)
class Spared:
    """Addresses that are never banned, and why."""

    network: IpNetwork
    why: str


class BanRefused(UsageError):
    """The ban would do harm, or there is no room for it; the text says why."""


class BanBook:
    """Bans by guest and peer. One ban per guest and peer: a new one replaces the old."""

    def __init__(self, spared: Iterable[Spared] = (), limit: int = MAX_BANS) -> None:
        self._spared, self._limit = tuple(spared), limit
        self._bans: dict[str | None, dict[_Prefix, Ban]] = {}
        self._lengths: dict[str | None, Counter[tuple[int, int]]] = {}  # how many bans of (version, prefix length)
        self._sizes: Counter[int] = Counter()
        self._next_ns = FOREVER  # no ban ends before

    def __iter__(self) -> Iterator[Ban]:
        for bans in self._bans.values():
            yield from bans.values()

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def count(self, guest: str | None) -> int:
        """Bans that apply to one guest: its own, and those for all."""
        return sum(len(self._bans.get(scope, ())) for scope in {guest, None})

    # -- changes --

    def add(self, ban: Ban) -> Ban | None:
        """Write one ban down; the ban that it replaces. Raises BanRefused."""
        for spared in self._spared:
            if spared.network.version == ban.peer.version and spared.network.overlaps(ban.peer):
                raise BanRefused(f"{ban.peer} is not banned: {spared.network} is on the never-ban list ({spared.why})")
        key = _prefix(ban.peer)
        bans = self._bans.setdefault(ban.guest, {})
        old = bans.get(key)
        if old is None:
            if self._sizes[ban.peer.version] >= self._limit:
                raise BanRefused(
                    f"{ban.peer} is not banned: there are {self._limit} bans of IPv{ban.peer.version} already, and the "
                    "kernel holds no more; ban a network in place of its addresses, or lift some"
                )
            self._sizes[ban.peer.version] += 1
            self._lengths.setdefault(ban.guest, Counter())[key[:2]] += 1
        bans[key] = ban
        self._next_ns = min(self._next_ns, ban.until_ns)
        return old

    def lift(self, peer: IpNetwork, guest: str | None = None, *, everywhere: bool = False) -> list[Ban]:
        """Take the bans of exactly this peer out, for one guest (None: those for all guests) or ``everywhere``."""
        scopes = list(self._bans) if everywhere else [guest]
        key = _prefix(peer)
        return [self._drop(scope, key) for scope in scopes if key in self._bans.get(scope, ())]

    def expire(self, now_ns: int) -> list[Ban]:
        """Take out what has ended by now."""
        if now_ns < self._next_ns:
            return []
        ended = [ban for ban in self if ban.until_ns <= now_ns]
        for ban in ended:
            self._drop(ban.guest, _prefix(ban.peer))
        self._next_ns = min((ban.until_ns for ban in self), default=FOREVER)
        return ended

    def _drop(self, guest: str | None, key: _Prefix) -> Ban:
        ban = self._bans[guest].pop(key)
        self._sizes[key[0]] -= 1
        self._lengths[guest][key[:2]] -= 1
        if not self._lengths[guest][key[:2]]:
            del self._lengths[guest][key[:2]]
        if not self._bans[guest]:
            del self._bans[guest], self._lengths[guest]
        return ban

    # -- what the kernel of one guest is to be told --

    def entries(self, guest: str) -> set[IpNetwork]:
        """The peers that have an entry in this guest's map."""
        return {ban.peer for scope in (guest, None) for ban in self._bans.get(scope, {}).values()}

    def until(self, peer: IpNetwork, guest: str) -> int | None:
        """Until when this guest's entry for ``peer`` holds; None: there is no such entry."""
        version, length, bits = _prefix(peer)
        scopes = [scope for scope in (guest, None) if scope in self._bans]
        if not any((version, length, bits) in self._bans[scope] for scope in scopes):
            return None
        return max(
            ban.until_ns
            for scope in scopes
            for known, wider in self._lengths[scope]
            if known == version and wider <= length
            if (ban := self._bans[scope].get((version, wider, bits >> (length - wider)))) is not None
        )

    def touched(self, peer: IpNetwork) -> set[IpNetwork]:
        """The peers whose entries a change at ``peer`` can alter: itself, and the bans inside it."""
        if peer.prefixlen == peer.max_prefixlen:
            return {peer}
        version, length, bits = _prefix(peer)
        inside = {
            ban.peer
            for bans in self._bans.values()
            for (known, longer, theirs), ban in bans.items()
            if known == version and longer > length and theirs >> (longer - length) == bits
        }
        return inside | {peer}

    def covering(self, peer: IpNetwork) -> list[Ban]:
        """The bans under which all of ``peer`` falls, itself included; widest first."""
        version, length, bits = _prefix(peer)
        found = [
            ban
            for bans in self._bans.values()
            for wider in range(length + 1)
            if (ban := bans.get((version, wider, bits >> (length - wider)))) is not None
        ]
        return sorted(found, key=lambda ban: ban.peer.prefixlen)


def _prefix(network: IpNetwork) -> _Prefix:
    spare = network.max_prefixlen - network.prefixlen
    return network.version, network.prefixlen, int(network.network_address) >> spare
