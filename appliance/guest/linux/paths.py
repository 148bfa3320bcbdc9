"""Names of files and control groups, walked as the kernel itself prints them.

``prepend_path`` (fs/d_path.c) for files: up the dentries, and over each mount point to the mount beneath it.
``kernfs_path`` (fs/kernfs/dir.c) for control groups. Every walk is bounded; names are attacker input.
"""

from __future__ import annotations

from typing import NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.kernel import Kernel
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.record import is_object
from appliance.model import Missing

NAME_MAX = 255  # include/uapi/linux/limits.h
MAX_DEPTH = 256  # components; PATH_MAX (4096) allows more only for names of a few bytes
MAX_PATH = 4096


class Path(NamedTuple):
    """A file's path; ``deleted`` means that it has no name any more (d_unlinked, or a file that never had one)."""

    text: str
    deleted: bool


def text_of(raw: bytes) -> str:
    """Guest bytes as text: what is no UTF-8 stays readable as escapes."""
    return raw.decode("utf-8", "backslashreplace")


class Paths:
    """Resolves names in one guest."""

    def __init__(self, kernel: Kernel, facts: Facts) -> None:
        self._kernel = kernel
        self._file = facts.record("file.path")
        self._dentry = facts.record("dentry")
        self._mount = facts.record("mount")
        self._mnt = facts.offset("mount.mnt")
        self._kernfs = facts.record("kernfs_node")
        self._kn = facts.find("cgroup.kn")

    def of_file(self, file: int) -> Path | Missing:
        """Path of an open ``struct file``."""
        try:
            mnt, dentry = self._file.parse(self._kernel.read(*self._file.span(file)))
            return self._walk(dentry, mnt - self._mnt)
        except UnreadableMemory:
            return Missing.UNREADABLE

    def _walk(self, dentry: int, mount: int) -> Path | Missing:
        names: list[str] = []
        deleted = False
        first = True
        for _ in range(MAX_DEPTH):
            if not (is_object(dentry) and is_object(mount)):
                return Missing.IMPLAUSIBLE
            above, point, root = self._mount.parse(self._kernel.read(*self._mount.span(mount)))
            while dentry != root:
                parent, size, name, hashed, _ = self._dentry.parse(self._kernel.read(*self._dentry.span(dentry)))
                if parent == dentry:  # the root of no mount: a file without a name, such as a memfd
                    deleted = deleted or first
                    names.append(self._name(name, size))
                    return _joined(names, deleted)
                if first and not hashed:  # d_unlinked: d_hash.pprev is NULL
                    deleted = True
                first = False
                names.append(self._name(name, size))
                if len(names) > MAX_DEPTH or not is_object(parent):
                    return Missing.IMPLAUSIBLE
                dentry = parent
            if above == mount:
                return _joined(names, deleted)
            dentry, mount = point, above
        return Missing.IMPLAUSIBLE

    def _name(self, va: int, size: int) -> str:
        return text_of(self._kernel.read(va, min(size, NAME_MAX))) if size and va else ""

    def of_cgroup(self, cgroup: int) -> str | Missing:
        """Path of a control group in its hierarchy, as /proc/PID/cgroup prints it."""
        if self._kn is None:
            return Missing.UNKNOWN
        names: list[str] = []
        try:
            node = self._kernel.u64(cgroup + self._kn)
            for _ in range(MAX_DEPTH):
                if not is_object(node):
                    return Missing.IMPLAUSIBLE
                parent, name = self._kernfs.parse(self._kernel.read(*self._kernfs.span(node)))
                if not parent:
                    return "/" + "/".join(reversed(names))
                names.append(text_of(self._kernel.read_text(name, NAME_MAX)))
                node = parent
        except UnreadableMemory:
            return Missing.UNREADABLE
        return Missing.IMPLAUSIBLE


def _joined(names: list[str], deleted: bool) -> Path:
    return Path(("/" + "/".join(reversed(names)))[:MAX_PATH], deleted)
