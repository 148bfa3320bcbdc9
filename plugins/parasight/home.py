"""Where the appliance is: installed beside Volatility, or in the tree that this folder is part of.

Its rooms `memory` and `guest` need nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_TREE = Path(__file__).resolve().parents[2]


def find_appliance() -> None:
    """Make ``import appliance`` work. Raises ImportError where there is none."""
    if importlib.util.find_spec("appliance") is not None:
        return
    if not (_TREE / "appliance" / "errors.py").exists():
        raise ImportError(f"parasight is neither installed here nor in {_TREE}")
    sys.path.append(str(_TREE))
