"""A bootable guest from a recipe: kernel, and a root file system that lives in the initramfs.

The initramfs is two archives in a row, which the kernel unpacks one after the other (the kernel's documentation:
driver-api/early-userspace/buffer-format.rst): a small plain one with this kernel's modules, and the lz4 one with the
root, shared by all guests.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.packages import LabError, cache_dir, fetch, locked, resolve

IMAGES = Path(__file__).resolve().parent.parent
COMMON = IMAGES / "common"
LIBRARY = ["-shared", "-fPIC", "-pthread"]
# The rest of a kernel package is hardware.
MODULE_FOLDERS = r"(?:drivers/(?:virtio|char|net|net/xen-netback|xen|xen/xenfs)/|net/(?:[^/]+/)*)"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Image:
    """A guest ready to boot. `release` is the kernel's own name, as `uname -r` prints it."""

    name: str
    kernel: Path
    initramfs: Path
    release: str


def names() -> list[str]:
    """All guests that have a recipe."""
    return sorted(recipe.parent.name for recipe in IMAGES.glob("*/recipe.toml") if recipe.parent != COMMON)


def build(name: str, progress: Progress = lambda message: None) -> Image:
    """The image of `vm-images/<name>/recipe.toml`; built when anything that goes into it has changed.

    Raises LabError when there is no such recipe, or apt or a tool fails.
    """
    recipe = _recipe(name)
    kernel, packages = resolve(recipe["packages"], recipe["skip"], recipe["kernel"], recipe["choose"])
    root_key = key([[p.name, p.version] for p in packages], recipe["prune"], _sources())
    home = cache_dir() / "images" / f"{name}-{key(root_key, kernel.name, kernel.version, recipe['modules'])}"
    if not home.exists():
        with locked(f"image-{name}"):
            if not home.exists():
                progress(f"fetching packages for {name}")
                kernel_deb, *debs = fetch([kernel, *packages])
                root = _root_archive(root_key, debs, recipe["prune"], progress)
                progress(f"unpacking {kernel.name}")
                _assemble(home, kernel_deb, root, recipe["modules"])
    release = (home / "release").read_text().strip()
    return Image(name, home / "vmlinuz", home / "initramfs", release)


def _recipe(name: str) -> dict[str, Any]:
    path = IMAGES / name / "recipe.toml"
    if name == COMMON.name or not path.exists():
        raise LabError(f"no guest {name!r}; there are: {', '.join(names())}")
    recipe = tomllib.loads((COMMON / "recipe.toml").read_text())
    for key, value in tomllib.loads(path.read_text()).items():
        recipe[key] = recipe[key] + value if isinstance(recipe.get(key), list) else value
    return recipe


def _sources() -> list[list[str]]:
    """Every file of ours that ends up in a guest or decides how it is made, with its digest."""
    files = [path for path in COMMON.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files.append(Path(__file__))
    return [[str(path.relative_to(IMAGES)), digest(path)] for path in sorted(files)]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key(*parts: object) -> str:
    """A short name for exactly these parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _assemble(home: Path, kernel: Path, root: Path, modules: list[str]) -> None:
    home.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f"{home.name}.") as work:
        image, tree = Path(work, "image"), Path(work, "tree")
        image.mkdir()
        release = unpack_kernel(kernel, image / "vmlinuz", tree, modules)
        (image / "release").write_text(release + "\n")
        (image / "initramfs").write_bytes(cpio(tree) + root.read_bytes())
        image.rename(home)


def _root_archive(root_key: str, debs: list[Path], prune: list[str], progress: Progress) -> Path:
    """The root file system all guests with these packages share, as an lz4 cpio archive."""
    archive = cache_dir() / f"root-{root_key}.cpio.lz4"
    with locked("root"):
        if archive.exists():
            return archive
        progress("making the root file system")
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="root-") as work:
            tree = Path(work, "tree")
            tree.mkdir()
            for deb in debs:
                tool("dpkg-deb", "-x", str(deb), str(tree))
            _furnish(tree, prune)
            plain, partial = Path(work, "cpio"), Path(work, "lz4")
            plain.write_bytes(cpio(tree))
            tool("lz4", "-q", "-l", "-9", str(plain), str(partial))  # -l: the only lz4 frame the kernel reads
            partial.rename(archive)
    return archive


def _furnish(tree: Path, prune: list[str]) -> None:
    """Make one /usr, drop what nobody reads, add our own files, compile Python once instead of at every boot."""
    merge_usr(tree)
    for path in prune:
        shutil.rmtree(tree / path, ignore_errors=True)
    for name in ("proc", "sys", "dev", "run", "tmp", "root", "var/lib/nginx", "var/log/nginx", "opt", "usr/local/bin"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    (tree / "tmp").chmod(0o1777)
    tool("cp", "-a", "--no-preserve=ownership", f"{COMMON / 'rootfs'}/.", str(tree))
    shutil.copytree(COMMON / "workloads", tree / "opt/workloads", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(COMMON / "truth.py", tree / "opt/lab/truth.py")
    shutil.copytree(COMMON / "parasite", tree / "opt/parasite")
    _compile(tree)
    (tree / "usr/bin/python3").unlink(missing_ok=True)
    (tree / "usr/bin/python3").symlink_to("python3.11")
    for applet in subprocess.check_output(["chroot", str(tree), "/bin/busybox", "--list"], text=True).split():
        if not any(os.path.lexists(tree / "usr" / place / applet) for place in ("bin", "sbin")):
            (tree / "usr/bin" / applet).symlink_to("busybox")
    (tree / "init").symlink_to("usr/bin/busybox")
    compiler = "import compileall; compileall.compile_dir('/usr/lib/python3.11', quiet=2, invalidation_mode="
    mode = "compileall.py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    tool("chroot", str(tree), "/usr/bin/python3.11", "-c", compiler + mode)


def merge_usr(tree: Path) -> None:
    """Move what packages put beside /usr into it, and leave links, as Debian has it since 12."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        if (tree / name).is_dir():
            tool("cp", "-a", f"{tree / name}/.", str(tree / "usr" / name))
            shutil.rmtree(tree / name)
        (tree / name).symlink_to(f"usr/{name}")


def _compile(tree: Path) -> None:
    """The guest's C programs, made with the host's compiler: the host is the same Debian, so libc fits."""
    tool("gcc", "-O2", "-o", str(tree / "usr/local/bin/updater"), str(COMMON / "programs/updater.c"))
    for source, target, options in (("inject.c", "inject", []), ("parasite.c", "libparasite.so", LIBRARY)):
        place = tree / "opt/parasite"
        tool("gcc", "-O2", *options, "-o", str(place / target), str(place / source))


def unpack_kernel(deb: Path, vmlinuz: Path, tree: Path, wanted: list[str]) -> str:
    """Write the kernel and the wanted modules; return its release."""
    modules: dict[str, bytes] = {}
    release = ""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as members,
    ):
        for member in members:
            if found := re.fullmatch(r"\./boot/vmlinuz-(.+)", member.name):
                release = found[1]
                vmlinuz.write_bytes(_content(members, member))
            elif found := re.fullmatch(r".*/kernel/" + MODULE_FOLDERS + r"([^/]+)\.ko(\.xz)?", member.name):
                content = _content(members, member)
                modules[found[1].replace("-", "_")] = lzma.decompress(content) if found[2] else content
    if not release:
        raise LabError(f"{deb.name} holds no kernel; is it a package of the form linux-image-*?")
    place = tree / "lib-modules"
    place.mkdir(parents=True)
    for number, name in enumerate(_in_load_order(modules, wanted)):
        (place / f"{number:02d}-{name}.ko").write_bytes(modules[name])
    return release


def _content(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = members.extractfile(member)
    return stream.read() if stream else b""


def _in_load_order(modules: dict[str, bytes], wanted: list[str]) -> list[str]:
    """Dependencies first, as each module's own .modinfo names them; what is not a module is built in."""
    order: list[str] = []

    def add(name: str) -> None:
        if name not in modules or name in order:
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", b"\0" + modules[name])
        for need in (depends[1].decode() if depends else "").split(","):
            add(need.replace("-", "_"))
        order.append(name)

    for name in wanted:
        add(name)
    return order


def cpio(tree: Path) -> bytes:
    """The tree as a cpio archive in the form the kernel unpacks, everything owned by root."""
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    listing = "\0".join([".", *paths]).encode()
    command = ["cpio", "--quiet", "--null", "-o", "-H", "newc", "--owner=0:0"]
    try:
        return subprocess.run(command, cwd=tree, input=listing, stdout=subprocess.PIPE, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(f"cpio failed ({error}); remedy: apt-get install cpio") from None


def tool(*command: str) -> None:
    """Run a program of the host; LabError says what it complained about."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise LabError(f"{command[0]} is missing; remedy: apt-get install {command[0]}") from None
    except subprocess.CalledProcessError as error:
        raise LabError(f"`{' '.join(command)[:200]}` failed: {error.stderr[-800:]}") from None
