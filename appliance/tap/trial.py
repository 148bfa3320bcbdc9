"""Which rungs of the ladder carry on this host: each is tried on the loopback of an empty network namespace.

The namespace is made for the trial and goes with it; nothing of the host's own is touched. A rung passes when a
datagram sent there was told. Sources: unshare(2), network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from functools import partial
from struct import pack
from threading import Event, Thread, get_native_id
from typing import Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import Availability, FlowStarted, GuestId, GuestInfo, GuestPort
from appliance.ports import PacketTap
from appliance.tap.ladder import RUNGS, VARIABLE, CommunityId, Rung, choose_rungs, describe, open_tap
from appliance.tap.netns import CLONE_NEWNET, call_in_netns

PATIENCE_S: Final = 5.0  # for a datagram on loopback: a busy host is slow, not deaf
LOOPBACK: Final = "lo"
SIOCSIFFLAGS: Final = 0x8914  # include/uapi/linux/sockios.h
IFF_UP: Final = 1

_AS_ROOT: Final = "run as root, or grant CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_NET_RAW and CAP_SYS_ADMIN"
_REMEDIES: Final = {
    "tc+ring": "modprobe -a sch_ingress cls_bpf; a kernel with BPF ring buffers (5.8 or a backport)",
    "tc+perf": "modprobe -a sch_ingress cls_bpf; a kernel with eBPF classifiers and CONFIG_PERF_EVENTS",
    "socket": "modprobe af_packet; a kernel with CONFIG_BPF_SYSCALL",
    "packets": "modprobe af_packet",
}

Fallback = Callable[[GuestPort], PacketTap]


def probe_rungs(clock: Callable[[], int], community_id: CommunityId, fallback: Fallback) -> tuple[Availability, ...]:
    """Say which rung this host carries, and for each better one why not and what mends it.

    ``fallback`` opens the last rung on a port. Raises UsageError when the environment asks for a rung there is not.
    """
    failed: list[Availability] = []
    for rung in choose_rungs(os.environ.get(VARIABLE) or None):
        try:
            try_rung(rung, clock, community_id, fallback)
        except (HostError, UsageError, OSError, ImportError) as error:
            remedy = _AS_ROOT if isinstance(error, PermissionRefused) else _REMEDIES[rung.name]
            failed.append(Availability(f"tap {rung.name}", False, describe(error), remedy, required=False))
        else:
            return Availability("tap", True, str(rung)), *failed
    why = "no way to see packets works here" if len(failed) == len(RUNGS) else f"{VARIABLE} asks for a tap that fails"
    return Availability("tap", False, why, failed[-1].remedy), *failed


def probe_ports(guests: Iterable[GuestInfo]) -> tuple[Availability, ...]:
    """One line for each guest's port where only less than the host's best can be used; nothing is attached to it."""
    lines = []
    for guest in guests:
        for port in guest.ports:
            try:
                foreign = call_in_netns(port.netns, partial(_has_foreign_ingress, port))
            except (HostError, UsageError, OSError, ImportError):  # it left, or opening it will tell
                continue
            if foreign:
                name = port.ifname
                why = f"port {name} has a foreign ingress qdisc: its connections can be observed, not held or blocked"
                remedy = f"virsh domiftune DOMAIN {name} --outbound 0 --live; or tc qdisc del dev {name} ingress"
                lines.append(Availability(f"tap of {guest.id.target}", False, why, remedy, required=False))
    return tuple(lines)


def try_rung(rung: Rung, clock: Callable[[], int], community_id: CommunityId, fallback: Fallback) -> None:
    """Use it on an empty namespace's loopback. Raises HostError, UsageError, OSError, ImportError."""
    with empty_netns() as path:
        port = GuestPort(LOOPBACK, netns=path)
        tap, _ = open_tap(
            GuestId("port:lo"), [port], clock,
            community_id=community_id, fallback=lambda: fallback(port), rung=rung.name,
        )  # fmt: skip
        try:
            with call_in_netns(path, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
                sender.sendto(b"parasight", ("127.0.0.1", 9))
            give_up_s = time.monotonic() + PATIENCE_S
            while not any(isinstance(event, FlowStarted) for event in tap.poll(0.2)):
                if time.monotonic() > give_up_s:
                    raise HostError("it opens, but tells nothing of what passes")
        finally:
            tap.close()


def _has_foreign_ingress(port: GuestPort) -> bool:
    from appliance.tap.bpf.clsact import find_port, open_route, read_kinds  # noqa: PLC0415 (a library may be missing)

    with open_route(port.ifname) as route:
        return "ingress" in read_kinds(route, find_port(route, port))


@contextmanager
def empty_netns() -> Iterator[str]:
    """Yield the path of a network namespace that has its loopback only, up; it ends with the block.

    Raises PermissionRefused without CAP_SYS_ADMIN, HostError.
    """
    over, ready = Event(), Event()
    paths: list[str] = []
    errors: list[OSError] = []

    def stay() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                ioctl(sock, SIOCSIFFLAGS, pack("=16sH22x", LOOPBACK.encode(), IFF_UP))
            paths.append(f"/proc/{os.getpid()}/task/{get_native_id()}/ns/net")
        except OSError as error:
            errors.append(error)
        ready.set()
        over.wait()

    thread = Thread(target=stay, name="trial", daemon=True)
    thread.start()
    ready.wait()
    try:
        for error in errors:
            what = "no network namespace can be made to try it in"
            if error.errno == errno.EPERM:
                raise PermissionRefused(f"{what}: CAP_SYS_ADMIN is needed; run as root") from error
            raise HostError(f"{what}: {error.strerror}") from error
        yield paths[0]
    finally:
        over.set()
        thread.join()
