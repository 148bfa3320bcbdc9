"""What the XML of a libvirt domain says of its networks, its memory and whether it is to be watched. Parses text only.

An operator marks a domain in its own metadata, which libvirt keeps with it through migrations:

    virsh metadata DOMAIN urn:parasight:domain:1 --key parasight --set '<guest watch="yes" tags="web,prod"/>'

Sources: libvirt docs/formatdomain.rst (interface types, hostdev, launchSecurity, metadata).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from appliance.hosts.arguments import Arguments, NetDevice

NAMESPACE: Final = "urn:parasight:domain:1"
_UNITS: Final = {"b": 1, "bytes": 1, "KB": 1000, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    name: 1 << shift
    for shift, names in ((10, "k KiB"), (20, "M MiB"), (30, "G GiB"), (40, "T TiB"))
    for name in names.split()
}
_WATCH: Final = {"yes": True, "no": False}
_KINDS: Final = {  # QEMU's words for what libvirt calls otherwise
    "network": "tap", "bridge": "tap", "ethernet": "tap", "direct": "tap", "vhostuser": "vhost-user",
    "vdpa": "vhost-vdpa", "mcast": "socket", "server": "socket", "client": "socket", "udp": "socket",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DomainXml:
    """``arguments``: as if they had been read from its QEMU's command line. ``troubles``: mistakes in its metadata."""

    arguments: Arguments
    arch: str
    wanted: bool | None = None
    tags: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()


def parse_domain(text: str) -> DomainXml:
    """Read what ``virsh dumpxml`` prints. What cannot be read is a domain of which nothing is known but its trouble."""
    troubles: list[str] = []
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  libvirt wrote it, and writes no entities
    except ElementTree.ParseError as error:
        root = ElementTree.Element("domain")
        troubles.append(f"its XML is not understood: {error}")
    kind = root.find("os/type")
    security = root.find("launchSecurity")
    arguments = Arguments(
        name=root.findtext("name"),
        uuid=(root.findtext("uuid") or "").lower() or None,
        machine=_attribute(kind, "machine") or "pc",
        memory_bytes=_memory(root.find("memory")),
        nets=tuple(_interfaces(root)),
        passthrough=tuple(_passthrough(root)),
        default_net=False,
        encryption=None if security is None else security.get("type") or "launchSecurity",
    )
    wanted, tags = _wishes(root.find("metadata"), troubles)
    return DomainXml(arguments, _attribute(kind, "arch") or "x86_64", wanted, tags, tuple(troubles))


def _interfaces(root: ElementTree.Element) -> Iterator[NetDevice]:
    for number, one in enumerate(root.iterfind("devices/interface")):
        kind = one.get("type", "")
        if kind == "hostdev":
            continue  # told as a device that is handed through
        if kind == "user" and _attribute(one.find("backend"), "type") == "passt":
            kind = "passt"
        ifname = _attribute(one.find("target"), "dev")
        mac = _attribute(one.find("mac"), "address")
        ident = _attribute(one.find("alias"), "name") or ifname or f"net{number}"
        yield NetDevice(ident, _KINDS.get(kind, kind), ifname, mac=mac.lower() if mac else None)


def _passthrough(root: ElementTree.Element) -> Iterator[str]:
    """PCI functions as QEMU's command line would name them; other devices (USB, SCSI, mediated) are no networks."""
    devices = [one for one in root.iterfind("devices/hostdev") if one.get("type") == "pci"]
    devices += [one for one in root.iterfind("devices/interface") if one.get("type") == "hostdev"]
    for one in devices:
        where = one.find("source/address")
        numbers = [_attribute(where, key) or "0" for key in ("domain", "bus", "slot", "function")]
        try:
            yield "vfio-pci {:04x}:{:02x}:{:02x}.{:x}".format(*(int(number, 0) for number in numbers))
        except ValueError:
            yield "vfio-pci ?"


def _wishes(metadata: ElementTree.Element | None, troubles: list[str]) -> tuple[bool | None, tuple[str, ...]]:
    """What the operator wrote: ``watch`` and ``tags``."""
    ours = [one for one in metadata if one.tag.startswith(f"{{{NAMESPACE}}}")] if metadata is not None else []
    if not ours:
        return None, ()
    guest = ours[0]
    if guest.tag != f"{{{NAMESPACE}}}guest":
        troubles.append(f"metadata of {NAMESPACE}: <{guest.tag.rpartition('}')[2]}> where <guest> is wanted")
        return None, ()
    for unknown in sorted(set(guest.keys()) - {"watch", "tags"}):
        troubles.append(f"metadata of {NAMESPACE}: there is no attribute {unknown!r}, only watch and tags")
    watch = guest.get("watch")
    wanted = _WATCH.get((watch or "").strip().lower())
    if watch is not None and wanted is None:
        troubles.append(f"metadata of {NAMESPACE}: watch={watch!r} is neither 'yes' nor 'no' and counts as neither")
    tags = (tag.strip() for tag in guest.get("tags", "").split(","))
    return wanted, tuple(dict.fromkeys(tag for tag in tags if tag))


def _memory(element: ElementTree.Element | None) -> int:
    text = (element.text or "").strip() if element is not None else ""
    unit = _UNITS.get(element.get("unit", "KiB"), 1024) if element is not None else 0
    return int(text) * unit if text.isdecimal() else 0


def _attribute(element: ElementTree.Element | None, name: str) -> str | None:
    return element.get(name) if element is not None else None
