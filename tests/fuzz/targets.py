"""The guests that are fuzzed: every era of Windows, made of bytes, with all kinds of things in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from appliance.guest.windows.attach import attach
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.symbols import SymbolStore
from appliance.ports import GuestMemory
from tests.fuzz.fuzzer import Target
from tests.worlds.windows import FAMILIES, Machine
from tests.worlds.windows.xp import XpMachine

LOOK_S = 5.0
RAM = 24 << 20  # each look goes through all of it
OLD = {"xp-sp3": ("xp-sp3", True), "xp-sp2": ("xp-sp2", False), "2003-sp2": ("2003-sp2", True)}
NAMES = (*OLD, *FAMILIES)


@contextmanager
def open_target(name: str, folder: Path) -> Iterator[Target]:
    """One of `NAMES`."""
    with ExitStack() as stack:
        machine = _old(name) if name in OLD else _recent(name)
        stack.callback(machine.close)
        machine.write_symbols(folder / name)
        store = SymbolStore([folder / name], cache_dir=folder / "cache", share=None)

        def open_eye(memory: GuestMemory) -> WindowsEye:
            return WindowsEye(attach(memory, symbols=store), look_s=LOOK_S)

        yield Target(name, machine.memory(), open_eye)


def _recent(family: str) -> Machine:
    machine = Machine(family, ram=RAM)
    explorer = machine["explorer.exe"]
    notepad = machine.process("notepad.exe", parent=explorer)
    machine.inject(notepad)
    machine.foreign_dll(notepad)
    hidden = machine.process("hidden.exe", hidden=True)
    for number in range(40):
        owner = (notepad, explorer, hidden)[number % 3]
        machine.tcp(owner, ("10.0.0.5", 50_000 + number), ("203.0.113.9", 443), bucket=number % 5)
    machine.tcp(notepad, ("fd00::5", 50_100), ("2001:db8::9", 443))
    machine.tcp(notepad, ("10.0.0.5", 50_101), ("203.0.113.9", 80), tables=())
    machine.tcp(notepad, ("10.0.0.5", 50_102), ("203.0.113.9", 80), tables=(1,))
    machine.time_wait(("10.0.0.5", 50_103), ("203.0.113.9", 80))
    machine.listener(explorer, ("0.0.0.0", 8080))
    machine.listener(explorer, ("::", 8081))
    machine.udp(explorer, ("0.0.0.0", 5353))
    return machine


def _old(name: str) -> XpMachine:
    era, pae = OLD[name]
    machine = XpMachine(era, pae=pae, ram=RAM)
    explorer = machine.process("explorer.exe")
    svchost = machine.process("svchost.exe")
    machine.inject(svchost)
    machine.foreign_dll(explorer)
    for number in range(20):
        machine.tcp((svchost, explorer)[number % 2], ("10.0.0.5", 1050 + number), ("203.0.113.9", 80))
    machine.listener(svchost, ("0.0.0.0", 135))
    machine.udp(svchost, ("0.0.0.0", 445))
    return machine
