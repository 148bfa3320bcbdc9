"""Whole batches of addresses, checked and shifted as one number."""

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.memory.process import pack
from appliance.memory.spans import shift_into

NUMBERS = st.integers(0, 2**64 - 1)


@st.composite
def cases(draw):
    start = draw(st.integers(0, 2**64 - 2))
    length = draw(st.integers(1, min(2**46, 2**64 - start)))
    near = st.sampled_from([start, start + length]).flatmap(lambda edge: st.integers(edge - 9, edge + 9))
    inside = st.integers(start, start + length - 1)
    address = (inside | near if draw(st.booleans()) else inside | near | NUMBERS).filter(lambda n: 0 <= n < 2**64)
    size = st.integers(0, 16) if draw(st.booleans()) else st.integers(0, 16) | NUMBERS
    return start, length, draw(st.integers(0, 2**47)), draw(st.lists(st.tuples(address, size), min_size=1, max_size=20))


@settings(max_examples=500, deadline=None)
@given(cases(), st.sampled_from([1, 300]))
def test_a_batch_is_moved_only_if_every_span_lies_in_the_range(case, times):
    start, length, to, spans = case
    spans = spans * times
    moved = shift_into(pack(spans, len(spans)), start, length, to)
    # One size, the largest, is taken for all; an empty span must begin before the end.
    largest = max(1, *(size for _, size in spans))
    fits = all(start <= at and at + largest <= start + length for at, _ in spans)
    assert moved == (pack([(at - start + to, size) for at, size in spans], len(spans)) if fits else None)


def test_no_spans_stay_no_spans():
    assert shift_into(b"", 0, 1, 0) == b""
