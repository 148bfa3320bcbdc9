"""Guest RAM through libvirt's memoryPeek: for a domain whose QEMU process cannot be reached, or to compare. Slow.

libvirt has QEMU save each piece to a file (pmemsave), which stalls the guest for a moment, and hands it over. It
answers zeros for what is no RAM, so nothing is asked for that the map does not hold; and it reads whatever domain has
the UUID now, so the id of the domain, another one after each start, is compared behind each batch. A daemon that was
started again may give another life the same id: behind a lost connection nothing is read, it must be opened anew. A
writable connection is needed. The domain is not tainted (no monitor command is passed through) and nothing of it
changes.

All calls are made by a thread of their own: a libvirtd that hangs costs one deadline, not the watch.
Sources: libvirt src/qemu/qemu_driver.c (qemuDomainMemoryPeek), src/remote/remote_protocol.x
(REMOTE_DOMAIN_MEMORY_PEEK_BUFFER_MAX, 4 MiB), include/libvirt/virterror.h.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from appliance.bounded import Worker
from appliance.errors import GuestGone, HostError, ParasightError, PermissionRefused, UnreadableMemory, UsageError
from appliance.memory.batches import Ram, gather
from appliance.memory.commandline import CommandLine
from appliance.memory.domainxml import parse_domain, refuse_memory_devices
from appliance.memory.layout import above_start, extents
from appliance.memory.qemu import read_command_line
from appliance.model import Availability, Region, VcpuState

URI: Final = "qemu:///system"
ANSWER_S = 2.0  # for one call: well below what a guest's thread may take for one round (pacemaker.HANGS_S)
OPEN_S = 5.0  # for each of those by which it is opened
CHUNK = 1 << 20  # bytes of one call; more makes it slower, and longer pauses for the guest
GAP = 128 << 10  # bytes that are read along rather than to ask twice: a call takes as long as some 200 KB
_PHYSICAL = 2  # VIR_MEMORY_PHYSICAL
_INSTALL = "apt-get install python3-libvirt, or pip install 'parasight[libvirt]'"
_T = TypeVar("_T")
_hanging: Final[dict[Worker, str]] = {}  # those that were left with a call that did not come back, and what they asked


class LibvirtMemory:
    """Guest-physical RAM of one life of a libvirt domain."""

    name = "libvirt"
    live = True

    def __init__(self, domain: Domain, regions: Iterable[Region]) -> None:
        self.instance = f"{domain.uuid}.{domain.life}"
        self._domain, self._ram = domain, Ram(regions)

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM, sorted, disjoint; without the hole between 640 KiB and 1 MiB."""
        return self._ram.regions

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        self._ram.check(gpa, size)
        try:
            data = self._domain.peek(gpa, size)
            self._domain.check()
        except HostError as error:
            raise UnreadableMemory(gpa, size, str(error)) from None
        return data

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans, neighbours by one call; None where one is unreadable."""
        broken = False

        def fetch(gpa: int, size: int) -> bytes | None:
            nonlocal broken
            try:
                return None if broken else self._domain.peek(gpa, size)
            except HostError:
                broken = True  # said and asked once: the rest of the batch would only wait as long
                return None

        found = gather(self._ram.plan(spans, gap=GAP, limit=CHUNK), spans, fetch)
        try:
            self._domain.check()
        except HostError:
            return [None] * len(spans)  # whose bytes they are is not known
        return found

    def vcpus(self) -> tuple[VcpuState, ...]:
        """None: libvirt would pass a monitor command through for them, which taints the domain."""
        return ()

    def check_alive(self) -> None:
        """Raise GuestGone unless the same life of the domain goes on, UnreadableMemory where libvirt cannot tell."""
        try:
            self._domain.check()
        except HostError as error:
            raise UnreadableMemory(0, 0, str(error)) from None

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._domain.close()


def open_libvirt(uuid: str, *, pid: int | None = None, uri: str | None = None) -> LibvirtMemory:
    """Open the RAM of a running domain; ``pid`` is its QEMU's where that can be seen, and tells the map best.

    ``uri``: None for ``PARASIGHT_LIBVIRT_URI``, else the system's. Raises UsageError (no such domain, or it is off),
    PermissionRefused, HostError with the remedy.
    """
    domain = Domain(uri or os.environ.get("PARASIGHT_LIBVIRT_URI") or URI, uuid, OPEN_S)
    try:
        try:
            domain.check()
        except GuestGone as error:
            raise UsageError(str(error)) from None
        text = domain.describe()
        refuse_memory_devices(text)  # of those that are plugged in while it runs no command line tells
        line = _command_line(pid, uuid) or parse_domain(text)
        if above_start(line, amd=True) != above_start(line, amd=False):
            raise HostError(
                f"where a guest with {line.ram_size >> 30} GiB has its RAM depends on its host's processor and its "
                "machine type: read it through its QEMU process (--route qemu), on the host where that runs"
            )
        regions = [Region(one.gpa, one.size) for one in extents(line)]
        domain.peek(regions[0].gpa, 1)  # what is not permitted is said now
        domain.answer_s = ANSWER_S
        return LibvirtMemory(domain, regions)
    except HostError as error:
        domain.close()
        raise type(error)(f"domain {uuid}: {error}") from None
    except BaseException:
        domain.close()
        raise


def probe() -> Availability:
    """Whether libvirt's binding is here."""
    if importlib.util.find_spec("libvirt") is None:
        return Availability(
            "libvirt memory", ok=False, reason="its binding is not installed", remedy=_INSTALL, required=False
        )
    return Availability("libvirt memory", ok=True, reason="its binding is installed", required=False)


def _command_line(pid: int | None, uuid: str) -> CommandLine | None:
    """What the process was asked for, if it may be looked at and is the domain's."""
    try:
        line = read_command_line(pid) if pid is not None else None
    except (ParasightError, OSError):
        return None
    return line if line is not None and line.uuid is not None and line.uuid.lower() == uuid.lower() else None


class Domain:
    """One life of a domain, asked through a thread of its own. ``life`` is the id of the domain while it runs."""

    def __init__(self, uri: str, uuid: str, answer_s: float = ANSWER_S) -> None:
        """Raises HostError: no binding, or an earlier call has not come back."""
        self.uri, self.uuid, self.life = uri, uuid, -1
        self.answer_s = answer_s
        self._libvirt = _binding()
        for worker in [one for one in list(_hanging) if not one.runs]:
            _hanging.pop(worker, None)
        if uri in list(_hanging.values()):
            raise HostError(f"libvirt does not answer ({uri}): an earlier call is still out; is libvirtd stuck?")
        self._worker = Worker(f"libvirt {uuid}")
        self._connection: Any = None  # this and the next belong to that thread
        self._found: Any = None
        self._lost = False

    def peek(self, gpa: int, size: int) -> bytes:
        """Bytes of RAM, in pieces. Raises HostError, GuestGone."""
        pieces = []
        for start in range(gpa, gpa + size, CHUNK):
            count = min(CHUNK, gpa + size - start)
            pieces.append(self._ask(partial(_peek, gpa=start, size=count)))
            if len(pieces[-1]) != count:
                raise HostError(f"libvirt gave {len(pieces[-1])} bytes of {count}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def describe(self) -> str:
        """The XML of the running domain. Raises HostError, GuestGone."""
        return self._ask(lambda domain: str(domain.XMLDesc(0)))

    def check(self) -> None:
        """Raise GuestGone unless the domain still lives the same life. Raises HostError."""
        life = self._ask(self._read_life)
        if self.life < 0 <= life:
            self.life = life
        if life < 0 or life != self.life:
            what = "does not run" if life < 0 else "was started again"
            raise GuestGone(f"the libvirt domain {self.uuid} {what}")

    def close(self) -> None:
        """Close the connection, if libvirt lets us; may be called twice."""
        self._worker.end(self._drop)
        if self._worker.runs:
            _hanging[self._worker] = self.uri

    def _ask(self, work: Callable[[Any], _T]) -> _T:
        try:
            return self._worker.run(lambda: self._do(work), self.answer_s)
        except TimeoutError:
            raise HostError(f"libvirt does not answer ({self.uri}, {self.answer_s:g} s): is libvirtd stuck?") from None

    # -- in its own thread --

    def _do(self, work: Callable[[Any], _T]) -> _T:
        if self._lost:
            raise GuestGone(
                f"the connection to libvirt was lost: whether domain {self.uuid} goes on is not known by it"
            )
        try:
            if self._found is None:
                self._connection = self._libvirt.open(self.uri)
                self._found = self._connection.lookupByUUIDString(self.uuid)
            return work(self._found)
        except self._libvirt.libvirtError as error:
            if self._connection is None or not self._connection.isAlive():
                self._lost = self.life >= 0  # before that there is nothing to be mistaken for: it is connected anew
                self._drop()
            raise self._translate(error) from None

    def _read_life(self, _: object) -> int:
        """Asked of libvirtd anew: what the binding keeps of the domain does not change."""
        return int(self._connection.lookupByUUIDString(self.uuid).ID())

    def _translate(self, error: Any) -> ParasightError:  # noqa: ANN401  the binding has no types
        libvirt, code = self._libvirt, error.get_error_code()
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return GuestGone(f"libvirt has no domain {self.uuid}")
        if code == libvirt.VIR_ERR_OPERATION_INVALID:
            return GuestGone(f"the libvirt domain {self.uuid} does not run ({error})")
        refused = {libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_UNAVAILABLE, libvirt.VIR_ERR_ACCESS_DENIED}
        if code in refused | {libvirt.VIR_ERR_OPERATION_DENIED} or error.get_int1() in {errno.EACCES, errno.EPERM}:
            return PermissionRefused(
                f"libvirt refuses ({error}): memory is only told over a writable connection; run as root, or as a "
                "member of the group libvirt"
            )
        return HostError(f"libvirt ({self.uri}): {error}")

    def _drop(self) -> None:
        connection, self._connection, self._found = self._connection, None, None
        if connection is not None:
            try:
                connection.close()
            except self._libvirt.libvirtError:
                return  # it was gone already


def _binding() -> Any:  # noqa: ANN401
    try:
        libvirt = importlib.import_module("libvirt")
    except ImportError:
        raise HostError(f"libvirt's Python binding is not installed: {_INSTALL}") from None
    libvirt.registerErrorHandler(_say_nothing, None)  # else it prints whatever it raises
    return libvirt


def _peek(domain: Any, *, gpa: int, size: int) -> bytes:  # noqa: ANN401
    return bytes(domain.memoryPeek(gpa, size, _PHYSICAL))


def _say_nothing(*_: object) -> None:
    """An error of libvirt, which is raised as well."""
