"""Symbol tables (ISF) of a Windows XP or Server 2003 made of bytes, with all that volatility3 asks for."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from appliance.guest.windows.isf import Field
from tests.worlds.windows.xp_kernel import Kernel

Json = dict[str, Any]

BASE = {
    "void": (0, False, "void"),
    "char": (1, True, "char"),
    "unsigned char": (1, False, "char"),
    "short": (2, True, "int"),
    "unsigned short": (2, False, "int"),
    "long": (4, True, "int"),
    "unsigned long": (4, False, "int"),
    "int": (4, True, "int"),
    "unsigned int": (4, False, "int"),
    "long long": (8, True, "int"),
    "unsigned long long": (8, False, "int"),
    "float": (4, True, "float"),
    "double": (8, True, "float"),
}
WORDS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned long", 8: "unsigned long long", 16: "double"}
OPEN_TYPES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {  # the same in every Windows
    "_DBGKD_GET_VERSION64": (
        0x28,
        {
            "MajorVersion": (0, 2),
            "MinorVersion": (2, 2),
            "ProtocolVersion": (4, 1),
            "Flags": (6, 2),
            "MachineType": (8, 2),
            "KernBase": (0x10, 8),
            "PsLoadedModuleList": (0x18, 8),
            "DebuggerDataList": (0x20, 8),
        },
    ),
    "_KUSER_SHARED_DATA": (
        0x338,
        {"NtProductType": (0x264, 4), "NtMajorVersion": (0x26C, 4), "NtMinorVersion": (0x270, 4)},
    ),
}
STUBS = (
    "_ERESOURCE",
    "_DEVICE_OBJECT",
    "_CM_KEY_BODY",
    "_CMHIVE",
    "_CM_KEY_NODE",
    "_CM_KEY_VALUE",
    "_HMAP_ENTRY",
    "_KSYSTEM_TIME",
    "_KMUTANT",
    "_DRIVER_OBJECT",
    "_OBJECT_SYMBOLIC_LINK",
    "_SHARED_CACHE_MAP",
    "_VACB",
    "_POOL_TRACKER_BIG_PAGES",
    "_IMAGE_DOS_HEADER",
    "_KTIMER",
    "_SECTION_OBJECT",
    "_SUBSECTION",
    "_RTL_ATOM_TABLE",
)


def _base(name: str) -> Json:
    return {"kind": "base", "name": name}


def _to(kind: Json) -> Json:
    return {"kind": "pointer", "subtype": kind}


_TIME: Json = {"kind": "union", "name": "_LARGE_INTEGER"}
_NODE = {"kind": "struct", "name": "_LIST_ENTRY"}
SPECIAL: Json = {
    "_LIST_ENTRY.Flink": _to(_NODE),
    "_LIST_ENTRY.Blink": _to(_NODE),
    "_UNICODE_STRING.Buffer": _to(_base("unsigned short")),
    "_EX_FAST_REF.Object": _to(_base("void")),
    "_EPROCESS.CreateTime": _TIME,
    "_EPROCESS.ExitTime": _TIME,
    "_ETHREAD.CreateTime": _TIME,
    "_ETHREAD.ExitTime": _TIME,
    "_CLIENT_ID.UniqueProcess": _to(_base("void")),
    "_CLIENT_ID.UniqueThread": _to(_base("void")),
    "_EPROCESS.UniqueProcessId": _to(_base("void")),
    "_EPROCESS.InheritedFromUniqueProcessId": _to(_base("void")),
    "_EPROCESS.SectionBaseAddress": _to(_base("void")),
    "_EPROCESS.Session": _to({"kind": "struct", "name": "_MM_SESSION_SPACE"}),
    "_LDR_DATA_TABLE_ENTRY.DllBase": _to(_base("void")),
    "_LDR_DATA_TABLE_ENTRY.EntryPoint": _to(_base("void")),
    "_PEB.ImageBaseAddress": _to(_base("void")),
    "_RTL_USER_PROCESS_PARAMETERS.Environment": _to(_base("void")),
    "_FILE_OBJECT.DeviceObject": _to({"kind": "struct", "name": "_DEVICE_OBJECT"}),
}


def write(kernel: Kernel, folder: Path, pdb: str, symbols: dict[str, int], types: Json) -> None:
    """Write one table to where a symbol store looks for it."""
    path = folder / "windows" / pdb / f"{kernel.guid}-1.json.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(json.dumps(isf(kernel, pdb, symbols, types)).encode(), preset=1))


def isf(kernel: Kernel, pdb: str, symbols: dict[str, int], types: Json) -> Json:
    pointer = {"size": kernel.pointer, "signed": False, "kind": "int", "endian": "little"}
    return {
        "metadata": {
            "format": "6.1.0",
            "producer": {"name": "parasight-tests", "version": "1", "datetime": "2026-01-01T00:00:00"},
            "windows": {"pdb": {"GUID": kernel.guid, "age": 1, "database": pdb, "machine_type": kernel.machine_type()}},
        },
        "base_types": {
            name: {"size": size, "signed": signed, "kind": kind, "endian": "little"}
            for name, (size, signed, kind) in BASE.items()
        }
        | {"pointer": pointer},
        "user_types": types,
        "enums": {},
        "symbols": {name: {"address": rva} for name, rva in symbols.items()},
    }


def isf_types(kernel: Kernel) -> Json:
    """Our types as volatility3 wants them, and empty ones for those that it asks for by name."""
    types: Json = {}
    for name, (size, members) in kernel.kind.types.items():
        fields = {}
        for member, where in members.items():
            kind = _kind(f"{name}.{member}", where)
            fields[member] = {"offset": where[0], "type": kind}
        types[name] = {"kind": "struct", "size": size, "fields": fields}
    types["_LARGE_INTEGER"] = {
        "kind": "union",
        "size": 8,
        "fields": {"QuadPart": {"offset": 0, "type": _base("long long")}},
    }
    types["_SID"] = {"kind": "struct", "size": 12, "fields": {}}
    wide, text = kernel.wide, {"kind": "struct", "name": "_UNICODE_STRING"}
    types["_OBJECT_TYPE"] = {
        "kind": "struct",
        "size": 0x2C0 if wide else 0x190,
        "fields": {"Name": {"offset": 0x78 if wide else 0x40, "type": text}},
    }
    types["_OBJECT_HEADER_NAME_INFO"] = {
        "kind": "struct",
        "size": 0x20 if wide else 0x10,
        "fields": {"Name": {"offset": 8 if wide else 4, "type": text}},
    }
    for name, (size, numbers) in OPEN_TYPES.items():
        plain = {member: {"offset": at, "type": _base(WORDS[length])} for member, (at, length) in numbers.items()}
        types[name] = {"kind": "struct", "size": size, "fields": plain}
    for name in STUBS:
        types.setdefault(name, {"kind": "struct", "size": 0x40, "fields": {}})
    return types


def _kind(path: str, where: Any) -> Json:
    found = where if isinstance(where, Field) else None
    if path in SPECIAL:
        return SPECIAL[path]
    if found is None:
        if isinstance(where[1], str):
            return {"kind": "struct", "name": where[1]}
        return _base(WORDS[where[1]])
    if found.bit_length:
        inner = _base(WORDS[found.size])
        return {
            "kind": "bitfield",
            "bit_position": found.bit_position,
            "bit_length": found.bit_length,
            "type": inner,
        }
    if found.length:
        return {"kind": "array", "count": found.length, "subtype": _base(WORDS[found.size // found.length])}
    if found.type.startswith("*"):
        return {"kind": "pointer", "subtype": {"kind": "struct", "name": found.type[1:]}}
    return _base(WORDS[found.size])
