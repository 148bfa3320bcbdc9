"""Processes and threads: their objects in the kernel, handle tables, sessions, and the table of all their numbers."""

from __future__ import annotations

import struct

from tests.worlds.windows.boot import Kernel, filetime
from tests.worlds.windows.files import Files
from tests.worlds.windows.loader import NTDLL_VA, PEB_VA, Loader
from tests.worlds.windows.memory import Memory
from tests.worlds.windows.paging import PAGE, Space
from tests.worlds.windows.planted import Process, Thread
from tests.worlds.windows.tokens import token

WAITING, TERMINATED = 5, 4
STACK_VA, NT_STACK = 0x00B0_4A00_0000, 0xFFFF_F60C_1000_0000


class Processes:
    """Makes, hides, ends them."""

    def __init__(self, kernel: Kernel, files: Files) -> None:
        self.kernel, self.files = kernel, files
        self.loader = Loader(kernel, files)
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
            "Token.Object": token(kernel, sid, session or 0) | 0xF,
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
            self.loader.fill(process)
        if session is not None:
            self._join_session(process, session)
        if not exited_ns:
            self._first_thread(process)
        self.enter_cid(pid, va)
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
        self.enter_cid(process.pid, 0)
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
        self.enter_cid(tid, va)
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
        self.enter_cid(thread.tid, 0)

    def handle(self, process: Process, target: int, access: int = 0x1FFFFF) -> int:
        """Give a process a handle to an object; the handle."""
        value = process.next_handle
        process.next_handle += 4
        low = (self.kernel.header(target) >> 4 & (1 << 44) - 1) << 20 | 0x1FFFE | 1
        self.kernel.space.write(process.handles + 4 * value, struct.pack("<QQ", low, access & 0x1FFFFFF))
        return value

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

    # -- PspCidTable: every process and thread by its number --

    def _cid_table(self) -> None:
        kernel, types = self.kernel, self.kernel.types
        self._cid_directory = kernel.paged.take_pages(PAGE)
        values = {"TableCode": self._cid_directory | 1, "NextHandleNeedingPool": 0x400}
        table = kernel.paged.take(b"Obtb", types.pack("_HANDLE_TABLE", values))
        kernel.empty_list(table + types.offset("_HANDLE_TABLE.HandleTableList"))
        kernel.set_u64(kernel.va("PspCidTable"), table)

    def enter_cid(self, number: int, target: int) -> None:
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
