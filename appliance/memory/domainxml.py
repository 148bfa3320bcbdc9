"""Where a libvirt domain's RAM lies, by its XML: for a QEMU whose process, and so whose command line, cannot be seen.

Parses text only. What would make the map a guess is refused with its reason.
Sources: libvirt docs/formatdomain.rst (memory, os/type machine, devices/memory), qemu_command.c (the QEMU arguments
made of them), docs/drvqemu.rst (namespace http://libvirt.org/schemas/domain/qemu/1.0 with further arguments).
"""

from __future__ import annotations

from xml.etree import ElementTree

from appliance.errors import HostError
from appliance.memory.commandline import CommandLine, machine_kind

_MORE = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_MAPPING = ("-m", "-M", "-machine", "-numa", "--m", "--M", "--machine", "--numa")  # arguments that move RAM
_UNITS = {"b": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_ARCHES = {"x86_64", "i686"}


def parse_domain(text: str) -> CommandLine:
    """The RAM of a domain as QEMU was asked for it. Raises HostError where that cannot be told from the XML."""
    refuse_memory_devices(text)
    domain = _parse(text)
    system = domain.find("os/type")
    machine = system.get("machine") if system is not None else None
    if system is None or machine is None or system.get("arch") not in _ARCHES:
        raise HostError("its XML names no x86 machine: where its RAM lies is not known")
    for argument in domain.iterfind(f"{_MORE}commandline/{_MORE}arg"):
        value = argument.get("value", "")
        if value in _MAPPING or "max-ram-below-4g" in value:
            raise HostError(f"its XML hands QEMU the argument {value!r}: where its RAM lies is not known")
    return CommandLine(machine_kind(machine), _memory(domain), (), uuid=domain.findtext("uuid"))


def refuse_memory_devices(text: str) -> None:
    """Raise HostError where the running domain has memory whose place is told nowhere."""
    if (device := _parse(text).find("devices/memory")) is not None:
        raise HostError(
            f"it has a memory device ({device.get('model')}), and its XML does not tell all of its map: "
            "read it through its QEMU process, on the host where that runs"
        )


def _parse(text: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(text)  # noqa: S314  libvirtd's own words, and it is trusted with the guest
    except ElementTree.ParseError as error:
        raise HostError(f"libvirt's XML of the domain cannot be understood: {error}") from None


def _memory(domain: ElementTree.Element) -> int:
    """Bytes of RAM, the balloon's part included: only its content goes, not its place."""
    element = domain.find("memory")
    words = (element.text or "").strip() if element is not None else ""
    unit = _UNITS.get(element.get("unit", "KiB")) if element is not None else None
    if not words.isdecimal() or unit is None or not int(words):
        raise HostError("its XML tells no size of its memory")
    return int(words) * unit
