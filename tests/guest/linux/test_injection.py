"""What in a process is foreign, in worlds made of bytes: each finding, each excuse, and each lie."""

import hashlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.errors import GuestError
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.injection import Injection, find_foreign
from appliance.guest.linux.injection_files import find_runtime, odd_place
from appliance.guest.linux.injection_threads import is_call
from appliance.model import Evidence
from tests.worlds.injected import DIRECT, PAGE, RAM, World

R, RW, RX, RWX = 1, 3, 5, 7
LIBRARY = 0x7F10_0000_0000


def only(found: tuple[Evidence, ...], kind: str) -> Evidence:
    matching = [one for one in found if one.kind == kind]
    assert len(matching) == 1, found
    return matching[0]


def test_an_ordinary_process_has_nothing_foreign() -> None:
    world = World()
    libc = world.file("/usr/lib/x86_64-linux-gnu/libc.so.6")
    gpa = world.page(b"code", mapping=world.mapping_of(libc))
    world.vma(LIBRARY, 4, RX, libc, [gpa])
    world.vma(0x7F20_0000_0000, 16, RW)
    world.vma(0x7FFF_F000_0000, 2, RX, vm_ops=world.kernel.symbols.special)
    assert world.look() == ()


def test_executable_memory_of_no_file_is_told_with_its_bytes_and_hash() -> None:
    world = World()
    content = b"\xc3".ljust(PAGE, b"\0")
    world.vma(LIBRARY, 2, RWX, resident=[world.page(content, mapping=DIRECT | 1)])
    found = only(world.look(), "anon-exec")
    assert (found.address, found.size, found.weight) == (LIBRARY, 2 * PAGE, 2)
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert found.detail == f"rwxp; 1 of 2 pages resident, bytes at {LIBRARY:#x}: c3{'00' * 15}; no file"


@pytest.mark.parametrize(("flags", "content", "weight"), [(RX, b"", 1), (RX, b"\x90", 2), (RWX, b"", 2)])
def test_executable_memory_weighs_more_when_it_is_writable_or_filled(flags: int, content: bytes, weight: int) -> None:
    world = World()
    world.vma(LIBRARY, 1, flags, resident=[world.page(content, mapping=DIRECT | 1)])
    assert only(world.look(), "anon-exec").weight == weight


@pytest.mark.parametrize(("content", "start", "weight"), [(b"\x90", 0, 1), (b"\x7fELF", 0, 2), (b"\x90", LIBRARY, 2)])
def test_a_jit_may_have_executable_memory_but_no_elf_image_and_no_thread_in_it(
    content: bytes, start: int, weight: int
) -> None:
    world = World()
    world.vma(0x7F20_0000_0000, 4, RX, world.file("/usr/lib/jvm/java-17/lib/server/libjvm.so"))
    world.vma(LIBRARY, 4, RWX, resident=[world.page(content, mapping=DIRECT | 1)])
    world.thread(101, 0x400020, start=start)
    assert only(world.look(), "anon-exec").weight == weight


def test_pcre_may_have_a_chunk_of_its_own_form_only() -> None:
    for size, header, weight in (
        (16, (640).to_bytes(8, "little"), 1),
        (16, bytes(32) + (0xFAC0).to_bytes(8, "little"), 1),
        (1, (640).to_bytes(8, "little"), 2),
        (16, b"\x90" * 16, 2),
    ):
        world = World()
        world.vma(0x7F20_0000_0000, 4, RX, world.file("/usr/lib/x86_64-linux-gnu/libpcre2-8.so.0.11.2"))
        world.vma(LIBRARY, size, RWX, resident=[world.page(header, mapping=DIRECT | 1)])
        assert only(world.look(), "anon-exec").weight == weight


def test_a_library_in_shared_memory_and_the_thread_it_started_are_named() -> None:
    world = World()
    parasite = world.file("/dev/shm/.x/libparasite.so")
    world.vma(LIBRARY, 1, RX, parasite, [world.page(b"code", mapping=world.mapping_of(parasite))])
    world.thread(101, 0x400020, start=LIBRARY + 0x40)
    found = world.look()
    assert only(found, "odd-path").weight == 2
    thread = only(found, "foreign-thread")
    assert (thread.address, thread.weight) == (LIBRARY + 0x40, 2)
    assert thread.claim == "thread 101 (program) began in /dev/shm/.x/libparasite.so"


def test_a_thread_that_runs_in_injected_code_or_in_no_code_at_all_is_named() -> None:
    world = World()
    world.vma(LIBRARY, 1, RWX)
    world.vma(0x7F20_0000_0000, 1, RW)
    for tid, rip in ((101, LIBRARY + 8), (102, 0x7F20_0000_0010), (103, 0x1234_5000), (104, 0xFFFF_FFFF_FF60_0002)):
        world.thread(tid, rip)
    found = [one for one in world.look() if one.kind == "foreign-thread"]
    assert [(one.address, one.weight) for one in found] == [
        (LIBRARY + 8, 2),
        (0x7F20_0000_0010, 2),
        (0x1234_5000, 2),
    ]


def test_a_return_address_into_injected_code_is_a_hint() -> None:
    world = World()
    code = b"\x90" * 16 + b"\xe8\0\0\0\0"
    world.vma(LIBRARY, 1, RWX, resident=[world.page(code, mapping=DIRECT | 1)])
    stack = bytes(256) + (LIBRARY + 21).to_bytes(8, "little")
    world.vma(0x7F30_0000_0000, 2, RW, resident=[world.page(stack, mapping=DIRECT | 1)])
    world.thread(101, 0x400020, 0x7F30_0000_0010)
    found = only(world.look(), "foreign-thread")
    assert (found.address, found.weight) == (0x7F30_0000_0100, 1)


def test_threads_of_the_kernel_are_left_alone() -> None:
    world = World()
    world.put(world.thread(101, 0, 0), "task_struct.flags", 0x10)
    assert world.look() == ()


@pytest.mark.parametrize(
    ("path", "more", "kinds"),
    [
        ("/usr/lib/libold.so", {"unlinked": True, "links": 0}, {"deleted-file": 1}),
        ("/tmp/libx.so", {"unlinked": True, "links": 0}, {"odd-path": 2, "deleted-file": 2}),
        ("memfd:stage2", {"pseudo": True, "links": 0}, {"memfd": 2}),
        ("memfd:doublemapper", {"pseudo": True, "links": 0}, {"memfd": 1}),
        ("dev/zero", {"pseudo": True, "links": 0}, {"anon-exec": 1}),
        ("/srv/x/libx.so", {}, {"odd-path": 1}),
        ("/usr/lib/.cache/libx.so", {}, {"odd-path": 2}),
    ],
)
def test_a_file_that_code_should_not_come_from_is_told(path: str, more: dict[str, int], kinds: dict[str, int]) -> None:
    world = World()
    world.vma(LIBRARY, 1, RX, world.file(path, **more))
    assert {one.kind: one.weight for one in world.look()} == kinds


def test_code_of_a_file_that_is_mapped_writable_is_told() -> None:
    world = World()
    world.vma(LIBRARY, 1, RWX, world.file("/usr/lib/libx.so"))
    assert only(world.look(), "writable-exec-file").weight == 2


def test_a_program_that_was_replaced_is_told_once() -> None:
    world = World()
    program = world.file("/usr/sbin/program", unlinked=True, links=0)
    world.put(world.mm, "mm_struct.exe_file", program)
    world.vma(LIBRARY, 1, RX, program)
    assert [(one.kind, one.weight) for one in world.look()] == [("deleted-executable", 1)]


def changed(old: bytes, new: bytes, *, cached: bool = True) -> tuple[Evidence, ...]:
    world = World()
    libc = world.file("/usr/lib/x86_64-linux-gnu/libc.so.6")
    if cached:
        world.cache(libc, old, 3)
    same = world.page(b"same", mapping=world.mapping_of(libc))
    copy = world.page(new, mapping=DIRECT + 0x500 | 1)
    world.vma(LIBRARY, 4, RX, libc, [same, copy], vm_pgoff=2)
    return world.look()


def test_a_changed_byte_of_code_is_found_at_its_page_and_compared_with_the_file() -> None:
    found = only(changed(b"\x55\x48\x89\xe5", b"\x55\xe9\x89\xe5"), "modified-text")
    assert (found.address, found.size, found.weight) == (LIBRARY + PAGE, PAGE, 2)
    assert found.claim.endswith("was changed in memory: 1 byte differs from the file")
    assert found.detail is not None
    assert "+0x1 48 to e9" in found.detail
    assert "file offset 0x3000" in found.detail
    assert found.sha256 == hashlib.sha256(b"\x55\xe9\x89\xe5".ljust(PAGE, b"\0")).hexdigest()


def test_breakpoints_restored_bytes_and_unknown_originals_are_told_apart() -> None:
    assert only(changed(b"\x55", b"\xcc"), "modified-text").weight == 1
    assert only(changed(b"\x55", b"\x55"), "modified-text").weight == 0
    assert only(changed(b"\x55", b"\xe9", cached=False), "modified-text").weight == 2


def test_text_relocations_are_told_apart() -> None:
    elf = bytearray(PAGE)
    elf[:6] = b"\x7fELF\2\1"
    elf[32:40], elf[56:58] = (64).to_bytes(8, "little"), (1).to_bytes(2, "little")
    elf[64:68] = (2).to_bytes(4, "little")
    elf[72:80], elf[96:104] = (512).to_bytes(8, "little"), (32).to_bytes(8, "little")
    elf[512:520] = (22).to_bytes(8, "little")
    world = World()
    library = world.file("/usr/lib/librelocated.so")
    world.cache(library, bytes(elf), 0)
    copy = bytearray(elf)
    copy[1000] = 1
    world.vma(LIBRARY, 1, RX, library, [world.page(bytes(copy), mapping=DIRECT | 1)])
    assert only(world.look(), "modified-text").weight == 1


def test_a_page_of_a_large_folio_is_judged_by_its_head() -> None:
    world = World()
    libc = world.file("/usr/lib/libc.so.6")
    head = world.page(b"head", mapping=world.mapping_of(libc))
    tail = world.page(b"tail", mapping=0xDEAD_0000_0000_0401)
    at = world.kernel.vmemmap + tail // PAGE * 64
    world.kernel.memory.ram[at + 8 : at + 16] = (world.struct_page(head) + 1).to_bytes(8, "little")
    world.vma(LIBRARY, 2, RX, libc, [head, tail])
    assert world.look() == ()


def test_a_tracer_and_a_preloaded_library_are_told() -> None:
    world = World()
    world.thread(101, 0x400020, ptrace=1)
    raw = b"PATH=/bin\0LD_PRELOAD=/tmp/x.so\0LD_AUDIT=\0"
    world.kernel.user[0x7FF0_0000_0000] = world.page(raw)
    world.put(world.mm, "mm_struct.env_start", 0x7FF0_0000_0000)
    world.put(world.mm, "mm_struct.env_end", 0x7FF0_0000_0000 + len(raw))
    found = world.look()
    preload = only(found, "ld-preload")
    assert (preload.address, preload.detail, preload.weight) == (0x7FF0_0000_000A, "LD_PRELOAD=/tmp/x.so", 2)
    tracer = only(found, "ptrace")
    assert (tracer.detail, tracer.weight) == ("tracer 100 program; threads 101", 1)


def test_a_process_that_ended_is_told_and_a_kernel_thread_has_nothing() -> None:
    world = World()
    world.put(world.task, "task_struct.start_boottime", 8)
    assert [(one.kind, one.weight) for one in world.look()] == [("gap", 0)]
    world = World()
    world.put(world.task, "task_struct.flags", 0x200000)
    assert world.look() == ()


def test_the_facts_are_resolved_once_for_each_kernel() -> None:
    world = World()
    world.close()
    known = Facts(world.kernel)
    assert find_foreign(world.kernel, known, world.process) == ()
    world.kernel.types.fields.clear()
    assert find_foreign(world.kernel, known, world.process) == ()


def test_an_unknown_task_is_an_error_of_the_guest() -> None:
    world = World()
    world.task = 0
    with pytest.raises(GuestError):
        Injection(world.kernel, Facts(world.kernel)).find(world.process)


@pytest.mark.parametrize(
    ("path", "program", "weight"),
    [
        ("/usr/lib/libc.so.6", "/usr/bin/x", 0),
        ("/dev/shm/x.so", "/usr/bin/x", 2),
        ("/tmp/x", "/tmp/x", 1),
        ("/tmp/x.so", "/tmp/x", 2),
        ("/tmp/app/lib/x.so", "/tmp/app/bin/x", 1),
        ("/srv/app/lib/x.so", "/srv/app/bin/x", 0),
        ("/srv/other/x.so", "/srv/app/bin/x", 1),
        ("/home/u/.venv/lib/x.so", "/usr/bin/python3", 1),
        ("/x.so", "/init", 1),
        ("/x.so", "", 1),
    ],
)
def test_a_place_is_odd_by_where_it_is_and_how_near_the_program(path: str, program: str, weight: int) -> None:
    place = odd_place(path, program)
    assert (place[0] if place else 0) == weight


def test_runtimes_are_known_by_their_files() -> None:
    assert find_runtime({"node"}) == "V8"
    assert find_runtime({"libnodet.so", "nginx", "libc.so.6"}) is None


@pytest.mark.parametrize(
    ("code", "call"), [("e811223344", True), ("ffd0", True), ("41ff5508", True), ("90909090", False)]
)
def test_a_return_address_lies_behind_a_call(code: str, call: bool) -> None:
    assert is_call(bytes.fromhex(code).rjust(7, b"\x90")) is call


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_a_page_holds_the_look_ends(data: st.DataObject) -> None:
    world = World()
    libc = world.file("/usr/lib/libc.so.6")
    world.cache(libc, b"old", 1)
    world.vma(LIBRARY, 4, RX, libc, [world.page(b"new", mapping=DIRECT | 1)], vm_pgoff=1)
    for number in range(40):
        world.vma(LIBRARY + (number + 8) * 2 * PAGE, 1, RWX, resident=[world.page(b"\xe8", mapping=DIRECT | 1)])
    world.thread(101, LIBRARY, start=LIBRARY)
    world.close()
    chaos = random.Random(data.draw(st.integers(0, 1 << 32)))
    used = world._next // PAGE + 1
    for _ in range(data.draw(st.integers(1, 3))):
        page = chaos.randrange(used) * PAGE
        if data.draw(st.booleans()):
            world.kernel.memory.ram[page : page + PAGE] = chaos.randbytes(PAGE)
        else:  # pointers to anywhere
            words = (
                DIRECT + chaos.randrange(RAM // 8) * 8 + chaos.choice((0, 0x0E, 0x1E, 2)) for _ in range(PAGE // 8)
            )
            world.kernel.memory.ram[page : page + PAGE] = b"".join(word.to_bytes(8, "little") for word in words)
    try:
        found = Injection(world.kernel, Facts(world.kernel)).find(world.process)
    except GuestError:
        return
    assert all(isinstance(one, Evidence) for one in found)
