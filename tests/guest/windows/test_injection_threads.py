"""Threads that began in foreign code, run in it, or will: their beginnings, frames, stacks and APCs."""

import struct
from itertools import pairwise

import pytest

from tests.guest.windows.foreign import PLAIN, kinds, look, only
from tests.guest.windows.machines import poke, types_of, write
from tests.worlds.windows.paging import PAGE

USER_APC = 1


@pytest.fixture
def machine(bare):
    return bare


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
