"""PE images in a guest's memory: what is found in them, and that nothing in them leads astray."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError, Implausible
from appliance.guest.windows import pe
from appliance.guest.windows.isf import PdbId
from appliance.guest.windows.space import AddressSpace, Mode
from tests.worlds.tiny import ByteMemory
from tests.worlds.windows import pe as writer

PAGE = 4096
BASE = 0xFFFFF80312400000
SIZE = 0x20000
GUID = "00112233445566778899AABBCCDDEEFF"
FIRST = 5 * PAGE  # where the image lies in RAM, behind its page tables


def image(**options):
    """An image of 32 pages in RAM, as bytes, with page tables before it."""
    parts = (
        writer.Section(".text", 0x1000, 0x1000, writer.CODE),
        writer.Section(".rdata", 0x2000, 0x8000, writer.READONLY),
        writer.Section(".data", 0x10000, 0x10000, writer.DATA),
    )
    settings_ = {
        "debug": writer.Debug("drv.pdb", GUID, 7),
        "exports": {"Second": 0x1100, "First": 0x1000},
        "version": (10, 0, 20348, 1970),
        "name": "drv.sys",
    }
    ram = bytearray(FIRST + SIZE)
    for rva, data in writer.build(SIZE, parts, **(settings_ | options)).items():
        ram[FIRST + rva : FIRST + rva + len(data)] = data
    for depth, shift in enumerate((39, 30, 21)):
        struct.pack_into("<Q", ram, depth * PAGE + 8 * (BASE >> shift & 511), (depth + 1) * PAGE | 3)
    for page in range(SIZE // PAGE):
        struct.pack_into("<Q", ram, 3 * PAGE + 8 * ((BASE >> 12 & 511) + page), FIRST + page * PAGE | 3)
    return ram


def space_of(ram):
    return AddressSpace(ByteMemory(ram), 0, Mode.LONG4)


def unmap(ram, rva):
    struct.pack_into("<Q", ram, 3 * PAGE + 8 * ((BASE >> 12 & 511) + rva // PAGE), 0)


def look(ram):
    """All that this module finds in the image."""
    space = space_of(ram)
    headers = pe.read_headers(space, BASE)
    return (
        headers,
        pe.find_debug_id(space, BASE, headers),
        pe.read_exports(space, BASE, headers),
        pe.find_export_name(space, BASE, headers),
        pe.find_version(space, BASE, headers),
    )


def test_an_image_says_what_it_is():
    headers, debug, exports, name, version = look(image())
    assert (headers.machine, headers.is64, headers.size) == (pe.AMD64, True, SIZE)
    assert [(part.name, part.rva, part.size, part.executable) for part in headers.sections] == [
        (".text", 0x1000, 0x1000, True),
        (".rdata", 0x2000, 0x8000, False),
        (".data", 0x10000, 0x10000, False),
    ]
    assert headers.section_of(0x2FFF).name == ".rdata"
    assert headers.section_of(0xB000) is None
    assert debug == PdbId("drv.pdb", GUID, 7)
    assert exports == {"First": 0x1000, "Second": 0x1100}
    assert (name, version) == ("drv.sys", (10, 0, 20348, 1970))


def test_only_the_exports_that_are_asked_for_are_told():
    space = space_of(image())
    assert pe.read_exports(space, BASE, pe.read_headers(space, BASE), ["First", "Third"]) == {"First": 0x1000}


def test_an_image_without_directories_has_nothing():
    _, debug, exports, name, version = look(image(debug=None, exports=None, version=None))
    assert (debug, exports, name, version) == (None, {}, "", None)


def test_where_the_debug_directory_is_paged_out_the_record_is_looked_for():
    ram = image()
    unmap(ram, 0x2000)
    assert look(ram)[1] is None
    record = b"RSDS" + bytes.fromhex("33221100554477668899aabbccddeeff") + struct.pack("<I", 7) + b"C:\\x\\Drv.PDB\0"
    at = FIRST + 0x6000 - 12  # crosses a page
    ram[at : at + len(record)] = record
    assert look(ram)[1] == PdbId("drv.pdb", GUID, 7)
    headers = pe.read_headers(space_of(ram), BASE)
    assert pe.find_debug_id(space_of(ram), BASE, headers, thorough=False) is None


def test_a_record_is_found_wherever_it_lies_though_the_headers_are_gone_and_only_that_of_the_name_that_is_sought():
    ram = image()
    unmap(ram, 0)
    record = b"RSDS" + bytes.fromhex("33221100554477668899aabbccddeeff") + struct.pack("<I", 9) + b"other.pdb\0"
    ram[FIRST + 0x12345 : FIRST + 0x12345 + len(record)] = record
    space = space_of(ram)
    assert pe.seek_debug_id(space, BASE, SIZE, ["drv.pdb"]) == PdbId("drv.pdb", GUID, 7)
    assert pe.seek_debug_id(space, BASE, SIZE, ["other.pdb"]) == PdbId("other.pdb", GUID, 9)
    assert pe.seek_debug_id(space, BASE, SIZE, ["third.pdb"]) is None


def test_a_version_that_is_paged_out_is_none():
    ram = image()
    unmap(ram, 0x4000)
    assert look(ram)[4] is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (b"tcpip.pdb\0", "tcpip.pdb"),
        (b"d:\\os\\obj\\NTKRNLMP.pdb\0", "ntkrnlmp.pdb"),
        (b"/a/b.pdb\0", "b.pdb"),
        (b"no end", None),
        (b"\xff\xfe.pdb\0", None),
        (b".pdb\0", None),
        (b"", None),
    ],
)
def test_the_name_of_the_symbols_is_the_last_part_of_their_path(name, found):
    parsed = pe.parse_debug_id(b"RSDS" + bytes(16) + struct.pack("<I", 1) + name)
    assert (parsed.name if parsed else None) == found


@pytest.mark.parametrize(
    "raw",
    [b"", b"MZ", bytes(PAGE), b"MZ" + b"\xff" * 4094, b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + b"PE\0\0"],
)
def test_what_is_no_image_is_implausible(raw):
    with pytest.raises(Implausible):
        pe.parse_headers(raw)


PLACES = [*range(0x3C, 0x240), *range(0x2000, 0x2060), *range(0x3000, 0x3060), *range(0x4000, 0x4100)]


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(
                [*range(0x3C, 0x240), *range(0x2000, 0x2060), *range(0x3000, 0x3060), *range(0x4000, 0x4100)]
            ),
            st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_an_image_says_it_is_read_or_refused(changes):
    ram = image()
    for at, value in changes:
        ram[FIRST + at] = value
    try:
        headers, _, exports, name, _ = look(ram)
    except GuestError:
        return
    assert all(part.rva + part.size <= headers.size for part in headers.sections if part.size)
    assert all(0 <= rva < headers.size for rva in exports.values())
    assert len(name) <= 64
