"""Guest-physical bytes of a running Xen domain (HVM or PVH), by foreign mappings that last one call.

Nothing is written, paused or kept. Frames that the guest has ballooned out cannot be mapped: they are None, never
zeros, and `XenMemory.gaps` tells how many there are.
Sources: foreign.py, frames.py, xenmap.py, xenctl.py; xen/include/public/arch-x86/hvm/save.h (struct hvm_hw_cpu).
"""

from __future__ import annotations

import errno
import struct
import time
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from appliance.errors import GuestGone, HostError, UnreadableMemory, UnsupportedGuest, UsageError
from appliance.memory.foreign import ForeignMemory
from appliance.memory.frames import NOT_READY, DomainFrames, explain_errno
from appliance.memory.xenmap import PAGE, find_populated, find_regions, sample
from appliance.model import Availability, Gap, Region, VcpuState
from appliance.xenctl import Control, explain, is_control_domain

MAX_VCPUS: Final = 128
POPULATED_S: Final = 2.0  # for where there is anything at all; the guest decides how long it would take
# In struct hvm_hw_cpu: rip 640; cr0 656; cr3 672, cr4; fs_base 832, gs; idtr_base 872; shadow_gs 944; lstar 960.
_CPU: Final = struct.Struct("<640xQ8xQ8xQQ144xQQ24xQ64xQ8xQ64x")


class XenMemory:
    """RAM of one Xen domain. ``instance`` names this life of it."""

    name = "xen"
    live = True

    def __init__(
        self, frames: DomainFrames, regions: Sequence[Region], control: Control, foreign: ForeignMemory
    ) -> None:
        self.domid, self.uuid = frames.domid, frames.uuid
        self.instance = f"xen-{frames.uuid}-{frames.domid}"
        self._frames, self._control, self._foreign = frames, control, foreign
        self._regions = tuple(regions)
        self._starts = [region.gpa for region in regions]
        largest = max(regions, key=lambda region: region.size, default=Region(0, 0))
        self._low, self._high = largest.gpa, largest.gpa + largest.size
        self._open = True

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM that the guest may have, sorted, disjoint; what it has ballooned out are holes in it: see `gaps`."""
        return self._regions

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """What of the regions cannot be read now, looked at afresh each time. Raises GuestGone."""
        self._check_open()
        frames = sum(region.size for region in self._regions) // PAGE
        asked = sample(self._regions)
        there = self._frames.probe(asked)
        missing = max(frames - self._frames.check().pages, there.count(False) * frames // len(asked))
        if missing <= 0:
            return ()
        first = next((frame for frame, mapped in zip(asked, there, strict=True) if not mapped), asked[0])
        why = explain_errno(self._frames.look((first,), _touch_nothing).get(first, errno.EINVAL))
        what = f"about {missing} of {frames} frames ({missing * PAGE >> 20} of {frames * PAGE >> 20} MiB)"
        return (Gap("guest memory", first * PAGE, f"{what} cannot be read: {why}"),)

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        self._check_open()
        if not self._is_ram(gpa, size):
            raise UnreadableMemory(gpa, size, "not RAM")
        if not size:
            return b""
        found, failed = self._frames.read(((gpa, size),))
        if found[0] is None:
            raise UnreadableMemory(gpa, size, explain_errno(next(iter(failed.values()), errno.EIO)))
        return found[0]

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans, 1024 distinct frames by one mapping; None where one is unreadable."""
        self._check_open()
        low, high = self._low, self._high
        good = [low <= gpa <= high - size and size > 0 for gpa, size in spans]
        if all(good):
            return self._frames.read(spans)[0]
        good = [size > 0 and (fits or self._is_ram(gpa, size)) for fits, (gpa, size) in zip(good, spans, strict=True)]
        pieces = iter(self._frames.read([span for span, fits in zip(spans, good, strict=True) if fits])[0])
        nothing = [b"" if size == 0 and self._is_ram(gpa, 0) else None for gpa, size in spans]
        return [next(pieces) if fits else other for fits, other in zip(good, nothing, strict=True)]

    def data_regions(self) -> tuple[Region, ...]:
        """The parts worth scanning: without large holes; that takes `POPULATED_S` at most. Raises GuestGone."""
        self._check_open()
        if not self.gaps:
            return self._regions
        end_s = time.monotonic() + POPULATED_S
        return find_populated(self._frames.probe, self._regions, lambda: time.monotonic() >= end_s)

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers of the virtual CPUs that were started. Xen holds each one still for the copy, some microseconds."""
        self._check_open()
        states: list[VcpuState] = []
        try:
            count = self._frames.describe().vcpus
        except HostError:
            return ()
        for number in range(min(count, MAX_VCPUS)):
            raw = self._control.read_cpu(self.domid, number)
            if isinstance(raw, bytes):
                rip, cr0, cr3, cr4, fs, gs, idt, kernel_gs, lstar = _CPU.unpack(raw)
                states.append(VcpuState(cr0, cr3, cr4, rip, idt, lstar, fs, gs, kernel_gs))
            elif raw == errno.ESRCH:
                raise GuestGone(f"Xen domain {self.domid} has ended")
        return tuple(states)

    def check_alive(self) -> None:
        """Raise GuestGone unless the same domain is there and not dying, UnreadableMemory where Xen does not tell."""
        self._check_open()
        self._frames.check()

    def close(self) -> None:
        """Give the handles back; may be called twice."""
        self._open = False
        self._foreign.close()
        self._control.close()

    def _check_open(self) -> None:
        if not self._open:
            raise GuestGone(f"Xen domain {self.domid} is not looked at any more")

    def _is_ram(self, gpa: int, size: int) -> bool:
        index = bisect_right(self._starts, gpa) - 1
        return index >= 0 <= size and gpa + size <= self._regions[index].gpa + self._regions[index].size


def open_xen(
    domid: int, uuid: str | None = None, memory_bytes: int | None = None, *, folder: Path | None = None
) -> XenMemory:
    """Open the RAM of a domain, of which the caller knows ``uuid`` and how much memory it can have at most.

    That is memory/static-max of xenstore without memory/videoram; None: it is looked for. ``folder``: where Xen's
    libraries are, instead of the usual places. Raises UsageError (dom0), GuestGone (no such domain, or another one by
    now), UnsupportedGuest (PV), UnreadableMemory (nothing of it yet), PermissionRefused and HostError with the remedy.
    """
    if domid == 0:
        raise UsageError("xen:0 is this host's own domain; give a guest")
    control = Control(folder)
    try:
        foreign = ForeignMemory(folder)
        try:
            return _open(DomainFrames(domid, uuid and uuid.lower(), control, foreign), memory_bytes, control, foreign)
        except BaseException:
            foreign.close()
            raise
    except BaseException:
        control.close()
        raise


def probe() -> Availability:
    """Whether memory of Xen domains can be read here, without touching any."""
    if not is_control_domain():
        return Availability("xen", ok=False, reason="this host is no control domain (dom0) of Xen", required=False)
    try:
        with Control() as control:
            control.read_domain(0)  # refused for a release that is not known, or by a policy
            ForeignMemory().close()
    except HostError as error:
        reason, _, remedy = str(error).partition("; ")
        return Availability("xen", ok=False, reason=reason, remedy=remedy or None, required=False)
    reason = f"Xen 4.{control.release}: memory of HVM and PVH guests can be mapped"
    return Availability("xen", ok=True, reason=reason, required=False)


def _touch_nothing(_address: int, _errors: array[int]) -> None:
    """What to take of a mapping that is made to see whether it can be."""


def _open(frames: DomainFrames, memory_bytes: int | None, control: Control, foreign: ForeignMemory) -> XenMemory:
    domain = frames.describe()
    if not domain.hvm:
        raise UnsupportedGuest((f"domain {domain.domid} is paravirtual (PV), its memory has another shape",))
    frames.uuid = domain.uuid
    regions = find_regions(frames.probe, memory_bytes, control.read_last_frame(domain.domid) or 0)
    memory = XenMemory(frames, regions, control, foreign)
    code = frames.look((0,), _touch_nothing).get(0, 0)  # the frame that every guest has
    if code in {errno.EPERM, errno.EACCES}:
        raise explain(code, f"memory of domain {domain.domid} cannot be mapped")
    if not regions or code == NOT_READY:
        raise UnreadableMemory(0, PAGE, explain_errno(code))
    return memory
