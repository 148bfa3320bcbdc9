"""Structures of the kernels of Windows XP and Server 2003, for guests whose symbol table nobody has.

These kernels do not change any more, and few symbol tables of them are at hand. A layout from here is believed only
after `verify` has found this very guest's System process, its thread and its list links where the layout says.
Sources: ntoskrnl.pdb / ntkrnlpa.pdb of the builds named below, as published in volatility 2.6.1
(overlays/windows/xp_sp2_x86_vtypes.py, xp_sp3_x86_vtypes.py, win2003_sp{0,1,2}_x86_vtypes.py, win2003_sp{1,2}_x64_
vtypes.py), the Windows Research Kernel (base/ntos/inc/ps.h, ke.h, mm.h, base/ntos/se/tokenp.h: Server 2003 SP1), and
ReactOS' include/ndk; _KDDEBUGGER_DATA64: wdbgexts.h. Offsets in bytes, little-endian.
"""

from __future__ import annotations

from typing import NamedTuple

from appliance.errors import Implausible, UnreadableMemory, UnsupportedGuest
from appliance.guest.windows.isf import Field, PdbId, SymbolTable
from appliance.guest.windows.space import AddressSpace

Members = dict[str, Field | tuple[int, int] | tuple[int, str]]
Types = dict[str, tuple[int, Members]]

SYSTEM_PID = 4  # of the process System since XP
_PROCESS_OBJECT = 3  # KOBJECTS.ProcessObject, the type in a _DISPATCHER_HEADER (WRK ke.h)
_THREAD_OBJECT = 6


def _bits(offset: int, size: int, position: int, length: int) -> Field:
    return Field(offset, size, position, length)


class _Process(NamedTuple):
    """Where _EPROCESS keeps what differs between the builds."""

    size: int
    pcb: int  # size of _KPROCESS
    create: int  # ExitTime follows it
    pid: int  # ActiveProcessLinks follows it
    session_links: int
    table: int  # ObjectTable; Token follows it
    parent: int
    section: int  # SectionObject; SectionBaseAddress follows it
    session: int  # ImageFileName follows it
    threads: int  # ThreadListHead
    active: int  # ActiveThreads
    peb: int
    audit: int  # SeAuditProcessCreationInfo
    flags: int  # ExitStatus follows it
    vads: int


_XP = _Process(0x260, 0x6C, 0x70, 0x84, 0xB4, 0xC4, 0x14C, 0x138, 0x170, 0x190, 0x1A0, 0x1B0, 0x1F4, 0x248, 0x11C)
_2003 = _Process(0x278, 0x6C, 0x70, 0x84, 0xB4, 0xC4, 0x128, 0x114, 0x150, 0x170, 0x180, 0x190, 0x1D4, 0x248, 0x258)
_2003_SP1 = _Process(0x278, 0x78, 0x80, 0x94, 0xC4, 0xD4, 0x138, 0x124, 0x160, 0x180, 0x190, 0x1A0, 0x1E4, 0x240, 0x250)
_X64 = _Process(0x3E0, 0xB8, 0xC0, 0xD8, 0x138, 0x158, 0x218, 0x1F0, 0x260, 0x290, 0x2B0, 0x2C0, 0x318, 0x388, 0x398)


class _Thread(NamedTuple):
    """Where _ETHREAD keeps what differs. ``shifted``: the low three bits of CreateTime are flags."""

    size: int
    tcb: int  # size of _KTHREAD; CreateTime follows it
    state: int
    apc: int
    teb: int | None
    entry: int  # _KTHREAD.ThreadListEntry
    suspended: int
    cid: int
    process: int  # ThreadsProcess; StartAddress, Win32StartAddress and ThreadListEntry follow it
    flags: int
    shifted: bool = False


_XP_THREAD = _Thread(0x258, 0x1C0, 0x2D, 0x34, 0x20, 0x1B0, 0x1B9, 0x1EC, 0x220, 0x248, shifted=True)
_2003_THREAD = _Thread(0x260, 0x1C8, 0x2C, 0x34, 0x30, 0x1AC, 0x1BB, 0x1F4, 0x228, 0x250, shifted=True)
_2003_SP1_THREAD = _Thread(0x250, 0x1B8, 0x4C, 0x28, 0x74, 0x1A8, 0x150, 0x1E4, 0x218, 0x240)
_X64_THREAD = _Thread(0x410, 0x308, 0x154, 0x48, None, 0x2C0, 0x234, 0x358, 0x3B8, 0x3FC)


class Era(NamedTuple):
    """One family of kernels. ``service_pack`` is the high byte of CmNtCSDVersion's low word."""

    name: str
    build: int
    service_packs: tuple[int, ...]
    pointer_size: int
    process: _Process
    thread: _Thread

    @property
    def types(self) -> Types:
        """The structures of this family."""
        return (_types64 if self.pointer_size == 8 else _types32)(self)


ERAS = (
    Era("Windows XP SP2/SP3 (x86)", 2600, (2, 3), 4, _XP, _XP_THREAD),
    Era("Windows Server 2003 (x86)", 3790, (0,), 4, _2003, _2003_THREAD),
    Era("Windows Server 2003 SP1/SP2 (x86)", 3790, (1, 2), 4, _2003_SP1, _2003_SP1_THREAD),
    Era("Windows Server 2003 SP1/SP2, XP (x64)", 3790, (1, 2), 8, _X64, _X64_THREAD),
)

# _KDDEBUGGER_DATA64: what it names, and where; each an address of 8 bytes, sign-extended on x86 (wdbgexts.h).
KDBG_TAG, KDBG_SIZE = 0x10, 0x14  # OwnerTag "KDBG", Size
KDBG_SYMBOLS = {
    "PsLoadedModuleList": 0x48,
    "PsActiveProcessHead": 0x50,
    "PspCidTable": 0x58,
    "ObpRootDirectoryObject": 0x98,
    "MmPfnDatabase": 0xC0,
    "MmSystemRangeStart": 0x1D0,
    "NtBuildLab": 0x208,
    "KiProcessorBlock": 0x218,
    "CmNtCSDVersion": 0x268,
}
KDBG_KERNEL = 0x18  # KernBase
_KDBG_OFFSETS = {  # u16 each, since Server 2003 (Size 0x318)
    0x2AA: "_EPROCESS.Peb",
    0x2AC: "_EPROCESS.InheritedFromUniqueProcessId",
    0x2AE: "_EPROCESS.Pcb.DirectoryTableBase",
    0x2A0: "_KTHREAD.ApcState.Process",
    0x2A2: "_KTHREAD.State",
}
_SIZE_EPROCESS, _KDBG_2003 = 0x2A8, 0x318


def table(era: Era, symbols: dict[str, int] | None = None, pdb: PdbId | None = None) -> SymbolTable:
    """The layout of an era as a symbol table; ``symbols`` are RVAs, as `kdbg_symbols` gives them."""
    return SymbolTable.of(types=era.types, symbols=symbols or {}, pdb=pdb, pointer_size=era.pointer_size)


def kdbg_symbols(space: AddressSpace, kdbg: int, base: int, size: int) -> dict[str, int]:
    """RVAs of what the kernel's debugger data names. Raises Implausible where it is none of this kernel's."""
    raw = space.read(kdbg, 0x290)
    found_base = _pointer(space, raw, KDBG_KERNEL)
    if raw[KDBG_TAG : KDBG_TAG + 4] != b"KDBG" or found_base != base:
        raise Implausible(f"no debugger data of this kernel at {kdbg:#x}")
    found = {name: _pointer(space, raw, at) - base for name, at in KDBG_SYMBOLS.items()}
    return {name: rva for name, rva in found.items() if 0 < rva < size} | {"KdDebuggerDataBlock": kdbg - base}


def choose(
    space: AddressSpace, base: int, size: int, build: int, kdbg: int, pdb: PdbId | None = None
) -> tuple[Era, SymbolTable]:
    """The era whose layout this very guest's System process confirms, with its symbols.

    Raises UnsupportedGuest naming every layout that was tried and what spoke against it.
    """
    symbols = kdbg_symbols(space, kdbg, base, size)
    refused = []
    for era in ERAS:
        if era.pointer_size != space.pointer_size or era.build != build:
            continue
        types = table(era, symbols, pdb)
        try:
            verify(space, types, base, kdbg)
        except (Implausible, UnreadableMemory, UnsupportedGuest) as error:
            refused.append(f"{era.name}: {error}")
        else:
            return era, types
    raise UnsupportedGuest(tuple(refused) or (f"no layout of ours is for Windows build {build}",))


def verify(space: AddressSpace, types: SymbolTable, base: int, kdbg: int | None = None) -> int:
    """The System process, found where the layout says; its address. Raises Implausible, UnreadableMemory."""
    head = base + types.get("PsActiveProcessHead")
    links = types.offset("_EPROCESS.ActiveProcessLinks")
    process = space.pointer(head) - links
    raw = space.read(process, types.size("_EPROCESS"))
    if space.pointer(space.pointer(head) + space.pointer_size) != head:
        raise Implausible("the list of processes does not lead back to its head")
    if raw[0] == _PROCESS_OBJECT and raw[2]:  # _DISPATCHER_HEADER, which may have been overwritten
        _expect(raw[2] * 4 == types.size("_KPROCESS"), f"_KPROCESS has {raw[2] * 4:#x} bytes")
    _expect(_number(raw, types, "_EPROCESS.UniqueProcessId") == SYSTEM_PID, "the first process has not the pid 4")
    name = types.offset("_EPROCESS.ImageFileName")
    _expect(raw[name : name + 7] == b"System\0", "the first process is not named System")
    entry = _number(raw, types, "_EPROCESS.ThreadListHead.Flink")
    if entry != process + types.offset("_EPROCESS.ThreadListHead.Flink"):
        thread = entry - types.offset("_ETHREAD.ThreadListEntry")
        body = space.read(thread, types.size("_ETHREAD"))
        if body[0] == _THREAD_OBJECT and body[2]:
            _expect(body[2] * 4 == types.size("_KTHREAD"), f"_KTHREAD has {body[2] * 4:#x} bytes")
        owner = _number(body, types, "_ETHREAD.ThreadsProcess")
        _expect(owner == process, "its first thread belongs to another process")
        named = _number(body, types, "_ETHREAD.Cid.UniqueProcess")
        _expect(named == SYSTEM_PID, "its first thread names another process")
    if kdbg is not None and space.u32(kdbg + KDBG_SIZE) >= _KDBG_2003:
        said = {path: space.u16(kdbg + at) for at, path in _KDBG_OFFSETS.items()}
        wrong = [path for path, offset in said.items() if types.offset(path) != offset]
        _expect(not wrong, f"the kernel itself says otherwise of {', '.join(wrong)}")
        _expect(space.u16(kdbg + _SIZE_EPROCESS) == types.size("_EPROCESS"), "the kernel's _EPROCESS has another size")
    return process


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise Implausible(otherwise)


def _number(raw: bytes, types: SymbolTable, path: str) -> int:
    field = types.field(path)
    return int.from_bytes(raw[field.offset : field.offset + field.size], "little")


def _pointer(space: AddressSpace, raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + space.pointer_size], "little")


def _process(era: Era, pointer: int) -> tuple[int, Members]:
    p = era.process
    members: Members = {
        "Pcb": (0, "_KPROCESS"),
        "CreateTime": (p.create, 8),
        "ExitTime": (p.create + 8, 8),
        "UniqueProcessId": (p.pid, pointer),
        "ActiveProcessLinks": (p.pid + pointer, "_LIST_ENTRY"),
        "SessionProcessLinks": (p.session_links, "_LIST_ENTRY"),
        "ObjectTable": Field(p.table, pointer, type="*_HANDLE_TABLE"),
        "Token": (p.table + pointer, "_EX_FAST_REF"),
        "InheritedFromUniqueProcessId": (p.parent, pointer),
        "SectionObject": (p.section, pointer),
        "SectionBaseAddress": (p.section + pointer, pointer),
        "Session": (p.session, pointer),
        "ImageFileName": Field(p.session + pointer, 16, length=16),
        "ThreadListHead": (p.threads, "_LIST_ENTRY"),
        "ActiveThreads": (p.active, 4),
        "Peb": Field(p.peb, pointer, type="*_PEB"),
        "SeAuditProcessCreationInfo": (p.audit, "_SE_AUDIT_PROCESS_CREATION_INFO"),
        "Flags": (p.flags, 4),
        "ExitStatus": (p.flags + 4, 4),
        "VadRoot": Field(p.vads, 4, type="*_MMVAD") if era.build == 2600 else (p.vads, "_MM_AVL_TABLE"),
    }
    if pointer == 8:
        members["Wow64Process"] = (0x2A8, 8)
    return p.size, members


def _thread(era: Era, pointer: int) -> tuple[int, Members]:
    t = era.thread
    return t.size, {
        "Tcb": (0, "_KTHREAD"),
        # On XP and 2003 without a service pack three flags share its low bits: the time is shifted left by them.
        "CreateTime": _bits(t.tcb, 8, 3, 61) if t.shifted else (t.tcb, 8),
        "ExitTime": (t.tcb + 8, 8),
        "Cid": (t.cid, "_CLIENT_ID"),
        "ThreadsProcess": Field(t.process, pointer, type="*_EPROCESS"),
        "StartAddress": (t.process + pointer, pointer),
        "Win32StartAddress": (t.process + 2 * pointer, pointer),
        "ThreadListEntry": (t.process + 3 * pointer, "_LIST_ENTRY"),
        "CrossThreadFlags": (t.flags, 4),
    }


def _kthread(era: Era, pointer: int) -> tuple[int, Members]:
    t = era.thread
    members: Members = {
        "Header": (0, "_DISPATCHER_HEADER"),
        "State": (t.state, 1),
        "ApcState": (t.apc, "_KAPC_STATE"),
        "ThreadListEntry": (t.entry, "_LIST_ENTRY"),
        "SuspendCount": (t.suspended, 1),
    }
    if t.teb is not None:
        members["Teb"] = (t.teb, pointer)
    return t.tcb, members


def _types32(era: Era) -> Types:
    kprocess: Members = {
        "Header": (0, "_DISPATCHER_HEADER"),
        "DirectoryTableBase": Field(0x18, 8, length=2),
        "ThreadListHead": (0x50, "_LIST_ENTRY"),
    }
    # Of _MMVAD_FLAGS the members that XP, 2003 and the Research Kernel agree upon.
    flags: Members = {
        "CommitCharge": _bits(0, 4, 0, 19),
        "Protection": _bits(0, 4, 24, 5),
        "PrivateMemory": _bits(0, 4, 31, 1),
    }
    if era.build == 2600:
        flags |= {"ImageMap": _bits(0, 4, 20, 1), "MemCommit": _bits(0, 4, 30, 1)}
        node: Members = {
            "StartingVpn": (0, 4),
            "EndingVpn": (4, 4),
            "Parent": Field(8, 4, type="*_MMVAD"),
            "LeftChild": Field(12, 4, type="*_MMVAD"),
            "RightChild": Field(16, 4, type="*_MMVAD"),
        }
    else:
        node = {
            "u1": (0, "_VAD_PARENT"),
            "LeftChild": Field(4, 4, type="*_MMVAD"),
            "RightChild": Field(8, 4, type="*_MMVAD"),
            "StartingVpn": (12, 4),
            "EndingVpn": (16, 4),
        }
    types: Types = {
        "_EPROCESS": _process(era, 4),
        "_KPROCESS": (era.process.pcb, kprocess),
        "_ETHREAD": _thread(era, 4),
        "_KTHREAD": _kthread(era, 4),
        "_MMVAD_SHORT": (0x18, node | {"u": (0x14, "_VAD_U")}),
        "_MMVAD": (0x28, node | {"u": (0x14, "_VAD_U"), "ControlArea": Field(0x18, 4, type="*_CONTROL_AREA")}),
        "_VAD_PARENT": (4, {"Balance": _bits(0, 4, 0, 2), "Parent": (0, 4)}),
        "_VAD_U": (4, {"LongFlags": (0, 4), "VadFlags": (0, "_MMVAD_FLAGS")}),
        "_MMVAD_FLAGS": (4, flags),
        "_LIST_ENTRY": (8, {"Flink": (0, 4), "Blink": (4, 4)}),
        "_DISPATCHER_HEADER": (0x10, {"Type": (0, 1), "Size": (2, 1), "SignalState": (4, 4)}),
        "_KAPC_STATE": (0x18, {"ApcListHead": Field(0, 16, length=2), "Process": (0x10, 4)}),
        "_CLIENT_ID": (8, {"UniqueProcess": (0, 4), "UniqueThread": (4, 4)}),
        "_EX_FAST_REF": (4, {"Object": (0, 4), "RefCnt": _bits(0, 4, 0, 3)}),
        "_UNICODE_STRING": (8, {"Length": (0, 2), "MaximumLength": (2, 2), "Buffer": (4, 4)}),
        "_CONTROL_AREA": (0x30, {"Segment": (0, 4), "FilePointer": Field(0x24, 4, type="*_FILE_OBJECT")}),
        "_FILE_OBJECT": (0x70, {"DeviceObject": (4, 4), "Flags": (0x2C, 4), "FileName": (0x30, "_UNICODE_STRING")}),
        "_SE_AUDIT_PROCESS_CREATION_INFO": (4, {"ImageFileName": Field(0, 4, type="*_OBJECT_NAME_INFORMATION")}),
        "_OBJECT_NAME_INFORMATION": (8, {"Name": (0, "_UNICODE_STRING")}),
        "_MM_SESSION_SPACE": (0x1278, {"SessionId": (8, 4)}),
        "_SID_AND_ATTRIBUTES": (8, {"Sid": Field(0, 4, type="*_SID"), "Attributes": (4, 4)}),
        "_TOKEN": _token(4),
        "_PEB": (
            0x210 if era.build == 2600 else 0x230,
            {
                "BeingDebugged": (2, 1),
                "ImageBaseAddress": (8, 4),
                "Ldr": Field(0xC, 4, type="*_PEB_LDR_DATA"),
                "ProcessParameters": Field(0x10, 4, type="*_RTL_USER_PROCESS_PARAMETERS"),
                "OSMajorVersion": (0xA4, 4),
                "OSMinorVersion": (0xA8, 4),
                "OSBuildNumber": (0xAC, 2),
                "SessionId": (0x1D4, 4),
            },
        ),
        "_PEB_LDR_DATA": (
            0x28,
            {
                "Initialized": (4, 1),
                "InLoadOrderModuleList": (0xC, "_LIST_ENTRY"),
                "InMemoryOrderModuleList": (0x14, "_LIST_ENTRY"),
                "InInitializationOrderModuleList": (0x1C, "_LIST_ENTRY"),
            },
        ),
        "_RTL_USER_PROCESS_PARAMETERS": (
            0x290,
            {
                "MaximumLength": (0, 4),
                "Length": (4, 4),
                "DllPath": (0x30, "_UNICODE_STRING"),
                "ImagePathName": (0x38, "_UNICODE_STRING"),
                "CommandLine": (0x40, "_UNICODE_STRING"),
                "Environment": (0x48, 4),
            },
        ),
        "_LDR_DATA_TABLE_ENTRY": (
            0x50,
            {
                "InLoadOrderLinks": (0, "_LIST_ENTRY"),
                "InMemoryOrderLinks": (8, "_LIST_ENTRY"),
                "InInitializationOrderLinks": (0x10, "_LIST_ENTRY"),
                "DllBase": (0x18, 4),
                "EntryPoint": (0x1C, 4),
                "SizeOfImage": (0x20, 4),
                "FullDllName": (0x24, "_UNICODE_STRING"),
                "BaseDllName": (0x2C, "_UNICODE_STRING"),
                "Flags": (0x34, 4),
                "LoadCount": (0x38, 2),
                "TimeDateStamp": (0x44, 4),
            },
        ),
        "_HANDLE_TABLE": (0x44, {"TableCode": (0, 4), "QuotaProcess": (4, 4), "HandleCount": (0x3C, 4)}),
        "_HANDLE_TABLE_ENTRY": (8, {"Object": (0, 4), "GrantedAccess": (4, 4)}),
        "_OBJECT_HEADER": (
            0x20,
            {
                "PointerCount": (0, 4),
                "HandleCount": (4, 4),
                "Type": Field(8, 4, type="*_OBJECT_TYPE"),
                "NameInfoOffset": (0xC, 1),
                "HandleInfoOffset": (0xD, 1),
                "QuotaInfoOffset": (0xE, 1),
                "Flags": (0xF, 1),
                "Body": (0x18, 8),
            },
        ),
        "_POOL_HEADER": (
            8,
            {
                "PreviousSize": _bits(0, 2, 0, 9),
                "PoolIndex": _bits(0, 2, 9, 7),
                "BlockSize": _bits(2, 2, 0, 9),
                "PoolType": _bits(2, 2, 9, 7),
                "PoolTag": (4, 4),
            },
        ),
    }
    if era.build != 2600:
        types["_MMADDRESS_NODE"] = (0x14, node)
        types["_MM_AVL_TABLE"] = (0x20, {"BalancedRoot": (0, "_MMADDRESS_NODE"), "NodeHint": (0x18, 4)})
    return types


def _types64(era: Era) -> Types:
    node: Members = {
        "u1": (0, "_VAD_PARENT"),
        "LeftChild": Field(8, 8, type="*_MMVAD"),
        "RightChild": Field(0x10, 8, type="*_MMVAD"),
        "StartingVpn": (0x18, 8),
        "EndingVpn": (0x20, 8),
    }
    return {
        "_EPROCESS": _process(era, 8),
        "_KPROCESS": (
            era.process.pcb,
            {"Header": (0, "_DISPATCHER_HEADER"), "DirectoryTableBase": Field(0x28, 16, length=2)},
        ),
        "_ETHREAD": _thread(era, 8),
        "_KTHREAD": _kthread(era, 8),
        "_MMADDRESS_NODE": (0x28, node),
        "_MM_AVL_TABLE": (0x40, {"BalancedRoot": (0, "_MMADDRESS_NODE"), "NodeHint": (0x30, 8)}),
        "_MMVAD_SHORT": (0x30, node | {"u": (0x28, "_VAD_U")}),
        "_MMVAD": (0x50, node | {"u": (0x28, "_VAD_U"), "ControlArea": Field(0x30, 8, type="*_CONTROL_AREA")}),
        "_VAD_PARENT": (8, {"Balance": _bits(0, 8, 0, 2), "Parent": (0, 8)}),
        "_VAD_U": (8, {"LongFlags": (0, 8), "VadFlags": (0, "_MMVAD_FLAGS")}),
        "_MMVAD_FLAGS": (
            8,
            {
                "CommitCharge": _bits(0, 8, 0, 51),
                "Protection": _bits(0, 8, 56, 5),
                "PrivateMemory": _bits(0, 8, 63, 1),
            },
        ),
        "_LIST_ENTRY": (16, {"Flink": (0, 8), "Blink": (8, 8)}),
        "_DISPATCHER_HEADER": (0x18, {"Type": (0, 1), "Size": (2, 1), "SignalState": (4, 4)}),
        "_KAPC_STATE": (0x30, {"ApcListHead": Field(0, 32, length=2), "Process": (0x20, 8)}),
        "_CLIENT_ID": (16, {"UniqueProcess": (0, 8), "UniqueThread": (8, 8)}),
        "_EX_FAST_REF": (8, {"Object": (0, 8), "RefCnt": _bits(0, 8, 0, 4)}),
        "_UNICODE_STRING": (16, {"Length": (0, 2), "MaximumLength": (2, 2), "Buffer": (8, 8)}),
        "_CONTROL_AREA": (0x48, {"Segment": (0, 8), "FilePointer": Field(0x30, 8, type="*_FILE_OBJECT")}),
        "_FILE_OBJECT": (0xB8, {"DeviceObject": (8, 8), "Flags": (0x50, 4), "FileName": (0x58, "_UNICODE_STRING")}),
        "_SE_AUDIT_PROCESS_CREATION_INFO": (8, {"ImageFileName": Field(0, 8, type="*_OBJECT_NAME_INFORMATION")}),
        "_OBJECT_NAME_INFORMATION": (16, {"Name": (0, "_UNICODE_STRING")}),
        "_MM_SESSION_SPACE": (0x1D80, {"SessionId": (8, 4)}),
        "_SID_AND_ATTRIBUTES": (16, {"Sid": Field(0, 8, type="*_SID"), "Attributes": (8, 4)}),
        "_TOKEN": _token(8),
        "_PEB": (
            0x358,
            {
                "BeingDebugged": (2, 1),
                "ImageBaseAddress": (0x10, 8),
                "Ldr": Field(0x18, 8, type="*_PEB_LDR_DATA"),
                "ProcessParameters": Field(0x20, 8, type="*_RTL_USER_PROCESS_PARAMETERS"),
                "OSMajorVersion": (0x118, 4),
                "OSMinorVersion": (0x11C, 4),
                "OSBuildNumber": (0x120, 2),
                "SessionId": (0x2C0, 4),
            },
        ),
        "_PEB_LDR_DATA": (
            0x48,
            {
                "Initialized": (4, 1),
                "InLoadOrderModuleList": (0x10, "_LIST_ENTRY"),
                "InMemoryOrderModuleList": (0x20, "_LIST_ENTRY"),
                "InInitializationOrderModuleList": (0x30, "_LIST_ENTRY"),
            },
        ),
        "_RTL_USER_PROCESS_PARAMETERS": (
            0x3F0,
            {
                "MaximumLength": (0, 4),
                "Length": (4, 4),
                "DllPath": (0x50, "_UNICODE_STRING"),
                "ImagePathName": (0x60, "_UNICODE_STRING"),
                "CommandLine": (0x70, "_UNICODE_STRING"),
                "Environment": (0x80, 8),
            },
        ),
        "_LDR_DATA_TABLE_ENTRY": (
            0x98,
            {
                "InLoadOrderLinks": (0, "_LIST_ENTRY"),
                "InMemoryOrderLinks": (0x10, "_LIST_ENTRY"),
                "InInitializationOrderLinks": (0x20, "_LIST_ENTRY"),
                "DllBase": (0x30, 8),
                "EntryPoint": (0x38, 8),
                "SizeOfImage": (0x40, 4),
                "FullDllName": (0x48, "_UNICODE_STRING"),
                "BaseDllName": (0x58, "_UNICODE_STRING"),
                "Flags": (0x68, 4),
                "LoadCount": (0x6C, 2),
                "TimeDateStamp": (0x80, 4),
            },
        ),
        "_HANDLE_TABLE": (0x70, {"TableCode": (0, 8), "QuotaProcess": (8, 8), "HandleCount": (0x68, 4)}),
        "_HANDLE_TABLE_ENTRY": (16, {"Object": (0, 8), "GrantedAccess": (8, 4)}),
        "_OBJECT_HEADER": (
            0x38,
            {
                "PointerCount": (0, 8),
                "HandleCount": (8, 8),
                "Type": Field(0x10, 8, type="*_OBJECT_TYPE"),
                "NameInfoOffset": (0x18, 1),
                "HandleInfoOffset": (0x19, 1),
                "QuotaInfoOffset": (0x1A, 1),
                "Flags": (0x1B, 1),
                "Body": (0x30, 8),
            },
        ),
        "_POOL_HEADER": (
            16,
            {"PreviousSize": (0, 1), "PoolIndex": (1, 1), "BlockSize": (2, 1), "PoolType": (3, 1), "PoolTag": (4, 4)},
        ),
    }


def _token(pointer: int) -> tuple[int, Members]:
    return 0xA8 if pointer == 4 else 0xD0, {
        "TokenId": (0x10, 8),
        "AuthenticationId": (0x18, 8),
        "SessionId": (0x48, 4),
        "UserAndGroupCount": (0x4C, 4),
        "UserAndGroups": Field(0x68, pointer, type="*_SID_AND_ATTRIBUTES"),
    }
