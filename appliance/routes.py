"""By which way a guest's memory is read: the one place that knows every memory backend.

Best first: a QEMU's own process; Xen's foreign mappings; libvirt's memoryPeek and QEMU's monitor, which are slow;
LibVMI, never unless it is asked for by name.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from appliance.errors import UnreadableMemory, UsageError
from appliance.memory.file import open_file
from appliance.memory.libvirt import open_libvirt
from appliance.memory.libvmi import open_libvmi_file, open_libvmi_xen
from appliance.memory.libvmi import probe as probe_libvmi
from appliance.memory.monitor import open_monitor
from appliance.memory.qemu import open_qemu
from appliance.memory.xen import open_xen
from appliance.model import GuestInfo, Region
from appliance.ports import GuestMemory

ROUTES = ("qemu", "xen", "libvirt", "qmp", "file", "libvmi")
PAGE = 4096
MEASURE_S = 0.25  # for each of the two rates
MAX_BATCH = 1024  # pages asked for at once
# How much longer a look may take than one through the QEMU process itself: where each read costs milliseconds.
PATIENCE = {"xen": 8.0, "libvirt": 20.0, "qmp": 20.0, "libvmi": 20.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast a route is here and now: pages of 4 KiB in batches, all over RAM; and single reads of eight bytes."""

    pages_per_s: float
    reads_per_s: float


def open_memory(info: GuestInfo, route: str | None = None, *, change_domain: bool = False) -> GuestMemory:
    """Open a guest's memory by ``route``, None for the best of ``info.routes``.

    ``change_domain`` admits routes that change settings of the domain while they are open (LibVMI on Xen).
    Raises UsageError (no such route to this guest), PermissionRefused, HostError with the remedy, GuestGone.
    """
    target = info.id.target
    route = choose(info, route)
    match route:
        case "file":
            return open_file(target.removeprefix("file:"))
        case "qemu" if info.pid is not None:
            return open_qemu(info.pid)
        case "qmp" if info.pid is not None:
            return open_monitor(info.pid)
        case "libvirt" if info.id.uuid is not None:
            return open_libvirt(info.id.uuid, pid=info.pid)
        case "xen" if info.domid is not None:
            return open_xen(info.domid, info.id.uuid, info.memory_bytes)
        case "libvmi" if info.domid is not None:
            return open_libvmi_xen(info.domid, info.id.uuid, info.memory_bytes, change_domain=change_domain)
        case "libvmi" if target.startswith("file:"):
            return open_libvmi_file(target.removeprefix("file:"))
    raise UsageError(f"{target}: there is no route {route!r}")


def choose(info: GuestInfo, route: str | None = None) -> str:
    """The route to take: the one that is named, else the best there is. Raises UsageError."""
    target = info.id.target
    if not info.routes:
        raise UsageError(f"{target} has no memory to read: only its packets can be watched")
    if route is None:
        return info.routes[0]
    if route not in info.routes:
        why = f" ({_why_not(route, info)})" if route in ROUTES else f", there are: {', '.join(ROUTES)}"
        raise UsageError(f"{target} cannot be read by {route!r}{why}; its routes are: {', '.join(info.routes)}")
    return route


def _why_not(route: str, info: GuestInfo) -> str:
    """What a guest lacks for a route that it does not have."""
    if route == "libvmi" and (info.domid is not None or info.id.target.startswith("file:")):
        return probe_libvmi().reason
    return {
        "qemu": "it is no QEMU process that can be seen",
        "xen": "it is no Xen domain",
        "libvirt": "it is no domain of libvirt, or libvirt cannot be asked",
        "qmp": "it has no QMP socket of its own, free of a manager",
        "libvmi": "LibVMI reads Xen domains and raw images; KVM only on a patched host",
        "file": "it is no memory image",
    }[route]


def measure(memory: GuestMemory, *, seconds: float = MEASURE_S, clock: Callable[[], float] = time.perf_counter) -> Rate:
    """Measure a route, for at most ``seconds`` for each rate and the one call that is then under way.

    Only touches pages that the guest has used where the route can tell. Raises GuestGone.
    """
    tell = getattr(memory, "data_regions", None)
    pages = _Pages(tell() if tell else memory.regions)
    got, count, start_s = 0, 1, clock()
    while (took_s := clock() - start_s) < seconds:
        batch_s = clock()
        got += sum(piece is not None for piece in memory.readv([(gpa, PAGE) for gpa in pages.draw(count)]))
        if clock() - batch_s < (seconds - took_s) / 4:
            count = min(2 * count, MAX_BATCH)
    pages_per_s = got / (clock() - start_s)
    got, start_s = 0, clock()
    while clock() - start_s < seconds:
        for gpa in pages.draw(16 if got >= 16 else 1):
            with suppress(UnreadableMemory):
                memory.read(gpa, 8)
                got += 1
    return Rate(pages_per_s, got / (clock() - start_s))


class _Pages:
    """Pages of RAM by chance, each as likely as any other; the same ones in each run."""

    def __init__(self, regions: tuple[Region, ...]) -> None:
        self._random = random.Random(1)  # noqa: S311  no secret
        self._firsts = [-(-region.gpa // PAGE) * PAGE for region in regions]
        self._counts = [
            max(0, (region.gpa + region.size - first) // PAGE)
            for region, first in zip(regions, self._firsts, strict=True)
        ]

    def draw(self, count: int) -> list[int]:
        """So many of them; none where there is no RAM."""
        if not any(self._counts):
            return []
        chosen = self._random.choices(range(len(self._counts)), self._counts, k=count)
        return [self._firsts[index] + PAGE * self._random.randrange(self._counts[index]) for index in chosen]
