"""One ``_EPROCESS``: the members that we want, as read at one instant.

Sources: _EPROCESS, _KPROCESS, _DISPATCHER_HEADER, _SE_AUDIT_PROCESS_CREATION_INFO of ntkrnlmp.pdb; _KOBJECTS (wdm.h);
FILETIME (MS-DTYP 2.3.3: steps of 100 ns since 1601).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from appliance.guest.windows.isf import SymbolTable
from appliance.guest.windows.record import Record
from appliance.model import ProcessKey

PROCESS_OBJECT: Final = 3  # _KOBJECTS.ProcessObject
THREAD_OBJECT: Final = 6  # _KOBJECTS.ThreadObject
UNIX_EPOCH: Final = 116_444_736_000_000_000  # as a FILETIME
PLAUSIBLE_NS: Final = range(315_532_800 * 10**9, 7_258_118_400 * 10**9)  # years 1980 to 2200, by the guest's clock
MEMBERS: Final = (
    "UniqueProcessId",
    "InheritedFromUniqueProcessId",
    "Pcb.DirectoryTableBase[0]",  # an array until Server 2003
    "CreateTime",
    "ExitTime",
    "ImageFileName",
    "Pcb.Header.Type",
    "ActiveProcessLinks.Flink",
    "ActiveProcessLinks.Blink",
    "ThreadListHead.Flink",
    "ThreadListHead.Blink",
    "Token?",
    "Peb",
    "Session?",
    "WoW64Process?",  # since Windows 8
    "Wow64Process?",  # until Windows 7, x64
    "SeAuditProcessCreationInfo.ImageFileName?",
    "ImageFilePointer?",  # since Windows 10
    "SectionBaseAddress?",
    "SignatureLevel?",  # since Windows 8
    "Protection?",  # since Windows 8.1
)


class RawProcess(NamedTuple):
    """One ``_EPROCESS``. Times are nanoseconds since the Unix epoch, 0 where the guest has none; pointers are VAs."""

    va: int
    pid: int
    ppid: int
    dtb: int  # Pcb.DirectoryTableBase, with its flags
    created: int
    exited: int
    name: str  # ImageFileName: cut at 14 characters
    kind: int  # Pcb.Header.Type
    flink: int  # ActiveProcessLinks
    blink: int
    thread_flink: int  # ThreadListHead
    thread_blink: int
    token: int  # an _EX_FAST_REF: its lowest bits count references
    peb: int
    session: int
    wow64: int
    audit: int  # SeAuditProcessCreationInfo.ImageFileName
    file: int  # ImageFilePointer
    section_base: int
    signature_level: int
    protection: int

    @property
    def key(self) -> ProcessKey:
        """Its identity."""
        return ProcessKey(self.pid, self.created)


class Layout:
    """Reads ``_EPROCESS`` structures as one build of Windows lays them out."""

    def __init__(self, types: SymbolTable) -> None:
        self._record = Record(types, "_EPROCESS", MEMBERS)

    def span(self, va: int) -> tuple[int, int]:
        """The span to read for :meth:`parse`."""
        return va + self._record.low, self._record.size

    def parse(self, va: int, raw: bytes) -> RawProcess:
        """A process from the bytes of its span; nothing is checked."""
        pid, ppid, dtb, created, exited, name, *rest = self._record.parse(raw)
        kind, flink, blink, first, last, token, peb, session, wow64, older_wow64, *others = rest
        text = name.split(b"\0", 1)[0].decode("latin-1") if isinstance(name, bytes) else ""
        times = time_ns(created), time_ns(exited)
        pointers = flink, blink, first, last, token, peb, session, wow64 or older_wow64
        return RawProcess(va, pid, ppid, dtb, *times, text, kind, *pointers, *others)


def time_ns(filetime: int) -> int:
    """A FILETIME as nanoseconds since the Unix epoch; 0 where there is none."""
    return (filetime - UNIX_EPOCH) * 100 if filetime else 0


def is_plausible_time(at_ns: int) -> bool:
    """Whether something can have happened then."""
    return at_ns in PLAUSIBLE_NS
