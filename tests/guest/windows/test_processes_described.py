"""What each process is called: its name, path, command line, account, services and signer."""

from appliance.guest.windows import portrait
from appliance.guest.windows.processes import Processes
from appliance.model import Flag, Missing
from tests.guest.windows.machines import ALICE, kernel_of, make, peek, planted, poke, types_of, user, write
from tests.guest.windows.memories import CountingMemory


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
    minimal = processes.describe(processes.read(server["Registry"].va))
    assert (minimal.path, minimal.command) == (Missing.NOT_APPLICABLE, Missing.NOT_APPLICABLE)


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
