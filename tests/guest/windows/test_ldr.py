"""The modules that a process's own loader knows."""

import random
import struct
from contextlib import suppress

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.ldr import Loaders
from appliance.guest.windows.processes import Processes
from tests.guest.windows.machines import ALL, kernel_of, make, peek, types_of, user
from tests.worlds.windows import FAMILIES, Machine


def look(machine, process):
    kernel = kernel_of(machine)
    return Loaders(kernel).read(Processes(kernel).read(process.va))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_module_is_told_with_its_place_and_path_and_no_other(family):
    with Machine(family) as machine:
        process = machine.process("notepad.exe", session=1)
        machine.module(process, "C:\\Windows\\System32\\ws2_32.dll")
        machine.foreign_dll(process)
        found = look(machine, process)
        listed = [each for each in process.modules if each.entry_va]
        assert [(each.base, each.size, each.name, each.path, each.va) for each in found.modules] == [
            (each.base, each.size, each.name, each.path, each.entry_va) for each in listed
        ]
        assert (found.image_base, found.gaps, found.loaded) == (process.modules[0].base, (), True)


@pytest.mark.parametrize("machine", ALL, indirect=True)
def test_every_windows_tells_its_modules(machine):
    process = machine.process("notepad.exe")
    machine.foreign_dll(process)
    found = look(machine, process)
    assert [each.name for each in found.modules[:2]] == ["notepad.exe", "ntdll.dll"]
    assert found.modules[0].base == found.image_base
    assert not any("evil" in str(each.path) for each in found.modules)


def test_a_module_says_on_which_of_the_lists_it_is(bare):
    process = bare.process("notepad.exe", session=1)
    bare.module(process, "C:\\Windows\\System32\\odd.dll", in_ldr=("InMemoryOrder",))
    rings = {each.name: each.rings for each in look(bare, process).modules}
    assert rings["odd.dll"] == (False, True, False)
    assert rings["ntdll.dll"] == (True, True, True)
    assert rings["notepad.exe"] == (True, True, False)  # a program initializes itself


def test_a_32_bit_process_has_the_modules_of_both_its_loaders(bare):
    process = bare.process("old.exe", session=1)
    region = bare.region(process, 0x4000, "RW", start=0x40_0000)
    base = region.start
    peb, ldr, entry, text = base, base + 0x800, base + 0x1000, base + 0x2000
    space = user(process)
    space.write(text, "C:\\Windows\\SysWOW64\\ntdll.dll".encode("utf-16-le"))
    space.write(peb + 8, struct.pack("<II", 0x77_0000, ldr))
    for at in (0xC, 0x14, 0x1C):
        space.write(ldr + at, struct.pack("<II", ldr + at, ldr + at))
    for at, link in ((0xC, 0), (0x14, 8)):
        space.write(ldr + at, struct.pack("<II", entry + link, entry + link))
        space.write(entry + link, struct.pack("<II", ldr + at, ldr + at))
    space.write(
        entry + 0x18, struct.pack("<IIIHHIHHI", 0x77B0_0000, 0x77B0_1000, 0x1A_0000, 58, 60, text, 18, 20, text + 40)
    )
    kernel = bare.kernel
    wow64 = kernel.nonpaged.take(b"Wow6", types_of(bare).size("_EWOW64PROCESS"))
    kernel.set(wow64, "_EWOW64PROCESS.Peb", peb)
    kernel.set(process.va, "_EPROCESS.WoW64Process", wow64)
    second = [each for each in look(bare, process).modules if each.wow64]
    assert [(each.base, each.size, each.name, each.path, each.rings) for each in second] == [
        (0x77B0_0000, 0x1A_0000, "ntdll.dll", "C:\\Windows\\SysWOW64\\ntdll.dll", (True, True, False))
    ]


def test_a_list_that_runs_in_a_circle_or_does_not_lead_back_ends_and_is_named(bare):
    process = bare.process("notepad.exe", session=1)
    _, second, third = (each.entry_va for each in process.modules)
    links, space = bare.kernel.types.offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks"), user(process)
    space.write(third + links, struct.pack("<Q", second + links))
    found = look(bare, process)
    assert [each.rings[0] for each in found.modules] == [True, True, True]
    assert [gap.what for gap in found.gaps] == ["loader's list InLoadOrder"] and found.gaps[0].address == second + links
    space.write(third + links, struct.pack("<Q", third + links))
    space.write(second + links + 8, struct.pack("<Q", 0x5_0000))
    found = look(bare, process)
    assert [each.rings[0] for each in found.modules] == [True, False, False]
    assert found.gaps[0].why == "a module does not point back to the one before it"


def test_more_modules_than_there_can_be_are_a_gap(bare, monkeypatch):
    monkeypatch.setattr("appliance.guest.windows.ldr.MAX_MODULES", 2)
    process = bare.process("notepad.exe", session=1)
    found = look(bare, process)
    assert len(found.modules) == 2 < len(process.modules)
    assert {gap.why for gap in found.gaps} == {"more than 2 modules"}


def test_a_loader_that_cannot_be_read_is_a_gap_and_no_empty_list(bare):
    process = bare.process("notepad.exe", session=1)
    bare.kernel.set(process.va, "_EPROCESS.Peb", 0x5_0000)
    found = look(bare, process)
    assert (found.modules, found.loaded, len(found.gaps)) == ((), False, 1)


def test_a_process_without_a_peb_has_no_modules_and_no_gap(bare):
    found = look(bare, bare["Registry"])
    assert (found.modules, found.gaps, found.loaded) == ((), (), False)


@pytest.mark.parametrize("name", ["xp-sp3", "20348"])
def test_whatever_a_process_writes_into_its_loaders_lists_the_walk_ends(name):
    machine, dice = make(name, standard=False), random.Random(11)
    process = machine.process("notepad.exe")
    kernel, types, size = kernel_of(machine), types_of(machine), types_of(machine).pointer_size
    space, raw = user(process), Processes(kernel).read(process.va)
    peb = peek(machine, process.va, "_EPROCESS.Peb")
    ldr = int.from_bytes(space.read(peb + types.offset("_PEB.Ldr"), size), "little")
    entries = [each.va for each in Loaders(kernel).read(raw).modules]
    targets = [(ldr, types.size("_PEB_LDR_DATA"))] + [(va, types.size("_LDR_DATA_TABLE_ENTRY") // 2) for va in entries]
    for _ in range(600):
        va, length = dice.choice(targets)
        junk = [dice.randbytes(8), dice.choice(targets)[0].to_bytes(8, "little"), bytes(8), b"\xff" * 8]
        space.write(va + 4 * dice.randrange(length // 4), dice.choice(junk)[:size])
        with suppress(GuestError):
            assert len(Loaders(kernel).read(raw).modules) <= 3 * 5
    machine.close()
