"""The types of an invented Windows: every family has its own offsets, none of them Windows'.

Names of types and fields are those of the public symbols, since engines ask for them by name. What Windows has promised
for ever (KUSER_SHARED_DATA, UNICODE_STRING, pool headers, PE headers) is where it must be; everything else is pushed
about by gaps drawn from the family's name, so that whoever knows an offset by heart reads nonsense here.
A structure is a heading ``name [kind]`` and one line for each field: ``name type``, where a type is a base type, ``*``
and a type, ``n * type`` or ``type : bits``; ``|`` begins a field at the start of the one above, ``@0x10`` pins one.
"""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

Json = dict[str, Any]

BASE = {
    "void": (0, False, "void"),
    "char": (1, True, "char"),
    "unsigned char": (1, False, "char"),
    "short": (2, True, "int"),
    "unsigned short": (2, False, "int"),
    "wchar": (2, False, "int"),
    "long": (4, True, "int"),
    "unsigned long": (4, False, "int"),
    "int": (4, True, "int"),
    "unsigned int": (4, False, "int"),
    "long long": (8, True, "int"),
    "unsigned long long": (8, False, "int"),
    "float": (4, True, "float"),
    "double": (8, True, "float"),
    "pointer": (8, False, "int"),
}
SHORT = {
    "u8": "unsigned char",
    "i8": "char",
    "u16": "unsigned short",
    "i16": "short",
    "u32": "unsigned long",
    "i32": "long",
    "u64": "unsigned long long",
    "i64": "long long",
}
ENUMS = {"_NT_PRODUCT_TYPE": {"NtProductWinNt": 1, "NtProductLanManNt": 2, "NtProductServer": 3}}

FIXED = """
_LIST_ENTRY
  Flink *_LIST_ENTRY
  Blink *_LIST_ENTRY

_SINGLE_LIST_ENTRY
  Next *_SINGLE_LIST_ENTRY

_UNICODE_STRING
  Length u16
  MaximumLength u16
  Buffer *wchar

_LARGE_INTEGER union
  QuadPart i64
  | LowPart u32
  HighPart i32 @4

_EX_FAST_REF union
  Object *void
  | RefCnt u64:4
  | Value u64

_EX_PUSH_LOCK union
  Value u64

_KSYSTEM_TIME
  LowPart u32
  High1Time i32
  High2Time i32

_KUSER_SHARED_DATA size=0x730
  TickCountLowDeprecated u32
  TickCountMultiplier u32
  InterruptTime _KSYSTEM_TIME
  SystemTime _KSYSTEM_TIME
  TimeZoneBias _KSYSTEM_TIME
  NtSystemRoot 260*wchar @0x30
  NtBuildNumber u32 @0x260
  NtProductType _NT_PRODUCT_TYPE
  ProductTypeIsValid u8
  NativeProcessorArchitecture u16 @0x26a
  NtMajorVersion u32
  NtMinorVersion u32
  SystemExpirationDate _LARGE_INTEGER @0x2c8
  ActiveConsoleId u32 @0x2d8
  NumberOfPhysicalPages u32 @0x2e8
  TickCount _KSYSTEM_TIME @0x320
  | TickCountQuad u64
  InterruptTimeBias u64 @0x3b0
  ActiveProcessorCount u32 @0x3c0

_DBGKD_GET_VERSION64
  MajorVersion u16
  MinorVersion u16
  ProtocolVersion u8
  KdSecondaryVersion u8
  Flags u16
  MachineType u16
  MaxPacketType u8
  MaxStateChange u8
  MaxManipulate u8
  Simulation u8
  Unused 1*u16
  KernBase u64
  PsLoadedModuleList u64
  DebuggerDataList u64

_POOL_HEADER size=16
  PreviousSize u16:8
  PoolIndex u16:8
  BlockSize u16:8
  PoolType u16:8
  PoolTag u32
  ProcessBilled *_EPROCESS
  | AllocatorBackTraceIndex u16
  PoolTagHash u16 @10

_RTL_BALANCED_NODE
  Left *_RTL_BALANCED_NODE
  | Children 2**_RTL_BALANCED_NODE
  Right *_RTL_BALANCED_NODE @8
  ParentValue u64
  | Red u8:1
  | Balance u8:2

_RTL_AVL_TREE
  Root *_RTL_BALANCED_NODE

_RTL_DYNAMIC_HASH_TABLE
  Flags u32
  Shift u32
  TableSize u32
  Pivot u32
  DivisorMask u32
  NumEntries u32
  NonEmptyBuckets u32
  NumEnumerators u32
  Directory *void

_RTL_DYNAMIC_HASH_TABLE_ENTRY
  Linkage _LIST_ENTRY
  Signature u64

_RTL_BITMAP
  SizeOfBitMap u32
  Buffer *u32

_CLIENT_ID
  UniqueProcess *void
  UniqueThread *void

_DISPATCHER_HEADER
  Type u8
  | Lock i32
  Size u8 @2
  SignalState i32 @4
  WaitListHead _LIST_ENTRY

_KEVENT
  Header _DISPATCHER_HEADER

_KSEMAPHORE
  Header _DISPATCHER_HEADER
  Limit i32

_HANDLE_TABLE_ENTRY union size=16
  LowValue i64
  | Unlocked u64:1
  RefCnt u64:16
  Attributes u64:3
  ObjectPointerBits u64:44
  HighValue i64 @8
  | GrantedAccessBits u32:25
  NoRightsUpgrade u32:1
  Spare1 u32:6

_SID_IDENTIFIER_AUTHORITY
  Value 6*u8

_SID size=12
  Revision u8
  SubAuthorityCount u8
  IdentifierAuthority _SID_IDENTIFIER_AUTHORITY
  SubAuthority 1*u32

_SID_AND_ATTRIBUTES
  Sid *void
  Attributes u32

_LUID
  LowPart u32
  HighPart i32

_PS_PROTECTION union
  Level u8
  | Type u8:3
  Audit u8:1
  Signer u8:4

_SE_AUDIT_PROCESS_CREATION_INFO
  ImageFileName *_OBJECT_NAME_INFORMATION

_OBJECT_NAME_INFORMATION
  Name _UNICODE_STRING

_OBJECT_HEADER_CREATOR_INFO
  TypeList _LIST_ENTRY
  CreatorUniqueProcess *void
  CreatorBackTraceIndex u16
  Reserved1 u16

_OBJECT_HEADER_NAME_INFO
  Directory *void
  Name _UNICODE_STRING
  ReferenceCount i32

_OBJECT_HEADER_HANDLE_INFO
  HandleCountDataBase *void
  SingleEntry u64

_OBJECT_HEADER_QUOTA_INFO
  PagedPoolCharge u32
  NonPagedPoolCharge u32
  SecurityDescriptorCharge u32
  Reserved1 u32
  SecurityDescriptorQuotaBlock *void
  Reserved2 u64

_OBJECT_HEADER_PROCESS_INFO
  ExclusiveProcess *_EPROCESS
  Reserved u64

_OBJECT_HEADER_AUDIT_INFO
  SecurityDescriptor *void
  Reserved u64

_OBJECT_HEADER_EXTENDED_INFO
  Footer *void
  Reserved u64

_OBJECT_HEADER_PADDING_INFO
  PaddingAmount u32

_MMPTE_HARDWARE
  Valid u64:1
  Dirty1 u64:1
  Owner u64:1
  WriteThrough u64:1
  CacheDisable u64:1
  Accessed u64:1
  Dirty u64:1
  LargePage u64:1
  Global u64:1
  CopyOnWrite u64:1
  Unused u64:1
  Write u64:1
  PageFrameNumber u64:40
  ReservedForSoftware u64:4
  WsleAge u64:4
  WsleProtection u64:3
  NoExecute u64:1

_MMPTE_PROTOTYPE
  Valid u64:1
  DemandFillProto u64:1
  HiberVerifyConverted u64:1
  ReadOnly u64:1
  SwizzleBit u64:1
  Protection u64:5
  Prototype u64:1
  Combined u64:1
  Unused1 u64:4
  ProtoAddress i64:48

_MMPTE_SOFTWARE
  Valid u64:1
  PageFileReserved u64:1
  PageFileAllocated u64:1
  ColdPage u64:1
  SwizzleBit u64:1
  Protection u64:5
  Prototype u64:1
  Transition u64:1
  PageFileLow u64:4
  UsedPageTableEntries u64:10
  ShadowStack u64:1
  OnStandbyLookaside u64:1
  Unused u64:4
  PageFileHigh u64:32

_MMPTE_TRANSITION
  Valid u64:1
  Write u64:1
  OnStandbyLookaside u64:1
  IoTracker u64:1
  SwizzleBit u64:1
  Protection u64:5
  Prototype u64:1
  Transition u64:1
  PageFrameNumber u64:40
  Unused u64:12

__unnamed_pte union
  Long u64
  | Hard _MMPTE_HARDWARE
  | Proto _MMPTE_PROTOTYPE
  | Soft _MMPTE_SOFTWARE
  | Trans _MMPTE_TRANSITION

_MMPTE
  u __unnamed_pte

_SEP_TOKEN_PRIVILEGES
  Present u64
  Enabled u64
  EnabledByDefault u64

_POOL_TRACKER_BIG_PAGES
  Va u64
  Key u32
  Pattern u32:8
  PoolType u32:12
  SlushSize u32:12
  NumberOfBytes u64

_IMAGE_DOS_HEADER size=64
  e_magic u16
  e_lfanew i32 @0x3c

_GUID
  Data1 u32
  Data2 u16
  Data3 u16
  Data4 8*u8

_SECTION_OBJECT_POINTERS
  DataSectionObject *void
  SharedCacheMap *void
  ImageSectionObject *void
"""

LOOSE = """
_KAPC_STATE
  ApcListHead 2*_LIST_ENTRY @0
  Process *_KPROCESS
  InProgressFlags u8
  KernelApcPending u8
  UserApcPendingAll u8

_KAPC
  Type u8 @0
  Size u8
  Thread *_KTHREAD
  ApcListEntry _LIST_ENTRY
  KernelRoutine *void
  NormalRoutine *void
  NormalContext *void
  SystemArgument1 *void
  Inserted u8

_KTRAP_FRAME
  P1Home u64
  Rip u64
  SegCs u16
  EFlags u32
  Rsp u64

_KEXECUTE_OPTIONS
  ExecuteOptions u8
  | ExecuteDisable u8:1
  ExecuteEnable u8:1

_KPROCESS
  Header _DISPATCHER_HEADER @0
  Flags _KEXECUTE_OPTIONS
  ProfileListHead _LIST_ENTRY
  DirectoryTableBase u64
  ThreadListHead _LIST_ENTRY
  ProcessLock u32
  Affinity 2*u64
  BasePriority i8
  QuantumReset i8
  ProcessFlags i32
  ProcessListEntry _LIST_ENTRY
  CycleTime u64
  KernelTime u32
  UserTime u32
  UserDirectoryTableBase u64
  AddressPolicy u8
  InstrumentationCallback *void

_EPROCESS
  Pcb _KPROCESS @0
  ProcessLock _EX_PUSH_LOCK
  UniqueProcessId *void
  ActiveProcessLinks _LIST_ENTRY
  Flags2 u32
  | JobNotReallyActive u32:1
  AccountingFolded u32:1
  NewProcessReported u32:1
  ExitProcessReported u32:1
  Flags u32
  | CreateReported u32:1
  NoDebugInherit u32:1
  ProcessExiting u32:1
  ProcessDelete u32:1
  ManageExecutableMemoryWrites u32:1
  VmDeleted u32:1
  OutswapEnabled u32:1
  CreateTime _LARGE_INTEGER
  VirtualSize u64
  SessionProcessLinks _LIST_ENTRY
  Token _EX_FAST_REF
  NumberOfPrivatePages u64
  Win32Process *void
  Job *void
  SectionObject *void
  SectionBaseAddress *void
  Cookie u32
  Win32WindowStation *void
  InheritedFromUniqueProcessId *void
  OwnerProcessId u64
  Peb *_PEB
  Session *_MM_SESSION_SPACE
  ObjectTable *_HANDLE_TABLE
  DebugPort *void
  WoW64Process *_EWOW64PROCESS
  DeviceMap _EX_FAST_REF
  PageDirectoryPte u64
  ImageFilePointer *_FILE_OBJECT
  ImageFileName 15*u8
  PriorityClass u8
  SecurityPort *void
  SeAuditProcessCreationInfo _SE_AUDIT_PROCESS_CREATION_INFO
  JobLinks _LIST_ENTRY
  HighestUserAddress *void
  ThreadListHead _LIST_ENTRY
  ActiveThreads u32
  ImagePathHash u32
  MmProcessLinks _LIST_ENTRY
  ModifiedPageCount u32
  ExitStatus i32
  VadRoot _RTL_AVL_TREE
  VadHint *void
  VadCount u64
  ExitTime _LARGE_INTEGER
  SignatureLevel u8
  SectionSignatureLevel u8
  Protection _PS_PROTECTION
  Flags3 u32
  | Minimal u32:1
  ReplacingPageRoot u32:1
  Crashed u32:1
  SequenceNumber u64
  CreateInterruptTime u64
  ?Machine u16
  MitigationFlags u32
  MitigationFlags2 u32
  ParentSecurityDomain u64

_KTHREAD
  Header _DISPATCHER_HEADER @0
  InitialStack *void
  StackLimit *void
  StackBase *void
  KernelStack *void
  CycleTime u64
  Running u8
  MiscFlags i32
  ThreadFlags i32
  SystemCallNumber u32
  TrapFrame *void
  ApcState _KAPC_STATE
  Teb *void
  State u8
  WaitIrql u8
  WaitMode i8
  WaitTime u32
  Win32Thread *void
  Process *_KPROCESS
  PreviousMode i8
  BasePriority i8
  ApcStateIndex u8
  ContextSwitches u32
  WaitReason u8
  SuspendCount i8
  ThreadListEntry _LIST_ENTRY
  KernelTime u32
  UserTime u32
  Priority i8

_ETHREAD
  Tcb _KTHREAD @0
  CreateTime _LARGE_INTEGER
  ExitTime _LARGE_INTEGER
  StartAddress *void
  Cid _CLIENT_ID
  Win32StartAddress *void
  ThreadListEntry _LIST_ENTRY
  CrossThreadFlags u32
  | Terminated u32:1
  ThreadInserted u32:1
  HideFromDebugger u32:1
  ActiveImpersonationInfo u32:1
  SameThreadPassiveFlags u32
  ExitStatus i32
  ThreadName *_UNICODE_STRING

_MMVAD_FLAGS
  %VadType u32:3
  Protection u32:5
  PreferredNode u32:6
  PrivateMemory u32:1
  Graphics u32:1

_MMVAD_FLAGS1
  CommitCharge u32:31
  MemCommit u32:1

_MMVAD_FLAGS2
  FileOffset u32:24
  Large u32:1
  Inherit u32:1

__unnamed_vad_u union
  LongFlags u32
  | VadFlags _MMVAD_FLAGS

__unnamed_vad_u1 union
  LongFlags1 u32
  | VadFlags1 _MMVAD_FLAGS1

__unnamed_vad_u2 union
  LongFlags2 u32
  | VadFlags2 _MMVAD_FLAGS2

_MMVAD_SHORT
  VadNode _RTL_BALANCED_NODE @0
  StartingVpn u32
  EndingVpn u32
  StartingVpnHigh u8
  EndingVpnHigh u8
  CommitChargeHigh u8
  ReferenceCount i32
  PushLock _EX_PUSH_LOCK
  u __unnamed_vad_u
  u1 __unnamed_vad_u1

_MMVAD
  Core _MMVAD_SHORT @0
  u2 __unnamed_vad_u2
  Subsection *_SUBSECTION
  FirstPrototypePte *_MMPTE
  LastContiguousPte *_MMPTE
  ViewLinks _LIST_ENTRY
  VadsProcess *_EPROCESS
  FileObject *_FILE_OBJECT

_SUBSECTION
  ControlArea *_CONTROL_AREA
  SubsectionBase *_MMPTE
  NextSubsection *_SUBSECTION
  StartingSector u32
  NumberOfFullSectors u32
  PtesInSubsection u32

_MMSECTION_FLAGS
  BeingDeleted u32:1
  BeingCreated u32:1
  %Image u32:1
  Based u32:1
  File u32:1
  WasPurged u32:1
  UserReference u32:1
  DeleteOnClose u32:1

__unnamed_section_u union
  LongFlags u32
  | Flags _MMSECTION_FLAGS

_CONTROL_AREA
  Segment *_SEGMENT
  ListHead _LIST_ENTRY
  NumberOfSectionReferences u64
  NumberOfPfnReferences u64
  NumberOfMappedViews u64
  NumberOfUserReferences u64
  u __unnamed_section_u
  FilePointer _EX_FAST_REF

_SEGMENT
  ControlArea *_CONTROL_AREA
  TotalNumberOfPtes u32
  NumberOfCommittedPages u64
  SizeOfSegment u64
  BasedAddress *void
  PrototypePte *_MMPTE

__unnamed_section_u1 union
  ControlArea *_CONTROL_AREA
  | FileObject *_FILE_OBJECT

_SECTION
  SectionNode _RTL_BALANCED_NODE @0
  StartingVpn u64
  EndingVpn u64
  u1 __unnamed_section_u1
  SizeOfSection u64
  u __unnamed_section_u

_FILE_OBJECT
  Type i16 @0
  Size i16
  DeviceObject *_DEVICE_OBJECT
  Vpb *void
  FsContext *void
  SectionObjectPointer *_SECTION_OBJECT_POINTERS
  DeletePending u8
  ReadAccess u8
  WriteAccess u8
  DeleteAccess u8
  SharedRead u8
  SharedWrite u8
  SharedDelete u8
  Flags u32
  FileName _UNICODE_STRING

_DEVICE_OBJECT
  Type i16 @0
  Size u16
  DriverObject *_DRIVER_OBJECT
  NextDevice *_DEVICE_OBJECT
  AttachedDevice *_DEVICE_OBJECT
  Characteristics u32
  DeviceType u32

_DRIVER_OBJECT
  Type i16 @0
  Size i16
  DeviceObject *_DEVICE_OBJECT
  DriverStart *void
  DriverSize u32
  DriverSection *void
  DriverExtension *_DRIVER_EXTENSION
  DriverName _UNICODE_STRING
  HardwareDatabase *_UNICODE_STRING
  DriverInit *void
  DriverStartIo *void
  DriverUnload *void
  MajorFunction 28**void

_DRIVER_EXTENSION
  DriverObject *_DRIVER_OBJECT
  ServiceKeyName _UNICODE_STRING

_HANDLE_TABLE
  NextHandleNeedingPool u32
  ExtraInfoPages i32
  TableCode u64
  QuotaProcess *_EPROCESS
  HandleTableList _LIST_ENTRY
  UniqueProcessId u32
  Flags u32

_OBJECT_HEADER
  PointerCount i64
  HandleCount i64
  Lock _EX_PUSH_LOCK
  TypeIndex u8
  TraceFlags u8
  InfoMask u8
  Flags u8
  QuotaBlockCharged *void
  SecurityDescriptor *void
  Body u64 align=16

_OBJECT_TYPE
  TypeList _LIST_ENTRY
  Name _UNICODE_STRING
  DefaultObject *void
  Index u8
  TotalNumberOfObjects u32
  TotalNumberOfHandles u32
  Key u32

_OBJECT_SYMBOLIC_LINK
  CreationTime _LARGE_INTEGER
  LinkTarget _UNICODE_STRING
  DosDeviceDriveIndex u32

_TOKEN
  TokenId _LUID
  AuthenticationId _LUID
  Privileges _SEP_TOKEN_PRIVILEGES
  SessionId u32
  UserAndGroupCount u32
  RestrictedSidCount u32
  UserAndGroups *_SID_AND_ATTRIBUTES
  PrimaryGroup *void
  TokenType i32
  TokenFlags u32
  IntegrityLevelIndex u32

_PEB
  InheritedAddressSpace u8
  ReadImageFileExecOptions u8
  BeingDebugged u8
  ImageBaseAddress *void
  Ldr *_PEB_LDR_DATA
  ProcessParameters *_RTL_USER_PROCESS_PARAMETERS
  ProcessHeap *void
  NumberOfProcessors u32
  NtGlobalFlag u32
  OSMajorVersion u32
  OSMinorVersion u32
  OSBuildNumber u16
  OSPlatformId u32
  ImageSubsystem u32
  SessionId u32
  CSDVersion _UNICODE_STRING

_PEB_LDR_DATA
  Length u32
  Initialized u8
  InLoadOrderModuleList _LIST_ENTRY
  InMemoryOrderModuleList _LIST_ENTRY
  InInitializationOrderModuleList _LIST_ENTRY

_LDR_DATA_TABLE_ENTRY
  InLoadOrderLinks _LIST_ENTRY @0
  InMemoryOrderLinks _LIST_ENTRY
  InInitializationOrderLinks _LIST_ENTRY
  DllBase *void
  EntryPoint *void
  SizeOfImage u32
  FullDllName _UNICODE_STRING
  BaseDllName _UNICODE_STRING
  Flags u32
  ObsoleteLoadCount u16
  TlsIndex u16
  HashLinks _LIST_ENTRY
  TimeDateStamp u32
  OriginalBase u64
  LoadTime _LARGE_INTEGER
  LoadReason i32

_CURDIR
  DosPath _UNICODE_STRING
  Handle *void

_RTL_USER_PROCESS_PARAMETERS
  MaximumLength u32
  Length u32
  Flags u32
  CurrentDirectory _CURDIR
  DllPath _UNICODE_STRING
  ImagePathName _UNICODE_STRING
  CommandLine _UNICODE_STRING
  Environment *void
  WindowTitle _UNICODE_STRING
  DesktopInfo _UNICODE_STRING
  EnvironmentSize u64

_MM_SESSION_SPACE size=0x1000
  ReferenceCount i32
  SessionId u32
  ProcessReferenceToSession i32
  ProcessList _LIST_ENTRY

_EWOW64PROCESS
  Peb *void
  NtdllType u32

_KPCR
  Self *_KPCR @0x18
  IdtBase *void @0x38
  CurrentPrcb *_KPRCB @0x20

_KPRCB
  CurrentThread *_KTHREAD
  Number u32
  PendingTickFlags u8

_KTIMER
  Header _DISPATCHER_HEADER @0
  DueTime _LARGE_INTEGER
  Dpc *void

_KMUTANT
  Header _DISPATCHER_HEADER @0
  MutantListEntry _LIST_ENTRY
  OwnerThread *_KTHREAD

_ERESOURCE
  SystemResourcesList _LIST_ENTRY
  NumberOfSharedWaiters u32

_SHARED_CACHE_MAP
  FileSize _LARGE_INTEGER
  SectionSize _LARGE_INTEGER
  ValidDataLength _LARGE_INTEGER

_VACB
  BaseAddress *void
  SharedCacheMap *_SHARED_CACHE_MAP

_CM_KEY_BODY
  KeyControlBlock *void

_CMHIVE
  HiveList _LIST_ENTRY

_CM_KEY_NODE
  Signature u16

_CM_KEY_VALUE
  Signature u16

_HMAP_ENTRY
  BlockAddress u64

_WNF_PROCESS_CONTEXT
  Process *_EPROCESS
"""

# What only some families have: the engines tell versions by such types.
EXTRA = {
    "19041": "_KQOS_GROUPING_SETS\n  SingleCoreSet u64\n",
    "20348": "_KQOS_GROUPING_SETS\n  SingleCoreSet u64\n",
    "26100": "_KQOS_GROUPING_SETS\n  SingleCoreSet u64\n",
}
SALT = {"17763": 18, "19041": 5, "20348": 5, "26100": 2}  # drawn so that nothing that matters lies where Windows has it
WITHOUT = {"26100": {"_MM_SESSION_SPACE"}}  # of Windows 11 24H2 on it is named otherwise and its members are untold
PLAIN_FIELD = re.compile(
    r"^(?P<mark>[|?%] ?)?(?P<name>\w+) (?P<type>.+?)(?: @(?P<at>0x[0-9a-f]+|\d+))?(?: align=(?P<align>\d+))?$"
)


@cache
def invent(family: str) -> Json:
    """The ``user_types`` and ``enums`` of a family, as an ISF holds them; the same every time."""
    types: Json = {}
    without = WITHOUT.get(family, set())
    for text, loose in ((FIXED, False), (LOOSE, True), (EXTRA.get(family, ""), True)):
        for block in text.strip().split("\n\n"):
            if block:
                name = block.split()[0]
                rng = random.Random(f"{family}/{SALT[family]}/{name}") if loose else None
                definition = _structure(block, types, rng, family)
                if name not in without:
                    types[name] = definition
    enums = {name: {"base": "int", "constants": constants, "size": 4} for name, constants in ENUMS.items()}
    return {"user_types": types, "enums": enums}


def base_types() -> Json:
    return {
        name: {"size": size, "signed": signed, "kind": kind, "endian": "little"}
        for name, (size, signed, kind) in BASE.items()
    }


def _structure(block: str, types: Json, rng: random.Random | None, family: str) -> Json:
    heading, *lines = block.split("\n")
    words = heading.split()
    size = next((int(word[5:], 0) for word in words if word.startswith("size=")), 0)
    union = "union" in words
    end = start = bit = 0
    alignment = 1
    unit = -1  # where the bit-fields in hand lie
    moved = False  # the first field that may be elsewhere is
    fields: Json = {}
    for line in lines:
        match = PLAIN_FIELD.match(line.strip())
        assert match, line
        mark = (match["mark"] or "").strip()
        if mark == "?" and family == "17763":
            continue
        kind, width, length = _type(match["type"], types)
        align = int(match["align"] or min(8, _alignment(match["type"], types, width)))
        alignment = max(alignment, align)
        if length:
            if mark == "|":
                unit, bit = start, 0
            elif unit < 0 or bit + length > 8 * width:
                unit, bit = (0 if union and not fields else -(-end // align) * align), 0
                start = unit
            if mark == "%" and rng is not None:
                bit += rng.randrange(1, 8)
            kind = {"kind": "bitfield", "bit_position": bit, "bit_length": length, "type": kind}
            fields[match["name"]] = {"offset": unit, "type": kind}
            bit += length
            end = max(end, unit + width)
            continue
        if match["at"] is not None:
            offset = int(match["at"], 0)
        elif mark == "|":
            offset = start
        else:
            if rng is not None and not union:
                end += rng.choice((0, 0, 0, 8, 8, 16, 24) if moved else (8, 16, 24, 32))
                moved = True
            offset = -(-end // align) * align
        fields[match["name"]] = {"offset": offset, "type": kind}
        start, unit, end = offset, -1, max(end, offset + width)
    return {"kind": "union" if union else "struct", "size": size or -(-end // alignment) * alignment, "fields": fields}


def _type(text: str, types: Json) -> tuple[Json, int, int]:
    """A type as ISF says it, its size, and its length in bits where it is a bit-field."""
    text = text.strip()
    if ":" in text:
        name, length = text.split(":")
        kind, width, _ = _type(name, types)
        return kind, width, int(length)
    if text.startswith("*"):
        return {"kind": "pointer", "subtype": _pointed(text[1:])}, 8, 0
    if "*" in text:
        count, rest = text.split("*", 1)
        kind, width, _ = _type(rest, types)
        return {"kind": "array", "count": int(count), "subtype": kind}, int(count) * width, 0
    name = SHORT.get(text, text)
    if name in BASE:
        return {"kind": "base", "name": name}, BASE[name][0], 0
    if name in ENUMS:
        return {"kind": "enum", "name": name}, 4, 0
    return {"kind": types[name]["kind"], "name": name}, types[name]["size"], 0


def _pointed(text: str) -> Json:
    if text.startswith("*"):
        return {"kind": "pointer", "subtype": _pointed(text[1:])}
    name = SHORT.get(text, text)
    if name in BASE:
        return {"kind": "base", "name": name}
    pattern = re.search(rf"^{name}(?: (union))?", FIXED + LOOSE, re.MULTILINE)
    if pattern is None:
        return {"kind": "base", "name": "void"}
    return {"kind": pattern[1] or "struct", "name": name}


def _alignment(text: str, types: Json, width: int) -> int:
    if "*" in text and not text.startswith("*"):
        return _alignment(text.split("*", 1)[1], types, width)
    name = text.split(":", maxsplit=1)[0].strip()
    if name.startswith("*") or SHORT.get(name, name) in BASE:
        return 8 if name.startswith("*") else max(1, BASE[SHORT.get(name, name)][0])
    if name in ENUMS:
        return 4
    return max((_field_alignment(field["type"], types) for field in types[name]["fields"].values()), default=1)


def _field_alignment(kind: Json, types: Json) -> int:
    if kind["kind"] == "pointer":
        return 8
    if kind["kind"] == "base":
        return max(1, BASE[kind["name"]][0])
    if kind["kind"] == "array":
        return _field_alignment(kind["subtype"], types)
    if kind["kind"] == "bitfield":
        return _field_alignment(kind["type"], types)
    if kind["kind"] == "enum":
        return 4
    return max((_field_alignment(field["type"], types) for field in types[kind["name"]]["fields"].values()), default=1)
