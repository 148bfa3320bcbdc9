"""Which guests can be read by which route, and how fast: the part of ``doctor`` that asks and measures.

Nothing here may hang: the inventory and each route are asked in a thread of their own, with a deadline. Routes that
cost the guest something are measured for a moment only; LibVMI on Xen, which changes the domain, is not opened at all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from appliance.bounded import Worker
from appliance.errors import GuestError, GuestGone, HostError, PermissionRefused, UsageError
from appliance.hosts.confinement import explain_refusal
from appliance.hosts.inventory import Inventory, is_running
from appliance.memory.libvmi import probe as probe_libvmi
from appliance.memory.xen import probe as probe_xen_memory
from appliance.model import Availability, GuestInfo
from appliance.routes import MEASURE_S, Rate, measure, open_memory

MAX_GUESTS: Final = 8  # that are measured
ANSWER_S: Final = 15.0  # for one route, or for the inventory: some open slowly, and a busy host is slow
ALL_S: Final = 60.0  # when no further guest is asked
MOMENT_S: Final = 0.05  # of measuring a route whose reads the guest's own QEMU carries out
_COSTLY: Final = {"libvirt", "qmp"}
_DEEDS: Final = ("run ", "run:", "on Debian:", "see:", "mount ", "or:", "apt-get ")  # how errors begin a remedy
_ALLOWED: Final = "--route libvmi --libvmi-allow-domain-changes"


def find_guests(seconds: float = ANSWER_S) -> tuple[list[GuestInfo], list[str]]:
    """Every guest of this host, and what could not be asked."""

    def ask() -> tuple[list[GuestInfo], list[str]]:
        with Inventory.of_this_host() as inventory:
            return inventory.find_guests(), list(inventory.troubles)

    try:
        return Worker("inventory").run(ask, seconds)
    except TimeoutError:
        return [], [f"the list of guests was not there within {seconds:g} s"]
    except HostError as error:
        return [], [str(error)]


def probe_libraries(*, xen: bool) -> Iterator[Availability]:
    """What the optional routes need: Xen's libraries on a Xen host, LibVMI anywhere."""
    if xen:
        found = probe_xen_memory()
        yield replace(found, name="xen memory")
    yield probe_libvmi()


def probe_routes(
    guests: Sequence[GuestInfo], seconds: float = ANSWER_S, all_s: float = ALL_S
) -> Iterator[Availability]:
    """One line for each route to each of the first guests that have one: ``seconds`` for a route, ``all_s`` for all."""
    readable = [one for one in guests if one.routes]
    until_s, asked = time.monotonic() + all_s, 0
    for info in readable[:MAX_GUESTS]:
        if time.monotonic() >= until_s:
            break
        yield from _probe_guest(info, seconds)
        asked += 1
    if asked < len(readable):
        left = len(readable) - asked
        why = f"{left} more {'guest was' if left == 1 else 'guests were'} not measured"
        yield Availability("routes", True, why, required=False)


def _probe_guest(info: GuestInfo, seconds: float) -> Iterator[Availability]:
    """The routes of one guest; none at all where it ended meanwhile."""
    found: list[Availability] = []
    refused = False
    for route in info.routes:
        if route == "libvmi" and info.domid is not None:
            found.append(_decline_libvmi(info, only=not any(one.ok for one in found)))
            continue
        try:
            reason = _tell_rate(info, route, _measure(info, route, seconds))
        except (GuestError, HostError, UsageError, OSError) as error:
            if isinstance(error, GuestGone | UsageError) and _has_ended(info):
                return
            refused = refused or isinstance(error, PermissionRefused)
            found.append(_tell_failure(info, route, error, seconds))
        else:
            found.append(Availability(_name(info, route), True, reason, required=False))
    lost = refused and not any(one.ok for one in found)  # the host keeps us from all that could be seen
    yield from (replace(one, required=lost and not one.ok) for one in found)


def _has_ended(info: GuestInfo) -> bool:
    try:
        return not is_running(info)
    except HostError:
        return False


def _measure(info: GuestInfo, route: str, seconds: float) -> Rate:
    def run() -> Rate:
        with contextlib.closing(open_memory(info, route)) as memory:
            return measure(memory, seconds=MOMENT_S if route in _COSTLY else MEASURE_S)

    return Worker(f"{info.id.target} {route}").run(run, seconds)


def _tell_rate(info: GuestInfo, route: str, rate: Rate) -> str:
    who = f"{info.id.name}: " if info.id.name else ""
    size = f"{info.memory_bytes >> 20} MiB, " if info.memory_bytes else ""
    chosen = "" if route == info.routes[0] else "; only by name"
    return f"{who}{size}{rate.pages_per_s:,.0f} pages/s, {rate.reads_per_s:,.0f} reads of 8 bytes/s{chosen}"


def _tell_failure(info: GuestInfo, route: str, error: Exception, seconds: float) -> Availability:
    name = _name(info, route)
    if isinstance(error, TimeoutError):
        return Availability(name, False, f"no answer within {seconds:g} s", _unstick(route), required=False)
    if isinstance(error, PermissionRefused) and route == "qemu" and info.pid is not None:
        obstacle = explain_refusal(info.pid)
        return Availability(name, False, obstacle.reason, obstacle.remedy, required=False)
    reason, remedy = _split(" ".join(str(error).split()))
    return Availability(name, False, reason, remedy, required=False)


def _split(text: str) -> tuple[str, str | None]:
    """An error's reason, and what it says last if that is something to do."""
    reason, _, last = text.rpartition("; ")
    return (reason, last) if reason and last.startswith(_DEEDS) else (text, None)


def _unstick(route: str) -> str:
    return {
        "libvirt": "systemctl restart libvirtd (or virtqemud), which leaves its guests running",
        "qmp": "close whatever else holds the monitor's socket open",
    }.get(route, "is the guest's host process stopped, or its memory being migrated? see: ps -o stat,wchan")


def _decline_libvmi(info: GuestInfo, *, only: bool) -> Availability:
    why = "it changes the domain's memory limit while it is attached, so it is never taken by itself"
    if only:
        reason = f"LibVMI is the only way to this guest's memory here, and {why}"
        remedy = f"mend the route xen (above); until then: parasight connections {info.id.target} {_ALLOWED}"
        return Availability(_name(info, "libvmi"), False, reason, remedy, required=False)
    return Availability(_name(info, "libvmi"), True, f"not measured: {why}; {_ALLOWED}", required=False)


def _name(info: GuestInfo, route: str) -> str:
    return f"route {info.id.target} {route}"
