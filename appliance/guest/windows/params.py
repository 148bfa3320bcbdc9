"""What a process says of itself: its PEB and ``_RTL_USER_PROCESS_PARAMETERS``, in its own memory and its to change.

Sources: _PEB, _RTL_USER_PROCESS_PARAMETERS of ntkrnlmp.pdb; RTL_USER_PROC_PARAMS_NORMALIZED (1): its pointers are
pointers, else distances from its own start; the environment: NAME=value strings, each ended by NUL, the last by two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.windows.eprocess import RawProcess
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.record import Record
from appliance.guest.windows.space import PAGE, AddressSpace
from appliance.guest.windows.text import MAX_COMMAND, MAX_PATH, decode_wide
from appliance.model import Missing

LOWEST_USER: Final = 0x1_0000  # below, nothing is mapped in user mode
HIGHEST_USER: Final = 1 << 56  # with 5 levels of page tables; what else is no user's, the kernel's own range tells
MAX_ENVIRONMENT: Final = 64 << 10
MAX_VALUE: Final = 256  # characters of a variable that we keep
MAX_SESSION: Final = 1 << 24


class Parameters(NamedTuple):
    """What could be read in a process's own memory."""

    image: str | Missing = Missing.UNREADABLE
    command: str | Missing = Missing.UNREADABLE
    session: int | None = None  # of the kernel's session space, which this process's page tables map
    environment: int = 0


class ParameterReader:
    """Reads the parameters of processes of one guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel, types = kernel, kernel.types
        self._parameters = types.offset("_PEB.ProcessParameters") if types.has("_PEB.ProcessParameters") else None
        strings = [f"{name}.{part}" for name in ("ImagePathName", "CommandLine") for part in ("Length", "Buffer")]
        self._record = (
            Record(types, "_RTL_USER_PROCESS_PARAMETERS", (*strings, "Environment?"))
            if types.has("_RTL_USER_PROCESS_PARAMETERS")
            else None
        )
        kind = types.field("_EPROCESS.Session").type.lstrip("*") if types.has("_EPROCESS.Session") else ""
        kind = kind if types.has(f"{kind}.SessionId") else "_MM_SESSION_SPACE"
        self._session = types.offset(f"{kind}.SessionId") if types.has(f"{kind}.SessionId") else None

    def read(self, raw: RawProcess) -> Parameters:
        """Read what a process says of itself. Its page tables must still be its own: the caller checks that after."""
        space = self._kernel.process_space(raw.dtb)
        session = self._read_session(space, raw.session)
        if not self.is_user(raw.peb) or self._parameters is None or self._record is None:
            return Parameters(session=session)
        try:
            start = space.pointer(raw.peb + self._parameters)
            if not self.is_user(start):
                return Parameters(session=session)
            image_size, image, size, command, environment = self._record.parse(space.read(*self._record.span(start)))
        except UnreadableMemory:
            return Parameters(session=session)
        spans = [(self._absolute(image, start), min(image_size, MAX_PATH))]
        spans.append((self._absolute(command, start), min(size, MAX_COMMAND)))
        texts = [
            decode_wide(data) if data is not None and self.is_user(va) else Missing.UNREADABLE
            for (va, _), data in zip(spans, space.readv(spans), strict=True)
        ]
        return Parameters(texts[0], texts[1] if size else "", session, self._absolute(environment, start))

    def read_environment(self, raw: RawProcess, start: int, names: Iterable[str]) -> dict[str, str]:
        """Some variables of a process's environment, by upper-case name; those that cannot be read are left out."""
        if not self.is_user(start):
            return {}
        space, data = self._kernel.process_space(raw.dtb), b""
        try:
            while len(data) < MAX_ENVIRONMENT and b"\0\0\0\0" not in data[-PAGE - 4 :]:
                data += space.read(start + len(data), PAGE - (start + len(data)) % PAGE)
        except UnreadableMemory:
            pass  # what lies before is good
        wanted = set(names)
        found: dict[str, str] = {}
        for entry in data[: len(data) & -2].decode("utf-16-le", "replace").split("\0"):
            if not entry:
                break
            name, _, value = entry.partition("=")
            if name.upper() in wanted:
                found.setdefault(name.upper(), value[:MAX_VALUE])
        return found

    def is_user(self, va: int) -> bool:
        """Whether an address can be a process's own."""
        return LOWEST_USER <= va < HIGHEST_USER and not self._kernel.is_kernel(va)

    def _absolute(self, pointer: int, start: int) -> int:
        return start + pointer if 0 < pointer < LOWEST_USER else pointer

    def _read_session(self, space: AddressSpace, session: int) -> int | None:
        if self._session is None or not self._kernel.is_kernel(session):
            return None
        try:
            number = space.u32(session + self._session)
        except UnreadableMemory:
            return None
        return number if number < MAX_SESSION else None
