"""Crash dumps of Windows: RAM where it belongs, registers, and what is said of those that cannot be read."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import ConfigError
from appliance.memory.file import open_file
from appliance.model import Region
from tests.worlds.windows.crash import BITMAP, FULL, HEADER, KERNEL, MINI, by_bitmap, by_runs, header32, header64

PAGE = 4096
RAM = b"".join(bytes([number % 7]) * PAGE for number in range(70))  # every seventh page is zero
RUNS = [(1, 9), (16, 54)]
DTB, KDBG = 0x1AD000, 0xFFFFF80312400000


def image(tmp_path, data):
    path = tmp_path / "dump"
    path.write_bytes(data)
    return path


def test_a_complete_dump_by_runs_is_read(tmp_path):
    memory = open_file(image(tmp_path, by_runs(RAM, header64(DTB, KDBG, FULL, RUNS), RUNS)))
    assert memory.regions == (Region(PAGE, 9 * PAGE), Region(16 * PAGE, 54 * PAGE))
    assert [memory.read(number * PAGE, 1)[0] for number in (1, 9, 16, 69)] == [1, 2, 2, 6]
    assert memory.readv([(0, 1), (10 * PAGE, 1), (70 * PAGE, 1)]) == [None] * 3
    cpu = memory.vcpus()[0]
    assert (cpu.cr3, cpu.cr4, cpu.cr0 >> 31, cpu.rip, memory.kernel_va) == (DTB, 0x20, 1, 0xFFFFF80312345678, KDBG)
    assert memory.gaps == ()


@pytest.mark.parametrize(("kind", "signature"), [(BITMAP, b"FDMP"), (KERNEL, b"SDMP"), (6, b"SDMP")])
def test_a_dump_by_a_bitmap_is_read(tmp_path, kind, signature):
    memory = open_file(image(tmp_path, by_bitmap(RAM, header64(DTB, KDBG, kind, []), signature=signature)))
    assert memory.regions == tuple(Region((7 * number + 1) * PAGE, 6 * PAGE) for number in range(10))
    assert all(memory.read(number * PAGE, 1)[0] == number % 7 for number in range(70) if number % 7)


def test_pages_side_by_side_are_one_run(tmp_path):
    memory = open_file(image(tmp_path, by_bitmap(RAM, header64(DTB, KDBG, BITMAP, []), keep_zeros=True)))
    assert memory.regions == (Region(0, 70 * PAGE),)
    assert memory.read(8 * PAGE - 1, 2) == b"\0\1"


@pytest.mark.parametrize("pae", [True, False])
def test_a_dump_of_x86_is_read(tmp_path, pae):
    memory = open_file(image(tmp_path, by_runs(RAM, header32(0x39000, 0x80545AE0, FULL, RUNS, pae=pae), RUNS)))
    assert memory.read(16 * PAGE, 1) == b"\2"
    cpu = memory.vcpus()[0]
    assert (cpu.cr3, cpu.cr4, cpu.rip, memory.kernel_va) == (0x39000, 0x20 * pae, 0x80512345, 0x80545AE0)


def test_a_dump_that_is_cut_short_says_how_much_is_missing(tmp_path):
    memory = open_file(image(tmp_path, by_runs(RAM, header64(DTB, KDBG, FULL, RUNS), RUNS)[: -3 * PAGE]))
    assert "cut short" in memory.gaps[0].why
    assert memory.regions[1] == Region(16 * PAGE, 51 * PAGE)


def damaged(data, at, value, kind="Q"):
    changed = bytearray(data)
    struct.pack_into("<" + kind, changed, at, value)
    return bytes(changed)


WHOLE, BITS = by_runs(RAM, header64(DTB, KDBG, FULL, RUNS), RUNS), by_bitmap(RAM, header64(DTB, KDBG, BITMAP, []))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (WHOLE[:100], "ends inside its header"),
        (header64(DTB, KDBG, MINI, []), "small memory dump"),
        (header64(DTB, KDBG, 77, []), "unknown type 77"),
        (damaged(WHOLE, 0x88, 0x45474150, "I"), "more than its header holds"),
        (damaged(WHOLE, 0x98, 1 << 60), "impossible run"),
        (header64(DTB, KDBG, BITMAP, []).ljust(HEADER + PAGE, b"\0"), "without the table"),
        (damaged(BITS, HEADER + 0x28, 7), "damaged or of an older form"),
        (damaged(BITS, HEADER + 0x30, 1 << 60), "damaged or of an older form"),
        (header64(DTB, KDBG, FULL, []), "holds no guest memory"),
    ],
)
def test_a_dump_that_cannot_be_used_is_told_why(tmp_path, data, words):
    with pytest.raises(ConfigError, match=words):
        open_file(image(tmp_path, data))


PLACES = [*range(0x64, 0xC0), *range(0xF88, 0xFA0), *range(0x2000, 0x2050)]


@settings(max_examples=200, deadline=None)
@given(
    whole=st.sampled_from([WHOLE, BITS, by_runs(RAM, header32(0x39000, 0x80545AE0, FULL, RUNS, pae=True), RUNS)]),
    cut=st.integers(0, 200000),
    places=st.lists(
        st.tuples(
            st.sampled_from([*range(0x64, 0xC0), *range(0xF88, 0xFA0), *range(0x2000, 0x2050)]), st.integers(0, 255)
        ),
        max_size=8,
    ),
)
def test_whatever_the_headers_say_a_dump_opens_or_is_a_config_error(tmp_path_factory, whole, cut, places):
    data = bytearray(whole[: len(whole) - cut])
    for place, value in places:
        if place < len(data):
            data[place] = value
    try:
        memory = open_file(image(tmp_path_factory.mktemp("fuzz"), bytes(data)))
    except ConfigError:
        return
    for region in memory.regions:
        assert len(memory.read(region.gpa, min(region.size, PAGE))) == min(region.size, PAGE)
    memory.close()
