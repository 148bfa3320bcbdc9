"""The memory map of one process: its tree of virtual address descriptors, ``_EPROCESS.VadRoot``.

How the tree is held, the types tell: a pointer to the first node (XP), the right child of the ``BalancedRoot`` of a
``_MM_AVL_TABLE`` (Server 2003 to Windows 8), ``_RTL_AVL_TREE.Root`` since Windows 8.1. The tree is read level by level,
all nodes of a level in one batch. A node that lies outside the range its parents leave it, or that names another
parent, was caught in motion: then we start over, three times at most, and what contradicts itself is counted.
Sources: _MMVAD, _MMVAD_SHORT, _MMVAD_FLAGS, _SUBSECTION, _CONTROL_AREA, _SEGMENT of ntkrnlmp.pdb; enum _MI_VAD_TYPE
(VadType); the kernel's MmProtectToValue: bits 0 to 2 of Protection choose the rights, 3 and 4 no-cache, guard and
write-combine; PAGE_* (winnt.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import Final, NamedTuple

from appliance.errors import UnsupportedGuest
from appliance.guest.windows.files import Files
from appliance.guest.windows.isf import Field
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.record import Record
from appliance.model import Gap

MAX_VADS: Final = 131_072  # of one process
MAX_DEPTH: Final = 64  # a balanced tree of so many is 25 deep
TRIES: Final = 3
PAGE_SHIFT: Final = 12
RIGHTS: Final = (
    "PAGE_NOACCESS",
    "PAGE_READONLY",
    "PAGE_EXECUTE",
    "PAGE_EXECUTE_READ",
    "PAGE_READWRITE",
    "PAGE_WRITECOPY",
    "PAGE_EXECUTE_READWRITE",
    "PAGE_EXECUTE_WRITECOPY",
)
EXTRAS: Final = ("", "PAGE_NOCACHE", "PAGE_GUARD", "PAGE_WRITECOMBINE")
EXECUTE_WRITECOPY: Final = 7
IMAGE_MAP: Final = 2  # _MI_VAD_TYPE.VadImageMap
TYPES: Final = ("none", "physical", "image", "awe", "write-watch", "large-pages", "rotate", "large-page-section")


class VadKind(StrEnum):
    """What lies behind a range of addresses."""

    IMAGE = "image"  # a section of an executable file
    MAPPED = "mapped"  # a section of a data file, or of the page file
    PRIVATE = "private"


class Vad(NamedTuple):
    """One ``_MMVAD``: the range ``[start, end)`` and the protection that it was made with (pages may differ)."""

    va: int
    start: int
    end: int
    protection: str  # PAGE_EXECUTE_READWRITE, PAGE_READWRITE | PAGE_GUARD ...
    private: bool  # PrivateMemory
    kind: VadKind
    path: str | None  # of the file, as the kernel has it; None: there is none, or it cannot be read
    file: int  # _FILE_OBJECT
    control_area: int
    prototypes: int  # FirstPrototypePte: the entry of the page at ``start`` in the shared section
    type: str = "none"  # VadType
    committed: bool = False  # MemCommit: committed as a whole, when it was made
    deleted: bool = False  # the file's name is gone (DeletePending)

    @property
    def executable(self) -> bool:
        """It was made to be run."""
        return "EXECUTE" in self.protection

    @property
    def writable(self) -> bool:
        """It was made to be written to; its own copy of an image's page (WRITECOPY) does not count."""
        return "READWRITE" in self.protection


class MemoryMap(NamedTuple):
    """The ranges of one process in address order."""

    vads: tuple[Vad, ...]
    gaps: tuple[Gap, ...] = ()
    torn: int = 0

    def at(self, address: int) -> Vad | None:
        """The range that an address lies in."""
        low, high = 0, len(self.vads)
        while low < high:
            middle = (low + high) // 2
            if self.vads[middle].end <= address:
                low = middle + 1
            else:
                high = middle
        return self.vads[low] if low < len(self.vads) and self.vads[low].start <= address else None


class _Node(NamedTuple):
    """What the tree says of one range, before the sections behind it are read."""

    va: int
    left: int
    right: int
    parent: int
    start: int
    end: int
    flags: int
    flags1: int


class _Traits(NamedTuple):
    """What the flags of a range say."""

    protection: str
    private: bool
    type: int
    image: bool  # mapped as one, as far as flags tell
    committed: bool


class Vads:
    """Reads memory maps of processes of one guest."""

    def __init__(self, kernel: WindowsKernel, files: Files | None = None) -> None:
        self._kernel = kernel
        self._files = files or Files(kernel, Objects(kernel))
        types = kernel.types
        self._root, self._root_node = _root(kernel)
        short = "_MMVAD_SHORT" if types.has("_MMVAD_SHORT.StartingVpn") else "_MMVAD"
        node = "VadNode." if types.has(f"{short}.VadNode") else ""
        left, right = _children(kernel, short, node)
        parent = next(
            (
                name
                for name in (f"{node}ParentValue", f"{node}u1.Parent", f"{node}Parent")
                if types.has(f"{short}.{name}")
            ),
            "Parent",
        )
        names = (f"{left}", f"{right}", f"{parent}?", "StartingVpn", "EndingVpn", "StartingVpnHigh?", "EndingVpnHigh?")
        self._node = Record(types, short, (*names, "u.LongFlags", "u1.LongFlags1?"))
        self._has_parent = types.has(f"{short}.{parent}")
        self._bits = {name: _bits(kernel, name) for name in ("Protection", "PrivateMemory", "VadType", "MemCommit")}
        self._image_bit = _bits(kernel, "ImageMap")  # until Server 2003
        commit = "_MMVAD_FLAGS1.MemCommit"
        self._commit1 = types.field(commit) if types.has(commit) else None
        fields = [field for field in (*self._bits.values(), self._image_bit) if field is not None]
        self._mask = reduce(or_, map(_mask, fields), 0)
        self._mask1 = _mask(self._commit1) if self._commit1 is not None else 0
        self._traits: dict[tuple[int, int], _Traits] = {}  # very many ranges have the same few flags
        direct = types.has("_MMVAD.ControlArea")
        self._long = Record(types, "_MMVAD", ("ControlArea" if direct else "Subsection", "FirstPrototypePte?"))
        self._subsection = None if direct else Record(types, "_SUBSECTION", ("ControlArea",))
        self._area = Record(types, "_CONTROL_AREA", ("FilePointer", "Segment?", "u.LongFlags?"))
        image = "_MMSECTION_FLAGS.Image"
        self._image_flag = types.field(image) if types.has(image) else None
        self._fast = 15 if kernel.pointer_size == 8 else 7

    def walk(self, process_va: int) -> MemoryMap:
        """The map of the process at an address. Raises UnreadableMemory where not even its root can be read."""
        torn = bad = 0
        nodes: list[_Node] = []
        gaps: list[Gap] = []
        for _ in range(TRIES):
            nodes, gaps, bad = self._walk_tree(process_va)
            if not bad:
                break
            torn += bad
        if bad:
            gaps.append(Gap("memory map", process_va, f"changed {TRIES} times while read: {bad} entries contradict it"))
        nodes.sort(key=lambda each: each.start)
        vads = tuple(self._describe(nodes))
        if nameless := sum(vad.kind is VadKind.IMAGE and vad.path is None for vad in vads):
            gaps.append(Gap("memory map", process_va, f"the names of the files of {nameless} images cannot be read"))
        return MemoryMap(vads, tuple(gaps), torn)

    def find(self, process_va: int, address: int) -> Vad | None:
        """The range that an address lies in now, by the way to it from the root. Raises UnreadableMemory."""
        space, kernel = self._kernel.space, self._kernel
        va = space.pointer(process_va + self._root)
        for _ in range(MAX_DEPTH):
            if not kernel.is_kernel(va) or va % kernel.pointer_size:
                break
            node = self._parse(va, space.read(*self._node.span(va)))
            if node.start <= address < node.end:
                return self._describe([node])[0]
            va = node.left if address < node.start else node.right
        return None

    def _walk_tree(self, process_va: int) -> tuple[list[_Node], list[Gap], int]:
        """All nodes; what is missing of them, and how many contradicted the tree."""
        space, kernel = self._kernel.space, self._kernel
        root = space.pointer(process_va + self._root)
        # (node, its parent, the range that is left to it)
        level = [(root, self._root_node + process_va if self._root_node else 0, 0, 1 << 64)] if root else []
        found: list[_Node] = []
        seen: set[int] = set()
        bad = 0
        for _ in range(MAX_DEPTH):
            usable = []
            for each in level:
                va = each[0]
                if va in seen or not kernel.is_kernel(va) or va % kernel.pointer_size:
                    bad += 1
                else:
                    seen.add(va)
                    usable.append(each)
            following = []
            raws = space.readv([self._node.span(va) for va, *_ in usable])
            for (va, parent, low, high), raw in zip(usable, raws, strict=True):
                node = self._parse(va, raw) if raw is not None else None
                if node is None or not low <= node.start < node.end <= high:
                    bad += 1
                    continue
                if self._has_parent and parent and node.parent and node.parent != parent:
                    bad += 1
                    continue
                found.append(node)
                following += [(node.left, va, low, node.start)] * (node.left != 0)
                following += [(node.right, va, node.end, high)] * (node.right != 0)
            if len(found) > MAX_VADS:
                return found[:MAX_VADS], [Gap("memory map", process_va, f"more than {MAX_VADS} ranges")], bad
            level = following
            if not level:
                return found, [], bad
        return found, [Gap("memory map", process_va, f"a tree deeper than {MAX_DEPTH} levels")], bad

    def _parse(self, va: int, raw: bytes) -> _Node:
        left, right, parent, first, last, first_high, last_high, flags, flags1 = self._node.parse(raw)
        start = (first | first_high << 32) << PAGE_SHIFT
        end = ((last | last_high << 32) + 1) << PAGE_SHIFT
        return _Node(va, left, right, parent & ~3, start, end, flags, flags1)

    def _describe(self, nodes: Sequence[_Node]) -> list[Vad]:
        """The ranges with the sections and files behind them: one batch for each pointer on the way."""
        space, kernel = self._kernel.space, self._kernel
        told = [self._traits_of(node) for node in nodes]
        mapped = [node for node, traits in zip(nodes, told, strict=True) if not traits.private]
        sections: dict[int, tuple[int, int]] = {}
        raws = space.readv([self._long.span(node.va) for node in mapped])
        for node, raw in zip(mapped, raws, strict=True):
            if raw is not None:
                sections[node.va] = self._long.parse(raw)
        subsections = {section for section, _ in sections.values() if kernel.is_kernel(section)}
        areas = self._areas(subsections)
        details = self._read_areas(set(areas.values()))
        files = self._files.read({file for file, _ in details.values()})
        found = []
        for node, traits in zip(nodes, told, strict=True):
            if traits.private:
                name, committed = TYPES[traits.type], traits.committed
                place = node.va, node.start, node.end
                found.append(Vad(*place, traits.protection, True, VadKind.PRIVATE, None, 0, 0, 0, name, committed))
                continue
            section, prototypes = sections.get(node.va, (0, 0))
            area = areas.get(section, 0)
            file, image = details.get(area, (0, False))
            opened = files.get(file)
            found.append(
                Vad(
                    node.va,
                    node.start,
                    node.end,
                    traits.protection,
                    False,
                    VadKind.IMAGE if traits.image or image else VadKind.MAPPED,
                    opened.path if opened is not None else None,
                    file if opened is not None else 0,
                    area,
                    prototypes if kernel.is_kernel(prototypes) else 0,
                    TYPES[traits.type],
                    traits.committed,
                    opened is not None and opened.delete_pending,
                )
            )
        return found

    def _areas(self, sections: set[int]) -> dict[int, int]:
        """The control area of each subsection; before Vista a VAD names it itself."""
        if self._subsection is None:
            return {section: section for section in sections}
        wanted = list(sections)
        raws = self._kernel.space.readv([self._subsection.span(va) for va in wanted])
        areas = {va: self._subsection.parse(raw)[0] for va, raw in zip(wanted, raws, strict=True) if raw is not None}
        return {va: area for va, area in areas.items() if self._kernel.is_kernel(area)}

    def _read_areas(self, areas: set[int]) -> dict[int, tuple[int, bool]]:
        """Of each control area the file object, and whether it is a section of an image."""
        wanted = list(areas)
        found = {}
        for va, raw in zip(wanted, self._kernel.space.readv([self._area.span(va) for va in wanted]), strict=True):
            if raw is not None:
                file, _, flags = self._area.parse(raw)
                found[va] = file & ~self._fast, self._image_flag is not None and _take(flags, self._image_flag) == 1
        return found

    def _traits_of(self, node: _Node) -> _Traits:
        key = node.flags & self._mask, node.flags1 & self._mask1
        found = self._traits.get(key)
        if found is None:
            found = self._traits[key] = self._read_traits(*key)
        return found

    def _read_traits(self, flags: int, flags1: int) -> _Traits:
        value = {name: _take(flags, field) if field is not None else 0 for name, field in self._bits.items()}
        image = value["VadType"] == IMAGE_MAP
        if self._image_bit is not None:
            image = image or _take(flags, self._image_bit) == 1
        elif self._image_flag is None and self._bits["VadType"] is None:
            image = value["Protection"] == EXECUTE_WRITECOPY  # as every image is mapped
        committed = _take(flags1, self._commit1) if self._commit1 is not None else value["MemCommit"]
        protection, private = protection_name(value["Protection"]), value["PrivateMemory"] == 1
        return _Traits(protection, private, value["VadType"] & 7, image, committed == 1)


def protection_name(value: int) -> str:
    """What the five bits of ``Protection`` stand for. Protection 0 with any of the other bits is no access."""
    rights, extra = RIGHTS[value & 7], EXTRAS[value >> 3 & 3]
    return f"{rights} | {extra}" if extra and value & 7 else rights


def _take(number: int, field: Field) -> int:
    """A bit-field's value, of a number that begins where the structure does that holds it."""
    return (number & _mask(field)) >> 8 * field.offset + field.bit_position


def _mask(field: Field) -> int:
    return (1 << field.bit_length) - 1 << 8 * field.offset + field.bit_position


def _bits(kernel: WindowsKernel, name: str) -> Field | None:
    path = f"_MMVAD_FLAGS.{name}"
    return kernel.types.field(path) if kernel.types.has(path) else None


def _root(kernel: WindowsKernel) -> tuple[int, int]:
    """Where ``_EPROCESS`` has the pointer to the first node, and where the node is that this one calls its parent."""
    types, base = kernel.types, kernel.types.offset("_EPROCESS.VadRoot")
    if types.has("_EPROCESS.VadRoot.Root"):
        return types.offset("_EPROCESS.VadRoot.Root"), 0
    for name in ("RightChild", "Right"):
        if types.has(f"_EPROCESS.VadRoot.BalancedRoot.{name}"):
            return types.offset(f"_EPROCESS.VadRoot.BalancedRoot.{name}"), base
    return base, 0


def _children(kernel: WindowsKernel, short: str, node: str) -> tuple[str, str]:
    for left, right in (("Left", "Right"), ("LeftChild", "RightChild")):
        if kernel.types.has(f"{short}.{node}{left}"):
            return f"{node}{left}", f"{node}{right}"
    raise UnsupportedGuest((f"the children of a node of the VAD tree ({short}.{node}Left)",))
