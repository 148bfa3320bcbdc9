"""The list of processes, what each one is called, and what is not on the list."""

import random
import threading
from contextlib import suppress

import pytest

from appliance.errors import GuestError, OutOfTime
from appliance.guest.windows import portrait
from appliance.guest.windows.cid import OtherViews
from appliance.guest.windows.processes import TRIES, Processes
from appliance.model import Flag, Missing
from tests.guest.windows.machines import (
    ALL,
    SOME,
    began_ns,
    kernel_of,
    make,
    peek,
    planted,
    poke,
    read,
    types_of,
    user,
    write,
)
from tests.worlds.windows import Machine
from tests.worlds.windows.xp import XpMachine

ALICE = "S-1-5-21-1-2-3-1001"


@pytest.fixture(params=SOME)
def machine(request):
    made = make(request.param, standard=False)
    yield made
    made.close()


@pytest.fixture
def server():
    with Machine("20348") as made:
        yield made


@pytest.fixture
def xp():
    made = XpMachine("xp-sp3")
    yield made
    made.close()


class CountingMemory:
    """Counts the reads of a memory."""

    def __init__(self, inner):
        self.inner, self.reads = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read(self, gpa, size):
        self.reads += 1
        return self.inner.read(gpa, size)

    def readv(self, spans):
        self.reads += 1
        return self.inner.readv(spans)


def links(machine):
    return types_of(machine).offset("_EPROCESS.ActiveProcessLinks")


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


def test_names_are_whole_though_the_kernel_keeps_fourteen_characters(machine):
    made = machine.process("a-very-long-name-indeed.exe")
    processes = Processes(kernel_of(machine))
    raw = next(raw for raw in processes.walk().processes if raw.pid == made.pid)
    assert (raw.name[:14], processes.describe(raw).name) == ("a-very-long-na", "a-very-long-name-indeed.exe")


def test_names_in_any_script_are_whole_though_the_kernel_keeps_half_of_each_character(machine):
    made = machine.process("портал-служба.exe")
    short = bytes(ord(each) & 0xFF for each in made.name)[:14]
    where = types_of(machine).offset("_EPROCESS.ImageFileName")
    write(machine, made.va + where, short + b"\0")
    processes = Processes(kernel_of(machine))
    assert processes.describe(processes.read(made.va)).name == "портал-служба.exe"
    write(machine, made.va + where, b"x" + short[1:])
    processes.forget()
    assert processes.describe(processes.read(made.va)).name != "портал-служба.exe"


def test_a_name_that_the_short_one_contradicts_is_not_believed(xp):
    made = xp.process("honest.exe")
    poke(xp, made.va, "_EPROCESS.ImageFileName", int.from_bytes(b"other.exe", "little"))
    processes = Processes(kernel_of(xp))
    assert processes.describe(processes.read(made.va)).name == "other.exe"


def test_paths_have_drive_letters_and_the_kernels_word_counts_where_the_process_lies(xp):
    processes = Processes(kernel_of(xp))
    liar = xp.process("liar.exe", path="C:\\Temp\\liar.exe")
    text = "C:\\WINDOWS\\x.exe".encode("utf-16-le")
    parameters = peek_user(xp, liar, "_PEB.ProcessParameters")
    where = parameters + xp.types.offset("_RTL_USER_PROCESS_PARAMETERS.ImagePathName")
    buffer = int.from_bytes(liar.space.read(where + 4, 4), "little")
    liar.space.write(buffer, text)
    described = {process.pid: process for process in processes.describe_all(processes.walk().processes)}
    assert described[liar.pid].path == "C:\\Temp\\liar.exe"
    assert described[xp.svchost.pid].path == "C:\\WINDOWS\\system32\\svchost.exe"


def peek_user(machine, process, path):
    peb = peek(machine, process.va, "_EPROCESS.Peb")
    field = machine.types.field(path)
    return int.from_bytes(process.space.read(peb + field.offset, field.size), "little")


def test_a_process_cannot_rename_the_drive_that_earlier_ones_name(xp):
    liar = xp.process("liar.exe", path="C:\\WINDOWS\\system32\\liar.exe")
    parameters = peek_user(xp, liar, "_PEB.ProcessParameters")
    where = parameters + xp.types.offset("_RTL_USER_PROCESS_PARAMETERS.ImagePathName")
    buffer = int.from_bytes(liar.space.read(where + 4, 4), "little")
    liar.space.write(buffer, "Z".encode("utf-16-le"))
    processes = Processes(kernel_of(xp))
    assert (
        processes.describe(processes.read(liar.va)).path == "Z:\\WINDOWS\\system32\\liar.exe"
    )  # it is all we know yet
    processes.forget()
    paths = {process.path for process in processes.describe_all(processes.walk().processes)}
    assert "C:\\WINDOWS\\system32\\liar.exe" in paths and not any(str(path).startswith("Z") for path in paths)


def test_system_has_no_path_and_no_command_line(machine):
    processes = Processes(kernel_of(machine))
    system = processes.describe(processes.walk().processes[0])
    assert (system.name, system.pid) == ("System", 4)
    assert (system.path, system.command) == (Missing.NOT_APPLICABLE, Missing.NOT_APPLICABLE)
    assert (system.sid, system.user, system.session) == ("S-1-5-18", "NT AUTHORITY\\SYSTEM", 0)


def test_commands_users_sessions_and_services_are_told(machine):
    host = machine.process(
        "svchost.exe", command="C:\\WINDOWS\\system32\\svchost.exe -k netsvcs -p -s Schedule", sid="S-1-5-19", session=0
    )
    bare = machine.process("svchost.exe", command="C:\\WINDOWS\\system32\\svchost.exe -k rpcss")
    person = machine.process("notepad.exe", sid=ALICE, session=2)
    processes = Processes(kernel_of(machine))
    found = {process.pid: process for process in processes.describe_all(processes.walk().processes)}
    assert (found[host.pid].services, found[host.pid].user) == (("Schedule",), "NT AUTHORITY\\LOCAL SERVICE")
    assert found[host.pid].command.endswith("-s Schedule")
    assert (found[person.pid].sid, found[person.pid].session) == (ALICE, 2)
    assert found[person.pid].user in ("LAB\\alice", "DESKTOP-7\\alice")  # as its environment says
    assert found[bare.pid].services == ()


def test_another_process_called_svchost_like_does_not_host_services(machine):
    fake = machine.process("svch0st.exe", command="svch0st.exe -k netsvcs -s Schedule")
    processes = Processes(kernel_of(machine))
    assert processes.describe(processes.read(fake.va)).services == ()


def test_the_signer_is_told_where_the_kernel_noted_one(server):
    server.process("plain.exe", session=1)
    processes = Processes(kernel_of(server))
    found = {process.name: process.signer for process in processes.describe_all(processes.walk().processes)}
    assert found["csrss.exe"] == "WinTcb"  # protected by it
    assert found["dwm.exe"] == "Windows"  # its image reached that level
    assert found["plain.exe"] is None


def test_minimal_processes_have_neither_path_nor_command(server):
    processes = Processes(kernel_of(server))
    registry = processes.describe(processes.read(server["Registry"].va))
    assert (registry.path, registry.command) == (Missing.NOT_APPLICABLE, Missing.NOT_APPLICABLE)


def test_an_unreadable_command_line_is_said_to_be_and_is_read_once_it_can_be(xp):
    made = xp.process("paged.exe")
    processes = Processes(kernel_of(xp))
    peb = peek(xp, made.va, "_EPROCESS.Peb")
    where = peb + xp.types.offset("_PEB.ProcessParameters")
    good = made.space.read(where, 4)
    made.space.write(where, (0x6660000).to_bytes(4, "little"))
    first = processes.describe(processes.read(made.va))
    assert (first.command, first.path) == (
        Missing.UNREADABLE,
        "\\Device\\HarddiskVolume1\\WINDOWS\\system32\\paged.exe",
    )
    made.space.write(where, good)
    assert processes.describe(processes.read(made.va)).command == "C:\\WINDOWS\\system32\\paged.exe"


def test_what_was_unreadable_is_tried_again_less_and_less_often(server):
    made = server.process("paged.exe", session=1)
    processes = Processes(kernel_of(server))
    peb = made.peb
    server.kernel.set(made.va, "_EPROCESS.Peb", 0x5_0000)
    for _ in range(5):
        assert processes.describe(processes.read(made.va)).command is Missing.UNREADABLE
    server.kernel.set(made.va, "_EPROCESS.Peb", peb)  # another pointer: it is described afresh at once
    assert processes.describe(processes.read(made.va)).command == made.path
    server.kernel.set(made.va, "_EPROCESS.Peb", 0x5_0000)
    counted = CountingMemory(server.memory())
    processes = Processes(kernel_of(server, counted))
    reads = []
    for _ in range(20):
        before = counted.reads
        processes.describe(processes.read(made.va))
        reads.append(counted.reads - before)
    assert sum(each > min(reads) for each in reads) == 5  # looks 1, 2, 4, 8 and 16


def test_the_kernels_other_notes_tell_the_path_where_the_first_is_lacking(server):
    made = server.process("notepad.exe", session=1)
    server.masquerade(made, "C:\\Windows\\System32\\lsass.exe")
    processes, kernel = Processes(kernel_of(server)), server.kernel
    processes.describe_all(processes.walk().processes)
    audit = kernel.get(made.va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName")
    kernel.set(made.va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName", 0)
    assert processes.describe(processes.read(made.va)).path == "C:\\Windows\\System32\\notepad.exe"  # ImageFilePointer
    kernel.set(made.va, "_EPROCESS.ImageFilePointer", 0)
    assert processes.describe(processes.read(made.va)).path == "C:\\Windows\\System32\\notepad.exe"  # its image's VAD
    kernel.set(made.va, "_EPROCESS.SectionBaseAddress", 0x7FFF_0000_0000)
    processes.forget()
    assert processes.describe(processes.read(made.va)).path is Missing.UNREADABLE  # and not what it says of itself
    kernel.set(made.va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName", audit)
    assert processes.describe(processes.read(made.va)).path == "C:\\Windows\\System32\\notepad.exe"


def test_a_file_whose_type_was_overwritten_still_names_the_program_and_what_has_no_path_for_a_name_does_not(server):
    named, nameless = server.process("notepad.exe"), server.process("other.exe")
    for made in (named, nameless):
        server.kernel.set(made.va, "_EPROCESS.SeAuditProcessCreationInfo.ImageFileName", 0)
        server.kernel.set(made.modules[0].file.va, "_FILE_OBJECT.Type", 0)
    name = nameless.modules[0].file.va + types_of(server).offset("_FILE_OBJECT.FileName.Buffer")
    server.kernel.space.write(int.from_bytes(server.kernel.space.read(name, 8), "little"), b"x\0")
    processes = Processes(kernel_of(server))
    told = {one.pid: one for one in processes.describe_all(processes.walk().processes)}
    assert told[named.pid].path.endswith("notepad.exe")
    assert not isinstance(told[nameless.pid].path, str)


def test_more_processes_than_are_remembered_are_all_described(server, monkeypatch):
    monkeypatch.setattr(portrait, "MAX_CACHE", 4)
    processes = Processes(kernel_of(server))
    listing = processes.walk().processes
    for some in (listing[:3], listing[:6], listing, listing[::-1]):
        assert [process.pid for process in processes.describe_all(some)] == [raw.pid for raw in some]


def test_a_file_that_is_being_deleted_while_it_runs_is_said_to_be(server):
    ghost = server.process("ghost.exe", session=1, path="C:\\Temp\\ghost.exe")
    server.kernel.set(ghost.modules[0].file.va, "_FILE_OBJECT.DeletePending", 1)
    processes = Processes(kernel_of(server))
    found = {each.name: each.deleted for each in processes.describe_all(processes.walk().processes)}
    assert found.pop("ghost.exe") and not any(found.values())


def test_the_name_of_an_account_is_told_for_processes_that_were_seen_before_it_was_known(server):
    silent, talker = server.process("a.exe", session=1, sid=ALICE), server.process("b.exe", session=1, sid=ALICE)
    processes = Processes(kernel_of(server))
    parameters = server.kernel.types.offset("_RTL_USER_PROCESS_PARAMETERS.Environment")
    user(silent).write(silent.params + parameters, bytes(8))
    assert processes.describe(processes.read(silent.va)).user is None
    assert processes.describe(processes.read(talker.va)).user == "DESKTOP-7\\alice"
    assert processes.describe(processes.read(silent.va)).user == "DESKTOP-7\\alice"


def test_the_earliest_process_of_an_account_names_it_and_no_process_names_a_service(server):
    honest, liar = (server.process(name, session=1, sid=ALICE) for name in ("honest.exe", "liar.exe"))
    service = server.process("service.exe", session=0, sid="S-1-5-80-1-2-3-4-5")
    environment = server.kernel.types.offset("_RTL_USER_PROCESS_PARAMETERS.Environment")
    block = server.region(liar, 0x1000, "RW", "USERNAME=root\0\0".encode("utf-16-le"))
    user(liar).write(liar.params + environment, block.start.to_bytes(8, "little"))
    processes = Processes(kernel_of(server))
    found = processes.describe_all([processes.read(each.va) for each in (liar, service, honest)])
    assert [process.user for process in found] == ["DESKTOP-7\\alice", None, "DESKTOP-7\\alice"]


def test_what_the_guest_calls_itself_is_bounded(server):
    made = server.process("long.exe", session=1, sid=ALICE)
    types, space = server.kernel.types, user(made)
    region = server.region(made, 0x20000, "RW", ("USERNAME=" + "x" * 30000 + "\0\0").encode("utf-16-le"))
    space.write(
        made.params + types.offset("_RTL_USER_PROCESS_PARAMETERS.Environment"), region.start.to_bytes(8, "little")
    )
    where = made.params + types.offset("_RTL_USER_PROCESS_PARAMETERS.CommandLine")
    space.write(where, (0xFFFE).to_bytes(2, "little") * 2)
    space.write(where + 8, region.start.to_bytes(8, "little"))
    processes = Processes(kernel_of(server))
    found = processes.describe(processes.read(made.va))
    assert len(found.user) <= 256 and len(found.command) <= 4096


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


def test_drive_letters_are_read_from_the_object_manager_where_its_types_are_known():
    with make("20348 with its own symbols") as server:
        kernel, types = server.kernel, server.kernel.types
        target = kernel.text("\\Device\\HarddiskVolume3")
        link = kernel.object("SymbolicLink", b"Symb", bytes(types.size("_OBJECT_SYMBOLIC_LINK")), name="Q:")
        kernel.set(link, "_OBJECT_SYMBOLIC_LINK.LinkTarget", target)
        entry = kernel.paged.take(b"ObDi", types.size("_OBJECT_DIRECTORY_ENTRY"))
        kernel.set(entry, "_OBJECT_DIRECTORY_ENTRY.Object", link)
        directory = kernel.object("Directory", b"Dire", bytes(types.size("_OBJECT_DIRECTORY")), name="GLOBAL??")
        kernel.set_u64(directory + types.offset("_OBJECT_DIRECTORY.HashBuckets") + 8 * 7, entry)
        device_map = kernel.paged.take(b"ObDm", types.size("_DEVICE_MAP"))
        kernel.set(device_map, "_DEVICE_MAP.GlobalDosDevicesDirectory", directory)
        kernel.set(server.system.va, "_EPROCESS.DeviceMap", device_map | 9)
        processes = Processes(kernel_of(server))
        paths = [process.path for process in processes.describe_all(processes.walk().processes)]
        assert "Q:\\Windows\\System32\\svchost.exe" in paths


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


def test_a_description_is_made_once_and_again_when_the_token_changed(machine):
    made = machine.process("notepad.exe", sid=ALICE)
    processes = Processes(kernel_of(machine))
    raw = processes.read(made.va)
    first = processes.describe(raw)
    assert processes.describe(processes.read(made.va)) is first
    poke(machine, made.va, "_EPROCESS.Token", peek(machine, planted(machine)[0].va, "_EPROCESS.Token"))
    assert processes.describe(processes.read(made.va)).sid == "S-1-5-18"


def test_one_that_has_exited_is_stale_and_nothing_is_read_through_its_page_tables(machine):
    gone = machine.process("gone.exe", exited=True)
    processes = Processes(kernel_of(machine))
    found = processes.describe(processes.read(gone.va))
    assert (found.flags, found.command) == ((Flag.STALE,), Missing.UNREADABLE)


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
