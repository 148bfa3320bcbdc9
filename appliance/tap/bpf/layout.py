"""The structures and maps that ``parasight_tap.bpf.c`` shares with us, in its order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from typing import Final

# struct key: ifindex, vlan, local port, remote port, protocol, IP version, zero, local, remote address.
KEY = Struct("=IIHHBBH16s16s")
# struct flow: id, first, last; packets, bytes, frames, isn, top, ack, base, dropped, late, told, sent by side; state,
# first side, first flags, ICMP type, code, fins, last fin, has, missed, seen, hold, copied; held, MACs, errors by side.
FLOW = Struct("=3Q6Q10I6H12BQ12s2H")
# The part of it that a sweep needs: id, first, last, packets, bytes, state ... hold, MACs.
SWEPT = Struct("=3Q4Q16x40x12x11Bx8x12s4x")
# The part that tells whether a sweep has anything to do: id, last, state, missed.
GLANCE = Struct("=Q8xQ32x16x40x12xB7xB27x")
# The part of it that a reset needs: id, top, ack, state, fins, has, hold, MACs.
SEQUENCES = Struct("=Q16x48x8x2I2I8x8x12xB4xBxB2xBx8x12s4x")
# struct event: id, time, kind, side, reason, state, missed, seen, first side, first flags, payload offset, wire length,
# captured, ICMP type, code, hold, MACs, tag, key, packets, bytes, GSO size.
EVENT = Struct("=QQ8BIIIBBBx12sI48s4QI4x")
# Its parts. What is read of each: id, time, kind, side, reason, seen, payload offset, wire length, captured, hold.
EVENT_HEAD = Struct("=QQ3B2xB2xIII2xB")
# Of a flow that is not known: missed, first side, first flags, ICMP type, code, MACs, key.
EVENT_FLOW = Struct("=20xBxBB12xBB2x12s4x48s")
# Of one that is over: packets, bytes. Of a frame that waits: tag, GSO size.
EVENT_COUNTS = Struct("=104x4Q")
EVENT_FRAME = Struct("=52xI48x32xI")
# struct verdict: action, ifindex, deadline, flow, MAC, otherwise.
VERDICT = Struct("=IIQQ6sBx")
# struct port: heartbeat, patience, hold, flags, mark.
PORT = Struct("=QQQII")
MAC = Struct("=I6s2x")

START: Final = 1
PAYLOAD: Final = 2
END: Final = 4
HELD: Final = 8

ALLOW, DROP, HOLD, REDIRECT, NOTHING = range(5)
FREE, HELD_NEW, ARMED, HELD_PAYLOAD, PAUSED, REFUSED = range(6)  # enum hold
DENY: Final = 0x80
HAS_TOP: Final = 4  # << side
HAS_ACK: Final = 16
FAIL_CLOSED: Final = 1
HAS_VERDICTS: Final = 2
HAS_BANS: Final = 4
SWAPPED: Final = 8
HOLD_OUT: Final = 16
HOLD_IN: Final = 32
HOLD_PAYLOAD: Final = 64
HOLD_DENY: Final = 128
FORGED: Final = 1  # in the mark
REFUSE: Final = 2
MARK_BITS: Final = 3
MAX_FRAME: Final = 16384

IGNORED: Final = (
    "", "runt", "llc", "arp", "lldp", "pppoe", "eapol", "other-ethertype", "cut-ip", "bad-ip-version", "bad-ip-length",
    "long-extension-chain", "bad-tcp", "bad-udp", "cut-icmp", "cut-transport", "fragment-without-first", "igmp",
    "multicast", "stray-close", "flooded", "icmp-error", "nd", "mld", "router-discovery",
)  # fmt: skip
# struct stats: packets, bytes, flows, events, lost, unmade, dropped, held, next id, ignored by reason.
STATS = Struct(f"={9 + len(IGNORED)}Q")

SECOND_NS: Final = 1_000_000_000
SYN_SENT, SYN_RECV, ESTABLISHED, HALF_CLOSED, CLOSING, CLOSED, MIDSTREAM, UDP_ONEWAY, UDP_BIDIR, ICMP, RAW = range(11)
TIMEOUT_NS: Final = tuple(
    seconds * SECOND_NS for seconds in (40, 60, 3600, 120, 10, 10, 300, 30, 180, 30, 600)
)  # by state

_HASH, _ARRAY, _PERF_EVENT_ARRAY, _PERCPU_ARRAY, _LRU_HASH, _LPM_TRIE, _RINGBUF = 1, 2, 4, 6, 9, 11, 27
NO_PREALLOC: Final = 1
_SCRATCH_BYTES: Final = EVENT.size + MAX_FRAME + KEY.size + FLOW.size + 48 + 56 + 8 * 4 + 4 + 4 + 8
SIZES: Final = (KEY.size, FLOW.size, EVENT.size, VERDICT.size, PORT.size, STATS.size, (_SCRATCH_BYTES + 7) & ~7)


class Transport(StrEnum):
    """How events reach user space."""

    RING = "ring"  # BPF ring buffer, Linux 5.8
    PERF = "perf"  # perf event array, one buffer for each CPU


@dataclass(frozen=True, slots=True)
class MapSpec:
    """One map as the kernel is asked for it."""

    name: str
    kind: int
    key_size: int
    value_size: int
    entries: int
    flags: int = 0


def build_specs(
    max_flows: int, ring_bytes: int, transport: Transport = Transport.RING, cpus: int = 1
) -> tuple[MapSpec, ...]:
    """The maps of one tap. ``cpus``: all that may ever come; a perf event array has an entry for each."""
    events = MapSpec("events", _RINGBUF, 0, 0, ring_bytes)
    if transport is Transport.PERF:
        events = MapSpec("events", _PERF_EVENT_ARRAY, 4, 4, cpus)
    return (
        MapSpec("flows", _LRU_HASH, KEY.size, FLOW.size, max_flows),
        MapSpec("verdicts", _HASH, KEY.size, VERDICT.size, 16384, NO_PREALLOC),
        MapSpec("peers4", _LPM_TRIE, 12, VERDICT.size, 16384, NO_PREALLOC),
        MapSpec("peers6", _LPM_TRIE, 24, VERDICT.size, 16384, NO_PREALLOC),
        MapSpec("ports", _HASH, 4, PORT.size, 64),
        MapSpec("stats", _PERCPU_ARRAY, 4, STATS.size, 1),
        events,
        MapSpec("macs", _LRU_HASH, MAC.size, 8, 1024),
        MapSpec("fragments", _LRU_HASH, 48, 56, 4096),
        MapSpec("scratch", _PERCPU_ARRAY, 4, SIZES[-1], 1),
        MapSpec("tail", _ARRAY, 4, MAX_FRAME, 1),
    )
