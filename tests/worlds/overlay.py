"""Guest memory in which some pages are not what they are; notes what is read."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.errors import GuestError
from appliance.model import Region, VcpuState
from appliance.ports import GuestMemory

PAGE = 4096


class Overlay:
    """Another memory, with whole pages replaced by those in ``pages`` (page number to 4,096 bytes)."""

    name = "overlay"

    def __init__(self, memory: GuestMemory, *, live: bool = True) -> None:
        self._memory, self.live = memory, live
        self.pages: dict[int, bytes] = {}
        self.touched: set[int] = set()  # numbers of the pages read
        self.spans: set[tuple[int, int]] | None = None  # exact reads, while it is a set

    @property
    def regions(self) -> tuple[Region, ...]:
        return self._memory.regions

    def data_regions(self) -> tuple[Region, ...]:
        data_regions = getattr(self._memory, "data_regions", None)
        return data_regions() if data_regions else self._memory.regions

    def read(self, gpa: int, size: int) -> bytes:
        data = self._memory.read(gpa, size)
        first, last = gpa // PAGE, (gpa + max(size, 1) - 1) // PAGE
        self.touched.update(range(first, last + 1))
        if self.spans is not None:
            self.spans.add((gpa, size))
        if self.pages.keys().isdisjoint(range(first, last + 1)):
            return data
        parts = [self.pages.get(page) or self._memory.read(page * PAGE, PAGE) for page in range(first, last + 1)]
        return b"".join(parts)[gpa - first * PAGE :][:size]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for gpa, size in spans:
            try:
                found.append(self.read(gpa, size))
            except GuestError:
                found.append(None)
        return found

    def vcpus(self) -> tuple[VcpuState, ...]:
        return ()

    def check_alive(self) -> None:
        self._memory.check_alive()

    def close(self) -> None:
        self._memory.close()
