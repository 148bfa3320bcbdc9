"""The compiled programs out of their ELF object: sections with code, and where each needs a map's descriptor.

A small reader for our own object, not for any: one relocation type, maps in the section ``maps``. Sources: elf(5),
Documentation/bpf/llvm_reloc.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct, error
from typing import Final

EM_BPF: Final = 247
SHT_SYMTAB: Final = 2
SHT_REL: Final = 9
R_BPF_64_64: Final = 1
KINDS: Final = {"socket": 1, "classifier": 3}  # section -> enum bpf_prog_type
PSEUDO_MAP_FD: Final = 1  # src_reg of BPF_LD_IMM64: the immediate is a map's descriptor
LD_IMM64: Final = 0x18

_HEADER = Struct("<4sBB10xHHIQQQIHHHHHH")
_SECTION = Struct("<IIQQQQIIQQ")
_SYMBOL = Struct("<IBBHQQ")
_REL = Struct("<QQ")
_SIZE = Struct("<I")


@dataclass(frozen=True, slots=True)
class Code:
    """One program: its instructions and the maps they name, by byte offset."""

    name: str
    kind: int  # enum bpf_prog_type
    instructions: bytes
    maps: tuple[tuple[int, str], ...]

    def link(self, descriptors: dict[str, int]) -> bytes:
        """Return the instructions with the maps' descriptors filled in."""
        code = bytearray(self.instructions)
        for at, name in self.maps:
            code[at + 1] = code[at + 1] & 0x0F | PSEUDO_MAP_FD << 4
            code[at + 4 : at + 8] = descriptors[name].to_bytes(4, "little")
        return bytes(code)


@dataclass(frozen=True, slots=True)
class Object:
    """What the object holds: programs by the last part of their section's name, and the licence."""

    programs: dict[str, Code]
    license: bytes
    sizes: tuple[int, ...]  # of the structures that it shares with us


def parse(data: bytes) -> Object:
    """Read a little-endian BPF object. Raises ValueError for anything else."""
    try:
        return _parse(data)
    except (error, IndexError) as problem:
        raise ValueError(f"damaged BPF object: {problem}") from problem


def _parse(data: bytes) -> Object:
    magic, bits, order, _, machine, _, _, _, sections_at, _, _, _, _, size, count, names_index = _HEADER.unpack_from(
        data
    )
    if magic != b"\x7fELF" or (bits, order, machine) != (2, 1, EM_BPF) or size != _SECTION.size:
        raise ValueError("no little-endian 64-bit BPF object")
    sections = [_SECTION.unpack_from(data, sections_at + index * size) for index in range(count)]
    bodies = [data[section[4] : section[4] + section[5]] for section in sections]
    names = [_text(bodies[names_index], section[0]) for section in sections]
    table = next(index for index, section in enumerate(sections) if section[1] == SHT_SYMTAB)
    strings = bodies[sections[table][6]]
    symbols = [
        (_text(strings, name), names[section] if section < count else "")
        for name, _, _, section, _, _ in _SYMBOL.iter_unpack(bodies[table])
    ]
    relocations: dict[int, list[tuple[int, str]]] = {}
    for section, body in zip(sections, bodies, strict=True):
        if section[1] != SHT_REL or not _is_program(names[section[7]]):
            continue
        for at, info in _REL.iter_unpack(body):
            symbol, home = symbols[info >> 32]
            if info & 0xFFFFFFFF != R_BPF_64_64 or home != "maps" or bodies[section[7]][at] != LD_IMM64:
                raise ValueError(f"relocation of {symbol!r} is none of a map")
            relocations.setdefault(section[7], []).append((at, symbol))
    programs = {
        name.partition("/")[2]: Code(
            name.partition("/")[2], KINDS[name.partition("/")[0]], bodies[index], tuple(relocations.get(index, ()))
        )
        for index, name in enumerate(names)
        if _is_program(name)
    }
    sizes = tuple(size for (size,) in _SIZE.iter_unpack(bodies[names.index("layout")]))
    return Object(programs, bodies[names.index("license")].rstrip(b"\0"), sizes)


def _is_program(section: str) -> bool:
    return section.partition("/")[0] in KINDS


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode("ascii")
