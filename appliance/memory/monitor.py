"""Guest RAM through QEMU's own monitor: the human monitor's ``xp`` over a QMP socket that nobody else owns. Very slow.

Each piece is read by QEMU's main loop, so the guest's devices wait for it: pieces are small (at most 4 KiB), and this
way is only taken where it is named. The socket takes one client at a time: it is freed after each batch, at the latest
after `TURN_S`. A manager's own monitor is never used.

``pmemsave`` would be faster, but writes a file as QEMU's user, in QEMU's mount namespace and under its confinement,
which leaves files behind where we end too soon; and a FIFO in its place lets QEMU's main loop, and so the guest, wait
for us to read. ``xp`` prints zeros, or touches a device, for what is no RAM: nothing is asked for outside the map,
which is what ``info mtree -f`` says when the memory is opened.
Sources: QEMU monitor/hmp-cmds-target.c (memory_dump), hmp-commands.hx (xp), softmmu/memory.c (info mtree),
docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence

from appliance.errors import GuestGone, HostError, UnreadableMemory, UsageError
from appliance.memory import qmp
from appliance.memory.batches import Ram, gather
from appliance.memory.commandline import CommandLine
from appliance.memory.layout import LEGACY_HOLE
from appliance.memory.process import open_life, read_start_time
from appliance.memory.qemu import read_command_line
from appliance.model import Region, VcpuState

PIECE = 4096  # bytes of one command: some 0.2 ms of QEMU's main loop
TURN_S = 0.5  # for how long others find the socket taken
ANSWER_S = 2.0  # well below what a guest's thread may take for one round (pacemaker.HANGS_S)
REST_S = 3.0  # after a conversation that cost its whole time the next ones fail at once for so long
_WORD = re.compile(r" 0x([0-9a-f]{16})\b")


class QmpMemory:
    """Guest-physical RAM of one QEMU process, as its monitor tells it."""

    name = "qmp"
    live = True

    def __init__(self, pid: int, socket: str, regions: Iterable[Region]) -> None:
        self.pid, started = pid, read_start_time(pid)
        self.instance = f"{pid}.{started}"
        self._turns, self._socket, self._ram = _Turns(socket, pid), socket, Ram(regions)
        self._pidfd = open_life(pid, started)
        self._poll = select.poll()  # select(2) knows no descriptor above 1023
        self._poll.register(self._pidfd, select.POLLIN)

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM, sorted, disjoint; without the hole between 640 KiB and 1 MiB."""
        return self._ram.regions

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        self._ram.check(gpa, size)
        with self._turns as turns:
            try:
                return turns.read(gpa, size)
            except HostError as error:
                self.check_alive()
                raise UnreadableMemory(gpa, size, str(error)) from None

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans, what touches by one command; None where one is unreadable."""
        broken = False

        def fetch(gpa: int, size: int) -> bytes | None:
            nonlocal broken
            try:
                return None if broken else turns.read(gpa, size)
            except HostError:
                self.check_alive()
                broken = True  # busy or silent: the rest of the batch would find it so as well
                return None

        with self._turns as turns:
            return gather(self._ram.plan(spans, gap=64, limit=PIECE), spans, fetch)

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers; empty where the socket is busy."""
        try:
            return qmp.read_vcpus(self._socket, pid=self.pid)
        except HostError:
            return ()

    def check_alive(self) -> None:
        """Raise GuestGone unless the same QEMU process is still there."""
        if self._pidfd < 0 or self._poll.poll(0):
            raise GuestGone(f"process {self.pid} has ended")

    def close(self) -> None:
        """Release the descriptor; may be called twice."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def open_monitor(pid: int) -> QmpMemory:
    """Open the RAM of a QEMU by the QMP socket on its command line.

    Raises UsageError (no QEMU, or no such socket), HostError (busy, or it names no RAM), PermissionRefused.
    """
    line = read_command_line(pid)
    if not line.monitors:
        raise UsageError(f"QEMU process {pid} has no QMP socket of its own: start it with -qmp unix:PATH,server,nowait")
    socket = qmp.find_socket(pid, line.monitors[0])
    with qmp.Monitor(socket, ANSWER_S, pid) as monitor:
        regions = list(_ram(monitor.human("info mtree -f"), line))
    if not regions:
        raise HostError(f"QEMU's monitor {line.monitors[0]} names no RAM")
    return QmpMemory(pid, socket, regions)


def _ram(tree: str, line: CommandLine) -> Iterator[Region]:
    """The RAM among what QEMU shows: firmware and display memory are told as RAM, too."""
    names = {"pc.ram", "microvm.ram", *line.hotplug, *(block.id for block in line.blocks)}
    for region, name, _ in qmp.parse_flat_view(tree):
        if name in names:
            end = region.gpa + region.size
            yield Region(region.gpa, min(end, LEGACY_HOLE[0]) - region.gpa)  # what comes out empty is left out
            start = max(region.gpa, LEGACY_HOLE[1])
            yield Region(start, end - start)


class _Turns:
    """The socket, taken for a short while at a time."""

    def __init__(self, socket: str, pid: int) -> None:
        self._socket, self._pid = socket, pid
        self._monitor: qmp.Monitor | None = None
        self._until_s = self._rest_until_s = 0.0

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of RAM. Raises HostError: busy, gone or silent."""
        pieces: list[bytes] = []
        for start in range(gpa, gpa + size, PIECE):
            count = min(PIECE, gpa + size - start)
            at = start & ~7  # whole words: RAM begins and ends with a page, so none of them reaches beyond it
            words = -(-(start + count - at) // 8)
            pieces.append(parse_words(self._human(f"xp /{words}gx {at:#x}"), words)[start - at :][:count])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _human(self, command: str) -> str:
        if self._monitor is not None and time.monotonic() > self._until_s:
            self.__exit__()
        began_s = time.monotonic()
        if began_s < self._rest_until_s:
            raise HostError(f"the QMP socket {self._socket} did not answer just now: it is busy, or QEMU is stuck")
        try:
            if self._monitor is None:
                self._monitor = qmp.Monitor(self._socket, ANSWER_S, self._pid)
                self._until_s = began_s + TURN_S
            return self._monitor.human(command)
        except HostError:
            if time.monotonic() - began_s > ANSWER_S / 2:
                self._rest_until_s = time.monotonic() + REST_S
            raise

    def __enter__(self) -> _Turns:
        return self

    def __exit__(self, *_: object) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None


def parse_words(text: str, count: int) -> bytes:
    """The answer of ``xp /COUNTgx``. Raises HostError where it is anything else."""
    digits = _WORD.findall(text)
    if len(digits) != count:
        raise HostError(f"QEMU told {len(digits)} words of memory where {count} were asked for")
    words = array("Q", bytes.fromhex("".join(digits)))
    if sys.byteorder == "little":
        words.byteswap()  # they are printed with their highest digit first
    return words.tobytes()
