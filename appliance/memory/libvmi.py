"""Guest RAM through LibVMI: one more way, never taken unless it is named. The only file that knows its binding.

What we use of it is physical reads (``partial=True``): translation and all that follows is ours. Its page cache is
emptied before each call, since it keeps the pages of a file for ever, of a live guest's RAM file too, and behind it,
since it keeps those of a domain mapped; only whole pages that are known to be RAM are asked for, and it is opened for
what was found before: it crashes on a missing file.

On Xen it is not passive: attaching lifts the domain's memory limit, detaching leaves a wrong one, and a failed attach
sets dom0's to nothing. So it needs ``change_domain``, the domain is looked up first, and the limits of both are kept
around each of these steps, also where this process ends meanwhile. A handle that is open at the end of the process is
not detached: the limits are right, and somebody may be reading by it. On KVM it needs a patched kernel or QEMU.
Sources: LibVMI 0.14 libvmi/driver/xen/xen.c (xen_init_vmi, xen_destroy: xc_domain_setmaxmem),
driver/memory_cache.c (memory_cache_set, memory_cache_flush), driver/file/file.c; its Python binding's libvmi.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import importlib.util
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

from appliance.errors import ConfigError, GuestGone, HostError, UnreadableMemory, UsageError
from appliance.memory.batches import Ram
from appliance.memory.file import open_file
from appliance.memory.printed import caught
from appliance.memory.xen import open_xen
from appliance.memory.xenlimits import MemoryLimits
from appliance.model import Availability, Region, VcpuState
from appliance.xenctl import is_control_domain

PAGE = 4096
MAX_VCPUS = 128
_INSTALL: Final = "pip install 'parasight[libvmi]' (its wheels end at Python 3.11)"
_XENSTORE: Final = "apt-get install libxen-dev, or ln -s libxenstore.so.4 libxenstore.so where the former lies"
_CHANGES: Final = (
    "LibVMI changes a domain's memory limit when it attaches on Xen; say --libvmi-allow-domain-changes "
    "(the limits are put back), or use the route 'xen'"
)
TURN_S = 5.0  # for how long a call of LibVMI that does not come back is waited for by others
EXIT_S = 2.0  # and by the end of this process
_limits_lock = threading.Lock()  # whoever keeps the limits must not see what another handle is just about to put back


class LibvmiMemory:
    """Guest-physical RAM as LibVMI reads it. ``check`` raises GuestGone once what was opened is no more."""

    name = "libvmi"

    def __init__(
        self,
        handle: Any,  # noqa: ANN401  the binding has no types
        regions: Iterable[Region],
        *,
        live: bool,
        check: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self.live = live
        self._handle, self._ram = handle, Ram(regions)
        self._error: type[Exception] = _load().LibvmiError
        self._check, self._end = check, end

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM, sorted, disjoint."""
        return self._ram.regions

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        self._ram.check(gpa, size)
        with self._fresh() as handle:
            data = self._read(handle, gpa, size)
        if data is None:
            self._check()
            raise UnreadableMemory(gpa, size, "LibVMI cannot read it")
        return data

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans, one by one; None where one is unreadable."""
        with self._fresh() as handle:
            found = [self._read(handle, gpa, size) if self._ram.holds(gpa, size) else None for gpa, size in spans]
        if None in found:
            with contextlib.suppress(UnreadableMemory):  # whether the guest is there cannot be told
                self._check()
        return found

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers of a running domain, by which its kernel is found without a search; a file has none."""
        handle = self._opened()
        if not self.live:
            return ()
        names = _load().X86Reg
        states = []
        with contextlib.suppress(self._error):  # of a virtual processor that was never started
            for number in range(min(handle.get_num_vcpus(), MAX_VCPUS)):
                cr0, cr3, cr4, rip = (
                    handle.get_vcpureg(names[name].value, number) for name in ("CR0", "CR3", "CR4", "RIP")
                )
                states.append(VcpuState(cr0, cr3, cr4, rip))
        return tuple(states)

    def check_alive(self) -> None:
        """Raise GuestGone unless what was opened is still there, UnreadableMemory where that cannot be told."""
        self._opened()
        self._check()

    def close(self) -> None:
        """Let go of the guest; may be called twice."""
        if self._handle is not None:
            self._handle = None
            self._end()

    def _opened(self) -> Any:  # noqa: ANN401
        if self._handle is None:
            raise GuestGone("LibVMI was closed")
        return self._handle

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Any]:
        """The handle, with nothing cached, and nothing left mapped behind it."""
        handle = self._opened()
        with self._quietly():
            handle.pagecache_flush()
            try:
                yield handle
            finally:
                handle.pagecache_flush()

    def _quietly(self) -> AbstractContextManager[object]:
        """Frames of a running domain may be missing, of which it prints; those of a file are there."""
        return caught() if self.live else contextlib.nullcontext()

    def _read(self, handle: Any, gpa: int, size: int) -> bytes | None:  # noqa: ANN401
        try:
            data, got = handle.read_pa(gpa, size)  # all or nothing: without padding a short read fails
        except self._error:
            return None
        return bytes(data) if got == size else None


def open_libvmi_file(path: str | Path) -> LibvmiMemory:
    """Open a raw image of memory, or the file behind a guest's RAM. Raises ConfigError, HostError."""
    with contextlib.closing(open_file(path)) as image:
        if not image.is_raw:
            raise ConfigError(f"{path}: LibVMI reads raw memory images only; use the route 'file'")
        regions = [Region(0, image.regions[0].size // PAGE * PAGE)]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # what was looked at is what LibVMI opens
    try:
        handle = _construct(f"/proc/self/fd/{descriptor}", "INIT_DOMAINNAME", "FILE")
    finally:
        os.close(descriptor)
    return LibvmiMemory(handle, regions, live=False, check=_stays, end=partial(_destroy, handle))


def open_libvmi_xen(
    domid: int,
    uuid: str | None = None,
    memory_bytes: int | None = None,
    *,
    change_domain: bool = False,
    folder: Path | None = None,
) -> LibvmiMemory:
    """Open a running Xen domain; ``folder`` is where Xen's libraries are, instead of the usual places.

    Raises UsageError without ``change_domain``, GuestGone, HostError with the remedy.
    """
    if not change_domain:
        raise UsageError(_CHANGES)
    _load()
    if not _has_xenstore(folder):
        raise HostError(f"LibVMI needs libxenstore.so by its unversioned name: {_XENSTORE}")
    with contextlib.closing(open_xen(domid, uuid, memory_bytes, folder=folder)) as own:
        regions = own.regions  # of LibVMI's own figures, one is the highest frame of all, and the other no map
    if not _limits_lock.acquire(timeout=TURN_S):
        raise HostError("LibVMI does not come back from another domain: is xenstored stuck?")
    try:
        limits = MemoryLimits(domid, uuid, folder)
        with _kept(limits):
            handle = _construct(_Domid(str(domid)), "INIT_DOMAINID", "XEN")
    finally:
        _limits_lock.release()
    end = partial(_let_go, handle, domid, limits.domain.uuid, folder)
    return LibvmiMemory(handle, regions, live=True, check=limits.check_alive, end=end)


def probe() -> Availability:
    """Whether LibVMI can be used here, and on what. Opens no guest."""
    name = "libvmi"
    try:
        _load()
    except HostError as error:
        return Availability(name, ok=False, reason=str(error), remedy=_INSTALL, required=False)
    where = "reads raw memory images (--route libvmi); KVM guests it cannot: that takes a patched host (libkvmi.so)"
    if not is_control_domain():
        return Availability(name, ok=True, reason=where, required=False)
    if not _has_xenstore():
        why = f"{where}; Xen domains it cannot either: libxenstore.so is missing by its unversioned name"
        return Availability(name, ok=False, reason=why, remedy=_XENSTORE, required=False)
    why = f"{where}; on Xen it changes memory limits: only with --libvmi-allow-domain-changes"
    return Availability(name, ok=True, reason=why, required=False)


class _Domid(str):
    """The number of a domain in the form the binding wants: it hands on what ``encode`` gives."""

    __slots__ = ()

    def encode(self, *_: object) -> bytes:
        """As the C side reads it: uint64_t."""
        return struct.pack("<Q", int(self))


def _construct(domain: str, flag: str, mode: str) -> Any:  # noqa: ANN401  the binding has no types
    """A handle. Raises HostError with what the C library printed: its exception says nothing."""
    libvmi = _load()
    try:
        with caught() as lines:
            return libvmi.Libvmi(domain, getattr(libvmi, flag), mode=libvmi.VMIMode[mode], partial=True)
    except libvmi.LibvmiError as error:
        why = " ".join(lines) or f"no reason told ({error})"
        raise HostError(f"LibVMI cannot open it in mode {mode}: {why}") from None


def _destroy(handle: Any) -> None:  # noqa: ANN401
    with caught(), contextlib.suppress(_load().LibvmiError):  # the domain may have ended before
        handle.destroy()


def _let_go(handle: Any, domid: int, uuid: str, folder: Path | None) -> None:  # noqa: ANN401
    """Detach, with the limits as they are now. Where they cannot be kept, nothing is done: none is changed then."""
    if not _limits_lock.acquire(timeout=TURN_S):
        return
    try:
        try:
            limits = MemoryLimits(domid, uuid, folder)
        except GuestGone:
            _destroy(handle)  # there is nothing left to keep
        except HostError:
            return
        else:
            with _kept(limits):
                _destroy(handle)
    finally:
        _limits_lock.release()


@contextlib.contextmanager
def _kept(limits: MemoryLimits) -> Iterator[None]:
    """Put the limits back behind what happens here, also where the process ends first: it does not wait for threads."""
    last = partial(_restore_at_exit, limits)
    atexit.register(last)
    try:
        yield
    finally:
        limits.restore()
        atexit.unregister(last)  # not where that failed: then it is tried once more


def _restore_at_exit(limits: MemoryLimits) -> None:
    mine = _limits_lock.acquire(timeout=EXIT_S)  # whoever changes them now is waited for, but not for ever
    try:
        limits.restore()
    finally:
        if mine:
            _limits_lock.release()


def _stays() -> None:
    """A file stays as it is."""


def _load() -> Any:  # noqa: ANN401
    try:
        return importlib.import_module("libvmi")
    except ImportError as error:
        if importlib.util.find_spec("libvmi") is None:
            raise HostError(f"LibVMI's Python binding is not installed: {_INSTALL}") from None
        raise HostError(f"LibVMI cannot be loaded: {error}") from None


def _has_xenstore(folder: Path | None = None) -> bool:
    """Whether the library is there by the name that LibVMI looks for, which only packages for developers bring."""
    try:
        ctypes.CDLL(str(folder / "libxenstore.so") if folder else "libxenstore.so")
    except OSError:
        return False
    return True
