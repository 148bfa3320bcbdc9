"""The memory map: maple trees and lists made of bytes, honest, torn and hostile."""

import pytest

from appliance.errors import GuestError, Implausible
from appliance.guest.kernel import Field
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.injection import Injection
from appliance.guest.linux.injection_maple import NodeShape, parse_node
from appliance.guest.linux.vmas import MemoryMap
from tests.worlds.injected import DIRECT, MAX, PAGE, World

SHAPE = NodeShape.make(Field(8, 120, length=15), Field(128, 128, length=16))


def node(pivots: list[int], slots: list[int]) -> bytes:
    words = [1, *(pivots + [0] * (15 - len(pivots))), *(slots + [0] * (16 - len(slots)))]
    return b"".join(word.to_bytes(8, "little") for word in words)


def read(world: World) -> MemoryMap:
    world.close()
    return Injection(world.kernel, Facts(world.kernel)).read_map(world.process)[0]


def test_a_node_gives_the_ranges_that_hold_something() -> None:
    raw = node([0xFFF, 0x1FFF, 0x2FFF], [0, DIRECT, DIRECT + 8])
    assert parse_node(raw, SHAPE, 0, MAX) == [(0x1000, 0x1FFF, DIRECT), (0x2000, 0x2FFF, DIRECT + 8)]


def test_the_last_slot_of_a_node_ends_where_the_node_ends() -> None:
    full = node([number * 16 + 15 for number in range(15)], [DIRECT] * 16)
    assert parse_node(full, SHAPE, 0, 0xFFFF)[-1] == (240, 0xFFFF, DIRECT)
    short = node([15], [DIRECT, DIRECT + 8])
    assert parse_node(short, SHAPE, 0, 0xFFFF)[-1] == (16, 0xFFFF, DIRECT + 8)


def test_a_reserved_slot_is_no_mapping() -> None:
    assert parse_node(node([15], [0x406]), SHAPE, 0, 15) == []


@pytest.mark.parametrize("pivots", [[0x2FFF, 0x1FFF], [MAX]])
def test_pivots_that_do_not_rise_within_the_node_are_implausible(pivots: list[int]) -> None:
    with pytest.raises(Implausible):
        parse_node(node(pivots, [DIRECT] * 3), SHAPE, 0x1000, 0xFFFF)


@pytest.mark.parametrize("kind", [2, 3])
def test_a_tree_of_two_levels_lists_every_mapping_in_order(kind: int) -> None:
    world = World()
    for number in range(30):
        world.vma(0x7F00_0000_0000 + number * 3 * PAGE, 1 + number % 3)
    world.close()
    world.put(world.mm, "mm_struct.mm_mt.ma_root", world.tree(10, kind))
    memory, _ = Injection(world.kernel, Facts(world.kernel)).read_map(world.process)
    assert [(vma.start, vma.end) for vma in memory.vmas] == sorted((start, end) for start, end, _ in world.vmas)
    assert (memory.gaps, memory.torn) == ((), 0)


def test_a_kernel_without_maple_trees_has_a_list() -> None:
    world = World(absent=["mm_struct.mm_mt", "maple_range_64", "maple_arange_64"])
    for number in range(30):
        world.vma(0x7F00_0000_0000 + number * 3 * PAGE, 1)
    memory = read(world)
    assert [(vma.start, vma.end) for vma in memory.vmas] == sorted((start, end) for start, end, _ in world.vmas)
    assert memory.gaps == ()


def test_a_list_that_runs_in_a_circle_ends_with_a_gap() -> None:
    world = World(absent=["mm_struct.mm_mt", "maple_range_64", "maple_arange_64"])
    last = world.vma(0x7F00_0000_0000, 1)
    world.close()
    world.put(last, "vm_area_struct.vm_next", world.vmas[0][2])
    memory, _ = Injection(world.kernel, Facts(world.kernel)).read_map(world.process)
    assert len(memory.vmas) == 2
    assert len(memory.gaps) == 1


def test_a_tree_that_contains_itself_ends_with_a_gap() -> None:
    world = World()
    world.close()
    leaf = world.tree() & ~2
    ranges = [(0xFFF, leaf), (MAX, 0)]
    root = world.node(ranges, 3) | 2
    world.write((root & ~0xFF) + 80 + 8, root.to_bytes(8, "little"))
    world.put(world.mm, "mm_struct.mm_mt.ma_root", root)
    memory, _ = Injection(world.kernel, Facts(world.kernel)).read_map(world.process)
    assert memory.gaps
    assert memory.torn


def test_a_removed_node_and_a_mapping_that_moved_are_torn_and_told() -> None:
    for break_it in ("node", "mapping"):
        world = World()
        world.close()
        root = world.tree()
        world.put(world.mm, "mm_struct.mm_mt.ma_root", root)
        if break_it == "node":
            world.write(root & ~0xFF, (root & ~0xFF).to_bytes(8, "little"))
        else:
            world.put(world.vmas[0][2], "vm_area_struct.vm_end", world.vmas[0][1] + PAGE)
        memory, _ = Injection(world.kernel, Facts(world.kernel)).read_map(world.process)
        assert memory.torn
        assert "changed 3 times" in memory.gaps[0].why


def test_a_mapping_of_another_process_is_left_out() -> None:
    world = World()
    world.vma(0x7F00_0000_0000, 1, vm_mm=DIRECT)
    assert len(read(world).vmas) == 1


def test_an_empty_tree_is_an_empty_map() -> None:
    world = World()
    world.close()
    world.put(world.mm, "mm_struct.mm_mt.ma_root", 0)
    memory, _ = Injection(world.kernel, Facts(world.kernel)).read_map(world.process)
    assert memory.vmas == ()
    assert memory.gaps[0].why == "it is empty"


def test_page_tables_in_user_space_are_implausible() -> None:
    world = World()
    world.close()
    world.put(world.mm, "mm_struct.pgd", 0x1000)
    with pytest.raises(GuestError):
        Injection(world.kernel, Facts(world.kernel)).read_map(world.process)


def test_an_address_is_found_in_its_mapping() -> None:
    memory = read(World())
    assert memory.at(0x400000) == memory.vmas[0] == memory.at(0x401FFF)
    assert memory.at(0x3FFFFF) is None
    assert memory.at(0x402000) is None
