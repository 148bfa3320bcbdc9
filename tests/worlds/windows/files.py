"""Files and sections: a file object, a control area with its subsections, prototype page-table entries, shared pages.

Sources: _FILE_OBJECT, _CONTROL_AREA (its subsections follow it in the same block), _SEGMENT, _MMPTE of ntkrnlmp.pdb.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

from tests.worlds.windows import pe
from tests.worlds.windows.boot import Kernel
from tests.worlds.windows.paging import ACCESSED, DIRTY, PAGE, PRESENT

VOLUME = "\\Device\\HarddiskVolume3"
PAGES = 8  # of an image: header, two of code, three of constants, two of data
TEXT, TEXT_PAGES, CONSTANTS, WRITABLE_PAGES = 1, 2, 3, 6


@dataclass
class File:
    """A file that is mapped: as an image, or as data."""

    path: str  # without the volume: \\Windows\\System32\\ntdll.dll
    image: bool
    size: int
    va: int  # _FILE_OBJECT
    control_area: int
    subsection: int
    prototypes: int
    pages: list[int] = field(default_factory=list)  # gpas, shared by all who map it
    code: dict[int, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.rsplit("\\", 1)[-1]

    @property
    def dos(self) -> str:
        return self.path if self.path.startswith("\\\\") else "C:" + self.path

    @property
    def device(self) -> str:
        """The path as the kernel says it."""
        return VOLUME + self.path


def is_32_bit(path: str) -> bool:
    """Whether a program or DLL of this path is one, as Windows keeps them apart."""
    return "\\syswow64\\" in path.lower() or " (x86)\\" in path.lower()


class Files:
    """Every file once, whoever maps it."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._known: dict[tuple[str, bool], File] = {}
        driver = kernel.object("Driver", b"Driv", kernel.types.pack("_DRIVER_OBJECT", {"Type": 4}), name="volmgr")
        body = kernel.types.pack("_DEVICE_OBJECT", {"Type": 3, "DriverObject": driver, "DeviceType": 7})
        self.device = kernel.object("Device", b"Devi", body, name=VOLUME.rsplit("\\", 1)[1])

    def open(self, path: str, *, image: bool = True, content: bytes = b"") -> File:
        """The file of this path; made when it is first asked for. ``path`` may begin with a drive."""
        path = path[2:] if path[1:2] == ":" else path
        key = path.lower(), image
        if key not in self._known:
            self._known[key] = self._make(path, image, content)
        return self._known[key]

    def _make(self, path: str, image: bool, content: bytes) -> File:
        kernel, types = self._kernel, self._kernel.types
        parts = self._image(path) if image else {0: content or b"data of a file\n"}
        count = PAGES if image else max(1, -(-len(parts[0]) // PAGE))
        pages = [kernel.ram.page() for _ in range(count)]
        for rva, data in parts.items():
            for offset in range(0, len(data), PAGE):
                kernel.ram.write(pages[(rva + offset) // PAGE] + rva % PAGE, data[offset : offset + PAGE - rva % PAGE])
        prototypes = kernel.paged.take(
            b"MmSt", b"".join(struct.pack("<Q", page | PRESENT | ACCESSED | DIRTY) for page in pages)
        )
        segment = kernel.paged.take(b"MmSg", types.size("_SEGMENT"))
        area_size, sub_size = types.size("_CONTROL_AREA"), types.size("_SUBSECTION")
        runs = [(0, 1), (TEXT, TEXT_PAGES), (CONSTANTS, 3), (WRITABLE_PAGES, 2)] if image else [(0, count)]
        area = kernel.nonpaged.take(b"MmCi", area_size + len(runs) * sub_size)
        pointers = kernel.nonpaged.take(b"MmSe", types.size("_SECTION_OBJECT_POINTERS"))
        kernel.set(
            pointers, "_SECTION_OBJECT_POINTERS." + ("ImageSectionObject" if image else "DataSectionObject"), area
        )
        values = {
            "Type": 5,
            "Size": types.size("_FILE_OBJECT"),
            "DeviceObject": self.device,
            "SectionObjectPointer": pointers,
            "ReadAccess": 1,
            "SharedRead": 1,
            "SharedDelete": 1,
            "FileName": kernel.text(path),
        }
        va = kernel.object("File", b"File", types.pack("_FILE_OBJECT", values))
        for number, (first, length) in enumerate(runs):
            following = area + area_size + (number + 1) * sub_size if number + 1 < len(runs) else 0
            values = {
                "ControlArea": area,
                "SubsectionBase": prototypes + 8 * first,
                "NextSubsection": following,
                "StartingSector": first * 8,
                "NumberOfFullSectors": length * 8,
                "PtesInSubsection": length,
            }
            kernel.space.write(area + area_size + number * sub_size, types.pack("_SUBSECTION", values))
        values = {"ControlArea": area, "TotalNumberOfPtes": count, "SizeOfSegment": count * PAGE}
        kernel.space.write(segment, types.pack("_SEGMENT", values | {"PrototypePte": prototypes}))
        values = {"Segment": segment, "NumberOfSectionReferences": 1, "NumberOfUserReferences": 1}
        values |= {"u.Flags.Image": int(image), "u.Flags.File": 1, "FilePointer": va | 5}
        kernel.space.write(area, types.pack("_CONTROL_AREA", values))
        return File(path, image, count * PAGE, va, area, area + area_size, prototypes, pages, parts)

    def section(self, file: File) -> int:
        """A section object of the file, as a process has one."""
        types = self._kernel.types
        values = {"u1.ControlArea": file.control_area, "SizeOfSection": file.size, "u.Flags.Image": int(file.image)}
        values = {key: value for key, value in values.items() if types.has(f"_SECTION.{key}")}
        return self._kernel.object("Section", b"Sect", types.pack("_SECTION", values), pool=self._kernel.paged)

    def _image(self, path: str) -> dict[int, bytes]:
        name = path.rsplit("\\", 1)[-1]
        parts = (
            pe.Section(".text", TEXT * PAGE, TEXT_PAGES * PAGE, pe.CODE),
            pe.Section(".rdata", CONSTANTS * PAGE, 3 * PAGE, pe.READONLY),
            pe.Section(".data", WRITABLE_PAGES * PAGE, 2 * PAGE, pe.DATA),
        )
        digest = hashlib.sha256(path.lower().encode())
        debug = pe.Debug(name.rsplit(".", 1)[0] + ".pdb", digest.hexdigest()[:32].upper(), 1)
        image = pe.build(
            PAGES * PAGE,
            parts,
            debug=debug,
            exports={"DllMain": TEXT * PAGE, "Entry": TEXT * PAGE + 0x100},
            version=(10, 0, self._kernel.build, self._kernel.revision),
            name=name,
            dll=not name.lower().endswith(".exe"),
            tables=CONSTANTS * PAGE,
            wide=not is_32_bit(path),
        )
        code = b"".join(hashlib.sha256(digest.digest() + bytes([n])).digest() for n in range(256))
        return image | {TEXT * PAGE: code, WRITABLE_PAGES * PAGE: digest.digest()}
