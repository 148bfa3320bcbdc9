"""One structure's chosen members as one read and one precompiled `struct.Struct`.

Reading the span between the first and the last wanted member costs the same as reading one member, so every walk reads
whole records. All members are little-endian and unsigned; members of odd width (``comm``, ``in6_addr``) stay bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from appliance.errors import UnsupportedGuest
from appliance.guest.layout import Field

CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
KERNEL_HALF = 0xFF00_0000_0000_0000  # Documentation/arch/x86/x86_64/mm.rst: the kernel half, 5-level paging included
LAST_POINTER = 0xFFFF_FFFF_FFFF_F000  # the last page holds ERR_PTR values (include/linux/err.h, MAX_ERRNO)


def is_object(va: int) -> bool:
    """Whether a value can be the address of a kernel object: in the kernel half, 8-byte aligned, no ERR_PTR."""
    return KERNEL_HALF <= va < LAST_POINTER and not va & 7


class Record:
    """Members of one C structure: where they lie and how their bytes become a tuple in the order asked for.

    A member given as None does not exist in this kernel and reads as 0. ``low`` and ``size`` are the span to read,
    relative to the object; ``parse`` takes exactly that span.
    """

    __slots__ = ("low", "parse", "size")

    def __init__(self, name: str, fields: Sequence[Field | None]) -> None:
        """Compile; raises UnsupportedGuest when the members contradict each other."""
        slots = sorted({(field.offset, field.size) for field in fields if field is not None})
        if not slots:
            raise UnsupportedGuest((f"type information of {name}",))
        self.low = slots[0][0]
        code, end = "<", self.low
        for offset, size in slots:
            if offset < end:
                raise UnsupportedGuest((f"plausible type information of {name} (members overlap at {offset:#x})",))
            code += f"{offset - end}x" * (offset > end) + CODES.get(size, f"{size}s")
            end = offset + size
        self.size = end - self.low
        order = [len(slots) if field is None else slots.index((field.offset, field.size)) for field in fields]
        self.parse = _parser(struct.Struct(code).unpack, order, None in fields)

    def span(self, va: int) -> tuple[int, int]:
        """The span to read for the object at ``va``."""
        return va + self.low, self.size


def _parser(
    unpack: Callable[[bytes], tuple[Any, ...]], order: list[int], incomplete: bool
) -> Callable[[bytes], tuple[Any, ...]]:
    if len(order) == 1:
        return unpack
    pick = itemgetter(*order)
    if incomplete:
        return lambda raw: pick((*unpack(raw), 0))
    return lambda raw: pick(unpack(raw))
