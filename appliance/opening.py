"""Opens what a watch needs: the guest's memory, its ports. Knows which room offers what."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from appliance.errors import ConfigError, GuestError, HostError, OutOfTime, UnsupportedGuest, UsageError
from appliance.evidence.volatility import SecondOpinion
from appliance.evidence.volatility import probe as probe_other
from appliance.flow.community import community_id
from appliance.flow.table import FlowTable
from appliance.flow.tracking import TrackedTap
from appliance.guest.attach import NO_LINUX, attach
from appliance.guest.linux import eye as linux
from appliance.guest.linux.eye import LinuxEye
from appliance.guest.windows import eye as windows
from appliance.guest.windows.attach import attach as attach_windows
from appliance.guest.windows.eye import WindowsEye
from appliance.guest.windows.roots import is_linux, looks_like_windows
from appliance.guest.windows.symbols import SymbolStore
from appliance.model import Gap, GuestInfo, IpAddress, Snapshot, Transport
from appliance.ports import GuestEye, GuestMemory, OtherEngine, PacketTap
from appliance.routes import PATIENCE, choose, open_memory
from appliance.tap import ladder
from appliance.tap.af_packet import PortSource
from appliance.tap.bpf.tap import KernelTap
from appliance.tap.ladder import ObservingTap, Rung
from appliance.tap.merged import MergedSource

SEARCH_S, OFFLINE_SEARCH_S = 5.0, 60.0  # for a Windows kernel that no register leads to
_FAST = {"qemu", "xen"}  # routes by which Volatility's many reads are done in time
_TCP = 6  # IANA protocol number
Tell = Callable[[str], None]
Learn = Callable[[int, IpAddress | None, int], None]


def open_eye(
    info: GuestInfo,
    symbols: Sequence[Path] = (),
    *,
    thorough: bool = False,
    brief: bool = False,
    route: str | None = None,
    change_domain: bool = False,
) -> GuestEye:
    """Attach to a guest's memory; ``symbols`` are folders with symbol tables of Windows.

    ``brief``: look for a Windows only where one usually shows, not in all of RAM; for what is tried again soon.
    ``thorough``: a full look may take as long as it takes to look everywhere, since nobody waits with packets in hand.
    ``route`` and ``change_domain`` as for `open_memory`; where reading is slow, a look may take longer.
    Raises GuestError, HostError, ConfigError or UsageError with what to do.
    """
    chosen = choose(info, route)
    try:
        memory = open_memory(info, chosen, change_domain=change_domain)
    except OSError as error:  # too many open files, as a rule
        raise HostError(f"its memory cannot be opened: {error}") from error
    missing: tuple[Gap, ...] = ()
    try:
        if thorough or not memory.live:  # of a guest that runs on, they change: they are told of one look only
            missing = getattr(memory, "gaps", ())[:1]  # the others are its parts
        look = _Look(thorough or not memory.live, PATIENCE.get(chosen, 1.0), missing, brief)
        return _attach_to(memory, symbols, look)
    except BaseException as error:
        memory.close()
        if isinstance(error, GuestError) and missing and not memory.live:
            path = info.id.target.removeprefix("file:")
            raise ConfigError(f"{path}: {missing[0].why}; {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class _Look:
    """How an eye may look: everywhere or not, how many times slower than usual, and what it will not find."""

    thorough: bool
    patience: float
    missing: tuple[Gap, ...]
    brief: bool = False


def _attach_to(memory: GuestMemory, symbols: Sequence[Path], look: _Look) -> GuestEye:
    """The eye that fits what runs there; where there is neither Linux nor Windows, both are said to be missing."""
    open_windows = partial(_open_windows, memory, symbols, look)
    # Cheap: a Linux guest must not wait for more; nor may what is left of a Windows that ran before it mislead.
    if not is_linux(memory) and looks_like_windows(memory, near=False):
        return open_windows()
    try:
        return _open_linux(memory, look)
    except UnsupportedGuest as error:
        if error.missing != (NO_LINUX,) or (look.brief and not looks_like_windows(memory)):
            raise
    try:
        return open_windows()
    except (UnsupportedGuest, OutOfTime) as error:
        why = error.missing if isinstance(error, UnsupportedGuest) else (str(error),)
        raise UnsupportedGuest((NO_LINUX, *why)) from error


def _open_linux(memory: GuestMemory, look: _Look) -> GuestEye:
    vcpus = memory.vcpus()  # an ELF core and Xen tell them; a running QEMU is not asked
    kernel = attach(memory, cr3=vcpus[0].cr3 if vcpus else None)
    if look.patience == 1 or not memory.live:
        return LinuxEye(kernel, missing=look.missing)
    look_s, lookup_s = look.patience * linux.LOOK_S, look.patience * linux.LOOKUP_S
    return LinuxEye(kernel, look_s=look_s, lookup_s=lookup_s, missing=look.missing)


def _open_windows(memory: GuestMemory, symbols: Sequence[Path], look: _Look) -> GuestEye:
    seconds = look.patience * SEARCH_S if memory.live else OFFLINE_SEARCH_S
    kernel = attach_windows(memory, symbols=SymbolStore.default(symbols), seconds=seconds)
    if look.patience == 1 or not memory.live:
        return WindowsEye(kernel, thorough=look.thorough, missing=look.missing)
    look_s, lookup_s = look.patience * windows.LOOK_S, look.patience * windows.LOOKUP_S
    return WindowsEye(kernel, look_s=look_s, lookup_s=lookup_s, thorough=look.thorough, missing=look.missing)


def open_eye_or_say(
    info: GuestInfo, tell: Tell, symbols: Sequence[Path] = (), *, route: str | None = None, change_domain: bool = False
) -> GuestEye | None:
    """Attach, and tell a person how that went; None: this guest is watched by its packets only."""
    start_s = time.monotonic()
    try:
        eye = open_eye(info, symbols, route=route, change_domain=change_domain)
    except GuestError as error:
        tell(f"{info.id.target}: {error}; watching its packets only")
        return None
    tell(f"{info.id.target}: {eye.describe}, attached in {time.monotonic() - start_s:.2f} s")
    return eye


def open_eye_or_none(
    info: GuestInfo, symbols: Sequence[Path] = (), *, route: str | None = None, change_domain: bool = False
) -> GuestEye | None:
    """Attach once more, without a word where that fails: it was said before."""
    try:
        return open_eye(info, symbols, route=route, change_domain=change_domain)
    except (GuestError, HostError, UsageError):
        return None


def open_other(info: GuestInfo, symbols: Sequence[Path] = (), *, route: str | None = None) -> OtherEngine | None:
    """Whom to ask for a second opinion; None: nobody is here, or the guest's memory cannot be reached fast enough."""
    if (route or next(iter(info.routes), None)) not in _FAST.intersection(info.routes) or not probe_other().ok:
        return None
    return SecondOpinion(info.id.target, symbols=symbols)


def open_tap(info: GuestInfo, tell: Tell, *, rung: str | None, fail_closed: bool) -> tuple[PacketTap, Rung, Learn]:
    """Open the best tap there is, say which one it is where it is not the best; and how it learns of servers."""
    tap, found = ladder.open_tap(
        info.id,
        info.ports,
        time.time_ns,
        community_id=community_id,
        fallback=partial(_open_tracked, info),
        rung=rung,
        fail_closed=fail_closed,
    )
    for reason in found.reasons:
        tell(f"{info.id.target}: {reason}")
    if found.reasons:
        tell(f"{info.id.target}: tap {found}")
    assert isinstance(tap, KernelTap | ObservingTap | TrackedTap)
    return tap, found, tap.table.learn_listener if isinstance(tap, TrackedTap) else tap.learn_listener


def _open_tracked(info: GuestInfo) -> PacketTap:
    """The tap that needs nothing of the kernel but packet sockets."""
    table = FlowTable(info.id, [port.mac for port in info.ports if port.mac])
    sources: list[PortSource] = []
    try:
        for port in info.ports:
            sources.append(PortSource(port))
        return TrackedTap(info.id, MergedSource(sources), table, time.time_ns)
    except BaseException:
        for source in sources:
            source.close()
        raise


def teach(learn: Learn, snapshot: Snapshot) -> None:
    """The guest's own listeners tell who is the server of a connection whose beginning was not seen."""
    for socket in snapshot.sockets:
        if socket.protocol is Transport.TCP and socket.state == "LISTEN":
            ip = None if socket.local.ip.is_unspecified else socket.local.ip
            learn(_TCP, ip, socket.local.port)
