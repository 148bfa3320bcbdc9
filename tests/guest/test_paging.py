"""x86-64 page tables, in guests made of bytes."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError, Implausible, UnreadableMemory
from appliance.guest.paging import is_canonical, translate, translate_pages, walk_range
from tests.worlds.tiny import PAGE, ByteMemory

ROOT, SIZE = 0x1000, 64 * PAGE
P, W, U, PS, NX = 1, 2, 4, 0x80, 1 << 63


def tables(entries):
    """RAM with these page-table entries: {(table, index): value}."""
    data = bytearray(SIZE)
    for (table, index), value in entries.items():
        struct.pack_into("<Q", data, table + 8 * index, value)
    return ByteMemory(data)


def chain(levels, *indices, leaf, rights=P | W | U):
    """One path through the tables: the pages after the root, one for each level."""
    entries, table = {}, ROOT
    for number, index in enumerate(indices[:-1]):
        below = ROOT + (number + 1) * PAGE
        entries[table, index] = below | rights
        table = below
    entries[table, indices[-1]] = leaf
    return entries


def address(levels, *indices):
    va = 0
    for number, index in enumerate(indices):
        va |= index << (12 + 9 * (levels - 1 - number))
    top = 11 + 9 * levels
    return va | (-1 << top & (1 << 64) - 1 if va >> top & 1 else 0)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize(("depth", "size"), [(0, 4 << 10), (1, 2 << 20), (2, 1 << 30)])
def test_pages_of_every_size_are_translated(levels, depth, size):
    indices = (3, 511, 7, 2, 9)[: levels - depth]
    gpa = 5 * size
    memory = tables(chain(levels, *indices, leaf=gpa | P | W | U | NX | PS))
    va = address(levels, *indices)
    assert translate(memory, ROOT, va + size - 1, levels) == gpa + size - 1
    assert translate(memory, ROOT, va + size, levels) is None
    assert translate_pages(memory, ROOT | 0xFFF, [va, va + size], levels) == {va: gpa}
    (page,) = walk_range(memory, ROOT, va, va + size, levels)
    assert (page.va, page.gpa, page.size, page.present, page.writable, page.user, page.nx) == (
        va, gpa, size, True, True, True, True,
    )  # fmt: skip


def test_a_large_page_bit_above_1_gib_is_reserved():
    memory = tables({(ROOT, 1): 0x2000 | P | PS})
    assert translate(memory, ROOT, 1 << 39, 4) is None
    assert list(walk_range(memory, ROOT, 0, 1 << 47, 4)) == []


def test_gpa_zero_is_an_address():
    memory = tables(chain(4, 0, 0, 0, 5, leaf=0 | P))
    assert translate(memory, ROOT, 5 * PAGE + 3, 4) == 3
    assert translate(memory, ROOT, 5 * PAGE, 4) == 0


def test_rights_are_those_of_all_levels_together():
    memory = tables(chain(4, 0, 0, 0, 5, leaf=0x9000 | P | W | U, rights=P | U))
    (page,) = walk_range(memory, ROOT, 0, 1 << 47, 4)
    assert (page.writable, page.user, page.nx) == (False, True, False)


def test_nx_of_a_user_entry_in_the_top_level_is_page_table_isolation():
    entries = chain(4, 0, 0, 0, 5, leaf=0x9000 | P | U)
    entries[ROOT, 0] |= NX
    assert [page.nx for page in walk_range(tables(entries), ROOT, 0, 1 << 47, 4)] == [False]
    entries[ROOT + PAGE, 0] |= NX
    assert [page.nx for page in walk_range(tables(entries), ROOT, 0, 1 << 47, 4)] == [True]


def test_a_page_that_is_not_present_keeps_its_entry():
    memory = tables(chain(4, 0, 0, 0, 5, leaf=0x1234_5678_0000))
    (page,) = walk_range(memory, ROOT, 0, 1 << 47, 4)
    assert (page.present, page.gpa, page.raw) == (False, 0, 0x1234_5678_0000)


def test_a_range_begins_and_ends_inside_tables():
    entries = chain(4, 0, 0, 0, 5, leaf=0x9000 | P)
    entries |= {(ROOT + 3 * PAGE, index): index << 12 | P for index in range(512)}
    pages = list(walk_range(tables(entries), ROOT, 7 * PAGE, 11 * PAGE, 4))
    assert [page.va for page in pages] == [number * PAGE for number in range(7, 11)]
    assert list(walk_range(tables(entries), ROOT, 7 * PAGE, 7 * PAGE, 4)) == []


def test_large_and_small_pages_come_in_order():
    entries = chain(4, 0, 0, 1, 0, leaf=0x9000 | P) | {
        (ROOT + 2 * PAGE, 0): P | PS,
        (ROOT + 2 * PAGE, 2): P | PS | 2 << 21,
    }
    assert [page.va for page in walk_range(tables(entries), ROOT, 0, 1 << 47, 4)] == [0, 2 << 20, 4 << 20]


def test_tables_that_point_to_themselves_end():
    memory = tables({(ROOT, index): ROOT | P | W | U for index in range(512)})
    assert translate(memory, ROOT, 0x1234_5000, 4) == ROOT
    count = 0
    with pytest.raises(Implausible, match="page tables"):
        for _ in walk_range(memory, ROOT, 0, 1 << 47, 4):
            count += 1
            if count > 1 << 17:
                raise Implausible("more than any process has page tables")


def test_an_unreadable_root_is_said_and_an_unreadable_table_is_skipped():
    with pytest.raises(UnreadableMemory):
        list(walk_range(tables({}), 1 << 40, 0, 1 << 47, 4))
    memory = tables({(ROOT, 0): 1 << 40 | P, (ROOT, 1): 0x2000 | P, (ROOT + PAGE, 0): P | PS})
    assert [page.va for page in walk_range(memory, ROOT, 0, 1 << 47, 4)] == [1 << 39]


@pytest.mark.parametrize(("levels", "va", "expected"), [
    (4, (1 << 47) - 1, True), (4, 1 << 47, False), (4, 0xFFFF_8000_0000_0000, True), (4, 0xFFFF_7FFF_FFFF_FFFF, False),
    (5, 1 << 47, True), (5, 1 << 56, False), (5, 0xFF00_0000_0000_0000, True), (4, 1 << 64, False), (4, -1, False),
])  # fmt: skip
def test_addresses_that_are_not_canonical_are_not_walked(levels, va, expected):
    assert is_canonical(va, levels) == expected


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(
        st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda page: page << 12 | 7), min_size=8, max_size=64
    ),
    va=st.integers(-1, 2**64),
    levels=st.sampled_from([4, 5]),
)
def test_whatever_tables_hold_a_walk_ends(words, va, levels):
    data = struct.pack(f"<{len(words)}Q", *words)
    memory = ByteMemory((data * (SIZE // len(data) + 1))[:SIZE])
    gpa = translate(memory, ROOT, va, levels)
    assert gpa is None or 0 <= gpa < 1 << 52
    try:
        for number, page in enumerate(walk_range(memory, ROOT, va & -PAGE, (va & -PAGE) + (1 << 30), levels)):
            assert page.gpa < 1 << 52
            if number > 2000:
                break
    except GuestError:
        pass
