"""The patent's way into an x86 kernel: FS -> _KPCR -> KdVersionBlock -> _DBGKD_GET_VERSION64 -> PsLoadedModuleList.

In the kernel FS:0 is the processor's own control block. That of processor 0 names the debugger's version block, which
names the kernel's image, the head of its list of modules and its debugger data; those of other processors do not, but
that of processor 0 is mapped for all of them at ffdff000. No symbol and no search is needed. x64 has no such block.
Sources: ntddk.h (_KPCR of x86: SelfPcr 1c, Prcb 20, KdVersionBlock 34; its _KPRCB follows at 120), wdbgexts.h
(_DBGKD_GET_VERSION64: MinorVersion 2, MachineType 8, KernBase 10, PsLoadedModuleList 18, DebuggerDataList 20; addresses
of 8 bytes, sign-extended; _DBGKD_DEBUG_DATA_HEADER64: OwnerTag 10).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.space import PAGE, AddressSpace

KPCR: Final = 0xFFDF_F000  # of processor 0, before Vista
SELF, PRCB, VERSION_BLOCK, PRCB_DATA = 0x1C, 0x20, 0x34, 0x120
VERSION_SIZE: Final = 0x28
I386: Final = 0x14C
LOWEST: Final = 0x8000_0000


class KernelView(NamedTuple):
    """What the processor's control block leads to. Addresses are virtual; ``kdbg`` is 0 where there is none."""

    base: int  # of the kernel's image
    modules: int  # PsLoadedModuleList
    kdbg: int  # _KDDEBUGGER_DATA64
    build: int  # 2600: XP, 3790: Server 2003


def find_by_kpcr(space: AddressSpace, fs_base: int = 0) -> KernelView | None:
    """Follow the control block of a processor whose FS has this base, else that of processor 0.

    None where neither leads to a kernel: each step is checked, back links included. Raises OutOfTime, GuestGone.
    """
    if space.pointer_size != 4:
        return None
    for kpcr in dict.fromkeys((fs_base, KPCR)):
        try:
            found = _follow(space, kpcr) if kpcr >= LOWEST else None
        except UnreadableMemory:
            continue
        if found is not None:
            return found
    return None


def _follow(space: AddressSpace, kpcr: int) -> KernelView | None:
    head = space.read(kpcr, VERSION_BLOCK + 4)
    block = _at(head, VERSION_BLOCK)
    if _at(head, SELF) != kpcr or _at(head, PRCB) != kpcr + PRCB_DATA or block < LOWEST:
        return None
    raw = space.read(block, VERSION_SIZE)
    base, modules, data = _at(raw, 0x10), _at(raw, 0x18), _at(raw, 0x20)
    if int.from_bytes(raw[8:10], "little") != I386 or base % PAGE or min(base, modules) < LOWEST:
        return None
    if space.read(base, 2) != b"MZ" or space.pointer(space.pointer(modules) + 4) != modules:
        return None
    return KernelView(base, modules, _debugger_data(space, data, base), int.from_bytes(raw[2:4], "little"))


def _debugger_data(space: AddressSpace, head: int, base: int) -> int:
    """The first block of the debugger's list: the kernel's own."""
    try:
        found = space.pointer(head)
        raw = space.read(found, 0x20)
    except UnreadableMemory:
        return 0
    return found if raw[0x10:0x14] == b"KDBG" and _at(raw, 0x18) == base else 0


def _at(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")
