"""libvirt's domains: the only file that knows its Python binding. Read-only connections.

A running domain is found as a QEMU process (its command line carries name and UUID); libvirt is asked for the others.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from appliance.model import Availability

URI: Final = "qemu:///system"


def list_domains() -> list[str]:
    """Names and UUIDs of all domains. Raises ImportError without the binding, OSError without the daemon."""
    try:
        libvirt: Any = importlib.import_module("libvirt")
    except ImportError as error:
        raise ImportError("its Python binding is not installed") from error
    try:
        connection = libvirt.openReadOnly(URI)
    except libvirt.libvirtError as error:
        raise OSError(f"its daemon does not answer: {error}") from error
    try:
        return [text for domain in connection.listAllDomains() for text in (domain.name(), domain.UUIDString())]
    finally:
        connection.close()


def probe() -> Availability:
    """Whether libvirt can be asked for its domains."""
    try:
        list_domains()
    except (ImportError, OSError) as error:
        return Availability("libvirt", ok=False, reason=str(error), remedy="apt-get install python3-libvirt")
    return Availability("libvirt", ok=True, reason="its daemon answers")
