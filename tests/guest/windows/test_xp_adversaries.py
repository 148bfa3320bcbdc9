"""Tables of Windows XP that lead astray, change between two reads, or hold bytes changed at random."""

import random
import struct

import pytest

from appliance.errors import GuestError
from appliance.guest.windows.attach import attach
from appliance.guest.windows.processes import Processes
from appliance.guest.windows.space import AddressSpace
from appliance.guest.windows.xp import XpNetwork
from appliance.model import Match
from tests.guest.windows.xp_network import HERE, PAGE, THERE, busy, flow, network_of, told
from tests.worlds.overlay import Overlay
from tests.worlds.windows.xp import XpMachine


class Spoiled(Overlay):
    """A memory with changed pages that keeps the registers; ``at`` some read, something happens in the guest."""

    def __init__(self, memory):
        super().__init__(memory)
        self._cpus, self.at, self.then, self.reads = memory.vcpus(), -1, None, 0

    def vcpus(self):
        return self._cpus

    def readv(self, spans):
        self.reads += 1
        if self.reads == self.at:
            self.then()
        return self._memory.readv(spans) if not self.pages else super().readv(spans)


@pytest.mark.parametrize("shape", ["itself", "another chain", "nowhere", "user space", "odd"])
def test_a_chain_that_leads_astray_ends_and_is_named(shape):
    machine = XpMachine(buckets=16)
    made = [machine.tcp(machine.explorer, (HERE, 1030 + number), (THERE, 80)) for number in range(8)]
    last = made[0]
    target = {
        "itself": last.va,
        "another chain": made[5].va,
        "nowhere": 0xE0000000,
        "user space": 0x00400000,
        "odd": made[5].va + 2,
    }[shape]
    machine.space.map(0x00400000, machine.ram.page())
    machine.space.write(0x00400000, machine.space.read(made[5].va, 0x100))
    machine.space.map(0x003FF000, machine.ram.page())
    machine.space.write(0x00400000 - 8, machine.space.read(made[5].va - 8, 8))  # a connection as good as any
    machine.put_pointer(last.va, target)
    walk = network_of(machine).walk()
    found, _ = told(walk)
    assert len(found) == len(set(found)) >= 7
    assert [gap.what for gap in walk.gaps] == ["connection table"]


def test_an_object_whose_block_was_given_to_something_else_is_not_believed():
    machine = XpMachine(buckets=16)
    made = [machine.tcp(machine.explorer, (HERE, 1030 + number), (THERE, 80)) for number in range(8)]
    machine.space.write(made[0].va - 4, b"Irp ")
    walk = network_of(machine).walk()
    assert len(told(walk)[0]) == 7
    assert [gap.address for gap in walk.gaps] == [made[0].va]


@pytest.mark.parametrize("at", [1, 2])
def test_whatever_happens_between_two_reads_nobody_else_is_named(at):
    machine, browser, _ = busy()
    victim = next(each for each in machine.connections if each.remote and each.local[1] == 1038)
    memory = Spoiled(machine.memory())
    network = network_of(machine, memory)
    network.walk()

    def reuse():  # the object becomes another connection, of another process
        machine.space.write(victim.va + 0x10, bytes([10, 0, 0, 1]))
        machine.space.write(victim.va + 0x18, struct.pack("<I", browser.pid))

    memory.at, memory.then = memory.reads + at, reuse
    finding = network.find(flow((HERE, 1038), (THERE, 8080)))
    assert memory.reads >= memory.at
    assert finding.match is Match.NONE
    assert finding.torn > 0 or at == 1


@pytest.mark.parametrize(("era", "pae"), [("xp-sp3", True), ("2003-sp2", False), ("2003-sp2-x64", True)])
def test_with_bytes_changed_at_random_nothing_is_raised_but_a_guests_error(era, pae):
    machine, *_ = busy(era, pae=pae)
    machine.tcp(machine.explorer, (HERE, 1060), (THERE, 443))
    watched = Overlay(machine.memory())
    kernel = attach(machine.memory())
    pages = sorted(
        {gpa // PAGE for va, gpa in machine.space.pages.items() if gpa >= 0x800000 or va == machine.base + 0x82000}
    )
    chance = random.Random(7)
    names = {each.pid: each.name.lower() for each in machine.processes}
    outcomes = set()
    for _ in range(200):
        memory = Spoiled(machine.memory())
        for _ in range(chance.randrange(1, 4)):
            number = chance.choice(pages)
            page = bytearray(watched.read(number * PAGE, PAGE))
            for _ in range(chance.randrange(1, 40)):
                at = chance.randrange(PAGE)
                page[at : at + 4] = chance.choice(
                    [b"\0\0\0\0", b"\xff\xff\xff\xff", bytes(page[at : at + 2]) + b"\0\x80"]
                )[: PAGE - at]
            memory.pages[number] = bytes(page)
        space = AddressSpace(memory, kernel.space.root, kernel.space.mode)
        try:
            spoiled = type(kernel)(
                space, base=kernel.base, size=kernel.size, types=kernel.types, shared=kernel.read_shared()
            )
            network = XpNetwork(spoiled, Processes(spoiled))
            with spoiled.limit(5.0):
                walk = network.walk()
                found = network.find(flow((HERE, 1038), (THERE, 8080)))
        except GuestError as error:
            outcomes.add(type(error))
            continue
        outcomes.add(found.match)
        for owner in found.owners:
            assert owner.process.pid in names
        assert len(walk.sockets) < 1000
    assert Match.EXACT in outcomes
    assert len(outcomes) > 1
