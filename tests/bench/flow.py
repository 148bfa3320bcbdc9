"""Packets to flows in memory: the flow table against scapy, which takes the same frames apart and keeps no flows."""

from collections.abc import Iterator

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from appliance.flow.table import FlowTable
from appliance.model import GuestId
from appliance.tap.frame import CapturedFrame
from tests.bench.lab import Lab
from tests.bench.measure import Sample, settled
from tests.bench.report import Line

GUEST, PEER = "52:54:00:00:00:02", "52:54:00:00:00:01"
TALK = 40  # packets of one established connection beside its beginning and end
T0, STEP = 1_700_000_000_000_000_000, 50_000


def run(lab: Lab) -> Iterator[Line]:
    conversations = max(2, lab.sizes.items // 500)
    long = list(connections(conversations, TALK))
    short = list(connections(conversations * 6, 2))
    for what, frames in (("long TCP connections", long), ("short TCP and UDP", short)):
        ours, theirs = Sample(), Sample()
        with settled():
            for _ in range(lab.sizes.rounds):
                table = FlowTable(GuestId("port:bench"), [GUEST])
                ours.take(lambda table=table, frames=frames: [table.feed(frame) for frame in frames], len(frames))
                theirs.take(lambda frames=frames: [dissect(frame.data) for frame in frames], len(frames))
                assert table.stats.packets == len(frames) and not table.stats.ignored
        note = f"{len(frames):,} frames, {table.stats.flows:,} flows"
        yield Line("flow", f"one packet, {what}", "us", ours, "scapy dissection", theirs, note=note)


def dissect(data: bytes) -> object:
    """What a script with scapy does before it can look anything up."""
    packet = Ether(data)
    layer = packet.getlayer(TCP) or packet.getlayer(UDP)
    return packet.src, layer.sport, layer.dport, layer.payload


def connections(count: int, talk: int) -> Iterator[CapturedFrame]:
    """Whole connections, interleaved; every fourth is UDP where they are short, every third is IPv6."""
    scripts = [list(_one(number, talk)) for number in range(count)]
    at_ns = T0
    for step in range(max(map(len, scripts))):
        for script in scripts:
            if step < len(script):
                out, data = script[step]
                at_ns += STEP
                yield CapturedFrame(at_ns, out, data, len(data))


def _one(number: int, talk: int) -> Iterator[tuple[bool, bytes]]:
    v6, port = number % 3 == 0, 20000 + number
    ends = ("fd00::2", "fd00::1") if v6 else ("10.0.0.2", "10.0.0.1")

    def frame(out: bool, layer: object, payload: bytes = b"") -> tuple[bool, bytes]:
        macs = {"src": GUEST, "dst": PEER} if out else {"src": PEER, "dst": GUEST}
        source, target = ends if out else ends[::-1]
        packet = Ether(**macs) / (IPv6 if v6 else IP)(src=source, dst=target) / layer
        return out, bytes(packet / Raw(payload) if payload else packet)

    if talk < 10 and number % 4 == 0:
        for step in range(talk):
            out = step % 2 == 0
            yield frame(out, UDP(sport=port if out else 53, dport=53 if out else port), b"q" * 60)
        return
    seqs = {True: 1000, False: 5000}

    def tcp(out: bool, flags: str, payload: bytes = b"") -> tuple[bool, bytes]:
        ports = {"sport": port, "dport": 443} if out else {"sport": 443, "dport": port}
        made = frame(out, TCP(flags=flags, seq=seqs[out], ack=seqs[not out], **ports), payload)
        seqs[out] += len(payload) + ("S" in flags) + ("F" in flags)
        return made

    yield tcp(True, "S")
    yield tcp(False, "SA")
    yield tcp(True, "A")
    for step in range(talk):
        yield tcp(step % 2 == 0, "PA", b"x" * 400)
    yield tcp(True, "FA")
    yield tcp(False, "FA")
    yield tcp(True, "A")
