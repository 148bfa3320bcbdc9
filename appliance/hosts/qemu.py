"""The QEMU guests of this host, whoever started them: identity, size, network ports (P1, P2).

A guest is found by its process alone. What has no port is said in ``notes``: silence would look like safety.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.hosts import proc
from appliance.hosts.arguments import Arguments, parse_arguments
from appliance.hosts.switch import explain_switch, read_switch
from appliance.hosts.taps import Held, find_taps, match_cards, read_held
from appliance.hosts.unreadable import emulated, explain_unreadable
from appliance.hosts.untappable import explain_handed, explain_untappable
from appliance.model import GuestChange, GuestId, GuestInfo, GuestPort

PORTS_S: Final = 5.0  # how long ports are believed to be where they were, while QEMU holds the same descriptors


class QemuSource:
    """The QEMU processes of this host: implements `ports.GuestSource`. Cheap to ask again and again."""

    name = "qemu"

    def __init__(self) -> None:
        self._lives: dict[int, _Life] = {}

    def find_guests(self) -> list[GuestInfo]:
        """Every QEMU guest that runs here and that we may look at, by pid."""
        lives: dict[int, _Life] = {}
        for pid in proc.iter_pids():
            life = self._lives.get(pid)
            if life is None or proc.read_start_time(pid) != life.start:
                life = _begin(pid)
            if life is not None:
                life.look()
                lives[pid] = life
        self._lives = lives
        return [life.info for _, life in sorted(lives.items())]

    def arguments(self, guest: GuestInfo) -> Arguments | None:
        """What the command line of one of these guests says."""
        life = self._lives.get(guest.pid or 0)
        return life.arguments if life is not None else None

    def fileno(self) -> int:
        """Nothing tells of processes: they are looked for again."""
        return -1

    def changes(self) -> tuple[GuestChange, ...]:
        """Nothing is told."""
        return ()

    def close(self) -> None:
        """Nothing is open."""


def find_guests() -> list[GuestInfo]:
    """Every QEMU guest that runs here and that we may look at, by pid."""
    return QemuSource().find_guests()


def find_guest(pid: int) -> GuestInfo:
    """Describe the guest of one QEMU process. Raises UsageError when ``pid`` is none, and says what it is."""
    if proc.read_start_time(pid) is None:
        raise UsageError(f"there is no process {pid}")
    if (leader := proc.read_thread_group(pid)) not in {pid, None}:
        raise UsageError(f"{pid} is a thread of process {leader}; use qemu:{leader}")
    if not proc.is_qemu(pid) or not (argv := proc.read_argv(pid)):
        raise UsageError(f"process {pid} is no QEMU system emulator, it is {proc.read_name(pid) or 'gone'!r}")
    arguments = parse_arguments(argv)
    if arguments.xen_domid is not None:
        raise UsageError(f"process {pid} only emulates devices of a Xen domain; use xen:{arguments.xen_domid}")
    if arguments.machine == "none":
        raise UsageError(f"process {pid} is a QEMU without a machine: somebody asks it what it can do")
    life = _begin(pid)
    if life is None:
        raise UsageError(f"process {pid} ended while it was looked at")
    life.look()
    if not is_running(life.info):
        raise UsageError(f"process {pid} ended while it was looked at")
    return life.info


def is_running(guest: GuestInfo) -> bool:
    """Whether the very same QEMU process still runs; its pid may have been used again."""
    return guest.pid is not None and guest.id.instance == f"{guest.pid}-{proc.read_start_time(guest.pid)}"


def is_libvirts(guest: GuestInfo) -> bool:
    """Whether libvirt has started its process, and so can tell more of it."""
    return guest.pid is not None and parse_arguments(proc.read_argv(guest.pid)).libvirt_id is not None


def is_managed(guest: GuestInfo, arguments: Arguments) -> bool:
    """Whether a process that names a key of libvirt's runs as the user to whom libvirt gave that key."""
    try:
        owner = Path(arguments.libvirt_key or "").stat().st_uid
    except OSError:
        return False
    return owner == proc.read_user(guest.pid or 0)


def check_permission(guest: GuestInfo) -> None:
    """Raise PermissionRefused when the process of ``guest`` may not be looked into."""
    try:
        next(iter(proc.iter_descriptors(guest.pid or 0)), None)
    except PermissionError as error:
        raise PermissionRefused(f"{guest.id}: not allowed to look into process {guest.pid}; run as root") from error
    except OSError as error:
        raise HostError(f"{guest.id}: process {guest.pid} is gone") from error


def _begin(pid: int) -> _Life | None:
    """Read what cannot change of one life of a process; None where it is no guest, or has just ended."""
    qemu = proc.read_qemu(pid)  # first, for it is asked of every process of the host
    start = proc.read_start_time(pid) if qemu is not None else None
    if start is None or qemu is None or not (argv := proc.read_argv(pid)):
        return None
    arguments = parse_arguments(argv)
    if arguments.machine == "none" or arguments.xen_domid is not None:
        return None
    unreadable = list(explain_unreadable(arguments, emulated(qemu)))
    routes = () if unreadable else ("qemu", "qmp") if arguments.monitors else ("qemu",)
    info = GuestInfo(
        GuestId(f"qemu:{pid}", arguments.uuid, arguments.name, f"{pid}-{start}"),
        pid,
        arguments.memory_bytes,
        routes=routes,
        notes=(*unreadable, *explain_untappable(arguments)),
        hypervisor="qemu",
    )
    return _Life(start, arguments, info, info.notes)


@dataclass(slots=True)
class _Life:
    """One life of a QEMU process. Its ports can change, so they are looked for again where that may be."""

    start: int
    arguments: Arguments
    info: GuestInfo
    notes: tuple[str, ...]  # apart from those about its ports
    held: tuple[Held, ...] | None = None  # what it held when its ports were looked for; None: look again
    looked_s: float = 0.0

    def look(self) -> None:
        """Bring ``info`` up to date."""
        pid, now_s = self.info.pid or 0, time.monotonic()
        try:
            held = read_held(pid)
        except PermissionError:
            refused = f"its ports cannot be seen: /proc/{pid}/fd needs root or CAP_SYS_PTRACE"
            self.info = replace(self.info, ports=(), notes=(refused, *self.notes))
            return
        except OSError:
            return  # it is ending
        if held == self.held and now_s < self.looked_s + PORTS_S:
            return
        notes: list[str] = []
        ports = tuple(match_cards(find_taps(pid, held, notes), self.arguments.nets))
        self.held, self.looked_s = None if notes else held, now_s
        notes += explain_handed((one.device for one in held if one.device), self.arguments)
        self.info = replace(self.info, ports=ports, notes=(*notes, *self.notes, *_explain_switches(ports)))


def _explain_switches(ports: tuple[GuestPort, ...]) -> tuple[str, ...]:
    placed = [(port, port.ifindex) for port in ports if port.ifindex is not None]
    notes = [explain_switch(port, read_switch(port.netns, index)) for port, index in placed]
    return tuple(note for note in notes if note is not None)
