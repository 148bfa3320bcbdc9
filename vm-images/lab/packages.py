"""Debian packages by way of the ordinary apt client: which ones, which version, and the files themselves.

The host's own apt configuration says where packages come from; nothing here knows an archive. Sources: apt-cache(8),
apt-get(8), deb-version(7).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

APT_LISTS = Path("/var/lib/apt/lists")


class LabError(Exception):
    """Something the person in front of the machine can put right; the message says how."""


@dataclass(frozen=True, slots=True)
class Package:
    """One binary package in one version."""

    name: str
    version: str


def cache_dir() -> Path:
    """``$PARASIGHT_CACHE``, else the XDG cache, made when missing."""
    chosen = os.environ.get("PARASIGHT_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parasight"
    base.mkdir(parents=True, exist_ok=True)
    return base


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time inside; the kernel frees the lock when its holder dies (flock(2))."""
    with Path(cache_dir(), f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def resolve(roots: list[str], skip: list[str], kernel: str, choose: str) -> tuple[Package, list[Package]]:
    """The kernel package that matches and all packages the roots need, in the versions apt would install.

    Remembered as long as apt's lists stay as they are, so that a known answer costs no subprocess and no network.
    """
    question = json.dumps([Path(__file__).read_text(), roots, skip, kernel, choose, _lists_state()])
    memory = cache_dir() / f"resolved-{hashlib.sha256(question.encode()).hexdigest()[:16]}.json"
    if memory.exists():
        first, *rest = [Package(*pair) for pair in json.loads(memory.read_text())]
        return first, rest
    image = _choose_kernel(kernel, choose)
    packages = _versions(sorted(_closure(roots, set(skip))))
    answer = [[image.name, image.version], *([p.name, p.version] for p in packages)]
    partial = memory.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(answer))
    partial.rename(memory)
    return image, packages


def fetch(packages: Iterable[Package]) -> list[Path]:
    """The .deb files, downloaded where the cache has none yet."""
    debs = cache_dir() / "debs"
    debs.mkdir(exist_ok=True)
    wanted = list(packages)
    missing = [p for p in wanted if _deb(debs, p) is None]
    if missing:
        with tempfile.TemporaryDirectory(dir=debs, prefix="partial-") as partial:
            Path(partial).chmod(0o755)
            _apt("apt-get", "-qq", "download", *(f"{p.name}={p.version}" for p in missing), cwd=partial)
            for deb in Path(partial).glob("*.deb"):
                deb.rename(debs / deb.name)
    found = [_deb(debs, p) for p in wanted]
    if lost := [p.name for p, deb in zip(wanted, found, strict=True) if deb is None]:
        raise LabError(f"apt-get download left out {', '.join(lost)}; run `apt-get update` and try again")
    return [deb for deb in found if deb is not None]


def version_order(left: str, right: str) -> int:
    """-1, 0 or 1 as dpkg orders two versions (deb-version(7)); text order gets 6.1.0-9 against 6.1.0-10 wrong."""
    for relation, answer in (("lt", -1), ("gt", 1)):
        if subprocess.run(["dpkg", "--compare-versions", left, relation, right], check=False).returncode == 0:
            return answer
    return 0


def _choose_kernel(pattern: str, choose: str) -> Package:
    names = _apt("apt-cache", "pkgnames", "linux-image-").split()
    matching = [name for name in names if re.fullmatch(pattern, name)]
    if not matching:
        raise LabError(
            f"no package matches {pattern}; run `apt-get update`, and see that apt's sources are of Debian 12"
        )
    in_order = functools.cmp_to_key(version_order)
    ordered = sorted(_versions(matching), key=lambda package: in_order(package.version))
    return ordered[-1 if choose == "newest" else 0]


def _closure(roots: list[str], skip: set[str]) -> set[str]:
    """Roots and everything they need; of alternatives the first that is a real package."""
    omit = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
    needs: dict[str, list[str]] = {}
    package, answered = "", False
    for line in _apt("apt-cache", "depends", "--recurse", *omit, *roots).splitlines():
        if not line.startswith((" ", "<")):
            package, answered = line.strip(), False
            needs[package] = []
        elif (need := re.match(r"[ |]*(?:Pre)?Depends: (\S+)", line)) is not None:
            real = not need[1].startswith("<")
            if real and not answered:
                needs[package].append(need[1])
            answered = line.startswith(" |") and (real or answered)
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name not in found and name not in skip and ":" not in name:
            found.add(name)
            todo += needs.get(name, [])
    return found


def _versions(names: list[str]) -> list[Package]:
    """The candidate version of each package."""
    versions: dict[str, str] = {}
    name = ""
    for line in _apt("apt-cache", "show", "--no-all-versions", *names).splitlines():
        if line.startswith("Package: "):
            name = line[9:].strip()
        elif line.startswith("Version: "):
            versions.setdefault(name, line[9:].strip())
    return [Package(name, versions[name]) for name in names if name in versions]


def _deb(debs: Path, package: Package) -> Path | None:
    stem = f"{package.name}_{package.version.replace(':', '%3a')}"
    return next((path for arch in ("amd64", "all") if (path := debs / f"{stem}_{arch}.deb").exists()), None)


def _lists_state() -> list[tuple[str, int]]:
    try:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(APT_LISTS) if entry.is_file())
    except OSError:
        return []


def _apt(*command: str, cwd: str | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not here; guests are built on a Debian 12 host") from None
    if done.returncode != 0:
        complaint = "\n".join(line for line in done.stderr.splitlines() if line.startswith("E:"))[-800:]
        raise LabError(
            f"`{' '.join(command[:2])}` failed ({done.returncode}): {complaint or 'no message'}\n"
            "remedy: run `apt-get update`; if that fails too, look at the network and apt's sources"
        )
    return done.stdout
