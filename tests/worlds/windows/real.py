"""Symbol tables of real Windows builds: PARASIGHT_SYMBOLS names their folder.

They are Microsoft's and no part of the project, so what needs them is skipped where there are none.
"""

import os
from pathlib import Path

import pytest

_named = [Path(text) for text in os.environ.get("PARASIGHT_SYMBOLS", "").split(os.pathsep) if text]
REAL = next((folder for folder in _named if (folder / "windows").is_dir()), Path("/nowhere"))
needs_real = pytest.mark.skipif(
    not (REAL / "windows").is_dir(), reason="no symbol tables of real Windows builds: PARASIGHT_SYMBOLS names none"
)


def real_symbols() -> Path:
    """The folder with the tables; without it the test is skipped."""
    if not (REAL / "windows").is_dir():
        # Microsoft's symbols are not ours to carry: used where a folder of them lies beside the checkout.
        pytest.skip("no symbol tables of real Windows builds: PARASIGHT_SYMBOLS names none")
    return REAL
