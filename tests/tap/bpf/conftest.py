"""Taps of tests keep their notes to themselves; children inherit the folder."""

import pytest


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"
