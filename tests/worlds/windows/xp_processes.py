"""The processes of a Windows XP or Server 2003 made of bytes: objects, threads, tokens, VADs, and their own memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.worlds.windows.paging import PAGE
from tests.worlds.windows.xp_image import image
from tests.worlds.windows.xp_kernel import SYMBOLS, Kernel, unicode_string
from tests.worlds.windows.xp_paging import AnySpace

RWX, READWRITE, WRITECOPY_X = 6, 4, 7


@dataclass
class Process:
    """What was planted of a process."""

    va: int
    pid: int
    name: str
    path: str | None
    space: AnySpace
    dtb: int
    created: int  # a FILETIME
    ppid: int = 4
    hidden: bool = False
    exited: bool = False
    threads: list[int] = field(default_factory=list)
    vads: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    next_va: int = 0x0090_0000
    ldr: int = 0


@dataclass
class Mapped:
    """A run of user memory with a VAD of its own."""

    start: int
    size: int
    vad: int


class Processes:
    """Makes them, and what belongs to them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.all: list[Process] = []
        self._next_pid, self._next_tid = 1000, 300

    def make(
        self,
        name: str,
        *,
        pid: int | None = None,
        parent: int = 4,
        path: str | None = "",
        command: str | None = None,
        sid: str = "S-1-5-18",
        session: int = 0,
        hidden: bool = False,
        exited: bool = False,
        created: int | None = None,
    ) -> Process:
        """A process with a thread, an address space and its own image; ``hidden``: it is taken off the list."""
        if pid is None:
            self._next_pid += 4 * self.kernel.random.randrange(1, 20)
            pid = self._next_pid
        self.kernel.tick()
        if path == "":
            path = f"C:\\WINDOWS\\system32\\{name}"
        time = 0 if pid == 4 else self.kernel.filetime() if created is None else created
        va = self.kernel.object(b"Pro\xe3", "_EPROCESS", "Process")
        space, dtb = (self.kernel.space, self.kernel.root) if pid == 4 else self.kernel.user_space()
        made = Process(va, pid, name, path, space, dtb, time, parent, hidden, exited)
        put = self.kernel.put
        put(va, "_EPROCESS.Pcb.Header.Type", 3)
        put(va, "_EPROCESS.Pcb.Header.Size", self.kernel.types.size("_KPROCESS") // 4)
        put(va, "_EPROCESS.Pcb.DirectoryTableBase", dtb)
        put(va, "_EPROCESS.CreateTime", time)
        put(va, "_EPROCESS.ExitTime", self.kernel.filetime() if exited else 0)
        put(va, "_EPROCESS.ExitStatus", 0 if exited else 0x103)
        put(va, "_EPROCESS.UniqueProcessId", pid)
        put(va, "_EPROCESS.InheritedFromUniqueProcessId", parent)
        put(va, "_EPROCESS.ImageFileName", name.encode()[:15])
        put(va, "_EPROCESS.Token", self._token(sid, session) | 3)
        put(va, "_EPROCESS.ObjectTable", self.kernel.pool.take(b"Obtb", self.kernel.types.size("_HANDLE_TABLE")))
        self.kernel.ring(va + self.kernel.types.offset("_EPROCESS.ThreadListHead"))
        if pid != 4:
            put(va, "_EPROCESS.Session", self._session(session))
            audit = self.kernel.block(b"SeAu", self.kernel.unicode(f"\\Device\\HarddiskVolume1{_kernel_path(path)}"))
            put(va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName", audit)
            self._user_part(made, command)
        node = va + self.kernel.types.offset("_EPROCESS.ActiveProcessLinks")
        if hidden:
            self.kernel.ring(node)
        else:
            self.kernel.append(self.kernel.base + SYMBOLS["PsActiveProcessHead"], node)
        self.kernel.enter_cid(pid, va)
        self.all.append(made)
        self.thread(made, 0x80500000 if pid == 4 else 0x00401000)
        return made

    def thread(self, process: Process, start: int) -> int:
        """A thread that began at ``start``; its address."""
        va = self.kernel.object(b"Thr\xe5", "_ETHREAD", "Thread")
        self._next_tid += 4
        put = self.kernel.put
        put(va, "_ETHREAD.Tcb.Header.Type", 6)
        put(va, "_ETHREAD.Tcb.Header.Size", self.kernel.types.size("_KTHREAD") // 4)
        put(va, "_ETHREAD.Tcb.State", 5)
        put(va, "_ETHREAD.Tcb.ApcState.Process", process.va)
        put(va, "_ETHREAD.CreateTime", process.created or self.kernel.filetime())
        put(va, "_ETHREAD.Cid.UniqueProcess", process.pid)
        put(va, "_ETHREAD.Cid.UniqueThread", self._next_tid)
        put(va, "_ETHREAD.ThreadsProcess", process.va)
        put(va, "_ETHREAD.StartAddress", 0x7C810659)  # kernel32!BaseThreadStartThunk
        put(va, "_ETHREAD.Win32StartAddress", start)
        head = process.va + self.kernel.types.offset("_EPROCESS.ThreadListHead")
        self.kernel.append(head, va + self.kernel.types.offset("_ETHREAD.ThreadListEntry"))
        process.threads.append(va)
        put(process.va, "_EPROCESS.ActiveThreads", len(process.threads))
        return va

    def region(
        self,
        process: Process,
        size: int,
        protection: int,
        content: bytes = b"",
        private: bool = True,
        *,
        start: int | None = None,
        file: str | None = None,
    ) -> Mapped:
        """Mapped memory and the VAD that tells of it; ``protection`` is an index of MmProtectToValue."""
        if start is None:
            start = process.next_va
            process.next_va += -(-size // 0x10000) * 0x10000 + 0x10000
        count = -(-size // PAGE)
        writable, execute = protection in (READWRITE, RWX), bool(protection & 2)
        process.space.map(start, self.kernel.ram.page(count), count, user=True, writable=writable, execute=execute)
        process.space.write(start, content)
        return Mapped(start, count * PAGE, self._vad(process, start, count, protection, private, file))

    def module(self, process: Process, name: str, path: str, *, in_ldr: bool = True, in_vad: bool = True) -> int:
        """A DLL; the address of its image."""
        size = 0x6000
        start = process.next_va
        process.next_va += 0x20000
        pieces = image(size, f"{name}.pdb", self.kernel.guid, wide=self.kernel.wide, base=start)
        if in_vad:
            self.region(process, size, WRITECOPY_X, pieces, private=False, start=start, file=path)
        else:
            self.region(process, size, WRITECOPY_X, pieces, start=start)
        if in_ldr:
            self._load(process, start, size, path)
        return start

    # -- objects --

    def _token(self, sid: str, session: int) -> int:
        header = self.kernel.types.offset("_OBJECT_HEADER.Body")
        size, pointer = self.kernel.types.size("_TOKEN"), self.kernel.pointer
        va = self.kernel.pool.take(b"Toke", header + size + 2 * pointer + 0x40) + header
        self.kernel.put(va - header, "_OBJECT_HEADER.Type", self.kernel.object_types["Token"])
        numbers = [int(part) for part in sid.split("-")[1:]]
        raw = struct.pack("<BB", numbers[0], len(numbers) - 2) + numbers[1].to_bytes(6, "big")
        raw += b"".join(struct.pack("<I", part) for part in numbers[2:])
        groups, text = va + size, va + size + 2 * pointer
        self.kernel.space.write(text, raw)
        self.kernel.put_pointer(groups, text)
        self.kernel.put(va, "_TOKEN.UserAndGroupCount", 1)
        self.kernel.put(va, "_TOKEN.UserAndGroups", groups)
        self.kernel.put(va, "_TOKEN.SessionId", session)
        return va

    def _session(self, number: int) -> int:
        va = self.kernel.pool.take(b"MmSn", 0x40)
        self.kernel.put(va, "_MM_SESSION_SPACE.SessionId", number)
        return va

    # -- user space --

    def _user_part(self, process: Process, command: str | None) -> None:
        """KUSER_SHARED_DATA, PEB, parameters, loader lists, the program's image."""
        process.space.map(0x7FFE0000, self.kernel.shared, user=True, writable=False)
        path = process.path or process.name
        space, put = process.space, self.kernel.put
        peb, parameters, ldr = 0x7FFD5000, 0x20000, 0x241000
        for va, count in ((peb, 1), (parameters, 2), (ldr, 2)):
            space.map(va, self.kernel.ram.page(count), count, user=True)
            self._vad(process, va, count, READWRITE, True, None)
        put(peb, "_PEB.ImageBaseAddress", 0x400000, space)
        put(peb, "_PEB.Ldr", ldr, space)
        put(peb, "_PEB.ProcessParameters", parameters, space)
        put(peb, "_PEB.OSMajorVersion", 5, space)
        put(peb, "_PEB.OSMinorVersion", self.kernel.minor, space)
        put(peb, "_PEB.OSBuildNumber", self.kernel.kind.build, space)
        put(process.va, "_EPROCESS.Peb", peb)
        put(process.va, "_EPROCESS.SectionBaseAddress", 0x400000)
        at = parameters + 0x800
        for name, text in (("ImagePathName", path), ("CommandLine", command or path)):
            words = unicode_string(text, at, self.kernel.pointer)
            put(parameters, f"_RTL_USER_PROCESS_PARAMETERS.{name}", words, space)
            space.write(at, text.encode("utf-16-le"))
            at += 2 * len(text) + 2
        environment = "USERDOMAIN=LAB\0USERNAME=alice\0\0".encode("utf-16-le")
        space.write(parameters + PAGE, environment)
        put(parameters, "_RTL_USER_PROCESS_PARAMETERS.Environment", parameters + PAGE, space)
        put(parameters, "_RTL_USER_PROCESS_PARAMETERS.Length", 0x1000, space)
        process.ldr, process.next_va = ldr, 0x0090_0000
        for name in ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"):
            self.kernel.ring(ldr + self.kernel.types.offset(f"_PEB_LDR_DATA.{name}ModuleList"), space)
        put(ldr, "_PEB_LDR_DATA.Initialized", 1, space)
        for start, file in ((0x400000, path), (0x7C900000, "C:\\WINDOWS\\system32\\ntdll.dll")):
            pdb = file.rsplit("\\", 1)[-1] + ".pdb"
            pieces = image(0x6000, pdb, self.kernel.guid, wide=self.kernel.wide, base=start)
            self.region(process, 0x6000, WRITECOPY_X, pieces, private=False, start=start, file=file)
            self._load(process, start, 0x6000, file)

    def _load(self, process: Process, start: int, size: int, path: str) -> None:
        space = process.space
        step = 0x100 + 4 * len(path)
        name, pointer = path.rsplit("\\", 1)[-1], self.kernel.pointer
        entry = process.ldr + 0x100 + sum(0x100 + 4 * len(each) + 16 & -8 for each in process.modules)
        self.kernel.module_entry(
            space, entry, start, size, name, path, lambda text, at: unicode_string(text, at, pointer)
        )
        assert entry + step < process.ldr + 2 * PAGE
        for order in ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"):
            head = process.ldr + self.kernel.types.offset(f"_PEB_LDR_DATA.{order}ModuleList")
            self.kernel.append(head, entry + self.kernel.types.offset(f"_LDR_DATA_TABLE_ENTRY.{order}Links"), space)
        process.modules.append(path)

    def _vad(self, process: Process, start: int, count: int, protection: int, private: bool, file: str | None) -> int:
        name = "_MMVAD_SHORT" if private else "_MMVAD"
        va = self.kernel.pool.take(b"VadS" if private else b"Vad ", self.kernel.types.size(name))
        put = self.kernel.put
        put(va, f"{name}.StartingVpn", start >> 12)
        put(va, f"{name}.EndingVpn", (start >> 12) + count - 1)
        put(va, f"{name}.u.VadFlags.Protection", protection)
        put(va, f"{name}.u.VadFlags.PrivateMemory", int(private))
        put(va, f"{name}.u.VadFlags.CommitCharge", count if private else 0)
        if file is not None and not private:
            if self.kernel.types.has(f"{name}.u.VadFlags.ImageMap"):
                put(va, f"{name}.u.VadFlags.ImageMap", 1)
            area = self.kernel.pool.take(b"MmCa", self.kernel.types.size("_CONTROL_AREA"))
            put(area, "_CONTROL_AREA.FilePointer", self._file(file))
            put(va, f"{name}.ControlArea", area)
        self._grow(process, va, start >> 12)
        process.vads.append(va)
        return va

    def _grow(self, process: Process, va: int, page: int) -> None:
        """Hang a VAD into the tree; on 2003 the tree hangs right below the table's own root node."""
        root = process.va + self.kernel.types.offset("_EPROCESS.VadRoot")
        old = self.kernel.kind.build == 2600
        right, left = (self.kernel.types.offset(f"_MMVAD_SHORT.{side}Child") for side in ("Right", "Left"))
        at, parent = (root, 0) if old else (root + right, root)
        while node := self.kernel.read_pointer(at):
            parent = node
            begins = self.kernel.read_pointer(node + self.kernel.types.offset("_MMVAD_SHORT.StartingVpn"))
            at = node + (left if page < begins else right)
        self.kernel.put_pointer(at, va)
        if old:
            self.kernel.put(va, "_MMVAD_SHORT.Parent", parent)
        else:
            self.kernel.put_pointer(va, parent)

    def _file(self, path: str) -> int:
        header = self.kernel.types.offset("_OBJECT_HEADER.Body")
        va = self.kernel.pool.take(b"Fil\xe5", header + self.kernel.types.size("_FILE_OBJECT")) + header
        self.kernel.put(va - header, "_OBJECT_HEADER.Type", self.kernel.object_types["File"])
        self.kernel.put(va, "_FILE_OBJECT.FileName", self.kernel.unicode(_kernel_path(path)))
        return va


def _kernel_path(path: str | None) -> str:
    if not path:
        return ""
    return path[2:] if path[1:2] == ":" else path.replace("\\SystemRoot", "\\WINDOWS")
