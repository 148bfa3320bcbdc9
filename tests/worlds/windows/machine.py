"""A Windows machine made of bytes: stock Volatility 3 takes it for one, and MemProcFS where real symbols are given.

Nothing runs in it. Its families are named after builds; their structures are laid out by us (see layout.py), only those
of tcpip.sys follow Volatility's own tables, read from the installed package, so that two readers can be compared.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.worlds.windows import symbols as symbol_tables
from tests.worlds.windows.boot import Kernel
from tests.worlds.windows.dump import MachineMemory, write_elf
from tests.worlds.windows.files import Files
from tests.worlds.windows.memory import Region
from tests.worlds.windows.net import Endpoint, Net
from tests.worlds.windows.paging import PAGE
from tests.worlds.windows.planted import Module, Process, Thread
from tests.worlds.windows.processes import Processes
from tests.worlds.windows.tokens import SYSTEM_SID

FAMILIES = ("17763", "19041", "20348", "26100")
NOW_NS = 1_780_315_200_000_000_000  # 2026-06-01 12:00 UTC
ALICE = "S-1-5-21-1004336348-1177238915-682003330-1001"
SHELLCODE = bytes.fromhex("fc4883e4f0e8c0000000415141505251564831d265488b5260488b5218") + b"\xcc" * 16
PE_CODE = b"MZ\x90\0" + bytes(56) + struct.pack("<I", 0x80) + bytes(64) + b"PE\0\0" + struct.pack("<H", 0x8664)
REGION_VA = 0x01C0_8000_0000
S32 = "C:\\Windows\\System32\\"
# name, parent, command (None: the path), SID, session, protected signer, signature level
STANDARD: tuple[tuple[str, str, str | None, str, int | None, int, int], ...] = (
    ("smss.exe", "System", "\\SystemRoot\\System32\\smss.exe", SYSTEM_SID, None, 6, 14),
    ("csrss.exe", "smss.exe", S32 + "csrss.exe ObjectDirectory=\\Windows", SYSTEM_SID, 0, 6, 14),
    ("wininit.exe", "smss.exe", "wininit.exe", SYSTEM_SID, 0, 6, 14),
    ("csrss.exe", "smss.exe", S32 + "csrss.exe ObjectDirectory=\\Windows", SYSTEM_SID, 1, 6, 14),
    ("winlogon.exe", "smss.exe", "winlogon.exe", SYSTEM_SID, 1, 0, 12),
    ("services.exe", "wininit.exe", S32 + "services.exe", SYSTEM_SID, 0, 6, 14),
    ("lsass.exe", "wininit.exe", S32 + "lsass.exe", SYSTEM_SID, 0, 0, 12),
    ("svchost.exe", "services.exe", S32 + "svchost.exe -k RPCSS -p", "S-1-5-20", 0, 0, 12),
    ("svchost.exe", "services.exe", S32 + "svchost.exe -k NetworkService -p -s Dnscache", "S-1-5-20", 0, 0, 12),
    ("svchost.exe", "services.exe", S32 + "svchost.exe -k LocalService -p -s EventLog", "S-1-5-19", 0, 0, 12),
    ("svchost.exe", "services.exe", S32 + "svchost.exe -k netsvcs -p -s Schedule", SYSTEM_SID, 0, 0, 12),
    ("dwm.exe", "winlogon.exe", '"dwm.exe"', "S-1-5-90-0-1", 1, 0, 12),
    ("explorer.exe", "winlogon.exe", "C:\\Windows\\Explorer.EXE", ALICE, 1, 0, 12),
)


@dataclass(frozen=True, slots=True)
class Truth:
    """What a perfect eye would say."""

    processes: tuple[Process, ...]  # hidden and ended ones too
    connections: tuple[Endpoint, ...]  # those that live, however they are linked


class Machine:
    """One machine. Every verb leaves it consistent, also while somebody reads along."""

    def __init__(
        self,
        family: str = "20348",
        *,
        ram: int = 64 << 20,
        path: Path | str | None = None,
        symbols: Path | str | None = None,
        seed: int = 0,
        standard: bool = True,
        partitions: int = 4,
        table_size: int = 128,
        large_pages: bool = False,
        la57: bool = False,
        kva_shadow: bool = False,
        endpoint_tag: bytes | None = None,
        now_ns: int = NOW_NS,
    ) -> None:
        """``symbols``: a folder with a real pair. ``endpoint_tag``: TcpE, or TTcb (volatility3 #1277)."""
        self.family, self.path = family, Path(path) if path is not None else None
        self.kernel = Kernel(
            family,
            ram=ram,
            path=self.path,
            symbols_from=Path(symbols) if symbols is not None else None,
            seed=seed,
            now_ns=now_ns,
            large_pages=large_pages,
            la57=la57,
            kva_shadow=kva_shadow,
        )
        self.files = Files(self.kernel)
        self.all = Processes(self.kernel, self.files)
        recent = self.kernel.build >= 20348 and symbols is None  # MemProcFS, which takes real pairs only, knows TcpE
        tag = endpoint_tag or (b"TTcb" if recent else b"TcpE")
        self.net = Net(self.kernel, partitions, table_size, tag)
        self._age_ns = 0
        self.system = self.process("System", pid=4, parent=0, command=None, sid=SYSTEM_SID, kernel=True)
        self.kernel.set_u64(self.kernel.va("PsInitialSystemProcess"), self.system.va)
        self.process("Registry", parent=4, kernel=True)
        if standard:
            self._standard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the RAM; a file with a name stays."""
        self.kernel.ram.close()

    def __getitem__(self, name: str) -> Process:
        """The first process of a name, or the one of a pid."""
        return next(process for process in self.all.all if process.name == name)

    # -- processes --

    def process(
        self,
        name: str,
        *,
        pid: int | None = None,
        parent: int | Process = 4,
        path: str | None = None,
        command: str | None = None,
        sid: str = SYSTEM_SID,
        session: int | None = None,
        hidden: bool = False,
        exited: bool = False,
        created: int | None = None,
        kernel: bool = False,
        signer: int = 0,
        signature: int = 0,
    ) -> Process:
        """A process; ``kernel``: without user memory, as System is. ``created``: ns since 1970."""
        self._age_ns += 1_000_000_000
        created_ns = created if created is not None else self.kernel.boot_ns + self._age_ns
        return self.all.make(
            name,
            pid=pid,
            parent=parent.pid if isinstance(parent, Process) else parent,
            path=None if kernel else path or S32 + name,
            command=command,
            sid=sid,
            session=session,
            created_ns=created_ns,
            hidden=hidden,
            exited_ns=created_ns + 500_000_000 if exited else 0,
            user=not kernel and not exited,
            minimal=kernel and pid != 4,
            signer=signer,
            signature=signature,
        )

    def hide(self, process: Process) -> None:
        self.all.hide(process)

    def exit(self, process: Process) -> None:
        """It ends and stays listed, since somebody holds a handle to it."""
        self.all.exit(process)

    def delete(self, process: Process, *, poison: bool = True) -> None:
        """It ends, and its block is freed."""
        self.all.delete(process, poison=poison)

    def thread(self, process: Process, start: int, *, native: int | None = None, suspended: int = 0) -> Thread:
        return self.all.thread(process, start, native=native, suspended=suspended)

    def region(
        self,
        process: Process,
        size: int,
        protection: str = "RW",
        content: bytes = b"",
        *,
        start: int | None = None,
        backed: bool = True,
    ) -> Region:
        """Private memory of a process; ``protection`` as R, RW, RX, RWX or by its PAGE_ name."""
        size = -(-max(size, len(content)) // PAGE) * PAGE
        where = start if start is not None else process.user.place("region", REGION_VA, size)
        return process.user.region(where, size, protection, content, backed=backed)

    def inject(
        self, process: Process, code: bytes = PE_CODE, *, protection: str = "RWX", thread: bool = True
    ) -> Region:
        """Foreign code: private executable memory, and a thread that begins in it."""
        region = self.region(process, 0x2000, protection, code)
        if thread:
            self.thread(process, region.start + 0x40)
        return region

    def module(
        self,
        process: Process,
        path: str,
        *,
        in_ldr: tuple[str, ...] | bool = True,
        in_vad: bool = True,
        changed: bool = False,
    ) -> Module:
        """A DLL. ``changed``: a page of its code was written to (a hook)."""
        module = self.all.loader.module(process, path, in_ldr=in_ldr, in_vad=in_vad)
        if changed:
            self.hook(process, module)
        return module

    def hook(
        self, process: Process, module: Module, offset: int = 0x1200, code: bytes = b"\xe9\x10\x20\x30\x40"
    ) -> int:
        """Overwrite code of a module in one process; where."""
        process.user.copy_page(module.base + offset)
        process.user.space.write(module.base + offset, code)
        return module.base + offset

    def foreign_dll(self, process: Process, path: str = "C:\\Users\\Public\\evil.dll") -> Module:
        """A DLL that is mapped and that the loader does not list."""
        return self.module(process, path, in_ldr=False)

    def hollow(self, process: Process, content: bytes = PE_CODE) -> Region:
        """Unmap the program itself and put other code where it was."""
        main = process.modules[0]
        assert main.region is not None
        process.user.remove(main.region)
        main.region = self.region(process, main.size, "RWX", content, start=main.base)
        return main.region

    def page_out(self, process: Process, va: int, *, standby: bool = False) -> None:
        """A page of a process leaves it: into the paging file, or on the standby list, where it still is in RAM."""
        space = process.user.space
        (space.transition if standby else space.page_out)(va)

    def masquerade(self, process: Process, path: str, command: str | None = None) -> None:
        """The process lies in its PEB about its path and command line."""
        self.all.loader.masquerade(process, path, command)

    # -- the net --

    def tcp(
        self,
        process: Process,
        local: tuple[str, int],
        remote: tuple[str, int],
        state: str = "ESTABLISHED",
        tables: tuple[int, ...] = (1, 2),
        *,
        bucket: int | None = None,
        partition: int | None = None,
        hold_port: bool | None = None,
    ) -> Endpoint:
        """A connection. ``tables``: on which of the two it is linked; () is unlinked from both."""
        return self.net.tcp(
            process, local, remote, state, tables, bucket=bucket, partition=partition, hold_port=hold_port
        )

    def tcp_state(self, endpoint: Endpoint, state: str) -> None:
        self.net.set_state(endpoint, state)

    def tcp_close(self, endpoint: Endpoint, *, poison: bool = True, reuse: bool = True) -> None:
        """Unlink it, then free it: poisoned at once, or left as it is until the block is used again."""
        self.net.close(endpoint, poison=poison, reuse=reuse)

    def time_wait(self, local: tuple[str, int], remote: tuple[str, int], *, linked: bool = False) -> Endpoint:
        """What is left of a closed connection; it has no owner. ``linked``: on a table of its own, see net.py."""
        return self.net.time_wait(local, remote, linked=linked)

    def listener(self, process: Process, local: tuple[str, int], *, compartment: int = 1) -> Endpoint:
        """``0.0.0.0`` and ``::`` are the wildcards; ``::`` takes IPv4 too (dual-stack)."""
        return self.net.listener(process, local, compartment)

    def udp(
        self,
        process: Process,
        local: tuple[str, int],
        remote: tuple[str, int] | None = None,
        *,
        compartment: int = 1,
    ) -> Endpoint:
        return self.net.udp(process, local, remote, compartment)

    def take_port(self, protocol: str, port: int) -> None:
        """Mark a port as taken although nothing takes it."""
        self.net.take_port(protocol, port)

    def tick(self, seconds: float = 1.0) -> None:
        """Time goes on."""
        self.kernel.tick(seconds)

    # -- what others need --

    def memory(self, *, running: Process | None = None) -> MachineMemory:
        """The living RAM as the appliance reads it; ``running``: the processor is in the program of that process."""
        return MachineMemory(self.kernel, running)

    def write_symbols(self, folder: Path | str) -> Path:
        """Write both symbol tables where engines look for them; ``folder`` then contains ``windows/``."""
        return symbol_tables.write(Path(folder), self.kernel.tables)

    def write_elf(self, path: Path | str) -> Path:
        """A core as QEMU's dump-guest-memory writes it, registers of one processor included."""
        return write_elf(self.kernel, Path(path))

    def truth(self) -> Truth:
        return Truth(tuple(self.all.all), tuple(self.net.living))

    def _standard(self) -> None:
        """What runs on every Windows."""
        for name, parent, command, sid, session, signer, signature in STANDARD:
            path = "C:\\Windows\\explorer.exe" if name == "explorer.exe" else None
            self.process(
                name,
                parent=self[parent],
                path=path,
                command=command,
                sid=sid,
                session=session,
                signer=signer,
                signature=signature,
            )
        for csrss in [process for process in self.all.all if process.name == "csrss.exe"]:
            for process in self.all.all:
                if process.session == csrss.session and process is not csrss:
                    self.all.handle(csrss, process.va)
