"""Where a running appliance can be reached: one folder, one socket."""

from __future__ import annotations

import os
from pathlib import Path


def run_dir() -> Path:
    """``$PARASIGHT_RUN_DIR``, else ``/run/parasight``."""
    return Path(os.environ.get("PARASIGHT_RUN_DIR") or "/run/parasight")


def control_path() -> Path:
    """The control socket."""
    return run_dir() / "control.sock"
