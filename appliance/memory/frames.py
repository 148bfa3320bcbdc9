"""Bytes of a Xen domain by its frames: which spans share a mapping, which frames may be touched, what an error means.

Where a domain's memory is populated on demand, touching a frame takes a page for it, also from outside. While fewer
pages lie ready than frames are missing, Xen may crash the domain for that, so nothing is touched then.
Sources: foreign.py and xenctl.py, xen/arch/x86/mm/p2m-pod.c (p2m_pod_demand_populate: out_of_memory).
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from appliance.errors import GuestGone, HostError, UnreadableMemory
from appliance.memory.foreign import MAX_FRAMES, ForeignMemory
from appliance.memory.xenmap import PAGE
from appliance.xenctl import Control, Domain

RETRIES_S: Final = (0.001, 0.01, 0.05)  # waits while a frame is busy
NOT_READY: Final = errno.ENODATA  # of our own: see `DomainFrames.is_ready`
_BUSY: Final = frozenset({errno.EAGAIN, errno.ENOENT, errno.EINTR, errno.ENOMEM})
_WHY: Final = {
    errno.EINVAL: "the guest has no such frame: ballooned out, or never populated",
    errno.ENOENT: "paged out by the hypervisor",
    errno.EPERM: "the hypervisor refuses this frame: not the guest's own, or a policy (XSM); see: xl dmesg",
    errno.EACCES: "the hypervisor refuses this frame: a policy (XSM); see: xl dmesg",
    errno.ESRCH: "the domain is gone",
    NOT_READY: "populated on demand, and fewer pages lie ready than are missing: reading could crash the domain; "
    "it becomes readable when the guest's balloon driver has reached its target",
}
SHIFT: Final = 12
Take = Callable[[int, "array[int]"], None]


# Where the answer goes, the slot of the span's first frame, those of its others, the offset in the first one, its size.
_Want = tuple[int, int, tuple[int, ...], int, int]


class DomainFrames:
    """The frames of one domain. ``uuid`` (None: whatever it is) tells it from another one with its number."""

    def __init__(self, domid: int, uuid: str | None, control: Control, foreign: ForeignMemory) -> None:
        self.domid, self.uuid = domid, uuid
        self._control, self._foreign = control, foreign
        self._on_demand = control.read_on_demand(domid)[0] > 0

    def describe(self) -> Domain:
        """What Xen says of it.

        Raises GuestGone: it is not there any more, it is dying, or it is another one; HostError: Xen cannot be asked.
        """
        domain = self._control.read_domain(self.domid)
        if domain is None or domain.dying or (self.uuid is not None and domain.uuid != self.uuid):
            raise GuestGone(f"Xen domain {self.domid} has ended")
        return domain

    def check(self) -> Domain:
        """`describe` while the domain is read. Raises GuestGone, UnreadableMemory: Xen cannot be asked."""
        try:
            return self.describe()
        except HostError as error:
            raise UnreadableMemory(0, 0, str(error)) from None

    def probe(self, frames: Sequence[int]) -> list[bool]:
        """Which of at most `MAX_FRAMES` frames can be mapped; none is touched."""
        there = [False] * len(frames)

        def take(_: int, errors: array[int]) -> None:
            there[:] = [not error for error in errors]

        self.look(frames, take)
        return there

    def read(self, spans: Sequence[tuple[int, int]]) -> tuple[list[bytes | None], dict[int, int]]:
        """The bytes of each ``(gpa, size)`` in order, None where one is unreadable; and the errno of each frame."""
        found: list[bytes | None] = [None] * len(spans)
        failed: dict[int, int] = {}
        slots: dict[int, int] = {}
        wants: list[_Want] = []
        for place, (gpa, size) in enumerate(spans):
            first, last = gpa >> SHIFT, gpa + size - 1 >> SHIFT
            if last - first >= MAX_FRAMES:
                found[place] = self._read_large(gpa, size, failed)
                continue
            if len(slots) + last - first >= MAX_FRAMES:
                failed |= self._read_batch(slots, wants, found)
                slots, wants = {}, []
            slot = slots.setdefault(first, len(slots))
            others: tuple[int, ...] = ()
            if last > first:
                others = tuple([slots.setdefault(frame, len(slots)) for frame in range(first + 1, last + 1)])
            wants.append((place, slot, others, gpa & PAGE - 1, size))
        if wants:
            failed |= self._read_batch(slots, wants, found)
        return found, failed

    def look(self, frames: Sequence[int], take: Take) -> dict[int, int]:
        """Map frames for ``take``, again while some are busy; the errno of each that failed. Raises GuestGone."""
        failed: dict[int, int] = {}

        def check(address: int, errors: array[int]) -> None:
            if any(errors):
                failed.update((frame, abs(error)) for frame, error in zip(frames, errors, strict=True) if error)
            take(address, errors)

        for wait_s in (*RETRIES_S, None):
            failed.clear()
            try:
                if self.is_ready():
                    self._foreign.look(self.domid, frames, check)
                else:
                    failed.update(dict.fromkeys(frames, NOT_READY))
            except OSError as error:
                failed.update(dict.fromkeys(frames, error.errno or errno.EIO))
            if wait_s is None or not _BUSY.intersection(failed.values()):
                break
            time.sleep(wait_s)
        if failed and (len(failed) == len(frames) or errno.ESRCH in failed.values()):
            with suppress(HostError):
                self.describe()
        return failed

    def is_ready(self) -> bool:
        """Whether frames may be touched: none are populated on demand, or a page lies ready for each of them."""
        if not self._on_demand:
            return True
        try:
            frames, ready = self._control.read_on_demand(self.domid)
        except HostError:
            return False
        self._on_demand = frames > 0  # none can become so later
        return frames <= ready

    def _read_batch(self, slots: dict[int, int], wants: Sequence[_Want], found: list[bytes | None]) -> dict[int, int]:
        """One mapping: copy what is wanted of the frames that are there; the errno of each that is not."""

        def take(address: int, errors: array[int]) -> None:
            area: Any = (ctypes.c_char * (len(errors) << SHIFT)).from_address(address)
            whole = not any(errors)
            for place, slot, others, offset, size in wants:
                if whole or not (errors[slot] or any(errors[other] for other in others)):
                    start = (slot << SHIFT) + offset
                    found[place] = area[start : start + size] if not others else _join(area, slot, others, offset, size)

        return self.look(list(slots), take)

    def _read_large(self, gpa: int, size: int, failed: dict[int, int]) -> bytes | None:
        """A span of more frames than one mapping may have, piece by piece."""
        step, parts = MAX_FRAMES * PAGE, []
        for start in range(gpa & -PAGE, gpa + size, step):
            first, last = max(start, gpa), min(start + step, gpa + size)
            found, more = self.read(((first, last - first),))
            failed |= more
            if found[0] is None:
                return None
            parts.append(found[0])
        return b"".join(parts)


def explain_errno(code: int) -> str:
    """Why a frame cannot be read."""
    return _WHY.get(code, os.strerror(code))


def _join(area: Any, slot: int, others: tuple[int, ...], offset: int, size: int) -> bytes:  # noqa: ANN401
    """A span over several frames, which lie side by side in the mapping unless some were wanted before."""
    if others == tuple(range(slot + 1, slot + 1 + len(others))):
        start = (slot << SHIFT) + offset
        return bytes(area[start : start + size])
    whole = b"".join([area[each << SHIFT : each + 1 << SHIFT] for each in (slot, *others)])
    return whole[offset : offset + size]
