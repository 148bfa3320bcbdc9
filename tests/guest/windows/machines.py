"""Kernels of machines made of bytes, attached without the search that attaching does."""

from appliance.guest.windows.kernel import UserShared, WindowsKernel
from appliance.guest.windows.space import AddressSpace, Mode
from tests.worlds.windows.xp import XpMachine


def kernel_of(machine: XpMachine) -> WindowsKernel:
    mode = Mode.LONG4 if machine.wide else Mode.PAE if machine.pae else Mode.LEGACY
    space = AddressSpace(machine.memory(), machine.root, mode)
    shared = UserShared(0, 0, machine.kind.build, 5, 1, 0)
    return WindowsKernel(space, base=machine.base, size=machine.image_size, types=machine.types, shared=shared)


def poke(machine: XpMachine, va: int, path: str, value: int) -> None:
    """Write a member of a structure."""
    field = machine.types.field(path)
    machine.space.write(va + field.offset, (value & (1 << 8 * field.size) - 1).to_bytes(field.size, "little"))


def peek(machine: XpMachine, va: int, path: str) -> int:
    """Read a member of a structure."""
    field = machine.types.field(path)
    return int.from_bytes(machine.space.read(va + field.offset, field.size), "little")
