"""One structure's chosen members as one read and one precompiled `struct.Struct`.

Reading the span from the first to the last wanted member costs as much as reading one member, so a walk reads records.
Members of 1, 2, 4 and 8 bytes are little-endian unsigned numbers; all others stay bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.isf import SymbolTable

CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Record:
    """Members of one structure, in the order asked for.

    A path that ends in ``?`` may be missing from the types; it then reads as 0. One that ends in ``[0]`` is the first
    element of an array. The same bytes may be asked for twice.
    ``low`` and ``size`` are the span to read, relative to the object; ``parse`` takes exactly that span.
    """

    __slots__ = ("low", "parse", "size")

    def __init__(self, types: SymbolTable, name: str, members: Sequence[str]) -> None:
        """Compile; raises UnsupportedGuest naming a member that the types lack or that overlaps another one."""
        wanted: list[tuple[int, int] | None] = []
        for member in members:
            first = member.endswith("[0]")
            path = f"{name}.{member.removesuffix('[0]').rstrip('?')}"
            known = not member.endswith("?") or types.has(path)
            field = types.field(path) if known else None
            size = 0 if field is None else field.size // (field.length or 1) if first else field.size
            wanted.append((field.offset, size) if field is not None and size else None)
        slots = sorted({slot for slot in wanted if slot is not None})
        if not slots:
            raise UnsupportedGuest((f"type information of {name}",))
        self.low = end = slots[0][0]
        code = "<"
        for offset, size in slots:
            if offset < end:
                raise UnsupportedGuest((f"plausible type information of {name} (members overlap at {offset:#x})",))
            code += f"{offset - end}x" * (offset > end) + CODES.get(size, f"{size}s")
            end = offset + size
        self.size = end - self.low
        order = [len(slots) if slot is None else slots.index(slot) for slot in wanted]
        self.parse = _parser(struct.Struct(code).unpack, order)

    def span(self, va: int) -> tuple[int, int]:
        """The span to read for the object at ``va``."""
        return va + self.low, self.size


def _parser(unpack: Callable[[bytes], tuple[Any, ...]], order: list[int]) -> Callable[[bytes], tuple[Any, ...]]:
    """A function from bytes to the members in order; what the types lack is the 0 behind the last one."""
    if len(order) == 1:
        first = order[0]
        return lambda raw: ((*unpack(raw), 0)[first],)
    pick = itemgetter(*order)
    return lambda raw: pick((*unpack(raw), 0))
