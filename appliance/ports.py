"""The small protocols between rooms. A port says what is promised, who may raise what, and nothing of how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from appliance.model import (
    Decision,
    Decoy,
    Evidence,
    Finding,
    Flow,
    FlowEvent,
    FlowId,
    GuestChange,
    GuestId,
    GuestInfo,
    GuestProcess,
    HoldPolicy,
    IpNetwork,
    Opinion,
    ProcessKey,
    Region,
    Snapshot,
    TapStats,
    VcpuState,
)


@runtime_checkable
class GuestMemory(Protocol):
    """Guest-physical bytes, read-only by construction. One instance belongs to one thread."""

    name: str  # "qemu", "file", ...: shown to people
    live: bool  # the guest runs while we read

    @property
    def regions(self) -> tuple[Region, ...]:
        """RAM only, sorted by ``gpa``, disjoint."""
        ...

    def read(self, gpa: int, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises UnreadableMemory, GuestGone."""
        ...

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        """Read many ``(gpa, size)`` spans in as few system calls as can be; None where one is unreadable.

        Raises GuestGone when the guest is gone, never UnreadableMemory.
        """
        ...

    def vcpus(self) -> tuple[VcpuState, ...]:
        """Registers of the virtual CPUs; empty where this route has none."""
        ...

    def check_alive(self) -> None:
        """Raise GuestGone unless the same guest instance is still there."""
        ...

    def close(self) -> None:
        """Release everything; may be called twice; never changes the guest."""
        ...


class GuestEye(Protocol):
    """Processes and sockets of one running guest. All methods may raise GuestError, and nothing else."""

    os: str  # "linux"
    live: bool  # the guest runs while we look
    describe: str  # "Linux 6.1.0-56-cloud-amd64, build id ..., attached in 0.21 s"

    def read_snapshot(self) -> Snapshot:
        """Walk everything: a full look."""
        ...

    def find_owner(self, flow: Flow) -> Finding:
        """Say who owns it now, by following the tuple's hash into the guest's own tables."""
        ...

    def read_process(self, key: ProcessKey) -> GuestProcess | None:
        """Describe one process afresh; None when it is gone or its pid was reused."""
        ...

    def find_foreign(self, process: GuestProcess) -> tuple[Evidence, ...]:
        """What in this process is foreign: injected regions, modules, threads, changed text."""
        ...

    def read_pulse(self) -> int:
        """Return a number that grows while this very kernel runs: not while it is paused, nor after a reboot.

        It falls where the guest was reverted to an earlier time, if that can be seen at all.
        """
        ...

    def close(self) -> None:
        """Release the memory behind it."""
        ...


class OtherEngine(Protocol):
    """An engine that is not ours, asked for a second opinion on processes of one guest. Nothing here waits for it."""

    def ask(self, system: str, process: GuestProcess) -> bool:
        """Put a question; ``system`` is what the guest runs. False: it will not be answered."""
        ...

    def heard(self) -> list[Opinion]:
        """Take the answers that have come since."""
        ...

    def close(self) -> None:
        """End it, whatever it is doing; may be called twice."""
        ...


class GuestSource(Protocol):
    """One kind of hypervisor's own view of the guests that are here. Used by one thread."""

    name: str  # "qemu", "libvirt", "xen": shown to people

    def find_guests(self) -> list[GuestInfo]:
        """Every guest that is here now, running or paused. Raises HostError when the hypervisor cannot be asked."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when guests may have changed; -1: it can only be asked again and again."""
        ...

    def changes(self) -> tuple[GuestChange, ...]:
        """Take what has been told since the last call, and clear the descriptor."""
        ...

    def close(self) -> None:
        """Ask no more; may be called twice."""
        ...


class PacketTap(Protocol):
    """The packet eye on one or more ports of one guest. Tells flow events, never packets."""

    vm: GuestId

    def poll(self, timeout_s: float) -> Iterable[FlowEvent]:
        """Wait at most ``timeout_s`` for packets, then return the events they make (bounded in number)."""
        ...

    @property
    def exhausted(self) -> bool:
        """No further event will come: the end of a file, or the port is gone."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when ``poll`` has work; -1 for a source that is always ready."""
        ...

    def stats(self) -> TapStats:
        """Counters since the start."""
        ...

    def close(self) -> Iterable[FlowEvent]:
        """Stop; the events that end the flows still open."""
        ...


class PacketHand(Protocol):
    """The hand on single flows of one guest. Its acts end by themselves, can be undone, and touch no other flow.

    Used by the thread that polls the tap. Methods that name a flow return whether the act was done. All may
    raise HostError.
    """

    def hold_new(self, policy: HoldPolicy | None) -> None:
        """From now on new flows wait for a verdict; None: they do not."""
        ...

    def release(self, flow: FlowId) -> bool:
        """Let a flow go on, whatever was decided before: what was held is sent on, in order."""
        ...

    def block(self, flow: FlowId, seconds: float | None = None, *, reset: bool = False) -> bool:
        """Drop its packets both ways; ``reset`` tells both ends of an established TCP connection that it is over."""
        ...

    def hold(self, flow: FlowId, seconds: float, default: Decision) -> bool:
        """Let its packets wait; after ``seconds`` without another act, ``default`` is what becomes of it."""
        ...

    def redirect(self, flow: FlowId, decoy: Decoy) -> bool:
        """Send a held flow to the decoy instead; established ones cannot be redirected (False)."""
        ...

    def ban(self, peer: IpNetwork, seconds: float | None = None) -> None:
        """Drop what comes from or goes to these addresses, existing flows too; None: until ``unban``."""
        ...

    def unban(self, peer: IpNetwork) -> bool:
        """Lift a ban; whether there was one."""
        ...


class Frame(Protocol):
    """One link-layer frame on a guest's port."""

    at_ns: int  # when the host saw it, Unix epoch
    from_guest: bool  # sent by the guest; False: sent to it
    data: bytes  # Ethernet frame, maybe cut short
    wire_len: int  # its length on the wire, of the whole super-packet under GSO
    segments: int  # wire packets in it: 1 unless GSO
    vlan: int | None  # 802.1Q tag that the host keeps out of band


class FrameSource(Protocol):
    """Where frames come from: a port or a capture file."""

    def frames(self, timeout_s: float) -> Iterator[Frame]:
        """Yield the frames at hand, at most a batch; an empty batch after the timeout."""
        ...

    @property
    def exhausted(self) -> bool:
        """No further frame will ever come (the end of a file)."""
        ...

    def fileno(self) -> int:
        """A descriptor to wait on; -1 for a file."""
        ...

    def lost(self) -> int:
        """Frames dropped before us, so far."""
        ...

    def close(self) -> None:
        """Release it; may be called twice."""
        ...
