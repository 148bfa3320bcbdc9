"""The nouns: frozen values that every room shares. Standard library only, no I/O, no clock.

Addresses of guest memory end in ``_va`` (virtual) or ``_gpa`` (physical); times end in ``_ns`` (nanoseconds since the
Unix epoch unless said otherwise) or ``_s``; ports are host integers. Text that comes from a guest is attacker input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar, dataclass_transform

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
_Noun = TypeVar("_Noun")
MAX_NAME = 255  # characters of a guest's name


@dataclass_transform(frozen_default=True)
def made_often(*, order: bool = False) -> Callable[[type[_Noun]], type[_Noun]]:
    """A noun that is made some times for each flow: frozen to the type checker only.

    At run time a frozen dataclass is made field by field through ``object.__setattr__``, five times as slowly.
    """
    return dataclass(slots=True, unsafe_hash=True, order=order)


class Missing(Enum):
    """Why a value is absent although the thing itself exists. ``None`` only ever means "there is none"."""

    UNREADABLE = "unreadable"  # its memory could not be read (paged out, torn)
    IMPLAUSIBLE = "implausible"  # it was read and cannot be true
    NOT_APPLICABLE = "not applicable"  # this kind of thing has none (a kernel thread has no path)
    UNKNOWN = "unknown"  # this guest's kernel offers no way to tell


# -- where --


@dataclass(frozen=True, slots=True)
class GuestId:
    """Which guest: its identity, never its name, interface or IP address.

    ``target`` is the notation by which a person names it on the command line: ``qemu:1234``, a libvirt UUID,
    ``file:PATH``, ``port:IFNAME``. ``instance`` tells two lives of one guest apart (QEMU pid and start time, inode).
    """

    target: str
    uuid: str | None = None
    name: str | None = None
    instance: str = ""

    def __post_init__(self) -> None:
        """Whoever may start a guest calls it what they like: keep what has room in one line."""
        if self.name is not None and (len(self.name) > MAX_NAME or not self.name.isprintable()):
            clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.name[:MAX_NAME])
            object.__setattr__(self, "name", clean[:MAX_NAME])

    def __str__(self) -> str:
        return self.target


@dataclass(frozen=True, slots=True)
class Region:
    """A run of guest-physical RAM: ``[gpa, gpa + size)``."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class VcpuState:
    """Registers of one virtual CPU, as the hypervisor reports them."""

    cr0: int
    cr3: int
    cr4: int
    rip: int = 0
    idt_base: int = 0
    lstar: int = 0  # IA32_LSTAR, where SYSCALL goes; 0: not told
    fs_base: int = 0
    gs_base: int = 0
    kernel_gs_base: int = 0


@dataclass(frozen=True, slots=True)
class Gap:
    """Something a walk could not see, and why. Absence that is named is not a silent loss."""

    what: str
    address: int
    why: str


NO_NETWORK = "connections and sockets"  # what is not seen where none of them can be


# -- the wire --


class Transport(StrEnum):
    """The protocol field of a connection."""

    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"
    RAW = "raw"  # a raw socket, or an IP protocol that is none of the above
    PACKET = "packet"  # an AF_PACKET socket


class Direction(StrEnum):
    """Who started it, seen from the guest."""

    OUT = "out"
    IN = "in"


@made_often(order=True)
class Endpoint:
    """An address and a port. ``ip`` of an AF_INET6 socket that speaks IPv4 is the v4-mapped address."""

    ip: IpAddress
    port: int

    def __str__(self) -> str:
        return f"[{ip_text(self.ip)}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"


@made_often()
class FiveTuple:
    """One connection of a guest; ``local`` is always the guest's end."""

    protocol: Transport
    local: Endpoint
    remote: Endpoint

    def __str__(self) -> str:
        return f"{self.protocol} {self.local} -- {self.remote}"


@made_often()
class FlowId:
    """Names one flow of one run: the guest and a number that counts up, so a reused tuple is a new flow."""

    vm: GuestId
    number: int

    def __str__(self) -> str:
        return f"{self.vm.target}/{self.number}"


@made_often()
class Flow:
    """One connection or conversation seen on the guest's port."""

    id: FlowId
    tuple: FiveTuple
    direction: Direction
    started_ns: int
    vlan: int | None = None
    ip_protocol: int = 0  # IANA number; tells the RAW ones apart
    icmp_type: int | None = None
    midstream: bool = False  # its beginning was not seen; the direction is then a guess
    community_id: str = ""
    spoofed_mac: str | None = None  # the guest sent it with a MAC address that its port was not given


class FlowEnd(StrEnum):
    """Why a flow ended."""

    FIN = "fin"
    RST = "rst"
    IDLE = "idle"
    EVICTED = "evicted"
    GUEST_GONE = "guest-gone"
    WATCH_ENDED = "watch-ended"


@made_often()
class FlowCounts:
    """What a flow carried, in each direction. ``bytes`` are IP bytes; ``packets`` are wire packets (GSO undone)."""

    packets_out: int = 0
    packets_in: int = 0
    bytes_out: int = 0
    bytes_in: int = 0


# -- flow events: all that a tap tells --


@made_often()
class FlowStarted:
    """The first packet of a flow. ``held``: it waits in the host for a verdict (see ``HoldPolicy``)."""

    flow: Flow
    at_ns: int
    held: bool = False


@made_often()
class FlowPayload:
    """One of the first payloads of a flow. ``index`` counts from 0 in each direction; ``data`` may be cut short."""

    flow: FlowId
    direction: Direction  # OUT: sent by the guest
    index: int
    data: bytes
    at_ns: int


@made_often()
class FlowEnded:
    """The flow is over; its counters are final."""

    flow: FlowId
    reason: FlowEnd
    counts: FlowCounts
    at_ns: int


FlowEvent = FlowStarted | FlowPayload | FlowEnded


@dataclass(frozen=True, slots=True)
class TapStats:
    """What a tap has seen.

    ``lost`` counts packets the kernel dropped before us, ``ignored`` those that are no flow of this guest (ARP, frames
    flooded to another MAC), by reason.
    """

    packets: int = 0
    bytes: int = 0
    flows: int = 0
    events: int = 0
    lost: int = 0
    evicted: int = 0  # living flows given up because the table was full
    ignored: tuple[tuple[str, int], ...] = ()


# -- the guest's own view --


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """The identity of a process: pids are reused, so its start time is part of it.

    Linux: ``pid`` is the thread-group id in the guest's initial pid namespace; ``started_ns`` counts since the guest's
    boot (CLOCK_BOOTTIME, ``task_struct.start_boottime``). Windows: ``_EPROCESS.UniqueProcessId`` and ``CreateTime``,
    which counts since the Unix epoch here.
    """

    pid: int
    started_ns: int


class Flag(StrEnum):
    """What is odd about a process or a socket, by views of one guest that contradict each other (T9)."""

    HIDDEN_PROCESS = "hidden-process"  # it is not on the guest's own list of processes; of a socket: its owner is not
    UNLINKED_ENDPOINT = "unlinked-endpoint"  # in none of the kernel's tables, and yet alive in its pool
    ONE_TABLE_ONLY = "one-table-only"  # in one of two tables that must agree
    STALE = "stale"  # what is left of something that is over
    OWNER_EXITED = "owner-exited"  # the process that holds it has ended
    PORT_WITHOUT_ENDPOINT = "port-without-endpoint"  # the port is taken, and nothing that takes it can be found


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """One process of a guest, as its kernel describes it."""

    key: ProcessKey
    name: str  # Linux: comm, at most 15 bytes, chosen by the process itself. Windows: the image's file name
    path: str | Missing  # the executable file; " (deleted)" is not appended, see ``deleted``
    command: str | Missing  # argv joined by blanks
    parent_pid: int
    uid: int | None  # real uid, initial user namespace; None on Windows, see ``sid``
    user: str | None = None  # name of the uid in the guest's own passwd, or of the SID, where that could be read
    deleted: bool = False  # the executable file has no name any more
    started_wall_ns: int | None = None  # start time since the Unix epoch by the guest's own clock
    container: str | None = None  # container id or name taken from the cgroup path
    cgroup: str | Missing = Missing.UNKNOWN
    netns: int | Missing = Missing.UNKNOWN  # inode number of its network namespace
    pid_in_namespace: int = 0
    task_va: int = 0  # ``task_struct`` or ``_EPROCESS``
    sid: str | None = None  # Windows: the user's security identifier, S-1-5-...
    session: int | None = None  # Windows: terminal session
    services: tuple[str, ...] = ()  # Windows: services that it hosts, where its command line tells
    signer: str | None = None  # Windows: who signed the image, as the kernel noted it
    flags: tuple[Flag, ...] = ()

    @property
    def pid(self) -> int:
        """Linux: thread-group id in the guest's initial pid namespace. Windows: process id."""
        return self.key.pid


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds a socket, and by which descriptors."""

    process: GuestProcess
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestSocket:
    """One socket of a guest. Owners are plural (fork) and may be none (TIME_WAIT, not yet accepted)."""

    protocol: Transport
    state: str  # the kernel's TCP names: ESTABLISHED, SYN_SENT, ..., CLOSE for an unconnected UDP socket
    local: Endpoint
    remote: Endpoint | None  # None: there is none (listener, unconnected UDP)
    owners: tuple[Owner, ...]
    netns: int  # inode number of the network namespace; Windows: the compartment
    address: int  # ``struct sock`` (or the mini socket), ``_TCP_ENDPOINT`` and its like; guest VA
    uid: int | None = None
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a guest. ``began_ns`` is when the walk began; what it missed is named in ``gaps``."""

    began_ns: int
    processes: tuple[GuestProcess, ...]
    sockets: tuple[GuestSocket, ...]
    gaps: tuple[Gap, ...] = ()
    torn: int = 0  # entries dropped because they did not re-validate
    took_ns: int = 0


# -- the knot --


class Match(StrEnum):
    """How a flow found its process."""

    EXACT = "exact"  # a socket with this very tuple
    LISTENER = "listener"  # a listening socket that this incoming connection goes to
    UNCONNECTED = "unconnected"  # an unconnected UDP socket bound to the local port
    KERNEL = "kernel"  # the guest's kernel itself speaks (ICMP echo, in-kernel sockets)
    NONE = "none"  # nobody: ``reason`` says why


class Reason(StrEnum):
    """Why a flow has no process, or which doubt is left."""

    LATE = "late"  # the socket was gone before we looked
    TORN = "torn"  # three tries, each one contradicted itself
    ORPHAN = "orphan"  # a socket without a file: its process has closed it
    TIME_WAIT = "time-wait"  # only the mini socket is left, and no earlier owner is remembered
    FORWARDED = "forwarded"  # the local address is none of the guest's own sockets: the guest routes or NATs it
    RAW = "raw"  # no socket of this tuple, but a process holds a raw or packet socket that can send it
    HIDDEN = "hidden"  # the connection lives on and no socket or no listed process owns it
    CLOSED = "closed"  # incoming, and nobody listens there: the guest's kernel refuses or ignores it
    NO_MEMORY = "no-memory"  # this guest is watched by its packets only
    AMBIGUOUS = "ambiguous"  # several unrelated processes hold the socket; all are listed


@dataclass(frozen=True, slots=True)
class Finding:
    """The guest eye's answer to "who owns this tuple?" at one instant, already re-validated.

    ``reason`` is None while there simply is no socket of this tuple: whether that means "late" or "hidden" only the
    flow's further life can tell, and bind decides it.
    """

    match: Match
    owners: tuple[Owner, ...] = ()
    socket: GuestSocket | None = None
    reason: Reason | None = None
    evidence: tuple[Evidence, ...] = ()
    torn: int = 0  # tries that contradicted themselves
    final: bool = False  # asking again cannot change the answer


@dataclass(frozen=True, slots=True)
class Evidence:
    """One claim about guest memory: what, where, and the bytes that show it."""

    claim: str  # one sentence
    kind: str = ""  # a stable word for machines: anon-exec, odd-path, deleted-file, modified-text, ptrace, ...
    address: int = 0  # guest VA
    size: int = 0
    sha256: str | None = None
    detail: str | None = None  # a path, protection bits, a thread id, first bytes in hex
    weight: int = 0  # 0 context, 1 unusual, 2 suspicious on its own


@dataclass(frozen=True, slots=True)
class Opinion:
    """What an engine that is not ours says of a process. ``trouble``: what kept it from saying all, or anything."""

    process: ProcessKey
    evidence: tuple[Evidence, ...] = ()
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """A flow tied to its process, or an honest "unknown" with the reason."""

    match: Match
    reason: Reason | None
    owners: tuple[Owner, ...]
    latency_ns: int  # from the flow's first packet to this answer
    attempts: int = 1
    socket: GuestSocket | None = None

    @property
    def process(self) -> GuestProcess | None:
        """The oldest of the processes that share the socket; ``owners`` lists them all, oldest first."""
        return self.owners[0].process if self.owners else None


# -- the judge --


class Decision(StrEnum):
    """What the rules say of one flow."""

    ALLOW = "allow"
    DENY = "deny"


class Severity(StrEnum):
    """How loud a verdict is."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Ask:
    """How long a person has to decide on a held flow, and what becomes of it if nobody does."""

    seconds: float = 60.0
    default: Decision = Decision.ALLOW


@dataclass(frozen=True, slots=True)
class RuleRef:
    """Where a verdict comes from: the entry's file and line, its profile, and the version of the rule set."""

    file: str
    line: int
    profile: str
    ruleset: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The rules' answer: decision, the entry behind it, and what it asks for."""

    decision: Decision
    rule: RuleRef
    alert: bool = False  # a person should see it
    severity: Severity = Severity.INFO
    tags: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    because: str = ""
    enforce: bool = False
    ask: Ask = Ask()  # where ``actions`` let a person decide


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged flow: the record queue's row."""

    flow: Flow
    binding: Binding
    judgement: Judgement
    at_ns: int
    evidence: tuple[Evidence, ...] = ()
    names: tuple[str, ...] = ()  # DNS names by which the guest knows the remote address
    rules_version: str = ""
    new_process: bool = False  # this flow added its process to the process queue
    parasitic: bool = False  # denied, and foreign code was found in the process (P15)
    handling: Handling | None = None  # what the hand did; None: nothing was asked of it, or there is no hand


# -- the hand --


class Act(StrEnum):
    """What the hand does to one flow."""

    RELEASE = "release"  # a held flow goes on: what was held is sent on, unchanged
    BLOCK = "block"  # its packets are dropped, both ways; a held TCP connection is refused to a guest that opens it
    RESET = "reset"  # both ends of an established TCP connection are told that it is over; then as BLOCK
    HOLD = "hold"  # its packets wait until a person decides, or until the deadline
    REDIRECT = "redirect"  # its packets go to a decoy, with their addresses as they are


@dataclass(frozen=True, slots=True)
class Handling:
    """What the hand did to a flow. ``done`` is False where it could not: the flow was gone, the decoy is unknown."""

    act: Act
    done: bool
    held_ns: int | None = None  # how long the flow waited; None: it did not wait, or it still waits for a person


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """Which new flows of one guest wait for a verdict, by their first packets.

    TCP without a SYN waits in both directions where any does: who began it is a guess. Where new outgoing flows wait,
    what cannot be placed in a flow does not leave, and with DENY by default nor do protocols that carry none.
    """

    outgoing: bool = True
    incoming: bool = True
    payload: bool = False  # the initiator's first payload waits, not its SYN
    deadline_s: float = 1.0  # at most 3: a SYN is repeated after 1 s
    default: Decision = Decision.ALLOW  # what becomes of a flow that has no verdict by then


@dataclass(frozen=True, slots=True)
class Decoy:
    """The far end of a redirect: a port on the same layer 2, and the MAC address behind it."""

    name: str
    port: GuestPort
    mac: str


# -- hosts --


@dataclass(frozen=True, slots=True)
class GuestPort:
    """One network port of a guest, on the host. ``netns`` is a path to open, None for our own namespace."""

    ifname: str
    mac: str | None = None
    netns: str | None = None
    ifindex: int | None = None


class GuestState(StrEnum):
    """What a guest that is here does now."""

    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"  # it is being migrated to this host, or restored: its memory is not complete
    CRASHED = "crashed"  # its kernel gave up, and what holds it was kept


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A guest that is here: what the inventory knows of it."""

    id: GuestId
    pid: int | None = None  # of its QEMU
    memory_bytes: int | None = None
    ports: tuple[GuestPort, ...] = ()
    routes: tuple[str, ...] = ()  # memory routes that can reach it, best first
    notes: tuple[str, ...] = field(default=())  # why an eye cannot see it
    domid: int | None = None  # of its Xen domain: another one after each reboot
    hypervisor: str | None = None  # "qemu", "xen"; None: what is looked at is no running guest
    state: GuestState = GuestState.RUNNING
    tags: tuple[str, ...] = ()  # what its operator calls it, for ``applies_to`` of the rules
    manager: str | None = None  # "libvirt", "xen": who starts it again by its name or UUID; None: nobody known
    wanted: bool | None = None  # whether its metadata asks for a watch, or forbids it; None: says nothing


class Change(StrEnum):
    """What a hypervisor tells of a guest while it happens. A hint to look again, never the state itself."""

    STARTED = "started"
    ENDED = "ended"
    PAUSED = "paused"
    RESUMED = "resumed"
    REBOOTED = "rebooted"  # the same virtual machine, another kernel soon
    REVERTED = "reverted"  # to a snapshot: time went backwards inside
    MIGRATED = "migrated"  # its memory is complete now
    CRASHED = "crashed"
    DEVICES = "devices"  # a port has come or gone
    DESCRIBED = "described"  # name, metadata


@dataclass(frozen=True, slots=True)
class GuestChange:
    """One such hint; ``uuid`` is None where only the hypervisor as a whole is known to have changed."""

    what: Change
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether something optional is here; where it is not, why, and the exact command that mends it."""

    name: str
    ok: bool
    reason: str
    remedy: str | None = None
    required: bool = True  # False: Parasight works without it, only less well


def ip_text(ip: IpAddress) -> str:
    """Print an address as ``ss`` does: a v4-mapped address keeps its dotted form on every Python version."""
    if ip.version == 6 and (mapped := ip.ipv4_mapped) is not None:
        return f"::ffff:{mapped}"
    return str(ip)
