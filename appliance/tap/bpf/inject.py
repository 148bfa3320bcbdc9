"""Sends a frame at a guest's port, in either direction, without any device of ours.

A test run of the tc program ``inject`` (bpf(2), BPF_PROG_TEST_RUN) with the frame as its packet: the program hands a
clone of it to the port, ``from_guest`` as if the guest had sent it, else to the guest. So bridge, filters and counters
treat it as any other frame. Sources: net/bpf/test_run.c, ``bpf_clone_redirect`` in net/core/filter.c.
"""

from __future__ import annotations

import ctypes
import os
from struct import pack
from typing import Final

from appliance.errors import HostError
from appliance.tap.bpf.layout import MAX_FRAME
from appliance.tap.bpf.syscalls import Map, run_program
from appliance.tap.netns import call_in_netns

INGRESS: Final = 1  # BPF_F_INGRESS
HEAD_BYTES: Final = 2048  # a test run takes a page less its own needs; the rest goes by the map
_CB_AT: Final = 48  # struct __sk_buff

_libc = ctypes.CDLL(None, use_errno=True)


class Injector:
    """Sends frames at ports of one network namespace; used by one thread. ``mark``: by which our program knows them."""

    def __init__(self, netns: str | None, program: int, tail: Map, mark: int) -> None:
        self._program, self._tail, self._mark = program, tail, mark
        self._theirs = self._ours = -1
        if netns is not None:
            self._theirs = call_in_netns(netns, _open_own)
            self._ours = _open_own()

    def send(self, frame: bytes, ifindex: int, *, ingress: bool, kind: int = 0) -> bool:
        """Send one frame; whether the kernel took it. Raises HostError when the namespace cannot be left again.

        ``kind``: 0 for one that was held; FORGED, REFUSE (``layout.py``).
        """
        if len(frame) > MAX_FRAME:
            return False
        head = frame[:HEAD_BYTES]
        context = bytes(_CB_AT) + pack("=IIII", ifindex, INGRESS if ingress else 0, self._mark | kind, len(frame))
        try:
            if len(frame) > len(head):
                self._tail.update(bytes(4), frame[len(head) :].ljust(MAX_FRAME, b"\0"))
            if self._theirs < 0:
                return run_program(self._program, head, context) == 0
            _enter(self._theirs)
            try:
                return run_program(self._program, head, context) == 0
            finally:
                _enter(self._ours)
        except OSError:
            return False

    def close(self) -> None:
        """Give the descriptors back; may be called twice."""
        for fd in (self._theirs, self._ours):
            if fd >= 0:
                os.close(fd)
        self._theirs = self._ours = -1


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(fd: int) -> None:
    """setns(2) moves the calling thread only; a look-up of ports is done in the namespace of the caller."""
    if _libc.setns(fd, 0x40000000):  # CLONE_NEWNET
        number = ctypes.get_errno()
        raise HostError(f"cannot enter the port's network namespace: {os.strerror(number)}")
