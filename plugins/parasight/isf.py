"""Volatility 3's symbol file (ISF 6.2.0) for a Linux kernel, from its BTF and its symbols.

Addresses are link-time addresses, as dwarf2json writes them: the file serves every boot of that kernel. BTF names the
types of per-CPU variables only, so those that the plugins ask for are listed here.
Source: volatility3/schemas/schema-6.2.0.json.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from . import btf
from .btf import Btf, Member, Record

LINK_BASE = 0xFFFF_FFFF_8100_0000  # __START_KERNEL, arch/x86/include/asm/page_64_types.h
KERNEL_HALF = 1 << 63
BANNER = "linux_banner"  # init/version.c

VARIABLES = {
    "init_task": "task_struct",
    "init_pid_ns": "pid_namespace",
    "init_mm": "mm_struct",
    "net_namespace_list": "list_head",
    "socket_file_ops": "file_operations",
    "sockfs_dentry_operations": "dentry_operations",
    "modules": "list_head",
    "init_files": "files_struct",
}
_VOID = {"kind": "base", "name": "void"}
_KIND = {btf.STRUCT: "struct", btf.UNION: "union"}

Json = dict[str, Any]


def make_isf(types: Btf, symbols: dict[str, int], text_va: int, banner: bytes = b"") -> Json:
    """The document; ``text_va`` is where ``_text`` is in this boot, ``banner`` what Volatility knows the kernel by."""
    document: Json = {
        "metadata": {"format": "6.2.0", "producer": {"name": "parasight", "version": "1"}},
        "base_types": _base_types(types),
        "user_types": {_name(record): _structure(types, record) for record in _used(types, btf.STRUCT, btf.UNION)},
        "enums": {_name(record): _enumeration(types, record) for record in _used(types, btf.ENUM, btf.ENUM64)},
        "symbols": {name: _symbol(name, address, text_va - LINK_BASE) for name, address in symbols.items()},
    }
    if banner and BANNER in symbols:
        document["symbols"][BANNER]["constant_data"] = b64encode(banner).decode()
    return document


def _used(types: Btf, *kinds: int) -> list[Record]:
    """Named types once each, and every anonymous one."""
    named = [record for record in types.by_name.values() if record.kind in kinds]
    return named + [record for record in types.records if record.kind in kinds and not record.name]


def _name(record: Record) -> str:
    return record.name or f"unnamed_{record.id:x}"


def _base_types(types: Btf) -> Json:
    found: Json = {
        "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
    }
    for record in types.records:
        if record.kind == btf.INT:
            signed, boolean, _ = types.encoding(record)
            kind = "bool" if boolean else "char" if record.name in ("char", "unsigned char", "signed char") else "int"
            found[record.name] = {"size": record.value, "signed": signed, "kind": kind, "endian": "little"}
        elif record.kind == btf.FLOAT:
            found[record.name] = {"size": record.value, "signed": True, "kind": "float", "endian": "little"}
    return found


def _structure(types: Btf, record: Record) -> Json:
    fields = {}
    for number, member in enumerate(types.members(record)):
        field = {"type": _member_type(types, member), "offset": _start(types, member)}
        if not member.name:
            field["anonymous"] = True
        fields[member.name or f"unnamed_field_{number}"] = field
    return {"kind": _KIND[record.kind], "size": record.value, "fields": fields}


def _start(types: Btf, member: Member) -> int:
    """In bytes; of a bit-field, that of the whole integer that holds it."""
    if not member.bits:
        return member.bit_offset // 8
    size = types.strip(member.type_id).value
    return member.bit_offset // (8 * size) * size


def _member_type(types: Btf, member: Member) -> Json:
    described = _describe(types, member.type_id)
    if not member.bits:
        return described
    position = member.bit_offset - 8 * _start(types, member)
    return {"kind": "bitfield", "bit_position": position, "bit_length": member.bits, "type": described}


def _describe(types: Btf, type_id: int) -> Json:
    record = types.strip(type_id)
    match record.kind:
        case btf.PTR:
            return {"kind": "pointer", "subtype": _describe(types, record.value)}
        case btf.ARRAY:
            element, count = types.array(record)
            return {"kind": "array", "count": count, "subtype": _describe(types, element)}
        case btf.STRUCT | btf.UNION:
            return {"kind": _KIND[record.kind], "name": _name(record)}
        case btf.ENUM | btf.ENUM64:
            return {"kind": "enum", "name": _name(record)}
        case btf.INT | btf.FLOAT:
            return {"kind": "base", "name": record.name}
        case btf.FWD:
            kind = btf.UNION if record.flag else btf.STRUCT
            whole = types.by_name.get((kind, record.name))
            return {"kind": _KIND[kind], "name": record.name} if whole else _VOID
        case btf.FUNC_PROTO:
            return {"kind": "function"}
    return _VOID


def _enumeration(types: Btf, record: Record) -> Json:
    base = "unsigned int" if record.kind == btf.ENUM else "long unsigned int"
    return {"size": record.value, "base": base, "constants": dict(types.enumerators(record))}


def _symbol(name: str, address: int, shift: int) -> Json:
    linked = address - shift if address >= KERNEL_HALF else address  # per-CPU symbols are absolute
    if name in VARIABLES:
        return {"address": linked, "type": {"kind": "struct", "name": VARIABLES[name]}}
    return {"address": linked, "type": _VOID}
