"""The pages behind a region, in every kind of page table, large pages and trimmed ones too."""

import struct

import pytest

from appliance.guest.budget import Budget
from appliance.guest.windows.injection_pages import PAGE, Leaf, Pages, Prototypes, merge, small_of
from appliance.guest.windows.space import AddressSpace, Mode
from tests.worlds.tiny import ByteMemory

PRESENT, WRITABLE, USER, LARGE, NX = 1, 2, 4, 0x80, 1 << 63
TRANSITION, PROTOTYPE = 1 << 11, 1 << 10
EXECUTE_READ, READWRITE = 3 << 5, 4 << 5  # _MMPTE_TRANSITION.Protection
VA = 0x0060_0000  # two regions of large pages of any kind lie above it
RAM = 8 << 20


class Tables:
    """Page tables of any mode, written into a few MiB."""

    def __init__(self, mode: Mode) -> None:
        self.mode, self.memory = mode, ByteMemory(bytes(RAM))
        self.size = mode.value[1]
        bits = 9 if self.size == 8 else 10
        self.shifts = [12 + bits * level for level in range(mode.value[0] - 1, -1, -1)]
        self.masks = [3 if mode is Mode.PAE and not depth else (1 << bits) - 1 for depth in range(len(self.shifts))]
        self.next = 0x2000
        self.root = 0x1000

    def set(self, va: int, entry: int, *, level: int = 0, rights: int = PRESENT | WRITABLE | USER) -> None:
        """Write the entry of a page (level 0) or large page (1); ``rights`` are those of tables made on the way."""
        table = self.root
        for depth, (shift, mask) in enumerate(zip(self.shifts, self.masks, strict=True)):
            at = table + self.size * (va >> shift & mask)
            if depth == len(self.shifts) - 1 - level:
                self.put(at, entry)
                return
            below = int.from_bytes(self.memory.data[at : at + self.size], "little")
            if not below:
                below = self.next | (PRESENT if self.mode is Mode.PAE and not depth else rights)
                self.next += PAGE
                self.put(at, below)
            table = below & 0x000F_FFFF_FFFF_F000

    def put(self, at: int, value: int) -> None:
        self.memory.data[at : at + self.size] = value.to_bytes(self.size, "little")

    @property
    def space(self) -> AddressSpace:
        return AddressSpace(self.memory, self.root, self.mode)

    def leaves(self, *ranges: tuple[int, int], executable: bool = False, cut: list[str] | None = None) -> list[Leaf]:
        budget = Budget(1 << 17, 5.0, [] if cut is None else cut)
        return Pages(self.space).leaves(ranges, budget, executable=executable)


@pytest.fixture(params=list(Mode), ids=lambda mode: mode.name)
def tables(request):
    return Tables(request.param)


def test_pages_in_memory_are_found_with_their_rights(tables) -> None:
    has_nx = tables.mode is not Mode.LEGACY
    tables.set(VA, 0x40_0000 | PRESENT | USER)
    tables.set(VA + PAGE, 0x40_1000 | PRESENT | USER | WRITABLE | (NX if has_nx else 0))
    tables.set(VA + 2 * PAGE, 0x40_2000 | TRANSITION | EXECUTE_READ)
    tables.set(VA + 3 * PAGE, 0x40_3000 | TRANSITION | READWRITE)
    tables.set(VA + 4 * PAGE, 0x1234_0000 | PROTOTYPE | TRANSITION)
    tables.set(VA + 5 * PAGE, 0x1234_0000)  # paged out
    tables.set(VA + 8 * PAGE, 0x40_8000 | PRESENT | USER)  # outside
    assert tables.leaves((VA, VA + 8 * PAGE)) == [
        Leaf(VA, 0x40_0000, PAGE, True, False, True),
        Leaf(VA + PAGE, 0x40_1000, PAGE, not has_nx, True, True),
        Leaf(VA + 2 * PAGE, 0x40_2000, PAGE, True, False, False),
        Leaf(VA + 3 * PAGE, 0x40_3000, PAGE, False, True, False),
    ]
    executable = tables.leaves((VA, VA + 8 * PAGE), executable=True)
    assert {leaf.va for leaf in executable} >= {VA, VA + 2 * PAGE}
    assert (VA + PAGE in {leaf.va for leaf in executable}) is not has_nx


@pytest.mark.parametrize("bit", [36, 39, 44])
def test_a_bit_above_all_ram_that_guards_a_trimmed_pages_entry_is_no_part_of_its_place(bit) -> None:
    tables = Tables(Mode.LONG4)
    tables.set(VA, 0x40_2000 | TRANSITION | EXECUTE_READ | 1 << bit)  # against L1TF
    assert [leaf.gpa for leaf in tables.leaves((VA, VA + PAGE))] == [0x40_2000]
    tables.set(VA + PAGE, 0x40_3000 | PRESENT | WRITABLE)
    tables.memory.data[0x40_3000:0x40_3008] = (0x40_4000 | TRANSITION | 1 << bit).to_bytes(8, "little")
    assert Prototypes(tables.space).shared(VA + PAGE, [0]) == [0x40_4000]


def test_the_parts_of_a_large_page_that_lie_in_a_region_are_found(tables) -> None:
    size = 1 << tables.shifts[-2]
    va = 2 * size
    tables.set(va, size | PRESENT | USER | LARGE, level=1)
    first, second = (va + PAGE, va + 3 * PAGE), (va + 5 * PAGE, va + 6 * PAGE)
    found = tables.leaves(first, second)
    assert [(leaf.va, leaf.gpa, leaf.size) for leaf in found] == [
        (va + PAGE, size + PAGE, 2 * PAGE),
        (va + 5 * PAGE, size + 5 * PAGE, PAGE),
    ]
    assert [leaf.va for leaf in small_of(found, 99)] == [va + PAGE, va + 2 * PAGE, va + 5 * PAGE]
    assert [[leaf.va for leaf in run] for run in merge(small_of(found, 99))] == [
        [va + PAGE, va + 2 * PAGE],
        [va + 5 * PAGE],
    ]


def test_no_more_small_pages_are_made_of_large_ones_than_asked_for() -> None:
    whole = Leaf(0, 1 << 30, 1 << 30, True, True, True)
    assert [leaf.gpa for leaf in small_of([whole], 2)] == [1 << 30, (1 << 30) + PAGE]
    assert small_of([whole._replace(size=PAGE)] * 3, 2) == [whole._replace(size=PAGE)] * 2


def test_a_right_that_an_upper_table_denies_is_denied() -> None:
    tables = Tables(Mode.LONG4)
    tables.set(VA, 0x40_0000 | PRESENT | USER | WRITABLE, rights=PRESENT | USER)
    assert not tables.leaves((VA, VA + PAGE))[0].writable
    below = int.from_bytes(tables.memory.data[tables.root : tables.root + 8], "little")
    tables.put(tables.root, below | NX)  # as KVA shadow has it: no right is lost
    assert tables.leaves((VA, VA + PAGE), executable=True)[0].executable
    directory = below & 0x000F_FFFF_FFFF_F000
    tables.put(directory, int.from_bytes(tables.memory.data[directory : directory + 8], "little") | NX)
    assert not tables.leaves((VA, VA + PAGE))[0].executable
    assert tables.leaves((VA, VA + PAGE), executable=True) == []


def test_tables_that_are_their_own_tables_cost_no_more_than_the_budget() -> None:
    tables = Tables(Mode.LONG4)
    for index in range(256):
        tables.put(tables.root + 8 * index, tables.root | PRESENT | WRITABLE | USER)
    cut: list[str] = []
    found = tables.leaves((0, 1 << 47), cut=cut)
    assert len(found) < 1 << 20
    assert any(text.startswith("page tables from") for text in cut)


def test_the_shared_page_of_a_view_is_found_by_its_prototype(tables) -> None:
    at = 0x10_0000
    entries = (0x41_0000 | PRESENT, 0x42_0000 | TRANSITION, 0x1234_0000 | PROTOTYPE, 0)
    for number, entry in enumerate(entries):
        tables.put(at + tables.size * number, entry)
    tables.set(VA, at | PRESENT)
    prototypes = Prototypes(tables.space)
    assert prototypes.shared(VA, [0, 1, 2, 3]) == [0x41_0000, 0x42_0000, 0, 0]
    assert prototypes.shared(VA, [PAGE]) == [None]  # its own page is not in memory
    assert prototypes.shared(0, [0]) == [None]
    assert prototypes.shared(VA + 1, [0]) == [None]


def test_a_digest_tells_how_much_of_a_region_it_saw() -> None:
    tables = Tables(Mode.LONG4)
    for number in (1, 2):
        tables.set(VA + number * PAGE, 0x40_0000 + number * PAGE | PRESENT | USER)
    tables.memory.data[0x40_1000:0x40_1004] = struct.pack("<I", 0xDEADBEEF)
    pages, budget = Pages(tables.space), Budget(1 << 10, 5.0, [])
    digest, contents = pages.digest(pages.leaves([(VA, VA + 4 * PAGE)], budget), VA, VA + 4 * PAGE, budget)
    assert str(digest) == f"2 of 4 pages resident, bytes at {VA + PAGE:#x}: efbeadde{'00' * 28}"
    assert (digest.hashed, digest.blank, len(contents)) == (2, False, 2)
    cut: list[str] = []
    spent = Budget(0, 5.0, cut)
    digest, contents = pages.digest(pages.leaves([(VA, VA + 4 * PAGE)], budget), VA, VA + 4 * PAGE, spent)
    assert (digest.sha256, digest.hashed, contents) == (None, 0, [])
    assert cut == [f"bytes of {VA:#x}-{VA + 4 * PAGE:#x}: from {VA + PAGE:#x} on"]
