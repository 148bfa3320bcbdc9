"""The Windows machine made of bytes keeps its own promises; for what engines make of it see tests/against."""

from itertools import combinations

import pytest

from appliance.memory.file import open_file
from tests.worlds.windows import FAMILIES, Machine, symbols
from tests.worlds.windows.real import real_symbols
from tests.worlds.windows.scene import plant

ESSENTIAL = (
    "_EPROCESS",
    "_KPROCESS",
    "_ETHREAD",
    "_KTHREAD",
    "_PEB",
    "_LDR_DATA_TABLE_ENTRY",
    "_RTL_USER_PROCESS_PARAMETERS",
    "_MMVAD",
    "_MMVAD_SHORT",
    "_TOKEN",
    "_OBJECT_HEADER",
    "_CONTROL_AREA",
    "_SUBSECTION",
)


def offsets(table: symbols.Symbols) -> dict[str, int]:
    """Where the fields of structures that matter are, those at the very start left out."""
    types = table.document["user_types"]
    places = {
        f"{name}.{field}": place["offset"]
        for name in ESSENTIAL
        for field, place in types[name]["fields"].items()
        if place["type"]["kind"] != "bitfield"
    }
    return {path: place for path, place in places.items() if place}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_makes_the_same_bytes_and_another_one_does_not(family):
    def made(seed: int) -> bytes:
        with Machine(family, seed=seed, ram=48 << 20) as machine:
            plant(machine)
            return machine.kernel.ram.data[:]

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_no_two_families_share_symbols_or_most_of_their_offsets():
    tables = [symbols.invented(family) for family in FAMILIES]
    assert len({table.guid for pair in tables for table in pair}) == 2 * len(FAMILIES)
    for (first, _), (second, _) in combinations(tables, 2):
        one, other = offsets(first), offsets(second)
        assert sum(one[path] == other[path] for path in one.keys() & other.keys()) < 0.2 * len(one)


@pytest.mark.parametrize("build", symbols.REAL)
def test_nothing_that_matters_is_where_a_real_windows_has_it(build):
    real = offsets(symbols.real(real_symbols(), build)[0])
    for family in FAMILIES:
        invented = offsets(symbols.invented(family)[0])
        assert [path for path, place in invented.items() if real.get(path) == place] == [], family


def test_its_core_holds_its_ram_and_the_registers_of_its_processor(tmp_path):
    with Machine() as machine:
        memory, living = open_file(machine.write_elf(tmp_path / "memory.elf")), machine.memory()
        for region in memory.regions:
            assert memory.read(region.gpa, region.size) == living.read(region.gpa, region.size)
        assert sum(region.size for region in memory.regions) == machine.kernel.ram.size - 0x60000  # display memory
        (cpu,), (true,) = memory.vcpus(), living.vcpus()
        assert (cpu.cr0, cpu.cr3, cpu.cr4, cpu.rip) == (true.cr0, true.cr3, true.cr4, true.rip)
        assert (cpu.idt_base, cpu.gs_base) == (true.idt_base, true.gs_base)
        memory.close()


def test_a_freed_endpoint_is_poisoned_and_its_block_is_used_again():
    with Machine(partitions=1) as machine:
        process = machine["svchost.exe"]
        first = machine.tcp(process, ("10.0.0.5", 50000), ("192.0.2.1", 443), bucket=1)
        other = machine.tcp(process, ("10.0.0.5", 50001), ("192.0.2.1", 443), bucket=1)
        machine.tcp_close(first)
        assert machine.kernel.space.read(first.va, 0x100) == b"\xdd" * 0x100
        head = machine.net.head(0, 1, 1)
        assert machine.kernel.u64(head) == machine.kernel.u64(head + 8) == other.va + 0x28
        assert machine.tcp(process, ("10.0.0.5", 50002), ("192.0.2.1", 443)).va == first.va
