"""A Xen host to boot: hypervisor, dom0's kernel and root, and the domain that runs on it.

Both roots are the lab's own (`lab.image`) with an archive behind them, which the kernel unpacks over the first: Xen's
packages, the Python packages that the appliance needs, the files of `vm-images/xen`. Archives in lz4's old format may
follow each other, and nothing else may follow them (the kernel's lib/decompress_unlz4.c).
"""

from __future__ import annotations

import compileall
import gzip
import os
import py_compile
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lab.image import IMAGES, Image, Progress, build, cpio, digest, key, merge_usr, tool, unpack_kernel
from lab.packages import LabError, Package, cache_dir, fetch, locked, resolve

XEN = IMAGES / "xen"
CHECKOUT = IMAGES.parent
HYPERVISOR = "boot/xen-*-amd64.gz"
UNUSED = shutil.ignore_patterns("__pycache__", "*.pyi", "tests", "*.a", "*.dist-info")


@dataclass(frozen=True, slots=True)
class XenImage:
    """What QEMU and dom0 need. `guest` is the domain's image; `guest_more` is laid over its root."""

    hypervisor: Path
    dom0: Image
    dom0_more: Path
    guest: Image
    guest_more: Path


def build_xen(progress: Progress = lambda message: None) -> XenImage:
    """The Xen host of `vm-images/xen`; built when anything that goes into it has changed. LabError like `build`."""
    recipe = tomllib.loads((XEN / "dom0.toml").read_text())
    dom0, guest = build(recipe["base"], progress), build(recipe["guest"], progress)
    kernel, packages = resolve(recipe["packages"], recipe["skip"], recipe["kernel"], recipe["choose"])
    parts = [[p.name, p.version] for p in (kernel, *packages)]
    name = key(parts, _sources(), [[d.name, d.version] for d in needed_distributions()], sys.version_info[:2])
    home = cache_dir() / "images" / f"xen-{name}"
    if not home.exists():
        with locked("image-xen"):
            if not home.exists():
                progress("fetching and unpacking Xen")
                _assemble(home, recipe, kernel, packages)
    return XenImage(home / "xen", dom0, home / "dom0.lz4", guest, home / "guest.lz4")


def checkout_archive(archive: Path, image: XenImage) -> None:
    """Write an archive that dom0's root is continued with: the appliance and its rules as they are now, the domain."""
    with tempfile.TemporaryDirectory(prefix="parasight-checkout-") as work:
        tree = Path(work, "tree")
        place = tree / "opt/parasight"
        for name in ("appliance", "rules", "plugins"):
            shutil.copytree(CHECKOUT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        _compile(tree)
        for name in ("lab", "domain"):
            (tree / "opt" / name).mkdir()
        shutil.copy(IMAGES / "lab/world.py", tree / "opt/lab/world.py")
        shutil.copy(image.guest.kernel, tree / "opt/domain/vmlinuz")
        (tree / "opt/domain/initramfs").write_bytes(image.guest.initramfs.read_bytes() + image.guest_more.read_bytes())
        _pack(tree, archive, "-1")


def needed_distributions() -> list[metadata.Distribution]:
    """What the appliance needs of Python's packages, LibVMI's binding with it, as its own metadata names it."""
    found: dict[str, metadata.Distribution] = {}

    def add(name: str, extras: set[str]) -> None:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LabError(f"the Python package {name} is missing; remedy: ./run setup") from None
        for requirement in map(Requirement, distribution.requires or ()):
            wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras | {""})
            if wanted and requirement.name.lower() not in found:
                found[requirement.name.lower()] = metadata.distribution(requirement.name)
                add(requirement.name, requirement.extras)

    add("parasight", {"libvmi"})
    return [found[name] for name in sorted(found)]


def _sources() -> list[list[str]]:
    files = [path for path in XEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [[str(path.relative_to(IMAGES)), digest(path)] for path in sorted([*files, Path(__file__)])]


def _assemble(home: Path, recipe: dict[str, Any], kernel: Package, packages: list[Package]) -> None:
    kernel_deb, *debs = fetch([kernel, *packages])
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as work:
        image, scrap, dom0, guest = (Path(work, name) for name in ("image", "scrap", "dom0", "guest"))
        for folder in (image, scrap, guest):
            folder.mkdir()
        for deb in debs:
            tool("dpkg-deb", "-x", str(deb), str(dom0))
        (image / "xen").write_bytes(gzip.decompress(next(dom0.glob(HYPERVISOR)).read_bytes()))
        _furnish(dom0, recipe["prune"])
        unpack_kernel(kernel_deb, scrap / "vmlinuz", scrap, recipe["modules"])
        _add_modules(scrap / "lib-modules", dom0 / "lib-modules")
        tool("cp", "-a", "--no-preserve=ownership", f"{XEN / 'domu'}/.", str(guest))
        _pack(dom0, image / "dom0.lz4", "-9")
        _pack(guest, image / "guest.lz4", "-9")
        image.rename(home)


def _add_modules(source: Path, target: Path) -> None:
    """Behind those of the base image, which are numbered; one that is there already is refused by the kernel."""
    target.mkdir(parents=True)
    for module in sorted(source.iterdir()):
        module.rename(target / f"x{module.name}")


def _furnish(tree: Path, prune: list[str]) -> None:
    """Xen's packages, the Python packages, our files; nothing at the place of a link of the base image."""
    merge_usr(tree)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).unlink()
    for path in prune:
        shutil.rmtree(tree / path, ignore_errors=True)
    for name in ("usr/bin/sh", "usr/bin/busybox", "etc/passwd", "etc/group"):
        (tree / name).unlink(missing_ok=True)
    site = tree / "opt/site"
    site.mkdir(parents=True)
    for distribution in needed_distributions():
        _copy(distribution, site)
    _compile(tree)
    tool("cp", "-a", "--no-preserve=ownership", f"{XEN / 'dom0'}/.", str(tree))


def _copy(distribution: metadata.Distribution, site: Path) -> None:
    home = Path(str(distribution.locate_file("")))
    tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    for top in sorted(tops):
        if (home / top).is_dir():
            shutil.copytree(home / top, site / top, ignore=None if top.endswith(".dist-info") else UNUSED)
        elif (home / top).exists():
            shutil.copy(home / top, site / top)


def _compile(tree: Path) -> None:
    """Ahead of time, since an emulated machine is slow at it; times are not checked: an archive may lose them."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for place in (tree / "opt").iterdir():
        compileall.compile_dir(
            place, quiet=2, invalidation_mode=mode, stripdir=str(tree), workers=min(2, os.cpu_count() or 1)
        )


def _pack(tree: Path, archive: Path, level: str) -> None:
    plain = archive.with_suffix(".cpio")
    plain.write_bytes(cpio(tree))
    tool("lz4", "-q", "-f", "-l", level, str(plain), str(archive))
    plain.unlink()
