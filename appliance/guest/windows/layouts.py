"""Where tcpip.sys keeps its connections, by build: one page of data, each row with its sources.

tcpip.sys has no public types. A row is a first guess only, chosen by the guest's build; `measure` verifies it against
the guest's own memory before anything read with it is believed. Offsets are in bytes from the object's start; ports
are big-endian (network order), all else little-endian.
Sources: `netscan-*` names a table of volatility3 (framework/symbols/windows/netscan), which is where those numbers
were found; `vmmnet` is MemProcFS vmm/vmmnet.c (the second linkage, _TCP_TIMEWAIT_ENDPOINT, 26100). Hash tables:
Microsoft's RTL_DYNAMIC_HASH_TABLE (nt symbols; the same code is public as src/platform/hashtable.c of MsQuic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


def _tags(*names: bytes) -> frozenset[bytes]:
    """Pool tags, also as they are when the highest bit of the last character marks a protected allocation."""
    return frozenset(names) | {name[:3] + bytes((name[3] | 0x80,)) for name in names}


# Pool tags (volatility3 plugins/windows/netscan.py, vmmnet; TTcb: since 20348).
TCP_TAGS: Final = _tags(b"TcpE", b"TTcb")
LISTENER_TAGS: Final = _tags(b"TcpL")
UDP_TAGS: Final = _tags(b"UdpA")
TIME_WAIT_TAGS: Final = _tags(b"TcTW")
FAMILY_TAGS: Final = _tags(b"InNl")
COMPARTMENT_TAGS: Final = _tags(b"InCo")
PATH_TAGS: Final = _tags(b"IPpa")

AF_INET, AF_INET6 = 2, 23  # ws2def.h
ADDRESS_SIZE: Final = {AF_INET: 4, AF_INET6: 16}

# TCPStateEnum (netscan-*), told with the names that Linux has for them.
CLOSED, LISTEN, SYN_SENT, SYN_RCVD, ESTABLISHED, TIME_WAIT, LAST_STATE = 0, 1, 2, 3, 4, 12, 13
STATES: Final = {
    0: "CLOSE",
    1: "LISTEN",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "ESTABLISHED",
    5: "FIN_WAIT1",
    6: "FIN_WAIT2",
    7: "CLOSE_WAIT",
    8: "CLOSING",
    9: "LAST_ACK",
    12: "TIME_WAIT",
    13: "CLOSE",  # DELETE_TCB
}


class Tcp(NamedTuple):
    """_TCP_ENDPOINT. It is linked into two tables: by ``links[0]`` into the first, by ``links[1]`` into the second."""

    inet_af: int
    addr_info: int
    links: tuple[int, int]
    state: int
    local_port: int
    remote_port: int
    owner: int  # _EPROCESS *

    def size(self, pointer: int) -> int:
        """Bytes to read of one."""
        return max(self.owner + pointer, self.remote_port + 2, self.links[1] + 2 * pointer)


class Bound(NamedTuple):
    """_TCP_LISTENER or _UDP_ENDPOINT: what is bound to a port. ``next`` links those of one port."""

    inet_af: int
    owner: int
    local: int  # pointer to its address; null: any address
    port: int
    next: int
    direct: bool = False  # the local address lies behind two pointers rather than three (UDP since Windows 10)
    remote_port: int | None = None  # of a connected UDP socket
    path: int | None = None  # pointer to the path (pool tag IPpa) of a connected UDP socket
    path_address: int | None = None  # the remote address in the path

    def size(self, pointer: int) -> int:
        """Bytes to read of one."""
        last = (self.inet_af, self.owner, self.local, self.port, self.next, self.path or 0, self.remote_port or 0)
        return max(last) + pointer


class TimeWait(NamedTuple):
    """_TCP_TIMEWAIT_ENDPOINT: the owner is forgotten."""

    links: tuple[int, ...]
    inet_af: int
    local_port: int
    remote_port: int
    local: int
    remote: int
    inline: bool = False  # the remote address itself, of 16 bytes, rather than a pointer to it

    def size(self, pointer: int) -> int:
        """Bytes to read of one."""
        return max(self.local + pointer, self.remote + (16 if self.inline else pointer))


class PortPool(NamedTuple):
    """_INET_PORT_POOL and below: 256 assignments, each with a list of 256 entries."""

    bitmap: int  # RTL_BITMAP
    assignments: int  # _PORT_ASSIGNMENT *[256]
    list: int  # in _PORT_ASSIGNMENT: pointer to the list of entries
    stride: int  # of the entries
    entry: int  # in an entry: a tagged pointer to the `next` member of what is bound


class Compartments(NamedTuple):
    """*CompartmentSet -> _INET_COMPARTMENT -> _PROTOCOL_COMPARTMENT -> _INET_PORT_POOL."""

    compartment: int
    protocol: int
    pool: int


_COMPARTMENTS: Final = Compartments(0x148, 0x20, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """One family of builds."""

    name: str
    source: str
    first: int  # build
    last: int
    pointer: int
    family: int  # in INETAF: AddressFamily, 16 bits
    remote: int  # in ADDRINFO: pointer to the remote address; the local one comes first
    local_data: int  # in _LOCAL_ADDRESS: pData
    tcp: Tcp
    listener: Bound
    udp: Bound
    pool: PortPool | None
    stride: int  # of _PARTITION
    tables: tuple[int, int, int]  # in _PARTITION: pointers to hash tables, for links[0], links[1], and what else
    time_wait: TimeWait | None = None
    compartments: Compartments = _COMPARTMENTS
    known: bool = True  # its owner was found in these very builds by others; False: it must be measured here first


def _tcp(state: int, owner: int, inet_af: int = 0x10, links: tuple[int, int] = (0x28, 0x40), pointer: int = 8) -> Tcp:
    return Tcp(inet_af, inet_af + pointer, links, state, state + 4, state + 6, owner)


# x64: vmmnet has the second linkage at +40 and _TCP_TIMEWAIT_ENDPOINT (two linkages, then INETAF) for all builds.
_LISTENER_OLD = Bound(inet_af=0x60, owner=0x28, local=0x58, port=0x6A, next=0x70)
_LISTENER_10 = Bound(inet_af=0x28, owner=0x30, local=0x60, port=0x72, next=0x78)
_LISTENER_26100 = Bound(inet_af=0x30, owner=0x38, local=0x68, port=0x7A, next=0x80)
_UDP_OLD = Bound(inet_af=0x20, owner=0x28, local=0x60, port=0x80, next=0x88)
_UDP_81 = Bound(inet_af=0x20, owner=0x28, local=0x60, port=0x78, next=0x70)
_UDP_10 = Bound(inet_af=0x20, owner=0x28, local=0x80, port=0x78, next=0x70, direct=True)
_UDP_18363 = Bound(inet_af=0x20, owner=0x28, local=0x88, port=0x80, next=0x70, direct=True)
# vmmnet names the address in the path for 22000 and 26100; before it is the same place until a guest shows another.
_UDP_19041 = Bound(0x20, 0x28, 0xA8, 0xA0, 0x70, True, remote_port=0x110, path=0x120, path_address=0xC0)
_UDP_26100 = Bound(0x28, 0x30, 0xB0, 0xA8, 0x78, True, remote_port=0x110, path=0x120, path_address=0xD8)
_TW_7 = TimeWait((0, 0x18), 0x30, 0x48, 0x4A, 0x50, 0x58)
_TW_OLD = TimeWait((0,), 0x18, 0x30, 0x32, 0x38, 0x40)
_TW_10 = TimeWait((0, 0x18), 0x30, 0x4A, 0x4C, 0x50, 0x58, inline=True)
_POOL_7 = PortPool(0x90, 0xA0, 0x20, 0x10, 8)
_POOL_8 = PortPool(0xA0, 0xB0, 0x20, 0x10, 8)
_POOL_81 = PortPool(0xA0, 0xB0, 0x20, 0x18, 8)
_POOL_81_LATE = PortPool(0xC8, 0xD8, 0x18, 0x18, 8)
_POOL_10 = PortPool(0xD8, 0xE8, 0x18, 0x18, 8)
_POOL_18362 = PortPool(0xD0, 0xE0, 0x18, 0x18, 8)
_POOL_19041 = PortPool(0xD0, 0xE0, 0x18, 0x20, 0x10)
_TABLES_X64 = (8, 0x10, 0)


def _x64(
    name: str,
    source: str,
    builds: tuple[int, int],
    tcp: Tcp,
    listener: Bound,
    udp: Bound,
    pool: PortPool | None,
    time_wait: TimeWait,
    *,
    family: int = 0x18,
    stride: int = 0x80,
    known: bool = True,
) -> Layout:
    return Layout(
        name, source, *builds, 8, family, 0x10, 0x10, tcp, listener, udp, pool, stride, _TABLES_X64, time_wait,
        known=known,
    )  # fmt: skip


_V3 = "volatility3 netscan-{}.json"


def _win10(name: str, builds: tuple[int, int], owner: int, udp: Bound, pool: PortPool, stride: int = 0x80) -> Layout:
    source = _V3.format(name)
    return _x64(name, source, builds, _tcp(0x6C, owner), _LISTENER_10, udp, pool, _TW_10, stride=stride)


_VISTA_TCP = Tcp(0x18, 0x20, (0x28, 0x40), 0x50, 0x54, 0x56, 0x208)
_WIN7_TCP = Tcp(0x18, 0x20, (0x28, 0x40), 0x68, 0x6C, 0x6E, 0x238)

X64: Final = (
    _x64("vista-x64", _V3.format("vista-x64"), (6000, 6000), _VISTA_TCP,
         _LISTENER_OLD, _UDP_OLD, None, _TW_OLD, family=0x14, known=False),
    _x64("vista-sp12-x64", _V3.format("vista-sp12-x64"), (6001, 6003), _VISTA_TCP._replace(owner=0x210),
         _LISTENER_OLD, _UDP_OLD, None, _TW_OLD, family=0x14, known=False),
    _x64("win7-x64", _V3.format("win7-x64"), (7600, 8400), _WIN7_TCP,
         _LISTENER_OLD, _UDP_OLD, _POOL_7, _TW_7, family=0x14),
    _x64("win8-x64", _V3.format("win8-x64"), (9200, 9200), _tcp(0x6C, 0x250),
         _LISTENER_OLD, _UDP_OLD, _POOL_8, _TW_OLD),
    _x64("win81-x64", _V3.format("win81-x64"), (9600, 9600), _tcp(0x6C, 0x258),
         _LISTENER_OLD, _UDP_81, _POOL_81, _TW_OLD),
    _x64("win81-19935-x64", _V3.format("win81-19935-x64"), (9600, 9600), _tcp(0x6C, 0x260),
         _LISTENER_OLD, _UDP_81, _POOL_81_LATE, _TW_OLD),
    # The port pool of these three is that of 15063: netscan-win10-x64 has none.
    _win10("win10-x64", (10240, 14393), 0x258, _UDP_10, _POOL_10),
    _win10("win10-15063-x64", (15063, 15063), 0x270, _UDP_10, _POOL_10),
    _win10("win10-16299-x64", (16299, 16299), 0x270, _UDP_10, _POOL_10),
    _win10("win10-17134-x64", (17134, 17134), 0x278, _UDP_10, _POOL_10),
    _win10("win10-17763-x64", (17763, 17763), 0x2C8, _UDP_10, _POOL_10),
    _win10("win10-18362-x64", (18362, 18363), 0x290, _UDP_10, _POOL_18362),
    # 1909 tells 18362 too; its _UDP_ENDPOINT says which of the two it is.
    _win10("win10-18363-x64", (18362, 18363), 0x290, _UDP_18363, _POOL_18362),
    _win10("win10-19041-x64", (19041, 19045), 0x2D8, _UDP_19041, _POOL_19041, stride=0xC0),
    _win10("win10-20348-x64", (20348, 20349), 0x2F0, _UDP_19041, _POOL_19041, stride=0xC0),
    _x64("win11-22000-x64", "vmmnet; owner as netscan-win10-20348-x64", (22000, 25398), _tcp(0x6C, 0x2F0),
         _LISTENER_10, _UDP_19041, _POOL_19041, _TW_10, stride=0xC0, known=False),
    _x64("win11-22000-late-x64", "vmmnet: State at 70", (22000, 25398), _tcp(0x70, 0x2F0),
         _LISTENER_10, _UDP_19041, _POOL_19041, _TW_10, stride=0xC0, known=False),
    _x64("win11-26100-x64", "vmmnet; owner unknown: to be measured", (26100, 1 << 31), _tcp(0x70, 0x2F0),
         _LISTENER_26100, _UDP_26100, _POOL_19041, _TW_10, stride=0xC0, known=False),
)  # fmt: skip


def _x86(
    name: str,
    builds: tuple[int, int],
    tcp: Tcp,
    listener: Bound,
    udp: Bound,
    pool: PortPool | None,
    *,
    remote: int = 0xC,
    stride: int = 0x40,
    compartments: Compartments = _COMPARTMENTS,
) -> Layout:
    """The second linkage is derived: LIST_ENTRY and Signature take 12 bytes (`netscan-win10-10586-x86` names it)."""
    return Layout(
        name, _V3.format(name), *builds, 4, 0xC, remote, 0xC, tcp, listener, udp, pool, stride, (4, 8, 0),
        compartments=compartments,
    )  # fmt: skip


_LINKS_X86 = (0x14, 0x20)
_LISTENER_X86 = Bound(inet_af=0x38, owner=0x18, local=0x34, port=0x3E, next=0x40)
_LISTENER_15063_X86 = _LISTENER_X86._replace(next=0x48)
_UDP_X86 = Bound(inet_af=0x14, owner=0x18, local=0x38, port=0x48, next=0x4C)
_POOL_7_X86 = PortPool(0x50, 0x58, 0x14, 8, 4)
_POOL_10_X86 = PortPool(0x90, 0x98, 0x10, 8, 4)
_VISTA_X86 = Tcp(0xC, 0x10, _LINKS_X86, 0x28, 0x2C, 0x2E, 0x160)
_WIN7_X86 = Tcp(0xC, 0x10, _LINKS_X86, 0x34, 0x38, 0x3A, 0x174)


def _tcp_x86(owner: int) -> Tcp:
    return _tcp(0x38, owner, 8, _LINKS_X86, 4)


X86: Final = (
    _x86("vista-x86", (6000, 6003), _VISTA_X86, _LISTENER_X86, _UDP_X86, None, remote=8),
    _x86("win7-x86", (7600, 8400), _WIN7_X86, _LISTENER_X86, _UDP_X86, _POOL_7_X86, remote=8),
    _x86("win8-x86", (9200, 9200), _tcp_x86(0x174), _LISTENER_X86, _UDP_X86, None),
    _x86("win81-x86", (9600, 9600), _tcp_x86(0x1A8), _LISTENER_X86, _UDP_X86, None),
    _x86("win10-10240-x86", (10240, 10240), _tcp_x86(0x1B0),
         Bound(inet_af=0x40, owner=0x1C, local=0x3C, port=0x46, next=0x48), _UDP_X86, _POOL_10_X86),
    _x86("win10-10586-x86", (10586, 10586), Tcp(0, 4, _LINKS_X86, 0x30, 0x34, 0x36, 0x1A8),
         Bound(inet_af=0x10, owner=0x14, local=0x34, port=0x3E, next=0x48),
         Bound(inet_af=0x34, owner=0x10, local=0x30, port=0x3C, next=0x40), _POOL_10_X86, stride=0x48),
    _x86("win10-14393-x86", (14393, 14393), _tcp_x86(0x1B4), _LISTENER_X86, _UDP_X86, None),
    _x86("win10-15063-x86", (15063, 16299), _tcp_x86(0x1CC), _LISTENER_15063_X86, _UDP_X86, _POOL_10_X86,
         compartments=Compartments(0x144, 0x14, 0)),
    _x86("win10-17134-x86", (17134, 19045), _tcp_x86(0x1CC), _LISTENER_15063_X86, _UDP_X86._replace(port=0x44),
         _POOL_10_X86, compartments=Compartments(0x144, 0x14, 0)),
)  # fmt: skip


def candidates(build: int, pointer: int) -> tuple[tuple[Layout, ...], bool]:
    """The rows to try for a build, best first, and whether the build is a known one.

    All rows of the pointer size follow those of the build, nearest first: what a row says is only believed once it is
    verified, and of an unknown build the neighbours are likelier than strangers.
    """
    rows = X64 if pointer == 8 else X86
    own = tuple(row for row in rows if row.first <= build <= row.last)
    others = sorted((row for row in rows if row not in own), key=lambda row: abs(row.first - build))
    known = any(row.known for row in own)
    return own + tuple(others), known
