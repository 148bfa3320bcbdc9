"""Symbol tables for the machine: invented ones, or a real pair from a folder; and where a field lies by them."""

from __future__ import annotations

import hashlib
import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.worlds.windows import layout

Json = dict[str, Any]
NT, TCPIP = "ntkrnlmp.pdb", "tcpip.pdb"

# Real pairs of kernel and tcpip.sys, by the build's name: GUID of either, and the build's last number.
REAL = {
    "17763": ("2EA98876FE209B61954090E803113013", "7BF31D2D311A6968B5640D814147F35D", 5820),
    "20348": ("2E97AF1B11E7B27D357F31940729473C", "D0CBB55015627609FBF757A2B855C81C", 1970),
}

# Symbols of an invented kernel and where they lie in its image of 8 MiB; each family moves them all.
NT_SYMBOLS = {
    "KiDivideErrorFault": 0x201000,
    "KiPageFault": 0x203000,
    "KiSystemCall64": 0x206000,
    "KdCopyDataBlock": 0x20A000,
    "MmProtectToValue": 0x101000,
    "MmSystemRangeStart": 0x101200,
    "KdDebuggerDataBlock": 0x500000,
    "KdVersionBlock": 0x501000,
    "NtBuildNumber": 0x501100,
    "NtBuildLab": 0x501200,
    "CmNtCSDVersion": 0x501300,
    "PsActiveProcessHead": 0x502000,
    "PsLoadedModuleList": 0x502040,
    "PsInitialSystemProcess": 0x502080,
    "PsIdleProcess": 0x502088,
    "PspCidTable": 0x502090,
    "ObTypeIndexTable": 0x503000,
    "ObHeaderCookie": 0x503808,
    "ObpInfoMaskToOffset": 0x503900,
    "ObpRootDirectoryObject": 0x503A80,
    "ObpKernelHandleTable": 0x503A88,
    "HandleTableListHead": 0x503AA0,
    "KeNumberProcessors": 0x504000,
    "KiProcessorBlock": 0x504040,
    "KeServiceDescriptorTable": 0x505000,
}
TCPIP_SYMBOLS = {
    "PartitionTable": 0x21008,
    "PartitionCount": 0x21000,
    "TcpCompartmentSet": 0x21840,
    "UdpCompartmentSet": 0x20BC8,
}


class Field(NamedTuple):
    """Where a field lies in its type; ``length`` is in bits, 0 unless it is a bit-field."""

    offset: int
    size: int
    bit: int
    length: int


class Symbols:
    """One symbol table, as its ISF document says."""

    def __init__(self, document: Json, pdb: str, guid: str, age: int, packed: bytes = b"") -> None:
        self.document, self.pdb, self.guid, self.age = document, pdb, guid, age
        self._packed = packed
        self._types: Json = document["user_types"]
        self._base: Json = document["base_types"]
        self._fields: dict[str, Field] = {}

    def packed(self) -> bytes:
        """The document as a file holds it: JSON, packed by xz."""
        self._packed = self._packed or lzma.compress(json.dumps(self.document).encode(), preset=0)
        return self._packed

    def symbol(self, name: str) -> int:
        return int(self.document["symbols"][name]["address"])

    def size(self, name: str) -> int:
        return int(self._types[name]["size"])

    def has(self, path: str) -> bool:
        try:
            self.field(path)
        except KeyError:
            return False
        return True

    def offset(self, path: str) -> int:
        return self.field(path).offset

    def field(self, path: str) -> Field:
        """``_EPROCESS.Pcb.DirectoryTableBase`` and its like."""
        found = self._fields.get(path)
        if found is None:
            name, *parts = path.split(".")
            kind: Json = {"kind": "struct", "name": name}
            offset = 0
            for part in parts:
                member = self._member(kind["name"], part)
                offset, kind = offset + member["offset"], member["type"]
            if kind["kind"] == "bitfield":
                found = Field(offset, self._size(kind["type"]), kind["bit_position"], kind["bit_length"])
            else:
                found = Field(offset, self._size(kind), 0, 0)
            self._fields[path] = found
        return found

    def pack(self, name: str, values: dict[str, int | bytes], size: int = 0) -> bytes:
        """A structure with these fields and zero else; a leading ``?`` marks a field that may be lacking."""
        data = bytearray(max(size, self.size(name)))
        for key, value in values.items():
            path = f"{name}.{key.lstrip('?')}"
            if key.startswith("?") and not self.has(path):
                continue
            self.put(data, path, value)
        return bytes(data)

    def put(self, data: bytearray, path: str, value: int | bytes) -> None:
        field = self.field(path)
        if isinstance(value, bytes):
            assert len(value) <= field.size, path
            data[field.offset : field.offset + len(value)] = value
            return
        if field.length:
            mask = (1 << field.length) - 1
            whole = int.from_bytes(data[field.offset : field.offset + field.size], "little")
            value = whole & ~(mask << field.bit) | (value & mask) << field.bit
        value &= (1 << 8 * field.size) - 1
        data[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")

    def _member(self, name: str, part: str) -> Json:
        fields = self._types[name]["fields"]
        if part in fields:
            return fields[part]  # type: ignore[no-any-return]
        for field in fields.values():
            if field.get("anonymous"):
                try:
                    inner = self._member(field["type"]["name"], part)
                except KeyError:
                    continue
                return {"offset": field["offset"] + inner["offset"], "type": inner["type"]}
        raise KeyError(f"{name}.{part}")

    def _size(self, kind: Json) -> int:
        match kind["kind"]:
            case "pointer" | "function":
                return 8
            case "base":
                return int(self._base[kind["name"]]["size"])
            case "enum":
                return int(self.document["enums"][kind["name"]]["size"])
            case "array":
                return int(kind["count"]) * self._size(kind["subtype"])
            case "bitfield":
                return self._size(kind["type"])
            case _:
                return self.size(kind["name"])


@cache
def invented(family: str) -> tuple[Symbols, Symbols]:
    """The pair of an invented family: kernel, tcpip.sys."""
    shift = int(hashlib.sha256(f"symbols of {family}".encode()).hexdigest()[:4], 16) % 64 * 0x40
    nt = _document(
        NT, _guid(family, NT), {name: rva + shift for name, rva in NT_SYMBOLS.items()}, layout.invent(family)
    )
    tcpip = _document(TCPIP, _guid(family, TCPIP), {name: rva + shift for name, rva in TCPIP_SYMBOLS.items()}, {})
    return nt, tcpip


def real(folder: Path, family: str) -> tuple[Symbols, Symbols]:
    """The real pair of a family; ``folder`` contains ``windows/``."""
    nt, tcpip, _ = REAL[family]
    return _read(folder, NT, nt), _read(folder, TCPIP, tcpip)


def write(folder: Path, tables: tuple[Symbols, Symbols]) -> Path:
    """Write the pair into ``folder/windows/<pdb>/<GUID>-<age>.json.xz``, where every engine looks."""
    for table in tables:
        path = folder / "windows" / table.pdb / f"{table.guid}-{table.age}.json.xz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(table.packed())
    return folder


@cache
def _read(folder: Path, pdb: str, guid: str) -> Symbols:
    path = folder / "windows" / pdb / f"{guid}-1.json.xz"
    packed = path.read_bytes()
    return Symbols(json.loads(lzma.decompress(packed)), pdb, guid, 1, packed)


def _guid(*content: object) -> str:
    """Another one for each content, so that nobody's cache takes one table for another."""
    return hashlib.md5(json.dumps(content).encode()).hexdigest().upper()


def _document(pdb: str, guid: str, symbols: dict[str, int], types: Json) -> Symbols:
    document = {
        "metadata": {
            "format": "6.1.0",
            "producer": {"name": "parasight-tests", "version": "1", "datetime": "2026-01-01T00:00:00"},
            "windows": {"pdb": {"GUID": guid, "age": 1, "database": pdb, "machine_type": 0x8664}},
        },
        "base_types": layout.base_types(),
        "user_types": types.get("user_types", {}),
        "enums": types.get("enums", {}),
        "symbols": {name: {"address": rva} for name, rva in symbols.items()},
    }
    return Symbols(document, pdb, guid, 1)
