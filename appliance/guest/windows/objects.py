"""The object manager's view of an object: which type it is of, and its name.

Since Windows 7 ``_OBJECT_HEADER.TypeIndex`` counts in ``ObTypeIndexTable``, and ``InfoMask`` tells which optional
headers lie before it (``ObpInfoMaskToOffset``); before, ``Type`` and ``NameInfoOffset`` said so. Since Windows 10 the
index is mixed with the header's address and ``ObHeaderCookie``. Sources: ntkrnlmp.pdb.
"""

from __future__ import annotations

from typing import Final

from appliance.errors import Implausible, UnreadableMemory
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.text import wide_text

CREATOR_INFO, NAME_INFO = 1, 2  # bits of InfoMask
MAX_NAME: Final = 512  # bytes of one name


class Objects:
    """Looks at object headers of one guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel, types = kernel, kernel.types
        self._pointer = kernel.pointer_size
        self._body = types.offset("_OBJECT_HEADER.Body") if types.has("_OBJECT_HEADER.Body") else None
        self._index, self._type, self._mask, self._name_offset = (
            types.offset(f"_OBJECT_HEADER.{name}") if types.has(f"_OBJECT_HEADER.{name}") else None
            for name in ("TypeIndex", "Type", "InfoMask", "NameInfoOffset")
        )
        self._creator_size = (
            types.size("_OBJECT_HEADER_CREATOR_INFO") if types.has("_OBJECT_HEADER_CREATOR_INFO") else None
        )
        name = "_OBJECT_HEADER_NAME_INFO"
        self._name_size = types.size(name) if types.has(name) else None
        self._name = types.offset(f"{name}.Name") if types.has(f"{name}.Name") else None
        self._cookie_va = kernel.find("ObHeaderCookie")
        self._process_type: int | None = None

    def is_process(self, va: int) -> bool:
        """Whether the object manager calls it a process; False where it cannot be asked."""
        if self._process_type is None:
            self._process_type = self._read_process_type()
        try:
            kind = self.type_of(va)
        except UnreadableMemory:
            return False
        return kind is not None and kind == self._process_type

    def type_of(self, va: int) -> int | None:
        """A number that is equal for objects of one type; None where the types tell none. Raises UnreadableMemory."""
        if self._body is None:
            return None
        header = va - self._body
        if self._index is not None:
            mixed = self._kernel.space.u8(header + self._index)
            if self._cookie_va is None:
                return mixed
            return mixed ^ (header >> 8 & 0xFF) ^ self._kernel.space.u8(self._cookie_va)
        return self._kernel.space.pointer(header + self._type) if self._type is not None else None

    def name_of(self, va: int) -> str | None:
        """An object's own name, without its directory; None where it has none or it cannot be read."""
        if self._body is None or self._name_size is None or self._name is None or not self._kernel.is_kernel(va):
            return None
        space, header = self._kernel.space, va - self._body
        try:
            if self._mask is not None:
                mask = space.u8(header + self._mask)
                if not mask & NAME_INFO or (mask & CREATOR_INFO and self._creator_size is None):
                    return None
                info = header - self._name_size - (self._creator_size or 0) * (mask & CREATOR_INFO)
            else:
                back = space.u8(header + self._name_offset) if self._name_offset is not None else 0
                if not back:
                    return None
                info = header - back
            return wide_text(space, info + self._name, MAX_NAME) or None
        except (UnreadableMemory, Implausible):
            return None

    def _read_process_type(self) -> int | None:
        """The type of the process System, which is a process if anything is."""
        where = self._kernel.find("PsInitialSystemProcess")
        if where is None:
            return None
        try:
            return self.type_of(self._kernel.space.pointer(where))
        except UnreadableMemory:
            return None
