"""The memory map of a process."""

import random
from contextlib import suppress

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.vads import MAX_DEPTH, VadKind, Vads, protection_name
from tests.guest.windows.machines import ALL, kernel_of, make, peek, poke, types_of, write
from tests.worlds.windows import FAMILIES, Machine


def root_of(machine, process):
    """Where the tree's first node is told."""
    types = types_of(machine)
    for path in ("_EPROCESS.VadRoot.Root", "_EPROCESS.VadRoot.BalancedRoot.RightChild", "_EPROCESS.VadRoot"):
        if types.has(path):
            return path
    raise AssertionError


@pytest.mark.parametrize("family", FAMILIES)
def test_every_range_is_told_with_its_bounds_protection_kind_and_file(family):
    with Machine(family) as machine:
        process = machine.process("notepad.exe", session=1)
        machine.inject(process)
        machine.foreign_dll(process)
        found = Vads(kernel_of(machine)).walk(process.va)
        assert (found.gaps, found.torn) == ((), 0)
        assert [(vad.start, vad.end, vad.protection, vad.private, vad.path) for vad in found.vads] == [
            (each.start, each.end, each.protection, each.private, each.file.device if each.file else None)
            for each in sorted(process.user.regions, key=lambda each: each.start)
        ]
        kinds = {vad.path.rsplit(".", 1)[-1]: vad.kind for vad in found.vads if vad.path}
        assert kinds == {"exe": VadKind.IMAGE, "dll": VadKind.IMAGE, "nls": VadKind.MAPPED}
        files = {
            each.file.va: (each.file.control_area, each.file.prototypes) for each in process.user.regions if each.file
        }
        assert {vad.file: (vad.control_area, vad.prototypes) for vad in found.vads if vad.file} == files


@pytest.mark.parametrize("machine", ALL, indirect=True)
def test_injected_memory_is_private_executable_and_writable_and_an_image_is_not(machine):
    process = machine.process("notepad.exe")
    region = machine.inject(process)
    found = Vads(kernel_of(machine)).walk(process.va)
    vad = found.at(region.start + 5)
    assert vad is not None and (vad.start, vad.private, vad.kind) == (region.start, True, VadKind.PRIVATE)
    assert vad.protection == "PAGE_EXECUTE_READWRITE" and vad.executable and vad.writable and vad.path is None
    program = next(each for each in found.vads if each.path and each.path.lower().endswith("\\notepad.exe"))
    assert (program.kind, program.executable, program.writable) == (VadKind.IMAGE, True, False)


def test_an_address_between_the_ranges_is_in_none(machine):
    process = machine.process("notepad.exe")
    found = Vads(kernel_of(machine)).walk(process.va)
    for before, after in zip(found.vads, found.vads[1:], strict=False):
        assert found.at(before.start) is before and found.at(before.end - 1) is before
        assert found.at(after.start - 1) is (before if before.end == after.start else None)
    assert found.at(0) is None and found.at(1 << 47) is None


def test_the_way_from_the_root_leads_to_the_range_that_an_address_lies_in(machine):
    process = machine.process("notepad.exe")
    machine.inject(process)
    kernel = kernel_of(machine)
    vads = Vads(kernel)
    whole = vads.walk(process.va)
    for vad in whole.vads:
        assert vads.find(process.va, vad.start) == vads.find(process.va, vad.end - 1) == vad
    for address in {vad.end for vad in whole.vads} - {vad.start for vad in whole.vads}:
        assert vads.find(process.va, address) is None
    for name in ("VadNode.Left", "VadNode.Right", "LeftChild", "RightChild"):  # a circle ends
        if types_of(machine).has(f"_MMVAD_SHORT.{name}"):
            top = peek(machine, process.va, root_of(machine, process))
            poke(machine, top, f"_MMVAD_SHORT.{name}", top)
    assert vads.find(process.va, 1 << 46) is None


def test_a_process_without_user_memory_has_no_ranges(bare):
    found = Vads(kernel_of(bare)).walk(bare["Registry"].va)
    assert (found.vads, found.gaps) == ((), ())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, "PAGE_NOACCESS"),
        (1, "PAGE_READONLY"),
        (6, "PAGE_EXECUTE_READWRITE"),
        (7, "PAGE_EXECUTE_WRITECOPY"),
        (0b01100, "PAGE_READWRITE | PAGE_NOCACHE"),
        (0b10100, "PAGE_READWRITE | PAGE_GUARD"),
        (0b11110, "PAGE_EXECUTE_READWRITE | PAGE_WRITECOMBINE"),
        (0x18, "PAGE_NOACCESS"),
    ],
)
def test_protections_have_the_names_that_programs_ask_for_them_by(value, name):
    assert protection_name(value) == name


def test_many_ranges_are_all_found(bare):
    process = bare.process("big.exe", session=1)
    for _ in range(300):
        bare.region(process, 0x1000, "RW", backed=False)
    found = Vads(kernel_of(bare)).walk(process.va)
    assert len(found.vads) == len(process.user.regions) > 300 and found.torn == 0


def test_a_file_that_is_being_deleted_is_said_to_be(bare):
    process = bare.process("notepad.exe", session=1)
    module = bare.module(process, "C:\\Temp\\gone.dll")
    bare.kernel.set(module.file.va, "_FILE_OBJECT.DeletePending", 1)
    found = Vads(kernel_of(bare)).walk(process.va)
    assert [vad.path for vad in found.vads if vad.deleted] == ["\\Device\\HarddiskVolume3\\Temp\\gone.dll"]


def test_an_image_whose_files_name_cannot_be_read_is_a_gap(machine):
    process = machine.process("notepad.exe")
    kernel = kernel_of(machine)
    image = next(vad for vad in Vads(kernel).walk(process.va).vads if vad.kind is VadKind.IMAGE)
    poke(machine, image.file, "_FILE_OBJECT.FileName.Buffer", 0x10)
    found = Vads(kernel).walk(process.va)
    assert [gap.why for gap in found.gaps] == ["the names of the files of 1 images cannot be read"]
    assert [vad.path for vad in found.vads if vad.start == image.start] == [None]


def test_more_files_than_are_remembered_cost_no_more_and_are_a_gap(bare, monkeypatch):
    monkeypatch.setattr("appliance.guest.windows.files.MAX_CACHE", 2)
    process = bare.process("notepad.exe", session=1)
    for number in range(3):
        bare.module(process, f"C:\\Windows\\System32\\lib{number}.dll")
    found = Vads(kernel_of(bare)).walk(process.va)
    assert sum(vad.path is not None for vad in found.vads) == 2
    assert len(found.gaps) == 1 and "cannot be read" in found.gaps[0].why


def test_a_range_outside_the_bounds_that_its_parents_leave_is_torn_and_not_told(machine):
    process = machine.process("notepad.exe")
    kernel = kernel_of(machine)
    whole = Vads(kernel).walk(process.va)
    top = peek(machine, process.va, root_of(machine, process))
    node = next(vad for vad in whole.vads if vad.va != top)
    poke(machine, node.va, "_MMVAD_SHORT.StartingVpn", 0x7FFF0)
    poke(machine, node.va, "_MMVAD_SHORT.EndingVpn", 0x7FFEF)
    torn = Vads(kernel).walk(process.va)
    assert node.va not in {vad.va for vad in torn.vads}
    assert torn.torn and torn.gaps and "contradict" in torn.gaps[0].why


def test_a_tree_that_leads_back_to_itself_ends(machine):
    process = machine.process("notepad.exe")
    top = peek(machine, process.va, root_of(machine, process))
    for name in ("VadNode.Left", "VadNode.Right", "LeftChild", "RightChild"):
        if types_of(machine).has(f"_MMVAD_SHORT.{name}"):
            poke(machine, top, f"_MMVAD_SHORT.{name}", top)
    found = Vads(kernel_of(machine)).walk(process.va)
    assert len(found.vads) == 1 and found.gaps and found.torn


def test_a_tree_deeper_than_any_can_be_is_cut_short_and_named(bare):
    process = bare.process("deep.exe", session=1)
    for _ in range(MAX_DEPTH + 8):
        bare.region(process, 0x1000, "RW", backed=False)
    ordered = sorted(process.user.regions, key=lambda each: each.start)
    set_ = bare.kernel.set
    for region, following in zip(ordered, [*ordered[1:], None], strict=True):
        set_(region.vad, "_MMVAD_SHORT.VadNode.Left", 0)
        set_(region.vad, "_MMVAD_SHORT.VadNode.Right", following.vad if following else 0)
        set_(region.vad, "_MMVAD_SHORT.VadNode.ParentValue", 0)
    set_(process.va, "_EPROCESS.VadRoot.Root", ordered[0].vad)
    found = Vads(kernel_of(bare)).walk(process.va)
    assert len(found.vads) == MAX_DEPTH and "deeper" in found.gaps[0].why


@pytest.mark.parametrize("name", ["xp-sp3", "20348"])
def test_whatever_the_bytes_say_a_map_is_read_or_refused(name):
    machine, dice = make(name, standard=False), random.Random(3)
    process = machine.process("notepad.exe")
    machine.inject(process)
    kernel = kernel_of(machine)
    targets = [vad.va for vad in Vads(kernel).walk(process.va).vads]
    targets += [va for vad in Vads(kernel).walk(process.va).vads for va in (vad.control_area, vad.file) if va]
    for _ in range(600):
        va = dice.choice(targets) + 4 * dice.randrange(0x28)
        junk = [dice.randbytes(8), dice.choice(targets).to_bytes(8, "little"), bytes(8), b"\xdd" * 8]
        write(machine, va, dice.choice(junk)[: kernel.pointer_size])
        with suppress(GuestError):
            found = Vads(kernel).walk(process.va)
            assert all(vad.start < vad.end for vad in found.vads)
            assert all(one.end <= two.start for one, two in zip(found.vads, found.vads[1:], strict=False))
    machine.close()
