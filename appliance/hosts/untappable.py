"""Networks of a guest that have no port on this host, and what to do about it: silence would look like safety.

Sources: qapi/net.json in QEMU (``NetClientDriver``), Documentation/ABI/testing/sysfs-bus-pci (class, physfn),
Documentation/networking/switchdev.rst (representors), Documentation/driver-api/vfio.rst (groups, device files).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from appliance.hosts.arguments import Arguments

SYS: Final = Path("/sys")
VDPA: Final = "/dev/vhost-vdpa-"
HANDED: Final = re.compile(rf"/dev/vfio/(\d+|devices/vfio\d+)|{VDPA}\d+")  # device files of what is handed through
NETWORK_CLASS: Final = "0x02"  # PCI base class: network controller

_USE_A_TAP: Final = "its packets cannot be tapped; use a tap on a bridge"
_BETWEEN: Final = f"packets travel between processes, past every port of this host: {_USE_A_TAP}"
_WHY: Final = {
    "user": f"user-mode network (slirp) has no port on this host: {_USE_A_TAP}",
    "passt": f"passt has no port on this host: {_USE_A_TAP}",
    "vhost-user": "vhost-user packets stay in shared memory with the switch: tap a mirror port of that switch instead",
    "vhost-vdpa": "vDPA packets go straight to the network card: use its representor port",
    "stream": _BETWEEN,
    "dgram": _BETWEEN,
    "socket": _BETWEEN,
    "l2tpv3": _BETWEEN,
    "vde": _BETWEEN,
    "netmap": "netmap packets stay in shared memory with the switch: tap a port of that switch instead",
    "af-xdp": "AF_XDP packets go past the host's network stack to the card: use a tap on a bridge",
}
_ADDRESS: Final = re.compile(r"([0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def explain_untappable(arguments: Arguments, sys: Path = SYS) -> Iterator[str]:
    """Yield one note for each network of the guest, or card handed to it, whose packets cannot be seen here."""
    if arguments.default_net:
        yield f"network: QEMU's default {_WHY['user']}"
    for device in arguments.nets:
        if device.kind not in {"tap", "bridge"}:
            why = _WHY.get(device.kind, f"{device.kind} network has no port on this host: it cannot be tapped")
            yield f"network {device.id}: {why}"
    for device_text in arguments.passthrough:
        if note := explain_device(device_text, sys):
            yield note


def explain_handed(devices: Iterable[str], arguments: Arguments, sys: Path = SYS) -> Iterator[str]:
    """The same for the device files of VFIO and vDPA that QEMU holds: cards handed through while the guest ran.

    What the command line names is left to `explain_untappable`; of one VFIO group it may name a part.
    """
    named = {_address(text.partition(" ")[2]) for text in arguments.passthrough}
    for path in devices:
        if path.startswith(VDPA):
            if not any(text.endswith(path) for text in arguments.passthrough) and not _has_vdpa(arguments):
                yield f"device {path}: if it is a network card, {_WHY['vhost-vdpa']}"
            continue
        behind = sorted(_behind(path, sys))
        if named.isdisjoint(behind):
            yield from (note for name in behind if (note := explain_device(f"vfio-pci {name}", sys)))


def _has_vdpa(arguments: Arguments) -> bool:
    return any(device.kind == "vhost-vdpa" for device in arguments.nets)


def _behind(path: str, sys: Path) -> Iterator[str]:
    """The PCI addresses behind a device file: of a whole group, or of one device (iommufd)."""
    name = path.rsplit("/", 1)[-1]
    try:
        if name.isdigit():
            yield from (entry.name for entry in (sys / "kernel/iommu_groups" / name / "devices").iterdir())
        else:
            yield (sys / "class/vfio-dev" / name / "device").readlink().name
    except OSError:
        return  # a mediated device, or sysfs is not what it was


def explain_device(text: str, sys: Path = SYS) -> str | None:
    """What a device handed through hides from us; None when it is certainly no network card."""
    driver, _, where = text.partition(" ")
    unknown = f"device {text} is handed through: if it is a network card, its packets do not cross this host"
    if driver.startswith("vhost-vdpa"):
        return f"device {text}: if it is a network card, {_WHY['vhost-vdpa']}"
    name = _address(where)
    if name is None:
        return unknown
    device = sys / "bus/pci/devices" / name
    try:
        kind = (device / "class").read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return unknown
    if not kind.startswith(NETWORK_CLASS):
        return None
    if (device / "physfn").exists():
        return (
            f"device {text} is a virtual function of a network card (SR-IOV): its packets go straight to the card; "
            "use its representor port (devlink dev eswitch set pci/... mode switchdev), or a tap on a bridge"
        )
    return f"device {text} is a network card handed through: its packets do not cross this host; use a tap on a bridge"


def _address(where: str) -> str | None:
    """The full PCI address in what QEMU was told, None where it is none."""
    name = where.rsplit("/", 1)[-1].lower()
    if _ADDRESS.fullmatch(name) is None:
        return None
    return name if name.count(":") == 2 else f"0000:{name}"
