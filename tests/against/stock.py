"""Stock `vol` as a person runs it, offline, with our plugins or without."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where jsonschema is installed, Volatility checks symbol tables against its schema first: minutes for a whole kernel's.
SCRIPT = """import sys
sys.modules["jsonschema"] = None
sys.argv[0] = "vol"
from volatility3.cli import main
main()"""


def vol(location: Path | str, symbols: Path, plugin: str, *words: str, ours: bool = True) -> list[dict]:
    """Rows of a plugin; ``symbols`` keeps Volatility's index of all its tables, too."""
    command = [sys.executable, "-P", "-c", SCRIPT, "-q", "--offline", "-r", "json", "-s", str(symbols)]
    command += ["-p", str(ROOT / "plugins")] if ours else []
    done = subprocess.run(
        [*command, "-f", str(location), plugin, *words],
        env={"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(symbols / ".cache")},
        cwd=symbols,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
