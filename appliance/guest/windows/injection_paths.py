r"""Paths of mapped images: which name the same file, which lie in odd places, and what makes machine code by trade.

Everything here comes from the guest and is attacker input; a runtime's name only ever lowers a weight. The kernel
writes ``\Device\HarddiskVolume3\Windows\...``, the loader ``C:\Windows\...``: volumes are set apart first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

_START = re.compile(r"^\\(\?\?|\\\?|\\\.|dosdevices|global\?\?)\\(?P<unc>unc\\)?")
_VOLUME = re.compile(r"^([a-z]:|\\device\\(?!mup|lanmanredirector|webdavredirector)[^\\]+(?=\\))")
_REMOTE = re.compile(r"^\\device\\(mup|lanmanredirector|webdavredirector)(\\;[^\\]+)*\\|^\\\\")
_SHORT = re.compile(r"~\d")  # PROGRA~1: a name of 8.3

# Folders that anybody may write to, below a volume
_SHARED: Final = re.compile(
    r"\\(users\\(public|default)|windows\\(temp|tasks|tracing|debug|system32\\(tasks|spool\\drivers\\color))|temp|tmp|"
    r"perflogs|\$recycle\.bin|recycler?|system volume information|"
    r"documents and settings\\all users\\(documents|application data)(?=\\[^\\]*$))\\"
)
_PROGRAM_DATA: Final = re.compile(r"\\programdata\\[^\\]+$")
_TEMPORARY: Final = re.compile(r"\\(appdata\\local(low)?|local settings)\\temp(orary internet files)?\\|\\inetcache\\")
_DOWNLOADS: Final = re.compile(r"^\\users\\[^\\]+\\(downloads|desktop)\\|^\\documents and settings\\[^\\]+\\desktop\\")
_HOME: Final = re.compile(r"^\\(users|documents and settings)\\")
_RESOURCES: Final = re.compile(r"\.(mui|mun|winmd|nls|tlb)$|\\apisetschema\.dll$")  # the last one: Windows 7
_NATIVE: Final = re.compile(r"\\assembly\\(nativeimages|gac)|\.ni\.(dll|exe)$")

# What makes machine code at run time, by the name of an image that the process maps
RUNTIMES: Final = (
    (re.compile(r"(core)?clr\.dll$|clrjit\.dll$|mscor(wks|svr|jit)\.dll$|mono(-[\w.-]+)?\.dll$"), ".NET"),
    (re.compile(r"jvm\.dll$|j9jit\d*\.dll$"), "the Java virtual machine"),
    (re.compile(r"(node|chrome|msedge|msedgewebview2|brave|opera|vivaldi|electron|deno)\.(exe|dll)$"), "V8"),
    (re.compile(r"(libnode|libcef|v8|node)\.dll$"), "V8"),
    (re.compile(r"chakra(core)?\.dll$|jscript9\w*\.dll$"), "Chakra"),
    (re.compile(r"xul\.dll$|mozjs[\w.-]*\.dll$"), "SpiderMonkey"),
    (re.compile(r"javascriptcore\.dll$|bun\.exe$|webkit2?\.dll$"), "JavaScriptCore"),
    (re.compile(r"d3d10warp\.dll$"), "Windows' software renderer"),
    (
        re.compile(r"(nvoglv|nvwgf2um|nvd3dum|ati(o6a|og|dxx)|amdxc|amdxx|ig\w*icd|igd\w*umd)\w*\.dll$"),
        "its graphics driver",
    ),
    (re.compile(r"vbe\d\.dll$|msvbvm\d\d\.dll$"), "Visual Basic"),
    (re.compile(r"libffi[\w.-]*\.dll$"), "libffi"),
    (re.compile(r"mpengine\.dll$"), "Microsoft Defender"),
    (re.compile(r"lua(jit|51)\.dll$"), "LuaJIT"),
    (re.compile(r"php_opcache\.dll$|php\d+(ts)?\.dll$"), "PHP"),
    (re.compile(r"libpypy[\w.-]*\.dll$|pypy[\w.]*\.exe$"), "PyPy"),
    (re.compile(r"libllvm[\w.-]*\.dll$|llvmlite\.dll$|libjulia[\w.-]*\.dll$"), "LLVM"),
    (re.compile(r"qt[56]qml\.dll$|qt[56]script\.dll$"), "Qt's JavaScript"),
    (re.compile(r"qemu-system-\w+\.exe$|libtcg\w*\.dll$|xtajit\w*\.dll$|wow64cpu_emu\.dll$"), "its emulator"),
    (re.compile(r"beam\.smp\.dll$|erl(srv)?\.exe$"), "Erlang"),
)

SANDBOXED: Final = ("V8", "SpiderMonkey")  # runtimes of browsers, which sandbox their processes

# Images that write to their own code, and why
SELF_PATCHING: Final = ((re.compile(r"(core)?clr\.dll$|mscor(wks|svr)\.dll$"), "as .NET does with its write barriers"),)


class Place(NamedTuple):
    """A path taken apart, lower case. ``rest`` begins with a backslash."""

    volume: str  # "c:", "\\device\\harddiskvolume3", "unc" for another machine's, "" where none is told
    rest: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.rest.rsplit("\\", 1)[-1]

    @property
    def folder(self) -> str:
        """The folder, with a backslash at the end."""
        return self.rest[: len(self.rest) - len(self.name)]


def parse_place(path: str) -> Place:
    """Take a path apart, in any of the notations in which Windows writes one."""
    text = path.lower().replace("/", "\\")
    start = _START.match(text)
    if start is not None:
        if start["unc"]:
            return Place("unc", "\\" + text[start.end() :])
        text = text[start.end() :]
    if text.startswith("\\systemroot\\"):
        return Place("", "\\windows" + text[11:])
    remote = _REMOTE.match(text)
    if remote is not None:
        return Place("unc", "\\" + text[remote.end() :])
    volume = _VOLUME.match(text)
    if volume is not None:
        text = text[volume.end() :]
        if text.startswith("\\\\"):
            return Place("unc", text[1:])
        return Place(volume[0], text if text.startswith("\\") else "\\" + text)
    return Place("", text if text.startswith("\\") else "\\" + text)


def compare(kernel: Place, other: Place) -> str:
    """How two notations of one file differ: ``same``, ``folder`` or ``name``.

    Short names and the folders that WOW64 redirects (Sysnative, SysWOW64, System32) are taken for the same.
    """
    if not _same_name(kernel.name, other.name):
        return "name"
    if kernel.rest == other.rest or "unc" in (kernel.volume, other.volume) or _SHORT.search(other.rest):
        return "same"
    return "same" if _native(kernel.folder) == _native(other.folder) else "folder"


def odd_place(place: Place, program: Place, *, system: bool) -> tuple[int, str] | None:
    """How unusual it is for code to lie there, and why; None where it belongs.

    ``system``: the process runs as one of the system's own accounts, which load nothing from where users write.
    """
    more = 2 if system else 1
    if ":" in place.rest:
        return 2, "an alternate data stream"
    if place.volume == "unc":
        return more, "another machine's share"
    if _SHARED.search(place.rest) or _PROGRAM_DATA.search(place.rest):
        return more, "where anybody may put files"
    if _TEMPORARY.search(place.rest):
        return more, "a folder for temporary files"
    near = bool(program.rest.strip("\\")) and place.folder.startswith(program.folder)
    if _DOWNLOADS.match(place.rest) and not (near and place != program):
        return more, "where users put what they download"
    if system and _HOME.match(place.rest):
        return 2, "a user's own folder, in a process of the system"
    return None


def find_runtime(names: Collection[str]) -> str | None:
    """The runtime among a process's mapped images (names without folders) that legitimately makes code."""
    return next((runtime for pattern, runtime in RUNTIMES if any(pattern.match(name) for name in names)), None)


def patches_itself(name: str) -> str | None:
    """Why an image writes to its own code, by the file's name in lower case; None where it should not."""
    return next((why for pattern, why in SELF_PATCHING if pattern.match(name)), None)


def is_resource(place: Place) -> bool:
    """Whether a file is one that Windows maps as an image for its resources or metadata, past the loader's lists."""
    return _RESOURCES.search(place.rest) is not None


def is_native_image(place: Place) -> bool:
    """Whether a file is .NET's precompiled code or an assembly, which the runtime maps past the loader's lists."""
    return _NATIVE.search(place.rest) is not None


def _same_name(kernel: str, other: str) -> bool:
    if kernel == other:
        return True
    short = re.fullmatch(r"([^~.]{1,6})~\d+(\.\w{0,3})?", other)
    return short is not None and kernel.replace(" ", "").startswith(short[1])


def _native(folder: str) -> str:
    return re.sub(r"^\\windows\\(sysnative|syswow64|system32)\\", r"\\windows\\system32\\", folder)
