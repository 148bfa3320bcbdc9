"""Windows XP and Server 2003: from FS to the kernel, and which layout it has."""

import struct

import pytest

from appliance.errors import Implausible, UnsupportedGuest
from appliance.guest.windows import xp_types
from appliance.guest.windows.attach import attach
from appliance.guest.windows.space import AddressSpace, Mode
from appliance.guest.windows.xp_kpcr import find_by_kpcr
from tests.guest.windows.xp_network import MACHINES, PAGE
from tests.worlds.windows.xp import XpMachine
from tests.worlds.windows.xp_kernel import SYMBOLS

X86 = [each for each in MACHINES if "x64" not in each[0]]


# -- the way there --


@pytest.mark.parametrize(("era", "pae"), X86)
def test_the_block_at_fs_leads_to_the_kernel_its_modules_and_its_debugger_data(era, pae):
    machine = XpMachine(era, pae=pae)
    space = AddressSpace(machine.memory(), machine.root, Mode.PAE if pae else Mode.LEGACY)
    view = find_by_kpcr(space, machine.memory().vcpus()[0].fs_base)
    assert view is not None
    assert (view.base, view.modules) == (machine.base, machine.base + SYMBOLS["PsLoadedModuleList"])
    assert view.kdbg == machine.base + SYMBOLS["KdDebuggerDataBlock"]
    assert view.build == (2600 if era.startswith("xp") else 3790)


@pytest.mark.parametrize("fs_base", [0, 0x7FFDE000, 0xF8C40000, 0xFFFFFFF0])
def test_where_fs_is_a_threads_or_another_processors_the_block_of_processor_0_serves(fs_base):
    machine = XpMachine()
    other = 0xF8C40000  # of a second processor: it has no version block
    machine.space.map(other, machine.ram.page())
    for at, value in ((0x1C, other), (0x20, other + 0x120), (0x34, 0)):
        machine.space.write(other + at, struct.pack("<I", value))
    view = find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE), fs_base)
    assert view is not None
    assert view.base == machine.base


@pytest.mark.parametrize("at", [0x1C, 0x20, 0x34])
def test_a_block_that_does_not_name_itself_leads_nowhere(at):
    machine = XpMachine()
    machine.space.write(0xFFDFF000 + at, struct.pack("<I", 0xFFDF0000))
    assert find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE)) is None


def test_a_version_block_whose_list_of_modules_does_not_lead_back_is_not_believed():
    machine = XpMachine()
    machine.space.write(machine.base + SYMBOLS["PsLoadedModuleList"], struct.pack("<I", machine.system.va))
    assert find_by_kpcr(AddressSpace(machine.memory(), machine.root, Mode.PAE)) is None


# -- layouts of the kernel --


@pytest.mark.parametrize(("era", "pae"), MACHINES)
def test_the_layout_is_chosen_by_the_guests_own_system_process(era, pae):
    machine = XpMachine(era, pae=pae)
    mode = Mode.LONG4 if machine.wide else Mode.PAE if pae else Mode.LEGACY
    space = AddressSpace(machine.memory(), machine.root, mode)
    kdbg = machine.base + SYMBOLS["KdDebuggerDataBlock"]
    chosen, types = xp_types.choose(space, machine.base, machine.image_size, machine.kind.build, kdbg)
    assert chosen is machine.kind
    assert xp_types.verify(space, types, machine.base, kdbg) == machine.system.va


def test_headers_that_were_overwritten_refuse_no_layout():
    machine = XpMachine()
    for va, path in ((machine.system.va, "_EPROCESS.Pcb.Header"), (machine.system.threads[0], "_ETHREAD.Tcb.Header")):
        machine.put(va, f"{path}.Type", 0)
        machine.put(va, f"{path}.Size", 0)
    assert attach(machine.memory()).build == 2600


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_EPROCESS.UniqueProcessId", 8),
        ("_EPROCESS.Pcb.Header.Size", 0x1E),
        ("_EPROCESS.ImageFileName", b"Systen\0"),
        ("_EPROCESS.ThreadListHead.Flink", 0x81800008),
    ],
)
def test_a_system_process_that_contradicts_a_layout_refuses_it(path, value):
    machine = XpMachine()
    machine.put(machine.system.va, path, value)
    with pytest.raises(UnsupportedGuest, match="Windows XP"):
        attach(machine.memory())


@pytest.mark.parametrize(
    ("path", "value"),
    [("_ETHREAD.ThreadsProcess", 0x81800008), ("_ETHREAD.Cid.UniqueProcess", 8), ("_ETHREAD.Tcb.Header.Size", 0x6E)],
)
def test_a_system_thread_that_contradicts_a_layout_refuses_it(path, value):
    machine = XpMachine()
    machine.put(machine.system.threads[0], path, value)
    with pytest.raises(UnsupportedGuest, match=r"first thread|_KTHREAD"):
        attach(machine.memory())


def test_where_the_kernel_itself_says_otherwise_a_layout_is_refused():
    machine = XpMachine("2003-sp2")
    machine.space.write(machine.base + SYMBOLS["KdDebuggerDataBlock"] + 0x2AA, struct.pack("<H", 0x190))  # Peb
    with pytest.raises(UnsupportedGuest, match=r"the kernel itself says otherwise of _EPROCESS\.Peb"):
        attach(machine.memory())


def test_debugger_data_of_another_kernel_is_not_believed():
    machine = XpMachine()
    space = AddressSpace(machine.memory(), machine.root, Mode.PAE)
    with pytest.raises(Implausible, match="debugger data"):
        xp_types.kdbg_symbols(space, machine.base + SYMBOLS["KdDebuggerDataBlock"], machine.base - PAGE, 0x200000)
