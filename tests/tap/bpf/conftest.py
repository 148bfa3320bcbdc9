"""What the tests of the tap in the kernel share."""

import pytest

from tests.tap.bpf.lan import make_lan


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    """Taps of tests keep their notes to themselves; children inherit the folder."""
    monkeypatch.setenv("PARASIGHT_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def lan():
    with make_lan("kh") as made:
        yield made
