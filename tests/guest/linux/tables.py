"""Network namespaces and socket tables made of bytes, in a layout of our own: what the look-up walks."""

import struct
from ipaddress import ip_address
from typing import ClassVar

from appliance.errors import UnreadableMemory
from appliance.guest.layout import Field
from appliance.guest.linux.facts import AF_INET, AF_INET6, LISTEN
from appliance.guest.linux.hashes import portaddr4
from appliance.guest.linux.lookup import Lookup
from appliance.guest.linux.namespaces import Namespaces
from appliance.guest.linux.probe import Probe
from appliance.guest.linux.record import Record
from appliance.guest.linux.sockets import Sockets
from appliance.model import (
    Direction,
    Endpoint,
    Evidence,
    Finding,
    FiveTuple,
    Flow,
    FlowId,
    GuestId,
    Match,
    Owner,
    Reason,
    Transport,
)
from tests.worlds.nouns import process

BASE = 0xFF11_0000_0000_0000
SECOND = 1_000_000_000
BUCKETS = 8
ESTABLISHED, CLOSE = 1, 7


def records(**layout):
    return {name: Record(name, [f and Field(*f) for f in fields]) for name, fields in layout.items()}


class Layout:
    """Stands for Facts. Offsets of ours: the nodes of chains at 0, everything else behind."""

    ipv6only = 1
    RECORDS: ClassVar = records(
        common=[(0, 8), (8, 4), (12, 4), (16, 4), (20, 2), (22, 2), (24, 2), (26, 1), (32, 8), (40, 8), (48, 16),
                (64, 16), (27, 1), (28, 4)],
        sock=[(80, 8), (88, 4)],
        net=[(8, 8), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 8)],
        inet_hashinfo=[(0, 8), (8, 4), (16, 8), (24, 4)],
        udp_table=[(0, 8), (8, 4)],
        net_device=[(0, 8), (8, 8), (16, 8), (24, 4)],
        in_ifaddr=[(0, 8), (8, 4), (12, 4), (16, 4)],
        inet6_ifaddr=[(0, 8), (8, 16)],
        listen_node=[(0, 8)],
    )  # fmt: skip
    OFFSETS: ClassVar = {
        "sk.node": 0, "tw.substate": 80, "lhash2.head": 0, "udp_hslot.head": 0, "raw.ht": 0, "net.list": 8,
        "net.dev_base_head": 24, "net.packet.sklist": 48, "net_device.dev_list": 0, "in_device.ifa_list": 0,
        "inet6_dev.addr_list": 0, "inet6_ifaddr.if_list": 0,
        "in_device.forwarding": 8, "inet6_dev.forwarding": 8,
    }  # fmt: skip

    def __init__(self, symbols):
        self.symbols = symbols

    def record(self, name):
        return self.RECORDS[name]

    def find(self, name):
        return self.OFFSETS.get(name)

    def offset(self, name):
        return self.OFFSETS[name]

    def length(self, name):
        return BUCKETS if name == "raw.ht" else 0

    def size(self, name):
        return 8

    def symbol(self, name):
        return self.symbols.get(name)

    needed = symbol


class Hashes:
    """Any function of the tuple will do."""

    ready4 = ready6 = True

    def v4(self, laddr, lport, faddr, fport, mix):
        return (laddr * 3 + lport * 5 + faddr * 7 + fport * 11 + mix) & 0xFFFF_FFFF

    def v6(self, laddr, lport, faddr, fport, mix):
        return self.v4(int.from_bytes(laddr, "little"), lport, int.from_bytes(faddr, "little"), fport, mix)


class Slow:
    """Stands for the fast path: it never knows."""

    def find(self, flow):
        return None


class World:
    """Guest memory, written by the words of its tests; also stands for the process side (Holding)."""

    def __init__(self):
        self.data = bytearray(64)
        self.reads = 0
        self.now_ns = 100 * SECOND
        self.holders, self.spaces, self.tables = {}, [], {}
        self.ehash, self.lhash, self.udp, self.lite = (self.array(nulls) for nulls in (True, True, False, False))
        self.raw4 = self.array(False)
        hashinfo = self.put("<QIxxxxQI", self.ehash, BUCKETS - 1, self.lhash, BUCKETS - 1)
        udp, lite = (self.put("<QI", table, BUCKETS - 1) for table in (self.udp, self.lite))
        self.head = self.put("<Q", 0)
        self.symbols = {"tcp_hashinfo": hashinfo, "udp_table": udp, "udplite_table": lite, "raw_v4_hashinfo": self.raw4}
        self.symbols["net_namespace_list"] = self.head
        self.init = self.symbols["init_net"] = self.namespace()

    # -- Kernel --

    def read(self, va, size):
        self.reads += 1
        if not BASE <= va <= va + size <= BASE + len(self.data):
            raise UnreadableMemory(va, size)
        return bytes(self.data[va - BASE : va - BASE + size])

    def readv(self, spans):
        found = []
        for span in spans:
            try:
                found.append(self.read(*span))
            except UnreadableMemory:
                found.append(None)
        return found

    def u32(self, va):
        return int.from_bytes(self.read(va, 4), "little")

    def u64(self, va):
        return int.from_bytes(self.read(va, 8), "little")

    # -- writing --

    def put(self, form, *values):
        raw = struct.pack(form, *values)
        self.data += bytes(-len(self.data) % 8)
        va = BASE + len(self.data)
        self.data += raw + bytes(-len(raw) % 8)
        return va

    def poke(self, va, value):
        struct.pack_into("<Q", self.data, va - BASE, value)

    def array(self, nulls):
        return self.put(f"<{BUCKETS}Q", *(bucket << 1 | 1 if nulls else 0 for bucket in range(BUCKETS)))

    def namespace(self, *addresses):
        """A namespace, last in the list, with one device that has these addresses."""
        number = len(self.spaces)
        va = self.put("<QQIIQQQQ", 0, self.head, 4000 + number, number * 8 * 13, 0, 0, 0, 0)
        self.poke(va + 24, va + 24)
        self.poke(self.spaces[-1] + 8 if self.spaces else self.head, va + 8)
        self.spaces.append(va)
        self.device(va, *addresses)
        return va

    def device(self, net, *addresses, forwards=(), promiscuity=0):
        """``forwards``: the IP versions it forwards."""
        v4 = v6 = 0
        inet6 = self.put("<QI", 0, 6 in forwards)
        for address in map(ip_address, addresses):
            if address.version == 4:
                local = int.from_bytes(address.packed, "little")
                v4 = self.put("<QIII", v4, local, 0, 0xFFFF_FFFF)
            else:
                v6 = self.put("<Q16s", v6 or inet6, address.packed)
        self.poke(inet6, v6 or inet6)
        inet = self.put("<QI", v4, 4 in forwards)
        device = self.put("<QQQI", self.u64(net + 24), inet, inet6, promiscuity)
        self.poke(net + 24, device)
        return device

    def sock(self, table, bucket, *, net, local, lport, remote=None, rport=0, state=CLOSE, hashed=0, bound=0, by=None):
        """A socket at the head of its chain, held by the process ``by`` (None: by nobody listed)."""
        here = ip_address(local)
        there = ip_address(remote) if remote else ip_address("0.0.0.0" if here.version == 4 else "::")
        v4 = [int.from_bytes(a.packed, "little") if a.version == 4 else 0 for a in (here, there)]
        v6 = [a.packed if a.version == 6 else bytes(16) for a in (here, there)]
        dport = (rport & 0xFF) << 8 | rport >> 8
        place = table + 8 * bucket
        family = AF_INET6 if here.version == 6 else AF_INET
        form = "<QIIIHHHBBIQQ16s16sQI"
        values = (self.u64(place), hashed, *v4, lport, dport, family, state, 0, bound, net, 0, *v6)
        va = self.put(form, *values, BASE + 8, 0)
        self.poke(place, va)
        self.holders[va] = by
        return va

    def tcp(self, local, lport, remote, rport, *, net=None, **more):
        net = net or self.init
        args = [ip_address(ip).packed for ip in (local, remote)]
        if len(args[0]) == 4:
            args = [int.from_bytes(packed, "little") for packed in args]
        ehashfn = getattr(Hashes(), "v4" if isinstance(args[0], int) else "v6")
        port = (rport & 0xFF) << 8 | rport >> 8
        value = ehashfn(args[0], lport, args[1], port, self.mix(net))
        ends = {"local": local, "lport": lport, "remote": remote, "rport": rport}
        return self.sock(self.ehash, value % BUCKETS, net=net, state=ESTABLISHED, hashed=value, **ends, **more)

    def listener(self, local, lport, *, net=None, **more):
        net = net or self.init
        address = int.from_bytes(ip_address(local).packed, "little")
        bucket = portaddr4(self.mix(net), address, lport) % BUCKETS
        return self.sock(self.lhash, bucket, net=net, local=local, lport=lport, state=LISTEN, **more)

    def datagram(self, local, lport, *, net=None, lite=False, **more):
        net = net or self.init
        bucket = (lport + self.mix(net)) % BUCKETS
        return self.sock(self.lite if lite else self.udp, bucket, net=net, local=local, lport=lport, **more)

    def raw(self, protocol, *, net=None, **more):
        return self.sock(self.raw4, protocol % BUCKETS, net=net or self.init, local="0.0.0.0", lport=protocol, **more)

    def mix(self, net):
        return int.from_bytes(self.read(net + 20, 4), "little")

    # -- Holding --

    def of_socket(self, raw, match, quick=True):
        by = self.holders[raw.va]
        if by is None:
            return Finding(Match.NONE, reason=Reason.HIDDEN, evidence=(Evidence("nobody listed", "hidden-owner"),))
        if by == "kernel":
            return Finding(Match.KERNEL)
        owners = (Owner(by, (3,)),)
        return Finding(match, owners, self.sockets.build(raw, owners), final=match is Match.EXACT)

    # -- asking --

    def build(self):
        facts = Layout(self.symbols)
        self.namespaces = Namespaces(self, facts, lambda: self.now_ns)
        self.sockets = Sockets(self, facts, Hashes())
        self.probe = Probe(self, facts, self.namespaces, self.sockets)
        self.namespaces.look()
        self.eye = Lookup(self.namespaces, self.sockets, self.probe, self, Slow(), lambda: self.now_ns)
        return self

    def find(self, flow, wait_s=10.0):
        """Ask, ``wait_s`` after the last question."""
        self.now_ns += int(wait_s * SECOND)
        return self.eye.find(flow)


def flow(protocol, local, lport, remote="192.0.2.9", rport=99, direction=Direction.OUT, number=0, kind=None, **more):
    ends = Endpoint(ip_address(local), lport), Endpoint(ip_address(remote), rport)
    vm = FlowId(GuestId("qemu:0"), 0)
    return Flow(vm, FiveTuple(Transport(protocol), *ends), direction, 0, ip_protocol=number, icmp_type=kind, **more)


def program(pid, path="/usr/sbin/nginx"):
    return process(pid, path.rsplit("/", 1)[1], path)
