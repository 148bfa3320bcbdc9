"""What was planted: processes, their threads and their modules, and what is true of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.worlds.windows.files import File
from tests.worlds.windows.memory import Memory, Region
from tests.worlds.windows.wow64 import Second


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
    second: Second | None = None  # the loader of a 32-bit process

    @property
    def exited(self) -> bool:
        return self.exited_ns != 0

    @property
    def user(self) -> Memory:
        assert self.memory is not None, f"{self.name} has no user memory"
        return self.memory
