"""The list of processes, what is one, and lists that were broken."""

import random
from contextlib import suppress

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.processes import TRIES, Processes
from tests.guest.windows.machines import (
    ALL,
    began_ns,
    kernel_of,
    links,
    make,
    peek,
    planted,
    poke,
    read,
    types_of,
    write,
)


@pytest.mark.parametrize("machine", ALL, indirect=True)
def test_every_listed_process_is_found_with_its_pid_parent_times_and_page_tables(machine):
    for name in ("wininit.exe", "services.exe", "notepad.exe"):
        machine.process(name)
    listing = Processes(kernel_of(machine)).walk()
    expected = [(each.va, each.pid, each.ppid, each.dtb) for each in planted(machine)]
    assert [(raw.va, raw.pid, raw.ppid, raw.dtb) for raw in listing.processes] == expected
    assert [raw.created for raw in listing.processes[1:]] == [began_ns(each) for each in planted(machine)[1:]]
    assert (listing.gaps, listing.torn) == ([], 0)


def test_a_process_that_starts_between_two_looks_is_in_the_second_one_and_one_that_ends_is_not(machine):
    processes = Processes(kernel_of(machine))
    before = {raw.pid for raw in processes.walk().processes}
    made = machine.process("late.exe")
    assert {raw.pid for raw in processes.walk().processes} == before | {made.pid}
    node, size = made.va + links(machine), types_of(machine).pointer_size
    flink, blink = read(machine, node, size), read(machine, node + size, size)
    write(machine, int.from_bytes(blink, "little"), flink)
    write(machine, int.from_bytes(flink, "little") + size, blink)
    write(machine, made.va, b"\xdd" * types_of(machine).size("_EPROCESS"))
    listing = processes.walk()
    assert ({raw.pid for raw in listing.processes}, listing.gaps) == (before, [])


def test_only_what_is_a_process_is_one(machine):
    processes = Processes(kernel_of(machine))
    made = machine.process("notepad.exe")
    assert processes.is_process(made.va)
    thread = getattr(made.threads[0], "va", made.threads[0])
    assert not any(map(processes.is_process, (0, made.va + 8, made.va - 0x40, thread, 0x400000, 1 << 63)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_EPROCESS.UniqueProcessId", 601),
        ("_EPROCESS.UniqueProcessId", 0),
        ("_EPROCESS.Pcb.DirectoryTableBase", 0),
        ("_EPROCESS.CreateTime", 0x1234),
        ("_EPROCESS.ThreadListHead.Flink", 0xFFFF_FFFF_8050_0000),
    ],
)
def test_a_structure_that_contradicts_itself_is_no_process(machine, path, value):
    made = machine.process("notepad.exe")
    processes = Processes(kernel_of(machine))
    assert processes.is_process(made.va)
    poke(machine, made.va, path, value)
    if "ThreadListHead" in path:
        poke(machine, made.va, "_EPROCESS.ThreadListHead.Blink", value)
    assert not processes.is_process(made.va)


def disguise(machine, made, *, header=False, kind=False):
    """Overwrite what calls it a process: in its own header, for the object manager."""
    types = types_of(machine)
    if header:
        poke(machine, made.va, "_EPROCESS.Pcb.Header.Type", 0)
    if kind:
        member = "TypeIndex" if types.has("_OBJECT_HEADER.TypeIndex") else "Type"
        at = made.va - types.offset("_OBJECT_HEADER.Body")
        poke(machine, at, f"_OBJECT_HEADER.{member}", peek(machine, at, f"_OBJECT_HEADER.{member}") ^ 8)


@pytest.mark.parametrize("marks", [{"header": True}, {"kind": True}])
def test_a_process_with_one_mark_overwritten_is_still_one_and_hides_nobody(machine, marks):
    made = [machine.process("one.exe"), machine.process("two.exe"), machine.process("hidden.exe", hidden=True)]
    for each in made:
        disguise(machine, each, **marks)
    processes = Processes(kernel_of(machine))
    listing = processes.walk()
    assert not listing.gaps and {raw.pid for raw in listing.processes} == {each.pid for each in planted(machine)}
    assert all(processes.is_process(each.va) for each in made)


def test_one_that_only_the_list_or_its_threads_call_a_process_is_one(machine):
    made, hidden = machine.process("one.exe"), machine.process("hidden.exe", hidden=True)
    for each in (made, hidden):
        disguise(machine, each, header=True, kind=True)
    processes = Processes(kernel_of(machine))
    assert processes.is_process(hidden.va)
    for each in (made, hidden):
        thread = getattr(each.threads[0], "va", each.threads[0])
        poke(machine, thread, "_ETHREAD.Cid.UniqueProcess", each.pid + 4)
    assert made.pid in {raw.pid for raw in processes.walk().processes}
    assert processes.is_process(made.va) and not processes.is_process(hidden.va)


def test_the_bytes_of_a_process_at_another_place_are_no_process(machine):
    made, other = machine.process("notepad.exe"), machine.process("other.exe")
    size = types_of(machine).size("_EPROCESS")
    write(machine, other.va, read(machine, made.va, size))
    assert not Processes(kernel_of(machine)).is_process(other.va)


def test_a_broken_list_is_told_from_both_ends_and_the_break_is_named(machine):
    made = [machine.process(f"p{number}.exe") for number in range(6)]
    broken = made[2]
    poke(machine, broken.va, "_EPROCESS.ActiveProcessLinks.Flink", 0x0BAD)
    listing = Processes(kernel_of(machine)).walk()
    assert {raw.pid for raw in listing.processes} == {each.pid for each in planted(machine)}
    assert (len(listing.gaps), listing.torn) == (1, TRIES)
    assert listing.gaps[0].address == 0x0BAD


def test_one_that_is_unlinked_in_one_direction_only_is_found_by_the_other(machine):
    made = [machine.process(f"p{number}.exe") for number in range(3)]
    node = made[1].va + links(machine)
    poke(machine, made[0].va, "_EPROCESS.ActiveProcessLinks.Flink", made[2].va + links(machine))
    listing = Processes(kernel_of(machine)).walk()
    assert made[1].pid in {raw.pid for raw in listing.processes}
    assert listing.gaps and listing.gaps[0].address == made[2].va + links(machine) != node


def test_the_last_process_is_found_though_the_one_before_it_leads_past_it(machine):
    made = [machine.process(f"p{number}.exe") for number in range(3)]
    head = peek(machine, made[2].va, "_EPROCESS.ActiveProcessLinks.Flink")
    poke(machine, made[1].va, "_EPROCESS.ActiveProcessLinks.Flink", head)
    listing = Processes(kernel_of(machine)).walk()
    assert made[2].pid in {raw.pid for raw in listing.processes} and listing.gaps


def test_links_back_that_were_overwritten_hide_nobody_between_them(machine):
    made = [machine.process(f"p{number}.exe") for number in range(6)]
    for broken in (made[1], made[4]):
        poke(machine, broken.va, "_EPROCESS.ActiveProcessLinks.Blink", 0x0BAD)
    processes = Processes(kernel_of(machine))
    listing = processes.walk()
    assert [raw.pid for raw in listing.processes] == [each.pid for each in planted(machine)]
    assert len(listing.gaps) == 1 and all(map(processes.is_listed, listing.processes))


def test_a_circle_in_the_list_ends_the_walk(machine):
    made = [machine.process(f"p{number}.exe") for number in range(3)]
    poke(machine, made[2].va, "_EPROCESS.ActiveProcessLinks.Flink", made[0].va + links(machine))
    poke(machine, made[0].va, "_EPROCESS.ActiveProcessLinks.Blink", made[2].va + links(machine))
    listing = Processes(kernel_of(machine)).walk()
    assert len(listing.processes) <= len(planted(machine)) and listing.gaps


@pytest.mark.parametrize("name", ["xp-sp3", "20348"])
def test_whatever_the_bytes_say_a_look_ends_and_raises_nothing_but_guest_errors(name):
    machine, dice = make(name), random.Random(7)
    machine.process("hidden.exe", pid=600, hidden=True)
    kernel, types = kernel_of(machine), types_of(machine)
    every = planted(machine) + planted(machine, hidden=True)
    targets = [(each.va, types.size("_EPROCESS")) for each in every]
    targets += [(peek(machine, each.va, "_EPROCESS.Token") & ~15, types.size("_TOKEN")) for each in every]
    for _ in range(200):
        va, size = dice.choice(targets)
        at = va + dice.randrange(size) & ~3
        old = read(machine, at, 8)
        junk = [dice.randbytes(8), dice.choice(targets)[0].to_bytes(8, "little"), bytes(8), b"\xdd" * 8]
        write(machine, at, dice.choice(junk))
        processes = Processes(kernel)
        kernel.forget()
        with suppress(GuestError):
            listing = processes.walk()
            processes.describe_all(listing.processes)
            OtherViews(kernel, processes).find_hidden(listing)
        write(machine, at, old)
    whole = Processes(kernel).walk()
    assert len(whole.processes) == len(planted(machine)) and not whole.gaps
    machine.close()
