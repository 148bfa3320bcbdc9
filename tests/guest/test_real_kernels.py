"""Attaching to real guests: every machine, size, kind of RAM and paging depth that is promised."""

import contextlib
import fcntl
import os
import random
import time
from pathlib import Path

import pytest

from appliance.errors import GuestError, GuestGone, UnreadableMemory
from appliance.guest.attach import attach
from appliance.memory import qmp
from appliance.memory.file import open_file
from appliance.memory.layout import LEGACY_HOLE
from appliance.memory.qemu import open_qemu
from lab.guest import boot
from lab.image import build

pytestmark = pytest.mark.system
PAGE = 4096
SHAPES = {
    "pc-1g-plain": ("debian-12-cloud", {"memory_mb": 1024, "machine": "pc"}),
    "q35-5g-memfd-4-levels": (
        "debian-12-cloud-6.12",
        {"memory_mb": 5120, "machine": "q35", "shared": "memfd", "cpu": "max,la57=off"},
    ),
    "pc-5g-plain-rt": ("debian-12-rt", {"memory_mb": 5120, "machine": "pc"}),
    "q35-1g-file": ("debian-12-backport", {"memory_mb": 1024, "machine": "q35", "shared": "file"}),
    "q35-4g-plain-oldest": ("debian-12-old", {"memory_mb": 4096, "machine": "q35", "cpu": "max,la57=off", "cpus": 2}),
}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request, network):
    image, options = SHAPES[request.param]
    with boot(build(image), network, name="shape", **options) as booted:
        yield booted, options


@pytest.fixture
def memory(shaped):
    opened = open_qemu(shaped[0].pid)
    yield opened
    opened.close()


def monitor(guest, line):
    return guest.qmp("human-monitor-command", **{"command-line": line})


def cr3_of(guest):
    return qmp.parse_registers(monitor(guest, "info registers -a"))[0].cr3


def symbols_of(guest):
    found = {}
    text = guest.run("echo 0 > /proc/sys/kernel/kptr_restrict; cat /proc/kallsyms", timeout_s=200).stdout
    for line in text.splitlines():
        address, _, name, *module = line.split()
        if not module:
            found.setdefault(name, set()).add(int(address, 16))
    return found


def test_the_map_is_the_one_qemu_has(shaped, memory):
    guest, options = shaped
    hole_start, hole_end = LEGACY_HOLE
    flat = qmp.parse_flat_view(monitor(guest, "info mtree -f"))
    names = {"pc.ram", "ram0"}
    expected = set()
    for region, name, _ in flat:
        if name in names and not (hole_start <= region.gpa < hole_end):
            end = region.gpa + region.size
            expected.add((region.gpa, hole_start if region.gpa == 0 else end))
    assert {(region.gpa, region.gpa + region.size) for region in memory.regions} == expected
    for region in memory.regions:
        for gpa in (region.gpa, region.gpa + region.size - PAGE):
            told = qmp.parse_host_address(monitor(guest, f"gpa2hva {gpa:#x}"))
            assert memory._translate(gpa, PAGE) == told
        with pytest.raises(UnreadableMemory):
            memory.read(region.gpa + region.size - 4, 8)
    assert memory.name == ("qemu-shared" if options.get("shared") else "qemu")


def test_every_symbol_has_the_address_the_guest_itself_prints(shaped, memory):
    guest, options = shaped
    kernel = attach(memory, cache=False)
    truth = symbols_of(guest)
    mine = {}
    for index in range(len(kernel.symbols)):
        mine.setdefault(kernel.symbols.name(index).decode(), set()).add(kernel.symbols.address(index))
    assert mine == truth
    for name in random.Random(1).sample(sorted(truth), 300):
        assert kernel.symbols.find(name) in truth[name]
    assert kernel.release == guest.run("uname -r").stdout.strip()
    assert kernel.la57 == ("la57=off" not in options.get("cpu", "max"))


def test_cold_and_warm_with_and_without_registers_give_the_same_kernel(shaped, memory, tmp_path):
    guest, _ = shaped
    cr3 = cr3_of(guest)
    seen = set()
    for known in (cr3, None):
        for cache_dir in (tmp_path / str(known), tmp_path / str(known)):
            kernel = attach(memory, cr3=known, cache_dir=cache_dir)
            symbols = [kernel.symbols.find(name) for name in ("init_task", "init_net", "page_offset_base")]
            offsets = [kernel.types.offset(path) for path in ("task_struct.pid", "sock.sk_socket", "mm_struct.pgd")]
            identity = (kernel.release, kernel.build_id, kernel.image, kernel.root, kernel.la57, kernel.page_offset)
            seen.add((*identity, *symbols, *offsets))
    assert len(seen) == 1


def test_reads_by_every_way_agree(shaped, memory):
    kernel = attach(memory)
    inits = [kernel.symbols.get(name) for name in ("init_task", "linux_banner", "init_net")]
    image, direct = kernel.image, kernel.page_offset
    for va in inits:
        assert kernel.read(va, 16) == kernel.read(va - image.va + image.gpa + direct, 16)
    banner = kernel.symbols.get("linux_banner")
    assert kernel.readv([(banner, 13), (banner - image.va + image.gpa + direct, 13)]) == [b"Linux version"] * 2
    assert kernel.read_user(kernel.root, banner, 13) == b"Linux version"  # by a walk of the tables
    assert kernel.readv_user(kernel.root, [(banner, 13), (0, 1)]) == [b"Linux version", None]
    comm = kernel.types.offset("task_struct.comm")
    assert kernel.read_text(inits[0] + comm, 16) == b"swapper/0"


def test_everything_is_open_for_reading_only(shaped, memory):
    attach(memory)
    seen = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = str(link.readlink())
            if f"/{shaped[0].pid}/" in path or "memfd" in path or path.endswith("/ram"):
                seen += 1
                assert fcntl.fcntl(int(link.name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert seen
    assert shaped[0].qmp("query-status")["status"] == "running"


class Overlay:
    """Guest memory with some pages replaced."""

    live = False
    name = "overlay"

    def __init__(self, memory, pages):
        self.memory, self.pages, self.regions = memory, pages, memory.regions

    def read(self, gpa, size):
        data = self.memory.read(gpa, size)
        touched = [page for page in range(gpa // PAGE, (gpa + size - 1) // PAGE + 1) if page in self.pages]
        if touched:
            data = bytearray(data)
            for page in touched:
                start, end = max(gpa, page * PAGE), min(gpa + size, (page + 1) * PAGE)
                data[start - gpa : end - gpa] = self.pages[page][start % PAGE : start % PAGE + end - start]
        return bytes(data)

    def readv(self, spans):
        found = []
        for gpa, size in spans:
            try:
                found.append(self.read(gpa, size))
            except UnreadableMemory:
                found.append(None)
        return found


def test_with_any_page_replaced_attaching_ends_with_a_kernel_or_a_guest_error(shaped, memory):
    guest, _ = shaped
    cr3, kernel, source = cr3_of(guest), attach(memory), random.Random(3)
    tables = [
        kernel.symbols.get(name) for name in ("init_top_pgt", "level3_kernel_pgt", "level2_kernel_pgt", "init_task")
    ]
    likely = [(va - kernel.image.va + kernel.image.gpa) // PAGE for va in tables] + [cr3 // PAGE]
    began, ended = time.monotonic(), 0
    while time.monotonic() - began < 5:
        within = kernel.image.gpa // PAGE + source.randrange(kernel.image.size // PAGE)
        page = source.choice([*likely, within, within, within])
        content = source.choice(
            [bytes(PAGE), b"\xff" * PAGE, source.randbytes(PAGE), (page * PAGE | 0x67).to_bytes(8, "little") * 512]
        )
        # A damaged CR3 is replaced by the search through all RAM, whose bound is proven in miniature elsewhere.
        with contextlib.suppress(GuestError):
            other = attach(Overlay(memory, {page: content}), cr3=cr3, cache=False)
            other.symbols.find("tcp_hashinfo")
            other.types.has("task_struct.pid")
            other.read(kernel.symbols.get("init_task"), 64)
        ended += 1
    assert ended


def test_a_dump_and_a_raw_image_give_the_same_kernel_as_the_running_guest(network, tmp_path):
    with boot(build("debian-12-cloud"), network, name="dumped", memory_mb=512) as guest:
        memory = open_qemu(guest.pid)
        live = attach(memory)
        core, raw = tmp_path / "core", tmp_path / "raw"
        guest.qmp("dump-guest-memory", paging=False, protocol=f"file:{core}")
        guest.qmp("pmemsave", val=0, size=512 << 20, filename=str(raw))
        for path in (core, raw):
            image = open_file(path)
            cpus = image.vcpus()
            assert bool(cpus) == (path == core)
            for cr3 in {None, cpus[0].cr3 if cpus else None}:
                kernel = attach(image, cr3=cr3, cache=False)
                assert (kernel.image, kernel.root, kernel.page_offset) == (live.image, live.root, live.page_offset)
                assert kernel.symbols.find("init_net") == live.symbols.find("init_net")
            init = live.symbols.get("init_task")
            assert kernel.read(init, 64)[24:64] == live.read(init, 64)[24:64]
            image.close()
        whole = core.read_bytes()
        core.write_bytes(whole[: len(whole) - (100 << 20)])
        cut = open_file(core)
        assert "are missing" in cut.gaps[0].why
        guest.close()
        for act in (memory.check_alive, lambda: live.u64(init), lambda: live.readv([(init, 8)])):
            with pytest.raises(GuestGone):
                act()
        memory.close()
