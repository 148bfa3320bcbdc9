"""What the documents say of evidence is what the eyes tell."""

import re
from pathlib import Path

import pytest

from appliance.guest.linux import injection as linux
from appliance.guest.windows import injection as windows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("eye", [linux, windows], ids=["linux", "windows"])
def test_every_kind_of_evidence_that_an_eye_tells_is_documented(eye) -> None:
    assert eye.__doc__ is not None and eye.__file__ is not None
    promised = set(re.findall(r"[a-z][a-z-]+", eye.__doc__.split("Kinds: ")[1].split(".")[0]))
    sources = "".join(path.read_text() for path in Path(eye.__file__).parent.glob("injection*.py"))
    written = set(re.findall(r'"((?:[a-z]+-)+[a-z]+|memfd|ptrace|hollowed|gap)"', sources))
    column = 1 if eye is linux else 2
    rows = [row.split("|")[1:] for row in (ROOT / "docs" / "json.md").read_text().splitlines() if row.startswith("| `")]
    documented = {kind for row in rows if "yes" in row[column] for kind in re.findall("`([a-z-]+)`", row[0])}
    documented |= {kind for row in rows for kind in re.findall("`([a-z-]+)`", row[column])}
    assert written <= promised
    assert promised <= documented
