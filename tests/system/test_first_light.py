"""The main job, end to end, as a newcomer runs it."""

import os
import subprocess
import sys

import pytest

from tests.worlds.command import ROOT

pytestmark = pytest.mark.system


@pytest.mark.parametrize("options", [(), ("--enforce",)], ids=["monitor", "enforce"])
def test_the_demo_names_the_parasite_and_flags_nothing_honest(options):
    command = [sys.executable, "-m", "lab.demo", *options]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'vm-images'}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PARASITE" in done.stdout
