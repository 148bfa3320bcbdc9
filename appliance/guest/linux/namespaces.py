"""The guest's network namespaces, and which tables and addresses belong to each.

``net_namespace_list`` (net/core/net_namespace.c) links all of them. Since 6.1 a namespace may have a connection table
of its own (``net.ipv4.tcp_child_ehash_entries``), since 6.2 a UDP table too; before, and by default, they share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from appliance.errors import GuestError, UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.record import is_object
from appliance.model import Gap, IpAddress

MAX_NAMESPACES = 16_384
MAX_DEVICES = 4096  # in one namespace
MAX_ADDRESSES = 4096  # of one device and family
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

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._facts = facts
        self._record = facts.record("net")
        self._hashinfo = facts.record("inet_hashinfo")
        self._udp = facts.record("udp_table")
        self._list = facts.offset("net.list")
        self._head = facts.needed("net_namespace_list")
        self._init = facts.needed("init_net")
        self.all: dict[int, Namespace] = {}  # by address, the initial one first
        self._addresses = Addresses(kernel, facts)
        self._own: dict[int, set[bytes]] = {}  # addresses by namespace, as far as anybody asked
        self._tcp_tables: dict[int, Hashinfo | None] = {}
        self._udp_tables: dict[int, UdpTable | None] = {}

    def look(self) -> list[Gap]:
        """Read the list of namespaces anew. Raises GuestError when not even the initial one can be read."""
        gaps: list[Gap] = []
        self._tcp_tables.clear()
        self._udp_tables.clear()
        self._own.clear()
        found: dict[int, Namespace] = {}
        try:
            found[self._init] = self._read(self._init)[0]
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
        self.all = {va: fresh if self.all.get(va) != fresh else self.all[va] for va, fresh in found.items()}
        if found[self._init].tcp is None:
            gaps.append(Gap("TCP sockets", self._init, "no TCP table found"))
        if found[self._init].udp is None:
            gaps.append(Gap("UDP sockets", self._init, "no UDP table found"))
        return gaps

    def of_address(self, address: bytes) -> list[Namespace]:
        """The namespaces that have a local address as their own; all of them if none has."""
        everybody = list(self.all.values())
        if len(everybody) == 1:
            return everybody
        own = [namespace for namespace in everybody if address in self._own_addresses(namespace)]
        return own or everybody

    def has(self, ip: IpAddress) -> bool:
        """Whether an address is one of the guest's own; a group address always is."""
        if ip.is_multicast or ip.is_unspecified or ip.packed == b"\xff" * 4:
            return True
        if any(ip.packed in self._own_addresses(namespace) for namespace in self.all.values()):
            return True
        self.look()  # addresses come and go: look again before saying no
        return any(ip.packed in self._own_addresses(namespace) for namespace in self.all.values())

    def _own_addresses(self, namespace: Namespace) -> set[bytes]:
        found = self._own.get(namespace.va)
        if found is None:
            found = self._own[namespace.va] = self._addresses.read(namespace)
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
        self._ifaddr6 = facts.record("inet6_ifaddr")

    def read(self, namespace: Namespace) -> set[bytes]:
        """Addresses of a namespace: 4 or 16 bytes each, IPv4 broadcast addresses included."""
        found: set[bytes] = set()
        try:
            for in_dev, inet6_dev in self._devices(namespace):
                if is_object(in_dev):
                    found.update(self._v4(in_dev))
                if is_object(inet6_dev):
                    found.update(self._v6(inet6_dev))
        except UnreadableMemory:
            pass  # a device that goes away while we look; what was found so far holds
        return found

    def _devices(self, namespace: Namespace) -> Iterator[tuple[int, int]]:
        node, head = namespace.devices, namespace.va + self._dev_head
        for _ in range(MAX_DEVICES):
            device = node - self._dev_list
            if node == head or not is_object(device):
                return
            node, in_dev, inet6_dev = self._device.parse(self._kernel.read(*self._device.span(device)))
            yield in_dev, inet6_dev

    def _v4(self, in_dev: int) -> Iterator[bytes]:
        """``in_device.ifa_list`` (include/linux/inetdevice.h)."""
        node = self._kernel.u64(in_dev + self._ifa_list)
        for _ in range(MAX_ADDRESSES):
            if not is_object(node):
                return
            node, local, broadcast, mask = self._ifaddr.parse(self._kernel.read(*self._ifaddr.span(node)))
            yield local.to_bytes(4, "little")
            yield broadcast.to_bytes(4, "little")
            yield (local | ~mask & 0xFFFF_FFFF).to_bytes(4, "little")

    def _v6(self, inet6_dev: int) -> Iterator[bytes]:
        """``inet6_dev.addr_list`` (include/net/if_inet6.h)."""
        if self._addr_list is None or self._if_list is None:
            return
        head = inet6_dev + self._addr_list
        node = self._kernel.u64(head)
        for _ in range(MAX_ADDRESSES):
            entry = node - self._if_list
            if node == head or not is_object(entry):
                return
            node, address = self._ifaddr6.parse(self._kernel.read(*self._ifaddr6.span(entry)))
            yield address


def _is_mask(value: int) -> bool:
    return 0 <= value < MAX_BUCKETS and not value & (value + 1)
