"""What a QEMU command line says of a guest's identity and network cards. Parses text only, touches nothing.

Sources: qemu-options.hx (-name, -uuid, -m, -netdev, -nic, -net, -device, -machine, -object), qapi/net.json (netdev
types and the JSON syntax), util/qemu-option.c (``a=b,c,,d``: a doubled comma stands for one), net/net.c (default MAC
addresses).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from appliance.hosts.options import as_text, iter_options, merge_options, parse_properties, parse_size

_SEV_POLICY_ES: Final = 1 << 2  # docs/system/i386/amd-memory-encryption.rst
_DOMAIN: Final = re.compile(r"/domain-(\d{1,18})-[^/]*/master-key\.aes$")
_DEFAULT_MAC: Final = "52:54:00:12:34:{:02x}"  # net/net.c: 0x56 + index


@dataclass(frozen=True, slots=True)
class NetDevice:
    """One network back end: its type, how its port is named (interface, descriptors), and the MAC the guest has."""

    id: str
    kind: str
    ifname: str | None = None
    fds: tuple[int, ...] = ()
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the inventory wants to know of one QEMU."""

    name: str | None
    uuid: str | None
    machine: str
    memory_bytes: int
    nets: tuple[NetDevice, ...]
    passthrough: tuple[str, ...]  # devices handed to the guest as they are
    default_net: bool  # nothing was said of networks: QEMU adds a user-mode one
    encryption: str | None = None  # what encrypts the guest's memory: QEMU's kind of object
    incoming: bool = False  # it was started to take over another one's state: whether that has arrived is not said
    monitors: tuple[str, ...] = ()  # paths of QMP sockets that no manager owns
    libvirt_id: int | None = None  # the number that libvirt gave to this life of its domain
    libvirt_key: str | None = None  # path of the file that tells so, which belongs to whom libvirt runs it as
    xen_domid: int | None = None  # it is no machine of its own: it emulates devices for this Xen domain


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the arguments of a QEMU process (``argv[0]`` included)."""
    options = list(iter_options(argv))
    keys = {key for key, _ in options}
    machine = merge_options(options, ("machine", "M"), "type")
    libvirt_id, libvirt_key = _libvirt_id(options)
    return Arguments(
        name=as_text(merge_options(options, ("name",), "guest").get("guest")),
        uuid=next((value.lower() for key, value in options if key == "uuid"), None),
        machine=as_text(machine.get("type")) or "pc",
        memory_bytes=parse_size(as_text(merge_options(options, ("m",), "size").get("size"))),
        nets=tuple(_with_default_macs(_net_devices(options))),
        passthrough=tuple(_passthrough(options)),
        default_net=not keys & {"netdev", "nic", "net", "nodefaults"},
        encryption=_encryption(machine, options),
        incoming="incoming" in keys,
        monitors=tuple(_monitors(options)),
        libvirt_id=libvirt_id,
        libvirt_key=libvirt_key,
        xen_domid=next((int(value) for key, value in options if key == "xen-domid" and value.isdecimal()), None),
    )


def _net_devices(options: list[tuple[str, str]]) -> Iterator[NetDevice]:
    macs, plugged = _front_ends(options)
    hub_nics = [parse_properties(text, "type") for key, text in options if key == "net" and text.startswith("nic")]
    hub_mac = as_text(hub_nics[0].get("macaddr")) if len(hub_nics) == 1 else None
    for key, text in options:
        if key not in {"netdev", "nic", "net"}:
            continue
        found = parse_properties(text, "type")
        kind = as_text(found.get("type")) or ""
        if kind in {"", "nic", "none", "hubport"}:
            continue
        ident = as_text(found.get("id")) or kind
        if key == "netdev" and ident not in plugged:
            continue  # no card: the guest has no such port
        if _is_passt(found, options):
            kind = "passt"
        mac = macs.get(ident) if key == "netdev" else hub_mac
        if key == "nic":
            mac = as_text(found.get("mac") or found.get("macaddr"))
        yield NetDevice(ident, kind, as_text(found.get("ifname")), _descriptors(found), _mac(mac))


def _is_passt(found: dict[str, Any], options: list[tuple[str, str]]) -> bool:
    """Passt is no back end of its own before QEMU 10.1: its socket is that of a stream or a vhost-user device."""
    address = found.get("addr")
    path = address.get("path") if isinstance(address, dict) else found.get("addr.path")
    if (chardev := as_text(found.get("chardev"))) is not None:
        others = (parse_properties(text, "backend") for key, text in options if key == "chardev")
        path = next((other.get("path") for other in others if other.get("id") == chardev), None)
    return "passt" in (as_text(path) or "")


def _front_ends(options: list[tuple[str, str]]) -> tuple[dict[str, str], set[str]]:
    """The cards (-device): MAC by netdev id, and which netdevs have a card at all."""
    macs: dict[str, str] = {}
    plugged: set[str] = set()
    for key, text in options:
        found = parse_properties(text, "driver" if key == "device" else "type")
        ident = as_text(found.get("netdev"))
        if ident and (key == "device" or (key == "net" and found.get("type") == "nic")):
            plugged.add(ident)
            if given := as_text(found.get("mac") or found.get("macaddr")):
                macs[ident] = given
    return macs, plugged


def _with_default_macs(devices: Iterator[NetDevice]) -> Iterator[NetDevice]:
    """Cards for which no MAC was given get QEMU's own, in order."""
    known = list(devices)
    taken = {device.mac for device in known}
    free = (mac for index in range(0x56, 0x100) if (mac := _DEFAULT_MAC.format(index)) not in taken)
    for device in known:
        yield replace(device, mac=device.mac or next(free, None))


def _passthrough(options: list[tuple[str, str]]) -> Iterator[str]:
    for key, text in options:
        if key == "device":
            found = parse_properties(text, "driver")
            driver = as_text(found.get("driver")) or ""
            if driver.startswith(("vfio-", "vhost-vdpa-device")):
                where = as_text(found.get("host") or found.get("sysfsdev") or found.get("vhostdev")) or "?"
                yield f"{driver} {where}"


def _encryption(machine: dict[str, Any], options: list[tuple[str, str]]) -> str | None:
    """The kind of the object that the machine refers to; one that it does not refer to encrypts nothing."""
    ident = as_text(machine.get("confidential-guest-support") or machine.get("memory-encryption"))
    if ident is None:
        return None
    objects = (parse_properties(text, "qom-type") for key, text in options if key == "object")
    found = next((one for one in objects if as_text(one.get("id")) == ident), {})
    kind = as_text(found.get("qom-type")) or ident
    policy = as_text(found.get("policy")) or "0"
    number = int(policy, 0) if re.fullmatch(r"0x[0-9a-fA-F]+|[1-9]\d*|0", policy) else 0
    return "sev-es-guest" if kind == "sev-guest" and number & _SEV_POLICY_ES else kind


def _monitors(options: list[tuple[str, str]]) -> Iterator[str]:
    """QMP sockets by path that take anybody's call; a manager's own is a descriptor, or lies in libvirt's folders."""
    backends = {}
    for key, text in options:
        if key in {"qmp", "qmp-pretty"} and text.startswith("unix:"):
            yield from _listening(parse_properties(text.removeprefix("unix:"), "path"))
        elif key == "chardev":
            found = parse_properties(text, "backend")
            backends[as_text(found.get("id"))] = found
    for key, text in options:
        monitor = parse_properties(text, "chardev") if key == "mon" else {}
        if monitor.get("mode") == "control":
            yield from _listening(backends.get(as_text(monitor.get("chardev")), {}))


def _listening(socket: dict[str, Any]) -> Iterator[str]:
    path = as_text(socket.get("path"))
    if path is not None and "/libvirt/" not in path and socket.get("server") in {"on", "yes", "true", True}:
        yield path


def _libvirt_id(options: list[tuple[str, str]]) -> tuple[int | None, str | None]:
    """From the folder of the key that libvirt hands to each QEMU it starts (``qemuDomainMasterKeyCreate``)."""
    for key, text in options:
        found = parse_properties(text, "qom-type") if key == "object" else {}
        path = as_text(found.get("file")) or ""
        if found.get("id") == "masterKey0" and (match := _DOMAIN.search(path)):
            return int(match[1]), path
    return None, None


def _descriptors(found: dict[str, Any]) -> tuple[int, ...]:
    text = ":".join(str(found[key]) for key in ("fd", "fds") if key in found)
    return tuple(int(word) for word in text.split(":") if word.isdigit())


def _mac(text: str | None) -> str | None:
    if text is None:
        return None
    plain = text.lower().replace("-", ":")
    return plain if re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", plain) else None
