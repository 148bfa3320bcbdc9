"""Where a Xen guest has its RAM: the shapes that libxl and hvmloader make, whole and ballooned."""

import random
from itertools import pairwise

import pytest

from appliance.memory.xenmap import (
    BLOCK,
    HIGH,
    MAX_RUNS,
    PAGE,
    SAMPLES,
    VGA_HOLE,
    find_populated,
    find_regions,
    sample,
)
from appliance.model import Region

GIB = 1 << 18  # frames
PVH_END, HVM_END = 0xFEE00, 0xF0000
SPECIAL = range(0xFEFF8, 0xFF000)  # console, xenstore and their like
VIDEO = range(0xF0000, 0xF1000)


class Frames:
    """Which frames a guest has, and how often somebody asked."""

    def __init__(self, *runs, without=frozenset()):
        self.runs, self.without, self.asked = runs, without, 0

    def __call__(self, frames):
        assert 0 < len(frames) <= SAMPLES
        self.asked += 1
        return [frame not in self.without and any(frame in run for run in self.runs) for frame in frames]


def shape(regions):
    return [(region.gpa // PAGE, (region.gpa + region.size) // PAGE) for region in regions]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "runs",
    [
        [(0, 32768)],
        [(0, 98304)],
        [(0, 1)],
        [(0, 3 * GIB)],
        [(0, HVM_END)],
        [(0, 1 * GIB), (HIGH, HIGH + 3 * GIB)],  # mmio_hole=3072
        [(0, 0xE0000), (HIGH, HIGH + 0x20000)],  # hvmloader moved some up
        [(0, HVM_END), (HIGH, HIGH + 1)],
        [(0, HVM_END), (HIGH, HIGH + 8 * GIB - HVM_END)],
        [(0, HVM_END), (HIGH, HIGH + 1 << 12)],
    ],
)
def test_the_edges_of_ram_are_found_to_the_page(runs, known):
    frames = Frames(*(range(*run) for run in runs), SPECIAL)
    total = sum(end - start for start, end in runs)
    last = max(runs[-1][1] - 1, SPECIAL[-1])
    assert shape(find_regions(frames, total * PAGE if known else None, last)) == runs
    assert frames.asked < 20


def test_a_pvh_guest_has_ram_up_to_its_interrupt_controller():
    frames = Frames(range(PVH_END), range(HIGH, HIGH + GIB), SPECIAL)
    assert shape(find_regions(frames, (PVH_END + GIB) * PAGE, 0)) == [(0, PVH_END), (HIGH, HIGH + GIB)]


def test_a_hole_for_the_screen_is_no_ram_where_the_guest_has_one():
    frames = Frames(range(VGA_HOLE.start), range(VGA_HOLE.stop, GIB), VIDEO, SPECIAL)
    assert shape(find_regions(frames, GIB * PAGE, 0)) == [(0, 0xA0), (0xC0, GIB)]


def test_video_memory_behind_the_end_of_ram_is_none():
    frames = Frames(range(HVM_END), VIDEO, SPECIAL, range(HIGH, HIGH + GIB))
    assert shape(find_regions(frames, (HVM_END + GIB) * PAGE, 0)) == [(0, HVM_END), (HIGH, HIGH + GIB)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_balloon_never_hides_ram_that_is_there(share):
    """Whatever is missing, no frame that can be read lies outside the regions, which are not much too large."""
    for runs in (
        [range(49152)],
        [range(HVM_END), range(HIGH, HIGH + GIB)],
        [range(PVH_END), range(HIGH, HIGH + 2 * GIB)],
    ):
        total = sum(map(len, runs))
        missing = range(runs[-1].start + round(len(runs[-1]) * (1 - share)), runs[-1].stop)
        for without in (missing, set(random.Random(1).sample(range(49152), round(49152 * share)))):
            regions = find_regions(Frames(*runs, without=without), total * PAGE, 0)
            assert sum(region.size for region in regions) <= 2 * total * PAGE
            for run in runs:
                for frame in {run.start, run.stop - 1, *random.Random(2).sample(run, 500)} - set(without):
                    assert any(start <= frame < end for start, end in shape(regions)), hex(frame)


def test_a_guest_without_any_frame_has_no_ram():
    assert find_regions(Frames(), None, 0xFEFFF) == ()


def test_samples_are_spread_over_all_ram():
    regions = (Region(0, 0xA0 * PAGE), Region(0xC0 * PAGE, GIB * PAGE), Region(HIGH * PAGE, GIB * PAGE))
    found = sample(regions)
    assert SAMPLES // 2 < len(found) <= SAMPLES
    assert all(any(r.gpa <= frame * PAGE < r.gpa + r.size for r in regions) for frame in found)
    assert max(after - before for before, after in pairwise(found) if after < HIGH) < 2048
    assert sample((Region(0, 10 * PAGE),)) == list(range(10))


def areas(*runs):
    return [Region(first * PAGE, (end - first) * PAGE) for first, end in runs]


def test_a_block_with_one_frame_is_populated_and_one_without_any_is_not():
    frames = Frames(range(BLOCK), range(3 * BLOCK + 5, 3 * BLOCK + 6), range(HIGH, HIGH + 40 * BLOCK))
    found = find_populated(frames, areas((0, 4 * BLOCK + 7), (HIGH, HIGH + 41 * BLOCK)), lambda: False)
    assert shape(found) == [(0, BLOCK), (3 * BLOCK, 4 * BLOCK), (HIGH, HIGH + 40 * BLOCK)]
    assert frames.asked < 2 + 4 + 3 + 1


def test_neither_the_regions_nor_the_questions_are_as_many_as_a_guest_likes():
    end = 2 * 3 * MAX_RUNS * BLOCK  # 96 GiB

    def probe(frames):
        asked.append(len(frames))
        return [frame // BLOCK % 2 == 0 for frame in frames]

    asked = []
    found = find_populated(probe, areas((0, end)), lambda: False)
    assert len(found) <= MAX_RUNS + 16
    assert sum(region.size for region in found) >= end // 2 * PAGE
    assert shape(found)[-1][1] == end
    steps = len(asked)
    asked.clear()
    found = find_populated(probe, areas((0, end), (end + 1, end + 2)), lambda: len(asked) > steps // 2)
    assert shape(found)[-2:] == [(shape(found)[-2][0], end), (end + 1, end + 2)]
    assert len(asked) < steps // 2 + 20
