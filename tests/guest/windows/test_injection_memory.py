"""Memory of no image that can be run: what it weighs, what excuses it, what hides none."""

import hashlib

import pytest

from tests.guest.windows.foreign import PEB_WALK, PLAIN, heavy, kinds, look, only
from tests.worlds.windows.paging import NX, PAGE, WRITABLE


@pytest.fixture
def machine(bare):
    return bare


def test_executable_memory_is_told_with_its_place_rights_bytes_and_hash(machine, notepad) -> None:
    region = machine.region(notepad, 2 * PAGE, "RWX", PLAIN)
    found = only(look(machine, notepad), "anon-exec")
    assert (found.address, found.size, found.weight) == (region.start, 2 * PAGE, 2)
    assert found.sha256 == hashlib.sha256(PLAIN.ljust(2 * PAGE, b"\0")).hexdigest()
    assert found.detail == (
        f"PAGE_EXECUTE_READWRITE; 2 of 2 pages resident, bytes at {region.start:#x}: {'90' * 32}; no file"
    )


@pytest.mark.parametrize(
    ("rights", "content", "kind", "weight"),
    [
        ("RWX", PLAIN, "anon-exec", 2),
        ("RWX", b"", "anon-exec", 1),
        ("RX", PLAIN, "anon-exec", 1),
        ("RX", PLAIN + PEB_WALK, "anon-exec", 2),
        ("RX", b"MZ" + PLAIN, "injected-pe", 2),
    ],
)
def test_executable_memory_weighs_what_it_holds(machine, notepad, rights, content, kind, weight) -> None:
    machine.region(notepad, PAGE, rights, content)
    assert kinds(look(machine, notepad)) == [(kind, weight)]


@pytest.mark.parametrize("content", [PLAIN, PEB_WALK, b"MZ" + PLAIN])
def test_memory_that_is_not_executable_is_not_foreign(machine, notepad, content) -> None:
    machine.region(notepad, PAGE, "RW", content)
    assert look(machine, notepad) == ()


def test_a_runtime_may_make_code_but_no_image_no_shellcode_and_no_thread(machine, notepad) -> None:
    machine.module(notepad, "C:\\Windows\\Microsoft.NET\\Framework64\\v4.0.30319\\clr.dll")
    machine.region(notepad, PAGE, "RWX", PLAIN)
    found = only(look(machine, notepad), "anon-exec")
    assert (found.weight, found.claim.endswith(", as .NET makes it")) == (1, True)
    for content in (b"MZ" + PLAIN, PEB_WALK):
        machine.region(notepad, PAGE, "RX", content)
    thread = machine.region(notepad, PAGE, "RX", PLAIN)
    machine.thread(notepad, thread.start)
    assert sorted(kinds(heavy(look(machine, notepad)))) == [
        ("anon-exec", 2),
        ("anon-exec", 2),
        ("foreign-thread", 2),
        ("injected-pe", 2),
    ]


def test_a_browsers_sandbox_may_keep_copies_of_system_calls_and_no_other_shellcode(machine, notepad) -> None:
    call = bytes.fromhex("4c8bd1b8520000000f05c3")
    machine.region(notepad, PAGE, "RX", call)
    assert kinds(look(machine, notepad)) == [("anon-exec", 2)]
    machine.module(notepad, "C:\\Program Files\\Google\\Chrome\\Application\\chrome.dll")
    assert kinds(look(machine, notepad)) == [("anon-exec", 1)]
    machine.region(notepad, PAGE, "RX", call + PEB_WALK)
    assert sorted(kinds(look(machine, notepad))) == [("anon-exec", 1), ("anon-exec", 2)]


def test_a_runtime_is_believed_by_its_mapped_image_and_not_by_the_loaders_word(machine, notepad) -> None:
    machine.module(notepad, "C:\\Windows\\System32\\clr.dll", in_vad=False)
    machine.region(notepad, PAGE, "RWX", PLAIN)
    assert only(look(machine, notepad), "anon-exec").weight == 2


def test_pages_made_executable_later_are_found_in_memory_that_was_not(machine, notepad) -> None:
    region = machine.region(notepad, 16 * PAGE, "RW", PEB_WALK)
    space = notepad.user.space
    for number in (4, 5):
        va = region.start + number * PAGE
        space.write(va, PEB_WALK)
        space.entry(va, space.read_entry(va) & ~NX & ~WRITABLE)
    found = only(look(machine, notepad), "anon-exec")
    assert (found.address, found.size, found.weight) == (region.start + 4 * PAGE, 2 * PAGE, 2)
    assert found.detail is not None
    assert found.detail.startswith("PAGE_EXECUTE_READ now, in a region made PAGE_READWRITE; 2 of 2 pages resident")


def test_pages_out_of_the_working_set_are_read_all_the_same(machine, notepad) -> None:
    region = machine.region(notepad, PAGE, "RWX", b"MZ" + PLAIN)
    notepad.user.space.entry(region.start, notepad.user.space.gpa(region.start) | 1 << 11 | 6 << 5)
    found = only(look(machine, notepad), "injected-pe")
    assert "1 of 1 pages resident" in (found.detail or "")


def test_pages_that_are_not_in_memory_are_a_gap(machine, notepad) -> None:
    region = machine.region(notepad, 3 * PAGE, "RWX", PLAIN)
    notepad.user.space.page_out(region.start)
    found = look(machine, notepad)
    assert "2 of 3 pages resident" in (only(found, "anon-exec").detail or "")
    gap = only(found, "gap")
    assert (gap.address, gap.size, gap.weight) == (region.start, PAGE, 0)
    assert gap.claim.endswith("paged out: 1 of its pages")


def test_pages_that_were_never_touched_are_no_gap(machine, notepad) -> None:
    machine.region(notepad, 3 * PAGE, "RWX", backed=False)
    space = notepad.user.space
    space.entry(machine.region(notepad, 2 * PAGE, "RWX", PLAIN).start + PAGE, 6 << 5)  # its protection only
    assert {one.kind for one in look(machine, notepad)} == {"anon-exec"}


def test_an_image_is_found_at_any_page_and_behind_a_wiped_header(machine, notepad) -> None:
    header = notepad.user.space.read(notepad.modules[0].base, PAGE)
    code = bytes.fromhex("48895c24084883ec20cccccccc40534883ec20").ljust(PAGE, b"\xc3")
    inside = machine.region(notepad, 4 * PAGE, "RX", bytes(2 * PAGE) + header)
    nameless = machine.region(notepad, 4 * PAGE, "RX", b"\0\0" + header[2:])
    wiped = machine.region(notepad, 4 * PAGE, "RX", bytes(PAGE) + code)
    found = [one for one in look(machine, notepad) if one.kind == "injected-pe"]
    assert {one.address for one in found} == {inside.start, nameless.start, wiped.start}
    assert f"an image at {inside.start + 2 * PAGE:#x}" in " ".join(one.claim for one in found)


def test_a_data_file_that_is_mapped_executable_is_told_with_its_path(machine, notepad) -> None:
    file = machine.files.open("C:\\Users\\a\\blob.dat", image=False, content=PLAIN)
    start = notepad.user.place("view", 0x0200_0000_0000, PAGE)
    notepad.user.view(file, start, "RX")
    found = only(look(machine, notepad), "anon-exec")
    assert (found.address, found.weight) == (start, 1)
    assert "maps \\Device\\HarddiskVolume3\\Users\\a\\blob.dat as data" in found.claim


def test_very_many_executable_regions_hide_none_that_a_thread_began_in(machine, notepad) -> None:
    for _ in range(100):
        machine.region(notepad, PAGE, "RX", PLAIN)
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    machine.thread(notepad, region.start)
    found = look(machine, notepad)
    assert (found[0].kind, found[0].weight) in (("anon-exec", 2), ("foreign-thread", 2))
    assert region.start in [one.address for one in heavy(found) if one.kind == "anon-exec"]
    assert any("37 more executable regions" in one.claim for one in found)


def test_regions_that_hold_nothing_hide_none_that_holds_shellcode(machine, notepad) -> None:
    for _ in range(70):
        machine.region(notepad, PAGE, "RWX", b"")
    region = machine.region(notepad, PAGE, "RX", PLAIN + PEB_WALK)
    assert [one.address for one in heavy(look(machine, notepad)) if one.kind == "anon-exec" and one.sha256] == [
        region.start
    ]


def test_single_pages_made_executable_hide_none_behind_them(machine, notepad) -> None:
    count = 9000
    region = machine.region(notepad, count * PAGE, "RW", backed=False)
    space, gpa = notepad.user.space, machine.kernel.ram.page()
    for number in range(0, count, 2):
        space.map(region.start + number * PAGE, gpa, user=True, writable=False, execute=True)
    last = region.start + (count - 2) * PAGE
    space.map(last, machine.kernel.ram.page(), user=True, writable=False, execute=True)
    machine.thread(notepad, last)
    found = look(machine, notepad)
    assert last in [one.address for one in heavy(found) if one.kind == "anon-exec"]
    assert last in [one.address for one in heavy(found) if one.kind == "foreign-thread"]


def test_code_at_the_end_of_a_huge_region_is_seen(machine, notepad) -> None:
    region = machine.region(notepad, 2 << 30, "RWX", backed=False)
    va = region.end - PAGE
    notepad.user.space.map(va, machine.kernel.ram.page(), user=True, writable=True, execute=True)
    notepad.user.space.write(va, PEB_WALK)
    found = only(look(machine, notepad), "anon-exec")
    assert (found.weight, f"shellcode at {va:#x}" in found.claim) == (2, True)
