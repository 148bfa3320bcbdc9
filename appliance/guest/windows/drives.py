r"""Which drive letter a volume has: ``\Device\HarddiskVolume3`` is ``C:``.

The object manager knows: ``\GLOBAL??`` holds a symbolic link for each letter, and each process's device map leads
there. Where that cannot be read (paged out, types that lack it), what processes say of themselves tells: one whose own
path equals the kernel's behind the volume. The process that started first is believed, since at boot nobody lies yet.
Sources: _DEVICE_MAP, _OBJECT_DIRECTORY, _OBJECT_DIRECTORY_ENTRY, _OBJECT_SYMBOLIC_LINK of ntkrnlmp.pdb.
"""

from __future__ import annotations

import re
from typing import Final

from appliance.errors import UnreadableMemory
from appliance.guest.windows.kernel import WindowsKernel
from appliance.guest.windows.objects import Objects
from appliance.guest.windows.text import wide_texts

MAX_LINKS: Final = 1024  # links of one directory that we look at
BUCKETS: Final = 37  # _OBJECT_DIRECTORY.HashBuckets, where the types do not count them
LETTER: Final = re.compile(r"[A-Za-z]:")
VOLUME: Final = re.compile(r"\\Device\\[^\\]+", re.IGNORECASE)
REMOTE: Final = re.compile(r"\\Device\\(?:Mup|LanmanRedirector|WebDavRedirector)(?:\\;[^\\]+)*\\", re.IGNORECASE)
_NEEDED: Final = (
    "_EPROCESS.DeviceMap",
    "_DEVICE_MAP.GlobalDosDevicesDirectory",
    "_OBJECT_DIRECTORY.HashBuckets",
    "_OBJECT_DIRECTORY_ENTRY.ChainLink",
    "_OBJECT_DIRECTORY_ENTRY.Object",
    "_OBJECT_SYMBOLIC_LINK.LinkTarget",
)


class Drives:
    """The drive letters of one guest, as far as they are known."""

    def __init__(self, kernel: WindowsKernel, objects: Objects) -> None:
        self._kernel, self._objects = kernel, objects
        self._known: dict[str, str] = {}  # by volume, lower case: told by the object manager
        self._told: dict[str, tuple[int, str]] = {}  # by volume: when its witness started, and the letter

    def read(self, process_va: int) -> None:
        r"""Read the links of ``\GLOBAL??`` through a process's device map; those that cannot be read stay unknown."""
        try:
            links = self._links(process_va)
        except UnreadableMemory:
            return
        names = {va: name for va in links if LETTER.fullmatch(name := self._objects.name_of(va) or "")}
        target = self._kernel.types.offset("_OBJECT_SYMBOLIC_LINK.LinkTarget") if names else 0
        texts = wide_texts(self._kernel.space, [va + target for va in names], 512)
        for letter, text in zip(names.values(), texts, strict=True):
            if text and VOLUME.fullmatch(text):
                self._known.setdefault(text.casefold(), letter.upper())

    def learn(self, kernel_path: str, own_path: str, started_ns: int) -> None:
        """Believe a process, unless an earlier one says otherwise, that its volume has the letter of its own path."""
        volume = VOLUME.match(kernel_path)
        own = own_path.removeprefix("\\??\\")
        if volume is None or not LETTER.match(own) or own[2:].casefold() != kernel_path[volume.end() :].casefold():
            return
        name = volume.group().casefold()
        self._told[name] = min(self._told.get(name, (started_ns, own[:2].upper())), (started_ns, own[:2].upper()))

    def to_dos(self, path: str) -> str:
        r"""A kernel's path with a drive letter, ``\\server\share`` for a remote one; as it is where none is known."""
        if remote := REMOTE.match(path):
            return "\\\\" + path[remote.end() :]
        path = path.removeprefix("\\??\\")
        volume = VOLUME.match(path)
        if volume is None:
            return path
        name = volume.group().casefold()
        letter = self._known.get(name) or self._told.get(name, (0, ""))[1]
        return letter + path[volume.end() :] if letter else path

    def _links(self, process_va: int) -> list[int]:
        """The objects in the global directory of DOS devices. Raises UnreadableMemory."""
        types, space, size = self._kernel.types, self._kernel.space, self._kernel.pointer_size
        if not all(types.has(path) for path in _NEEDED):
            return []
        device_map = space.pointer(process_va + types.offset("_EPROCESS.DeviceMap")) & ~(2 * size - 1)
        if not self._kernel.is_kernel(device_map):
            return []
        directory = space.pointer(device_map + types.offset("_DEVICE_MAP.GlobalDosDevicesDirectory"))
        if not self._kernel.is_kernel(directory):
            return []
        buckets = types.field("_OBJECT_DIRECTORY.HashBuckets")
        count = min(buckets.size // size or BUCKETS, 256)
        raw = space.read(directory + buckets.offset, count * size)
        level = [int.from_bytes(raw[at : at + size], "little") for at in range(0, len(raw), size)]
        link, target = (types.offset(f"_OBJECT_DIRECTORY_ENTRY.{name}") for name in ("ChainLink", "Object"))
        found: list[int] = []
        seen: set[int] = set()
        while level and len(seen) < MAX_LINKS:
            level = [va for va in dict.fromkeys(level) if self._kernel.is_kernel(va) and va not in seen]
            seen.update(level)
            raws = space.readv([(va, max(link, target) + size) for va in level])
            level = []
            for each in raws:
                if each is not None:
                    level.append(int.from_bytes(each[link : link + size], "little"))
                    found.append(int.from_bytes(each[target : target + size], "little"))
        return [va for va in dict.fromkeys(found) if self._kernel.is_kernel(va)]
