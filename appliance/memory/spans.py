"""Checks and shifts a whole batch of addresses at once, as the lanes of one big number.

A batch is packed pairs of 64-bit ``address, size``, so a pair is a lane of 128 bits with the address in its low half.
Adding a constant to every lane, and testing bits of every lane, are then single operations of Python's integers: a few
microseconds for a thousand addresses, where a loop would cost more than the reads themselves.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

from appliance.memory.process import IOV_MAX, is_uniform

_LANE = 16  # bytes
_ONES = int.from_bytes(b"\1".ljust(_LANE, b"\0") * IOV_MAX, "little")


@lru_cache(maxsize=64)
def lanes(value: int, count: int) -> int:
    """``value`` in each of ``count`` lanes, at most IOV_MAX."""
    return value * (_ONES >> (8 * _LANE * (IOV_MAX - count)))


def shift_into(spans: bytes, start: int, length: int, to: int) -> bytes | None:
    """Move all spans from ``[start, start + length)`` to ``to`` on; None if any is not wholly in there.

    The largest size is taken for all of them, so None may also be a false alarm; a move never is.
    """
    moved = []
    for at in range(0, len(spans), _LANE * IOV_MAX):
        part = _shift(spans[at : at + _LANE * IOV_MAX], start, length, to)
        if part is None:
            return None
        moved.append(part)
    return b"".join(moved)


def _shift(spans: bytes, start: int, length: int, to: int) -> bytes | None:
    count = len(spans) // _LANE
    sizes = array("Q", spans)[1::2]
    size = sizes[0] if is_uniform(sizes) else max(sizes)
    if size > length:
        return None
    bits = length.bit_length()
    too_high = lanes((1 << 64) - (1 << bits), count)
    offsets = int.from_bytes(spans, "little") - lanes(start, count)
    # A lane below the start borrows, which sets its upper bits. Then: offset + size - 1 + (2^bits - length) stays below
    # 2^bits exactly if the span ends in time; nothing can carry out of a lane, since both terms are below 2^(bits + 1).
    if offsets & too_high or (offsets + lanes((1 << bits) - length + max(size, 1) - 1, count)) & too_high:
        return None
    return (offsets + lanes(to, count)).to_bytes(len(spans), "little")
