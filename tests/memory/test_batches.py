"""Reads that are joined, and what is no RAM."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.memory.batches import Ram, gather
from appliance.model import Region

HOLED = Ram([Region(0x1000, 0x3000), Region(0x4000, 0x1000), Region(0x8000, 0x2000)])
CONTENT = bytes(position * 7 % 251 for position in range(0xA000))
spans = st.lists(st.tuples(st.integers(-0x100, 0xB000), st.integers(0, 0x1800)), max_size=30)


def test_regions_that_touch_are_one_and_empty_ones_are_none():
    assert HOLED.regions == (Region(0x1000, 0x4000), Region(0x8000, 0x2000))
    assert Ram([Region(0x5000, -0x1000), Region(0x5000, 0)]).regions == ()


def test_a_span_is_ram_only_where_all_of_it_is():
    assert HOLED.holds(0x1000, 0x4000)
    assert not HOLED.holds(0x1000, 0x4001)
    assert not HOLED.holds(0x0FFF, 2)
    assert not HOLED.holds(0x6000, 0)
    assert not HOLED.holds(0x2000, -1)


def test_neighbours_are_read_together_and_strangers_are_not():
    wanted = [(0x8000, 8), (0x1000, 8), (0x1010, 8), (0x3000, 8)]
    reads = list(HOLED.plan(wanted, gap=0x100, limit=0x1000))
    assert [(read.gpa, read.size, read.serves) for read in reads] == [
        (0x1000, 0x18, (1, 2)),
        (0x3000, 8, (3,)),
        (0x8000, 8, (0,)),
    ]


@given(spans, st.integers(0, 0x2000), st.integers(1, 0x4000))
def test_each_span_gets_its_own_bytes_and_nothing_else_is_read(wanted, gap, limit):
    asked = []

    def fetch(gpa, size):
        asked.append((gpa, size))
        return CONTENT[gpa : gpa + size]

    found = gather(HOLED.plan(wanted, gap=gap, limit=limit), wanted, fetch)
    for (gpa, size), data in zip(wanted, found, strict=True):
        assert data == (CONTENT[gpa : gpa + size] if HOLED.holds(gpa, size) else None)
    assert all(HOLED.holds(gpa, size) for gpa, size in asked)
    assert all(size <= max(limit, *(size for _, size in wanted)) for _, size in asked)


def test_what_cannot_be_fetched_is_none():
    assert gather(HOLED.plan([(0x1000, 8)], gap=0, limit=8), [(0x1000, 8)], lambda *_: None) == [None]
