"""Volatility 3 on one guest, in this process: no automagic, hence no scanning, and every plugin sees one process only.

Where the kernel lies, its page-table root and its layouts are known from attaching as the appliance does. The symbols
are read once. Between two questions everything that was remembered of the guest's memory is dropped: it may run.

A plugin is restricted by what it is given: the framework's list of processes, for as long as one question takes, is the
one process asked about. So plugins without ``--pid`` are restricted too, and a process that hides from the kernel's
list can be asked about like any other.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import volatility3.framework.symbols.linux.extensions.network
import volatility3.symbols
from volatility3.framework import constants, contexts, interfaces, renderers
from volatility3.framework.layers import intel
from volatility3.framework.renderers import format_hints
from volatility3.framework.symbols import intermed
from volatility3.framework.symbols.linux import LinuxKernelIntermedSymbols
from volatility3.framework.symbols.windows import WindowsKernelIntermedSymbols

from .btf import Btf
from .isf import BANNER, LINK_BASE, make_isf
from .layer import MAX_BANNER, GuestLayer, Linux57, Windows57, open_memory
from .symbols import read_symbols

if TYPE_CHECKING:
    from appliance.guest.kernel import Kernel
    from appliance.guest.windows.kernel import WindowsKernel

Row = dict[str, Any]
MAX_TEXT = 512  # characters of one value
MAX_BYTES = 64  # bytes of one value
_PLUGIN = re.compile(r"(windows|linux)(\.[a-z_0-9]{1,64}){1,4}")
_WINDOWS_LAYERS = {
    "LEGACY": intel.WindowsIntel,
    "PAE": intel.WindowsIntelPAE,
    "LONG4": intel.WindowsIntel32e,
    "LONG5": Windows57,
}


class Gone(Exception):
    """The process asked about is not there."""


class Session:
    """Volatility with one guest's memory and symbols loaded."""

    def __init__(self, context: interfaces.context.ContextInterface, os: str) -> None:
        self.context, self.os = context, os
        self._layers = set(context.layers)
        self._tables = set(context.symbol_space)
        self._caches: list[Any] = []

    def forget(self) -> None:
        """Drop what is remembered of the guest's memory, page tables and layers of processes, and what plugins left."""
        if not self._caches:
            kind = functools._lru_cache_wrapper
            self._caches = [one for one in gc.get_objects() if isinstance(one, kind)]
        for cache in self._caches:
            if (getattr(cache, "__module__", None) or "").startswith("volatility3."):
                cache.cache_clear()
        for name in set(self.context.layers) - self._layers:
            self.context.layers.del_layer(name)
        for name in set(self.context.symbol_space) - self._tables:
            self.context.symbol_space.remove(name)

    def run(self, plugin: str, *, at: int | None = None, limit: int = 1 << 20, **options: Any) -> list[Row]:
        """The rows of a plugin, by column; ``at``: only for the process that lies there."""
        made = _find_plugin(plugin)
        path = f"run.{plugin.replace('.', '_')}"
        self.context.config[f"{path}.kernel"] = "kernel"
        for name, value in options.items():
            self.context.config[f"{path}.{name}"] = value
        for requirement in made.get_requirements():
            key = f"{path}.{requirement.name}"
            if requirement.default is not None and key not in self.context.config:
                self.context.config[key] = requirement.default
        rows: list[Row] = []
        with self._only(at):
            grid = made(self.context, path).run()
            names = [column.name for column in grid.columns]

            def take(node: Any, _: None) -> None:
                if len(rows) < limit:
                    rows.append(dict(zip(names, node.values, strict=True)))

            grid.populate(take, None)
        return rows

    def process(self, at: int) -> Any:
        """The process object at an address of the kernel."""
        kind = "_EPROCESS" if self.os == "windows" else "task_struct"
        return self.context.modules["kernel"].object(object_type=kind, offset=at, absolute=True)

    def pid(self, at: int) -> int:
        """The pid of the process there. Raises LayerException where nothing is."""
        found = self.process(at)
        return int(found.UniqueProcessId if self.os == "windows" else found.tgid)

    @contextmanager
    def _only(self, at: int | None) -> Iterator[None]:
        """Within this, the framework lists that one process."""
        if at is None:
            yield
            return
        module = importlib.import_module(f"volatility3.plugins.{self.os}.pslist")
        name = "list_processes" if self.os == "windows" else "list_tasks"
        before = module.PsList.__dict__[name]
        setattr(module.PsList, name, staticmethod(lambda *_, **__: iter([self.process(at)])))
        try:
            yield
        finally:
            setattr(module.PsList, name, before)


def plain(value: Any) -> Any:
    """A value of a row as JSON has it, bounded. The text in it is the guest's."""
    if value is None or isinstance(value, interfaces.renderers.BaseAbsentValue | renderers.Disassembly):
        return None
    if isinstance(value, renderers.LayerData):
        size = min(value.length, MAX_BYTES)
        return value.context.layers[value.layer_name].read(value.offset, size, pad=True).hex()
    if isinstance(value, bool | int | float):
        return bool(value) if isinstance(value, bool) else float(value) if isinstance(value, float) else int(value)
    if isinstance(value, format_hints.HexBytes | bytes):
        return bytes(value[:MAX_BYTES]).hex()
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)[:MAX_TEXT]


def open_linux(kernel: Kernel, location: str, isf: Path) -> Session:
    """Load a Linux guest; ``isf`` was made for its kernel by `write_linux_isf`."""
    shift = kernel.image.va - LINK_BASE
    layer = Linux57 if kernel.la57 else intel.LinuxIntel32e
    context = _context(location, layer, kernel.root, shift, "Linux")
    context.symbol_space.append(
        LinuxKernelIntermedSymbols(context, "symbols", name="symbols", isf_url=isf.as_uri(), validate=False)
    )
    contexts.Module.create(context, "kernel", "primary", shift, symbol_table_name="symbols")
    return Session(context, "linux")


def open_windows(kernel: WindowsKernel, location: str) -> Session:
    """Load a Windows guest; its symbol table must lie in one of Volatility's symbol directories."""
    pdb = kernel.pdb
    url = find_symbols(pdb.name, pdb.guid, pdb.age)
    if url is None:
        raise LookupError(f"no symbol table windows/{pdb.name}/{pdb.guid}-{pdb.age} in the symbol directories")
    context = _context(location, _WINDOWS_LAYERS[kernel.space.mode.name], kernel.space.root, kernel.base, "Windows")
    context.symbol_space.append(
        WindowsKernelIntermedSymbols(context, "symbols", name="symbols", isf_url=url, validate=False)
    )
    contexts.Module.create(context, "kernel", "primary", kernel.base, symbol_table_name="symbols")
    return Session(context, "windows")


def add_symbol_dirs(folders: Sequence[Path]) -> None:
    """Search these for symbol tables first, as ``vol -s`` does; the folder ``windows`` itself will do, too."""
    found = [folder.absolute() for folder in folders]  # Volatility looks for no others
    places = [str(folder.parent if folder.name == "windows" else folder) for folder in found]
    volatility3.symbols.__path__ = [*places, *constants.SYMBOL_BASEPATHS]


def find_symbols(pdb: str, guid: str, age: int) -> str | None:
    """The URL of a Windows symbol table, from the directories that Volatility searches."""
    urls = intermed.IntermediateSymbolTable.file_symbol_url(f"windows/{pdb}", f"{guid.upper()}-{age}")
    return next(iter(urls), None)


def write_linux_isf(kernel: Kernel, folder: Path) -> Path:
    """Make the symbol file of a kernel from its own type information and symbols, unless it is there already.

    ``folder`` is then one that ``vol -s`` takes. The file is named by what it is made of, not only by the build id that
    the guest tells: a guest cannot spoil the symbols of another one.
    """
    path = folder / "linux" / f"{kernel.build_id or 'unknown'}-{_fingerprint(kernel)}.json"
    if path.exists():
        path.touch()
        return path
    symbols = read_symbols(kernel)
    banner = kernel.read_text(symbols[BANNER], MAX_BANNER) + b"\0" if BANNER in symbols else b""
    document = make_isf(Btf(kernel.types.blob), symbols, kernel.image.va, banner)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="new-", suffix=".part", delete=False) as file:
        json.dump(document, file, separators=(",", ":"))
    return Path(file.name).rename(path)


def _fingerprint(kernel: Kernel) -> str:
    tables = kernel.symbols.tables
    digest = hashlib.sha256(str((tables.base - kernel.image.va, tables.count, tables.signed)).encode())
    for part in (kernel.types.blob, tables.names, b"\0".join(tables.tokens), tables.offsets.tobytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _context(location: str, layer: type[intel.Intel], root: int, kernel: int, os: str) -> Any:
    open_memory(location)
    context = contexts.Context()
    context.config["memory.location"] = location
    context.add_layer(GuestLayer(context, "memory", "memory"))
    context.config["primary.memory_layer"] = "memory"
    context.config["primary.page_map_offset"] = root
    context.config["primary.kernel_virtual_offset"] = kernel
    context.add_layer(layer(context, "primary", "primary", metadata={"os": os}))
    return context


def _find_plugin(name: str) -> type[interfaces.plugins.PluginInterface]:
    """``windows.malware.malfind``: the plugin in the module of that name. Raises LookupError."""
    if _PLUGIN.fullmatch(name) is None:
        raise LookupError(f"{name!r} is no name of a plugin")
    try:
        module = importlib.import_module(f"volatility3.plugins.{name}")
    except ImportError as error:
        raise LookupError(f"this Volatility has no plugin {name}: {error}") from error
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, interfaces.plugins.PluginInterface)
            and value.__module__ == module.__name__
        ):
            return value
    raise LookupError(f"there is no plugin in {name}")
