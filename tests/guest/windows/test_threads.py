"""The threads of a process."""

import random
from contextlib import suppress

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.threads import TRIES, Threads
from tests.guest.windows.machines import ALL, began_ns, kernel_of, make, peek, planted, poke, read, types_of, write


def addresses(process):
    return [getattr(each, "va", each) for each in process.threads]


def links(machine):
    return types_of(machine).offset("_ETHREAD.ThreadListEntry")


@pytest.mark.parametrize("machine", ALL, indirect=True)
def test_every_thread_is_told_with_its_process_and_where_it_began(machine):
    process = machine.process("notepad.exe")
    region = machine.inject(process)
    found = Threads(kernel_of(machine)).walk(process.va)
    assert ([thread.va for thread in found.threads], found.gaps, found.torn) == (addresses(process), [], 0)
    assert {thread.pid for thread in found.threads} == {process.pid}
    assert {thread.process for thread in found.threads} == {thread.attached for thread in found.threads} == {process.va}
    assert all(thread.state_name == "Waiting" and thread.alive for thread in found.threads)
    assert region.start < found.threads[-1].win32_start < region.start + region.size
    assert len({thread.tid for thread in found.threads}) == 2


def test_start_times_are_right_though_old_windows_shifts_them(machine):
    process = machine.process("notepad.exe")
    thread = Threads(kernel_of(machine)).walk(process.va).threads[0]
    assert abs(thread.created - began_ns(process)) < 3600 * 10**9


@pytest.mark.parametrize("machine", ALL, indirect=True)
def test_a_thread_lives_while_a_list_lies_where_its_end_will_be_noted(machine):
    process = machine.process("notepad.exe")
    va, threads = addresses(process)[0], Threads(kernel_of(machine))
    types = types_of(machine)
    chain, pointer = va + types.offset("_ETHREAD.ExitTime"), kernel_of(machine).pointer_size
    for target in (chain, addresses(process)[-1]):  # an empty list leads to itself
        write(machine, chain, (target.to_bytes(pointer, "little") * 2)[:8])
        thread = threads.walk(process.va).threads[0]
        assert (thread.alive, thread.exited) == (True, 0)
    write(machine, chain, (began_ns(process) // 100 + 116_444_736_000_000_000).to_bytes(8, "little"))
    assert not threads.walk(process.va).threads[0].alive


def test_a_suspended_thread_and_one_in_another_process_are_told_as_they_are(bare):
    process, other = bare.process("notepad.exe", session=1), bare.process("lsass.exe")
    made = bare.thread(process, 0x7FFB_0000_1000, native=0x7FFB_0000_2000, suspended=2)
    bare.kernel.set(made.va, "_ETHREAD.Tcb.ApcState.Process", other.va)
    thread = Threads(kernel_of(bare)).walk(process.va).threads[-1]
    assert (thread.suspended, thread.attached, thread.process) == (2, other.va, process.va)
    assert (thread.start, thread.win32_start, thread.teb) == (0x7FFB_0000_2000, 0x7FFB_0000_1000, made.teb)


def test_a_thread_that_begins_between_two_looks_is_in_the_second_one(machine):
    process = machine.process("notepad.exe")
    threads = Threads(kernel_of(machine))
    assert len(threads.walk(process.va).threads) == 1
    machine.inject(process)
    assert [thread.va for thread in threads.walk(process.va).threads] == addresses(process)


def test_threads_that_say_whose_they_are_are_told_though_the_list_does_not_lead_back(machine):
    process = machine.process("notepad.exe")
    machine.inject(process)
    machine.inject(process)
    for thread in addresses(process):
        poke(machine, thread, "_ETHREAD.ThreadListEntry.Blink", process.va)
    found = Threads(kernel_of(machine)).walk(process.va)
    assert ([thread.va for thread in found.threads], found.torn) == (addresses(process), TRIES)
    assert found.gaps[0].address == addresses(process)[0] + links(machine)


def test_a_list_that_leads_into_another_processes_threads_is_told_as_far_as_it_is_its_own(machine):
    process, other = machine.process("notepad.exe"), machine.process("other.exe")
    machine.inject(process)
    machine.inject(other)
    poke(machine, addresses(process)[-1], "_ETHREAD.ThreadListEntry.Flink", addresses(other)[0] + links(machine))
    found = Threads(kernel_of(machine)).walk(process.va)
    assert ([thread.va for thread in found.threads], found.torn) == (addresses(process), TRIES)
    assert found.gaps


def test_a_circle_of_threads_ends(machine):
    process = machine.process("notepad.exe")
    machine.inject(process)
    first, second = addresses(process)
    poke(machine, second, "_ETHREAD.ThreadListEntry.Flink", first + links(machine))
    poke(machine, first, "_ETHREAD.ThreadListEntry.Blink", second + links(machine))
    found = Threads(kernel_of(machine)).walk(process.va)
    assert len(found.threads) <= 2 and found.gaps


def test_what_is_no_thread_is_not_told(machine):
    process = machine.process("notepad.exe")
    machine.inject(process)
    second = addresses(process)[1]
    poke(machine, second, "_ETHREAD.Tcb.Header.Type", 3)
    found = Threads(kernel_of(machine)).walk(process.va)
    assert len(found.threads) == 2 and not found.gaps  # its header was overwritten; it still says whose it is
    named = "_ETHREAD.ThreadsProcess" if types_of(machine).has("_ETHREAD.ThreadsProcess") else "_ETHREAD.Tcb.Process"
    poke(machine, second, named, 0)
    found = Threads(kernel_of(machine)).walk(process.va)
    assert len(found.threads) == 1 and found.gaps


@pytest.mark.parametrize("name", ["2003-sp2", "20348"])
def test_whatever_the_bytes_say_threads_are_read_or_refused(name):
    machine, dice = make(name, standard=False), random.Random(5)
    process = machine.process("notepad.exe")
    machine.inject(process)
    kernel, size = kernel_of(machine), types_of(machine).size("_ETHREAD")
    targets = [*addresses(process), planted(machine)[0].va]
    threads = Threads(kernel)
    for _ in range(600):
        at = dice.choice(targets[:2]) + 4 * dice.randrange(size // 4 - 1)
        old = read(machine, at, 8)
        junk = [dice.randbytes(8), dice.choice(targets).to_bytes(8, "little"), bytes(8), b"\xdd" * 8]
        write(machine, at, dice.choice(junk))
        with suppress(GuestError):
            assert len(threads.walk(process.va).threads) <= 3
        write(machine, at, old)
    assert [thread.va for thread in threads.walk(process.va).threads] == addresses(process)
    assert peek(machine, process.va, "_EPROCESS.UniqueProcessId") == process.pid
    machine.close()
