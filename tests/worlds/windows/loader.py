"""What the loader leaves in a process's own memory: PEB, parameters, heap, and its modules in three lists."""

from __future__ import annotations

import struct

from tests.worlds.windows import wow64
from tests.worlds.windows.boot import KUSER_USER_VA, Kernel, filetime
from tests.worlds.windows.files import File, Files, is_32_bit
from tests.worlds.windows.paging import PAGE
from tests.worlds.windows.planted import Module, Process

USERS = {
    "S-1-5-18": ("NT AUTHORITY", "SYSTEM"),
    "S-1-5-19": ("NT AUTHORITY", "LOCAL SERVICE"),
    "S-1-5-20": ("NT AUTHORITY", "NETWORK SERVICE"),
    "S-1-5-90-0-1": ("Window Manager", "DWM-1"),
}
NTDLL, KERNEL32 = "C:\\Windows\\System32\\ntdll.dll", "C:\\Windows\\System32\\kernel32.dll"
NTDLL_VA, KERNEL32_VA = 0x7FFB_9A00_0000, 0x7FFB_9800_0000
IMAGE_VA, HEAP_VA, PEB_VA = 0x7FF6_4000_0000, 0x01C0_5A00_0000, 0x00B0_4900_0000
DLL_VA, VIEW_VA = 0x7FFB_8000_0000, 0x01C0_7000_0000
LISTS = ("InLoadOrder", "InMemoryOrder", "InInitializationOrder")


class Loader:
    """Fills the user half of processes."""

    def __init__(self, kernel: Kernel, files: Files) -> None:
        self.kernel, self.files = kernel, files

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
            self.load(process, module, lists)
        return module

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

    def load(self, process: Process, module: Module, lists: tuple[str, ...]) -> None:
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

    def fill(self, process: Process) -> None:
        """All that a new process has in its half: heap, PEB, parameters, program, the first DLLs."""
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

    # -- the parts --

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

    def _heap(self, process: Process, size: int) -> int:
        """Some bytes of the process's heap, which is one region."""
        at = process.heap
        process.heap += -(-size // 16) * 16
        assert process.heap < HEAP_VA + 0x10000, "the heap of a process is 64 KiB here"
        return at
