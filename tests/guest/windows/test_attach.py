"""Attaching to Windows machines made of bytes: by registers, by the low stub, by page tables; and what refuses it."""

import lzma
import random
import struct
from dataclasses import replace

import pytest

from appliance.errors import GuestError, Implausible, OutOfTime, UnsupportedGuest
from appliance.guest.windows.attach import attach, looks_like_windows
from appliance.guest.windows.roots import CHUNK, find_by_tables
from appliance.guest.windows.space import Mode
from appliance.guest.windows.symbols import SymbolStore
from appliance.memory.file import open_file
from appliance.model import VcpuState
from tests.worlds import tiny
from tests.worlds.overlay import Overlay
from tests.worlds.tiny import ByteMemory, Tiny
from tests.worlds.windows import FAMILIES, Machine, crash
from tests.worlds.windows.boot import CPU_VA, KUSER_VA, ROOT_GPA
from tests.worlds.windows.real import REAL, needs_real
from tests.worlds.windows.xp import XpMachine

PAGE, MB = 4096, 1 << 20
OLD = [("xp-sp3", True), ("xp-sp2", False), ("2003-sp0", True), ("2003-sp2", False), ("2003-sp2-x64", True)]


class With:
    """A memory whose virtual CPUs are others."""

    name, live = "with other registers", False

    def __init__(self, memory, *vcpus):
        self.memory, self.cpus = memory, vcpus

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def vcpus(self):
        return self.cpus


class Ticking(With):
    """A machine whose clock goes on while it is read."""

    live = True

    def __init__(self, machine):
        super().__init__(machine.memory())
        self.machine = machine

    def readv(self, spans):
        self.machine.tick(0.001)
        return self.memory.readv(spans)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Symbols of every family, and the store that has them."""
    folder = tmp_path_factory.mktemp("symbols")
    for family in FAMILIES:
        with Machine(family, standard=False) as machine:
            machine.write_symbols(folder)
    return SymbolStore([folder], tmp_path_factory.mktemp("cache"))


@pytest.fixture
def machine():
    with Machine("20348", standard=False) as made:
        yield made


def is_attached(kernel, machine):
    """Whether this is the machine's kernel, and reads what is in it."""
    made = machine.kernel
    assert (kernel.base, kernel.size, kernel.build, kernel.revision) == (
        made.base,
        made.size,
        made.build,
        made.revision,
    )
    assert kernel.space.root == ROOT_GPA
    assert [(module.name, module.base) for module in kernel.modules()] == [
        (each.name, each.base) for each in made.drivers
    ]
    assert kernel.modules().gaps == []
    assert kernel.read_shared().epoch_ns == made.now_ns // 100 * 100
    assert kernel.symbol("PsInitialSystemProcess") == made.va("PsInitialSystemProcess")
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["registers", "low stub", "page tables"])
def test_every_family_is_attached_to_in_every_way(family, way, tables):
    with Machine(family) as machine:
        if way == "page tables":
            machine.kernel.ram.write(0x1000, bytes(PAGE))
        memory = machine.memory() if way == "registers" else With(machine.memory())
        kernel = attach(memory, symbols=tables)
        assert is_attached(kernel, machine)
        ways = {"registers": "registers", "low stub": "starts processors", "page tables": "name themselves"}
        assert ways[way] in kernel.describe
        assert kernel.release == f"10.0.{machine.kernel.build}"
        symbols = kernel.module_symbols("tcpip.sys")
        assert symbols is not None
        assert symbols.pdb.name == "tcpip.pdb"
        assert kernel.module_symbols("absent.sys") is None


@pytest.mark.parametrize(("options", "mode"), [({"la57": True}, Mode.LONG5), ({"large_pages": True}, Mode.LONG4)])
@pytest.mark.parametrize("way", ["registers", "low stub", "page tables"])
def test_five_levels_and_large_pages_are_attached_to_too(options, mode, way, tables):
    with Machine("20348", standard=False, **options) as machine:
        if way == "page tables":
            machine.kernel.ram.write(0x1000, bytes(PAGE))
        kernel = attach(machine.memory() if way == "registers" else With(machine.memory()), symbols=tables)
        assert is_attached(kernel, machine)
        assert kernel.space.mode is mode


def test_an_elf_core_by_qemu_is_attached_to_by_its_registers(tmp_path, machine, tables):
    machine.kernel.ram.write(0x1000, bytes(PAGE))
    memory = open_file(machine.write_elf(tmp_path / "core"))
    kernel = attach(memory, symbols=tables)
    assert is_attached(kernel, machine)
    assert "registers" in kernel.describe
    memory.close()


@pytest.mark.parametrize("form", ["runs", "bitmap"])
def test_a_crash_dump_is_attached_to_by_what_its_header_tells(form, tmp_path, machine, tables):
    made = machine.kernel
    made.ram.write(0x1000, bytes(PAGE))
    ram, runs = made.ram.data[:], [(1, 0x9F), (0x100, made.ram.size // PAGE - 0x100)]
    head = crash.header64(
        ROOT_GPA, made.va("KdDebuggerDataBlock"), crash.FULL if form == "runs" else crash.BITMAP, runs
    )
    path = tmp_path / "MEMORY.DMP"
    path.write_bytes(crash.by_runs(ram, head, runs) if form == "runs" else crash.by_bitmap(ram, head))
    memory = open_file(path)
    kernel = attach(memory, symbols=tables)
    assert is_attached(kernel, machine)
    assert "registers" in kernel.describe
    memory.close()


def test_a_crash_dump_of_xp_is_attached_to(tmp_path):
    machine = XpMachine("xp-sp3", pae=False)
    runs = [(0, machine.ram.size // PAGE)]
    head = crash.header32(machine.root, machine.base + 0x82100, crash.FULL, runs, pae=False)
    path = tmp_path / "MEMORY.DMP"
    path.write_bytes(crash.by_runs(machine.ram.data[:], head, runs))
    memory = open_file(path)
    assert attach(memory).base == machine.base
    memory.close()
    machine.close()


def attach_remembering(machine, folder, cache):
    """Attach with the tables of a folder, then without it; for how long that takes see ``./run bench windows``."""
    attach(machine.memory(), symbols=SymbolStore([folder], cache)).module_symbols("tcpip.sys")
    return attach(machine.memory(), symbols=SymbolStore([], cache))


def test_the_second_attach_needs_no_symbol_file(tmp_path):
    with Machine("20348") as machine:
        machine.write_symbols(tmp_path / "isf")
        kernel = attach_remembering(machine, tmp_path / "isf", tmp_path / "cache")
        assert kernel.types.has("_EPROCESS.UniqueProcessId")
        assert kernel.module_symbols("tcpip.sys").get("PartitionTable")


@needs_real
def test_the_second_attach_to_a_real_build_needs_no_symbol_file(tmp_path):
    with Machine("20348", symbols=REAL) as machine:
        kernel = attach_remembering(machine, REAL, tmp_path)
        assert kernel.types.has("_EPROCESS.UniqueProcessId")
        assert kernel.module_symbols("tcpip.sys").get("PartitionTable")


@pytest.mark.parametrize(("era", "pae"), OLD)
@pytest.mark.parametrize("vcpus", [True, False])
@pytest.mark.parametrize("with_symbols", [True, False])
def test_xp_and_2003_are_attached_to_with_and_without_symbols(era, pae, vcpus, with_symbols, tmp_path):
    machine = XpMachine(era, pae=pae)
    if with_symbols:
        machine.write_symbols(tmp_path)
    kernel = attach(machine.memory(vcpus=vcpus), symbols=SymbolStore([tmp_path]))
    assert (kernel.base, kernel.build) == (machine.base, 2600 if era.startswith("xp") else 3790)
    assert [module.name for module in kernel.modules()][:1] == ["ntoskrnl.exe"]
    assert kernel.space.mode is (Mode.LONG4 if machine.wide else Mode.PAE if pae else Mode.LEGACY)
    assert looks_like_windows(machine.memory(vcpus=vcpus))
    machine.close()


def test_a_cpu_that_runs_on_a_users_tables_leads_to_the_kernels(machine, tables):
    """KVA shadow: a user's root maps the processor's own page and little more of the kernel."""
    made = machine.kernel
    made.space.map(CPU_VA + 0x9000, made.ram.page())
    made.space.write(CPU_VA + 0x9000, struct.pack("<Q", ROOT_GPA))
    made.ram.write(0x1000, bytes(PAGE))
    root = ROOT_GPA
    shadow = top = made.ram.page()
    for shift in (39, 30):
        at = 8 * (CPU_VA >> shift & 511)
        entry = int.from_bytes(made.ram.read(root + at, 8), "little")
        root, below = entry & 0xFFFFFFFFF000, made.ram.page()
        made.ram.write(shadow + at, struct.pack("<Q", below | entry & 0xFFF))
        shadow = below
    at = 8 * (CPU_VA >> 21 & 511)
    made.ram.write(shadow + at, made.ram.read(root + at, 8))
    cpu = replace(machine.memory().vcpus()[0], cr3=top, rip=0x7FF612345678, lstar=0)
    for gs in ({"gs_base": CPU_VA}, {"gs_base": 0x1234000, "kernel_gs_base": CPU_VA}):
        kernel = attach(With(machine.memory(), replace(cpu, **gs)), symbols=tables)
        assert is_attached(kernel, machine)
        assert "registers" in kernel.describe


def relocated(machine, by):
    """The machine's RAM as if it began elsewhere: every entry of its page tables moved."""
    ram = bytearray(machine.kernel.ram.data[:])
    seen = set()

    def move(table, depth):
        if table in seen:
            return
        seen.add(table)
        for at in range(table, table + PAGE, 8):
            entry = int.from_bytes(ram[at : at + 8], "little")
            if entry & 1:
                if depth < 3 and not entry & 0x80:
                    move(entry & 0xFFFFFFFFF000, depth + 1)
                ram[at : at + 8] = struct.pack("<Q", entry + by)

    move(ROOT_GPA, 0)
    process = machine.system.va + machine.kernel.types.offset("_EPROCESS.Pcb.DirectoryTableBase")
    at = machine.kernel.space.gpa(process)
    ram[at : at + 8] = struct.pack("<Q", ROOT_GPA + by)
    return bytes(ram)


@pytest.mark.parametrize("running", [0, 1])
def test_of_several_kernels_in_one_ram_the_one_with_the_latest_clock_runs(running, tables):
    with Machine("20348", standard=False) as first, Machine("19041", standard=False) as second:
        (first, second)[running].tick(3600)
        for each in (first, second):
            each.kernel.ram.write(0x1000, bytes(PAGE))
        memory = ByteMemory(first.kernel.ram.data[:] + relocated(second, 64 * MB))
        kernel = attach(memory, symbols=tables)
        assert kernel.build == (20348, 19041)[running]
        assert kernel.space.root == running * 64 * MB + ROOT_GPA


def test_an_older_kernel_is_not_attached_to_where_the_running_ones_symbols_lack(tmp_path):
    with Machine("20348", standard=False) as first, Machine("19041", standard=False) as second:
        first.write_symbols(tmp_path)
        second.tick(3600)
        for each in (first, second):
            each.kernel.ram.write(0x1000, bytes(PAGE))
        memory = ByteMemory(first.kernel.ram.data[:] + relocated(second, 64 * MB))
        with pytest.raises(UnsupportedGuest, match=second.kernel.types.guid):
            attach(memory, symbols=SymbolStore([tmp_path]))


def test_a_kernel_whose_clock_goes_on_need_not_be_compared_with_others(machine, tables):
    """Only the usual places are searched: the RAM behind them is never read."""
    machine.kernel.ram.write(0x1000, bytes(PAGE))

    class Watched(Ticking):
        last = 0

        def readv(self, spans):
            self.last = max([self.last, *(gpa + size for gpa, size in spans if size > MB)])
            return super().readv(spans)

    memory = Watched(machine)
    assert attach(memory, symbols=tables).build == 20348
    assert memory.last <= 32 * MB


def test_without_symbols_the_error_is_the_command_that_gets_them(machine):
    with pytest.raises(UnsupportedGuest, match=r"pdbconv -p ntkrnlmp\.pdb -g [0-9A-F]{32}1 -o ") as raised:
        attach(machine.memory(), symbols=SymbolStore())
    assert "windows/ntkrnlmp.pdb/" in str(raised.value)
    with pytest.raises(UnsupportedGuest, match=r"no symbols for ntkrnlmp\.pdb"):
        attach(machine.memory())


def test_symbols_of_another_build_are_not_believed(machine, tables, tmp_path):
    """The System process is not where such symbols say."""
    with Machine("19041", standard=False) as other:
        other.write_symbols(tmp_path)
    wrong = next((tmp_path / "windows/ntkrnlmp.pdb").iterdir())
    text, guid = lzma.decompress(wrong.read_bytes()).decode(), machine.kernel.types.guid
    wrong.with_name(f"{guid}-1.json").write_text(text.replace(wrong.name.split("-")[0], guid))
    with pytest.raises(GuestError):
        attach(machine.memory(), symbols=SymbolStore([tmp_path]))


def test_linux_and_nothing_are_refused_at_once(tables):
    linux = Tiny()
    cpu = VcpuState(0x80050033, linux.cr3, 0x6F0, rip=tiny.TEXT_VA)
    for memory in (linux.memory(), With(linux.memory(), cpu), ByteMemory(bytes(4 * MB)), ByteMemory(b"")):
        assert not looks_like_windows(memory)
        with pytest.raises(UnsupportedGuest, match="no running Windows"):
            attach(memory, symbols=tables)


def test_what_is_left_of_a_windows_that_ran_before_is_told_from_one_that_runs(machine):
    seconds = iter(range(10**6))
    still = With(machine.memory())
    still.live = True
    assert not looks_like_windows(still, lambda: next(seconds) / 1000)
    assert looks_like_windows(Ticking(machine), lambda: next(seconds) / 1000)
    still.live = False
    assert looks_like_windows(still)


def test_a_module_whose_headers_were_wiped_is_given_its_symbols(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    tcpip = next(module for module in kernel.modules() if module.name == "tcpip.sys")
    machine.kernel.space.write(tcpip.base, bytes(0x400))
    assert attach(machine.memory(), symbols=tables).image_symbols(tcpip).pdb.name == "tcpip.pdb"


def test_a_kernel_whose_debug_directory_was_wiped_is_found_by_its_exported_name_and_its_record(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    head = kernel.space.read(kernel.base, 0x1000)
    directory = int.from_bytes(head[0x3C:0x40], "little") + 24 + 112 + 8 * 6  # IMAGE_DIRECTORY_ENTRY_DEBUG
    machine.kernel.space.write(kernel.base + directory, bytes(8))
    assert attach(machine.memory(), symbols=tables).pdb == kernel.pdb


def test_a_module_is_not_given_the_symbols_of_another(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    tcpip = next(module for module in kernel.modules() if module.name == "tcpip.sys")
    assert kernel.image_symbols(tcpip).pdb.name == "tcpip.pdb"
    with pytest.raises(UnsupportedGuest, match="names the symbols of another"):
        kernel.image_symbols(tcpip._replace(name="afd.sys"))
    with pytest.raises(UnsupportedGuest, match="names the symbols of another"):
        kernel.image_symbols(tcpip._replace(base=kernel.base))


def test_a_search_ends_when_its_time_is_up(tables):
    ticks = iter(range(1000))
    with pytest.raises(OutOfTime):
        attach(ByteMemory(bytes(64 * MB)), symbols=tables, seconds=5, clock=lambda: next(ticks))


def test_holes_of_the_ram_are_not_searched(machine, tables):
    """Such a memory tells its data only; there is nothing else to search."""

    class Sparse(With):
        regions = ()

        def data_regions(self):
            return self.memory.data_regions()

    machine.kernel.ram.write(0x1000, bytes(PAGE))
    assert attach(Sparse(machine.memory()), symbols=tables).build == 20348


def test_a_page_that_cannot_be_read_does_not_hide_its_neighbours_from_a_search(machine):
    class Holey(With):
        data_regions = None

        def readv(self, spans):
            found = self.memory.readv(spans)
            return [None if gpa <= hole < gpa + size else data for (gpa, size), data in zip(spans, found, strict=True)]

    memory, hole = machine.memory(), ROOT_GPA & -CHUNK
    assert memory.read(hole, PAGE) == bytes(PAGE)
    roots = [root.space.root for root in find_by_tables(memory)]
    assert ROOT_GPA in roots
    assert [root.space.root for root in find_by_tables(Holey(memory))] == roots


def test_a_module_that_is_unlinked_half_way_is_a_named_gap(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    second = machine.kernel.drivers[1].entry_va
    links = second + machine.kernel.types.offset("_LDR_DATA_TABLE_ENTRY.InLoadOrderLinks")
    machine.kernel.set_u64(links + 8, 0)
    assert "does not lead back" in kernel.modules().gaps[0]
    machine.kernel.set_u64(links, links)
    assert any("leads to" in gap for gap in kernel.modules().gaps)
    machine.kernel.set_u64(links, 0x1234)
    assert len(kernel.modules()) == 2
    assert "leads to 0x1234" in kernel.modules().gaps[-1]


def test_the_clock_of_the_guest_goes_on(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    before = kernel.read_pulse()
    assert kernel.read_pulse() == before
    machine.tick(1.5)
    assert kernel.read_pulse() - before == 15_000_000
    assert kernel.read_shared().epoch_ns == machine.kernel.now_ns // 100 * 100


def test_after_a_reboot_the_pulse_of_the_old_kernel_is_gone(machine, tables):
    """The new boot's page tables lie where the old one's did; its kernel lies elsewhere, or is another."""
    kernel = attach(machine.memory(), symbols=tables)
    kernel.read_pulse()
    machine.kernel.space.write(machine.kernel.base + 0x100, b"another")
    with pytest.raises(Implausible, match="rebooted"):
        kernel.read_pulse()
    machine.kernel.space.entry(machine.kernel.base, 0)
    with pytest.raises(Implausible, match="rebooted"):
        kernel.read_pulse()


def test_a_kernel_address_is_one_of_the_upper_half(machine, tables):
    kernel = attach(machine.memory(), symbols=tables)
    assert all(kernel.is_kernel(va) for va in (kernel.base, KUSER_VA, (1 << 64) - 1))
    assert not any(kernel.is_kernel(va) for va in (0, 0x7FFE0000, 1 << 63, 1 << 64, -1))


def test_whatever_its_pages_hold_attaching_ends_with_a_kernel_or_an_error_of_the_guest(machine, tables):
    """Bytes of the pages that attaching reads are changed at random."""
    random_ = random.Random(20348)
    overlay = Overlay(machine.memory())
    attach(overlay, symbols=tables)
    attach(With(overlay, *machine.memory().vcpus()), symbols=tables)
    places = sorted(overlay.touched)
    attached = 0
    for _ in range(60):
        overlay.pages.clear()
        for number in random_.sample(places, random_.randint(1, 4)):
            page = bytearray(machine.memory().read(number * PAGE, PAGE))
            used = [at for at in range(0, PAGE, 8) if any(page[at : at + 8])] or [0]
            for _ in range(random_.randint(1, 8)):
                at = random_.choice(used) + random_.randrange(8)
                page[at] = random_.choice([0, 0xFF, random_.randrange(256)])
            overlay.pages[number] = bytes(page)
        vcpus = machine.memory().vcpus() if random_.random() < 0.5 else ()
        try:
            kernel = attach(With(overlay, *vcpus), symbols=tables, seconds=10)
            kernel.modules()
            attached += 1
        except GuestError:
            pass
    assert attached > 0
