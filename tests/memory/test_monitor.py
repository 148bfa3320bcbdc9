"""QEMU's own monitor as a way to a guest's RAM: a real QEMU whose guest never runs."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from appliance.errors import GuestGone, HostError, UnreadableMemory, UsageError
from appliance.memory import monitor
from appliance.memory.monitor import open_monitor, parse_words
from appliance.model import Region
from appliance.ports import GuestMemory

MIB = 1 << 20
RAM = random.Random(5).randbytes(15 * MIB)  # from 1 MiB on


class Machine:
    """One QEMU of 16 MiB that waits to be started."""

    def __init__(self, folder, *options):
        content = folder / "content"
        content.write_bytes(RAM)
        self.socket = folder / "qmp"
        command = [
            "qemu-system-x86_64",
            "-S",
            "-display",
            "none",
            "-nodefaults",
            "-machine",
            "q35,accel=tcg",
            "-m",
            "16",
        ]
        command += ["-m", "16", "-device", f"loader,file={content},addr={MIB:#x},force-raw=on", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=folder)
        self.pid = self.process.pid

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    made = Machine(folder, "-qmp", f"unix:{folder / 'qmp'},server=on,wait=off")
    until(made.socket.exists)
    yield made
    made.close()


@pytest.fixture
def memory(machine):
    opened = eventually(lambda: open_monitor(machine.pid))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A loaded machine may take long for what is no trouble."""
    monkeypatch.setattr(monitor, "ANSWER_S", 60.0)
    monkeypatch.setattr(monitor, "REST_S", 0.0)


def until(condition):
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def eventually(call):
    """The result of a call once it works: a socket that was just left takes a moment to be free."""
    end_s = time.monotonic() + 60
    while True:
        try:
            return call()
        except (HostError, UnreadableMemory):
            assert time.monotonic() < end_s
            time.sleep(0.02)


def test_ram_is_what_qemu_shows_as_ram_without_firmware_and_display(memory):
    assert isinstance(memory, GuestMemory)
    assert memory.regions == (Region(0, 0xA0000), Region(MIB, 15 * MIB))


@pytest.mark.parametrize("turn_s", [0.0, 0.5], ids=["the socket is freed behind each piece", "it is kept for a while"])
def test_what_is_read_is_what_lies_there(memory, turn_s, monkeypatch):
    monkeypatch.setattr(monitor, "TURN_S", turn_s)
    places = random.Random(2)
    spans = [(0, 15 * MIB + 1), (15 * MIB - 1, 2), (15 * MIB - 8, 8), (4091, 4099), (3, 1), (77, 0)]
    spans += [(places.randrange(14 * MIB), places.randrange(9000)) for _ in range(5)]
    for gpa, size in spans[2:]:
        assert memory.read(MIB + gpa, size) == RAM[gpa : gpa + size]
    found = memory.readv([(MIB + gpa, size) for gpa, size in spans])
    assert found == [None, None, *[RAM[gpa : gpa + size] for gpa, size in spans[2:]]]


def test_what_is_no_ram_is_not_asked_for(memory):
    spans = [(0xB8000, 8), (16 * MIB - 4, 8), (0xFEE00000, 8), (-8, 8)]  # display, the end, the local APIC, nowhere
    assert memory.readv(spans) == [None] * 4
    for gpa, size in spans:
        with pytest.raises(UnreadableMemory, match="not RAM"):
            memory.read(gpa, size)


def test_registers_are_told(memory):
    assert [cpu.rip for cpu in memory.vcpus()] == [0xFFF0]  # the reset vector


def test_a_socket_that_somebody_else_holds_is_left_to_him(machine, memory, monkeypatch):
    monkeypatch.setattr(monitor, "ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(machine.socket))
        assert other.recv(100).startswith(b'{"QMP"')
        with pytest.raises(UnreadableMemory, match="another client may hold it"):
            memory.read(MIB, 8)
        start_s = time.monotonic()
        assert memory.readv([(MIB + 4096 * page, 8) for page in range(500)]) == [None] * 500
        assert time.monotonic() - start_s < 20  # and not its time for each
        with pytest.raises(HostError, match="another client may hold it"):
            open_monitor(machine.pid)
    assert eventually(lambda: memory.read(MIB, 8)) == RAM[:8]


def test_a_socket_that_somebody_else_bound_meanwhile_is_not_taken_for_the_guests(machine, memory):
    kept = machine.socket.rename(machine.socket.with_name("kept"))
    try:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(machine.socket))
            other.listen()
            with pytest.raises(UnreadableMemory, match=f"served by process {os.getpid()}, not by {machine.pid}"):
                memory.read(MIB, 8)
            assert memory.readv([(MIB, 8)]) == [None] and memory.vcpus() == ()
            with pytest.raises(HostError, match="served by process"):
                open_monitor(machine.pid)
    finally:
        kept.rename(machine.socket)
    assert eventually(lambda: memory.read(MIB, 8)) == RAM[:8]


def test_a_socket_that_was_silent_is_not_waited_for_again_at_once(machine, memory, monkeypatch):
    monkeypatch.setattr(monitor, "ANSWER_S", 0.2)
    monkeypatch.setattr(monitor, "REST_S", 1e9)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(machine.socket))
        assert other.recv(100).startswith(b'{"QMP"')
        with pytest.raises(UnreadableMemory, match="is silent"):
            memory.read(MIB, 8)
    with pytest.raises(UnreadableMemory, match="did not answer just now"):
        memory.read(MIB, 8)
    assert memory.readv([(MIB, 8)]) == [None]


def test_a_qemu_that_hangs_is_unreadable_until_it_goes_on(machine, memory, monkeypatch):
    monkeypatch.setattr(monitor, "ANSWER_S", 0.2)
    os.kill(machine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UnreadableMemory):
            memory.read(MIB, 8)
    finally:
        os.kill(machine.pid, signal.SIGCONT)
    assert eventually(lambda: memory.read(MIB, 8)) == RAM[:8]


def test_a_qemu_without_a_socket_of_its_own_cannot_be_read_so_and_one_that_ended_is_gone(tmp_path):
    machine = Machine(tmp_path, "-qmp", "unix:qmp,server=on,wait=off")  # where it was started
    try:
        until(machine.socket.exists)
        with contextlib.closing(eventually(lambda: open_monitor(machine.pid))) as memory:
            machine.close()
            for again in (memory.check_alive, lambda: memory.read(MIB, 8), lambda: memory.readv([(MIB, 8)])):
                with pytest.raises(GuestGone):
                    again()
        memory.close()
        machine = Machine(tmp_path)
        until(lambda: Path(f"/proc/{machine.pid}/exe").readlink().name.startswith("qemu"))
        with pytest.raises(UsageError, match="no QMP socket of its own"):
            open_monitor(machine.pid)
    finally:
        machine.close()


@pytest.mark.parametrize("text", ["", "Cannot access memory", "0000000000001000: 0x0000000000000000\r\n" * 3])
def test_an_answer_that_is_no_memory_is_refused(text):
    with pytest.raises(HostError, match="words of memory"):
        parse_words(text, 2)
