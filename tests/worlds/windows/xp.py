"""A Windows XP or Server 2003 made of bytes: nothing runs in it; it is what an engine can find its way in.

The machine and its verbs, the same as those of `tests.worlds.windows.machine`; its parts: `xp_kernel`, `xp_processes`,
`xp_net`. Layouts of the kernel are those of `appliance.guest.windows.xp_types` (there are no others: these kernels are
finished); those of tcpip.sys stand in `xp_net`.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

from appliance.model import VcpuState
from tests.worlds.windows import xp_symbols
from tests.worlds.windows.paging import PAGE
from tests.worlds.windows.xp_kernel import SYMBOLS, Kernel
from tests.worlds.windows.xp_net import TCP, UDP, VARIABLES, Address, Connection, Net
from tests.worlds.windows.xp_paging import RamMemory
from tests.worlds.windows.xp_processes import RWX, Mapped, Process, Processes

Json = dict[str, Any]


class XpMachine(Kernel):
    """One machine. ``era``: a key of `VARIABLES`. ``variables``: RVAs of tcpip.sys that no table has (TCBTable,
    MaxHashTableSize, AddrObjTable, AddrObjTableSize), to be named by `write_symbols`."""

    def __init__(
        self,
        era: str = "xp-sp3",
        *,
        pae: bool = True,
        ram: int = 64 << 20,
        path: Path | None = None,
        seed: int = 0,
        variables: tuple[int, int, int, int] | None = None,
        buckets: int = 512,
        empty: bool = False,
    ) -> None:
        self.variables = variables or VARIABLES[era]
        guid = hashlib.md5(f"{era}/{pae}/{self.variables}".encode()).hexdigest().upper()
        super().__init__(era, guid, pae=pae, ram=ram, path=path, seed=seed)
        self.net = Net(self, self.variables, buckets)
        self.all = Processes(self)
        self.system = self.process("System", pid=4, parent=0, path=None, sid="S-1-5-18")
        self.put_pointer(self.base + SYMBOLS["PsInitialSystemProcess"], self.system.va)
        if not empty:
            smss = self.process("smss.exe", parent=4, path="\\SystemRoot\\System32\\smss.exe")
            csrss = self.process("csrss.exe", parent=smss.pid, path="C:\\WINDOWS\\system32\\csrss.exe")
            logon = self.process("winlogon.exe", parent=smss.pid, path="C:\\WINDOWS\\system32\\winlogon.exe")
            self.services = self.process("services.exe", parent=logon.pid)
            self.process("lsass.exe", parent=logon.pid)
            self.svchost = self.process(
                "svchost.exe",
                parent=self.services.pid,
                command="C:\\WINDOWS\\system32\\svchost -k rpcss",
                sid="S-1-5-20",
            )
            self.explorer = self.process(
                "explorer.exe", parent=csrss.pid, path="C:\\WINDOWS\\Explorer.EXE", sid="S-1-5-21-1-2-3-500"
            )

    @property
    def processes(self) -> list[Process]:
        return self.all.all

    @property
    def connections(self) -> list[Connection]:
        return self.net.connections

    # -- verbs --

    def process(
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
        return self.all.make(
            name,
            pid=pid,
            parent=parent,
            path=path,
            command=command,
            sid=sid,
            session=session,
            hidden=hidden,
            exited=exited,
            created=created,
        )

    def thread(self, process: Process, start: int) -> int:
        """A thread that began at ``start``; its address."""
        return self.all.thread(process, start)

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
        return self.all.region(process, size, protection, content, private, start=start, file=file)

    def inject(self, process: Process, code: bytes = b"MZ\x90\0\x03" + bytes(range(64))) -> Mapped:
        """Private memory that can be written and run, and a thread that began in it."""
        region = self.region(process, 0x4000, RWX, code)
        self.thread(process, region.start + 0x100)
        return region

    def module(self, process: Process, name: str, path: str, *, in_ldr: bool = True, in_vad: bool = True) -> int:
        """A DLL; the address of its image."""
        return self.all.module(process, name, path, in_ldr=in_ldr, in_vad=in_vad)

    def foreign_dll(self, process: Process, path: str = "C:\\WINDOWS\\Temp\\evil.dll") -> int:
        """A DLL that is mapped and that the loader's lists do not know."""
        return self.module(process, path.rsplit("\\", 1)[-1], path, in_ldr=False)

    def tcp(
        self, process: Process | int, local: Address, remote: Address, *, linked: bool = True, socket: bool = True
    ) -> Connection:
        """A connection and, unless ``socket`` is off, the address object that it was made from."""
        return self.net.tcp(_pid(process), local, remote, linked=linked, socket=socket)

    def tcp_close(self, connection: Connection, *, poison: bool = True) -> None:
        """Unlink a connection (or socket), then free it: its block keeps its tag."""
        self.net.close(connection, poison=poison)

    def listener(self, process: Process | int, local: Address, *, linked: bool = True) -> Connection:
        """A TCP socket without a connection."""
        return self.net.socket(_pid(process), local, TCP, linked=linked)

    def udp(
        self, process: Process | int, local: Address, *, linked: bool = True, created: int | None = None
    ) -> Connection:
        """A UDP socket."""
        return self.net.socket(_pid(process), local, UDP, linked=linked, created=created)

    def raw(self, process: Process | int, local: Address, protocol: int) -> Connection:
        """A raw socket of an IP protocol."""
        return self.net.socket(_pid(process), local, protocol)

    # -- the whole --

    def memory(self, *, vcpus: bool = True) -> RamMemory:
        """The machine's RAM; ``vcpus``: with the registers of processor 0 in its kernel."""
        if not vcpus:
            return RamMemory(self.ram)
        cr4 = 0x6F8 if self.pae or self.wide else 0x6D8
        idt = 0xFFFFF80000600000 if self.wide else 0x8003F400
        lstar = self.base + 0x40000 if self.wide else 0
        state = VcpuState(0x8001003B, self.root, cr4, self.base + 0x1234, idt, lstar, 0 if self.wide else 0xFFDFF000)
        return RamMemory(self.ram, (state,))

    def close(self) -> None:
        self.ram.close()

    def truth(self) -> Json:
        """What a perfect engine tells."""
        return {
            "processes": {each.pid: each.name for each in self.processes if not each.hidden},
            "hidden": {each.pid: each.name for each in self.processes if each.hidden},
            "connections": sorted(
                (each.local, each.remote, each.pid) for each in self.connections if each.remote and each.linked
            ),
            "sockets": sorted(
                (each.protocol, each.local, each.pid) for each in self.connections if not each.remote and each.linked
            ),
        }

    def write_symbols(self, folder: Path, *, kernel: bool = True, tcpip: bool = True) -> Path:
        """Write ISF tables of the kernel (with all that volatility3 asks for) and of tcpip.sys (names only)."""
        names = ("TCBTable", "MaxHashTableSize", "AddrObjTable", "AddrObjTableSize")
        prefix = "" if self.wide else "_"
        variables = {prefix + name: rva for name, rva in zip(names, self.variables, strict=True)}
        if kernel:
            xp_symbols.write(self, folder, self.pdb(), dict(SYMBOLS), xp_symbols.isf_types(self))
        if tcpip:
            xp_symbols.write(self, folder, "tcpip.pdb", variables, {})
        return folder

    def write_dump(self, path: Path) -> Path:
        """The RAM as a crash dump of x86: _DUMP_HEADER in 4 KiB (ntiodump.h), then the pages that anything lies in."""
        head, at = bytearray(b"PAGE" * (PAGE // 4)), SYMBOLS
        lists = (self.base + at[name] for name in ("PsLoadedModuleList", "PsActiveProcessHead"))
        struct.pack_into("<4s4s6I", head, 0, b"PAGE", b"DUMP", 0xF, self.kind.build, self.root, 0, *lists)
        struct.pack_into("<3I", head, 0x20, self.machine_type(), 1, 0xE2)
        head[0x5C] = int(self.pae)
        struct.pack_into("<I", head, 0x60, self.base + at["KdDebuggerDataBlock"])
        runs: list[list[int]] = []
        for page in range(self.ram.size // PAGE):
            if self.ram.data[page * PAGE : page * PAGE + PAGE].strip(b"\0"):
                if runs and page - runs[-1][1] < 16:
                    runs[-1][1] = page + 1
                else:
                    runs.append([page, page + 1])
        assert len(runs) < 80, "the header has no room for more"
        struct.pack_into("<II", head, 0x64, len(runs), sum(end - start for start, end in runs))
        for number, (start, end) in enumerate(runs):
            struct.pack_into("<II", head, 0x6C + 8 * number, start, end - start)
        struct.pack_into("<I", head, 0xF88, 1)
        with path.open("wb") as file:
            file.write(head)
            for start, end in runs:
                file.write(self.ram.data[start * PAGE : end * PAGE])
        return path


def _pid(process: Process | int) -> int:
    return process if isinstance(process, int) else process.pid
