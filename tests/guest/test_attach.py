"""Attaching to a Linux kernel with nothing but its RAM."""

import contextlib
import json
import time
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError, Implausible, OutOfTime, UnreadableMemory, UnsupportedGuest
from appliance.guest import profile
from appliance.guest.attach import attach
from tests.worlds.tiny import (
    BUILD_ID,
    DATA,
    IMAGE_GPA,
    MB,
    PAGE,
    RAM,
    RODATA,
    TEXT_VA,
    USER_PGD,
    USER_VA,
    VMALLOC,
    ByteMemory,
    Tiny,
)

LAYOUTS = [(layout, signed) for layout in ("old", "seqs", "new") for signed in (True, False)]


@pytest.mark.parametrize(("layout", "signed"), LAYOUTS)
def test_every_layout_of_the_symbol_table_is_read(layout, signed):
    tiny = Tiny(layout=layout, signed=signed)
    kernel = attach(tiny.memory(), cache=False)
    assert {name: kernel.symbols.find(name) for name in tiny.names} == tiny.names
    assert bool(kernel.symbols.tables.seqs) == (layout != "old")
    assert kernel.symbols.find("function_") is None
    assert kernel.symbols.find_prefix("inet_ehash_secret") == tiny.names["inet_ehash_secret.5"]
    assert kernel.symbols.find_prefix("function") is None
    assert kernel.symbols.nearest(tiny.names["function_0300"] + 7) == ("function_0300", 7)


@pytest.mark.parametrize("la57", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_paging_depth_and_direct_map_are_found_with_and_without_a_cr3(la57, known):
    tiny = Tiny(la57=la57)
    kernel = attach(tiny.memory(), cr3=tiny.cr3 | 0x1000 | 0x123 if known else None, cache=False)
    assert (kernel.la57, kernel.page_offset, kernel.image.va, kernel.image.gpa) == (
        la57,
        tiny.page_offset,
        TEXT_VA,
        IMAGE_GPA,
    )
    assert (kernel.release, kernel.build_id) == ("6.1.0-tiny", BUILD_ID.hex())
    assert kernel.read(tiny.names["init_task"], 9) == b"swapper/0"
    assert kernel.read(tiny.page_offset + 12 * MB, 9) == b"OSRELEASE"
    assert kernel.read(VMALLOC[la57] + PAGE - 4, 9) == b"leftright"
    assert kernel.to_gpa(VMALLOC[la57] + PAGE + 5) == 12 * MB + PAGE + 5
    with pytest.raises(UnreadableMemory):
        kernel.read(VMALLOC[la57] + 2 * PAGE, 1)


def test_a_batch_may_mix_all_kinds_of_addresses():
    tiny = Tiny()
    kernel = attach(tiny.memory(), cache=False)
    spans = [
        (tiny.page_offset + 12 * MB, 9),
        (tiny.names["init_task"], 7),
        (VMALLOC[False] + PAGE - 4, 9),
        (VMALLOC[False] + 2 * PAGE, 8),
        (0, 8),
        (-5, 8),
        (1 << 64, 8),
        (tiny.page_offset + RAM, 8),
        (tiny.page_offset, 0),
        (tiny.page_offset, -1),
        (0xDEAD_0000_0000_0000, 8),
        (VMALLOC[False], 1 << 60),
    ]
    nothing = [None] * 5
    assert kernel.readv(spans) == [b"OSRELEASE", b"swapper", b"leftright", *nothing, b"", None, None, None]
    assert kernel.readv([]) == []


def test_user_memory_is_read_through_its_own_tables():
    tiny = Tiny()
    kernel = attach(tiny.memory(), cache=False)
    for pgd in (USER_PGD, tiny.page_offset + USER_PGD):
        assert kernel.read_user(pgd, USER_VA + PAGE - 4, 9) == b"leftright"
        spans = [(USER_VA, 9), (USER_VA + 2 * PAGE, 1), (USER_VA + 2 * PAGE - 1, 2)]
        assert kernel.readv_user(pgd, spans) == [b"OSRELEASE", None, None]
        pages = list(kernel.walk_user_pages(pgd, 0, 1 << 47))
        assert [(page.va, page.gpa, page.present) for page in pages] == [
            (USER_VA, 12 * MB, True),
            (USER_VA + PAGE, 12 * MB + PAGE, True),
            (USER_VA + 2 * PAGE, 0, False),
        ]
        assert [(page.writable, page.user, page.nx) for page in pages[:2]] == [(True, True, True), (False, True, False)]


def test_types_are_resolved_as_c_would():
    types = attach(Tiny().memory(), cache=False).types
    assert types.offset("task_struct.pid") == 8
    assert types.offset("task_struct.tgid") == 32  # in a union in a structure, both without a name
    assert types.offset("task_struct.flags") == 48
    assert types.offset("sock.__sk_common.skc_family") == 4
    assert (types.width("task_struct.comm"), types.length("task_struct.comm")) == (16, 16)
    assert (types.width("task_struct.mm"), types.size("pid_t"), types.size("task_struct")) == (8, 4, 4096)
    assert types.field("sock.sk_bits.second")[:4] == (9, 2, 3, 7)
    assert types.field("old_bits.field")[:4] == (1, 2, 4, 5)
    assert types.enum("pid_type") == {"PIDTYPE_PID": 0, "PIDTYPE_MAX": 4, "NEG": -1}
    assert types.enum("big") == {"BIG": 1 << 32 | 1}
    assert types.has("task_struct.tgid")
    assert not types.has("task_struct.nope")
    assert not types.has("nope")
    assert not types.has("task_struct.mm.pgd")
    with pytest.raises(UnsupportedGuest, match=r"task_struct\.nope"):
        types.offset("task_struct.nope")


def test_types_are_found_without_symbols_that_say_where():
    assert attach(Tiny(marked=False).memory(), cache=False).types.size("task_struct") == 4096


@pytest.mark.parametrize(
    ("tiny", "missing"),
    [
        (Tiny(symbols=False), ["CONFIG_KALLSYMS"]),
        (Tiny(types=False), ["CONFIG_DEBUG_INFO_BTF"]),
        (Tiny(symbols=False, types=False), ["CONFIG_KALLSYMS", "CONFIG_DEBUG_INFO_BTF"]),
    ],
)
def test_what_a_kernel_lacks_is_named(tiny, missing):
    with pytest.raises(UnsupportedGuest) as raised:
        attach(tiny.memory(), cache=False)
    assert len(raised.value.missing) == len(missing)
    for lack, name in zip(raised.value.missing, missing, strict=True):
        assert name in lack
        assert "6.1.0-tiny" in lack


def test_ram_without_a_kernel_is_told_so():
    with pytest.raises(UnsupportedGuest, match="no running x86-64 Linux kernel"):
        attach(ByteMemory(bytes(4 * MB)), cache=False)


def test_a_kernel_that_begins_otherwise_is_found_by_its_tables_alone():
    tiny = Tiny()
    tiny.put(IMAGE_GPA, bytes(64))
    assert attach(tiny.memory(), cache=False).release == "6.1.0-tiny"


def test_tables_that_contradict_the_symbols_are_not_believed():
    tiny = Tiny()
    tiny.put(IMAGE_GPA + DATA + 0x6000, (0xFFFF_9000_0000_0000).to_bytes(8, "little"))
    with pytest.raises(Implausible, match="direct map"):
        attach(tiny.memory(), cache=False)


# -- profiles --


def test_a_second_attach_uses_the_profile_and_finds_the_same(tmp_path, monkeypatch):
    for layout in ("old", "seqs", "new"):
        folder = tmp_path / layout
        tiny = Tiny(layout=layout)
        first = attach(tiny.memory(), cache_dir=folder)
        first.symbols.find("init_task")
        with monkeypatch.context() as patched:
            patched.setattr("appliance.guest.attach._attach_cold", None)
            second = attach(tiny.memory(), cache_dir=folder)
        assert {name: second.symbols.find(name) for name in tiny.names} == tiny.names
        assert second.types.offset("task_struct.tgid") == 32
        assert (second.release, second.build_id) == (first.release, first.build_id)
        assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "writable", "folder"])
def test_a_damaged_or_foreign_profile_is_not_used(tmp_path, damage):
    folder = tmp_path / "profiles"
    tiny = Tiny()
    attach(tiny.memory(), cache_dir=folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[:-9])
        case "flip":
            path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text(json.dumps({"release": "x"}))
        case "writable":
            path.chmod(0o666)
        case "folder":
            folder.chmod(0o777)
    image = attach(tiny.memory(), cache=False).image
    assert profile.load(folder, tiny.memory(), image) is None
    assert attach(tiny.memory(), cache_dir=folder).symbols.find("init_task") == tiny.names["init_task"]
    if damage not in {"writable", "folder"}:
        assert path.read_bytes() == whole


def test_a_profile_that_the_guest_does_not_bear_out_is_not_used(tmp_path):
    attach(Tiny().memory(), cache_dir=tmp_path / "p")
    other = Tiny(layout="new")  # the same build id, another content
    assert attach(other.memory(), cache_dir=tmp_path / "p").symbols.find("init_task") == other.names["init_task"]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert attach(Tiny().memory(), cache_dir=blocked / "profiles").release == "6.1.0-tiny"


# -- the guest is an adversary --

TINY = Tiny()
INTERESTING = sorted({page for page in range(RAM // PAGE) if any(TINY.ram[page * PAGE : (page + 1) * PAGE])})
WORDS = st.sampled_from(
    [0, 1, 0xFFFF_FFFF_FFFF_FFFF, TEXT_VA, TINY.page_offset, TINY.cr3 | 0x67, USER_PGD | 0x67, 0xE7]
)


@st.composite
def contents(draw):
    kind = draw(st.sampled_from(["bytes", "words", "copy", "tables", "flip"]))
    page = draw(st.sampled_from(INTERESTING))
    if kind == "bytes":
        return page, (draw(st.binary(min_size=1, max_size=64)) * PAGE)[:PAGE]
    if kind == "words":
        words = draw(st.lists(WORDS, min_size=1, max_size=8))
        return page, (b"".join(word.to_bytes(8, "little") for word in words) * PAGE)[:PAGE]
    if kind == "copy":
        source = draw(st.sampled_from(INTERESTING))
        return page, bytes(TINY.ram[source * PAGE : (source + 1) * PAGE])
    if kind == "tables":  # every entry points back to this very page
        return page, (page * PAGE | draw(st.sampled_from([0x67, 0x63, 0xE7]))).to_bytes(8, "little") * 512
    whole = bytearray(TINY.ram[page * PAGE : (page + 1) * PAGE])
    for place in draw(st.lists(st.integers(0, PAGE - 1), min_size=1, max_size=16)):
        whole[place] ^= draw(st.integers(1, 255))
    return page, bytes(whole)


def use(memory, cr3=None):
    """Everything one does with a kernel."""
    kernel = attach(memory, cr3=cr3, cache=False)
    for act in (
        lambda: kernel.read(VMALLOC[False] + PAGE - 4, 9),
        lambda: kernel.readv([(kernel.page_offset, 8), (kernel.image.va, 8), (VMALLOC[False], 5000)]),
        lambda: kernel.read_user(USER_PGD, USER_VA, 2 * PAGE),
        lambda: list(islice(kernel.walk_user_pages(USER_PGD, 0, 1 << 47), 5000)),
        lambda: [kernel.symbols.find(name) for name in ("init_task", "tcp_hashinfo", "function_0699")],
        lambda: kernel.symbols.find_prefix("inet_ehash_secret"),
        lambda: kernel.symbols.nearest(TEXT_VA + 0x300),
        lambda: [kernel.types.has(path) for path in ("task_struct.tgid", "sock.sk_bits.second", "pid_t")],
        lambda: kernel.types.enum("pid_type"),
        lambda: kernel.types.size("task_struct"),
    ):
        with contextlib.suppress(GuestError):
            act()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(contents(), min_size=1, max_size=3), known=st.booleans())
def test_whatever_a_page_holds_attaching_and_reading_ends_with_a_kernel_or_a_guest_error(changes, known):
    memory = TINY.memory()
    for page, content in changes:
        memory.data[page * PAGE : (page + 1) * PAGE] = content
    began = time.monotonic()
    with contextlib.suppress(GuestError):
        use(memory, TINY.cr3 if known else None)
    assert time.monotonic() - began < 10


@settings(max_examples=50, deadline=None)
@given(hole=st.sampled_from(INTERESTING))
def test_a_page_that_cannot_be_read_is_a_guest_error_at_worst(hole):
    with contextlib.suppress(GuestError):
        use(ByteMemory(TINY.ram, [hole]), TINY.cr3)


def test_rodata_full_of_look_alikes_does_not_take_for_ever():
    tiny = Tiny(symbols=False)
    table = b"".join(bytes([code]) + b"\0" if 32 < code < 127 else b"?\0" for code in range(256))
    index = b"".join((2 * number).to_bytes(2, "little") for number in range(256))
    fill = (table + index + TEXT_VA.to_bytes(8, "little") * 64) * 2000
    tiny.put(IMAGE_GPA + RODATA + 0x100000, fill[:MB])
    began = time.monotonic()
    with pytest.raises(GuestError):
        attach(tiny.memory(), cache=False)
    assert time.monotonic() - began < 10


def test_reads_end_at_their_deadline():
    tiny = Tiny()
    kernel = attach(tiny.memory(), cache=False)
    va = tiny.names["init_task"]
    now = [0.0]
    with kernel.limit(2.0, lambda: now[0]):
        now[0] = 1.9
        assert kernel.readv([(va, 9)]) == [kernel.read(va, 9)]
        now[0] = 2.1
        with pytest.raises(OutOfTime):
            kernel.read(va, 9)
        with pytest.raises(OutOfTime):
            kernel.readv([(va, 9)])
    assert kernel.read(va, 9) == b"swapper/0"
