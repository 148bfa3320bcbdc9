"""Addresses that are never banned: what the host itself lives by, and the operator's own list (YAML)."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Final

import yaml

from appliance.errors import ConfigError, UsageError
from appliance.model import IpAddress
from appliance.respond.bans import Spared
from appliance.respond.requests import parse_peer, unmapped

_MAX_BYTES = 1 << 20
_FORM: Final = "as in  never_ban: [{net: 192.0.2.1, why: the gateway}, 2001:db8::/48]"

ALWAYS: Final = tuple(
    Spared(ip_network(network), why)
    for network, why in (
        ("127.0.0.0/8", "loopback"),
        ("::1/128", "loopback"),
        ("0.0.0.0/8", "this network: a guest that asks for its address by DHCP has no other"),
        ("::/128", "no address yet: duplicate address detection"),
        ("255.255.255.255/32", "broadcast: DHCP"),
        ("ff02::/16", "link-local multicast: routers and neighbours"),
    )
)


def spare(host: Iterable[IpAddress] = (), path: Path | None = None) -> tuple[Spared, ...]:
    """What is never banned: ``ALWAYS``, the host's own addresses, and the operator's file. Raises ConfigError."""
    own = tuple(Spared(unmapped(ip_network(ip)), "an address of this host") for ip in host)
    return ALWAYS + own + (read_never_ban(path) if path is not None else ())


def host_addresses() -> tuple[IpAddress, ...]:
    """The addresses of this host's own interfaces (proc_net(5): ``fib_trie``, ``if_inet6``); as many as can be read."""
    return _local_ipv4(_read_proc("fib_trie")) + _local_ipv6(_read_proc("if_inet6"))


def _read_proc(name: str) -> str:
    try:
        return (Path("/proc/self/net") / name).read_text(encoding="ascii", errors="replace")
    except OSError:  # no IPv6 here, or no /proc
        return ""


def _local_ipv4(text: str) -> tuple[IpAddress, ...]:
    """A leaf ``|-- ADDRESS`` whose route is ``/32 host LOCAL`` (net/ipv4/fib_trie.c, fib_trie_seq_show)."""
    leaf, found = "", dict[IpAddress, None]()
    for line in text.splitlines():
        mark, _, rest = line.strip().partition(" ")
        if mark == "|--":
            leaf = rest
        elif line.strip() == "/32 host LOCAL":
            found[ip_address(leaf)] = None
    return tuple(found)


def _local_ipv6(text: str) -> tuple[IpAddress, ...]:
    """First column: 32 hexadecimal digits (net/ipv6/addrconf.c, if6_seq_show)."""
    return tuple(IPv6Address(int(line[:32], 16)) for line in text.splitlines() if line[:32].strip())


def read_never_ban(path: Path) -> tuple[Spared, ...]:
    """Read the operator's list. Raises ConfigError that names the file and the entry."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: more than {_MAX_BYTES >> 20} MiB is no never-ban list")
        body = yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: this is no YAML: {error}") from error
    entries = (body["never_ban"] or []) if isinstance(body, dict) and set(body) == {"never_ban"} else None
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: one key never_ban with a list is wanted, {_FORM}")
    return tuple(_read_entry(path, number, entry) for number, entry in enumerate(entries, 1))


def _read_entry(path: Path, number: int, entry: object) -> Spared:
    net, why = entry, ""
    if isinstance(entry, dict):
        if not set(entry) <= {"net", "why"} or not isinstance(entry.get("why", ""), str):
            raise ConfigError(f"{path}: entry {number}: only net and why belong here, {_FORM}")
        net, why = entry.get("net"), entry.get("why", "")
    try:
        return Spared(parse_peer(net), why or path.name)
    except UsageError as error:
        raise ConfigError(f"{path}: entry {number}: {error}") from error
