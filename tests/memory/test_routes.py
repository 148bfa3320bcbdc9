"""Which way a guest's memory is read, and how fast a way is."""

import contextlib

import pytest

from appliance.errors import UsageError
from appliance.model import GuestId, GuestInfo, Region
from appliance.routes import PAGE, ROUTES, choose, measure, open_memory
from tests.worlds.tiny import ByteMemory

BOTH = GuestInfo(GuestId("qemu:1", "u"), pid=1, routes=("qemu", "libvirt"))


class SlowMemory(ByteMemory):
    """Each call takes a millisecond of `clock`, and each page of a batch a tenth of one."""

    now = 0.0
    touched: set[int]

    def __init__(self, *args):
        super().__init__(*args)
        self.touched = set()

    def clock(self):
        return self.now

    def read(self, gpa, size):
        self.now += 0.001
        self.touched.add(gpa // PAGE)
        return super().read(gpa, size)

    def readv(self, spans):
        self.now += 0.001 + 0.0001 * len(spans)
        before = self.now
        found = super().readv(spans)
        self.now = before
        return found


class HangingMemory(SlowMemory):
    """Every call takes three seconds."""

    def readv(self, spans):
        self.now += 3
        return [None] * len(spans)

    def read(self, gpa, size):
        self.now += 3
        return bytes(size)


class SparseMemory(SlowMemory):
    """Only one of its pages was ever used."""

    def data_regions(self):
        return (Region(3 * PAGE + 100, 2 * PAGE),)


def test_the_best_route_is_taken_unless_another_is_named():
    assert choose(BOTH) == "qemu"
    assert choose(BOTH, "libvirt") == "libvirt"


@pytest.mark.parametrize("route", [*(set(ROUTES) - {"qemu", "libvirt"}), "carrier-pigeon"])
def test_a_route_that_a_guest_does_not_have_is_refused_with_those_it_has(route):
    with pytest.raises(UsageError, match=f"cannot be read by '{route}'.*; its routes are: qemu, libvirt"):
        choose(BOTH, route)


def test_a_guest_without_routes_has_no_memory_to_read():
    with pytest.raises(UsageError, match="only its packets can be watched"):
        open_memory(GuestInfo(GuestId("port:vnet0")))


def test_an_image_is_read_by_each_of_its_routes_alike(tmp_path):
    pytest.importorskip("libvmi")
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 64)
    info = GuestInfo(GuestId(f"file:{path}"), routes=("file", "libvmi"))
    for route in info.routes:
        with contextlib.closing(open_memory(info, route)) as memory:
            assert (memory.name, memory.read(255, 3)) == (route, b"\xff\0\1")


def test_a_route_is_measured_in_bounded_time():
    memory = SlowMemory(bytes(64 * PAGE))
    rate = measure(memory, seconds=1.0, clock=memory.clock)
    assert rate.reads_per_s == pytest.approx(1000)
    assert 8000 < rate.pages_per_s < 10_000  # batches of 1024 would give 9,900; they grow to that
    assert memory.now < 2.5
    slow = HangingMemory(bytes(PAGE))
    assert measure(slow, clock=slow.clock).pages_per_s == 0
    assert slow.now == 6


def test_only_whole_pages_that_were_used_are_touched():
    memory = SparseMemory(bytes(64 * PAGE), [10])
    measure(memory, seconds=0.1, clock=memory.clock)
    assert memory.touched == {4}


def test_unreadable_pages_do_not_count():
    memory = SlowMemory(bytes(2 * PAGE), [0, 1])
    assert measure(memory, seconds=0.1, clock=memory.clock).pages_per_s == 0
