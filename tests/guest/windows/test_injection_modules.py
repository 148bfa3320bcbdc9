"""Images against the loader's lists, and the places they come from."""

import hashlib
import struct

import pytest

from tests.guest.windows.foreign import PLAIN, heavy, kinds, look, only
from tests.guest.windows.machines import ALICE, poke, types_of


@pytest.fixture
def machine(bare):
    return bare


# -- images and the loader's lists --


def test_an_image_that_the_loader_does_not_know_is_told_with_path_bytes_and_hash(machine, notepad) -> None:
    module = machine.foreign_dll(notepad)
    found = look(machine, notepad)
    unlisted, place = only(found, "unlisted-module"), only(found, "odd-path")
    assert (unlisted.address, unlisted.size, unlisted.weight) == (module.base, module.size, 2)
    content = notepad.user.space.read(module.base, module.size)
    assert unlisted.sha256 == hashlib.sha256(content).hexdigest()
    assert "path \\Device\\HarddiskVolume3\\Users\\Public\\evil.dll" in (unlisted.detail or "")
    assert (place.address, place.weight) == (module.base, 1)


@pytest.mark.parametrize(
    ("lists", "weight"),
    [
        (("InLoadOrder", "InMemoryOrder"), None),  # its initialization comes later, or never
        (("InLoadOrder",), 2),
        (("InMemoryOrder", "InInitializationOrder"), 2),
        (("InInitializationOrder",), 2),
    ],
)
def test_an_image_that_was_taken_off_some_of_the_loaders_lists_is_told(machine, notepad, lists, weight) -> None:
    machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll", in_ldr=lists)
    assert kinds(look(machine, notepad)) == ([("unlisted-module", weight)] if weight else [])


@pytest.mark.parametrize(
    ("path", "weight"),
    [
        ("C:\\Windows\\System32\\apisetschema.dll", None),
        ("C:\\Windows\\System32\\en-US\\shell32.dll.mui", None),
        ("C:\\Windows\\System32\\imageres.dll", 1),
        ("C:\\Program Files\\Vendor\\a.dll", 2),
    ],
)
def test_an_image_that_may_be_open_for_its_resources_weighs_less(machine, notepad, path, weight) -> None:
    machine.module(notepad, path, in_ldr=False)
    assert kinds(look(machine, notepad)) == ([("unlisted-module", weight)] if weight else [])


def test_an_unlisted_image_that_cannot_be_run_is_unusual_only(machine, notepad) -> None:
    file = machine.files.open("C:\\Program Files\\Vendor\\icons.exe")
    start = notepad.user.place("view", 0x0200_0000_0000, file.size)
    notepad.user.view(file, start, "PAGE_WRITECOPY")
    found = only(look(machine, notepad), "unlisted-module")
    assert (found.address, found.weight) == (start, 1)
    assert found.claim.endswith("but as one that cannot be run (SEC_IMAGE_NO_EXECUTE)")


def test_an_unlisted_image_of_windows_weighs_more_when_a_thread_began_in_it(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Windows\\System32\\imageres.dll", in_ldr=False)
    machine.thread(notepad, module.base + 0x1000)
    assert sorted(kinds(look(machine, notepad))) == [("foreign-thread", 2), ("unlisted-module", 2)]


def test_a_module_of_the_loader_that_is_no_image_is_told(machine, notepad) -> None:
    base = notepad.modules[-1].base
    module = machine.module(notepad, "C:\\Windows\\System32\\fake.dll", in_vad=False)
    assert module.base != base
    assert kinds(look(machine, notepad)) == [("fake-module", 1)]
    machine.region(notepad, module.size, "RX", b"MZ" + PLAIN, start=module.base)
    assert sorted(kinds(look(machine, notepad))) == [("fake-module", 2), ("injected-pe", 2)]


def test_an_image_that_the_loader_calls_by_another_files_name_is_told(machine, notepad) -> None:
    module = machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll")
    offset = types_of(machine).offset("_LDR_DATA_TABLE_ENTRY.FullDllName")
    text = machine.all.loader.text(notepad, "C:\\Windows\\System32\\user32.dll")
    notepad.user.space.write(module.entry_va + offset, text)
    found = only(look(machine, notepad), "peb-masquerade")
    assert (found.address, found.weight) == (module.base, 2)


def test_lists_that_cannot_be_read_to_their_ends_accuse_nobody_and_are_told(machine, notepad) -> None:
    machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll", in_ldr=False)
    links = types_of(machine).offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks")
    notepad.user.space.write(notepad.modules[1].entry_va + links, struct.pack("<Q", 0x1234_5678_9000))
    found = look(machine, notepad)
    assert heavy(found) == []
    assert "gap" in {one.kind for one in found}


def test_a_process_without_its_loaders_lists_is_unusual_once_it_has_more_images_than_at_its_start(
    machine, notepad
) -> None:
    ldr = notepad.peb + types_of(machine).offset("_PEB.Ldr")
    notepad.user.space.write(ldr, bytes(8))
    assert look(machine, notepad) == ()
    machine.module(notepad, "C:\\Program Files\\Vendor\\a.dll", in_ldr=False)
    assert kinds(look(machine, notepad)) == [("unlisted-module", 1)]


# -- places --


@pytest.mark.parametrize(
    ("sid", "path", "weight"),
    [
        (ALICE, "C:\\Windows\\Temp\\a.dll", 1),
        ("S-1-5-18", "C:\\Windows\\Temp\\a.dll", 2),
        ("S-1-5-18", "C:\\Users\\a\\AppData\\Local\\a.dll", 2),
        ("S-1-5-18", "\\\\server\\share\\a.dll", 2),
        (ALICE, "C:\\Users\\a\\AppData\\Local\\a.dll", None),
    ],
)
def test_a_module_from_where_users_write_is_suspicious_in_a_process_of_the_system(machine, sid, path, weight) -> None:
    process = machine.process("host.exe", sid=sid)
    machine.module(process, path)
    assert kinds(look(machine, process)) == ([("odd-path", weight)] if weight else [])


@pytest.mark.parametrize(
    ("member", "value", "why"),
    [("DeviceType", 0x14, "share"), ("DeviceType", 2, "removable"), ("Characteristics", 1, "removable")],
)
def test_a_module_from_another_medium_is_told_by_its_device(machine, notepad, member, value, why) -> None:
    module = machine.module(notepad, "\\folder\\a.dll")
    device = machine.kernel.object("Device", b"Devi", machine.kernel.types.pack("_DEVICE_OBJECT", {"Type": 3}))
    poke(machine, device, f"_DEVICE_OBJECT.{member}", value)
    poke(machine, module.file.va, "_FILE_OBJECT.DeviceObject", device)
    found = only(look(machine, notepad), "odd-path")
    assert (found.weight, why in found.claim) == (1, True)


@pytest.mark.parametrize(("number", "weight"), [(0, 2), (1, 1)])
def test_an_image_of_a_file_that_is_being_deleted_is_told(machine, notepad, number, weight) -> None:
    poke(machine, notepad.modules[number].file.va, "_FILE_OBJECT.DeletePending", 1)
    found = only(look(machine, notepad), "deleted-file")
    assert (found.address, found.weight) == (notepad.modules[number].base, weight)
