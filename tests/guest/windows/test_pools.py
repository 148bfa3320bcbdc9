"""Pool blocks found by their tags in physical memory, and the addresses under which the kernel maps them."""

import random
import struct

import pytest

from appliance.guest.windows import pools
from appliance.guest.windows.isf import Field, SymbolTable
from appliance.guest.windows.pools import Block, PoolHeader, Sweep
from appliance.guest.windows.reverse import find_pages
from appliance.guest.windows.space import PAGE, AddressSpace, Mode
from tests.worlds.tiny import ByteMemory

P, LARGE = 1, 0x80
TAGS = (*pools.ENDPOINT_TAGS, pools.TIME_WAIT_TAG, pools.LISTENER_TAG, pools.UDP_TAG, pools.PROCESS_TAG)


def never():
    return False


def header64(tag, size, kind=2):
    return struct.pack("<BBBB4sQ", 0, 0, size // 16, kind, tag, 0)


def header32(tag, size, kind=2):
    return struct.pack("<HH4s", 0, size // 8 | kind << 9, tag)


def sweep(data, pointer_size=8, tags=TAGS):
    found = Sweep(ByteMemory(data), PoolHeader(None, pointer_size), tags)
    return found, found.run(never)


def test_every_tag_that_is_asked_for_is_found_with_its_block_and_nothing_else_is():
    data = bytearray(random.Random(3).randbytes(1 << 20))
    wanted = []
    for number, tag in enumerate((*TAGS, b"Thre", b"File")):
        at = 0x1000 * (number + 1) + 0x130
        data[at : at + 16] = header64(tag, 0x330)
        wanted += [Block(at, tag, 0x330, True)] if tag in TAGS else []
    assert sweep(data)[1] == sorted(wanted, key=lambda block: block.at)


def test_a_tag_in_the_middle_of_a_block_is_no_header():
    data = bytearray(0x4000)
    data[0x100:0x110] = b"TcpETcpE" + bytes(4) + b"TcpE"  # at +0, +4 (a header's place, but a size of 'T', 'c') and +12
    data[0x204:0x208] = b"TcpE"  # a block of no size
    data[0x30A:0x30E] = b"UdpA"
    data[0x410:0x420] = header64(b"UdpA", 0x50)
    blocks = sweep(data)[1]
    assert [block.at for block in blocks if block.tag == b"UdpA"] == [0x410]
    assert 0x200 not in [block.at for block in blocks]
    assert {block.at for block in blocks} <= {0x100, 0x410}


def test_a_freed_block_is_told_as_one():
    data = bytearray(0x2000)
    data[0x40:0x50] = header64(b"TcpE", 0x330, kind=0)
    assert sweep(data)[1] == [Block(0x40, b"TcpE", 0x330, False)]


def test_headers_of_x86_are_eight_bytes_long_and_a_protected_block_has_the_same_tag():
    data = bytearray(0x2000)
    data[0x48:0x50] = header32(b"Pro\xe3", 0x280)
    data[0x858:0x860] = header32(b"TcpE", 0x1F8, kind=5)
    assert sweep(data, 4)[1] == [Block(0x48, b"Proc", 0x280, True), Block(0x858, b"TcpE", 0x1F8, True)]


def test_the_symbol_table_says_where_the_size_stands():
    members = {"BlockSize": Field(0, 4, 16, 8), "PoolType": Field(0, 4, 24, 8), "PoolTag": (4, 4)}
    header = PoolHeader(SymbolTable.of(types={"_POOL_HEADER": (16, members)}), 8)
    assert header.parse(header64(b"TcpE", 0x330), 0, 0x40, b"TcpE") == Block(0x40, b"TcpE", 0x330, True)


def test_a_sweep_can_be_put_off_at_any_piece_and_finds_the_same(monkeypatch):
    monkeypatch.setattr(pools, "PIECE", 0x1000)
    data = bytearray(64 * PAGE)
    for page in range(64):
        data[page * PAGE + 0x20 : page * PAGE + 0x30] = header64(b"UdpA", 0x100)
    found = Sweep(ByteMemory(data), PoolHeader(None, 8), TAGS)
    rounds = []
    while not found.done:
        rounds.append(len(found.run(lambda: True)))
    assert rounds == [1] * 64 + [0]
    assert (len(found.blocks), found.bytes_seen, found.bytes_all) == (64, 64 * PAGE, 64 * PAGE)


def test_a_guest_that_is_full_of_tags_is_given_up_and_that_is_told(monkeypatch):
    monkeypatch.setattr(pools, "MAX_BLOCKS", 100)
    data = header64(b"TcpE", 0x330) * 0x4000
    found, blocks = sweep(data)
    assert found.overflow
    assert len(blocks) <= 100 + pools.MAX_HITS


def test_what_cannot_be_read_is_counted_and_the_rest_is_seen():
    data = bytearray(8 * PAGE)
    data[0x5040:0x5050] = header64(b"TcpL", 0xC0)
    found = Sweep(ByteMemory(data, holes=[3]), PoolHeader(None, 8), TAGS)
    assert [block.at for block in found.run(never)] == [0x5040]
    assert found.unreadable == PAGE


# -- back to addresses --


def tables(mode, va, leaf, depth=0, size=256 * PAGE):
    """RAM in which one page (of the size that ``depth`` levels of tables less make) is mapped at ``va``."""
    levels, width = mode.value
    bits = 9 if width == 8 else 10
    data = bytearray(size)
    table, kind = 0x1000, "<Q" if width == 8 else "<I"
    for level in range(levels - 1, depth - 1, -1):
        index = va >> (12 + bits * level) & (1 << bits) - 1
        at = table + width * index
        if level == depth:
            struct.pack_into(kind, data, at, leaf | P | (LARGE if depth else 0))
        else:
            struct.pack_into(kind, data, at, table + PAGE | P)
            table += PAGE
    return data


@pytest.mark.parametrize(
    ("mode", "va", "depth"),
    [
        (Mode.LONG4, 0xFFFF_9A8B_0123_4000, 0),
        (Mode.LONG4, 0xFFFF_9A8B_0120_0000, 1),
        (Mode.LONG5, 0xFF12_9A8B_0123_4000, 0),
        (Mode.PAE, 0x8123_4000, 0),
        (Mode.PAE, 0x8120_0000, 1),
        (Mode.LEGACY, 0x8123_4000, 0),
        (Mode.LEGACY, 0x8140_0000, 1),
    ],
)
def test_a_page_is_found_where_the_kernel_maps_it(mode, va, depth):
    leaf = 0x0080_0000
    data = tables(mode, va, leaf, depth)
    space = AddressSpace(ByteMemory(data), 0x1000, mode)
    inside = leaf + (0x3000 if depth else 0)
    assert space.to_gpa(va + inside - leaf) == inside  # the walk down agrees
    found, complete = find_pages(space, [inside + 0x123, 0x0900_0000], never)
    assert (found, complete) == ({inside: va + inside - leaf}, True)


def test_a_page_of_a_process_only_is_none_of_the_kernels():
    data = tables(Mode.LONG4, 0x7FF0_1234_5000, 0x80_0000)
    assert find_pages(AddressSpace(ByteMemory(data), 0x1000, Mode.LONG4), [0x80_0000], never) == ({}, True)


def test_tables_that_map_themselves_end_the_search_all_the_same():
    data = bytearray(16 * PAGE)
    for index in range(512):
        struct.pack_into("<Q", data, 0x1000 + 8 * index, 0x1000 | P)
        struct.pack_into("<Q", data, 0x2000 + 8 * index, 0x2000 | P)
    struct.pack_into("<Q", data, 0x1000 + 8 * 300, 0x2000 | P)
    space = AddressSpace(ByteMemory(data), 0x1000, Mode.LONG4)
    assert find_pages(space, [0x9000], never) == ({}, True)


def test_a_search_that_takes_too_long_says_that_it_is_not_complete():
    data = tables(Mode.LONG4, 0xFFFF_9A8B_0123_4000, 0x80_0000)
    space = AddressSpace(ByteMemory(data), 0x1000, Mode.LONG4)
    assert find_pages(space, [0x80_0000], lambda: True) == ({}, False)
