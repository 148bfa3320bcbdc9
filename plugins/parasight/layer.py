"""Guest-physical memory of a running guest, or of an image, as a Volatility 3 layer.

``vol -p plugins -f parasight:qemu:PID windows.pslist`` reads the guest that the QEMU process PID runs, while it runs;
``parasight:xen:DOMID`` a Xen domain, ``parasight:file:PATH`` an image. Only ever read: there is no way to write.

Stock Volatility opens its location through urllib, so a handler of the scheme ``parasight`` answers that, and a stacker
then puts the layer on it that knows the holes in a guest's memory. All layers of one location share one memory.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import urllib.request
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from volatility3.framework import constants, exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import intel, physical, resources

from .home import find_appliance
from .isf import BANNER, LINK_BASE

if TYPE_CHECKING:
    from appliance.ports import GuestMemory

SCHEME = "parasight"
PAGE = 4096
STEP = 4 << 20  # bytes of RAM whose pages are asked for at once
MAX_BANNER = 1024
_OPENED: dict[str, GuestMemory] = {}


def open_memory(location: str) -> GuestMemory:
    """Open what ``qemu:PID``, ``xen:DOMID`` or ``file:PATH`` names; the same object for the same location.

    Raises ParasightError, ValueError.
    """
    if location not in _OPENED:
        find_appliance()
        from appliance.memory.file import open_file  # noqa: PLC0415  the other plugins run without the appliance
        from appliance.memory.qemu import open_qemu  # noqa: PLC0415

        kind, _, name = location.partition(":")
        if kind == "qemu" and name.isdecimal():
            _OPENED[location] = open_qemu(int(name))
        elif kind == "xen" and name:
            from appliance.hosts.targets import resolve  # noqa: PLC0415
            from appliance.routes import open_memory as open_route  # noqa: PLC0415

            _OPENED[location] = open_route(resolve(location), "xen")
        elif kind == "file" and name:
            _OPENED[location] = open_file(name)
        else:
            forms = ", ".join(f"{SCHEME}:{form}" for form in ("qemu:PID", "xen:DOMID", "file:PATH"))
            raise ValueError(f"{SCHEME}:{location}: say one of {forms}")
    return _OPENED[location]


def share_memory(memory: GuestMemory) -> str:
    """Let layers read a memory that is open already; the location by which they name it."""
    location = f"here:{id(memory)}"
    _OPENED[location] = memory
    return location


class GuestLayer(interfaces.layers.DataLayerInterface):
    """RAM of a guest, by guest-physical address. What is not RAM is not valid."""

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context, config_path, name, metadata)
        self._regions = [(one.gpa, one.size) for one in self._memory.regions]
        self._starts = [start for start, _ in self._regions]

    @property
    def _memory(self) -> GuestMemory:
        """Not kept: layers are copied together with their context."""
        return open_memory(self.config["location"])

    @property
    def minimum_address(self) -> int:
        """The first byte of RAM."""
        return self._starts[0]

    @property
    def maximum_address(self) -> int:
        """The last byte of RAM."""
        start, size = self._regions[-1]
        return start + size - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Whether all of it is RAM."""
        index = bisect.bisect_right(self._starts, offset) - 1
        return index >= 0 and offset + length <= sum(self._regions[index])

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Return exactly ``length`` bytes."""
        from appliance.errors import GuestError, UnreadableMemory  # noqa: PLC0415  see open_memory

        try:
            return self._read_padded(offset, length) if pad else self._memory.read(offset, length)
        except UnreadableMemory as error:
            raise exceptions.InvalidAddressException(self.name, offset, str(error)) from None
        except GuestError as error:
            raise exceptions.LayerException(self.name, str(error)) from error

    def _read_padded(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        for start, size in self._regions:
            first, last = max(start, offset), min(start + size, offset + length)
            if first < last:
                data[first - offset : last - offset] = _read_there(self._memory, first, last)
        return bytes(data)

    def scan(
        self,
        context: interfaces.context.ContextInterface,
        scanner: interfaces.layers.ScannerInterface,
        progress_callback: constants.ProgressCallback = None,
        sections: Iterable[tuple[int, int]] | None = None,
    ) -> Iterable[Any]:
        """Scan RAM only, and what of it is there: a scan of the framework skips each chunk that has a hole."""
        found = self._find_sections() if sections is None else sections
        return super().scan(context, scanner, progress_callback, found)

    def _find_sections(self) -> list[tuple[int, int]]:
        memory = self._memory
        if not getattr(memory, "gaps", ()):
            return self._regions
        found: list[tuple[int, int]] = []
        for region in getattr(memory, "data_regions", lambda: memory.regions)():
            end = region.gpa + region.size
            for start in range(region.gpa, end, STEP):
                spans = [(at, min(PAGE, end - at)) for at in range(start, min(start + STEP, end), PAGE)]
                heads = memory.readv([(at, 1) for at, _ in spans])
                for (at, size), head in zip(spans, heads, strict=True):
                    if head is not None and found and sum(found[-1]) == at:
                        found[-1] = (found[-1][0], found[-1][1] + size)
                    elif head is not None:
                        found.append((at, size))
        return found

    def write(self, offset: int, data: bytes) -> None:
        """Abstract in the framework, so every layer must have it; ours has nothing to do there."""
        raise NotImplementedError("a guest is only ever read")

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """``location``: what `open_memory` opens."""
        what = "qemu:PID, xen:DOMID or file:PATH"
        return [requirements.StringRequirement(name="location", description=what, optional=False)]


def _read_there(memory: GuestMemory, first: int, last: int) -> bytes:
    """A run of RAM; zeros stand for pages that cannot be read."""
    from appliance.errors import UnreadableMemory  # noqa: PLC0415  see open_memory

    try:
        return memory.read(first, last - first)
    except UnreadableMemory:
        starts = [first, *range((first // PAGE + 1) * PAGE, last, PAGE)]
        spans = [(at, min(last, (at // PAGE + 1) * PAGE) - at) for at in starts]
        pieces = zip(spans, memory.readv(spans), strict=True)
        return b"".join([bytes(size) if data is None else data for (_, size), data in pieces])


class GuestStacker(interfaces.automagic.StackerLayerInterface):
    """Puts a GuestLayer on what was opened by our scheme, before anybody guesses at its content."""

    stack_order = 1

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the layer, None where the location is somebody else's."""
        layer = context.layers[layer_name]
        if not isinstance(layer, physical.FileLayer) or not layer.location.startswith(f"{SCHEME}:"):
            return None
        name = context.layers.free_layer_name("GuestLayer")
        location = interfaces.configuration.path_join(name, "location")
        context.config[location] = urllib.request.unquote(layer.location.removeprefix(f"{SCHEME}:"))
        return GuestLayer(context, name, name)


class LinuxStacker(interfaces.automagic.StackerLayerInterface):
    """Puts a Linux kernel's address space on a GuestLayer as the appliance finds it: by page tables, without a scan.

    Volatility's own search knows no five levels of page tables, and takes minutes in a large guest.
    """

    stack_order = 2
    exclusion_list = ["windows", "mac"]  # noqa: RUF012

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the layer, None where no Linux runs."""
        below = context.layers[layer_name]
        if not isinstance(below, GuestLayer):
            return None
        from appliance.errors import GuestError  # noqa: PLC0415  see open_memory
        from appliance.guest.attach import attach  # noqa: PLC0415

        memory = open_memory(below.config["location"])
        vcpus = memory.vcpus()
        try:
            kernel = attach(memory, cr3=vcpus[0].cr3 if vcpus else None)
            banner = kernel.read_text(kernel.symbols.get(BANNER), MAX_BANNER) + b"\0"
        except GuestError:
            return None
        name = context.layers.free_layer_name("IntelLayer")
        path = interfaces.configuration.path_join("IntelHelper", name)
        for key, value in (
            ("memory_layer", layer_name),
            ("page_map_offset", kernel.root),
            ("kernel_banner", banner.decode("latin-1")),  # by which the symbol file is found
        ):
            context.config[interfaces.configuration.path_join(path, key)] = value
        kind = Linux57 if kernel.la57 else intel.LinuxIntel32e
        layer = kind(context, path, name, metadata={"os": "Linux"})
        layer.config["kernel_virtual_offset"] = kernel.image.va - LINK_BASE
        return layer


class GuestHandler(resources.VolatilityHandler):
    """Opens ``parasight:`` locations for urllib. Nothing of them is copied into Volatility's cache."""

    @classmethod
    def non_cached_schemes(cls) -> list[str]:
        """Ours."""
        return [SCHEME]

    def parasight_open(self, request: urllib.request.Request) -> io.RawIOBase:
        """Answer urllib, which looks for this method by its name."""
        location = urllib.request.unquote(request.full_url.removeprefix(f"{SCHEME}:"))
        try:
            return _GuestFile(open_memory(location))
        except ImportError as error:
            raise urllib.error.URLError(f"parasight is not installed beside this volatility3: {error}") from error
        except Exception as error:  # of any kind: urllib's callers know only its own
            raise urllib.error.URLError(f"{SCHEME}:{location}: {error}") from error


class _GuestFile(io.RawIOBase):
    """Guest-physical memory as a file; what is not RAM, or cannot be read, is zeros."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory, self._at = memory, 0
        last = memory.regions[-1]
        self._size = last.gpa + last.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = max(0, min(self._size - self._at, size if size >= 0 else self._size))
        data = bytearray(size)
        for region in self._memory.regions:
            first, last = max(region.gpa, self._at), min(region.gpa + region.size, self._at + size)
            if first < last:
                with contextlib.suppress(Exception):  # it is gone: a hole like others
                    data[first - self._at : last - self._at] = _read_there(self._memory, first, last)
        self._at += size
        return bytes(data)


class Linux57(intel.LinuxIntel32e):
    """Five levels of page tables (LA57), which Volatility's own layers do not know."""

    _maxvirtaddr = 57
    _structure = [("page map layer 5", 9, False), *intel.LinuxIntel32e._structure]  # noqa: RUF012


class Windows57(intel.WindowsIntel32e):
    """Five levels of page tables (LA57), which Volatility's own layers do not know."""

    _maxvirtaddr = 57
    _structure = [("page map layer 5", 9, False), *intel.WindowsIntel32e._structure]  # noqa: RUF012
