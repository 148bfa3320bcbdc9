"""Sets of addresses, domain names and ports, compiled for fast answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IpNetwork = IPv4Network | IPv6Network
PortRange = tuple[int, int]  # both ends belong to it


@dataclass(frozen=True, slots=True)
class IpSet:
    """Networks, one hash lookup for each prefix length in use."""

    v4: tuple[tuple[int, frozenset[int]], ...] = ()  # (bits to drop, prefixes)
    v6: tuple[tuple[int, frozenset[int]], ...] = ()

    @classmethod
    def of(cls, networks: Iterable[IpNetwork]) -> IpSet:
        """Compile; a v4-mapped network counts as the IPv4 network that it maps."""
        tables: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in map(_unmapped, networks):
            shift = network.max_prefixlen - network.prefixlen
            tables[network.version].setdefault(shift, set()).add(int(network.network_address) >> shift)
        v4, v6 = (
            tuple((shift, frozenset(prefixes)) for shift, prefixes in sorted(tables[version].items()))
            for version in (4, 6)
        )
        return cls(v4, v6)

    def has(self, ip: IPv4Address | IPv6Address) -> bool:
        """Whether one of the networks contains this address (already unmapped)."""
        number = int(ip)
        return any(number >> shift in prefixes for shift, prefixes in (self.v4 if ip.version == 4 else self.v6))

    def __bool__(self) -> bool:
        return bool(self.v4 or self.v6)


def _unmapped(network: IpNetwork) -> IpNetwork:
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def unmapped(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside a v4-mapped one; any other address itself."""
    if ip.version == 6:
        return ip.ipv4_mapped or ip
    return ip


@dataclass(frozen=True, slots=True)
class DomainSet:
    """Domain names; ``*.example.org`` means everything below example.org, not example.org itself."""

    names: frozenset[str] = frozenset()
    below: frozenset[str] = frozenset()

    @classmethod
    def of(cls, patterns: Iterable[str]) -> DomainSet:
        """Compile names that are already lower-case and without a final dot."""
        listed = tuple(patterns)
        return cls(
            frozenset(name for name in listed if not name.startswith("*.")),
            frozenset(name[2:] for name in listed if name.startswith("*.")),
        )

    def find(self, names: Iterable[str]) -> str | None:
        """The first of these names that is in the set."""
        return next((name for name in names if self._has(name.lower().rstrip("."))), None)

    def _has(self, name: str) -> bool:
        if name in self.names:
            return True
        if self.below:
            dot = name.find(".")
            while dot >= 0:
                if name[dot + 1 :] in self.below:
                    return True
                dot = name.find(".", dot + 1)
        return False

    def __bool__(self) -> bool:
        return bool(self.names or self.below)


@dataclass(frozen=True, slots=True)
class PortSet:
    """Ports: the lone ones by hash, the ranges one by one."""

    single: frozenset[int]
    ranges: tuple[PortRange, ...]

    @classmethod
    def of(cls, ranges: Iterable[PortRange]) -> PortSet:
        """Compile ``(first, last)`` pairs."""
        listed = tuple(ranges)
        return cls(
            frozenset(low for low, high in listed if low == high), tuple(pair for pair in listed if pair[0] != pair[1])
        )

    def has(self, port: int) -> bool:
        """Whether the port belongs to it."""
        return port in self.single or any(low <= port <= high for low, high in self.ranges)
