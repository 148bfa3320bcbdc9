"""One node of a maple tree, from its bytes: the ranges it speaks of and what each one holds.

A node is 256 bytes: a parent, pivots (the last index of each slot, inclusive) and slots. A pointer to a node carries
the node's type in bits 3 to 6. Sources: include/linux/maple_tree.h, lib/maple_tree.c (mt_mk_node, mte_node_type).
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from appliance.errors import Implausible
from appliance.guest.kernel import Field
from appliance.guest.linux.injection_facts import PAGE

NODE_SIZE: Final = 256  # struct maple_node
LEAF_64, RANGE_64, ARANGE_64 = 1, 2, 3  # enum maple_type


class Range(NamedTuple):
    """One slot of a maple node: what lies in ``[low, high]``."""

    low: int
    high: int
    entry: int


class NodeShape(NamedTuple):
    """Where a type of maple node keeps its pivots and slots."""

    pivots: Struct
    pivot: int
    slots: Struct
    slot: int

    @classmethod
    def make(cls, pivot: Field, slot: Field) -> NodeShape:
        """From the kernel's types. Raises Implausible when they do not fit a node."""
        pivots, slots = pivot.length or pivot.size // 8, slot.length or slot.size // 8
        end = max(pivot.offset + 8 * pivots, slot.offset + 8 * slots)
        if not 0 < pivots < slots or end > NODE_SIZE:
            raise Implausible(f"a maple node of {slots} slots at {slot.offset} and {pivots} pivots at {pivot.offset}")
        return cls(Struct(f"<{pivots}Q"), pivot.offset, Struct(f"<{slots}Q"), slot.offset)


def parse_node(raw: bytes, shape: NodeShape, low: int, high: int) -> list[Range]:
    """The ranges of a node that covers ``[low, high]``: a slot ends at its pivot, the last one at the node's own end.

    Empty slots are left out. Raises Implausible when the pivots do not rise within the node.
    """
    pivots = shape.pivots.unpack_from(raw, shape.pivot)
    slots = shape.slots.unpack_from(raw, shape.slot)
    found = []
    for number, entry in enumerate(slots):
        end = pivots[number] if number < len(pivots) else high
        if end == 0 and number:  # unused: the slot before it would have ended the node, so this one does
            end = high
        if not low <= end <= high:
            raise Implausible(f"a maple node whose slot {number} ends at {end:#x}, outside {low:#x}-{high:#x}")
        if (entry and entry & 3 != 2) or is_node(entry):  # neither empty nor reserved (XA_ZERO_ENTRY)
            found.append(Range(low, end, entry))
        if end == high:
            break
        low = end + 1
    return found


def is_node(entry: int) -> bool:
    """Whether the root is a node, and not an only entry (xa_is_node, include/linux/xarray.h; mte_mk_root)."""
    return entry & 3 == 2 and entry > PAGE
