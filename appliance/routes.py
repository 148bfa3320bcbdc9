"""By which way a guest's memory is read: the one place that knows every memory backend.

Best first: a QEMU's own process; Xen's foreign mappings; libvirt's memoryPeek and QEMU's monitor, which are slow;
LibVMI, never unless it is asked for by name.
"""

from __future__ import annotations

from pathlib import Path

from appliance.errors import UsageError
from appliance.memory.file import open_file
from appliance.memory.qemu import open_qemu
from appliance.model import GuestInfo
from appliance.ports import GuestMemory


def open_memory(info: GuestInfo, route: str | None = None, *, change_domain: bool = False) -> GuestMemory:
    """Open a guest's memory by ``route``, None for the best of ``info.routes``.

    ``change_domain`` admits routes that change settings of the domain while they are open (LibVMI on Xen).
    Raises UsageError (no such route to this guest), PermissionRefused, HostError with the remedy, GuestGone.
    """
    target = info.id.target
    if not info.routes:
        raise UsageError(f"{target} has no memory to read: only its packets can be watched")
    route = route or info.routes[0]
    if route not in info.routes:
        raise UsageError(f"{target} cannot be read by {route!r}; its routes are: {', '.join(info.routes)}")
    match route:
        case "file":
            return open_file(Path(target.removeprefix("file:")))
        case "qemu" if info.pid is not None:
            return open_qemu(info.pid)
    raise UsageError(f"{target}: there is no route {route!r}")
