"""Requests of the control socket: plain JSON objects to typed values. Who may ask was settled before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from ipaddress import IPv6Network, ip_network
from typing import Any, Final

from appliance.errors import UsageError
from appliance.model import Act, IpNetwork

Json = dict[str, Any]

MAX_REASON = 200  # characters
MAX_SECONDS = 10 * 365 * 86400.0
_HEX: Final = frozenset("0123456789abcdef")
_ALL: Final = "all"  # the word for "every guest"


@dataclass(frozen=True, slots=True)
class Status:
    """Ask how every guest is watched."""


@dataclass(frozen=True, slots=True)
class Held:
    """Ask which flows wait for a person."""


@dataclass(frozen=True, slots=True)
class Decide:
    """A person's decision on a held flow; ``id`` is a verdict's id or its first digits."""

    id: str
    allow: bool


@dataclass(frozen=True, slots=True)
class Handle:
    """An act on a flow that was judged before."""

    id: str
    act: Act


@dataclass(frozen=True, slots=True)
class MakeBan:
    """Ban ``peer``; ``guest`` None: for all guests; ``seconds`` None: until it is lifted."""

    peer: IpNetwork
    guest: str | None
    seconds: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class LiftBan:
    """Lift the bans of exactly ``peer``: those for one guest, or (None) every one."""

    peer: IpNetwork
    guest: str | None


@dataclass(frozen=True, slots=True)
class Bans:
    """Ask which bans stand."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the appliance in order."""


Request = Status | Held | Decide | Handle | MakeBan | LiftBan | Bans | Stop

_KEYS: Final[dict[str, frozenset[str]]] = {
    "status": frozenset(),
    "held": frozenset(),
    "bans": frozenset(),
    "stop": frozenset(),
    "decide": frozenset({"id", "allow"}),
    "block": frozenset({"id"}),
    "reset": frozenset({"id"}),
    "release": frozenset({"id"}),
    "ban": frozenset({"peer", "guest", "seconds", "reason"}),
    "unban": frozenset({"peer", "guest"}),
}


def parse(body: object) -> Request:
    """Turn one JSON value into a request. Raises UsageError that says what is wrong with it."""
    if not isinstance(body, dict):
        raise UsageError('a request is one JSON object on a line, as {"do": "status"}')
    verb = body.get("do")
    if not isinstance(verb, str) or verb not in _KEYS:
        raise UsageError(f'"do" must be one of {", ".join(sorted(_KEYS))}')
    unknown = sorted(str(key)[:40] for key in body.keys() - _KEYS[verb] - {"do"})
    if unknown:
        known = ", ".join(sorted(_KEYS[verb])) or "no key but do"
        raise UsageError(f"{verb}: unknown key {unknown[0]!r}; it knows {known}")
    match verb:
        case "status":
            return Status()
        case "held":
            return Held()
        case "bans":
            return Bans()
        case "stop":
            return Stop()
        case "decide":
            return Decide(_id(body), _allow(body))
        case "block" | "reset" | "release":
            return Handle(_id(body), Act(verb))
        case "ban":
            return MakeBan(parse_peer(body.get("peer")), _guest(body), _seconds(body), _reason(body))
        case _:
            return LiftBan(parse_peer(body.get("peer")), _guest(body))


def parse_peer(text: object) -> IpNetwork:
    """Read an address or a network; an IPv4 address mapped into IPv6 is that IPv4 address. Raises UsageError."""
    if not isinstance(text, str) or len(text) > 64:
        raise UsageError("peer must be an address or a network, as 203.0.113.9 or 2001:db8::/48")
    if "%" in text:
        raise UsageError(f"{text!r}: a peer has no zone; leave {text[text.index('%') :]!r} out")
    try:
        network = ip_network(text.strip(), strict=False)
    except ValueError as error:
        raise UsageError(f"{text!r} is no address and no network, as 203.0.113.9 or 2001:db8::/48") from error
    if "/" in text and ip_network(text.strip().partition("/")[0]).network_address != network.network_address:
        address = text.strip().partition("/")[0]
        raise UsageError(f"{text!r}: did you mean the network {network} or the address {address}?")
    return unmapped(network)


def unmapped(network: IpNetwork) -> IpNetwork:
    """The IPv4 network inside a v4-mapped one: on the wire there are no mapped addresses (RFC 4291, 2.5.5.2)."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        inside = network.network_address.ipv4_mapped
        if inside is not None:
            return ip_network((int(inside), network.prefixlen - 96))
    return network


def _id(body: Json) -> str:
    value = body.get("id")
    text = value.strip().lower() if isinstance(value, str) else ""
    if not 4 <= len(text) <= 64 or not _HEX.issuperset(text):
        raise UsageError("id must be the id of a verdict, or at least its first four digits")
    return text


def _allow(body: Json) -> bool:
    value = body.get("allow")
    if not isinstance(value, bool):
        raise UsageError("allow must be true or false")
    return value


def _guest(body: Json) -> str | None:
    value = body.get("guest")
    if value is None or value == _ALL:
        return None
    if not isinstance(value, str) or not value or len(value) > 400:
        raise UsageError("guest must be a target, as status prints it, or null for all guests")
    return value


def _seconds(body: Json) -> float | None:
    value = body.get("seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UsageError("seconds must be a number above 0, or null for a ban that stands until it is lifted")
    if value > MAX_SECONDS:
        raise UsageError("that is more than ten years: leave the time out for a ban that stands until it is lifted")
    return float(value)


def _reason(body: Json) -> str:
    value = body.get("reason")
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_REASON or not value.isprintable():
        raise UsageError(f"reason must be one line of at most {MAX_REASON} printable characters")
    return value
