"""Symbol tables of real Windows builds, which are not part of the project: PARASIGHT_SYMBOLS names their folder."""

import os
from pathlib import Path

import pytest

_named = [Path(text) for text in os.environ.get("PARASIGHT_SYMBOLS", "").split(os.pathsep) if text]
REAL = next((folder for folder in _named if (folder / "windows").is_dir()), Path("/nowhere"))
needs_real = pytest.mark.skipif(
    not (REAL / "windows").is_dir(), reason="no symbol tables of real Windows builds: PARASIGHT_SYMBOLS names none"
)
