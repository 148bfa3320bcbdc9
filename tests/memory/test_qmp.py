"""The QMP client, against a server of a few lines."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest

from appliance.errors import HostError, PermissionRefused
from appliance.memory.qmp import Monitor, find_socket, parse_flat_view, parse_host_address, parse_registers, read_vcpus
from appliance.model import Region, VcpuState

REGISTERS = """
CPU#0
RAX=0000000000000000 RBX=ffffffff8cc0f480
RIP=ffffffff8c4c7a0b RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
IDT=     fffffe0000000000 00000fff
CR0=80050033 CR2=00000000005794a9 CR3=00000000025f2000 CR4=00751eb0
CPU#1
RIP=0000000000401000 RFL=00000246
FS =0053 0000000000123000 00003c00 0040f300 DPL=3 DS   [-WA]
GS =002b fffff80320000000 ffffffff 00c0f300 DPL=3 DS   [-WA]
IDT=     fffffe0000000000 00000fff
CR0=80050033 CR2=0 CR3=00000000035f3000 CR4=00751eb0
"""
MTREE = """FlatView #0
 AS "I/O", root: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000
  0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000 KVM
"""


def serve(path, answers, greeting=b'{"QMP": {"version": {}}}\n'):
    """Serve one client: for each command, what `answers` holds for it, raw."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def run():
        with (
            contextlib.suppress(ConnectionError),
            listener,
            listener.accept()[0] as client,
            client.makefile("rb") as lines,
        ):
            client.sendall(greeting)
            for line in lines:
                client.sendall(answers.get(json.loads(line)["execute"], b'{"return": {}}\n'))

    threading.Thread(target=run, daemon=True).start()


def test_registers_come_from_the_human_monitor(tmp_path):
    event = b'{"event": "RTC_CHANGE", "data": {}}\n'
    serve(tmp_path / "q", {"human-monitor-command": event + json.dumps({"return": REGISTERS}).encode() + b"\n"})
    first, second = read_vcpus(tmp_path / "q")
    assert first == VcpuState(0x80050033, 0x25F2000, 0x751EB0, 0xFFFFFFFF8C4C7A0B, 0xFFFFFE0000000000)
    assert (second.cr3, second.fs_base, second.gs_base) == (0x35F3000, 0x123000, 0xFFFFF80320000000)


@pytest.mark.parametrize(
    ("greeting", "answers", "words"),
    [
        (b"", {}, "silent"),
        (b'{"QMP": {}}\n', {"qmp_capabilities": b""}, "silent"),
        (b"220 smtp\n", {}, "something else"),
        (b"[]\n", {}, "no QMP socket"),
        (b'{"QMP": {}}\n', {"qmp_capabilities": b'{"error": {"desc": "no"}}\n'}, "refused"),
        (b"x" * 100, {}, "silent"),
    ],
)
def test_a_socket_that_does_not_answer_is_given_up(tmp_path, greeting, answers, words):
    serve(tmp_path / "q", answers, greeting)
    began = time.monotonic()
    with pytest.raises(HostError, match=words):
        Monitor(tmp_path / "q", timeout_s=0.3)
    assert time.monotonic() - began < 20


def test_a_socket_that_is_not_there_is_a_host_error(tmp_path):
    with pytest.raises(HostError, match="cannot be used"):
        read_vcpus(tmp_path / "nothing")


def test_a_socket_that_another_process_serves_is_refused_and_that_one_named(tmp_path):
    for pid in (os.getppid(), os.getpid()):
        serve(tmp_path / f"{pid}", {})
    with pytest.raises(HostError, match=f"served by process {os.getpid()}, not by {os.getppid()}"):
        Monitor(tmp_path / f"{os.getppid()}", pid=os.getppid())
    Monitor(tmp_path / f"{os.getpid()}", timeout_s=60, pid=os.getpid()).close()


def test_a_path_may_be_longer_than_an_address_and_relative_to_where_qemu_runs(tmp_path, monkeypatch):
    folder = tmp_path / ("d" * 200)
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, path in (("a", "a"), ("b", f"{folder}/b")):
        serve(name, {})
        Monitor(find_socket(os.getpid(), path), timeout_s=60).close()


def test_a_socket_that_may_not_be_used_names_the_remedy(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionRefused, match="run as root"):
        Monitor(tmp_path / "q")


def test_a_cpu_of_32_bits_tells_as_much():
    text = """CPU#0
EAX=00000000 EBX=ffdff980
EIP=804dc1e6 EFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
FS =0030 ffdff000 00001fff 00c09300 DPL=0 DS   [-WA]
GS =0000 00000000 ffffffff 00cff300
IDT=     8003f400 000007ff
CR0=8001003b CR2=bf9f9ff4 CR3=00b30020 CR4=000006f8
"""
    found = parse_registers(text)[0]
    assert (found.rip, found.fs_base, found.idt_base, found.cr3) == (0x804DC1E6, 0xFFDFF000, 0x8003F400, 0xB30020)


def test_texts_of_the_monitor_are_parsed():
    assert parse_registers("nonsense CR3=zz") == ()
    assert parse_flat_view(MTREE) == (
        (Region(0, 0xA0000), "pc.ram", 0),
        (Region(1 << 32, 1 << 30), "pc.ram", 0xC0000000),
    )
    assert parse_flat_view("") == ()
    assert parse_host_address("Host virtual address for 0x0 (pc.ram) is 0x7f4fc7e00000") == 0x7F4FC7E00000
    assert parse_host_address("Memory at address 0xfec00000 is not RAM") is None
