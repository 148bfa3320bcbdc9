"""Hash tables of sockets: from the array of bucket heads to every node, a whole level of all chains per batch.

Two kinds of chain: ``hlist`` ends in NULL; ``hlist_nulls`` (include/linux/list_nulls.h) ends in an odd value that
carries the bucket's number. A node that moves to another bucket while we follow it takes us along; the end value shows
that, and the bucket is walked again, three times at most.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from appliance.errors import OutOfTime, UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import LISTENING_NULLS_BASE
from appliance.guest.linux.record import Record, is_object
from appliance.model import Gap

MAX_NODES = 1 << 20  # sockets in one table
MAX_LEVELS = 4096  # nodes in one chain; SO_REUSEPORT groups put many sockets into one
TRIES = 3
OUT_OF_TIME = "out of time"
_EVEN = bytes(0 if byte & 1 else 1 for byte in range(256))  # 1 where the byte is even


class Node(NamedTuple):
    """One member of a chain: where it is, and the bytes of its record."""

    bucket: int
    va: int
    raw: bytes


class Chains(NamedTuple):
    """Everything in one table."""

    nodes: list[Node]
    gaps: list[Gap]
    torn: int


class ChainWalker:
    """Walks hash tables of one guest."""

    def __init__(self, kernel: Kernel, name: str, record: Record, link: int) -> None:
        """``link`` is the offset of the list node in the object, within the record: chains point to nodes."""
        self._kernel, self._name, self._record, self._link = kernel, name, record, link

    def walk(self, base: int, count: int, stride: int, head: int, nulls: bool) -> Chains:
        """Walk ``count`` buckets of ``stride`` bytes at ``base``, each with its first pointer at offset ``head``."""
        try:
            raw = self._kernel.read(base, count * stride)
        except UnreadableMemory as error:
            return Chains([], [Gap(self._name, base, str(error))], 0)
        firsts = _firsts(raw, stride, head, nulls)
        chains, bad = self._follow([pair for pair in firsts if is_object(pair[1])], nulls)
        bad.update(bucket for bucket, first in firsts if not is_object(first))
        for _ in range(TRIES - 1):
            if not bad or any(gap.why == OUT_OF_TIME for gap in chains.gaps):
                break
            torn = chains.torn + len(bad)
            try:
                again = self._heads(sorted(bad), base, stride, head, nulls)
            except OutOfTime:
                break
            more, still = self._follow(again, nulls)
            kept = [node for node in chains.nodes if node.bucket not in bad]
            chains, bad = Chains(kept + more.nodes, chains.gaps + more.gaps, torn), still
        gaps = [Gap(self._name, base + bucket * stride, "bucket changed three times while read") for bucket in bad]
        return Chains(chains.nodes, chains.gaps + gaps, chains.torn)

    def _heads(self, buckets: list[int], base: int, stride: int, head: int, nulls: bool) -> list[tuple[int, int]]:
        raws = self._kernel.readv([(base + bucket * stride + head, 8) for bucket in buckets])
        pairs = ((b, int.from_bytes(raw, "little")) for b, raw in zip(buckets, raws, strict=True) if raw is not None)
        return [(bucket, first) for bucket, first in pairs if is_object(first)]

    def _follow(self, level: list[tuple[int, int]], nulls: bool) -> tuple[Chains, set[int]]:
        """Follow chains from their first nodes, level by level. Also returns buckets that contradicted themselves."""
        nodes: list[Node] = []
        gaps: list[Gap] = []
        bad: set[int] = set()
        seen: set[int] = set()
        link, size = self._link, self._record.size
        low = self._record.low - link
        follow = Struct("<Q").unpack_from
        for _ in range(MAX_LEVELS):
            if not level:
                return Chains(nodes, gaps, 0), bad
            if len(nodes) + len(level) > MAX_NODES:
                gaps.append(Gap(self._name, level[0][1], f"more than {MAX_NODES} sockets"))
                return Chains(nodes, gaps, 0), bad
            try:
                raws = self._kernel.readv([(node + low, size) for _, node in level])
            except OutOfTime:
                gaps.append(Gap(self._name, level[0][1], OUT_OF_TIME))
                return Chains(nodes, gaps, 0), set()
            following: list[tuple[int, int]] = []
            for (bucket, node), raw in zip(level, raws, strict=True):
                if raw is None or node in seen:
                    bad.add(bucket)
                    continue
                seen.add(node)
                nodes.append(Node(bucket, node - link, raw))
                (after,) = follow(raw, -low)
                if nulls and after & 1:
                    if after >> 1 not in (bucket, bucket + LISTENING_NULLS_BASE):
                        bad.add(bucket)
                elif after:
                    if is_object(after - link):
                        following.append((bucket, after))
                    else:
                        bad.add(bucket)
            level = following
        gaps.append(Gap(self._name, level[0][1], f"a chain of more than {MAX_LEVELS} sockets"))
        return Chains(nodes, gaps, 0), bad


def _firsts(raw: bytes, stride: int, head: int, nulls: bool) -> list[tuple[int, int]]:
    """The non-empty buckets and their first nodes. Empty ones are skipped without a Python step each."""
    if not nulls:
        heads = Struct(f"<{len(raw) // 8}Q").unpack(raw)[head // 8 :: stride // 8]
        return [(bucket, first) for bucket, first in enumerate(heads) if first]
    marks = raw[head::stride].translate(_EVEN)  # the lowest bit of each head
    found = []
    bucket = marks.find(1)
    while bucket >= 0:
        at = bucket * stride + head
        found.append((bucket, int.from_bytes(raw[at : at + 8], "little")))
        bucket = marks.find(1, bucket + 1)
    return found
