"""Where the kernel program hangs on a port: on tc's two hooks, or on a packet socket that only observes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from appliance.model import GuestPort
from appliance.tap.bpf.attach import Attachment
from appliance.tap.bpf.layout import Transport
from appliance.tap.bpf.observe import Observation
from appliance.tap.bpf.perf import PerfRing
from appliance.tap.bpf.ring import Ring
from appliance.tap.bpf.syscalls import Map
from appliance.tap.kind import read_kind, sends_outwards
from appliance.tap.netns import call_in_netns


@dataclass(frozen=True, slots=True)
class Hook:
    """The program on one port. ``swapped``: what the guest sends leaves by the port (macvtap, see ``kind.py``)."""

    port: GuestPort
    ifindex: int
    swapped: bool
    detach: Callable[[], None]
    forget: Callable[[], None]  # give back what it holds; what hangs on the port stays there
    mend: Callable[[], bool]  # hang it again where somebody took it away; whether that was necessary


def hang(port: GuestPort, programs: Mapping[str, int]) -> Hook:
    """Hang the loaded programs on a port. Raises UsageError, PermissionRefused, HostError; then nothing is left."""
    swapped = sends_outwards(call_in_netns(port.netns, lambda: _read_kind(port.ifname)))
    hung: Observation | Attachment
    if "observe" in programs:
        hung = Observation(port, programs["observe"])
    else:
        ingress, egress = ("to_guest", "from_guest") if swapped else ("from_guest", "to_guest")
        hung = Attachment(port, programs[ingress], programs[egress])
    if isinstance(hung, Attachment):
        return Hook(port, hung.ifindex, swapped, hung.detach, hung.forget, hung.mend)
    return Hook(port, hung.ifindex, swapped, hung.detach, hung.detach, lambda: False)  # nobody takes a socket away


def open_ring(transport: Transport, events: Map, size: int) -> Ring | PerfRing:
    """The consumer of a tap's events. Raises HostError."""
    return PerfRing(events, size) if transport is Transport.PERF else Ring(events.fd, size)


def _read_kind(ifname: str) -> str | None:
    with suppress(OSError):  # there is no such port: hanging the program tells
        return read_kind(socket.if_nametoindex(ifname))
    return None
