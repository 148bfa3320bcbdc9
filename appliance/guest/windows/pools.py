"""Pool blocks found by their tags in guest-physical memory: what was unlinked from every list still lies there.

Memory is looked at in pieces, one word of every block's header, so an idle gigabyte costs about a second; a `Sweep` can
be put off at any piece and taken up again. A block is told when its header can be one; what lies in it, and whether it
lives, is for who asks to judge; where it is mapped, `reverse` tells.
Sources: symbol _POOL_HEADER of ntkrnlmp.pdb (PoolTag; BlockSize in units of the header's size); "Windows Internals" 7th
ed., part 1, chapter 5 (pool tags; free blocks keep their tag and lose their type); the tags themselves are those of the
Debugging Tools' pooltag.txt (TcpE, TTcb, TcTW, TcpL, UdpA, Proc) and of XP's tcpip.sys (TCPT, TCPA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.space import PAGE
from appliance.model import Region
from appliance.ports import GuestMemory

ENDPOINT_TAGS = (b"TcpE", b"TTcb")  # the second since Windows 11 and Server 2022
TIME_WAIT_TAG, LISTENER_TAG, UDP_TAG = b"TcTW", b"TcpL", b"UdpA"
PROCESS_TAG = b"Proc"
XP_CONNECTION_TAG, XP_ADDRESS_TAG = b"TCPT", b"TCPA"

PIECE = 1 << 20  # bytes read at once
MAX_BLOCKS = 1 << 16  # of one sweep: a guest can write a tag as often as it likes
MAX_HITS = 1 << 14  # of one piece
_NEEDLES = (b"Tc", b"Udp", b"Pro", b"TCP")  # few and short: each is one pass over the piece
_NOTHING = bytes(PIECE)

Expired = Callable[[], bool]


class Block(NamedTuple):
    """A pool block by its header. ``size`` counts the header; ``in_use`` is what the header says.

    ``at`` is the header's address: guest-physical from a sweep, virtual where virtual memory was looked through.

    ``tag`` is without the highest bit, by which Windows 7 and older mark a block that its owner alone may free.
    """

    at: int
    tag: bytes
    size: int
    in_use: bool


class PoolHeader:
    """Where _POOL_HEADER keeps what; of 16 bytes on x86-64, of 8 on x86."""

    def __init__(self, types: SymbolTable | None, pointer_size: int) -> None:
        self.size = 16 if pointer_size == 8 else 8
        # Without a symbol table as in every version: two words of which the second is BlockSize and PoolType.
        self._at, self._bits = 2, 8 if pointer_size == 8 else 9
        if types is not None and types.has("_POOL_HEADER.BlockSize"):
            field = types.field("_POOL_HEADER.BlockSize")
            self._at = field.offset + (field.bit_position or 0) // 8
            self._bits = field.bit_length or self._bits

    def parse(self, raw: bytes, offset: int, at: int, tag: bytes) -> Block | None:
        """The block whose header lies at ``raw[offset:]``; None where no block can have that header."""
        word = int.from_bytes(raw[offset + self._at : offset + self._at + 2], "little")
        units, kind = word & (1 << self._bits) - 1, word >> self._bits
        if not 2 <= units <= PAGE // self.size or len(raw) - offset < self.size:
            return None
        return Block(at, tag, units * self.size, kind != 0)


class Sweep:
    """One pass over a guest's RAM that can be interrupted between any two pieces."""

    def __init__(self, memory: GuestMemory, header: PoolHeader, tags: Collection[bytes]) -> None:
        self._memory, self._header = memory, header
        self._tags = frozenset(tags)
        self._regions = data_regions(memory)
        self._pieces = _pieces(self._regions)
        self.blocks: list[Block] = []
        self.bytes_seen = 0
        self.unreadable = 0  # bytes
        self.done = False
        self.overflow = False  # more blocks than a guest can honestly have

    @property
    def bytes_all(self) -> int:
        """How much there is to look at."""
        return sum(region.size for region in self._regions)

    def run(self, expired: Expired) -> list[Block]:
        """Look on until the end or until ``expired``; the blocks found this time. Raises GuestGone."""
        first = len(self.blocks)
        for gpa, size in self._pieces:
            raw = self._memory.readv([(gpa, size)])[0]
            if raw is None:
                raw = self._by_page(gpa, size)
            self.bytes_seen += size
            if raw != (_NOTHING if size == PIECE else _NOTHING[:size]):
                blocks, whole = find_blocks(raw, gpa, self._header, self._tags)
                self.blocks += blocks
                self.overflow |= not whole
            if len(self.blocks) >= MAX_BLOCKS:
                self.overflow = True
                break
            if expired():
                return self.blocks[first:]
        self.done = True
        return self.blocks[first:]

    def _by_page(self, gpa: int, size: int) -> bytes:
        """A piece of which something cannot be read, with zeros there."""
        pages = self._memory.readv([(at, PAGE) for at in range(gpa, gpa + size, PAGE)])
        self.unreadable += PAGE * pages.count(None)
        return b"".join([page or _NOTHING[:PAGE] for page in pages])


def find_blocks(
    raw: bytes, at: int, header: PoolHeader, tags: Collection[bytes], known: Collection[int] = ()
) -> tuple[list[Block], bool]:
    """The blocks in a piece of memory that begins at ``at``, aligned as headers are, in order; and whether all of them.

    Those at ``known`` addresses are left out.

    A guest that writes beginnings of tags everywhere is followed for `MAX_HITS` of them.
    """
    step = header.size
    words = memoryview(raw)[: len(raw) & -step].cast("I")[1 :: step // 4].tobytes()  # PoolTag is at +4
    found: list[Block] = []
    hits = 0
    for needle in [each for each in _NEEDLES if any(each in tag for tag in tags)]:
        place = words.find(needle)
        while place >= 0 and hits < MAX_HITS:
            hits += 1
            index = place // 4
            if at + index * step in known:
                place = words.find(needle, 4 * index + 4)
                continue
            tag = words[4 * index : 4 * index + 3] + bytes((words[4 * index + 3] & 0x7F,))
            if tag in tags:
                block = header.parse(raw, index * step, at + index * step, tag)
                if block is not None:
                    found.append(block)
            place = words.find(needle, 4 * index + 4)
    return sorted(found), hits < MAX_HITS


def data_regions(memory: GuestMemory) -> tuple[Region, ...]:
    """The RAM that was ever written, where the route can tell; else all of it."""
    tell: Callable[[], tuple[Region, ...]] | None = getattr(memory, "data_regions", None)
    return tell() if tell is not None else memory.regions


def _pieces(regions: Iterable[Region]) -> Iterator[tuple[int, int]]:
    """Spans of at most `PIECE` bytes, page by page, aligned so that no header is cut in two."""
    for region in regions:
        end = region.gpa + region.size & -16
        for gpa in range(region.gpa + 15 & -16, end, PIECE):
            yield gpa, min(PIECE, end - gpa)
