"""Virtual memory of a Windows guest, over page tables written by hand in all four modes."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError, OutOfTime, UnreadableMemory
from appliance.guest import paging
from appliance.guest.windows.space import READ_LIMIT, AddressSpace, Mode
from tests.worlds.tiny import ByteMemory

PAGE = 4096
ROOT = 0x1000
P, W, U, A, D, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PROTOTYPE, TRANSITION = 1 << 10, 1 << 11
SHIFTS = {
    Mode.LEGACY: ((22, 1023), (12, 1023)),
    Mode.PAE: ((30, 3), (21, 511), (12, 511)),
    Mode.LONG4: ((39, 511), (30, 511), (21, 511), (12, 511)),
    Mode.LONG5: ((48, 511), (39, 511), (30, 511), (21, 511), (12, 511)),
}
KERNEL = {Mode.LEGACY: 0x80400000, Mode.PAE: 0x80600000, Mode.LONG4: 0xFFFFF80312400000, Mode.LONG5: 0xFF11000012400000}
MODES = list(Mode)


class Tables:
    """A megabyte of RAM with page tables that grow from `ROOT` on."""

    def __init__(self, mode, size=1 << 20):
        self.mode, self.data, self.free = mode, bytearray(size), ROOT + PAGE
        self.entry_size = 4 if mode is Mode.LEGACY else 8

    def map(self, va, entry, *, depth=None):
        """Let an address have this very entry; at a lower depth it is a large page's."""
        table = ROOT
        levels = SHIFTS[self.mode]
        depth = len(levels) - 1 if depth is None else depth
        for shift, mask in levels[:depth]:
            at = table + self.entry_size * (va >> shift & mask)
            below = self.get(at) & ~0xFFF
            if not below:
                below, self.free = self.free, self.free + PAGE
                self.put(at, below | (P if self.mode is Mode.PAE and shift == 30 else P | W | U))
            table = below
        shift, mask = levels[depth]
        self.put(table + self.entry_size * (va >> shift & mask), entry)

    def put(self, at, value):
        self.data[at : at + self.entry_size] = value.to_bytes(self.entry_size, "little")

    def get(self, at):
        return int.from_bytes(self.data[at : at + self.entry_size], "little")

    def fill(self, gpa, data):
        self.data[gpa : gpa + len(data)] = data

    def space(self, holes=()):
        return AddressSpace(ByteMemory(self.data, holes), ROOT, self.mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_read_may_cross_pages_that_lie_apart(mode):
    tables = Tables(mode)
    va = KERNEL[mode]
    tables.map(va, 0x80000 | P | W)
    tables.map(va + PAGE, 0x40000 | P | W)
    tables.fill(0x80FFC, b"abcd")
    tables.fill(0x40000, b"efgh\0")
    space = tables.space()
    assert space.read(va + 0xFFC, 8) == b"abcdefgh"
    assert space.readv([(va + 0xFFE, 4), (va, 0), (va + 2 * PAGE, 1), (va + 0xFFC, 4)]) == [b"cdef", b"", None, b"abcd"]
    assert space.read_text(va + 0xFFC, 20) == b"abcdefgh"
    assert space.to_gpa(va + PAGE + 5) == 0x40005
    assert space.u32(va + PAGE) == 0x68676665
    assert space.pointer(va + 0xFFC) == int.from_bytes(b"abcdefgh"[: space.pointer_size], "little")
    with pytest.raises(UnreadableMemory):
        space.read(va + 0x1FFC, 8)


@pytest.mark.parametrize(
    ("mode", "depth", "size"),
    [
        (Mode.LEGACY, 0, 4 << 20),
        (Mode.PAE, 1, 2 << 20),
        (Mode.LONG4, 2, 2 << 20),
        (Mode.LONG4, 1, 1 << 30),
        (Mode.LONG5, 3, 2 << 20),
    ],
)
def test_large_pages_are_read_anywhere_within(mode, depth, size):
    tables = Tables(mode, 4 << 20)
    va = 0x80000000 if mode.pointer_size == 4 else 0xFFFFF80040000000
    tables.map(va, P | W | LARGE, depth=depth)
    where = 0x345678 if size > 2 << 20 else 0x145678
    tables.fill(where, b"deep inside")
    space = tables.space()
    assert space.read(va + where, 11) == b"deep inside"
    leaf = next(space.walk_pages(va, va + PAGE))
    assert (leaf.va, leaf.gpa, leaf.size, leaf.present) == (va, 0, size, True)


def test_a_large_page_without_pae_may_lie_above_4_gib():
    tables = Tables(Mode.LEGACY)
    tables.map(0x80000000, 0x00C00000 | 0x5 << 13 | P | LARGE, depth=0)
    assert tables.space().to_gpa(0x80012345) == 0x500C12345


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("high", [0, 1 << 45, 1 << 39], ids=["plain", "swizzled", "swizzled for 40 bits"])
def test_a_page_in_transition_is_read_and_what_is_paged_out_is_not(mode, high):
    tables = Tables(mode)
    va = 0x10000
    swizzle = high if mode is not Mode.LEGACY else 0
    tables.map(va, 0x80000 | 4 << 5 | TRANSITION | swizzle)
    tables.map(va + PAGE, 0x81000 | TRANSITION | PROTOTYPE)
    tables.map(va + 2 * PAGE, 0x82000 | 4 << 5)
    tables.fill(0x80000, b"trimmed")
    space = tables.space()
    assert space.read(va, 7) == b"trimmed"
    assert space.readv([(va + PAGE, 1), (va + 2 * PAGE, 1)]) == [None, None]
    first, second, third = space.walk_pages(va, va + 8 * PAGE)
    assert (first.present, first.gpa, first.writable, first.nx) == (False, 0x80000, True, True)
    assert (second.present, second.gpa, third.gpa) == (False, 0, 0)


def test_a_page_table_in_transition_is_followed():
    tables = Tables(Mode.LONG4)
    va = 0x7FF612340000
    tables.map(va, 0x80000 | P | U)
    entry_at = 0x3000 + 8 * (va >> 21 & 511)
    entry = tables.get(entry_at)
    assert entry & P
    tables.put(entry_at, entry & ~P | TRANSITION)
    assert tables.space().to_gpa(va) == 0x80000
    assert [leaf.gpa for leaf in tables.space().walk_pages(va, va + PAGE)] == [0x80000]


@pytest.mark.parametrize("mode", [Mode.LONG4, Mode.LONG5])
def test_addresses_that_are_not_canonical_are_not_mapped(mode):
    tables = Tables(mode)
    tables.map(0, 0x80000 | P)
    space = tables.space()
    beyond = 1 << mode.bits
    assert space.to_gpa(0) == 0x80000
    assert [space.to_gpa(va) for va in (beyond, 1 << 63, (1 << 64) + 8, -PAGE, beyond >> 1)] == [None] * 5
    assert list(space.walk_pages(beyond, beyond + PAGE)) == []
    assert space.readv([((1 << 64) - 4, 8), (-8, 4), (0, -1), (0, READ_LIMIT + 1)]) == [None] * 4


@pytest.mark.parametrize("mode", [Mode.LEGACY, Mode.PAE])
def test_x86_ends_at_4_gib(mode):
    tables = Tables(mode)
    tables.map(0xFFFFF000, 0x80000 | P)
    space = tables.space()
    assert space.to_gpa(0xFFFFFFFF) == 0x80FFF
    assert space.readv([(0xFFFFFFFC, 4), (0xFFFFFFFC, 8), (0x1FFFFFFFC, 4)])[1:] == [None, None]


def test_what_was_translated_is_remembered_until_it_is_forgotten():
    tables = Tables(Mode.LONG4)
    tables.map(KERNEL[Mode.LONG4], 0x80000 | P)
    space = tables.space()
    assert space.read(KERNEL[Mode.LONG4], 1) == b"\0"
    space.memory.data[ROOT : ROOT + 0x8000] = bytes(0x8000)
    assert space.read(KERNEL[Mode.LONG4], 1) == b"\0"
    space.forget()
    with pytest.raises(UnreadableMemory):
        space.read(KERNEL[Mode.LONG4], 1)


def test_rights_are_those_of_all_levels_together():
    tables = Tables(Mode.LONG4)
    va = 0x7FF612340000
    tables.map(va, 0x80000 | P | W | U | A | D | NX)
    tables.map(va + PAGE, 0x81000 | P | U)
    tables.put(ROOT + 8 * (va >> 39 & 511), tables.get(ROOT + 8 * (va >> 39 & 511)) | NX)  # KVA shadow
    first, second = tables.space().walk_pages(va, va + (1 << 21))
    assert (first.writable, first.user, first.nx, first.accessed, first.dirty) == (True, True, True, True, True)
    assert (second.writable, second.user, second.nx, second.accessed) == (False, True, False, False)
    tables.put(0x2000 + 8 * (va >> 30 & 511), tables.get(0x2000 + 8 * (va >> 30 & 511)) & ~W | NX)
    assert [(leaf.writable, leaf.nx) for leaf in tables.space().walk_pages(va, va + PAGE)] == [(False, True)]


@pytest.mark.parametrize("mode", MODES)
def test_pages_are_walked_in_order_and_only_those_asked_for(mode):
    tables = Tables(mode)
    start = 0x70000000
    wanted = [start + at for at in (0, PAGE, 0x1FF000, 0x200000, 0x400000, 0x40000000 - 0x70000000 % 0x40000000)]
    for number, va in enumerate(wanted):
        tables.map(va, (0x80000 + number * PAGE) | P)
    leaves = list(tables.space().walk_pages(0, 0x80001000))
    assert [leaf.va for leaf in leaves] == sorted(wanted)
    assert [leaf.gpa for leaf in leaves] == [tables.space().to_gpa(leaf.va) for leaf in leaves]
    assert [leaf.va for leaf in tables.space().walk_pages(wanted[1], wanted[3])] == wanted[1:3]


def test_within_a_limit_reads_end_in_time_also_those_of_other_processes():
    now = [0.0]
    tables = Tables(Mode.LONG4)
    tables.map(KERNEL[Mode.LONG4], 0x80000 | P)
    space = tables.space()
    other = space.other(ROOT)
    with space.limit(1.0, lambda: now[0]):
        assert other.read(KERNEL[Mode.LONG4], 1) == b"\0"
        now[0] = 2.0
        for act in (lambda: other.read(KERNEL[Mode.LONG4], 1), lambda: space.readv([(KERNEL[Mode.LONG4], 1)])):
            with pytest.raises(OutOfTime):
                act()
    assert other.read(KERNEL[Mode.LONG4], 1) == b"\0"


def test_a_limit_within_a_limit_cannot_last_longer():
    now = [0.0]
    space = Tables(Mode.LONG4).space()
    with space.limit(1.0, lambda: now[0]):
        clock = space._deadline.clock
        with space.limit(100.0, clock):
            now[0] = 50.0
            with pytest.raises(OutOfTime):
                space.readv([(0, 1)])
    assert space._deadline.until == math.inf


def test_an_unreadable_root_is_said_by_a_walk_and_maps_nothing():
    tables = Tables(Mode.LONG4)
    tables.map(KERNEL[Mode.LONG4], 0x80000 | P)
    space = tables.space(holes=(ROOT // PAGE,))
    assert space.to_gpa(KERNEL[Mode.LONG4]) is None
    with pytest.raises(UnreadableMemory):
        list(space.walk_pages(0, 1 << 40))


@pytest.mark.parametrize(
    ("cr0", "cr4", "long_mode", "mode"),
    [
        (0x80050033, 0x6F8, True, Mode.LONG4),
        (0x80050033, 0x16F8, True, Mode.LONG5),
        (0x8001003B, 0x6F8, False, Mode.PAE),
        (0x8001003B, 0x6D8, False, Mode.LEGACY),
        (0x11, 0, False, None),
    ],
)
def test_control_registers_tell_the_mode(cr0, cr4, long_mode, mode):
    assert Mode.of(cr0, cr4, long_mode=long_mode) is mode


def test_a_root_is_cleared_of_its_flags():
    assert Mode.LONG4.root(0x80000000001AD002) == 0x1AD000
    assert Mode.PAE.root(0x33F2E8) == 0x33F2E0
    assert Mode.LEGACY.root(0x39018) == 0x39000


@settings(max_examples=150, deadline=None)
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_whatever_the_tables_say_single_reads_and_batches_agree(data, mode):
    """Eight pages of RAM, all of them tables of likely entries: everything may lead anywhere, and in circles."""
    size = 4 if mode is Mode.LEGACY else 8
    flags = st.sampled_from(
        [0, P, P | W | U, P | LARGE, TRANSITION, TRANSITION | PROTOTYPE, P | NX if size == 8 else P]
    )
    entry = st.builds(lambda page, flag: page * PAGE | flag, st.integers(0, 9), flags)
    entries = data.draw(st.lists(entry, min_size=8, max_size=8))
    code = "Q" if size == 8 else "I"
    page = struct.pack(f"<8{code}", *entries) * (PAGE // size // 8)
    space = AddressSpace(ByteMemory(page * 8), 0x3000, mode)
    reach = data.draw(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 9000)), max_size=6))
    spans = [(va & 0xFFFFFFFF if size == 4 else va, length) for va, length in reach]
    spans += [(va & 0x7FFFFFFFFFFF, length) for va, length in spans]
    together = space.readv(spans)
    for (va, length), found in zip(spans, together, strict=True):
        fresh = AddressSpace(ByteMemory(page * 8), 0x3000, mode)
        try:
            assert fresh.read(va, length) == found
        except UnreadableMemory:
            assert found is None
        if found is not None and length and mode in (Mode.LONG4, Mode.LONG5) and TRANSITION not in map(_kind, entries):
            gpa = paging.translate(space.memory, 0x3000, va, 4 if mode is Mode.LONG4 else 5)
            assert gpa == fresh.to_gpa(va)
    now = iter(range(10**9))
    try:
        with space.limit(200, lambda: next(now)):
            for count, leaf in enumerate(space.walk_pages(0, 1 << 40 if size == 8 else 1 << 32)):
                if leaf.present and leaf.size == PAGE:
                    assert space.to_gpa(leaf.va) == leaf.gpa
                if count > 200:
                    break
    except GuestError:
        pass


def _kind(entry):
    return entry & TRANSITION if not entry & P else 0
