"""The program itself: an image that was replaced, a header written over, another's name."""

import struct

import pytest

from tests.guest.windows.foreign import NOTEPAD, PLAIN, heavy, kinds, look, only
from tests.guest.windows.machines import poke, types_of
from tests.worlds.windows.paging import PAGE


@pytest.fixture
def machine(bare):
    return bare


def test_a_program_whose_image_was_unmapped_and_replaced_is_hollowed(machine, notepad) -> None:
    region = machine.hollow(notepad)
    found = only(look(machine, notepad), "hollowed")
    assert (found.address, found.size, found.weight) == (region.start, region.size, 2)


def test_a_program_whose_image_is_gone_is_hollowed(machine, notepad) -> None:
    main = notepad.modules[0]
    notepad.user.remove(main.region)
    found = only(look(machine, notepad), "hollowed")
    assert (found.address, found.weight) == (main.base, 2)
    assert "nothing is mapped there" in found.claim


@pytest.mark.parametrize(
    ("path", "weight"),
    [("C:\\Windows\\WinSxS\\amd64_notepad_10.0\\notepad.exe", 1), ("C:\\Windows\\System32\\calc.exe", 2)],
)
def test_a_program_that_was_started_from_another_file_is_hollowed_unless_the_file_may_have_two_names(
    machine, notepad, path, weight
) -> None:
    file = machine.files.open(path)
    poke(machine, notepad.va, "_EPROCESS.ImageFilePointer", file.va)
    assert only(look(machine, notepad), "hollowed").weight == weight


def test_a_program_that_points_elsewhere_for_its_image_is_hollowed(machine, notepad) -> None:
    region = machine.region(notepad, 4 * PAGE, "RX", b"MZ" + PLAIN)
    offset = types_of(machine).offset("_PEB.ImageBaseAddress")
    notepad.user.space.write(notepad.peb + offset, struct.pack("<Q", region.start))
    found = only(look(machine, notepad), "hollowed")
    assert (found.address, found.weight) == (region.start, 2)


def test_a_program_with_the_image_of_another_file_in_its_place_is_hollowed(machine, notepad) -> None:
    main = notepad.modules[0]
    notepad.user.remove(main.region)
    notepad.user.image(machine.files.open("C:\\Windows\\System32\\calc.exe"), main.base)
    found = only(look(machine, notepad), "hollowed")
    assert found.claim == (
        "the program's image is \\Device\\HarddiskVolume3\\Windows\\System32\\calc.exe, and the process was started"
        " from \\Device\\HarddiskVolume3\\Windows\\System32\\notepad.exe"
    )


@pytest.mark.parametrize("header", [bytes(64), None])
def test_a_program_whose_header_was_written_over_is_hollowed(machine, notepad, header) -> None:
    base = notepad.modules[0].base
    if header is None:  # that of another program: its entry point differs
        header = bytearray(notepad.user.space.read(base, 0x200))
        at = int.from_bytes(header[0x3C:0x40], "little") + 24 + 16
        header[at : at + 4] = struct.pack("<I", 0x6666)
    notepad.user.copy_page(base)
    notepad.user.space.write(base, bytes(header))
    assert kinds(heavy(look(machine, notepad))) == [("hollowed", 2)]


def test_a_header_that_was_written_with_what_stood_there_is_no_finding(machine, notepad) -> None:
    notepad.user.copy_page(notepad.modules[0].base)
    assert look(machine, notepad) == ()


@pytest.mark.parametrize(
    ("path", "command", "weight"),
    [
        ("C:\\WINDOWS\\system32\\NOTEPAD.EXE", NOTEPAD, None),
        ("C:\\Windows\\System32\\svchost.exe", "svchost.exe -k netsvcs", 2),
        ("C:\\Program Files\\notepad.exe", NOTEPAD, 1),
        (NOTEPAD, '"C:\\Windows\\System32\\svchost.exe" -k netsvcs', 1),
        (NOTEPAD, "notepad C:\\a.txt", None),
        (NOTEPAD, "", None),
    ],
)
def test_a_process_that_calls_itself_by_another_name_is_told(machine, notepad, path, command, weight) -> None:
    machine.masquerade(notepad, path, command)
    assert kinds(look(machine, notepad)) == ([("peb-masquerade", weight)] if weight else [])
