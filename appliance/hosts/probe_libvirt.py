"""Can libvirt be asked on this host? By its files only; whether its daemon answers, the inventory has found out.

``root`` is where /run and /usr are. Sources: libvirt docs/daemons.rst (sockets of libvirtd and virtqemud),
docs/auth.rst (unix_sock_group), docs/aclpolkit.rst.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from appliance.hosts.confinement import ROOT
from appliance.model import Availability

URI_VARIABLE: Final = "PARASIGHT_LIBVIRT_URI"
_SOCKETS: Final = ("run/libvirt/libvirt-sock", "run/libvirt/virtqemud-sock")
_DAEMONS: Final = {
    "libvirtd": ("usr/sbin/libvirtd", "usr/bin/libvirtd"),
    "virtqemud": ("usr/sbin/virtqemud", "usr/bin/virtqemud"),
}
_INSTALL: Final = (
    "apt-get install python3-libvirt; in a venv: apt-get install libvirt-dev pkg-config gcc python3-dev && "
    "pip install 'parasight[libvirt]'"
)
_JOIN: Final = "usermod -aG libvirt $USER, and log in again; or run as root"


def probe_libvirt(troubles: Iterable[str] = (), root: Path = ROOT, *, binding: bool | None = None) -> Availability:
    """Say whether domains can be listed and read. ``troubles``: what libvirt said when it was asked.

    ``binding``: whether its Python binding is here, None to look.
    """
    if binding is None:
        binding = importlib.util.find_spec("libvirt") is not None
    uri = os.environ.get(URI_VARIABLE)
    socket = next((path for path in _SOCKETS if (root / path).exists()), None)
    daemon = next((name for name, paths in _DAEMONS.items() if any((root / path).exists() for path in paths)), None)
    if socket is None and daemon is None and not uri:
        return _say("libvirt is not installed; guests are found by their processes")
    if not binding:
        why = "libvirt is here, but its Python binding is missing: no metadata, no events, no route of its own"
        return _say(why, _INSTALL)
    if trouble := "; ".join(troubles):
        return _say(trouble, _mend(trouble, daemon or "libvirtd"))
    if uri:
        return _say(f"{uri} answers ({URI_VARIABLE})")
    if socket is None:
        return _say(f"{daemon} is installed and does not run", f"systemctl start {daemon}.socket")
    if not os.access(root / socket, os.R_OK | os.W_OK):
        why = f"/{socket} is not ours to write to: domains may be listed, their memory cannot be read through libvirt"
        return _say(why, _JOIN)
    return _say(f"/{socket} answers")


def _mend(trouble: str, daemon: str) -> str:
    """What mends what libvirt, or our asking it, complains of."""
    if "ermission denied" in trouble or "authenti" in trouble:
        return _JOIN
    if "does not answer" in trouble:
        return f"systemctl restart {daemon} (its guests go on running)"
    return f"systemctl start {daemon}.socket; see: systemctl status {daemon}"


def _say(reason: str, remedy: str | None = None) -> Availability:
    return Availability("libvirt", remedy is None, reason, remedy, required=False)
