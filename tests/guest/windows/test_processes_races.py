"""Processes that start and end while they are looked at."""

import threading

from appliance.guest.windows.processes import Processes
from appliance.model import Missing
from tests.guest.windows.machines import ALICE, began_ns, kernel_of, peek, planted, read, types_of, write
from tests.guest.windows.memories import CountingMemory
from tests.worlds.windows import Machine


def test_a_guest_that_starts_and_ends_processes_meanwhile_never_loses_the_others_nor_lends_a_wrong_name():
    with Machine("20348", ram=256 << 20) as server:
        kernel = kernel_of(server)
        processes = Processes(kernel)
        stable = {each.va: (each.pid, each.name) for each in planted(server)}
        names: dict[tuple[int, int], str] = {}
        over = threading.Event()

        def churn():
            living = []
            for number in range(90):
                made = server.process(f"churn-{number}.exe", session=1)
                names[made.pid, began_ns(made)] = made.name
                living.append(made)
                if len(living) > 4:
                    server.delete(living.pop(0))
            over.set()

        thread = threading.Thread(target=churn)
        thread.start()
        looks = 0
        while not over.is_set():
            kernel.forget()
            listing = processes.walk()
            found = processes.describe_all(listing.processes)
            looks += 1
            seen = {process.task_va: (process.pid, process.name) for process in found}
            assert stable.items() <= seen.items()
            for process in found:
                if process.task_va not in stable and process.name:
                    assert names.get((process.key.pid, process.key.started_ns), process.name) == process.name
        thread.join()
        assert looks > 3
        listing = processes.walk()
        assert {raw.va for raw in listing.processes} == {each.va for each in planted(server) if not each.exited_ns}
        assert not listing.gaps


def test_a_process_that_ended_while_it_was_looked_at_lends_nobody_its_memory(server):
    made = server.process("notepad.exe", session=1)
    processes = Processes(kernel_of(server))
    raw = processes.read(made.va)
    server.exit(made)
    found = processes.describe(raw)
    assert (found.command, found.path) == (
        Missing.UNREADABLE,
        "\\Device\\HarddiskVolume3\\Windows\\System32\\notepad.exe",
    )


def test_what_is_read_while_a_process_makes_way_for_another_is_not_told_of_either(server):
    made = server.process("notepad.exe", sid=ALICE, session=1)
    other = server.process("calc.exe", sid="S-1-5-18")
    raw = Processes(kernel_of(server)).read(made.va)
    length = types_of(server).size("_EPROCESS")
    before, after = read(server, made.va, length), read(server, other.va, length)
    audit, token = (
        (peek(server, made.va, f"_EPROCESS.{name}"), peek(server, other.va, f"_EPROCESS.{name}"))
        for name in ("SeAuditProcessCreationInfo.ImageFileName", "Token")
    )
    places = [(audit, 0x10), ((token[0] & ~15, token[1] & ~15), types_of(server).size("_TOKEN"))]
    olds = [(one, read(server, one, size), read(server, two, size)) for (one, two), size in places]

    class Reused(CountingMemory):
        def readv(self, spans):
            found = super().readv(spans)
            if self.reads == self.step:
                write(server, made.va, after)
                for va, _, new in olds:
                    write(server, va, new)
            return found

        def read(self, gpa, size):
            return self.readv([(gpa, size)])[0]

    def describe(step):
        memory = Reused(server.memory())
        memory.step = step
        found = Processes(kernel_of(server, memory)).describe(raw)
        write(server, made.va, before)
        for va, old, _ in olds:
            write(server, va, old)
        return found, memory.reads

    whole, reads = describe(-1)
    assert (whole.name, whole.sid, whole.path) == ("notepad.exe", ALICE, "C:\\Windows\\System32\\notepad.exe")
    for step in range(1, reads):
        found, _ = describe(step)
        assert found.name == "notepad.exe" and found.sid in (ALICE, None)
        assert found.path is Missing.UNREADABLE or "notepad.exe" in found.path
