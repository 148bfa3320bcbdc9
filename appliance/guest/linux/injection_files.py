"""The files a process has mapped: path, place, whether they still have a name; and the runtimes that make code.

Everything here comes from the guest: paths are attacker input, and a runtime's name only ever lowers a weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from appliance.guest.budget import Budget
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_facts import S_IFMT, S_IFREG, InjectionFacts
from appliance.guest.linux.paths import Path, Paths
from appliance.guest.linux.record import is_object
from appliance.model import Missing

TEMPORARY: Final = ("/tmp/", "/var/tmp/", "/dev/shm/", "/run/shm/", "/run/user/", "/dev/mqueue/")  # noqa: S108
USUAL: Final = ("/usr/", "/lib/", "/lib32/", "/lib64/", "/libx32/", "/bin/", "/sbin/", "/opt/")  # hier(7)
USUAL_ELSEWHERE: Final = ("/nix/store/", "/gnu/store/", "/snap/", "/app/", "/home/linuxbrew/")  # package managers
# Folders of the guest in which many programs live: no home of one program alone, hier(7)
SHARED_HOMES: Final = tuple(f"/{home}/" for home in ("usr", "usr/local", "opt", "home", "root"))
PROGRAM_FOLDERS: Final = ("bin", "sbin", "libexec")
MEMORY_FILES: Final = ("/memfd:", "/secretmem")  # memfd_create(2), memfd_secret(2)
SHARED_MEMORY: Final = re.compile(r"/(dev/zero|SYSV[0-9a-f]{8})$")  # mm/shmem.c, ipc/shm.c: anonymous, but shared

# What makes machine code at run time, by the name of the program or of a library it maps
RUNTIMES: Final = (
    (re.compile(r"libjvm\.so"), "the Java virtual machine"),
    (re.compile(r"(node|nodejs|deno|electron|chrome|chromium|msedge|brave)$|libnode\.so|libv8[\w.-]*\.so"), "V8"),
    (re.compile(r"lib(coreclr|clrjit|monosgen-[\d.]+)\.so|mono(-sgen)?$"), ".NET"),
    (re.compile(r"libmozjs-?\w*\.so|libxul\.so"), "SpiderMonkey"),
    (re.compile(r"libjavascriptcoregtk|bun$"), "JavaScriptCore"),
    (re.compile(r"libluajit|luajit"), "LuaJIT"),
    (re.compile(r"opcache\.so$"), "PHP's opcache"),
    (re.compile(r"libpypy"), "PyPy"),
    (re.compile(r"libruby|ruby[\d.]*$"), "Ruby"),
    (re.compile(r"beam\.smp$"), "Erlang"),
    (re.compile(r"libjulia"), "Julia"),
    (re.compile(r"libLLVM|llvmjit\.so|libllvmlite"), "LLVM"),
    (re.compile(r"libgccjit|libguile-[3-9]|sbcl$|racket"), "its language's compiler"),
    (re.compile(r"libQt[56]Qml|libQt[56]Script"), "Qt's JavaScript"),
    (re.compile(r"qemu-[\w-]+$|libtcg"), "QEMU"),
    (re.compile(r"wine(64)?(-preloader)?$|memcheck-\w+-linux$"), "its emulator"),
)
REGEX_COMPILER: Final = re.compile(r"libpcre2?-?\w*\.so")  # its JIT allocates executable memory, but in one shape only


class MappedFile(NamedTuple):
    """A mapped file."""

    path: str
    unnamed: bool  # it has no name any more, or never had one
    links: int  # i_nlink
    regular: bool
    inode: int
    mapping: int  # struct address_space
    pseudo: bool  # it never had a name: memfd, shared anonymous memory

    @property
    def deleted(self) -> bool:
        """It had a name and has none any more."""
        return not self.pseudo and (self.unnamed or self.links == 0)

    @property
    def in_memory(self) -> bool:
        """A memfd or one of its relatives."""
        return self.pseudo and self.path.startswith(MEMORY_FILES)

    @property
    def anonymous(self) -> bool:
        """Shared anonymous memory has a file in the kernel, and none for anybody else."""
        return self.pseudo and SHARED_MEMORY.fullmatch(self.path) is not None

    @property
    def shown(self) -> str:
        """The path as maps shows it."""
        return self.path + " (deleted)" * self.unnamed


class Files:
    """Looks up mapped files of one guest."""

    def __init__(self, kernel: Kernel, facts: InjectionFacts, paths: Paths) -> None:
        self._kernel, self._facts, self._paths = kernel, facts, paths
        self._parent = facts.offset("dentry.d_parent")

    def look(self, files: Iterable[int], budget: Budget) -> dict[int, MappedFile]:
        """By address of ``struct file``; one whose file cannot be read has the path ``?``."""
        wanted = [va for va in dict.fromkeys(files) if is_object(va)]
        parsed = [self._facts.parse("file", raw) if raw else (0, 0, 0) for raw in self._read("file", wanted)]
        inodes = self._read("inode", [fields[0] for fields in parsed])
        parents = self._kernel.readv([(dentry + self._parent, 8) for _, _, dentry in parsed])
        found = {}
        for va, (inode, mapping, dentry), raw, parent in zip(wanted, parsed, inodes, parents, strict=True):
            mode, links = self._facts.parse("inode", raw) if raw else (0, 1)
            path = Missing.UNKNOWN if budget.over else self._paths.of_file(va)
            text, unnamed = path if isinstance(path, Path) else ("?", False)
            rootless = parent is not None and int.from_bytes(parent, "little") == dentry
            regular = mode & S_IFMT == S_IFREG
            found[va] = MappedFile(text, unnamed, links, regular, inode, mapping, rootless and unnamed)
        if budget.over:
            budget.cut_off(f"names of some of {len(wanted)} mapped files")
        return found

    def _read(self, record: str, addresses: list[int]) -> list[bytes | None]:
        spans = [self._facts.record(record).span(va) if is_object(va) else (0, 1) for va in addresses]
        raws = self._kernel.readv(spans)
        return [raw if is_object(va) else None for va, raw in zip(addresses, raws, strict=True)]


def odd_place(path: str, program: str) -> tuple[int, str] | None:
    """How unusual it is for code to lie there, and why; None where it belongs."""
    home = _home(program)
    near = path == program or (home is not None and path.startswith(home))
    hidden = any(part.startswith(".") for part in path.split("/")[1:])
    usual = path.startswith(USUAL + USUAL_ELSEWHERE)
    if path.startswith(TEMPORARY):
        return (1 if near else 2), "where anybody may put files"
    if hidden:
        return (2 if usual and not near else 1), "a hidden place"
    if usual or near or not path.startswith("/"):
        return None
    return 1, "outside the library directories and not with the program"


def find_runtime(names: Collection[str]) -> str | None:
    """The runtime among a process's mapped files (without folders) that legitimately makes code."""
    return next((runtime for pattern, runtime in RUNTIMES if any(pattern.match(name) for name in names)), None)


def has_regex_compiler(names: Iterable[str]) -> bool:
    """Whether PCRE is mapped."""
    return any(REGEX_COMPILER.match(name) for name in names)


def _home(program: str) -> str | None:
    """The folder a program shares with its own libraries, with a slash; None where everybody's programs lie."""
    parts = program.split("/")[:-1]
    if parts and parts[-1] in PROGRAM_FOLDERS:
        parts.pop()
    home = "/".join(parts) + "/"
    return None if len(parts) < 2 or home in TEMPORARY + SHARED_HOMES else home
