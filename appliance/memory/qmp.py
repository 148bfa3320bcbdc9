"""A small QMP client: registers and the memory map, asked for only where reading passively is not enough.

A QMP socket takes one client at a time, so every exchange is short, has a deadline, and gives up at once when somebody
else holds the socket. A manager's own monitor (libvirt) is never used. A path leads to whoever bound it last, so who
serves it is asked of the kernel at each connection.
Sources: docs/interop/qmp-spec.rst, unix(7) (SO_PEERCRED), QEMU target/i386/cpu-dump.c (``info registers``),
softmmu/memory.c (``info mtree``).
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from appliance.errors import HostError, PermissionRefused
from appliance.model import Region, VcpuState

TIMEOUT_S = 1.0
ANSWER_LIMIT = 4 << 20  # bytes of one answer
_REGISTER = re.compile(r"\b(CR0|CR3|CR4|RIP|EIP)=([0-9a-f]+)")
_IDT = re.compile(r"\bIDT=\s+([0-9a-f]+)")
_SEGMENT = re.compile(r"\b(FS|GS) ?=[0-9a-f]{4} ([0-9a-f]+)")
_CPU = re.compile(r"^CPU#\d+", re.MULTILINE)
_FLAT_RAM = re.compile(r"^\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]+))?", re.MULTILINE)
_HOST_VA = re.compile(r"is (0x[0-9a-f]+)")
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Monitor:
    """One short conversation with QEMU. Raises HostError when the socket is busy, gone or silent, PermissionRefused.

    ``pid``: whose monitor it must be; None: whoever serves the path.
    """

    def __init__(self, path: str | Path, timeout_s: float = TIMEOUT_S, pid: int | None = None) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._pending = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(timeout_s)
            _connect(self._socket, path)
            if pid is not None:
                self._check_server(path, pid)
            if "QMP" not in self._receive():
                raise HostError(f"{path} is no QMP socket")
            self.execute("qmp_capabilities")
        except OSError as error:
            self._socket.close()
            raise _explain(path, error) from None
        except HostError:
            self._socket.close()
            raise

    def execute(self, command: str, **arguments: object) -> object:
        """Run one command and return its answer."""
        message = json.dumps({"execute": command, "arguments": arguments})
        try:
            self._socket.sendall(message.encode() + b"\n")
            while True:
                answer = self._receive()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise HostError(f"QEMU refused {command}: {answer['error'].get('desc')}")
        except OSError as error:
            raise HostError(f"QEMU did not answer {command}: {error}") from None

    def human(self, command: str) -> str:
        """Run a command of the human monitor and return its text."""
        return str(self.execute("human-monitor-command", **{"command-line": command}))

    def close(self) -> None:
        """Free the socket for others."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_server(self, path: str | Path, pid: int) -> None:
        """Raise HostError unless that process listens: another QEMU may have bound the same path since."""
        listener, _, _ = _PEER.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if listener != pid:
            whom = f"process {listener}" if listener else "a process that cannot be seen from here"
            raise HostError(f"the QMP socket {path} is served by {whom}, not by {pid}")

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._pending:
            left = self._deadline - time.monotonic()
            if left <= 0 or len(self._pending) > ANSWER_LIMIT:
                raise HostError("the QMP socket is silent: another client may hold it")
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(65536)
            except TimeoutError:
                continue
            if not chunk:
                raise HostError("QEMU closed the QMP connection")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise HostError("the QMP socket speaks something else than QMP") from None
        return answer if isinstance(answer, dict) else {}


def find_socket(pid: int, path: str) -> str:
    """Where a path of a QEMU's command line leads from here."""
    return f"/proc/{pid}/{'root' if path.startswith('/') else 'cwd/'}{path}"


def read_vcpus(path: str | Path, timeout_s: float = TIMEOUT_S, pid: int | None = None) -> tuple[VcpuState, ...]:
    """Registers of every virtual CPU. Raises HostError."""
    with Monitor(path, timeout_s, pid) as monitor:
        return parse_registers(monitor.human("info registers -a"))


def parse_registers(text: str) -> tuple[VcpuState, ...]:
    """The answer of ``info registers -a``, one state for each ``CPU#n`` block."""
    states = []
    for block in _CPU.split(text):
        values = {name: int(value, 16) for name, value in _REGISTER.findall(block)}
        if {"CR0", "CR3", "CR4"} <= values.keys():
            idt = _IDT.search(block)
            bases = {name: int(value, 16) for name, value in _SEGMENT.findall(block)}
            states.append(
                VcpuState(
                    values["CR0"],
                    values["CR3"],
                    values["CR4"],
                    rip=values.get("RIP", values.get("EIP", 0)),
                    idt_base=int(idt[1], 16) if idt else 0,
                    fs_base=bases.get("FS", 0),
                    gs_base=bases.get("GS", 0),
                )
            )
    return tuple(states)


def parse_flat_view(text: str) -> tuple[tuple[Region, str, int], ...]:
    """RAM of the "memory" address space in ``info mtree -f``: region, name of its block, offset in the block."""
    view = next((part for part in text.split("FlatView #") if 'AS "memory"' in part), "")
    found = []
    for start, last, name, offset in _FLAT_RAM.findall(view):
        gpa = int(start, 16)
        found.append((Region(gpa, int(last, 16) + 1 - gpa), name, int(offset or "0", 16)))
    return tuple(found)


def parse_host_address(text: str) -> int | None:
    """The answer of ``gpa2hva``."""
    found = _HOST_VA.search(text)
    return int(found[1], 16) if found else None


def _connect(client: socket.socket, path: str | Path) -> None:
    """Connect by a descriptor: the path itself may be longer than the 108 bytes of an address."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        client.connect(f"/proc/self/fd/{place}")
    finally:
        os.close(place)


def _explain(path: str | Path, error: OSError) -> HostError:
    what = f"the QMP socket {path} cannot be used"
    if isinstance(error, BlockingIOError):  # its queue holds but one more
        return HostError(f"{what}: another client may hold it")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return PermissionRefused(f"{what}: {error.strerror}; run as root or as the user of this QEMU")
    return HostError(f"{what}: {error.strerror or error}")
