"""Processes and threads: objects, tokens, handle tables, sessions, and what a process's own memory says of it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.worlds.windows import wow64
from tests.worlds.windows.boot import KUSER_USER_VA, Kernel, filetime
from tests.worlds.windows.files import File, Files, is_32_bit
from tests.worlds.windows.memory import Memory, Region
from tests.worlds.windows.paging import PAGE, Space

WAITING, TERMINATED = 5, 4
SYSTEM_SID = "S-1-5-18"
ADMINISTRATORS, EVERYONE = "S-1-5-32-544", "S-1-1-0"
USERS = {
    "S-1-5-18": ("NT AUTHORITY", "SYSTEM"),
    "S-1-5-19": ("NT AUTHORITY", "LOCAL SERVICE"),
    "S-1-5-20": ("NT AUTHORITY", "NETWORK SERVICE"),
    "S-1-5-90-0-1": ("Window Manager", "DWM-1"),
}
NTDLL, KERNEL32 = "C:\\Windows\\System32\\ntdll.dll", "C:\\Windows\\System32\\kernel32.dll"
NTDLL_VA, KERNEL32_VA = 0x7FFB_9A00_0000, 0x7FFB_9800_0000
IMAGE_VA, HEAP_VA, STACK_VA, PEB_VA = 0x7FF6_4000_0000, 0x01C0_5A00_0000, 0x00B0_4A00_0000, 0x00B0_4900_0000
REGION_VA, DLL_VA, VIEW_VA = 0x01C0_8000_0000, 0x7FFB_8000_0000, 0x01C0_7000_0000
LISTS = ("InLoadOrder", "InMemoryOrder", "InInitializationOrder")


@dataclass
class Thread:
    """One thread."""

    tid: int
    va: int  # _ETHREAD
    teb: int
    start: int
    exited: bool = False


@dataclass
class Module:
    """A DLL or the program itself, as it is mapped in one process."""

    name: str
    path: str
    base: int
    size: int
    region: Region | None
    file: File
    entry_va: int = 0  # _LDR_DATA_TABLE_ENTRY in the process, 0 where the loader does not list it


@dataclass
class Process:
    """One process, and what is true of it."""

    va: int
    pid: int
    ppid: int
    name: str
    dtb: int
    path: str | None
    command: str | None
    sid: str
    session: int | None
    created_ns: int
    exited_ns: int = 0
    hidden: bool = False
    memory: Memory | None = None
    peb: int = 0
    params: int = 0
    ldr: int = 0
    heap: int = 0
    handles: int = 0  # the page of its handle table
    threads: list[Thread] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    next_handle: int = 4
    second: wow64.Second | None = None  # the loader of a 32-bit process

    @property
    def exited(self) -> bool:
        return self.exited_ns != 0

    @property
    def user(self) -> Memory:
        assert self.memory is not None, f"{self.name} has no user memory"
        return self.memory


class Processes:
    """Makes, hides, ends them."""

    def __init__(self, kernel: Kernel, files: Files) -> None:
        self.kernel, self.files = kernel, files
        self.all: list[Process] = []
        self._pids = 0
        self._sessions: dict[int, int] = {}
        self._cid_pages: dict[int, int] = {}
        self._cid_table()

    # -- the verbs --

    def make(
        self,
        name: str,
        *,
        pid: int | None,
        parent: int,
        path: str | None,
        command: str | None,
        sid: str,
        session: int | None,
        created_ns: int,
        hidden: bool = False,
        exited_ns: int = 0,
        user: bool = True,
        minimal: bool = False,
        signer: int = 0,
        signature: int = 0,
    ) -> Process:
        """A process with all that belongs to it; it is put on the lists last."""
        kernel, types = self.kernel, self.kernel.types
        pid = self._number(pid)
        root = kernel.space.root if pid == 4 else kernel.ram.page()
        shadow = kernel.shadow() if kernel.kva_shadow and user else 0
        space = kernel.space if pid == 4 else Space(kernel.ram, root, kernel.space.levels, kernel.space, shadow)
        va = kernel.object("Process", b"Proc", types.pack("_EPROCESS", {}))
        process = Process(va, pid, parent, name, root, path, command, sid, session, created_ns, exited_ns, hidden)
        process.memory = Memory(kernel, space, va) if user else None
        values: dict[str, int | bytes] = {
            "Pcb.Header.Type": 3,
            "Pcb.Header.Size": types.size("_KPROCESS") // 4 & 0xFF,
            "Pcb.DirectoryTableBase": root,
            "Pcb.UserDirectoryTableBase": shadow or 1,
            "Pcb.BasePriority": 8,
            "UniqueProcessId": pid,
            "InheritedFromUniqueProcessId": parent,
            "OwnerProcessId": parent,
            "CreateTime": filetime(created_ns) if pid != 4 else 0,
            "ExitTime": filetime(exited_ns) if exited_ns else 0,
            "ImageFileName": name.encode()[:14],
            "PriorityClass": 2,
            "Flags": 0x144D0C01,
            "ExitStatus": 0 if exited_ns else 0x103,
            "Protection.Level": signer << 4 | (1 if signer else 0),
            "SignatureLevel": signature,
            "SectionSignatureLevel": signature,
            "HighestUserAddress": 0x7FFF_FFFF_0000,
            "SequenceNumber": len(self.all) + 1,
            "CreateInterruptTime": (created_ns - kernel.boot_ns) // 100,
            "?Machine": 0x8664,
            "Flags3.Minimal" if types.has("_EPROCESS.Flags3.Minimal") else "Minimal": int(minimal),
            "Token.Object": self._token(sid, session or 0) | 0xF,
            "SeAuditProcessCreationInfo.ImageFileName": self._audit_name(path),
        }
        if exited_ns:
            values |= {"ProcessExiting": 1, "ProcessDelete": 1, "VmDeleted": 1}
        body = bytearray(types.pack("_EPROCESS", values))
        for head in ("Pcb.ProfileListHead", "Pcb.ThreadListHead", "ThreadListHead", "JobLinks", "MmProcessLinks"):
            offset = types.offset(f"_EPROCESS.{head}")
            struct.pack_into("<QQ", body, offset, va + offset, va + offset)
        offset = types.offset("_EPROCESS.Pcb.Header.WaitListHead")
        struct.pack_into("<QQ", body, offset, va + offset, va + offset)
        kernel.space.write(va, bytes(body))
        if not exited_ns:
            self._handle_table(process)
        if user and path is not None:
            self._user_half(process)
        if session is not None:
            self._join_session(process, session)
        if not exited_ns:
            self._first_thread(process)
        self._cid(pid, va)
        if not hidden:
            kernel.insert_tail(kernel.va("PsActiveProcessHead"), self._links(process))
        self.all.append(process)
        return process

    def hide(self, process: Process) -> None:
        """Take it off the list of processes and off nothing else (DKOM)."""
        self.kernel.remove(self._links(process))
        self.kernel.empty_list(self._links(process))
        process.hidden = True

    def exit(self, process: Process) -> None:
        """It ends while somebody still holds a handle to it: it stays listed, its threads and memory go."""
        kernel = self.kernel
        process.exited_ns = kernel.now_ns
        for thread in list(process.threads):
            self.end_thread(process, thread)
        kernel.set(process.va, "_EPROCESS.ExitTime", filetime(process.exited_ns))
        kernel.set(process.va, "_EPROCESS.ExitStatus", 0)
        for flag in ("ProcessExiting", "ProcessDelete", "VmDeleted"):
            kernel.set(process.va, f"_EPROCESS.{flag}", 1)
        for pointer in ("Peb", "ObjectTable", "SectionObject"):
            kernel.set(process.va, f"_EPROCESS.{pointer}", 0)
        kernel.set(process.va, "_EPROCESS.VadRoot.Root", 0)

    def delete(self, process: Process, *, poison: bool = True) -> None:
        """The last reference is gone: off all lists, its block is freed and may be used again."""
        kernel = self.kernel
        if not process.exited:
            self.exit(process)
        if not process.hidden:
            kernel.remove(self._links(process))
        if process.session is not None:
            kernel.remove(process.va + kernel.types.offset("_EPROCESS.SessionProcessLinks"))
        self._cid(process.pid, 0)
        self.all.remove(process)
        kernel.discard(process.va, poison=poison)

    def thread(
        self, process: Process, start: int, *, native: int | None = None, kernel_mode: bool = False, suspended: int = 0
    ) -> Thread:
        """A thread that begins at ``start``; ``native`` is where the kernel itself begins it."""
        kernel, types = self.kernel, self.kernel.types
        tid = self._number(None)
        teb = 0
        if not kernel_mode and process.memory is not None:
            stack = process.user.place("stack", STACK_VA, 0x10000)
            process.user.region(stack, 0x4000, "RW")
            teb = process.user.region(process.user.place("teb", PEB_VA + 0x10000, 0x2000), 0x2000, "RW").start
        va = kernel.object("Thread", b"Thre", types.pack("_ETHREAD", {}))
        values: dict[str, int | bytes] = {
            "Tcb.Header.Type": 6,
            "Tcb.Header.Size": types.size("_KTHREAD") // 4 & 0xFF,
            "Tcb.Process": process.va,
            "Tcb.ApcState.Process": process.va,
            "Tcb.Teb": teb,
            "Tcb.State": WAITING,
            "Tcb.WaitReason": 6,
            "Tcb.SuspendCount": suspended,
            "Tcb.PreviousMode": 0 if kernel_mode else 1,
            "Tcb.StackBase": NT_STACK + len(self.all) * 0x8000,
            "Cid.UniqueProcess": process.pid,
            "Cid.UniqueThread": tid,
            "CreateTime": filetime(kernel.now_ns),
            "StartAddress": native if native is not None else start if kernel_mode else NTDLL_VA + 0x1100,
            "Win32StartAddress": start,
            "CrossThreadFlags": 2 | (0x10 if kernel_mode else 0),
        }
        kernel.space.write(va, types.pack("_ETHREAD", values))
        for head in ("Tcb.Header.WaitListHead", "Tcb.ApcState.ApcListHead"):
            kernel.empty_list(va + types.offset(f"_ETHREAD.{head}"))
        for head, entry in (("Pcb.ThreadListHead", "Tcb.ThreadListEntry"), ("ThreadListHead", "ThreadListEntry")):
            kernel.insert_tail(process.va + types.offset(f"_EPROCESS.{head}"), va + types.offset(f"_ETHREAD.{entry}"))
        process.threads.append(Thread(tid, va, teb, start))
        kernel.set(process.va, "_EPROCESS.ActiveThreads", len(process.threads))
        self._cid(tid, va)
        return process.threads[-1]

    def end_thread(self, process: Process, thread: Thread) -> None:
        kernel = self.kernel
        kernel.set(thread.va, "_ETHREAD.Tcb.State", TERMINATED)
        kernel.set(thread.va, "_ETHREAD.ExitTime", filetime(kernel.now_ns))
        kernel.set(thread.va, "_ETHREAD.CrossThreadFlags", 3)
        for entry in ("Tcb.ThreadListEntry", "ThreadListEntry"):
            kernel.remove(thread.va + kernel.types.offset(f"_ETHREAD.{entry}"))
        process.threads.remove(thread)
        thread.exited = True
        kernel.set(process.va, "_EPROCESS.ActiveThreads", len(process.threads))
        self._cid(thread.tid, 0)

    def module(
        self,
        process: Process,
        path: str,
        base: int | None = None,
        *,
        in_ldr: tuple[str, ...] | bool = True,
        in_vad: bool = True,
        name: str | None = None,
    ) -> Module:
        """A DLL: mapped, and in the loader's three lists; ``in_ldr`` may name some of them."""
        file = self.files.open(path)
        kind, first = ("dll32", wow64.DLL_VA) if is_32_bit(path) else ("dll", DLL_VA)
        where = base if base is not None else process.user.place(kind, first, file.size)
        region = process.user.image(file, where) if in_vad else None
        module = Module(name or file.name, file.dos, where, file.size, region, file)
        process.modules.append(module)
        lists = LISTS if in_ldr is True else tuple(in_ldr or ())
        if process.second is not None and is_32_bit(path):
            if lists:
                module.entry_va = process.second.load(module.path, where, file.size)
        elif lists:
            self._load(process, module, lists)
        return module

    def handle(self, process: Process, target: int, access: int = 0x1FFFFF) -> int:
        """Give a process a handle to an object; the handle."""
        value = process.next_handle
        process.next_handle += 4
        low = (self.kernel.header(target) >> 4 & (1 << 44) - 1) << 20 | 0x1FFFE | 1
        self.kernel.space.write(process.handles + 4 * value, struct.pack("<QQ", low, access & 0x1FFFFFF))
        return value

    def text(self, process: Process, words: str) -> bytes:
        """A UNICODE_STRING in the process's own heap."""
        data = words.encode("utf-16-le")
        at = self._heap(process, len(data) + 2)
        process.user.space.write(at, data)
        return struct.pack("<HHIQ", len(data), len(data) + 2, 0, at)

    def masquerade(self, process: Process, path: str, command: str | None = None) -> None:
        """What a process may write into its own PEB: another path, another command line."""
        types, space = self.kernel.types, process.user.space
        for name, words in (("ImagePathName", path), ("CommandLine", command or f'"{path}"')):
            space.write(
                process.params + types.offset(f"_RTL_USER_PROCESS_PARAMETERS.{name}"), self.text(process, words)
            )

    # -- the parts of a process --

    def _number(self, pid: int | None) -> int:
        if pid is None:
            self._pids += 4 * self.kernel.rng.randrange(1, 5)
            return self._pids
        assert pid % 4 == 0
        self._pids = max(self._pids, pid)
        return pid

    def _links(self, process: Process) -> int:
        return process.va + self.kernel.types.offset("_EPROCESS.ActiveProcessLinks")

    def _audit_name(self, path: str | None) -> int:
        """An OBJECT_NAME_INFORMATION: the path as the kernel says it."""
        if path is None:
            return self.kernel.paged.take(b"SeOn", bytes(16))
        return self.kernel.paged.take(b"SeOn", self.kernel.text(self.files.open(path).device, tag=b"SeOn"))

    def _token(self, sid: str, session: int) -> int:
        kernel, types = self.kernel, self.kernel.types
        sids = (sid, ADMINISTRATORS, EVERYONE)
        blobs = [pack_sid(each) for each in sids]
        array = kernel.paged.take(b"SeSd", 16 * len(sids) + sum(map(len, blobs)))
        at = array + 16 * len(sids)
        for number, blob in enumerate(blobs):
            kernel.space.write(array + 16 * number, struct.pack("<QI", at, 7 if number else 0))
            kernel.space.write(at, blob)
            at += len(blob)
        values = {
            "SessionId": session,
            "UserAndGroupCount": len(sids),
            "UserAndGroups": array,
            "TokenType": 1,
            "Privileges.Present": 0x1E_7330_0800,
            "Privileges.Enabled": 0x80_0000,
        }
        return kernel.object("Token", b"Toke", types.pack("_TOKEN", values), pool=kernel.paged)

    def _handle_table(self, process: Process) -> None:
        kernel, types = self.kernel, self.kernel.types
        process.handles = kernel.paged.take_pages(PAGE)
        values = {"TableCode": process.handles, "QuotaProcess": process.va, "UniqueProcessId": process.pid}
        table = kernel.paged.take(b"Obtb", types.pack("_HANDLE_TABLE", values))
        kernel.empty_list(table + types.offset("_HANDLE_TABLE.HandleTableList"))
        kernel.set(process.va, "_EPROCESS.ObjectTable", table)
        if process.pid == 4:
            kernel.set_u64(kernel.va("ObpKernelHandleTable"), table)

    def _join_session(self, process: Process, number: int) -> None:
        kernel, types = self.kernel, self.kernel.types
        known = types.has("_MM_SESSION_SPACE.SessionId")
        head = types.offset("_MM_SESSION_SPACE.ProcessList") if known else 0x10
        if number not in self._sessions:
            space = self._sessions[number] = kernel.paged.take_pages(PAGE)
            offset = types.offset("_MM_SESSION_SPACE.SessionId") if known else 8
            kernel.space.write(space + offset, struct.pack("<I", number))
            kernel.empty_list(space + head)
        space = self._sessions[number]
        kernel.set(process.va, "_EPROCESS.Session", space)
        kernel.insert_tail(space + head, process.va + types.offset("_EPROCESS.SessionProcessLinks"))

    def _first_thread(self, process: Process) -> None:
        if process.memory is None or process.path is None:
            for number in range(3 if process.pid == 4 else 1):
                self.thread(process, self.kernel.base + 0x320000 + 0x100 * number, kernel_mode=True)
        else:
            self.thread(process, process.modules[0].base + 0x1100)

    def _heap(self, process: Process, size: int) -> int:
        """Some bytes of the process's heap, which is one region."""
        at = process.heap
        process.heap += -(-size // 16) * 16
        assert process.heap < HEAP_VA + 0x10000, "the heap of a process is 64 KiB here"
        return at

    def _user_half(self, process: Process) -> None:
        kernel, types, memory = self.kernel, self.kernel.types, process.user
        assert process.path is not None
        memory.space.map(KUSER_USER_VA, kernel.kuser_gpa, user=True, writable=False)
        memory.region(KUSER_USER_VA, PAGE, "R", backed=False)
        shift = kernel.rng.randrange(0x100) << 16
        process.peb = memory.region(PEB_VA + (shift << 4), PAGE, "RW").start
        memory.region(HEAP_VA, 0x10000, "RW")
        process.heap = HEAP_VA + 0x100
        main = self.files.open(process.path)
        kernel.set(process.va, "_EPROCESS.ImageFilePointer", main.va)
        kernel.set(process.va, "_EPROCESS.SectionObject", self.files.section(main))
        base = wow64.PROGRAM_VA if is_32_bit(process.path) else IMAGE_VA + shift
        kernel.set(process.va, "_EPROCESS.SectionBaseAddress", base)
        kernel.set(process.va, "_EPROCESS.Peb", process.peb)
        process.ldr = self._heap(process, types.size("_PEB_LDR_DATA"))
        memory.space.write(process.ldr, types.pack("_PEB_LDR_DATA", {"Length": 0x58, "Initialized": 1}))
        for name in LISTS:
            head = process.ldr + types.offset(f"_PEB_LDR_DATA.{name}ModuleList")
            memory.space.write(head, struct.pack("<QQ", head, head))
        self.module(process, process.path, base, in_ldr=LISTS[:2])
        self.module(process, NTDLL, NTDLL_VA)
        if is_32_bit(process.path):
            self._second_half(process, main.dos)
        else:
            self.module(process, KERNEL32, KERNEL32_VA)
        memory.view(self.files.open("C:\\Windows\\System32\\locale.nls", image=False), VIEW_VA)
        process.params = self._parameters(process, main)
        values: dict[str, int | bytes] = {
            "ImageBaseAddress": base,
            "Ldr": process.ldr,
            "ProcessParameters": process.params,
            "ProcessHeap": HEAP_VA,
            "NumberOfProcessors": 1,
            "OSMajorVersion": 10,
            "OSBuildNumber": kernel.build,
            "OSPlatformId": 2,
            "ImageSubsystem": 3,
            "SessionId": process.session or 0,
        }
        memory.space.write(process.peb, types.pack("_PEB", values))

    def _second_half(self, process: Process, path: str) -> None:
        """What a 32-bit process has besides."""
        for name in wow64.EMULATION:
            self.module(process, f"C:\\Windows\\System32\\{name}")
        program = process.modules[0]
        process.second = wow64.Second(self.kernel, process.user, program.base, path, process.command or path)
        process.second.load(program.path, program.base, program.size, lists=2)
        for dll, base in ((wow64.NTDLL32, wow64.NTDLL32_VA), (wow64.KERNEL32, wow64.KERNEL32_VA)):
            self.module(process, dll, base)

    def _parameters(self, process: Process, main: File) -> int:
        types, space = self.kernel.types, process.user.space
        someone = "DESKTOP-7", "alice" if process.sid.endswith("-1001") else "bob"
        domain, name = USERS.get(process.sid, someone)
        variables = {
            "ComSpec": "C:\\Windows\\system32\\cmd.exe",
            "SystemDrive": "C:",
            "SystemRoot": "C:\\Windows",
            "USERDOMAIN": domain,
            "USERNAME": name,
            "windir": "C:\\Windows",
        }
        block = "".join(f"{key}={value}\0" for key, value in variables.items()).encode("utf-16-le") + b"\0\0"
        at = self._heap(process, len(block))
        space.write(at, block)
        path = main.dos
        values: dict[str, int | bytes] = {
            "MaximumLength": types.size("_RTL_USER_PROCESS_PARAMETERS"),
            "Length": types.size("_RTL_USER_PROCESS_PARAMETERS"),
            "Flags": 0x6001,
            "CurrentDirectory.DosPath": self.text(process, "C:\\Windows\\system32\\"),
            "ImagePathName": self.text(process, path),
            "CommandLine": self.text(process, process.command if process.command is not None else path),
            "WindowTitle": self.text(process, path),
            "DesktopInfo": self.text(process, "Winsta0\\Default"),
            "Environment": at,
            "EnvironmentSize": len(block),
        }
        params = self._heap(process, types.size("_RTL_USER_PROCESS_PARAMETERS"))
        space.write(params, types.pack("_RTL_USER_PROCESS_PARAMETERS", values))
        return params

    def _load(self, process: Process, module: Module, lists: tuple[str, ...]) -> None:
        """Put a module on the loader's lists, which lie in the process's own memory."""
        types, space = self.kernel.types, process.user.space
        values: dict[str, int | bytes] = {
            "DllBase": module.base,
            "EntryPoint": module.base + 0x1000,
            "SizeOfImage": module.size,
            "FullDllName": self.text(process, module.path),
            "BaseDllName": self.text(process, module.name),
            "Flags": 0x22CC,
            "ObsoleteLoadCount": 0xFFFF,
            "OriginalBase": module.base,
            "LoadTime": filetime(process.created_ns),
        }
        entry = module.entry_va = self._heap(process, types.size("_LDR_DATA_TABLE_ENTRY"))
        space.write(entry, types.pack("_LDR_DATA_TABLE_ENTRY", values))
        for name in LISTS:
            link = entry + types.offset(f"_LDR_DATA_TABLE_ENTRY.{name}Links")
            space.write(link, struct.pack("<QQ", link, link))
            if name in lists:
                head = process.ldr + types.offset(f"_PEB_LDR_DATA.{name}ModuleList")
                last = int.from_bytes(space.read(head + 8, 8), "little")
                space.write(link, struct.pack("<QQ", head, last))
                space.write(last, struct.pack("<Q", link))
                space.write(head + 8, struct.pack("<Q", link))

    # -- PspCidTable: every process and thread by its number --

    def _cid_table(self) -> None:
        kernel, types = self.kernel, self.kernel.types
        self._cid_directory = kernel.paged.take_pages(PAGE)
        values = {"TableCode": self._cid_directory | 1, "NextHandleNeedingPool": 0x400}
        table = kernel.paged.take(b"Obtb", types.pack("_HANDLE_TABLE", values))
        kernel.empty_list(table + types.offset("_HANDLE_TABLE.HandleTableList"))
        kernel.set_u64(kernel.va("PspCidTable"), table)

    def _cid(self, number: int, target: int) -> None:
        index = number // 4
        page = self._cid_pages.get(index // 256)
        if page is None:
            page = self._cid_pages[index // 256] = self.kernel.paged.take_pages(PAGE)
            self.kernel.set_u64(self._cid_directory + 8 * (index // 256), page)
            self.kernel.set(
                self.kernel.u64(self.kernel.va("PspCidTable")),
                "_HANDLE_TABLE.NextHandleNeedingPool",
                0x400 * (max(self._cid_pages) + 1),
            )
        low = (target >> 4 & (1 << 44) - 1) << 20 | 1 if target else 0
        self.kernel.space.write(page + 16 * (index % 256), struct.pack("<QQ", low, 0))


NT_STACK = 0xFFFF_F60C_1000_0000


def pack_sid(text: str) -> bytes:
    """``S-1-5-18`` as the kernel keeps it: the authority big-endian, the rest little-endian."""
    _, revision, authority, *rest = text.split("-")
    head = struct.pack("<BB", int(revision), len(rest)) + int(authority).to_bytes(6, "big")
    return head + b"".join(struct.pack("<I", int(part)) for part in rest)
