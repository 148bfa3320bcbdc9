"""What in a process is foreign, in machines made of bytes: each finding, each excuse, and each lie."""

import hashlib
import random
import struct
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.injection import Injection, find_foreign
from appliance.guest.windows.processes import Processes
from appliance.model import Evidence, GuestProcess, ProcessKey
from tests.guest.windows.machines import ALL, OLD, kernel_of, make, peek, planted, poke, types_of, write
from tests.guest.windows.real import REAL, needs_real
from tests.worlds.windows import Machine
from tests.worlds.windows.paging import NX, PAGE, PRESENT, WRITABLE
from tests.worlds.windows.wow64 import NTDLL32

ALICE = "S-1-5-21-1-2-3-1001"
NOTEPAD = "C:\\Windows\\System32\\notepad.exe"
PLAIN = b"\x90" * 64  # code that says nothing of itself
PEB_WALK = bytes.fromhex("65488b042560000000")
USER_APC = 1


@pytest.fixture
def machine():
    with Machine("20348", standard=False) as made:
        yield made


@pytest.fixture
def notepad(machine):
    return machine.process("notepad.exe", sid=ALICE, session=1)


def described(machine, process) -> GuestProcess:
    processes = Processes(kernel_of(machine))
    return processes.describe(processes.read(process.va))


def look(machine, process) -> tuple[Evidence, ...]:
    return Injection(kernel_of(machine)).find(described(machine, process))


def kinds(found) -> list[tuple[str, int]]:
    return [(one.kind, one.weight) for one in found]


def only(found, kind: str) -> Evidence:
    matching = [one for one in found if one.kind == kind]
    assert len(matching) == 1, found
    return matching[0]


def heavy(found) -> list[Evidence]:
    return [one for one in found if one.weight > 1]


# -- nothing --


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_foreign_in_the_processes_of_a_clean_machine(name: str) -> None:
    made = make(name)
    try:
        kernel = kernel_of(made)
        processes, injection = Processes(kernel), Injection(kernel)
        for process in planted(made):
            found = injection.find(processes.describe(processes.read(process.va)))
            assert heavy(found) == []
            assert [one for one in found if one.kind == "gap"] == []
    finally:
        made.close()


@needs_real
def test_the_layouts_of_a_real_build_are_found_in_its_own_symbols() -> None:
    with Machine("20348", symbols=REAL) as made:
        from appliance.guest.windows.attach import attach
        from appliance.guest.windows.symbols import SymbolStore

        kernel = attach(made.memory(), symbols=SymbolStore([REAL], None, None))
        processes, injection = Processes(kernel), Injection(kernel)
        explorer = made["explorer.exe"]
        assert heavy(injection.find(processes.describe(processes.read(explorer.va)))) == []
        made.inject(explorer)
        assert {"injected-pe", "foreign-thread"} <= {
            one.kind for one in heavy(injection.find(processes.describe(processes.read(explorer.va))))
        }


def test_the_kernel_itself_and_its_minimal_processes_have_nothing_to_be_foreign(machine) -> None:
    assert look(machine, machine.system) == ()
    assert look(machine, machine["Registry"]) == ()


# -- memory of no image --


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


# -- threads --


def test_a_thread_that_began_in_memory_of_no_image_is_told(machine, notepad) -> None:
    region = machine.inject(notepad, PLAIN)
    found = only(look(machine, notepad), "foreign-thread")
    assert (found.address, found.weight) == (region.start + 0x40, 2)
    assert found.claim == f"thread {notepad.threads[-1].tid} began in executable memory of no file at {region.start:#x}"


def test_a_thread_that_the_kernel_began_in_foreign_code_cannot_hide_behind_its_other_beginning(
    machine, notepad
) -> None:
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    machine.thread(notepad, notepad.modules[0].base + 0x1100, native=region.start)
    assert only(look(machine, notepad), "foreign-thread").address == region.start


def test_a_thread_whose_beginning_is_unmapped_is_unusual_only(machine, notepad) -> None:
    machine.thread(notepad, 0x1234_5000, native=0x1234_5000)
    assert kinds(look(machine, notepad)) == [("foreign-thread", 1)]


def test_a_thread_of_the_kernel_in_a_process_is_not_foreign(machine, notepad) -> None:
    machine.all.thread(notepad, machine.kernel.base + 0x1000, kernel_mode=True)
    assert look(machine, notepad) == ()


def frame(machine, thread, rip: int, rsp: int) -> None:
    """Let a thread have entered the kernel from user space."""
    va = machine.kernel.nonpaged.take(b"Frme", types_of(machine).size("_KTRAP_FRAME"))
    for name, value in (("Rip", rip), ("Rsp", rsp), ("SegCs", 0x33)):
        poke(machine, va, f"_KTRAP_FRAME.{name}", value)
    poke(machine, thread.va, "_ETHREAD.Tcb.TrapFrame", va)


def test_a_thread_that_was_turned_away_into_foreign_code_is_told_by_its_trap_frame(machine, notepad) -> None:
    region = machine.region(notepad, PAGE, "RWX", PLAIN)
    frame(machine, notepad.threads[0], region.start + 0x20, 0)
    found = only(look(machine, notepad), "foreign-thread")
    assert (found.address, found.weight) == (region.start + 0x20, 2)
    assert f"rip {region.start + 0x20:#x}" in (found.detail or "")


def test_a_frame_of_a_thread_that_does_not_wait_is_an_old_one(machine, notepad) -> None:
    thread = notepad.threads[0]
    frame(machine, thread, 0x1234_5678, 0)
    assert kinds(look(machine, notepad)) == [("foreign-thread", 2)]
    poke(machine, thread.va, "_ETHREAD.Tcb.State", 2)
    assert look(machine, notepad) == ()


def test_a_thread_runs_in_code_that_a_jit_made_as_it_should(machine, notepad) -> None:
    machine.module(notepad, "C:\\Program Files\\Java\\bin\\server\\jvm.dll")
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    frame(machine, notepad.threads[0], region.start, 0)
    assert kinds(look(machine, notepad)) == [("anon-exec", 1)]


def test_a_thread_that_waits_in_ntdll_and_will_return_into_foreign_code_is_told_by_its_stack(machine, notepad) -> None:
    region = machine.region(notepad, PAGE, "RWX", b"\x90" * 16 + b"\xff\xd0" + b"\x90" * 16)
    stack = machine.region(notepad, PAGE, "RW")
    notepad.user.space.write(stack.start + 0x108, struct.pack("<Q", region.start + 18))
    notepad.user.space.write(stack.start + 0x100, struct.pack("<Q", region.start + 1))  # behind no call
    frame(machine, notepad.threads[0], notepad.modules[1].base + 0x1100, stack.start + 0x80)
    found = only(look(machine, notepad), "foreign-thread")
    assert (found.address, found.weight) == (stack.start + 0x108, 1)
    assert "return address" in found.claim


def test_an_apc_that_waits_to_run_foreign_code_is_told(machine, notepad) -> None:
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    types, thread = types_of(machine), notepad.threads[0]
    apc = machine.kernel.nonpaged.take(b"Papc", types.size("_KAPC"))
    poke(machine, apc, "_KAPC.NormalRoutine", notepad.modules[1].base + 0x1100)
    poke(machine, apc, "_KAPC.NormalContext", region.start + 8)
    head = thread.va + types.offset("_ETHREAD.Tcb.ApcState.ApcListHead") + 16 * USER_APC
    node = apc + types.offset("_KAPC.ApcListEntry")
    write(machine, node, struct.pack("<QQ", head, head))
    write(machine, head, struct.pack("<QQ", node, node))
    found = only(look(machine, notepad), "foreign-thread")
    assert (found.address, found.weight) == (region.start + 8, 2)
    assert found.claim.startswith("an APC waits to run executable memory of no file")


def test_a_jits_code_may_be_called_back_by_an_apc(machine, notepad) -> None:
    machine.module(notepad, "C:\\Program Files\\Java\\bin\\server\\jvm.dll")
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    apc = machine.kernel.nonpaged.take(b"Papc", types_of(machine).size("_KAPC"))
    poke(machine, apc, "_KAPC.NormalRoutine", region.start)
    thread, node = notepad.threads[0], apc + types_of(machine).offset("_KAPC.ApcListEntry")
    head = thread.va + types_of(machine).offset("_ETHREAD.Tcb.ApcState.ApcListHead") + 16 * USER_APC
    write(machine, node, struct.pack("<QQ", head, head))
    write(machine, head, struct.pack("<QQ", node, node))
    assert kinds(look(machine, notepad)) == [("anon-exec", 1)]


def test_very_many_apcs_are_read_up_to_a_number_and_the_others_told(machine, notepad, monkeypatch) -> None:
    monkeypatch.setattr("appliance.guest.windows.injection_threads.MAX_QUEUED", 2)
    types, nodes = types_of(machine), []
    head = notepad.threads[0].va + types.offset("_ETHREAD.Tcb.ApcState.ApcListHead") + 16 * USER_APC
    for _ in range(3):
        apc = machine.kernel.nonpaged.take(b"Papc", types.size("_KAPC"))
        poke(machine, apc, "_KAPC.NormalRoutine", notepad.modules[1].base + 0x1100)
        nodes.append(apc + types.offset("_KAPC.ApcListEntry"))
    ring = [head, *nodes, head]
    for at, following in pairwise(ring):
        write(machine, at, struct.pack("<Q", following))
    found = look(machine, notepad)
    assert [one.claim for one in found if one.kind == "gap"] == [
        "code could not be seen in full: not looked at: what waits to be run in threads, after the first 2"
    ]


def test_a_suspended_thread_is_told_to_be_one(machine, notepad) -> None:
    region = machine.region(notepad, PAGE, "RX", PLAIN)
    machine.thread(notepad, region.start, suspended=1)
    assert (only(look(machine, notepad), "foreign-thread").detail or "").endswith("; suspended 1 times")


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
    text = machine.all.text(notepad, "C:\\Windows\\System32\\user32.dll")
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


# -- the program itself --


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


# -- changed code --


def change(machine, process, module, code: bytes, offset: int = 0x1200) -> int:
    return machine.hook(process, module, offset, code)


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


# -- 32-bit processes --


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


# -- the process --


def test_a_process_that_has_ended_or_whose_place_was_reused_is_a_gap(machine, notepad) -> None:
    process = described(machine, notepad)
    other = GuestProcess(
        ProcessKey(process.pid, process.key.started_ns + 1), "", "", "", 0, None, task_va=process.task_va
    )
    injection = Injection(kernel_of(machine))
    assert kinds(injection.find(other)) == [("gap", 0)]
    machine.exit(notepad)
    assert kinds(injection.find(process)) == [("gap", 0)]


def test_a_process_whose_place_cannot_be_read_any_more_is_a_gap(machine, notepad) -> None:
    process, kernel = described(machine, notepad), kernel_of(machine)
    gone = replace(process, task_va=0xFFFF_9000_0000_0000)
    assert kinds(Injection(kernel).find(gone)) == [("gap", 0)]


def test_a_memory_map_that_cannot_be_read_is_a_gap(machine, notepad) -> None:
    process, kernel = described(machine, notepad), kernel_of(machine)
    injection = Injection(kernel)
    injection._vads._root = 1 << 40  # beyond what is mapped
    assert kinds(injection.find(process)) == [("gap", 0)]


def test_a_process_without_an_address_is_refused(machine) -> None:
    process = GuestProcess(ProcessKey(8, 1), "", "", "", 0, None)
    with pytest.raises(GuestError, match="process 8 has no known _EPROCESS"):
        find_foreign(kernel_of(machine), process)


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


def test_a_module_that_is_just_being_loaded_is_not_accused(machine, notepad) -> None:
    process = described(machine, notepad)
    module = machine.foreign_dll(notepad, "C:\\Program Files\\Vendor\\new.dll")
    kernel = kernel_of(machine)
    reads = []

    def happen() -> None:
        reads.append(1)
        if len(reads) == steps:
            machine.all._load(notepad, module, ("InLoadOrder", "InMemoryOrder", "InInitializationOrder"))

    steps = -1
    moving(kernel, happen)
    injection = Injection(kernel)
    assert ("unlisted-module", 2) in kinds(injection.find(process))
    steps = len(reads) + len(reads) // 3  # in the first look of the next three, near its end
    found = injection.find(process)
    assert [one for one in found if one.weight] == []


def moving(kernel, happen) -> None:
    """Let something happen to the guest on each of its reads."""
    from appliance.guest.windows.space import AddressSpace

    kernel.memory = Moving(kernel.memory, happen)
    kernel.space = AddressSpace(kernel.memory, kernel.space.root, kernel.space.mode)


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


@pytest.mark.parametrize("step", [0.1, 1.0])
def test_a_look_is_cut_off_at_its_time_and_says_so(machine, notepad, step) -> None:
    machine.inject(notepad)
    now = [0.0]

    def clock() -> float:
        now[0] += step
        return now[0]

    found = Injection(kernel_of(machine), clock).find(described(machine, notepad))
    assert any(one.kind == "gap" and "not looked at" in one.claim for one in found)


@pytest.mark.parametrize("name", OLD)
def test_windows_xp_and_server_2003_are_looked_into_as_well(name: str) -> None:
    made = make(name)
    try:
        process = made.process("notepad.exe", sid=ALICE, path="C:\\WINDOWS\\system32\\notepad.exe")
        region = made.inject(process)
        dll = made.foreign_dll(process)
        base = types_of(made).offset("_PEB.ImageBaseAddress")
        peb = peek(made, process.va, "_EPROCESS.Peb")
        process.space.write(peb + base, struct.pack("<I", region.start))
        found = look(made, process)
        assert {(one.kind, one.address) for one in heavy(found)} == {
            ("hollowed", region.start),
            ("injected-pe", region.start),
            ("foreign-thread", region.start + 0x100),
            ("unlisted-module", dll),
        }
        assert ("odd-path", dll) in {(one.kind, one.address) for one in found}
    finally:
        made.close()


def test_bytes_changed_at_random_give_evidence_or_a_guest_error_and_nothing_else() -> None:
    rng = random.Random(4)
    with Machine("19041", standard=False) as made:
        process = made.process("notepad.exe", sid=ALICE)
        made.inject(process)
        made.foreign_dll(process)
        module = made.module(process, "C:\\Windows\\System32\\hooked.dll", changed=True)
        target = described(made, process)
        kernel, ram = kernel_of(made), made.kernel.ram
        space = process.user.space
        spots = [made.kernel.space.gpa(va) for va in (process.va, process.threads[-1].va, module.file.control_area)]
        spots += [made.kernel.space.gpa(region.vad) for region in process.user.regions]
        spots += [space.gpa(va) for va in (process.peb, process.ldr, process.params, module.base, module.entry_va)]
        spots += [made.kernel.space.gpa(module.file.prototypes), made.kernel.space.gpa(module.file.va)]
        spots += [space.root, *(space._table(module.base, level, user=True) for level in range(3))]
        injection = Injection(kernel)
        began = time.monotonic()
        for _ in range(120):
            at = min(rng.choice(spots) + rng.randrange(0x600), ram.size - 8)
            old = ram.read(at, 8)
            ram.write(
                at, rng.choice((rng.randbytes(8), bytes(8), struct.pack("<Q", 1 << rng.randrange(64)), old[::-1]))
            )
            with suppress(GuestError):
                injection.find(target)
            ram.write(at, old)
            assert time.monotonic() - began < 60
        assert {"injected-pe", "unlisted-module", "modified-text"} <= {one.kind for one in injection.find(target)}


def test_three_hundred_regions_are_looked_into_within_their_budget() -> None:
    with Machine("20348", ram=96 << 20, standard=False) as made:
        process = made.process("notepad.exe", sid=ALICE)
        for number in range(120):
            made.module(process, f"C:\\Windows\\System32\\lib{number}.dll")
        for number in range(180):
            made.region(process, 16 * PAGE, "RX" if number % 9 == 0 else "RW", PLAIN)
        target, injection = described(made, process), Injection(kernel_of(made))
        spent = []
        for _ in range(5):
            began = time.process_time()
            found = injection.find(target)
            spent.append(time.process_time() - began)
        assert len(process.user.regions) > 300
        assert len([one for one in found if one.kind == "anon-exec"]) == 20
        assert min(spent) < 0.3, spent  # 0.04 s on a quiet machine


def test_page_tables_that_lead_back_to_themselves_end(machine, notepad) -> None:
    target = described(machine, notepad)
    space = notepad.user.space
    for index in range(256):
        machine.kernel.ram.write(space.root + 8 * index, struct.pack("<Q", space.root | PRESENT | WRITABLE | 4))
    began = time.monotonic()
    with suppress(GuestError):
        Injection(kernel_of(machine)).find(target)
    assert time.monotonic() - began < 15
