"""Kernels of machines made of bytes, attached without the search that attaching does."""

import json
import lzma
from functools import cache
from pathlib import Path

from appliance.guest.windows.isf import SymbolTable, parse_isf
from appliance.guest.windows.kernel import UserShared, WindowsKernel
from appliance.guest.windows.space import AddressSpace, Mode
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.boot import ROOT_GPA
from tests.worlds.windows.real import real_symbols
from tests.worlds.windows.symbols import NT, invented
from tests.worlds.windows.symbols import REAL as REAL_PAIRS
from tests.worlds.windows.xp import XpMachine

OLD = {"xp-sp3": ("xp-sp3", True), "xp-sp2 without PAE": ("xp-sp2", False), "2003-sp2": ("2003-sp2", True)}
OLD |= {"2003-sp2-x64": ("2003-sp2-x64", True)}
REAL = {f"{build} with its own symbols": build for build in ("17763", "20348")}
ALL = (*OLD, *FAMILIES, *REAL)
ALICE = "S-1-5-21-1-2-3-1001"  # a person's account
SOME = ("xp-sp2 without PAE", "2003-sp2-x64", "17763", "26100")


def make(name: str, *, standard: bool = True) -> Machine | XpMachine:
    """A machine by its name of `ALL`; ``standard``: with the processes that every Windows has."""
    if name in OLD:
        era, pae = OLD[name]
        return XpMachine(era, pae=pae)
    return Machine(REAL.get(name, name), symbols=real_symbols() if name in REAL else None, standard=standard)


@cache
def _types(family: str, symbols: Path | None) -> SymbolTable:
    if symbols is not None:
        name = f"{REAL_PAIRS[family][0]}-1.json.xz"
        return parse_isf(lzma.decompress((symbols / "windows" / NT / name).read_bytes()))
    return parse_isf(json.dumps(invented(family)[0].document).encode())


def kernel_of(machine: Machine | XpMachine, memory=None) -> WindowsKernel:
    """The kernel of a machine."""
    if isinstance(machine, XpMachine):
        mode = Mode.LONG4 if machine.wide else Mode.PAE if machine.pae else Mode.LEGACY
        space = AddressSpace(memory or machine.memory(), machine.root, mode)
        shared = UserShared(0, 0, machine.kind.build, 5, 1, 0)
        return WindowsKernel(space, base=machine.base, size=machine.image_size, types=machine.types, shared=shared)
    kernel = machine.kernel
    space = AddressSpace(memory or machine.memory(), ROOT_GPA, Mode.LONG4)
    shared = UserShared(0, 0, kernel.build, 10, 0, 0)
    return WindowsKernel(space, base=kernel.base, size=kernel.size, types=types_of(machine), shared=shared)


def types_of(machine: Machine | XpMachine) -> SymbolTable:
    if isinstance(machine, XpMachine):
        return machine.types
    real = machine.kernel.types is not invented(machine.family)[0]
    return _types(machine.family, real_symbols() if real else None)


def read(machine: Machine | XpMachine, va: int, size: int) -> bytes:
    """Kernel memory."""
    return (machine.space if isinstance(machine, XpMachine) else machine.kernel.space).read(va, size)


def write(machine: Machine | XpMachine, va: int, data: bytes) -> None:
    """Write to kernel memory."""
    (machine.space if isinstance(machine, XpMachine) else machine.kernel.space).write(va, data)


def poke(machine: Machine | XpMachine, va: int, path: str, value: int) -> None:
    """Write a member of a structure in kernel memory."""
    field = types_of(machine).field(path)
    write(machine, va + field.offset, (value & (1 << 8 * field.size) - 1).to_bytes(field.size, "little"))


def peek(machine: Machine | XpMachine, va: int, path: str) -> int:
    """Read a member of a structure in kernel memory."""
    field = types_of(machine).field(path)
    return int.from_bytes(read(machine, va + field.offset, field.size), "little")


def user(process):
    """The address space of a process."""
    return process.memory.space if hasattr(process, "memory") else process.space


def planted(machine: Machine | XpMachine, *, hidden: bool = False) -> list:
    """The processes that are, or are not, on the list, in its order."""
    every = machine.processes if isinstance(machine, XpMachine) else machine.all.all
    return [process for process in every if process.hidden == hidden]


def began_ns(process) -> int:
    """When a process started, since the Unix epoch; 0: it does not say."""
    if hasattr(process, "created_ns"):
        return process.created_ns // 100 * 100
    return (process.created - 116_444_736_000_000_000) * 100 if process.created else 0


def links(machine: Machine | XpMachine) -> int:
    """Where a process is linked to the list of all."""
    return types_of(machine).offset("_EPROCESS.ActiveProcessLinks")
