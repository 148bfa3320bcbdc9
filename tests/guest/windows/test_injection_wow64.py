"""What is foreign in 32-bit processes of a 64-bit Windows."""

import struct

import pytest

from tests.guest.windows.foreign import PEB_WALK, PLAIN, change, heavy, kinds, look, only
from tests.guest.windows.machines import ALICE, peek, poke
from tests.worlds.windows.paging import NX, PAGE
from tests.worlds.windows.wow64 import NTDLL32


@pytest.fixture
def machine(bare):
    return bare


def old_program(machine, *, no_execute: bool = True):
    """A 32-bit process, and the 32-bit ntdll.dll that its second loader lists."""
    process = machine.process("old.exe", path="C:\\Program Files (x86)\\Old\\old.exe", sid=ALICE, session=1)
    poke(machine, process.va, "_EPROCESS.Pcb.Flags.ExecuteOptions", 1 if no_execute else 2)
    return process, next(module for module in process.modules if module.path == NTDLL32)


def test_a_32_bit_process_with_two_loaders_has_nothing_foreign(machine) -> None:
    process, _ = old_program(machine)
    assert look(machine, process) == ()


@pytest.mark.parametrize("what", ["unreadable", "not made yet"])
def test_without_its_second_loaders_lists_a_32_bit_process_is_not_accused_of_its_images(machine, what) -> None:
    process, _ = old_program(machine)
    machine.module(process, "C:\\Program Files (x86)\\Old\\only32.dll", in_ldr=False)
    assert len(heavy(look(machine, process))) == 1
    if what == "unreadable":
        poke(machine, process.va, "_EPROCESS.WoW64Process", 0xFFFF_9000_0000_0000)
    else:
        peb = peek(machine, peek(machine, process.va, "_EPROCESS.WoW64Process"), "_EWOW64PROCESS.Peb")
        process.user.space.write(peb + 0xC, bytes(4))
    found = look(machine, process)
    assert heavy(found) == []
    assert "32-bit loader's lists are not there" in only(found, "gap").claim


def test_a_detour_in_32_bit_code_is_followed(machine) -> None:
    process, module = old_program(machine)
    region = machine.region(process, PAGE, "RX", PLAIN, start=0x60_0000)
    change(machine, process, module, b"\x68" + struct.pack("<I", region.start) + b"\xc3")
    found = only(look(machine, process), "modified-text")
    assert (found.weight, f"memory of no image at {region.start:#x}" in found.claim) == (2, True)


@pytest.mark.parametrize("no_execute", [True, False])
def test_page_tables_are_believed_where_the_process_keeps_data_from_being_run(machine, no_execute) -> None:
    process, _ = old_program(machine, no_execute=no_execute)
    region = machine.region(process, PAGE, "RW", PEB_WALK)
    process.user.space.entry(region.start, process.user.space.read_entry(region.start) & ~NX)
    assert kinds(look(machine, process)) == ([("anon-exec", 2)] if no_execute else [])


def test_data_of_an_image_is_no_code_where_every_page_can_be_run(machine) -> None:
    process, module = old_program(machine, no_execute=False)
    data = module.base + 6 * PAGE
    process.user.copy_page(data)
    space = process.user.space
    space.entry(data, space.read_entry(data) & ~NX)
    space.write(data, b"changed")
    assert look(machine, process) == ()
    change(machine, process, module, b"\x01\x02\x03\x04")
    assert only(look(machine, process), "modified-text").address == module.base + 0x1000
