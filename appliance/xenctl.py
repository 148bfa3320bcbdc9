"""The few scalar calls of libxenctrl that are needed, and how the libraries of a Xen host are found.

libxenctrl belongs to one release of Xen each, so it is looked up by the release that runs. Of its structures only the
beginning of ``xc_domaininfo_t`` is read, in releases where that is known, and what it names is checked against what was
asked for. Used by the rooms that look at Xen.
Sources: tools/include/xenctrl.h, xentoollog.h, xen/include/public/domctl.h (struct xen_domctl_getdomaininfo, the same
up to ``handle`` from interface version 0x10 on, Xen 4.11), sched.h (SHUTDOWN_*), xen/arch/x86/mm/p2m-pod.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from uuid import UUID

from appliance.errors import HostError, PermissionRefused

KNOWN_RELEASES: Final = range(11, 21)  # Xen 4.N whose xc_domaininfo_t begins as `_INFO` does
HYPERVISOR: Final = Path("/sys/hypervisor")
_FOLDERS: Final = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/xen-4.*/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/usr/local/lib64",
)
_CONTROL: Final = re.compile(r"libxenctrl\.so\.4\.(\d+)")
# domid, flags, tot_pages, max_pages, six words that are not needed, max_vcpu_id, handle.
_INFO: Final = struct.Struct("<H2xIQQ44xI4x16s")
_INFO_ROOM: Final = 1024  # bytes for one entry, whatever follows the handle
_DYING, _HVM, _SHUTDOWN, _PAUSED, _REASON_AT = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 16
CPU_CONTEXT: Final = 2  # HVM_SAVE_CODE(CPU), xen/include/public/arch-x86/hvm/save.h
CPU_CONTEXT_SIZE: Final = 1032  # struct hvm_hw_cpu
PAGE_KIB: Final = 4
_NONE_ON_DEMAND: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESRCH})


@dataclass(frozen=True, slots=True)
class Domain:
    """What Xen itself says of a domain."""

    domid: int
    uuid: str
    hvm: bool  # HVM or PVH: its frames are guest-physical ones
    paused: bool  # by control software
    dying: bool
    shutdown: int | None  # why its kernel stopped: 0 power-off, 1 reboot, 2 suspend, 3 crash, 4 watchdog; None: it runs
    pages: int  # that it has
    max_pages: int  # that it may have
    vcpus: int  # upper bound


class Control:
    """An open handle on the hypervisor. One instance belongs to one thread."""

    def __init__(self, folder: Path | None = None) -> None:
        """``folder``: where the libraries are, instead of the usual places. Raises HostError, PermissionRefused."""
        self.release, self._library = _load_control(folder)
        self._opened = self._library.xc_interface_open(quiet_logger(), quiet_logger(), 0)
        if not self._opened:
            raise explain(ctypes.get_errno(), "the hypervisor cannot be asked")

    def read_domain(self, domid: int) -> Domain | None:
        """Describe one domain; None when there is none. Raises HostError where this release's layout is not known."""
        if self.release not in KNOWN_RELEASES:
            raise HostError(
                f"Xen 4.{self.release} is newer or older than this version knows; known are 4.{KNOWN_RELEASES.start} "
                f"to 4.{KNOWN_RELEASES.stop - 1}"
            )
        room = ctypes.create_string_buffer(_INFO_ROOM)
        count = self._library.xc_domain_getinfolist(self._handle, domid, 1, room)
        if count < 0:
            raise explain(ctypes.get_errno(), "Xen's domains cannot be listed")
        number, flags, pages, max_pages, last_vcpu, handle = _INFO.unpack_from(room)
        if not count or number != domid:
            return None
        return Domain(
            domid,
            str(UUID(bytes=handle)),
            hvm=bool(flags & _HVM),
            paused=bool(flags & _PAUSED),
            dying=bool(flags & _DYING),
            shutdown=flags >> _REASON_AT & 0xFF if flags & _SHUTDOWN else None,
            pages=pages,
            max_pages=max_pages,
            vcpus=(last_vcpu + 1) & 0xFFFFFFFF,
        )

    def read_last_frame(self, domid: int) -> int | None:
        """The highest guest frame that is used for anything, RAM or not; None when Xen does not say."""
        frame = ctypes.c_uint64()
        failed = self._library.xc_domain_maximum_gpfn(self._handle, domid, ctypes.byref(frame))
        return None if failed else frame.value

    def read_cpu(self, domid: int, vcpu: int) -> bytes | int:
        """``struct hvm_hw_cpu`` of one virtual CPU, or the errno.

        Xen holds that virtual CPU still while it copies the registers, some microseconds.
        """
        room = ctypes.create_string_buffer(CPU_CONTEXT_SIZE)
        if self._library.xc_domain_hvm_getcontext_partial(
            self._handle, domid, CPU_CONTEXT, vcpu, room, CPU_CONTEXT_SIZE
        ):
            return ctypes.get_errno() or errno.EIO
        return room.raw

    def read_on_demand(self, domid: int) -> tuple[int, int]:
        """Frames that are populated only when touched, and how many pages lie ready for them.

        More of the first than of the second: touching frames, from outside too, may make Xen crash the domain. Where
        Xen knows of no such thing, or of no such domain, there are none. Raises HostError: it is not told.
        """
        total, ready, frames = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
        failed = self._library.xc_domain_get_pod_target(
            self._handle, domid, ctypes.byref(total), ctypes.byref(ready), ctypes.byref(frames)
        )
        if failed and (code := ctypes.get_errno()) not in _NONE_ON_DEMAND:
            raise explain(code, f"whether memory of domain {domid} is populated on demand may not be asked")
        return (0, 0) if failed else (frames.value, ready.value)

    def write_max_pages(self, domid: int, pages: int) -> None:
        """Set what a domain may have, to put back what somebody else changed. Raises HostError."""
        if self._library.xc_domain_setmaxmem(self._handle, domid, pages * PAGE_KIB):
            raise explain(ctypes.get_errno(), f"the memory limit of domain {domid} cannot be set to {pages} pages")

    def close(self) -> None:
        """Give the handle back; may be called twice."""
        if self._opened:
            self._library.xc_interface_close(self._opened)
            self._opened = None

    @property
    def _handle(self) -> int:
        """What every call wants first; without one the library would take the process with it."""
        if not self._opened:
            raise HostError("the handle on the hypervisor is closed")
        return int(self._opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_max_pages(domid: int, folder: Path | None = None) -> int:
    """How many pages a domain may have. Raises HostError: no such domain, or a release that is not known."""
    with Control(folder) as control:
        domain = control.read_domain(domid)
    if domain is None:
        raise HostError(f"there is no Xen domain {domid}")
    return domain.max_pages


def write_max_pages(domid: int, pages: int, folder: Path | None = None) -> None:
    """Put back how many pages a domain may have. Raises HostError."""
    with Control(folder) as control:
        control.write_max_pages(domid, pages)


def is_control_domain() -> bool:
    """Whether we run in the domain that may look at the others (dom0)."""
    try:
        if "control_d" in Path("/proc/xen/capabilities").read_text("ascii", "replace"):
            return True
    except OSError:
        pass  # xenfs is not mounted
    try:
        features = int((HYPERVISOR / "properties/features").read_text("ascii"), 16)
    except (OSError, ValueError):
        return False
    return bool(features >> 11 & 1)  # XENFEAT_dom0, xen/include/public/features.h


def read_release() -> int | None:
    """N of the Xen 4.N that runs; None where none does."""
    try:
        return int((HYPERVISOR / "version/minor").read_text("ascii"))
    except (OSError, ValueError):
        return None


def load_library(name: str, package: str, folder: Path | None = None) -> ctypes.CDLL:
    """Load a library by its exact name. Raises HostError with the package to install."""
    paths = [str(folder / name)] if folder else [name, *(str(path) for path in _find(name))]
    for path in paths:
        try:
            return ctypes.CDLL(path, use_errno=True)
        except OSError:
            continue
    raise HostError(f"{name} is not installed; on Debian: apt-get install {package}")


def explain(code: int, what: str) -> HostError:
    """The error for an errno of Xen's libraries, with what mends it."""
    reason = f"{what}: {os.strerror(code)}"
    if code in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
        if HYPERVISOR.joinpath("type").exists():
            return HostError(f"{reason}; run: modprobe xen-privcmd; or: mount -t xenfs xenfs /proc/xen")
        return HostError(f"{reason}; this host does not run on Xen")
    if code in {errno.EPERM, errno.EACCES}:
        return PermissionRefused(f"{reason}; {_who_refuses()}")
    return HostError(f"{reason}; see: xl dmesg")


def quiet_logger() -> ctypes.c_void_p:
    """A ``struct xentoollog_logger`` that says nothing: without one the libraries print to our standard error."""
    return ctypes.cast(ctypes.byref(_QUIET), ctypes.c_void_p)


def _who_refuses() -> str:
    try:
        lockdown = re.search(r"\[(\w+)\]", Path("/sys/kernel/security/lockdown").read_text("ascii"))
    except OSError:
        lockdown = None
    if os.geteuid() != 0:
        return "run as root"
    if lockdown and lockdown[1] != "none":
        return f"the kernel is locked down ({lockdown[1]}): boot without lockdown=, or without Secure Boot"
    return "a policy of Xen (XSM) or a release of the library that does not fit refuses it; see: xl dmesg"


def _load_control(folder: Path | None) -> tuple[int, ctypes.CDLL]:
    running = read_release()
    found = {int(match[1]): path for path in _find("libxenctrl.so.4.*", folder) if (match := _match(path))}
    wanted = running if running is not None else max(found, default=None)
    if folder is not None and found:
        wanted = max(found)
    path = str(found[wanted]) if wanted in found else f"libxenctrl.so.4.{wanted}"
    try:
        library = ctypes.CDLL(path, use_errno=True)
    except OSError:
        package = f"libxenmisc4.{wanted}" if wanted is not None else "libxenmisc4.*"
        others = ", ".join(f"4.{number}" for number in sorted(found)) or "none"
        raise HostError(
            f"libxenctrl of the running Xen is not installed (there is: {others}); on Debian: apt-get install {package}"
        ) from None
    _declare(library)
    return wanted or 0, library


def _match(path: Path) -> re.Match[str] | None:
    return _CONTROL.fullmatch(path.name)


def _find(pattern: str, folder: Path | None = None) -> Iterator[Path]:
    for place in (str(folder),) if folder else _FOLDERS:
        yield from sorted(Path("/").glob(f"{place.lstrip('/')}/{pattern}"))


def _declare(library: ctypes.CDLL) -> None:
    """Result and argument types, so that no pointer is cut to 32 bits."""
    pointer, u16, u32 = ctypes.c_void_p, ctypes.c_uint16, ctypes.c_uint32
    library.xc_interface_open.restype = pointer
    library.xc_interface_open.argtypes = [pointer, pointer, ctypes.c_uint]
    library.xc_interface_close.argtypes = [pointer]
    library.xc_domain_getinfolist.argtypes = [pointer, u32, ctypes.c_uint, pointer]
    library.xc_domain_maximum_gpfn.argtypes = [pointer, u32, pointer]
    library.xc_domain_hvm_getcontext_partial.argtypes = [pointer, u32, u16, u16, pointer, u32]
    library.xc_domain_get_pod_target.argtypes = [pointer, u32, pointer, pointer, pointer]
    library.xc_domain_setmaxmem.argtypes = [pointer, u32, ctypes.c_uint64]


class _Logger(ctypes.Structure):
    """Three functions: vmessage, progress, destroy."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("vmessage", "progress", "destroy")]


# getpid(2) takes nothing, changes nothing, not even errno: on x86-64 it can stand for any function that may do nothing.
_NOTHING: Final = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
_QUIET: Final = _Logger(_NOTHING, _NOTHING, _NOTHING)
