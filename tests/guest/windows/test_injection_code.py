"""Code that differs from its file's: detours, breakpoints, and what the loader itself writes."""

import hashlib
import struct

import pytest

from tests.guest.windows.foreign import PLAIN, change, kinds, look, only
from tests.guest.windows.machines import write
from tests.worlds.windows.paging import PAGE


@pytest.fixture
def machine(bare):
    return bare


def test_changed_code_is_told_with_the_first_differing_bytes(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    before = notepad.user.space.read(module.base + 0x1200, 4)
    change(machine, notepad, module, bytes(255 - byte for byte in before))
    found = only(look(machine, notepad), "modified-text")
    assert (found.address, found.size, found.weight) == (module.base + 0x1000, PAGE, 2)
    assert f"first change at {module.base + 0x1200:#x}" in (found.detail or "")
    assert f"+0x200 {before.hex()} to " in (found.detail or "")
    assert found.sha256 == hashlib.sha256(notepad.user.space.read(module.base + 0x1000, PAGE)).hexdigest()


def jump(source: int, target: int) -> bytes:
    return b"\xe9" + struct.pack("<i", target - source - 5)


def far_jump(target: int) -> bytes:
    return b"\xff\x25\0\0\0\0" + struct.pack("<Q", target)


def test_a_detour_is_judged_by_where_it_leads(machine, notepad) -> None:
    victim = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    guard = machine.module(notepad, "C:\\Program Files\\Guard\\guard.dll")
    change(machine, notepad, victim, jump(victim.base + 0x1200, guard.base + 0x1000))
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "a detour to \\Device\\HarddiskVolume3\\Program Files\\Guard\\guard.dll" in found.claim) == (
        1,
        True,
    )
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    change(machine, notepad, victim, far_jump(region.start))
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, f"a detour to memory of no image at {region.start:#x}" in found.claim) == (2, True)
    foreign = machine.foreign_dll(notepad)
    change(machine, notepad, victim, far_jump(foreign.base + 0x1000))
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "which the loader does not know" in found.claim) == (2, True)


def test_a_detour_through_a_trampoline_is_judged_by_its_end(machine, notepad) -> None:
    victim = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    guard = machine.module(notepad, "C:\\Program Files\\Guard\\guard.dll")
    trampoline = machine.region(notepad, PAGE, "RX", far_jump(guard.base + 0x1000))
    change(machine, notepad, victim, far_jump(trampoline.start))
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "guard.dll" in found.claim) == (1, True)


def test_a_trampoline_that_leads_to_itself_ends(machine, notepad) -> None:
    victim = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    trampoline = machine.region(notepad, PAGE, "RX", b"\xeb\xfe")
    change(machine, notepad, victim, far_jump(trampoline.start))
    assert only(look(machine, notepad), "modified-text").weight == 2


def test_breakpoints_are_unusual_only(machine, notepad) -> None:
    change(machine, notepad, notepad.modules[1], b"\xcc")
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "holds 1 breakpoint" in found.claim) == (1, True)


def test_write_barriers_of_dotnet_are_unusual_only_and_detours_in_its_runtime_are_not(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\dotnet\\coreclr.dll")
    change(machine, notepad, module, b"\x01\x02\x03\x04")
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "as .NET does with its write barriers" in found.claim) == (1, True)
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    change(machine, notepad, module, far_jump(region.start))
    assert only(look(machine, notepad), "modified-text").weight == 2


def test_code_that_was_replaced_as_a_whole_is_told_so(machine, notepad) -> None:
    change(machine, notepad, notepad.modules[1], b"\x01\x02\x03" * 800)
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "was replaced in memory" in found.claim) == (2, True)


def test_a_page_that_holds_the_files_bytes_again_is_no_finding(machine, notepad) -> None:
    notepad.user.copy_page(notepad.modules[1].base + 0x1000)
    assert look(machine, notepad) == ()


def test_data_that_an_image_writes_to_is_no_finding(machine, notepad) -> None:
    data = notepad.modules[1].base + 6 * PAGE
    notepad.user.copy_page(data)
    notepad.user.space.write(data, b"changed")
    assert look(machine, notepad) == ()


def test_a_change_whose_shared_page_is_gone_is_unusual_only(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll", changed=True)
    write(machine, module.file.prototypes + 8, struct.pack("<Q", 0x1234 << 32 | 1 << 10))  # in the file, on disk
    found = only(look(machine, notepad), "modified-text")
    assert (found.weight, "not in memory to compare with" in found.claim) == (1, True)


def test_a_shared_page_on_the_standby_list_is_compared_with(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll", changed=True)
    entry = module.file.pages[1] | 1 << 11 | 3 << 5  # a transition entry
    write(machine, module.file.prototypes + 8, struct.pack("<Q", entry))
    assert only(look(machine, notepad), "modified-text").weight == 2


def patch_header(machine, module, offset: int, value: bytes) -> None:
    """Change the file's own header, which all share."""
    gpa = module.file.pages[0]
    raw = machine.kernel.ram.read(gpa, PAGE)
    at = int.from_bytes(raw[0x3C:0x40], "little") + 24 + offset
    machine.kernel.ram.write(gpa + at, value)


def test_import_addresses_that_the_loader_writes_into_code_are_no_change(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    patch_header(machine, module, 112 + 8 * 12, struct.pack("<II", 0x1200, 0x40))
    change(machine, notepad, module, b"\x11" * 0x40)
    found = look(machine, notepad)
    assert kinds(found) == [("modified-text", 0)]
    assert found[0].claim == "pages of code that only the loader has written addresses to: 1, in a.dll"
    change(machine, notepad, module, b"\x11" * 0x41)
    assert only(look(machine, notepad), "modified-text").weight == 2


def test_addresses_in_an_image_that_did_not_get_its_place_are_no_change(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    patch_header(machine, module, 24, struct.pack("<Q", module.base - 0x10000))
    space, at = notepad.user.space, module.base + 0x1200
    old = int.from_bytes(space.read(at, 8), "little")
    change(machine, notepad, module, struct.pack("<Q", old + 0x10000 & (1 << 64) - 1))
    assert kinds(look(machine, notepad)) == [("modified-text", 0)]


def test_code_that_its_file_asks_to_be_writable_is_unusual_only(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\packed.dll", changed=True)
    raw = machine.kernel.ram.read(module.file.pages[0], PAGE)
    at = raw.index(b".text\0") + 36
    machine.kernel.ram.write(module.file.pages[0] + at, struct.pack("<I", 0xE0000020))
    assert only(look(machine, notepad), "modified-text").weight == 1
