r"""Names of open files: ``_FILE_OBJECT.FileName`` behind the name of its device.

Sources: _FILE_OBJECT, _DEVICE_OBJECT of ntkrnlmp.pdb; IO_TYPE_FILE (5, wdm.h); devices live in ``\Device``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.record import Record
from appliance.guest.windows.text import MAX_PATH, Wide, decode_wide

IO_TYPE_FILE: Final = 5
MAX_CACHE: Final = 16_384


class OpenFile(NamedTuple):
    r"""One file object. ``path`` is ``\Device\HarddiskVolume3\Windows\a.dll``; without an unknown device's name."""

    path: str
    delete_pending: bool  # it has no name any more, once it is closed


class Files:
    """Reads the names of file objects of one guest, and remembers them by what makes them unique."""

    def __init__(self, kernel: WindowsKernel, objects: Objects) -> None:
        self._kernel, self._objects = kernel, objects
        self._typed = kernel.types.has("_FILE_OBJECT.Type")
        names = ("Type?", "DeviceObject", "DeletePending?", "FileName.Length", "FileName.Buffer")
        self._record = (
            Record(kernel.types, "_FILE_OBJECT", names) if kernel.types.has("_FILE_OBJECT.FileName") else None
        )
        self._texts: dict[tuple[int, Wide], str] = {}
        self._devices: dict[int, str] = {}

    def read(self, vas: Iterable[int]) -> dict[int, OpenFile]:
        """Read many file objects in two batches. What is none, or cannot be read, is left out.

        A file object says so itself, or has a name that begins like one (its type may have been overwritten).
        """
        kernel, record = self._kernel, self._record
        wanted = [va for va in dict.fromkeys(vas) if kernel.is_kernel(va) and not va % kernel.pointer_size]
        if record is None or not wanted:
            return {}
        found: dict[int, tuple[int, bool, Wide]] = {}
        untyped = set()
        for va, raw in zip(wanted, kernel.space.readv([record.span(va) for va in wanted]), strict=True):
            kind, device, deleted, size, buffer = record.parse(raw) if raw is not None else (0, 0, 0, 0, 0)
            if raw is not None:
                found[va] = device, deleted == 1, Wide(buffer, min(size, MAX_PATH))
                if self._typed and kind != IO_TYPE_FILE:
                    untyped.add(va)
        fresh = [(va, name) for va, (_, _, name) in found.items() if name.size and (va, name) not in self._texts]
        if len(self._texts) + len(fresh) > MAX_CACHE:
            self._texts.clear()
            fresh = [(va, name) for va, (_, _, name) in found.items() if name.size][:MAX_CACHE]
        for key, data in zip(fresh, kernel.space.readv([(name.buffer, name.size) for _, name in fresh]), strict=True):
            if data is not None:
                self._texts[key] = decode_wide(data)
        return {
            va: OpenFile(self._device(device) + self._texts.get((va, name), ""), deleted)
            for va, (device, deleted, name) in found.items()
            if (not name.size or (va, name) in self._texts)
            and (va not in untyped or self._texts.get((va, name), "").startswith("\\"))
        }

    def forget(self) -> None:
        """Read every name anew next time."""
        self._texts.clear()
        self._devices.clear()

    def _device(self, va: int) -> str:
        """The path of a device, empty where it has no name."""
        if va not in self._devices:
            if len(self._devices) >= MAX_CACHE:
                self._devices.clear()
            name = self._objects.name_of(va)
            self._devices[va] = f"\\Device\\{name}" if name else ""
        return self._devices[va]
