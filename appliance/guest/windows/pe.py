"""PE images as they lie in memory: headers, sections, exports, the record that names their symbols, their version.

Every count and length is clamped; addresses relative to the image (RVA) are checked against its size.
Sources: Microsoft PE/COFF specification (optional header, export table, debug directory, .rsrc), CodeView record
"RSDS" (signature, GUID, age, path), VS_FIXEDFILEINFO of winver.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from appliance.errors import Implausible, UnreadableMemory
from appliance.guest.windows.isf import PdbId
from appliance.guest.windows.space import PAGE, AddressSpace

HEADER_SIZE = PAGE  # what of an image is read for its headers
MAX_SECTIONS = 96
MAX_EXPORTS = 1 << 16
MAX_IMAGE = 512 << 20
MAX_SCAN = 16 << 20  # bytes of an image that are looked through for its CodeView record
EXECUTE, WRITE = 0x2000_0000, 0x8000_0000  # IMAGE_SCN_MEM_EXECUTE, IMAGE_SCN_MEM_WRITE
I386, AMD64 = 0x14C, 0x8664
_EXPORT, _RESOURCE, _DEBUG = 0, 2, 6  # IMAGE_DIRECTORY_ENTRY_*
_CODEVIEW, _RSDS = 2, b"RSDS"
_DEBUG_ENTRY = struct.Struct("<IIHHIIII")
_NAME_LIMIT = 256
_PDB_NAME = re.compile(rb"([\x21-\x7e ]{1,250})\.pdb\0", re.IGNORECASE)
_VERSION_TYPE = 16  # RT_VERSION
_FIXED_INFO = b"\xbd\x04\xef\xfe"  # VS_FIXEDFILEINFO.dwSignature


class Section(NamedTuple):
    """One section: ``[rva, rva + size)`` of the image."""

    name: str
    rva: int
    size: int
    flags: int  # IMAGE_SCN_*

    @property
    def executable(self) -> bool:
        """Whether the image asks for it to be executable."""
        return bool(self.flags & EXECUTE)


@dataclass(frozen=True, slots=True)
class Headers:
    """What the headers of an image say, not whether it is true."""

    machine: int
    timestamp: int
    is64: bool
    size: int  # SizeOfImage
    entry: int  # RVA
    base: int  # ImageBase: where it would like to lie, or (once loaded) lies
    checksum: int
    version: tuple[int, int]  # of the operating system
    sections: tuple[Section, ...]
    directories: tuple[tuple[int, int], ...]  # (rva, size)

    def section_of(self, rva: int) -> Section | None:
        """The section that holds an RVA."""
        return next((part for part in self.sections if part.rva <= rva < part.rva + part.size), None)


def parse_headers(raw: bytes) -> Headers:
    """Parse the first page of an image. Raises Implausible where it is none."""
    try:
        return _parse(raw)
    except struct.error:
        raise Implausible("the headers of this image are cut short") from None


def read_headers(space: AddressSpace, base: int) -> Headers:
    """Parse the headers of the image at ``base``. Raises Implausible, UnreadableMemory."""
    return parse_headers(space.read(base, HEADER_SIZE))


def find_debug_id(space: AddressSpace, base: int, headers: Headers, *, thorough: bool = True) -> PdbId | None:
    """Which symbols belong to the image: the CodeView record of its debug directory.

    Where that is paged out, ``thorough`` looks for a record in all of its read-only sections.
    """
    for kind, size, rva in _debug_entries(space, base, headers):
        if kind == _CODEVIEW and size > 24 and rva < headers.size:
            raw = _read_or_none(space, base + rva, min(size, 24 + _NAME_LIMIT))
            found = parse_debug_id(raw) if raw else None
            if found:
                return found
    left = MAX_SCAN if thorough else 0
    for section in headers.sections:
        size = min(section.size, left)
        if size and not section.flags & WRITE:
            left -= size
            found = _scan_debug_id(space, base + section.rva, size)
            if found:
                return found
    return None


def seek_debug_id(space: AddressSpace, base: int, size: int, names: Collection[str]) -> PdbId | None:
    """The first CodeView record of an image that names one of these PDBs, wherever it lies.

    For an image whose headers or debug directory are gone or lead astray.
    """
    return _scan_debug_id(space, base, min(size, MAX_SCAN), names)


def parse_debug_id(raw: bytes) -> PdbId | None:
    """Parse a CodeView record: RSDS, GUID (three little-endian numbers and 8 bytes), age, path of the PDB."""
    if len(raw) < 26 or not raw.startswith(_RSDS):
        return None
    name = _PDB_NAME.match(raw + b"\0", 24)
    if name is None:
        return None
    first, second, third = struct.unpack_from("<IHH", raw, 4)
    guid = f"{first:08X}{second:04X}{third:04X}{raw[12:20].hex().upper()}"
    file = re.split(r"[\\/]", name[1].decode("ascii", "replace"))[-1].lower() + ".pdb"
    return PdbId(file, guid, int.from_bytes(raw[20:24], "little"))


def read_exports(
    space: AddressSpace, base: int, headers: Headers, names: Collection[str] | None = None
) -> dict[str, int]:
    """RVAs of exported names (all, or only ``names``). Forwarded ones are left out. Raises UnreadableMemory."""
    rva, size = headers.directories[_EXPORT] if headers.directories else (0, 0)
    if not rva or size < 40 or rva + size > headers.size:
        return {}
    functions, count, functions_at, names_at, ordinals_at = _export_table(space.read(base + rva, 40))
    count, functions = min(count, MAX_EXPORTS), min(functions, MAX_EXPORTS)
    if max(functions_at + 4 * functions, names_at + 4 * count, ordinals_at + 2 * count) > headers.size:
        return {}
    texts = struct.unpack(f"<{count}I", space.read(base + names_at, 4 * count))
    ordinals = struct.unpack(f"<{count}H", space.read(base + ordinals_at, 2 * count))
    addresses = struct.unpack(f"<{functions}I", space.read(base + functions_at, 4 * functions))
    # The names lie together, in the export section behind its tables: one read finds most of them.
    blob = _read_or_none(space, base + rva, min(size, 4 << 20)) or b""
    wanted = None if names is None else set(names)
    found: dict[str, int] = {}
    for text_rva, ordinal in zip(texts, ordinals, strict=True):
        at = text_rva - rva
        if not 0 <= at < len(blob):
            continue
        name = blob[at : blob.find(b"\0", at, at + _NAME_LIMIT)].decode("ascii", "replace")
        if ordinal >= functions or (wanted is not None and name not in wanted):
            continue
        address = addresses[ordinal]
        if address < headers.size and not rva <= address < rva + size:
            found[name] = address
    return found


def find_export_name(space: AddressSpace, base: int, headers: Headers) -> str:
    """The name by which an image exports, e.g. "ntoskrnl.exe" of every kernel; empty where there is none."""
    rva, size = headers.directories[_EXPORT] if headers.directories else (0, 0)
    raw = _read_or_none(space, base + rva, 16) if rva and size >= 40 and rva < headers.size else None
    name = int.from_bytes(raw[12:16], "little") if raw else 0
    text = _read_or_none(space, base + name, min(64, PAGE - (base + name) % PAGE)) if 0 < name < headers.size else None
    return (text or b"").split(b"\0", 1)[0].decode("ascii", "replace")


def find_version(space: AddressSpace, base: int, headers: Headers) -> tuple[int, int, int, int] | None:
    """The file version in the image's resources, None where there is none or it is paged out."""
    rva, size = headers.directories[_RESOURCE] if len(headers.directories) > _RESOURCE else (0, 0)
    if not rva or rva >= headers.size:
        return None
    node, wanted = 0, [_VERSION_TYPE, None, None]  # type, name, language
    for level, choice in enumerate(wanted):
        raw = _read_or_none(space, base + rva + node, PAGE - (rva + node) % PAGE)
        target = _resource(raw, choice) if raw else None
        if target is None or target >> 31 != (level < 2):
            return None
        node = target & 0x7FFF_FFFF
        if node + 16 > min(size, headers.size - rva):
            return None
    entry = _read_or_none(space, base + rva + node, 16)
    if entry is None:
        return None
    data, length = struct.unpack_from("<II", entry)
    raw = _read_or_none(space, base + data, min(length, PAGE)) if data < headers.size else None
    at = (raw or b"").find(_FIXED_INFO)
    if raw is None or at < 0 or at + 16 > len(raw):
        return None
    high, low = struct.unpack_from("<II", raw, at + 8)
    return high >> 16, high & 0xFFFF, low >> 16, low & 0xFFFF


def _parse(raw: bytes) -> Headers:
    if raw[:2] != b"MZ":
        raise Implausible("no image begins here")
    at = struct.unpack_from("<I", raw, 0x3C)[0]
    if at > len(raw) - 24 or raw[at : at + 4] != b"PE\0\0":
        raise Implausible("no PE header where the image says")
    machine, count, timestamp, _, _, optional_size, _ = struct.unpack_from("<HHIIIHH", raw, at + 4)
    optional = at + 24
    magic = struct.unpack_from("<H", raw, optional)[0]
    if magic not in (0x10B, 0x20B) or count > MAX_SECTIONS:
        raise Implausible("the image's optional header is of no known kind")
    is64 = magic == 0x20B
    entry = struct.unpack_from("<I", raw, optional + 16)[0]
    base = struct.unpack_from("<Q", raw, optional + 24)[0] if is64 else struct.unpack_from("<I", raw, optional + 28)[0]
    version = struct.unpack_from("<HH", raw, optional + 40)
    size, _, checksum = struct.unpack_from("<III", raw, optional + 56)
    if not 0 < size <= MAX_IMAGE:
        raise Implausible(f"an image of {size} bytes")
    directories_at = optional + (108 if is64 else 92)
    directories = []
    for number in range(min(struct.unpack_from("<I", raw, directories_at)[0], 16)):
        directories.append(struct.unpack_from("<II", raw, directories_at + 4 + 8 * number))
    sections = []
    for number in range(count):
        name, virtual, rva, stored, _, _, _, _, _, flags = struct.unpack_from(
            "<8sIIIIIIHHI", raw, optional + optional_size + 40 * number
        )
        length = min(virtual or stored, max(0, size - rva))
        sections.append(Section(name.rstrip(b"\0").decode("ascii", "replace"), rva, length, flags))
    return Headers(machine, timestamp, is64, size, entry, base, checksum, version, tuple(sections), tuple(directories))


def _debug_entries(space: AddressSpace, base: int, headers: Headers) -> list[tuple[int, int, int]]:
    """Kind, size and RVA of each entry of the debug directory; empty where it is paged out."""
    rva, size = headers.directories[_DEBUG] if len(headers.directories) > _DEBUG else (0, 0)
    size = min(size, 16 * _DEBUG_ENTRY.size)
    raw = _read_or_none(space, base + rva, size) if rva and rva + size <= headers.size else None
    if raw is None:
        return []
    whole = raw[: len(raw) - len(raw) % _DEBUG_ENTRY.size]
    return [(entry[4], entry[5], entry[6]) for entry in _DEBUG_ENTRY.iter_unpack(whole)]


def _scan_debug_id(space: AddressSpace, start: int, size: int, names: Collection[str] | None = None) -> PdbId | None:
    """Look for a CodeView record page by page; a page is read with the start of the next."""
    spans = [(start + at, min(PAGE, size - at)) for at in range(0, size, PAGE)]
    pages = space.readv(spans)
    for number, page in enumerate(pages):
        at = (page or b"").find(_RSDS)
        while page and at >= 0:
            following = pages[number + 1] if number + 1 < len(pages) else None
            found = parse_debug_id((page + (following or b""))[at : at + 24 + _NAME_LIMIT])
            if found and (names is None or found.name in names):
                return found
            at = page.find(_RSDS, at + 1)
    return None


def _export_table(raw: bytes) -> tuple[int, int, int, int, int]:
    """NumberOfFunctions, NumberOfNames, AddressOfFunctions, AddressOfNames, AddressOfNameOrdinals."""
    functions, names, functions_at, names_at, ordinals_at = struct.unpack_from("<5I", raw, 20)
    return functions, names, functions_at, names_at, ordinals_at


def _resource(raw: bytes, wanted: int | None) -> int | None:
    """The entry of a resource directory that has this id (or the first one): where it leads."""
    if len(raw) < 16:
        return None
    named, numbered = struct.unpack_from("<HH", raw, 12)
    for number in range(min(named + numbered, (len(raw) - 16) // 8)):
        name, target = struct.unpack_from("<II", raw, 16 + 8 * number)
        if wanted is None or name == wanted:
            return int(target)
    return None


def _read_or_none(space: AddressSpace, va: int, size: int) -> bytes | None:
    try:
        return space.read(va, size)
    except UnreadableMemory:
        return None
