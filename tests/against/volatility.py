"""Volatility 3 on a live guest, in this process: a data layer over GuestMemory, the kernel's own types and symbols.

No automagic, hence no scanning: the page-table root and the KASLR shift are known. Its LinuxIntel32e cannot page with
five levels, so the guest must run without LA57.
"""

import bisect
import json
from pathlib import Path
from typing import Any

import volatility3.framework.symbols.linux.extensions.network  # noqa: F401  its parent uses it without importing it
from volatility3.framework import contexts, interfaces
from volatility3.framework.exceptions import InvalidAddressException
from volatility3.framework.layers import intel
from volatility3.framework.renderers import TreeGrid
from volatility3.framework.symbols.linux import LinuxKernelIntermedSymbols
from volatility3.plugins.linux import pslist, sockstat
from volatility3.plugins.linux.malware import malfind

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.ports import GuestMemory
from tests.against.isf import LINK_BASE

PLUGINS = {"pslist": pslist.PsList, "sockstat": sockstat.Sockstat, "malfind": malfind.Malfind}


class GuestLayer(interfaces.layers.DataLayerInterface):
    """Guest-physical memory as Volatility wants it."""

    def __init__(self, context, config_path, name, memory: GuestMemory):
        super().__init__(context, config_path, name)
        self._memory = memory
        self._starts = [region.gpa for region in memory.regions]

    @property
    def minimum_address(self) -> int:
        return 0

    @property
    def maximum_address(self) -> int:
        last = self._memory.regions[-1]
        return last.gpa + last.size - 1

    def is_valid(self, offset: int, length: int = 1) -> bool:
        index = bisect.bisect_right(self._starts, offset) - 1
        if index < 0:
            return False
        region = self._memory.regions[index]
        return offset + length <= region.gpa + region.size

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        try:
            return self._memory.read(offset, length)
        except UnreadableMemory:
            if pad:
                return bytes(length)
            raise InvalidAddressException(self.name, offset, "not RAM") from None

    def write(self, offset: int, data: bytes) -> None:
        """Abstract in volatility3, so every layer must have it; ours has nothing to do there."""
        raise NotImplementedError("a guest is only ever read")

    @classmethod
    def get_requirements(cls):
        return []


class Volatility:
    """Volatility with one guest's memory and symbols loaded."""

    def __init__(self, kernel: Kernel, isf: Path) -> None:
        assert not kernel.la57, "Volatility has no five-level paging"
        self._context = context = contexts.Context()
        shift = kernel.image.va - LINK_BASE
        context.add_layer(GuestLayer(context, "memory", "memory", kernel.memory))
        context.config["primary.memory_layer"] = "memory"
        context.config["primary.page_map_offset"] = kernel.root
        context.config["primary.kernel_virtual_offset"] = shift
        context.add_layer(intel.LinuxIntel32e(context, "primary", "primary", metadata={"os": "Linux"}))
        table = LinuxKernelIntermedSymbols(context, "symbols", name="symbols", isf_url=isf.as_uri(), validate=False)
        context.symbol_space.append(table)
        contexts.Module.create(context, "kernel", "primary", shift, symbol_table_name="symbols")

    def run(self, plugin: str, **options: Any) -> list[dict[str, Any]]:
        """The rows of a plugin, by column."""
        context = self._context
        context.config["run.kernel"] = "kernel"
        for name, value in options.items():
            context.config[f"run.{name}"] = value
        for requirement in PLUGINS[plugin].get_requirements():
            key = f"run.{requirement.name}"
            if requirement.default is not None and key not in context.config:
                context.config[key] = requirement.default
        grid: TreeGrid = PLUGINS[plugin](context, "run").run()
        rows: list[dict[str, Any]] = []
        grid.populate(lambda node, _: rows.append(_row(grid, node)), None)
        return rows


def _row(grid: TreeGrid, node: Any) -> dict[str, Any]:
    return {column.name: value for column, value in zip(grid.columns, node.values, strict=True)}


def write_isf(document: dict[str, Any], path: Path) -> Path:
    """Write the symbol file where Volatility can open it."""
    path.write_text(json.dumps(document, separators=(",", ":")))
    return path
