"""`guests` as a person sees it, and routes that are asked for by name."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from appliance.cli import contract
from appliance.model import GuestId, GuestInfo, GuestPort, GuestState
from tests.worlds.command import ROOT, environment, parasight

UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
ROUTES = "qemu, xen, libvirt, qmp, file, libvmi"
PRINT = """
import json, sys
from appliance.cli.look import Output, print_guests
print_guests(Output.TABLE, json.load(sys.stdin))
"""


def at_a_terminal(home, guests, columns):
    """What `guests` prints of these to a terminal of that width."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (50, columns))
    env = {**environment(home), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=its, text=True
    )
    os.close(its)
    process.stdin.write(json.dumps([contract.guest(guest) for guest in guests]))
    process.stdin.close()
    text = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(65536):
                text += part
        except OSError:
            pass  # EIO: its other end is closed
    assert process.wait() == 0
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()]


def test_guests_fits_a_terminal_of_100_columns_and_breaks_no_uuid(tmp_path):
    ports = tuple(GuestPort(f"vif12.{number}") for number in range(3))
    guests = [
        GuestInfo(GuestId("qemu:123456", UUID, "web-01"), 123456, 8 << 30, ports[:1], ("qemu", "libvirt", "qmp")),
        GuestInfo(GuestId("xen:12", UUID, "db\x1b[2J"), None, None, ports, ("xen",), state=GuestState.PAUSED),
        GuestInfo(GuestId("qemu:9"), 9, 1 << 30, notes=("its memory is encrypted", "a card " + "of its own " * 12)),
    ]
    lines = at_a_terminal(tmp_path, guests, 100)
    assert lines[0].split() == ["VM", "NAME,", "UUID", "STATE", "MEMORY", "PORTS", "ROUTES"]
    words = [line.split() for line in lines]
    assert words[1][:7] == ["qemu:123456", "web-01", "running", "8192", "MiB", "vif12.0", "qemu,"]
    assert sum(row[:1] == [UUID] for row in words) == 2
    assert ["xen:12", "db\\x1b[2J", "paused", "?"] in [row[:4] for row in words]
    assert ["qemu:9", "-", "running", "1024", "MiB", "none", "none"] in words
    notes = lines[lines.index("") + 1 :]
    assert notes[0] == "qemu:9: its memory is encrypted"
    assert "".join(notes[1:]).replace(" ", "").endswith("ofitsown" * 12)
    assert max(map(len, lines)) <= 100


def test_a_name_forges_no_line_and_a_port_steers_no_terminal(tmp_path):
    named = GuestId("qemu:1", name="web\nqemu:2: the watch has ended\n" + "x" * 9999)
    assert len(named.name.splitlines()) == 1
    assert len(named.name) <= 255
    lines = at_a_terminal(tmp_path, [GuestInfo(GuestId("qemu:1"), 1, ports=(GuestPort("tap\x1b[2J"),))], 100)
    assert "tap\\x1b[2J" in lines[1]


def test_a_route_is_refused_with_those_there_are(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    for route, why in (("qemu", "it is no QEMU process"), ("telepathy", f"there are: {ROUTES}")):
        done = parasight("connections", f"file:{image}", "--route", route, home=tmp_path)
        assert done.code == 2
        assert why in done.err
        assert "its routes are: file" in done.err


def test_libvmi_takes_raw_images_only(tmp_path):
    pytest.importorskip("libvmi")
    image = tmp_path / "lime"
    image.write_bytes(struct.pack("<IIQQQ", 0x4C694D45, 1, 0, 4095, 0) + bytes(4096))
    done = parasight("processes", f"file:{image}", "--route", "libvmi", home=tmp_path)
    assert done.code == 3
    assert "use the route 'file'" in done.err
