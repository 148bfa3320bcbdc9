"""The guest's network namespaces, and which tables and addresses belong to each.

``net_namespace_list`` (net/core/net_namespace.c) links all of them. Since 6.1 a namespace may have a connection table
of its own (``net.ipv4.tcp_child_ehash_entries``), since 6.2 a UDP table too; before, and by default, they share one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from appliance.errors import GuestError, OutOfTime, UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.record import is_object
from appliance.model import Gap

MAX_NAMESPACES = 16_384
MAX_DEVICES = 1024  # in one namespace
MAX_ADDRESSES = 4096  # in one namespace
MAX_READS = 16_384  # devices and addresses between two looks, over all namespaces
REST_NS = 50_000_000  # between two looks that a miss asks for: any user of the guest can make namespaces and misses
REST_TIMES = 4  # and this many times as long as the last look took
STALE_NS = 1_000_000_000  # an older look is not asked whose an address is
MAX_BUCKETS = 1 << 20  # tcp_init() makes 512 Ki at most unless thash_entries says more (net/ipv4/tcp.c)


class Hashinfo(NamedTuple):
    """A TCP ``struct inet_hashinfo``."""

    ehash: int
    ehash_mask: int
    lhash2: int
    lhash2_mask: int


class UdpTable(NamedTuple):
    """A ``struct udp_table``."""

    hash: int
    mask: int


class Namespace(NamedTuple):
    """One ``struct net``."""

    va: int
    inum: int  # what /proc/PID/ns/net shows
    mix: int  # net_hash_mix
    devices: int  # first of dev_base_head
    packet: int  # first AF_PACKET socket, 0 for none
    tcp: Hashinfo | None
    udp: UdpTable | None


class Namespaces:
    """Reads the namespaces of one guest."""

    def __init__(self, kernel: Kernel, facts: Facts, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._kernel = kernel
        self._facts = facts
        self._clock_ns = clock_ns
        self._looked_ns = self._rested_ns = -STALE_NS
        self.looks = 0  # how often we looked
        self._record = facts.record("net")
        self._hashinfo = facts.record("inet_hashinfo")
        self._udp = facts.record("udp_table")
        self._list = facts.offset("net.list")
        self._head = facts.needed("net_namespace_list")
        self._init = facts.needed("init_net")
        self.all: dict[int, Namespace] = {}  # by address, the initial one first
        self._addresses = Addresses(kernel, facts)
        self._own: dict[int, set[bytes]] = {}  # addresses by namespace, as far as anybody asked
        self._vague: set[int] = set()  # namespaces not all of whose addresses could be read
        self._relayed: set[int] = set()  # IP versions that some device forwards, as far as anybody asked
        self._reads = MAX_READS
        self._tcp_tables: dict[int, Hashinfo | None] = {}
        self._udp_tables: dict[int, UdpTable | None] = {}
        self.lite: UdpTable | None = None  # UDP-Lite, one table for all of them

    def refresh(self) -> bool:
        """Look again, unless that was done a moment ago; says whether it was done now."""
        began = self._clock_ns()
        if self.all and began < self._rested_ns:
            return False
        self.look()
        return True

    def look(self) -> list[Gap]:
        """Read the list of namespaces anew. Raises GuestError when not even the initial one can be read."""
        began = self._clock_ns()
        gaps = self._look()
        self.looks += 1
        self._looked_ns = self._clock_ns()
        self._rested_ns = self._looked_ns + max(REST_NS, REST_TIMES * (self._looked_ns - began))
        return gaps

    def _look(self) -> list[Gap]:
        gaps: list[Gap] = []
        self._tcp_tables.clear()
        self._udp_tables.clear()
        self._own.clear()
        self._vague.clear()
        self._relayed.clear()
        self._reads = MAX_READS
        found: dict[int, Namespace] = {}
        try:
            found[self._init] = self._read(self._init)[0]
            self.lite = self._udp_table(self._facts.symbol("udplite_table") or 0)
            node = self._kernel.u64(self._head)
        except UnreadableMemory as error:
            raise GuestError(f"the guest's initial network namespace cannot be read: {error}") from error
        seen: set[int] = set()
        while node != self._head:
            va = node - self._list
            if not is_object(va) or va in seen or len(found) >= MAX_NAMESPACES:
                gaps.append(Gap("network namespaces", node, "the list moved or is broken"))
                break
            seen.add(va)
            try:
                found[va], node = self._read(va)
            except UnreadableMemory:
                gaps.append(Gap("network namespaces", node, "unreadable link"))
                break
            except OutOfTime:
                gaps.append(Gap("network namespaces", node, "out of time"))
                break
        self.all = {va: fresh if self.all.get(va) != fresh else self.all[va] for va, fresh in found.items()}
        if found[self._init].tcp is None:
            gaps.append(Gap("TCP sockets", self._init, "no TCP table found"))
        if found[self._init].udp is None:
            gaps.append(Gap("UDP sockets", self._init, "no UDP table found"))
        return gaps

    def of_address(self, address: bytes) -> list[Namespace]:
        """The namespaces that have a local address as their own: none for what the guest routes for somebody else."""
        if is_everywhere(address):
            return list(self.all.values())
        if self._clock_ns() - self._looked_ns > STALE_NS:
            self.refresh()
        return self._having(address) or (self._having(address) if self.refresh() else [])

    def is_foreign(self, address: bytes, since: int) -> bool:
        """Whether an address is certainly nobody's own, as a look after ``looks`` was ``since`` has shown.

        An older look is not enough: the address may be new.
        """
        if is_everywhere(address) or self._having(address):
            return False
        fresh = self.looks > since or self.refresh()
        return fresh and not self._having(address) and not self._vague

    def is_relaying(self, version: int) -> bool:
        """Whether the guest may pass on packets of others, as the look that ``is_foreign`` asked has shown."""
        return bool(self._vague) or version in self._relayed

    def having(self, address: bytes) -> list[Namespace]:
        """The namespaces that have this address, as far as the last look knows."""
        return list(self.all.values()) if is_everywhere(address) else self._having(address)

    def _having(self, address: bytes) -> list[Namespace]:
        return [namespace for namespace in self.all.values() if address in self._own_addresses(namespace)]

    def _own_addresses(self, namespace: Namespace) -> set[bytes]:
        found = self._own.get(namespace.va)
        if found is None:
            found, left = self._addresses.read(namespace, self._reads, self._relayed)
            self._own[namespace.va] = found
            if left is None:
                self._vague.add(namespace.va)
            self._reads = max(0, self._reads - len(found) - 1) if left is None else left
        return found

    def _read(self, va: int) -> tuple[Namespace, int]:
        raw = self._kernel.read(*self._record.span(va))
        following, inum, mix, devices, tcp, udp, packet = self._record.parse(raw)
        tcp = tcp if is_object(tcp) else self._facts.symbol("tcp_hashinfo") or 0
        udp = udp if is_object(udp) else self._facts.symbol("udp_table") or 0
        return Namespace(va, inum, mix, devices, packet, self._tcp_table(tcp), self._udp_table(udp)), following

    def _tcp_table(self, va: int) -> Hashinfo | None:
        if va not in self._tcp_tables:
            table = Hashinfo(*self._hashinfo.parse(self._kernel.read(*self._hashinfo.span(va)))) if va else None
            if table and not (is_object(table.ehash) and _is_mask(table.ehash_mask) and _is_mask(table.lhash2_mask)):
                table = None
            self._tcp_tables[va] = table
        return self._tcp_tables[va]

    def _udp_table(self, va: int) -> UdpTable | None:
        if va not in self._udp_tables:
            table = UdpTable(*self._udp.parse(self._kernel.read(*self._udp.span(va)))) if va else None
            if table and not (is_object(table.hash) and _is_mask(table.mask)):
                table = None
            self._udp_tables[va] = table
        return self._udp_tables[va]


class Addresses:
    """The guest's own IP addresses, read from its network devices."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._device = facts.record("net_device")
        self._dev_list = facts.offset("net_device.dev_list")
        self._dev_head = facts.offset("net.dev_base_head")
        self._ifa_list = facts.offset("in_device.ifa_list")
        self._ifaddr = facts.record("in_ifaddr")
        self._addr_list = facts.find("inet6_dev.addr_list")
        self._if_list = facts.find("inet6_ifaddr.if_list")
        self._forwarding = {4: facts.find("in_device.forwarding"), 6: facts.find("inet6_dev.forwarding")}
        self._ifaddr6 = facts.record("inet6_ifaddr")

    def read(self, namespace: Namespace, reads: int, relayed: set[int]) -> tuple[set[bytes], int | None]:
        """Addresses of a namespace: 4 or 16 bytes each, IPv4 broadcast addresses included.

        Adds to ``relayed`` the IP versions that a device of it forwards, or may pass on as the port of a bridge.
        Also returns what is left of ``reads``, None when that or the lists' bounds did not suffice, or one was broken.
        """
        found: set[bytes] = set()
        budget = _Budget(reads)
        try:
            for in_dev, inet6_dev, promiscuity in self._devices(namespace, budget):
                if promiscuity:  # a bridge makes its ports so, and whoever listens with a packet socket may
                    relayed.update((4, 6))
                if is_object(in_dev):
                    self._note_forwarding(4, in_dev, relayed)
                    found.update(self._v4(in_dev, budget))
                if is_object(inet6_dev):
                    self._note_forwarding(6, inet6_dev, relayed)
                    found.update(self._v6(inet6_dev, budget))
        except UnreadableMemory:
            return found, None  # a device that goes away while we look; what was found so far holds
        return found, budget.left

    def _note_forwarding(self, version: int, va: int, relayed: set[int]) -> None:
        """``net.ipv4.conf.DEVICE.forwarding`` and that of IPv6; where they cannot be found, nothing is certain."""
        offset = self._forwarding[version]
        if offset is None or self._kernel.u32(va + offset):
            relayed.add(version)

    def _devices(self, namespace: Namespace, budget: _Budget) -> Iterator[tuple[int, int, int]]:
        node, head = namespace.devices, namespace.va + self._dev_head
        while node != head:
            device = node - self._dev_list
            budget.take(device, device=True)
            node, in_dev, inet6_dev, promiscuity = self._device.parse(self._kernel.read(*self._device.span(device)))
            yield in_dev, inet6_dev, promiscuity

    def _v4(self, in_dev: int, budget: _Budget) -> Iterator[bytes]:
        """``in_device.ifa_list`` (include/linux/inetdevice.h)."""
        node = self._kernel.u64(in_dev + self._ifa_list)
        while node:
            budget.take(node)
            node, local, broadcast, mask = self._ifaddr.parse(self._kernel.read(*self._ifaddr.span(node)))
            yield local.to_bytes(4, "little")
            yield broadcast.to_bytes(4, "little")
            yield (local | ~mask & 0xFFFF_FFFF).to_bytes(4, "little")

    def _v6(self, inet6_dev: int, budget: _Budget) -> Iterator[bytes]:
        """``inet6_dev.addr_list`` (include/net/if_inet6.h)."""
        if self._addr_list is None or self._if_list is None:
            return
        head = inet6_dev + self._addr_list
        node = self._kernel.u64(head)
        while node != head:
            entry = node - self._if_list
            budget.take(entry)
            node, address = self._ifaddr6.parse(self._kernel.read(*self._ifaddr6.span(entry)))
            yield address


class _Budget:
    """How much of a namespace's lists is read; no entry twice."""

    def __init__(self, reads: int) -> None:
        self.left = reads
        self._seen: set[int] = set()
        self._devices, self._addresses = MAX_DEVICES, MAX_ADDRESSES

    def take(self, va: int, device: bool = False) -> None:
        """Note one entry. Raises UnreadableMemory where the list must not be followed any further."""
        self.left -= 1
        self._devices -= device
        self._addresses -= not device
        if not is_object(va) or va in self._seen or min(self.left, self._devices, self._addresses) < 0:
            raise UnreadableMemory(va, 0, "the list is broken, or longer than we follow")
        self._seen.add(va)


def is_everywhere(address: bytes) -> bool:
    """An address that every namespace takes for its own: loop-back, groups, broadcast, and none yet (DHCP)."""
    ip = ip_address(address)
    return ip.is_multicast or ip.is_unspecified or ip.is_loopback or address == b"\xff" * 4


def _is_mask(value: int) -> bool:
    return 0 <= value < MAX_BUCKETS and not value & (value + 1)
