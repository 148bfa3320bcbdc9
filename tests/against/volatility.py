"""Volatility 3 on a live guest, in this process, as the appliance's worker runs it, but on all processes."""

import json
from pathlib import Path
from typing import Any

from appliance.guest.kernel import Kernel
from plugins.parasight.layer import share_memory
from plugins.parasight.session import open_linux

PLUGINS = {"pslist": "linux.pslist", "sockstat": "linux.sockstat", "malfind": "linux.malware.malfind"}


class Volatility:
    """Volatility with one guest's memory and symbols loaded."""

    def __init__(self, kernel: Kernel, isf: Path) -> None:
        self._session = open_linux(kernel, share_memory(kernel.memory), isf)

    def run(self, plugin: str, **options: Any) -> list[dict[str, Any]]:
        """The rows of a plugin, by column."""
        return self._session.run(PLUGINS[plugin], **options)


def write_isf(document: dict[str, Any], path: Path) -> Path:
    """Write the symbol file where Volatility can open it."""
    path.write_text(json.dumps(document, separators=(",", ":")))
    return path
