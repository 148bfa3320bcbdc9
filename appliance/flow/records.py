"""One record of the record queue: a flow, its state and its counters; and the queues that age records.

Timeouts follow conntrack and Zeek where ours would differ without need (``net.netfilter.nf_conntrack_*``,
docs.zeek.org ``*_inactivity_timeout``). An unanswered SYN is kept longer than the longest pause between two of its
retransmissions (32 s, RFC 6298 with ``tcp_syn_retries`` 6), so that a retransmitted SYN is never a new flow.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from appliance.model import Flow, FlowCounts

SECOND_NS: Final = 1_000_000_000

Key = tuple[int | None, int, bytes, int, bytes, int]  # vlan, IANA protocol, local ip and port, remote ip and port


class State(StrEnum):
    """Where a flow is in its life."""

    SYN_SENT = "syn-sent"  # asked for, not answered (either side may have asked)
    SYN_RECV = "syn-recv"  # answered, not confirmed
    ESTABLISHED = "established"
    HALF_CLOSED = "half-closed"  # one FIN
    CLOSING = "closing"  # two FINs, the last one not acknowledged yet
    CLOSED = "closed"  # over and told; absorbs what comes late
    MIDSTREAM = "midstream"  # picked up in the middle, one direction seen so far
    UDP_ONEWAY = "udp-oneway"
    UDP_BIDIR = "udp-bidir"
    ICMP = "icmp"
    RAW = "raw"


TIMEOUT_NS: Final = {
    state: seconds * SECOND_NS
    for state, seconds in {
        State.CLOSED: 10,
        State.SYN_SENT: 40,
        State.SYN_RECV: 60,
        State.UDP_ONEWAY: 30,
        State.ICMP: 30,
        State.MIDSTREAM: 300,
        State.CLOSING: 10,
        State.HALF_CLOSED: 120,
        State.UDP_BIDIR: 180,
        State.RAW: 600,
        State.ESTABLISHED: 3600,
    }.items()
}


class Record:
    """A flow as the table keeps it. Lists of two are indexed by side: 0 sent by the guest, 1 sent to it."""

    __slots__ = (
        "acks", "bases", "bytes", "fins", "flow", "icmp_errors", "isn", "key", "last_fin", "last_ns", "late", "packets",
        "payloads", "queue", "ranges", "raw", "state", "timeout_ns", "tops",
    )  # fmt: skip

    def __init__(self, flow: Flow, key: Key, state: State, at_ns: int) -> None:
        self.flow = flow
        self.key = key
        self.state = state
        self.last_ns = at_ns
        self.packets = [0, 0]
        self.bytes = [0, 0]
        self.payloads = [0, 0]  # how many first payloads were told
        self.isn: list[int | None] = [None, None]  # initial sequence numbers
        self.tops: list[int | None] = [None, None]  # the sequence number after the last one seen
        self.acks: list[int | None] = [None, None]  # last acknowledgement
        self.bases: list[int | None] = [None, None]  # where counting of payload bytes begins
        self.ranges: list[list[tuple[int, int]]] = [[], []]  # payload bytes already told, relative to the base
        self.fins = 0  # bit per side
        self.last_fin = 0
        self.late = [0, 0]  # segments with new data after the end
        self.icmp_errors = 0
        self.raw = [b"", b""]  # its keys in the fast path
        self.timeout_ns = 0
        self.queue: Queue = OrderedDict()

    @property
    def counts(self) -> FlowCounts:
        """The counters as a value."""
        return FlowCounts(self.packets[0], self.packets[1], self.bytes[0], self.bytes[1])


Queue = OrderedDict[Key, Record]


class Queues:
    """Records by key, and per state in the order of their last packet: what expires next stands in front."""

    def __init__(self) -> None:
        self.by_key: dict[Key, Record] = {}
        self._by_state: dict[State, Queue] = {state: OrderedDict() for state in TIMEOUT_NS}

    def __len__(self) -> int:
        return len(self.by_key)

    def add(self, record: Record) -> None:
        """Enter a new record."""
        self.by_key[record.key] = record
        self._enqueue(record, record.state)

    def touch(self, record: Record, at_ns: int) -> None:
        """Note a packet."""
        if at_ns > record.last_ns:  # noqa: PLR1730 - half the time of max(), once per packet
            record.last_ns = at_ns
        record.queue.move_to_end(record.key)

    def move(self, record: Record, state: State) -> None:
        """Change the state."""
        del record.queue[record.key]
        self._enqueue(record, state)

    def remove(self, record: Record) -> None:
        """Forget a record."""
        del self.by_key[record.key]
        del record.queue[record.key]

    def count(self, state: State) -> int:
        """How many records are in ``state``."""
        return len(self._by_state[state])

    def iter_expired(self, now_ns: int) -> Iterator[Record]:
        """Yield records silent for longer than their state allows; the caller must remove or move each one."""
        for state, queue in self._by_state.items():
            latest = now_ns - TIMEOUT_NS[state]
            while queue and (record := next(iter(queue.values()))).last_ns < latest:
                yield record

    def find_victim(self) -> Record | None:
        """The record to give up when the table is full: over, unanswered and one-sided ones before real talk."""
        return next((next(iter(queue.values())) for queue in self._by_state.values() if queue), None)

    def _enqueue(self, record: Record, state: State) -> None:
        # The queue and timeout are kept on the record: hashing an Enum member is a Python call, once per packet.
        record.state = state
        record.timeout_ns = TIMEOUT_NS[state]
        record.queue = self._by_state[state]
        record.queue[record.key] = record
