"""Stock Volatility 3 on a Windows image, unmodified and offline, many plugins in one child process.

The child has a cache of its own beside the symbol tables: Volatility keeps one index of all symbol files it ever saw,
and pays for it again when the folder changes. Layers and symbols are found by its ordinary automagic.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


class Refused(Exception):
    """A plugin that ended with an error; the text is Volatility's."""


class Answers:
    """What the plugins said, by their name without ``windows.``."""

    def __init__(self, said: dict[str, Any]) -> None:
        self._said = said

    def __getitem__(self, plugin: str) -> Rows:
        rows = self._said[plugin]
        if isinstance(rows, str):
            raise Refused(f"{plugin}: {rows}")
        return rows

    def error(self, plugin: str) -> str | None:
        """Its error, where it ended with one."""
        rows = self._said[plugin]
        return rows if isinstance(rows, str) else None


def ask(
    image: Path, symbols: Path, plugins: Sequence[str] | Mapping[str, Mapping[str, Any]], timeout_s: float = 120
) -> Answers:
    """Run plugins (by name, with options where given) on an image; ``symbols`` contains ``windows/``."""
    wanted = {name: {} for name in plugins} if not isinstance(plugins, Mapping) else dict(plugins)
    environment = os.environ | {"XDG_CACHE_HOME": str(symbols / ".cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.against.windows_oracle", str(image), str(symbols), json.dumps(wanted)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise Refused(done.stderr[-2000:])
    return Answers(json.loads(done.stdout))


def _main(image: str, folder: str, wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    # Volatility checks symbol tables against its schema where that library is there: 20 s for a real kernel's.
    sys.modules["jsonschema"] = None  # type: ignore[assignment]
    import volatility3.plugins
    import volatility3.symbols
    from volatility3 import framework
    from volatility3.framework import automagic, constants, contexts, plugins
    from volatility3.framework.interfaces.plugins import FileHandlerInterface

    constants.OFFLINE = True
    constants.PARALLELISM = constants.Parallelism.Off
    constants.SYMBOL_BASEPATHS.insert(0, folder)
    volatility3.symbols.__path__ = constants.SYMBOL_BASEPATHS
    framework.import_files(volatility3.plugins, True)
    known = framework.list_plugins()
    context = contexts.Context()
    available = automagic.available(context)
    context.config["automagic.LayerStacker.single_location"] = Path(image).absolute().as_uri()
    said: dict[str, Any] = {}
    for name, options in wanted.items():
        plugin = next(plugin for full, plugin in known.items() if full.rsplit(".", 1)[0] == f"windows.{name}")
        for key, value in options.items():
            context.config[f"plugins.{plugin.__name__}.{key}"] = value
        try:
            chosen = automagic.choose_automagic(available, plugin)
            made = plugins.construct_plugin(context, chosen, plugin, "plugins", None, FileHandlerInterface)
            grid = made.run()
            rows: Rows = []
            grid.populate(lambda node, _, rows=rows, grid=grid: rows.append(_row(grid, node)), None)
            said[name] = rows
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def _row(grid: Any, node: Any) -> dict[str, Any]:
    return {column.name: _plain(value) for column, value in zip(grid.columns, node.values, strict=True)}


def _plain(value: Any) -> Any:
    from volatility3.framework.interfaces.renderers import BaseAbsentValue

    if isinstance(value, BaseAbsentValue):
        return None
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    return str(value)


if __name__ == "__main__":
    json.dump(_main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])), sys.stdout)
