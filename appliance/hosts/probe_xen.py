"""Is this Xen host ready? Its control domain, its devices, its store. ``root`` is where /proc, /sys, /dev and /run are.

What its libraries say is asked where they are used (memory/xen.py); nothing is opened here.
Sources: Documentation/ABI/stable/sysfs-hypervisor-xen, drivers/xen/privcmd.c, drivers/xen/xenfs, xenstored(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.hosts.confinement import ROOT
from appliance.hosts.lsm import read_text
from appliance.model import Availability

_PRIVCMD: Final = ("dev/xen/privcmd", "proc/xen/privcmd")
_XENSTORE: Final = ("run/xenstored/socket", "var/run/xenstored/socket", "dev/xen/xenbus", "proc/xen/xenbus")
_MOUNT: Final = "mount -t xenfs xenfs /proc/xen"


def is_xen(root: Path = ROOT) -> bool:
    """Whether this kernel runs on Xen."""
    return read_text(root / "sys/hypervisor/type") == "xen" or (root / "proc/xen/capabilities").exists()


def probe_xen(root: Path = ROOT) -> Iterator[Availability]:
    """One line for each thing that a Xen host needs; none where there is no Xen."""
    if not is_xen(root):
        return
    release = ".".join(read_text(root / f"sys/hypervisor/version/{part}") or "?" for part in ("major", "minor"))
    if not _is_control_domain(root):
        reason = f"Xen {release}, and this is one of its guests: the others can be seen from dom0 only"
        remedy = f"run parasight in dom0; if this is dom0: {_MOUNT}"
        yield Availability("xen domain", False, reason, remedy)
        return
    yield Availability("xen domain", True, f"Xen {release}, and this is its control domain (dom0)")
    yield _device("xen privcmd", root, _PRIVCMD, "memory of domains can be mapped", "modprobe xen-privcmd")
    why = "domains can be listed"
    yield _device("xenstore", root, _XENSTORE, why, "systemctl start xenstored.service xen-init-dom0.service")


def _is_control_domain(root: Path) -> bool:
    if "control_d" in (read_text(root / "proc/xen/capabilities") or ""):
        return True
    features = read_text(root / "sys/hypervisor/properties/features") or ""
    try:
        return bool(int(features, 16) >> 11 & 1)  # XENFEAT_dom0, xen/include/public/features.h
    except ValueError:
        return False


def _device(name: str, root: Path, paths: tuple[str, ...], why: str, remedy: str) -> Availability:
    found = next((path for path in paths if (root / path).exists()), None)
    if found is None:
        return Availability(name, False, f"there is no /{paths[0]}", remedy)
    return Availability(name, True, f"/{found}: {why}")
