"""A Xen host that is made up: its libraries, compiled for the test, and its xenstored.

The libraries (xenhost.c) share their state and the domain's RAM with the test through two files beside them.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from uuid import UUID

FRAMES, PAGE, HIGH = 65536, 4096, 0x100000
UUID_TEXT = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
SOURCE = Path(__file__).with_suffix(".c")
LIBRARIES = ("libxenforeignmemory.so.1", "libxenctrl.so.4.17")
_WORDS = "domid present dying hvm flags vcpus refuse_errno refuse_times busy_times protections opened closed silent"
_LONGS = "low high extra pages max_pages dom0_max_pages last_frame on_demand ready maps unmaps mapped largest asked"


class State(ctypes.Structure):
    """``struct state`` of xenhost.c."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in _WORDS.split()),
        ("uuid", ctypes.c_uint8 * 16),
        *((name, ctypes.c_uint64) for name in _LONGS.split()),
        ("cpu", ctypes.c_uint8 * 2048),
        ("errors", ctypes.c_uint8 * FRAMES),
    ]


class XenHost:
    """Domain 7 with RAM from 0 on, and from 4 GiB on where ``high`` frames are given."""

    def __init__(self, folder: Path, *, low: int, high: int = 0) -> None:
        self.folder = folder
        state, ram_path = folder / "state", folder / "ram"
        state.write_bytes(bytes(ctypes.sizeof(State)))
        with ram_path.open("wb") as ram:
            ram.truncate((low + high) * PAGE)
        with state.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)
        with ram_path.open("r+b") as file:
            self.ram = mmap.mmap(file.fileno(), 0)
        self.state = State.from_buffer(self._shared)
        self.state.domid, self.state.present, self.state.hvm, self.state.vcpus = 7, 1, 1, 2
        self.state.low, self.state.high = low, high
        self.state.pages = self.state.max_pages = low + high + 8
        self.state.dom0_max_pages, self.state.last_frame = 0x20000, 0xFEFFF
        self.state.uuid[:] = UUID(UUID_TEXT).bytes
        for name in LIBRARIES:
            (folder / name).write_bytes(_compile())

    def lose(self, frames, error: int = 22) -> None:
        """Frames of the RAM file that cannot be mapped from now on (22: EINVAL, ballooned out)."""
        for frame in frames:
            self.state.errors[frame] = error


@cache
def _compile() -> bytes:
    """One library has the functions of both."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.so"
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", made, SOURCE], check=True)
        return made.read_bytes()
