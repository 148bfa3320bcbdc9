"""Types and symbols of one Windows binary, from volatility's ISF JSON or from tables of ours.

A path is ``_STRUCT.Member.Member``; anonymous members are looked through. Offsets are in bytes, addresses relative to
the image (RVA). The JSON is turned at once into a compact text (`Compact`) in which a name is found by searching, so
that a remembered table is ready without parsing it.
Sources: volatility3's intermediate symbol format, schemas 6.0.0 to 6.2.0; PDB (RSDS) identity: GUID and age.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from appliance.errors import Implausible, UnsupportedGuest

MAX_JSON = 256 << 20
MAX_SIZE = 1 << 31  # of a structure, and of an image
_DEPTH = 16
_GUID = re.compile(r"[0-9A-Fa-f]{32}")
_BAD = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


class PdbId(NamedTuple):
    """What names the symbols of one build of one binary: the record RSDS in its image."""

    name: str  # "ntkrnlmp.pdb", lower case
    guid: str  # 32 upper-case hexadecimal digits
    age: int

    def __str__(self) -> str:
        return f"{self.name}/{self.guid}-{self.age}"


class Field(NamedTuple):
    """Where a member lies. A bit-field begins at bit ``bit_position`` of the ``size`` bytes at ``offset``."""

    offset: int
    size: int
    bit_position: int = 0
    bit_length: int = 0  # 0: no bit-field
    length: int = 0  # elements, for an array
    type: str = ""  # of the member, or of an array's element; "*" before it: a pointer to that


class Struct(NamedTuple):
    """A structure, class or union."""

    size: int
    fields: dict[str, Field]


class Compact(NamedTuple):
    """A table as searchable text: sorted lines of a name, a tab, and JSON (a type) or an RVA in hexadecimal."""

    types: bytes
    symbols: bytes


class SymbolTable:
    """Types and symbols of one binary. What is lacking is named by UnsupportedGuest."""

    def __init__(self, pdb: PdbId, content: Compact, pointer_size: int = 8) -> None:
        self.pdb, self.content, self.pointer_size = pdb, content, pointer_size
        self._structs: dict[str, Struct | None] = {}
        self._fields: dict[str, Field | None] = {}
        self._symbols: dict[str, int | None] = {}

    @classmethod
    def of(
        cls,
        *,
        types: Mapping[str, tuple[int, Mapping[str, Field | tuple[int, int] | tuple[int, str]]]],
        symbols: Mapping[str, int] | None = None,
        enums: Mapping[str, Mapping[str, int]] | None = None,
        pdb: PdbId | None = None,
        pointer_size: int = 8,
    ) -> SymbolTable:
        """A table of ours: ``{"_LIST_ENTRY": (16, {"Flink": (0, 8), ...})}``.

        A member is a Field, ``(offset, size)``, or ``(offset, "_STRUCT")`` for one whose members can be asked for.
        """
        lines = []
        for name, (size, members) in types.items():
            plain: dict[str, list[int | str]] = {}
            for member, where in members.items():
                if isinstance(where, Field):
                    plain[member] = list(where)
                elif isinstance(where[1], str):
                    inner = types[where[1]][0] if where[1] in types else 0
                    plain[member] = [where[0], inner, 0, 0, 0, where[1]]
                else:
                    plain[member] = [where[0], where[1]]
            lines.append(_line(name, [size, plain]))
        lines += [_line("enum " + name, dict(constants)) for name, constants in (enums or {}).items()]
        marks = [f"{name}\t{rva:x}".encode() for name, rva in (symbols or {}).items()]
        return cls(pdb or PdbId("", "", 0), Compact(_text(lines), _text(marks)), pointer_size)

    # -- types --

    def has(self, path: str) -> bool:
        """Whether a type, or a member of it, exists."""
        return self._find_field(path) is not None if "." in path else self._struct(path) is not None

    def field(self, path: str) -> Field:
        """Where a member lies, from the start of the path's first structure. Raises UnsupportedGuest naming it."""
        found = self._find_field(path)
        if found is None:
            raise self._lack(path)
        return found

    def offset(self, path: str) -> int:
        """Offset in bytes of a member. Raises UnsupportedGuest."""
        return self.field(path).offset

    def size(self, name: str) -> int:
        """Size in bytes of a structure. Raises UnsupportedGuest."""
        found = self._struct(name)
        if found is None:
            raise self._lack(name)
        return found.size

    def members(self, name: str) -> dict[str, Field]:
        """All members of a structure. Raises UnsupportedGuest."""
        found = self._struct(name)
        if found is None:
            raise self._lack(name)
        return dict(found.fields)

    def enum(self, name: str) -> dict[str, int]:
        """The enumerators of an enumeration. Raises UnsupportedGuest."""
        found = self._search("enum " + name)
        if not isinstance(found, dict):
            raise self._lack(f"enum {name}")
        return {str(key): int(value) for key, value in found.items()}

    # -- symbols --

    def find(self, name: str) -> int | None:
        """The RVA of a symbol, None where the table has none of this name."""
        if name not in self._symbols:
            text = _between(self.content.symbols, name)
            self._symbols[name] = None if text is None else int(text, 16)
        return self._symbols[name]

    def get(self, name: str) -> int:
        """The RVA of a symbol. Raises UnsupportedGuest naming it."""
        rva = self.find(name)
        if rva is None:
            raise UnsupportedGuest((f"the symbols of {self.pdb} have no {name}",))
        return rva

    # -- private --

    def _lack(self, path: str) -> UnsupportedGuest:
        return UnsupportedGuest((f"the types of {self.pdb} have no {path}",))

    def _search(self, name: str) -> Any:  # noqa: ANN401 - it is JSON
        text = _between(self.content.types, name)
        try:
            return None if text is None else json.loads(text)
        except _BAD:
            raise Implausible(f"the symbol table of {self.pdb} is damaged at {name}") from None

    def _struct(self, name: str) -> Struct | None:
        if name not in self._structs:
            found = self._search(name)
            try:
                self._structs[name] = None if found is None else _parse_struct(found)
            except _BAD:
                raise Implausible(f"the symbol table of {self.pdb} is damaged at {name}") from None
        return self._structs[name]

    def _find_field(self, path: str) -> Field | None:
        if path not in self._fields:
            first, *members = path.split(".")
            found = Field(0, 0, type=first)
            for member in members:
                struct = None if found.type.startswith(("*", "enum ")) else self._struct(found.type)
                inner = self._member(struct, member) if struct else None
                if inner is None:
                    self._fields[path] = None
                    return None
                found = inner._replace(offset=found.offset + inner.offset)
            self._fields[path] = found
        return self._fields[path]

    def _member(self, struct: Struct, name: str, depth: int = 0) -> Field | None:
        if name in struct.fields:
            return struct.fields[name]
        if depth < _DEPTH:
            for label, outer in struct.fields.items():
                inside = self._struct(outer.type) if label.startswith(_ANONYMOUS) and outer.type else None
                found = self._member(inside, name, depth + 1) if inside else None
                if found:
                    return found._replace(offset=outer.offset + found.offset)
        return None


def parse_isf(raw: bytes) -> SymbolTable:
    """Read volatility's JSON. Raises Implausible where it is none, or damaged."""
    if len(raw) > MAX_JSON:
        raise Implausible(f"a symbol table of {len(raw)} bytes is too large")
    try:
        data = json.loads(raw)
        pdb = _identity(data)
        sizes = _Sizes(data)
        content = Compact(_types(data, sizes), _symbols(data))
        return SymbolTable(pdb, content, int(data["base_types"].get("pointer", {"size": 8})["size"]))
    except _BAD as error:
        raise Implausible(f"this is no symbol table in volatility's format: {type(error).__name__} {error}") from None


_ANONYMOUS = "__anonymous"


class _Sizes:
    """Sizes of the types of one ISF."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._base = {name: int(entry["size"]) for name, entry in data["base_types"].items()}
        self._user = {name: int(entry["size"]) for name, entry in data["user_types"].items()}
        self._enums = {name: int(entry["size"]) for name, entry in data["enums"].items()}
        self._pointer = self._base.get("pointer", 8)

    def compact(self, entry: dict[str, Any]) -> list[int | str]:
        """A member as `Field`, its last default values left out."""
        outer = entry["type"]
        field: list[int | str] = [int(entry["offset"]), *self._describe(outer)]
        if not all(isinstance(part, str) or 0 <= part < MAX_SIZE for part in field):
            raise ValueError(f"a member with {field}")
        while len(field) > 2 and field[-1] in (0, ""):
            field.pop()
        return field

    def _describe(self, kind: dict[str, Any]) -> tuple[int, int, int, int, str]:
        match kind["kind"]:
            case "bitfield":
                size, *_, name = self._describe(kind["type"])
                return size, int(kind["bit_position"]), int(kind["bit_length"]), 0, name
            case "array":
                count = int(kind["count"])
                size, _, _, inner, name = self._describe(kind["subtype"])
                return count * size, 0, 0, count * (inner or 1), name
            case "pointer":
                below = kind.get("subtype", {})
                return self._pointer, 0, 0, 0, "*" + str(below.get("name", ""))
            case "base":
                return self._base.get(kind["name"], 0), 0, 0, 0, kind["name"]
            case "enum":
                return self._enums.get(kind["name"], 4), 0, 0, 0, "enum " + kind["name"]
            case "struct" | "union" | "class":
                return self._user.get(kind["name"], 0), 0, 0, 0, kind["name"]
            case _:
                return 0, 0, 0, 0, ""


def _types(data: dict[str, Any], sizes: _Sizes) -> bytes:
    lines = []
    for name, entry in data["user_types"].items():
        fields = {}
        for number, (member, where) in enumerate(entry["fields"].items()):
            label = f"{_ANONYMOUS}{number}" if where.get("anonymous") or not member else member
            fields[label] = sizes.compact(where)
        lines.append(_line(name, [int(entry["size"]), fields]))
    lines += [_line("enum " + name, entry["constants"]) for name, entry in data["enums"].items()]
    return _text(lines)


def _symbols(data: dict[str, Any]) -> bytes:
    addresses = {name: int(entry["address"]) for name, entry in data["symbols"].items() if "\n" not in name}
    lines = [f"{name}\t{rva:x}" for name, rva in addresses.items() if 0 <= rva < MAX_SIZE]
    return _text([line.encode("utf-8", "replace") for line in lines])


def _identity(data: dict[str, Any]) -> PdbId:
    pdb = data["metadata"].get("windows", {}).get("pdb", {})
    guid = str(pdb.get("GUID", ""))
    return PdbId(
        str(pdb.get("database", "")).lower(), guid.upper() if _GUID.fullmatch(guid) else "", int(pdb.get("age", 0))
    )


def _line(name: str, value: object) -> bytes:
    text = json.dumps(value, separators=(",", ":"))  # ASCII, and never a newline
    return name.replace("\n", "").replace("\t", "").encode("utf-8", "replace") + b"\t" + text.encode()


def _text(lines: Iterable[bytes]) -> bytes:
    return b"\n".join([b"", *sorted(lines), b""])


def _between(text: bytes, name: str) -> bytes | None:
    """What follows a name and its tab, up to the end of the line; found by halving."""
    mark = name.encode("utf-8", "replace") + b"\t"
    low, high = 0, len(text) - 1  # the line looked for, with the newline before it, begins in [low, high)
    while low < high:
        start = text.rfind(b"\n", 0, (low + high) // 2 + 1)
        end = text.find(b"\n", start + 1)
        line = text[start + 1 : end]
        if line.startswith(mark):
            return line[len(mark) :]
        if line < mark:
            low = end
        else:
            high = start
    return None


def _parse_struct(found: Any) -> Struct:  # noqa: ANN401 - it is JSON
    size, members = found
    return Struct(int(size), {name: Field(*where) for name, where in members.items()})
