"""drgn on a live guest: its processes, and its sockets through their file descriptors.

Written with drgn's own helpers, as its users write it (drgn contrib/ and tools/).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Literal, NamedTuple

from drgn import Architecture, Object, Platform, Program, cast, container_of
from drgn.helpers.linux.cgroup import cgroup_path
from drgn.helpers.linux.fs import d_path, for_each_file
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import cmdline
from drgn.helpers.linux.net import sk_nulls_for_each

from appliance.guest.kernel import Kernel
from plugins.parasight.btf import Btf
from tests.against.drgn_types import BtfFinder, add_symbols
from tests.against.symbols import read_vmcoreinfo

AF_INET, AF_INET6, AF_PACKET = 2, 10, 17
End = tuple[IPv4Address | IPv6Address, int]
FAMILIES = (AF_INET, AF_INET6, AF_PACKET)
VARIABLES = {
    "init_task": "struct task_struct",
    "init_pid_ns": "struct pid_namespace",
    "socket_file_ops": "struct file_operations",
    "tcp_hashinfo": "struct inet_hashinfo",
}


@dataclass(frozen=True, slots=True)
class Held:
    """A socket and one descriptor that holds it."""

    pid: int
    name: str
    fd: int
    sock: int
    family: int
    kind: int  # SOCK_STREAM 1, SOCK_DGRAM 2, SOCK_RAW 3
    protocol: int
    state: int
    local: End | None = None
    remote: End | None = None
    netns: int = 0


class Described(NamedTuple):
    """A process, as drgn describes it."""

    name: str
    path: bytes | None
    command: bytes | None
    parent_pid: int
    uid: int
    started_ns: int
    cgroup: bytes
    netns: int


def open_program(kernel: Kernel, types: Btf, symbols: dict[str, int], *, paging: Literal["drgn", "linear"]) -> Program:
    """A program on the guest's memory.

    ``paging='drgn'`` gives drgn physical memory only: it walks the guest's page tables itself, sharing nothing with
    us. ``'linear'`` gives it the direct map and the kernel image as virtual segments, which is far faster.
    """
    prog = Program(Platform(Architecture.X86_64))
    memory, image = kernel.memory, kernel.image

    def physical(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return memory.read(address, count)

    def direct(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return memory.read(address - kernel.page_offset, count)

    def in_image(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        return memory.read(address - image.va + image.gpa, count)

    for region in memory.regions:
        prog.add_memory_segment(region.gpa, region.size, physical, physical=True)
    prog.set_linux_kernel_custom(read_vmcoreinfo(kernel, symbols), True)
    if paging == "linear":
        for region in memory.regions:
            prog.add_memory_segment(kernel.page_offset + region.gpa, region.size, direct)
        prog.add_memory_segment(image.va, image.size, in_image)
    BtfFinder(prog, types, {name: (kind, symbols[name]) for name, kind in VARIABLES.items() if name in symbols})
    add_symbols(prog, symbols)
    return prog


def walk_processes(prog: Program) -> Iterator[Object]:
    """Every thread-group leader but the idle task."""
    yield from list_for_each_entry("struct task_struct", prog["init_task"].tasks.address_of_(), "tasks")


def list_processes(prog: Program) -> dict[int, str]:
    """Pid to name."""
    return {task.pid.value_(): _name(task) for task in walk_processes(prog)}


def describe_processes(prog: Program) -> dict[int, Described]:
    """What a person wants to know of each process, by drgn's helpers."""
    return {task.pid.value_(): _describe(task) for task in walk_processes(prog)}


def _describe(task: Object) -> Described:
    path = command = None
    if task.mm:
        path = d_path(task.mm.exe_file.f_path)
        command = b" ".join(cmdline(task) or ())
    return Described(
        _name(task),
        path,
        command,
        task.real_parent.tgid.value_(),
        task.real_cred.uid.val.value_(),
        task.start_boottime.value_(),
        cgroup_path(task.cgroups.dfl_cgrp),
        task.nsproxy.net_ns.ns.inum.value_(),
    )


def count_states(prog: Program) -> Counter[int]:
    """States in the table of TCP connections, where TIME_WAIT and SYN_RECV are too (drgn contrib/tcp_sock.py)."""
    table = prog["tcp_hashinfo"]
    return Counter(
        sock.__sk_common.skc_state.value_()
        for bucket in range(table.ehash_mask.value_() + 1)
        for sock in sk_nulls_for_each(table.ehash[bucket].chain)
    )


def list_sockets(prog: Program) -> list[Held]:
    """Every internet and packet socket of every descriptor of every process."""
    return list(walk_sockets(prog))


def find_socket(prog: Program, local: End, remote: End) -> Held | None:
    """Who holds a connection: the walk ends where it is found."""
    return next((held for held in walk_sockets(prog) if held.local == local and held.remote == remote), None)


def walk_sockets(prog: Program) -> Iterator[Held]:
    """Yield them one by one."""
    operations = prog["socket_file_ops"].address_
    for task in walk_processes(prog):
        if not task.files:
            continue
        for fd, file in for_each_file(task):
            if file.f_op.value_() == operations:
                sock = cast("struct socket *", file.private_data).sk
                if sock and sock.__sk_common.skc_family.value_() in FAMILIES:
                    yield _held(task, fd, sock)


def _held(task: Object, fd: int, sock: Object) -> Held:
    common = sock.__sk_common
    family = common.skc_family.value_()
    local = remote = None
    if family != AF_PACKET:
        inet = container_of(sock, "struct inet_sock", "sk")
        port = int.from_bytes(inet.inet_sport.value_().to_bytes(2, "little"))
        far_port = int.from_bytes(common.skc_dport.value_().to_bytes(2, "little"))
        if family == AF_INET:
            near, far = (common.skc_rcv_saddr.value_().to_bytes(4, "little"), common.skc_daddr.value_())
            far = far.to_bytes(4, "little")
        else:
            near, far = (bytes(a.in6_u.u6_addr8.value_()) for a in (common.skc_v6_rcv_saddr, common.skc_v6_daddr))
        local, remote = (ip_address(near), port), (ip_address(far), far_port)
    return Held(
        task.tgid.value_(),
        _name(task),
        fd,
        sock.value_(),
        family,
        sock.sk_type.value_(),
        sock.sk_protocol.value_(),
        common.skc_state.value_(),
        local,
        remote,
        common.skc_net.net.ns.inum.value_(),
    )


def _name(task: Object) -> str:
    return task.comm.string_().decode(errors="replace")
