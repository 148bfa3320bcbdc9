"""Nobody is accused of what happens while a process is looked at."""

import pytest

from appliance.guest.windows.injection import Injection
from tests.guest.windows.foreign import PLAIN, described, kinds
from tests.guest.windows.machines import kernel_of, peek, poke
from tests.worlds.windows.paging import PAGE


@pytest.fixture
def machine(bare):
    return bare


class Moving:
    """Memory of a machine that something happens to on each reading of the list of threads."""

    live = True

    def __init__(self, memory, happen) -> None:
        self._memory, self._happen = memory, happen

    def __getattr__(self, name: str):
        return getattr(self._memory, name)

    def readv(self, spans):
        found = self._memory.readv(spans)
        self._happen()
        return found


def moving(kernel, happen) -> None:
    """Let something happen to the guest on each of its reads."""
    from appliance.guest.windows.space import AddressSpace

    kernel.memory = Moving(kernel.memory, happen)
    kernel.space = AddressSpace(kernel.memory, kernel.space.root, kernel.space.mode)


def test_a_module_that_is_just_being_loaded_is_not_accused(machine, notepad) -> None:
    process = described(machine, notepad)
    module = machine.foreign_dll(notepad, "C:\\Program Files\\Vendor\\new.dll")
    kernel = kernel_of(machine)
    reads = []

    def happen() -> None:
        reads.append(1)
        if len(reads) == steps:
            machine.all.loader.load(notepad, module, ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"))

    steps = -1
    moving(kernel, happen)
    injection = Injection(kernel)
    assert ("unlisted-module", 2) in kinds(injection.find(process))
    steps = len(reads) + len(reads) // 3  # in the first look of the next three, near its end
    found = injection.find(process)
    assert [one for one in found if one.weight] == []


def test_a_region_whose_place_an_image_takes_meanwhile_is_not_accused_of_the_images_bytes(machine, notepad) -> None:
    process = described(machine, notepad)
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    kernel = kernel_of(machine)
    reads = []
    happened = []

    def happen() -> None:
        reads.append(1)
        if len(reads) == steps:
            happened.append(1)
            notepad.user.space.write(region.start, b"MZ" + PLAIN)
            for name in ("StartingVpn", "EndingVpn"):
                poke(machine, region.vad, f"_MMVAD_SHORT.{name}", 0)  # it is not there any more

    steps = -1
    moving(kernel, happen)
    injection = Injection(kernel)
    assert ("anon-exec", 1) in kinds(injection.find(process))
    whole = len(reads)
    for steps in range(1, whole):
        reads.clear()
        for name in ("StartingVpn", "EndingVpn"):
            poke(machine, region.vad, f"_MMVAD_SHORT.{name}", (region.start >> 12) & 0xFFFF_FFFF)
        notepad.user.space.write(region.start, b"\x90\x90" + PLAIN)
        assert "injected-pe" not in {one.kind for one in injection.find(process)}, steps
    assert happened


def test_a_process_that_ends_while_it_is_looked_at_is_not_accused_of_another_ones_memory(machine, notepad) -> None:
    process = described(machine, notepad)
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    kernel = kernel_of(machine)
    reads = []

    def happen() -> None:
        reads.append(1)
        if len(reads) == steps:
            poke(machine, notepad.va, "_EPROCESS.ExitTime", peek(machine, notepad.va, "_EPROCESS.CreateTime") + 1)
            notepad.user.space.write(region.start, b"MZ" + PLAIN)

    steps = -1
    moving(kernel, happen)
    injection = Injection(kernel)
    assert injection.find(process)
    whole = len(reads)
    for steps in range(1, whole):
        reads.clear()
        poke(machine, notepad.va, "_EPROCESS.ExitTime", 0)
        notepad.user.space.write(region.start, b"\x90\x90" + PLAIN)
        assert "injected-pe" not in {one.kind for one in injection.find(process)}, steps
