"""Processes that are not on the list, and what tells of them."""

import pytest

from appliance.errors import OutOfTime
from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.processes import Processes
from appliance.model import Flag
from tests.guest.windows.machines import kernel_of, links, peek, poke, write
from tests.guest.windows.memories import CountingMemory


def test_a_hidden_process_is_no_listed_one_and_yet_a_process(machine):
    hidden = machine.process("hidden.exe", pid=600, hidden=True)
    processes = Processes(kernel_of(machine))
    listing = processes.walk()
    assert hidden.pid not in {raw.pid for raw in listing.processes}
    raw = processes.find(hidden.va)
    assert raw is not None and not processes.is_listed(raw)
    assert processes.describe(raw, hidden=True).flags == (Flag.HIDDEN_PROCESS,)
    assert processes.describe(raw).flags == ()


def test_one_that_was_taken_off_the_list_and_still_points_into_it_is_not_listed(machine):
    made = [machine.process(f"p{number}.exe") for number in range(3)]
    processes = Processes(kernel_of(machine))
    poke(machine, made[0].va, "_EPROCESS.ActiveProcessLinks.Flink", made[2].va + links(machine))
    poke(machine, made[2].va, "_EPROCESS.ActiveProcessLinks.Blink", made[0].va + links(machine))
    assert not processes.is_listed(processes.find(made[1].va))
    assert processes.is_listed(processes.find(made[0].va)) and processes.is_listed(processes.find(made[2].va))


def test_where_the_list_is_broken_only_one_that_its_neighbours_do_not_know_is_not_listed(machine):
    made = [machine.process(f"p{number}.exe") for number in range(5)]
    for broken in (made[0], made[4]):  # from either end the walk stops here
        poke(machine, broken.va, "_EPROCESS.ActiveProcessLinks.Flink", 0x0BAD)
        poke(machine, broken.va, "_EPROCESS.ActiveProcessLinks.Blink", 0x0BAD)
    processes = Processes(kernel_of(machine))
    assert processes.is_listed(processes.find(made[2].va))
    poke(machine, made[1].va, "_EPROCESS.ActiveProcessLinks.Flink", made[3].va + links(machine))
    assert not processes.is_listed(processes.find(made[2].va))


def test_one_that_took_the_place_of_a_listed_one_is_not_listed(server):
    made = server.process("notepad.exe", session=1)
    processes = Processes(kernel_of(server))
    processes.walk()
    server.hide(made)
    poke(server, made.va, "_EPROCESS.CreateTime", peek(server, made.va, "_EPROCESS.CreateTime") + 10)
    assert not processes.is_listed(processes.read(made.va))


def test_what_the_id_table_knows_and_the_list_does_not_is_hidden_and_nothing_else_is(machine):
    hidden = machine.process("hidden.exe", pid=600, hidden=True)
    machine.process("gone.exe", pid=604, hidden=True, exited=True)
    kernel = kernel_of(machine)
    processes = Processes(kernel)
    sightings, gaps = OtherViews(kernel, processes).find_hidden(processes.walk())
    assert [(each.process.va, each.views) for each in sightings] == [(hidden.va, ("cid",))]
    assert gaps == []


def id_table(machine, pages):
    """Make the table of ids one of two levels."""
    top = machine.kernel.nonpaged.take(b"Obtb", 0x1000)
    write(machine, top, b"".join(page.to_bytes(8, "little") for page in pages).ljust(0x1000, b"\0"))
    poke(
        machine,
        peek(machine, machine.kernel.va("PspCidTable"), "_LIST_ENTRY.Flink"),
        "_HANDLE_TABLE.TableCode",
        top | 1,
    )


def test_a_table_of_ids_that_cannot_be_read_in_full_is_a_gap(server):
    hidden = server.process("hidden.exe", pid=600, hidden=True)
    kernel = kernel_of(server)
    processes = Processes(kernel)
    table = peek(server, server.kernel.va("PspCidTable"), "_LIST_ENTRY.Flink")
    code = peek(server, table, "_HANDLE_TABLE.TableCode")
    first = peek(server, code - 1, "_LIST_ENTRY.Flink") if code & 1 else code
    id_table(server, [first, 0xFFFF_9000_0000_0000])
    sightings, gaps = OtherViews(kernel, processes).find_hidden(processes.walk())
    assert [each.process.va for each in sightings] == [hidden.va]
    assert [gap.why for gap in gaps] == ["1 of 2 pages of the table cannot be read"]
    for code in (0, first | 3):
        poke(server, table, "_HANDLE_TABLE.TableCode", code)
        assert [gap.why for gap in OtherViews(kernel, processes).find_hidden(processes.walk())[1]] == [
            "the table of ids is none"
        ]


def test_a_table_of_very_many_false_ids_costs_no_memory_and_no_more_than_its_time(server):
    junk = server.kernel.nonpaged.take(b"Junk", 0x8_0000)
    pages = []
    for number in range(100):
        pages.append(server.kernel.nonpaged.take(b"Obtb", 0x1000))
        vas = [junk + 16 * (256 * number + index) for index in range(256)]
        packed = [((va & (1 << 48) - 1) >> 4 << 20 | 1).to_bytes(16, "little") for va in vas]
        write(server, pages[-1], b"".join(packed))
    id_table(server, pages)
    memory = CountingMemory(server.memory())
    kernel = kernel_of(server, memory)
    processes = Processes(kernel)
    listing = processes.walk()
    largest = []
    readv = memory.inner.readv
    memory.readv = lambda spans: largest.append(sum(size for _, size in spans)) or readv(spans)
    assert OtherViews(kernel, processes).find_hidden(listing) == ([], [])
    assert max(largest) < 1 << 20
    ticks = iter(range(1 << 20))
    with pytest.raises(OutOfTime), kernel.limit(50, lambda: next(ticks)):
        OtherViews(kernel, processes).find_hidden(listing)


def test_very_many_hidden_processes_are_told_up_to_a_number(server, monkeypatch):
    monkeypatch.setattr("appliance.guest.windows.cid.MAX_HIDDEN", 3)
    for _ in range(5):
        server.process("hidden.exe", hidden=True)
    kernel = kernel_of(server)
    processes = Processes(kernel)
    sightings, gaps = OtherViews(kernel, processes).find_hidden(processes.walk())
    assert (len(sightings), [gap.why for gap in gaps]) == (3, ["more than 3 are on no list"])


def test_an_entry_of_the_id_table_counts_only_for_the_process_that_has_this_id(machine):
    hidden = machine.process("hidden.exe", pid=600, hidden=True)
    poke(machine, hidden.va, "_EPROCESS.UniqueProcessId", 604)
    kernel = kernel_of(machine)
    processes = Processes(kernel)
    assert OtherViews(kernel, processes).find_hidden(processes.walk())[0] == []


def test_a_process_hidden_with_care_is_still_in_its_session(server):
    hidden = server.process("hidden.exe", session=1, hidden=True)
    kernel = kernel_of(server)
    processes = Processes(kernel)
    entries, found = server.kernel.va("PspCidTable"), OtherViews(kernel, processes)
    assert found.find_hidden(processes.walk())[0][0].views == ("cid", "session")
    server.kernel.set(server.kernel.u64(entries), "_HANDLE_TABLE.TableCode", 0)
    sightings, _ = found.find_hidden(processes.walk())
    assert [(each.process.va, each.views) for each in sightings] == [(hidden.va, ("session",))]


def test_a_process_that_started_after_the_walk_is_listed_and_not_called_hidden(machine):
    kernel = kernel_of(machine)
    processes = Processes(kernel)
    listing = processes.walk()
    late = machine.process("late.exe", pid=600)
    assert OtherViews(kernel, processes).find_hidden(listing)[0] == []
    assert processes.is_listed(processes.find(late.va))
