"""What a process has mapped, as one look saw it: its regions, the files behind them, and where they belong.

A region's protection is the one it was made with; what its pages allow now stands in the page tables. The file behind
an image is the kernel's own knowledge (`_CONTROL_AREA.FilePointer`), not the loader's.
Sources: _MMVAD, _SUBSECTION, _CONTROL_AREA, _FILE_OBJECT, _DEVICE_OBJECT of ntkrnlmp.pdb; wdm.h (FILE_DEVICE_*,
Characteristics); memoryapi.h (PAGE_*).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from appliance.guest.windows.files import OpenFile
from appliance.guest.windows.injection_paths import Place, find_runtime, parse_place
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.record import Record
from appliance.guest.windows.vads import Vad, VadKind

NETWORK: Final = (0x14, 0x10)  # FILE_DEVICE_NETWORK_FILE_SYSTEM, FILE_DEVICE_MULTI_UNC_PROVIDER
OPTICAL: Final = (0x2, 0x3)  # FILE_DEVICE_CD_ROM, FILE_DEVICE_CD_ROM_FILE_SYSTEM
REMOVABLE_MEDIA, REMOTE_DEVICE = 0x1, 0x10  # FILE_REMOVABLE_MEDIA, FILE_REMOTE_DEVICE
SYSTEM_SIDS: Final = ("S-1-5-18", "S-1-5-19", "S-1-5-20")  # LocalSystem, LocalService, NetworkService


class MappedFile(NamedTuple):
    """The file behind a mapped region."""

    path: str  # as the kernel has it; "?" where that could not be read
    place: Place
    deleted: bool = False  # it has no name any more, once it is closed
    remote: bool = False
    removable: bool = False

    @property
    def name(self) -> str:
        """Its name in lower case, without folders."""
        return self.place.name


class View(NamedTuple):
    """One region of a process."""

    start: int
    end: int
    protection: str  # "PAGE_EXECUTE_READWRITE", ...
    private: bool
    image: bool  # mapped as an image (SEC_IMAGE)
    file: MappedFile | None
    prototypes: int  # the prototype entry of its first page, 0 where it has none

    @property
    def executable(self) -> bool:
        """Whether it was made executable."""
        return "EXECUTE" in self.protection

    @property
    def writable(self) -> bool:
        """Whether it was made writable for good; copy-on-write is not."""
        return "READWRITE" in self.protection

    @property
    def name(self) -> str:
        """The file's name, or what there is instead."""
        return self.file.name if self.file else f"memory of no file at {self.start:#x}"


class Module(NamedTuple):
    """One entry of the loader's lists."""

    base: int
    size: int
    name: str
    path: str
    in_load: bool
    in_memory: bool
    in_init: bool


class Scene(NamedTuple):
    """One process as one look saw it."""

    views: tuple[View, ...]  # sorted
    modules: tuple[Module, ...]
    lists_whole: bool  # the loader's lists could be read to their ends
    program: Place  # of the program's own image
    system: bool  # it runs as one of the system's own accounts
    runtime: str | None  # what makes code in this process
    bits: int  # 64 or 32, of the process
    starts: tuple[int, ...] = ()  # where threads began

    @classmethod
    def of(
        cls,
        views: Sequence[View],
        modules: Sequence[Module],
        *,
        lists_whole: bool,
        program: Place,
        sid: str | None,
        bits: int,
        starts: Sequence[int] = (),
    ) -> Scene:
        """From what was read."""
        ordered = tuple(sorted(views, key=lambda view: view.start))
        runtime = find_runtime({view.name for view in ordered if view.image and view.file})
        return cls(
            ordered, tuple(modules), lists_whole, program, sid in SYSTEM_SIDS, runtime, bits, tuple(sorted(starts))
        )

    def at(self, address: int) -> View | None:
        """The region that holds an address."""
        number = bisect_right(self.views, address, key=lambda view: view.start) - 1
        return self.views[number] if number >= 0 and address < self.views[number].end else None

    def began_in(self, start: int, end: int) -> bool:
        """Whether a thread began there."""
        number = bisect_left(self.starts, start)
        return number < len(self.starts) and self.starts[number] < end

    def is_listed(self, view: View) -> bool:
        """Whether the loader knows an image."""
        return any(module.base == view.start for module in self.modules)


class Media:
    """Tells where files lie that are not on a fixed disk of the guest."""

    def __init__(self, kernel: WindowsKernel) -> None:
        self._kernel, types = kernel, kernel.types
        known = types.has("_FILE_OBJECT.DeviceObject") and types.has("_DEVICE_OBJECT.DeviceType")
        self._file = Record(types, "_FILE_OBJECT", ("DeviceObject",)) if known else None
        self._device = Record(types, "_DEVICE_OBJECT", ("DeviceType", "Characteristics?")) if known else None

    def files(self, vads: Sequence[Vad]) -> dict[int, MappedFile]:
        """The files behind regions, by address of the `_FILE_OBJECT`."""
        return self.look({vad.file: OpenFile(vad.path or "?", vad.deleted) for vad in vads if vad.file})

    def look(self, known: Mapping[int, OpenFile]) -> dict[int, MappedFile]:
        """The same of file objects whose path is known, and whether it is being deleted."""
        vas = list(known)
        devices = [int.from_bytes(raw or b"", "little") for raw in self._read(self._file, vas)]
        found: dict[int, MappedFile] = {}
        for va, raw in zip(vas, self._read(self._device, devices), strict=True):
            kind, traits = self._device.parse(raw) if raw and self._device else (0, 0)
            path, deleted = known[va].path or "?", known[va].delete_pending
            place = parse_place(path)
            remote = kind in NETWORK or bool(traits & REMOTE_DEVICE) or place.volume == "unc"
            removable = kind in OPTICAL or bool(traits & REMOVABLE_MEDIA)
            found[va] = MappedFile(path, place, deleted, remote, removable)
        return found

    def _read(self, record: Record | None, vas: Sequence[int]) -> list[bytes | None]:
        if record is None:
            return [None] * len(vas)
        fits = [self._kernel.is_kernel(va) for va in vas]
        raws = self._kernel.space.readv([record.span(va) for va, fit in zip(vas, fits, strict=True) if fit])
        given = iter(raws)
        return [next(given) if fit else None for fit in fits]


def view_of(vad: Vad, files: Mapping[int, MappedFile]) -> View:
    """One region as we judge it."""
    image, file = vad.kind is VadKind.IMAGE, files.get(vad.file)
    return View(vad.start, vad.end, vad.protection, vad.private, image, file, vad.prototypes)
