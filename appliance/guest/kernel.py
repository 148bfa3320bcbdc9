"""An attached Linux kernel: virtual reads, symbols and layouts on top of guest-physical memory.

Made by :func:`appliance.guest.attach.attach`. Addresses of the direct map and of the kernel image are translated by
arithmetic (one addition); everything else (vmalloc, vmemmap, user space) by page walks. A `Kernel` belongs to one
thread, like the memory beneath it. Sources: Linux Documentation/arch/x86/x86_64/mm.rst (virtual memory map).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from appliance.ports import GuestMemory


class Pte(NamedTuple):
    """One leaf of a page table: a page of 4 KiB, 2 MiB or 1 GiB."""

    va: int
    gpa: int  # 0 unless present
    size: int
    present: bool
    writable: bool
    user: bool
    nx: bool
    accessed: bool
    dirty: bool
    raw: int  # the entry itself; of a swapped-out page its swap entry


class Field(NamedTuple):
    """Where a member lies in its structure. For a bit-field, ``bit`` counts from the start of byte ``offset``."""

    offset: int
    size: int  # bytes of the whole member (of the storage unit for a bit-field)
    bit: int = 0
    bits: int = 0  # 0: no bit-field
    length: int = 0  # elements, for an array


class Symbols(Protocol):
    """The kernel's own symbol table."""

    def find(self, name: str) -> int | None:
        """Address of a symbol, None when the kernel has none of that name."""
        ...

    def get(self, name: str) -> int:
        """Address of a symbol. Raises UnsupportedGuest naming it."""
        ...

    def find_prefix(self, name: str) -> int | None:
        """Address of ``name`` or of a static local ``name.N``."""
        ...

    def nearest(self, va: int) -> tuple[str, int] | None:
        """The symbol at or below an address, and the distance to it."""
        ...


class Types(Protocol):
    """The kernel's own type information. Paths are ``struct.member.member``; anonymous members are looked through."""

    def has(self, path: str) -> bool:
        """Whether the structure, or the member, exists."""
        ...

    def field(self, path: str) -> Field:
        """Where a member lies. Raises UnsupportedGuest naming it."""
        ...

    def offset(self, path: str) -> int:
        """Offset in bytes of a member from the start of the first structure of the path."""
        ...

    def width(self, path: str) -> int:
        """Size of a member in bytes."""
        ...

    def length(self, path: str) -> int:
        """Elements of an array member."""
        ...

    def size(self, name: str) -> int:
        """Size of a structure, union, enumeration or typedef in bytes."""
        ...

    def enum(self, name: str) -> dict[str, int]:
        """The enumerators of an enumeration."""
        ...


class Kernel(Protocol):
    """Interface first; the class follows."""

    memory: GuestMemory
    release: str
    build_id: str
    symbols: Symbols
    types: Types
    la57: bool
    page_offset: int
    vmemmap_base: int
    vmalloc_base: int

    def read(self, va: int, size: int) -> bytes: ...
    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]: ...
    def u64(self, va: int) -> int: ...
    def u32(self, va: int) -> int: ...
    def u16(self, va: int) -> int: ...
    def u8(self, va: int) -> int: ...
    def read_text(self, va: int, limit: int) -> bytes:
        """NUL-terminated text, at most ``limit`` bytes, without the NUL."""
        ...

    def read_user(self, pgd: int, va: int, size: int) -> bytes:
        """Another address space; ``pgd`` is ``mm->pgd`` (a VA) or its gpa."""
        ...

    def readv_user(self, pgd: int, spans: Sequence[tuple[int, int]]) -> list[bytes | None]: ...
    def walk_user_pages(self, pgd: int, start: int, end: int) -> Iterator[Pte]: ...
    def forget(self) -> None:
        """Drop cached translations of vmalloc addresses; call at the start of each look."""
        ...
