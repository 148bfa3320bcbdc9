"""The ladder: the best tap that this host and this port allow, found by trying, never by a version.

Each rung that cannot be used says why; the last one is given by the caller, who knows the flow table in user space.
What a rung costs was measured: docs/how-to/choose-a-tap.md says how, and on what.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from appliance.errors import HostError, PermissionRefused, UsageError
from appliance.model import Act, FlowEvent, GuestId, GuestPort, IpAddress, TapStats
from appliance.ports import PacketTap

if TYPE_CHECKING:
    from appliance.tap.bpf.tap import KernelTap

VARIABLE: Final = "PARASIGHT_TAP"  # an operator's word: the name of the only rung to try
REASON_LENGTH: Final = 400  # the verifier can say a great deal

CommunityId = Callable[[int, bytes, bytes, int, int], str]


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to see a port. ``acts``: empty where it only observes; ``reasons``: why no better one was used."""

    name: str
    observes: str
    acts: frozenset[Act]
    cost: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        can = "connections can be held, blocked and redirected" if self.acts else "connections can only be observed"
        return f"{self.name}: {self.observes}; {can}; {self.cost}"


_ACTS: Final = frozenset(Act)
_IN_KERNEL: Final = "about 0.7 us a packet in the kernel"
RUNGS: Final = (
    Rung("tc+ring", "flows are tracked in the kernel", _ACTS, f"{_IN_KERNEL}, 5 to 24 us an event"),
    Rung("tc+perf", "flows are tracked in the kernel", _ACTS, f"{_IN_KERNEL}, 16 to 33 us an event"),
    Rung("socket", "flows are tracked in the kernel", frozenset(), f"{_IN_KERNEL}, 9 to 22 us an event"),
    Rung(
        "packets", "every packet is read", frozenset(), "about 0.6 us a packet in the kernel, 3 to 38 us in user space"
    ),
)
NAMES: Final = tuple(rung.name for rung in RUNGS)


class ObservingTap:
    """A kernel tap without a hand: the program on a packet socket cannot hold or drop anything."""

    def __init__(self, tap: KernelTap) -> None:
        self.vm = tap.vm
        self.kernel = tap

    def poll(self, timeout_s: float) -> Iterable[FlowEvent]:
        """Wait at most ``timeout_s``, then return a batch of events."""
        return self.kernel.poll(timeout_s)

    @property
    def exhausted(self) -> bool:
        """No further event will come."""
        return self.kernel.exhausted

    def fileno(self) -> int:
        """Readable while events wait."""
        return self.kernel.fileno()

    def stats(self) -> TapStats:
        """Counters since the start."""
        return self.kernel.stats()

    def close(self) -> Iterable[FlowEvent]:
        """Stop; the events that end the flows still open."""
        return self.kernel.close()

    def learn_listener(self, protocol: int, local_ip: IpAddress | None, port: int) -> None:
        """Note a server of the guest: a better direction for flows picked up midstream."""
        self.kernel.learn_listener(protocol, local_ip, port)


def open_tap(
    vm: GuestId,
    ports: Sequence[GuestPort],
    clock: Callable[[], int],
    *,
    community_id: CommunityId,
    fallback: Callable[[], PacketTap],
    rung: str | None = None,
    fail_closed: bool = False,
) -> tuple[PacketTap, Rung]:
    """Open the best tap on all ports of a guest, and say which it is.

    ``rung``, or else the environment's PARASIGHT_TAP, names the only one to try. Raises UsageError for a rung that
    there is not; where every rung failed, what the last one raised.
    """
    reasons: list[str] = []
    chosen = choose_rungs(rung or os.environ.get(VARIABLE) or None)
    for one in chosen:
        try:
            tap = _open(one.name, vm, ports, clock, community_id, fallback, fail_closed=fail_closed)
        except (HostError, UsageError, OSError, ImportError) as error:
            if one is chosen[-1]:
                raise
            reasons.append(f"{one.name}: {describe(error)}")
        else:
            return tap, replace(one, reasons=tuple(reasons))
    raise AssertionError("a ladder has rungs")


def choose_rungs(name: str | None) -> tuple[Rung, ...]:
    """All rungs, or the one of this name. Raises UsageError when there is none."""
    if name is None:
        return RUNGS
    if name not in NAMES:
        raise UsageError(f"there is no tap {name!r} (--tap or {VARIABLE}): it is one of {', '.join(NAMES)}")
    return (RUNGS[NAMES.index(name)],)


def _open(
    name: str,
    vm: GuestId,
    ports: Sequence[GuestPort],
    clock: Callable[[], int],
    community_id: CommunityId,
    fallback: Callable[[], PacketTap],
    *,
    fail_closed: bool,
) -> PacketTap:
    if name == "packets":
        return fallback()
    # Only now: where a library of the kernel tap is missing, the ladder goes on.
    from appliance.tap.bpf.layout import Transport  # noqa: PLC0415
    from appliance.tap.bpf.loader import OBSERVE  # noqa: PLC0415
    from appliance.tap.bpf.tap import KernelTap  # noqa: PLC0415

    if name != "socket":
        transport = Transport.PERF if name == "tc+perf" else Transport.RING
        return KernelTap(vm, ports, clock, community_id=community_id, transport=transport, fail_closed=fail_closed)
    last: HostError | None = None
    for transport in Transport:
        try:
            tap = KernelTap(vm, ports, clock, community_id=community_id, transport=transport, programs=OBSERVE)
        except PermissionRefused:
            raise
        except HostError as error:
            last = last or error
        else:
            return ObservingTap(tap)
    raise last or HostError("a packet socket's filter has no way to tell its events")


def describe(error: Exception) -> str:
    """An error as one line."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= REASON_LENGTH else f"{text[: REASON_LENGTH - 4]} ..."
