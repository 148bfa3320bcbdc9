"""Memory images: what is read, and what is said of those that cannot be."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import ConfigError, UnreadableMemory
from appliance.memory.file import open_file
from appliance.model import Region
from appliance.ports import GuestMemory

PAGE = 4096


def lime(*ranges):
    return b"".join(struct.pack("<IIQQQ", 0x4C694D45, 1, gpa, gpa + len(data) - 1, 0) + data for gpa, data in ranges)


def elf(*ranges, notes=b"", machine=62, kind=4):
    count = len(ranges) + 1
    offset = 64 + 56 * count + len(notes)
    table = struct.pack("<IIQQQQQQ", 4, 0, 64 + 56 * count, 0, 0, len(notes), len(notes), 0)
    for gpa, data in ranges:
        table += struct.pack("<IIQQQQQQ", 1, 0, offset, 0, gpa, len(data), len(data), 0)
        offset += len(data)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, kind, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    return head + table + notes + b"".join(data for _, data in ranges)


def cpu_note(cr3):
    state = bytearray(440)
    struct.pack_into("<II", state, 0, 1, 440)
    struct.pack_into("<Q", state, 136, 0xFFFFFFFF81000000)
    for segment, base in {3: 0x7F00, 4: 0xFFFFF80320000000, 9: 0xFFFFF80320003000}.items():  # FS, GS, IDT
        struct.pack_into("<Q", state, 152 + 24 * segment + 16, base)
    struct.pack_into("<QQQQQQ", state, 392, 0x80050033, 0, 0, cr3, 0x1000, 0x7FF6)
    core = struct.pack("<III", 5, 336, 1) + b"CORE\0\0\0\0" + bytes(336)
    return core + struct.pack("<III", 5, 440, 0) + b"QEMU\0\0\0\0" + bytes(state)


def image(tmp_path, data):
    path = tmp_path / "image"
    path.write_bytes(data)
    return path


LOW, HIGH = b"low!" * 2048, b"high" * 1024
RANGES = [(0x1000, LOW), (1 << 32, HIGH)]


@pytest.mark.parametrize("build", [lime, elf])
def test_ranges_are_read_where_they_belong(tmp_path, build):
    with_firmware = RANGES if build is lime else [*RANGES, (0xFFFC0000, bytes(0x40000))]
    memory = open_file(image(tmp_path, build(*with_firmware)))
    assert isinstance(memory, GuestMemory)
    assert memory.regions == (Region(0x1000, 8192), Region(1 << 32, 4096))
    assert memory.read(0x1004, 8) == b"low!low!"
    spans = [(1 << 32, 4), (0, 4), (0x2FFC, 4), (0x2FFD, 4), (0x1000, -1), (-8, 4), (1 << 70, 4), (0x1000, 0)]
    assert memory.readv(spans) == [b"high", None, b"low!", None, None, None, None, b""]
    with pytest.raises(UnreadableMemory):
        memory.read(0, 8)
    assert memory.gaps == ()
    memory.close()
    memory.close()


def test_a_raw_image_begins_at_zero(tmp_path):
    memory = open_file(image(tmp_path, bytes(PAGE) + LOW))
    assert (memory.regions, memory.read(PAGE, 4), memory.vcpus()) == ((Region(0, 3 * PAGE),), b"low!", ())


def test_a_dump_by_qemu_holds_the_registers(tmp_path):
    memory = open_file(image(tmp_path, elf(*RANGES, notes=cpu_note(0x1234000) + cpu_note(0x5678000))))
    assert [(cpu.cr3, cpu.cr4, cpu.rip) for cpu in memory.vcpus()] == [
        (0x1234000, 0x1000, 0xFFFFFFFF81000000),
        (0x5678000, 0x1000, 0xFFFFFFFF81000000),
    ]
    cpu = memory.vcpus()[0]
    assert (cpu.fs_base, cpu.gs_base, cpu.idt_base) == (0x7F00, 0xFFFFF80320000000, 0xFFFFF80320003000)
    assert cpu.kernel_gs_base == 0x7FF6


def test_an_older_qemu_tells_no_kernel_gs_base(tmp_path):
    note = bytearray(cpu_note(0x1234000))
    core = note.index(b"QEMU") - 12
    struct.pack_into("<I", note, core + 4, 432)
    cpu = open_file(image(tmp_path, elf(*RANGES, notes=bytes(note[: len(note) - 8])))).vcpus()[0]
    assert (cpu.cr3, cpu.kernel_gs_base) == (0x1234000, 0)


def test_the_holes_of_a_sparse_file_are_not_worth_scanning(tmp_path):
    high = 64 << 20
    path = image(tmp_path, b"")
    with path.open("r+b") as file:
        file.truncate(high)
        file.seek(5 * PAGE + 100)
        file.write(b"x")
        file.seek(high - PAGE)
        file.write(b"y")
    memory = open_file(path)
    found = memory.data_regions()
    assert memory.regions == (Region(0, high),)
    assert sum(region.size for region in found) < 1 << 20
    assert all(region.gpa % PAGE == region.size % PAGE == 0 for region in found)
    assert all(any(region.gpa <= at < region.gpa + region.size for region in found) for at in (5 * PAGE, high - PAGE))


@pytest.mark.parametrize("build", [lime, elf])
def test_a_file_cut_short_gives_what_is_there_and_says_how_much_is_missing(tmp_path, build):
    whole = build(*RANGES)
    memory = open_file(image(tmp_path, whole[: len(whole) - 6000]))
    assert memory.regions == (Region(0x1000, 4096),)
    assert memory.read(0x1000, 4) == b"low!"
    assert "8192 of 12288 bytes" in memory.gaps[0].why or "4096 of 8192 bytes" in memory.gaps[0].why
    assert memory.gaps[1].address == 0x2000


def test_a_raw_file_that_ends_inside_a_page_is_cut_short(tmp_path):
    memory = open_file(image(tmp_path, bytes(PAGE + 100)))
    assert (memory.regions, len(memory.gaps)) == ((Region(0, PAGE),), 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"abc", "holds no guest memory"),
        (elf(*RANGES)[:50], "ends inside its ELF header"),
        (elf(*RANGES)[:100], "ends inside its table of segments"),
        (elf(*RANGES)[:300], "holds no guest memory"),
        (elf(*RANGES, machine=183), "no 64-bit x86 memory dump"),
        (elf(*RANGES, kind=2), "no 64-bit x86 memory dump"),
        (elf(), "without any memory segment"),
        (lime(*RANGES)[:20], "ends inside a LiME header"),
        (lime((0x1000, LOW)) + b"x" * 100, "damaged LiME header"),
        (b"KDUMP   ", "makedumpfile"),
        (b"\x1f\x8b\x08", "unpack it"),
        (b"AVML\2\0\0\0", "avml-convert"),
        (b"QFI\xfb", "qcow2"),
        (b"\xd4\xc3\xb2\xa1", "packet capture"),
        (b"LibvirtQemudSave", "virsh dump"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_why_and_what_to_do(tmp_path, data, words):
    path = image(tmp_path, data)
    with pytest.raises(ConfigError, match=words) as raised:
        open_file(path)
    assert str(raised.value).startswith(str(path))


def test_a_file_that_is_not_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        open_file(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_file(tmp_path)


def test_runs_in_a_sparse_file_are_whole_pages_of_ram(tmp_path):
    """A run of RAM may begin anywhere in the file; what is told are pages of the guest."""
    path = image(tmp_path, lime((0x1000, LOW), (1 << 32, HIGH)))
    memory = open_file(path)
    assert memory.data_regions() == memory.regions
    path.unlink()
    assert memory.data_regions() == memory.regions


@settings(max_examples=200, deadline=None)
@given(
    whole=st.sampled_from([elf(*RANGES, notes=cpu_note(1)), lime(*RANGES)]),
    cut=st.integers(0, 20000),
    places=st.lists(st.tuples(st.integers(0, 800), st.integers(0, 255)), max_size=8),
)
def test_whatever_the_headers_say_a_file_opens_or_is_a_config_error(tmp_path_factory, whole, cut, places):
    data = bytearray(whole[: len(whole) - cut])
    for place, value in places:
        if place < len(data):
            data[place] = value
    path = image(tmp_path_factory.mktemp("fuzz"), bytes(data))
    try:
        memory = open_file(path)
    except ConfigError:
        return
    for region in memory.regions:
        assert len(memory.read(region.gpa, min(region.size, PAGE))) == min(region.size, PAGE)
    memory.close()
