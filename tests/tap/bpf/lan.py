"""A bridge with a guest, a server and a decoy on it, each in a namespace; and a judge that polls the guest's tap."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import pack, unpack

from appliance.flow.community import community_id
from appliance.model import FlowEnded, FlowEvent, FlowPayload, FlowStarted, GuestId, GuestPort
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.netns import call_in_netns
from tests.tap.bpf.both import wait_for
from tests.tap.world import ip

VM = GuestId("port:lan")
HOSTS = ("guest", "server", "decoy")


@dataclass(frozen=True)
class Host:
    name: str
    netns: str
    number: int

    @property
    def path(self) -> str:
        return f"/run/netns/{self.netns}"

    @property
    def mac(self) -> str:
        return f"52:54:00:78:00:{self.number:02x}"

    @property
    def port(self) -> str:
        return f"v{self.name}"

    def address(self, family: int) -> str:
        return f"10.78.0.{self.number}" if family == socket.AF_INET else f"fd78::{self.number}"

    def socket(self, family: int, kind: int, timeout_s: float = 30) -> socket.socket:
        made = call_in_netns(self.path, lambda: socket.socket(family, kind))
        made.settimeout(timeout_s)
        return made

    def listen(self, family: int, port: int = 80) -> socket.socket:
        made = call_in_netns(
            self.path, lambda: socket.create_server((self.address(family), port), family=family, backlog=4096)
        )
        made.settimeout(30)
        return made


@dataclass(frozen=True)
class Lan:
    bridge: str  # the namespace of the host
    guest: Host
    server: Host
    decoy: Host

    @property
    def path(self) -> str:
        return f"/run/netns/{self.bridge}"

    def run(self, where: Host, *words: str) -> None:
        command = ["ip", "netns", "exec", where.netns, *words]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def open_tap(self, **options) -> KernelTap:
        options = {"patience_s": 60, **options}  # a busy machine may stop us for seconds
        port = GuestPort(self.guest.port, self.guest.mac, self.path)
        return KernelTap(VM, [port], time.time_ns, community_id=community_id, **options)


@contextlib.contextmanager
def make_lan(tag: str) -> Iterator[Lan]:
    hosts = [Host(name, f"ps{name[0]}-{tag}-{os.getpid()}", number) for number, name in enumerate(HOSTS, 2)]
    lan = Lan(f"psb-{tag}-{os.getpid()}", *hosts)
    try:
        ip("netns", "add", lan.bridge)
        ip("-n", lan.bridge, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        ip("-n", lan.bridge, "link", "set", "br0", "up")
        for host in hosts:
            ip("netns", "add", host.netns)
            peer = ("peer", "name", "eth0", "netns", host.netns, "address", host.mac)
            ip("-n", lan.bridge, "link", "add", host.port, "type", "veth", *peer)
            ip("-n", lan.bridge, "link", "set", host.port, "master", "br0", "up")
            ip("-n", host.netns, "addr", "add", f"10.78.0.{host.number}/24", "dev", "eth0")
            ip("-n", host.netns, "addr", "add", f"fd78::{host.number}/64", "dev", "eth0", "nodad")
            ip("-n", host.netns, "link", "set", "eth0", "up")
            ip("-n", host.netns, "link", "set", "lo", "up")
        for host in hosts:  # neighbours are known: what is measured are the flows
            for other in hosts:
                if other is not host:
                    for family in (socket.AF_INET, socket.AF_INET6):
                        words = ("neigh", "replace", other.address(family), "lladdr", other.mac, "dev", "eth0")
                        ip("-n", host.netns, *words)
        yield lan
    finally:
        for name in (lan.bridge, *(host.netns for host in hosts)):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)


Decide = Callable[[KernelTap, FlowStarted], object]


class Judge:
    """Polls the tap in a thread of its own, and does with each new flow what it was told to."""

    def __init__(self, tap: KernelTap, decide: Decide) -> None:
        self.tap, self.decide = tap, decide
        self.events: list[FlowEvent] = []
        self._orders: list[Callable[[], object]] = []
        self._answers: list[object] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None

    def __enter__(self) -> Judge:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.tap.close()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for event in self.tap.poll(0.01):
                    self.events.append(event)
                    if isinstance(event, FlowStarted):
                        self.decide(self.tap, event)
                while self._orders:
                    self._answers.append(self._orders.pop(0)())
        except BaseException as error:
            self.error = error

    def do(self, order: Callable[[], object]) -> object:
        """Have it done by the thread that polls."""
        before = len(self._answers)
        self._orders.append(order)
        wait_for(lambda: len(self._answers) > before or self.error)
        return self._answers[before]

    def starts(self, port: int | None = None) -> list[FlowStarted]:
        """New flows, to or from this port."""
        found = [event for event in list(self.events) if isinstance(event, FlowStarted)]
        return [
            event
            for event in found
            if port is None or port in {event.flow.tuple.remote.port, event.flow.tuple.local.port}
        ]

    def ends(self, flow) -> list[FlowEnded]:
        return [event for event in list(self.events) if isinstance(event, FlowEnded) and event.flow == flow]

    def payloads(self, flow) -> list[FlowPayload]:
        return [event for event in list(self.events) if isinstance(event, FlowPayload) and event.flow == flow]


def release(tap: KernelTap, event: FlowStarted) -> None:
    if event.held:
        assert tap.release(event.flow.id)


def nothing(tap: KernelTap, event: FlowStarted) -> None:
    """Let it wait."""


class Sniffer:
    """The frames that arrive at a host, as its interface shows them."""

    def __init__(self, host: Host) -> None:
        self.sock = call_in_netns(host.path, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        call_in_netns(host.path, lambda: self.sock.bind(("eth0", 3)))
        self.sock.settimeout(0)
        self.sock.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
        self._frames: list[bytes] = []
        self._tagged: list[bytes] = []

    def frames(self, protocol: int) -> list[bytes]:
        """All incoming IP packets of this protocol so far."""
        while True:
            try:
                data, where = self.sock.recvfrom(1 << 17)
            except BlockingIOError:
                break
            if where[2] != 4:  # PACKET_OUTGOING
                self._frames.append(data)
        return [
            frame
            for frame in self._frames
            if (frame[12:14] == b"\x08\x00" and frame[23] == protocol)
            or (frame[12:14] == b"\x86\xdd" and frame[20] == protocol)
        ]

    def tagged(self) -> list[bytes]:
        """All incoming frames so far that have a VLAN tag, with that put back (packet(7), PACKET_AUXDATA)."""
        while True:
            try:
                data, extra, _, where = self.sock.recvmsg(1 << 17, 64)
            except BlockingIOError:
                return self._tagged
            _, _, _, _, _, tci, tpid = unpack("=IIIHHHH", extra[0][2])
            if where[2] != 4 and tpid:
                self._tagged.append(data[:12] + pack("!HH", tpid, tci) + data[12:])

    def every(self) -> list[bytes]:
        """All incoming frames so far, without the tag that was out of band."""
        self.frames(0)
        return self._frames

    def __enter__(self) -> Sniffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
