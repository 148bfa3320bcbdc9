"""What in a process is foreign, in machines made of bytes: clean ones, gaps, budgets, and bytes changed at random."""

import random
import struct
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.injection import Injection, find_foreign
from appliance.guest.windows.processes import Processes
from appliance.model import GuestProcess, ProcessKey
from tests.guest.windows.foreign import PLAIN, described, heavy, kinds, look
from tests.guest.windows.machines import ALICE, ALL, OLD, kernel_of, make, peek, planted, types_of
from tests.worlds.windows import Machine
from tests.worlds.windows.paging import PAGE, PRESENT, WRITABLE
from tests.worlds.windows.real import REAL, needs_real


@pytest.fixture
def machine(bare):
    return bare


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
