"""What a QEMU command line says about the guest's RAM. Parses bytes only, touches nothing.

Sources: qemu-options.hx (-m, -machine, -object, -numa, -mon), backends/hostmem*.c, hw/core/numa.c
(numa_init_memory_layout: node memory is concatenated in node order), softmmu/vl.c (RAM size: MiB by default, default
128 MiB, rounded up to 8 KiB), util/qemu-option.c (``a=b,c,,d`` where a doubled comma stands for one).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import HostError

MIB = 1 << 20
DEFAULT_RAM = 128 * MIB  # hw/core/machine.c: default_ram_size
_SUFFIX = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_X86 = re.compile(r"(qemu-system-(x86_64|i386)(-[\w.]+)?|qemu-kvm|kvm|qemu)$")
_OTHER = re.compile(r"qemu-system-(\w+)")
_FREE_TEXT = {"name", "uuid"}


@dataclass(frozen=True, slots=True)
class Backend:
    """One block of host memory behind guest RAM."""

    id: str
    kind: str  # "anonymous", "memfd" or "file"
    size: int
    shared: bool
    path: str | None = None


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The RAM of a guest as its command line asks for it; ``blocks`` in guest-physical order."""

    machine: str  # "pc", "q35" or "microvm"
    ram_size: int
    blocks: tuple[Backend, ...]
    max_below_4g: int | None = None
    hotplug: tuple[str, ...] = ()  # blocks of memory devices, whose place the command line does not fix
    monitors: tuple[str, ...] = ()  # QMP sockets that no manager owns
    name: str | None = None
    uuid: str | None = None


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parse the arguments of a QEMU process. Raises HostError where this machine is none we can map."""
    options = list(_pairs(argv))
    machine = _merge(options, ("machine", "M"), "type")
    objects = [_object(text) for key, text in options if key == "object"]
    backends = {o["id"]: o for o in objects if str(o.get("qom-type", "")).startswith("memory-backend-") and "id" in o}
    memory = _merge(options, ("m",), "size")
    ram_size = _size(memory["size"], MIB) if "size" in memory else DEFAULT_RAM
    below = machine.get("max-ram-below-4g")
    return CommandLine(
        machine=machine_kind(str(machine.get("type", "pc"))),
        ram_size=-(-ram_size // 8192) * 8192,
        blocks=_blocks(options, machine, backends, ram_size),
        max_below_4g=_size(below) if below else None,
        hotplug=tuple(_memory_devices(options)),
        monitors=tuple(_monitors(options)),
        name=_merge(options, ("name",), "guest").get("guest"),
        uuid=next((text for key, text in options if key == "uuid"), None),
    )


def qemu_target(argv0: str, exe: str) -> str | None:
    """The architecture a QEMU process emulates, None when it is no QEMU system emulator."""
    for path in (exe, argv0):
        name = path.removesuffix(" (deleted)").rsplit("/", 1)[-1]
        if _X86.match(name):
            return "x86"
        if found := _OTHER.match(name):
            return found[1]
    return None


def _pairs(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values. Of an option whose value may look like anything, the next word always is it."""
    position = 1
    while position < len(argv):
        word = argv[position]
        following = argv[position + 1] if position + 1 < len(argv) else ""
        position += 1
        if word.startswith("-") and len(word) > 1:
            key = word.lstrip("-")
            if key in _FREE_TEXT:
                position += 1
            elif following.startswith("-") and following != "-":
                following = ""
            yield key, following


def _options(text: str, implied: str) -> dict[str, str]:
    """``a=b,c=d`` (the first word may omit its key) or JSON, flattened to text."""
    if text.startswith("{"):
        return {key: _text(value) for key, value in _json(text).items()}
    result: dict[str, str] = {}
    for number, item in enumerate(text.replace(",,", "\0").split(",")):
        word = item.replace("\0", ",")
        key, equals, value = word.partition("=")
        if equals:
            result[key] = value
        elif word:
            result[implied if number == 0 else word] = word if number == 0 else "on"
    return result


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _merge(options: Sequence[tuple[str, str]], keys: tuple[str, ...], implied: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for key, text in options:
        if key in keys:
            merged |= _options(text, implied)
    return merged


def _object(text: str) -> dict[str, str]:
    return _options(text, "qom-type")


def _size(text: str, unit: int = 1) -> int:
    """A size with its suffix; ``unit`` is what a bare number counts. Source: util/cutils.c do_strtosz."""
    found = re.fullmatch(r"(0x[0-9a-f]+|[0-9.]+)([a-z]?)", text.strip().lower())
    if not found or found[2] not in _SUFFIX:
        raise HostError(f"cannot understand the memory size {text!r} on QEMU's command line")
    number = int(found[1], 16) if found[1].startswith("0x") else float(found[1])
    return int(number * (_SUFFIX[found[2]] if found[2] else unit))


def machine_kind(name: str) -> str:
    """The kind of machine a QEMU machine type is, which decides where RAM lies. Raises HostError."""
    if "q35" in name:
        return "q35"
    if name.startswith("microvm"):
        return "microvm"
    if name.startswith(("pc", "isapc", "rhel", "xenfv")):
        return "pc"
    raise HostError(f"the QEMU machine {name!r} is not supported; supported are pc, q35 and microvm")


def _blocks(
    options: Sequence[tuple[str, str]], machine: dict[str, str], backends: dict[str, dict[str, str]], ram_size: int
) -> tuple[Backend, ...]:
    if "memory-backend" in machine and machine["memory-backend"] in backends:
        return (_backend(backends[machine["memory-backend"]]),)
    nodes: dict[int, str] = {}
    for text in (text for key, text in options if key == "numa"):
        node = _options(text, "type")
        if node.get("type") == "node":
            number = int(node["nodeid"]) if node.get("nodeid", "").isdigit() else len(nodes)
            if node.get("memdev") in backends:
                nodes[number] = node["memdev"]
    if nodes:
        return tuple(_backend(backends[nodes[number]]) for number in sorted(nodes))
    path = next((text for key, text in options if key == "mem-path"), None)
    return (Backend("ram", "file" if path else "anonymous", ram_size, shared=False, path=path),)


def _backend(entry: dict[str, str]) -> Backend:
    kind = {"memory-backend-memfd": "memfd", "memory-backend-file": "file", "memory-backend-shm": "memfd"}.get(
        entry["qom-type"], "anonymous"
    )
    default_share = "on" if kind == "memfd" else "off"  # backends/hostmem-memfd.c
    shared = entry.get("share", default_share) in {"on", "yes", "true"}
    return Backend(entry["id"], kind, _size(entry.get("size", "0")), shared, entry.get("mem-path"))


def _memory_devices(options: Sequence[tuple[str, str]]) -> Iterator[str]:
    for key, text in options:
        if key == "device":
            device = _options(text, "driver")
            if device.get("driver", "").startswith(("pc-dimm", "virtio-mem", "virtio-pmem", "nvdimm")):
                yield device.get("memdev") or device.get("id") or device["driver"]


def _monitors(options: Sequence[tuple[str, str]]) -> Iterator[str]:
    """QMP server sockets by path. Those of a manager (libvirt passes a descriptor) have none and are left alone."""
    chardevs = {}
    for key, text in options:
        if key in {"qmp", "qmp-pretty"} and text.startswith("unix:"):
            address = _options(text.removeprefix("unix:"), "path")
            if _server(address):
                yield address["path"]
        elif key == "chardev":
            chardev = _options(text, "backend")
            chardevs[chardev.get("id")] = chardev
    for text in (text for key, text in options if key == "mon"):
        monitor = _options(text, "chardev")
        found = chardevs.get(monitor.get("chardev"), {})
        if monitor.get("mode") == "control" and "path" in found and _server(found) and "/libvirt/" not in found["path"]:
            yield found["path"]


def _server(options: dict[str, str]) -> bool:
    return options.get("server", "off") in {"on", "server", "yes", "true"}
