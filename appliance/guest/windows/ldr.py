"""The modules that the loader of a process knows: three rings of ``_LDR_DATA_TABLE_ENTRY`` from ``_PEB.Ldr``.

All of it lies in the process's own memory and is the process's to change: what is missing here, or only in one ring, is
evidence and never proof. A 32-bit process on 64-bit Windows has a second PEB and loader. Sources: _PEB, _PEB_LDR_DATA,
_LDR_DATA_TABLE_ENTRY, _EWOW64PROCESS of ntkrnlmp.pdb; the 32-bit layouts (the same since Windows NT 5): _PEB32 of
ntkrnlmp.pdb, _PEB_LDR_DATA and _LDR_DATA_TABLE_ENTRY of a 32-bit kernel's PDB.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.params import HIGHEST_USER, LOWEST_USER
from appliance.guest.windows.space import AddressSpace
from appliance.guest.windows.text import MAX_PATH, decode_wide
from appliance.model import Gap

MAX_MODULES: Final = 4096  # of one loader
RINGS: Final = ("InLoadOrder", "InMemoryOrder", "InInitializationOrder")


class Module(NamedTuple):
    """One module by its loader entries. ``rings``: on which of load, memory and initialization order it is."""

    base: int
    size: int
    entry_point: int
    name: str | None  # None: its text cannot be read
    path: str | None
    rings: tuple[bool, bool, bool]
    wow64: bool  # told by the 32-bit loader
    va: int  # of its entry


class ModuleList(NamedTuple):
    """What the loaders of one process tell; ``loaded`` is False where a PEB or its loader data cannot be read."""

    modules: tuple[Module, ...]
    image_base: int  # _PEB.ImageBaseAddress, 0 unless it could be read
    gaps: tuple[Gap, ...] = ()
    loaded: bool = False


class _Shape(NamedTuple):
    """One loader's layout. The links of the rings are given in the order of `RINGS`."""

    pointer: int
    image_base: int  # _PEB.ImageBaseAddress
    ldr: int  # _PEB.Ldr
    heads: tuple[int, int, int]  # _PEB_LDR_DATA
    links: tuple[int, int, int]  # _LDR_DATA_TABLE_ENTRY
    base: int
    entry_point: int
    size: int
    path: int
    name: int

    @property
    def span(self) -> int:
        """Bytes of an entry to read."""
        return max(self.name, self.path) + 2 * self.pointer


WOW64: Final = _Shape(4, 0x8, 0xC, (0xC, 0x14, 0x1C), (0x0, 0x8, 0x10), 0x18, 0x1C, 0x20, 0x24, 0x2C)


class Loaders:
    """Reads loaders' lists of processes of one guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel = kernel
        self._shape = _shape(kernel.types, kernel.pointer_size)
        types = kernel.types
        self._peb32 = next(
            (types.offset(path) for path in ("_EWOW64PROCESS.Peb", "_WOW64_PROCESS.Wow64") if types.has(path)), 0
        )

    def read(self, process: RawProcess) -> ModuleList:
        """The modules of a process, both its loaders' where it has two. The caller checks that it still is the same."""
        space = self._kernel.process_space(process.dtb)
        found = self._read(space, process.peb, self._shape, wow64=False)
        if not process.wow64:
            return found
        peb32 = self._read_peb32(process)
        second = self._read(space, peb32, WOW64, wow64=True)
        gaps = found.gaps + second.gaps
        if not second.loaded and not second.gaps:
            gaps += (Gap("loader", peb32 or process.wow64, "the 32-bit loader's lists are not there"),)
        return found._replace(modules=found.modules + second.modules, gaps=gaps)

    def _read_peb32(self, process: RawProcess) -> int:
        """Where the 32-bit PEB is, 0: that cannot be read."""
        if not self._kernel.is_kernel(process.wow64):
            return process.wow64 & 0xFFFF_FFFF  # until Windows 7 a pointer to the PEB itself may stand here
        try:
            return self._kernel.space.pointer(process.wow64 + self._peb32) & 0xFFFF_FFFF
        except UnreadableMemory:
            return 0

    def _read(self, space: AddressSpace, peb: int, shape: _Shape, *, wow64: bool) -> ModuleList:
        if not self._is_user(peb):
            return ModuleList((), 0)
        try:
            image_base = _number(space.read(peb + shape.image_base, shape.pointer), 0, shape.pointer)
            ldr = _number(space.read(peb + shape.ldr, shape.pointer), 0, shape.pointer)
        except UnreadableMemory:
            return ModuleList((), 0, (Gap("loader", peb, "the process environment block cannot be read"),))
        if not self._is_user(ldr):
            return ModuleList((), image_base, (Gap("loader", ldr, "there is no loader data"),) if ldr else ())
        gaps: list[Gap] = []
        entries: dict[int, bytes] = {}
        rings: dict[int, list[bool]] = {}
        for ring in range(len(RINGS)):
            for va in self._walk(space, ldr, shape, ring, entries, gaps):
                rings.setdefault(va, [False] * len(RINGS))[ring] = True
        modules = self._modules(space, shape, entries, rings, wow64=wow64)
        return ModuleList(modules, image_base, tuple(gaps), loaded=bool(rings) or not gaps)

    def _walk(
        self, space: AddressSpace, ldr: int, shape: _Shape, ring: int, entries: dict[int, bytes], gaps: list[Gap]
    ) -> list[int]:
        """The entries of one ring."""
        head, links, what = ldr + shape.heads[ring], shape.links[ring], f"loader's list {RINGS[ring]}"
        found: list[int] = []
        seen: set[int] = set()
        try:
            node, previous = _number(space.read(head, shape.pointer), 0, shape.pointer), head
            while node != head:
                va = node - links
                if va in seen or not self._is_user(va):
                    gaps.append(Gap(what, node, "it runs in a circle, or out of the process"))
                    break
                if va not in entries:
                    if len(entries) >= MAX_MODULES:
                        gaps.append(Gap(what, node, f"more than {MAX_MODULES} modules"))
                        break
                    entries[va] = space.read(va, shape.span)
                if _number(entries[va], links + shape.pointer, shape.pointer) != previous:
                    gaps.append(Gap(what, node, "a module does not point back to the one before it"))
                    break
                seen.add(va)
                found.append(va)
                previous, node = node, _number(entries[va], links, shape.pointer)
        except UnreadableMemory as error:
            gaps.append(Gap(what, error.address, "a module's entry cannot be read"))
        return found

    def _modules(
        self,
        space: AddressSpace,
        shape: _Shape,
        entries: dict[int, bytes],
        rings: dict[int, list[bool]],
        *,
        wow64: bool,
    ) -> tuple[Module, ...]:
        """The modules behind the entries, all their names in one batch."""
        spans = []
        for va in rings:
            for at in (shape.path, shape.name):
                buffer = _number(entries[va], at + shape.pointer, shape.pointer)
                spans.append((buffer, min(_number(entries[va], at, 2), MAX_PATH)))
        texts = iter(
            None if data is None or not self._is_user(va) else decode_wide(data)
            for (va, _), data in zip(spans, space.readv(spans), strict=True)
        )
        modules = []
        for va, (first, second, third) in rings.items():
            path, name = next(texts), next(texts)
            base, entry_point = (_number(entries[va], at, shape.pointer) for at in (shape.base, shape.entry_point))
            size = _number(entries[va], shape.size, 4)
            modules.append(Module(base, size, entry_point, name, path, (first, second, third), wow64, va))
        return tuple(modules)

    def _is_user(self, va: int) -> bool:
        return LOWEST_USER <= va < HIGHEST_USER and not self._kernel.is_kernel(va)


def _shape(types: SymbolTable, pointer: int) -> _Shape:
    """The loader's layout by the kernel's types, which describe its native processes. Raises UnsupportedGuest."""
    heads = [types.offset(f"_PEB_LDR_DATA.{ring}ModuleList") for ring in RINGS]
    links = [types.offset(f"_LDR_DATA_TABLE_ENTRY.{ring}Links") for ring in RINGS]
    names = ("DllBase", "EntryPoint", "SizeOfImage", "FullDllName", "BaseDllName")
    members = [types.offset(f"_LDR_DATA_TABLE_ENTRY.{name}") for name in names]
    peb = types.offset("_PEB.ImageBaseAddress"), types.offset("_PEB.Ldr")
    return _Shape(pointer, *peb, (heads[0], heads[1], heads[2]), (links[0], links[1], links[2]), *members)


def _number(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little")
