"""Which Debian packages a guest is made of."""

import subprocess

import pytest

from lab import packages
from lab.packages import LabError, version_order


@pytest.mark.parametrize(
    ("older", "newer"),
    [("6.1.0-9", "6.1.0-10"), ("6.12.9-1", "6.12.117-1~deb12u1"), ("6.12.1-1~deb12u1", "6.12.1-1"), ("9.0", "1:1.0")],
)
def test_versions_are_ordered_as_dpkg_orders_them(older: str, newer: str) -> None:
    assert version_order(older, newer) == -1
    assert version_order(newer, older) == 1
    assert version_order(newer, newer) == 0


def test_alternatives_give_the_first_and_virtual_packages_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = (
        "a\n |Depends: b\n  Depends: c\n |Depends: <v>\n  Depends: d\n    x\n  PreDepends: e\nb\n  Depends: a\nd\ne\n"
    )
    monkeypatch.setattr(packages, "_apt", lambda *command, cwd=None: answer)
    assert packages._closure(["a"], {"e"}) == {"a", "b", "d"}


def test_a_failing_apt_is_told_with_its_own_words_and_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 100, "", "W: odd\nE: Unable to fetch some archives\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(LabError, match=r"(?s)Unable to fetch some archives.*remedy: run `apt-get update`"):
        packages._apt("apt-get", "download", "nothing")
