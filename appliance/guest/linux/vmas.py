"""The memory map of one process: its VMAs in address order, as /proc/PID/maps lists them.

Kernels from 6.1 on keep them in a maple tree (lib/maple_tree.c), older ones in a list (``mm_struct.mmap``,
``vm_area_struct.vm_next``); which one it is, the kernel's own types tell. The tree is read level by level, all nodes of
a level in one batch. A running guest rebuilds nodes under us: a removed node has itself as its parent (ma_dead_node),
and a VMA that disagrees with the range the tree gives it was caught in motion; then we start over, three times at most.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.errors import GuestError, Implausible, UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_facts import (
    PAGE,
    VM_EXEC,
    VM_GROWSDOWN,
    VM_MAYSHARE,
    VM_READ,
    VM_WRITE,
    InjectionFacts,
)
from appliance.guest.linux.injection_maple import (
    ARANGE_64,
    LEAF_64,
    NODE_SIZE,
    RANGE_64,
    NodeShape,
    Range,
    is_node,
    parse_node,
)
from appliance.guest.linux.record import is_object
from appliance.model import Gap

MAX_VMAS: Final = 65_536  # include/linux/mm.h: DEFAULT_MAX_MAP_COUNT is 65,530
MAX_NODES: Final = 16_384  # a full tree of MAX_VMAS half-filled leaves has about 9,400
MAX_DEPTH: Final = 12  # such a tree is 6 deep
TRIES: Final = 3
ULONG_MAX: Final = (1 << 64) - 1
USER_END: Final = 1 << 56  # TASK_SIZE_MAX with 5-level paging (arch/x86/include/asm/page_64_types.h)
NAME_LIMIT: Final = 80  # include/linux/mm.h: ANON_VMA_NAME_MAX_LEN


class Vma(NamedTuple):
    """One ``vm_area_struct``. ``file`` is its ``struct file``; where that is 0, ``label`` is what maps shows."""

    start: int
    end: int
    flags: int
    page_offset: int  # of its start in the file, in pages
    file: int
    label: str = ""  # [heap], [stack], [vdso], [anon:...] or nothing
    special: bool = False  # made by the kernel itself: vdso, vvar, uprobes

    @property
    def executable(self) -> bool:
        """Its pages may be run."""
        return bool(self.flags & VM_EXEC)

    @property
    def protection(self) -> str:
        """As maps prints it: ``r-xp``."""
        bits = zip((VM_READ, VM_WRITE, VM_EXEC), "rwx", strict=True)
        return "".join(c if self.flags & bit else "-" for bit, c in bits) + ("s" if self.flags & VM_MAYSHARE else "p")


class MemoryMap(NamedTuple):
    """The map and the members of ``mm_struct`` that the other looks want."""

    vmas: tuple[Vma, ...]
    pgd: int
    exe_file: int
    env_start: int
    env_end: int
    gaps: tuple[Gap, ...] = ()
    torn: int = 0

    def at(self, address: int) -> Vma | None:
        """The VMA that holds an address."""
        low, high = 0, len(self.vmas)
        while low < high:
            middle = (low + high) // 2
            if self.vmas[middle].end <= address:
                low = middle + 1
            else:
                high = middle
        return self.vmas[low] if low < len(self.vmas) and self.vmas[low].start <= address else None


class MemoryMaps:
    """Reads memory maps of one guest."""

    def __init__(self, kernel: Kernel, facts: InjectionFacts) -> None:
        self._kernel, self._facts = kernel, facts
        self._mm, self._vma = facts.record("mm"), facts.record("vma")
        self._tree = facts.find("range.slot") is not None and kernel.types.has("mm_struct.mm_mt.ma_root")
        if self._tree:
            fields = [facts.find(name) for name in ("range.pivot", "range.slot", "arange.pivot", "arange.slot")]
            if None in fields:
                raise Implausible("a kernel with a maple tree whose nodes its types do not describe")
            pivot, slot, arange_pivot, arange_slot = (field for field in fields if field is not None)
            shape = NodeShape.make(pivot, slot)
            self._shapes = {LEAF_64: shape, RANGE_64: shape, ARANGE_64: NodeShape.make(arange_pivot, arange_slot)}

    def read(self, mm: int) -> MemoryMap:
        """The map of one ``mm_struct``. Raises GuestError when nothing can be said."""
        torn = 0
        for _ in range(TRIES):
            fields = self._mm.parse(self._kernel.read(*self._mm.span(mm)))
            pgd, root, first, exe_file, start_brk, brk, start_stack, env_start, env_end = fields
            if not is_object(pgd):
                raise Implausible(f"an mm_struct at {mm:#x} whose page tables are at {pgd:#x}")
            heap = (start_brk, brk, start_stack)
            vmas, gaps, moved = self._from_tree(root, mm, heap) if self._tree else self._from_list(first, mm, heap)
            if not moved:
                break
            torn += moved
        if moved:
            gaps.append(Gap("memory map", mm, f"changed {TRIES} times while read: {moved} entries contradict it"))
        if not vmas:
            gaps.append(Gap("memory map", mm, "it is empty"))
        vmas.sort()
        return MemoryMap(tuple(vmas), pgd, exe_file, env_start, env_end, tuple(gaps), torn)

    def _from_tree(self, root: int, mm: int, heap: tuple[int, int, int]) -> tuple[list[Vma], list[Gap], int]:
        leaves, gaps, torn = self._walk_tree(root)
        if len(leaves) > MAX_VMAS:
            gaps.append(Gap("memory map", mm, f"more than {MAX_VMAS} mappings"))
            del leaves[MAX_VMAS:]
        objects = [leaf for leaf in leaves if is_object(leaf.entry)]
        torn += len(leaves) - len(objects)
        vmas = []
        raws = self._kernel.readv([self._vma.span(leaf.entry) for leaf in objects])
        for leaf, raw in zip(objects, raws, strict=True):
            vma = self._parse(raw, mm, heap)[0] if raw is not None else None
            if vma is None or (vma.start, vma.end - 1) != (leaf.low, leaf.high):
                torn += 1
            if vma is not None:
                vmas.append(vma)
        return vmas, gaps, torn

    def _walk_tree(self, root: int) -> tuple[list[Range], list[Gap], int]:
        """All entries of all leaves."""
        level = [Range(0, ULONG_MAX, root)] if is_node(root) else []
        leaves: list[Range] = []
        gaps: list[Gap] = []
        seen: set[int] = set()
        torn = 0
        for _ in range(MAX_DEPTH):
            following: list[Range] = []
            nodes = [node for node in level if node.entry & ~0xFF not in seen]
            torn += len(level) - len(nodes)
            seen.update(node.entry & ~0xFF for node in nodes)
            if len(seen) > MAX_NODES:
                gaps.append(Gap("memory map", root, f"a tree of more than {MAX_NODES} nodes"))
                break
            raws = self._kernel.readv([(node.entry & ~0xFF, NODE_SIZE) for node in nodes])
            for node, raw in zip(nodes, raws, strict=True):
                kind = node.entry >> 3 & 15
                shape = self._shapes.get(kind)
                if raw is None or shape is None or int.from_bytes(raw[:8], "little") & ~0xFF == node.entry & ~0xFF:
                    torn += 1
                    continue
                try:
                    ranges = parse_node(raw, shape, node.low, node.high)
                except Implausible:
                    torn += 1
                    continue
                if kind == LEAF_64:
                    leaves += ranges
                else:
                    children = [child for child in ranges if is_object(child.entry & ~0xFF)]
                    torn += len(ranges) - len(children)
                    following += children
            if len(leaves) > MAX_VMAS:
                break
            level = following
            if not level:
                break
        else:
            gaps.append(Gap("memory map", root, f"a tree deeper than {MAX_DEPTH} levels"))
        return leaves, gaps, torn

    def _from_list(self, first: int, mm: int, heap: tuple[int, int, int]) -> tuple[list[Vma], list[Gap], int]:
        vmas: list[Vma] = []
        seen: set[int] = set()
        va = first
        while va:
            if va in seen or not is_object(va):
                return vmas, [], 1
            if len(vmas) >= MAX_VMAS:
                return vmas, [Gap("memory map", mm, f"more than {MAX_VMAS} mappings")], 0
            seen.add(va)
            try:
                vma, va = self._parse(self._kernel.read(*self._vma.span(va)), mm, heap)
            except UnreadableMemory:
                return vmas, [], 1
            if vma is None or (vmas and vma.start < vmas[-1].end):
                return vmas, [], 1
            vmas.append(vma)
        return vmas, [], 0

    def _parse(self, raw: bytes, mm: int, heap: tuple[int, int, int]) -> tuple[Vma | None, int]:
        """A VMA of this mm, None when it is none any more; and the next one in the list."""
        start, end, flags, owner, offset, file, ops, private, following, anon_name = self._vma.parse(raw)
        if owner != mm or (start | end) % PAGE or not start < end <= USER_END:
            return None, following
        special = not file and ops != 0 and ops == self._facts.special_ops
        label = ""
        if not file:
            label = self._label(start, end, flags, heap, private if special else 0, anon_name)
        return Vma(start, end, flags, offset, file if is_object(file) else 0, label, special), following

    def _label(self, start: int, end: int, flags: int, heap: tuple[int, int, int], private: int, anon_name: int) -> str:
        """What maps shows for a mapping without a file (fs/proc/task_mmu.c, show_map_vma)."""
        start_brk, brk, stack = heap
        if private:
            return self._pointed_name(private, "special.name")
        if start < brk and end > start_brk:
            return "[heap]"
        if start <= stack <= end:
            return "[stack]"
        name = self._facts.find("anon_name.name")
        if name is not None and is_object(anon_name):
            return f"[anon:{self._text(anon_name + name.offset)}]"
        return "[stack]" if flags & VM_GROWSDOWN else ""

    def _pointed_name(self, private: int, member: str) -> str:
        field = self._facts.find(member)
        if field is None or not is_object(private):
            return "[special]"
        try:
            return self._text(self._kernel.u64(private + field.offset)) or "[special]"
        except GuestError:
            return "[special]"

    def _text(self, va: int) -> str:
        try:
            return self._kernel.read_text(va, NAME_LIMIT).decode("utf-8", "backslashreplace")
        except GuestError:
            return "?"
