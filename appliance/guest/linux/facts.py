"""Every kernel fact the Linux eye uses, on one page, as data: members by name, each with its source.

A fact is looked up in the guest's own type information, never assumed and never derived from a version. Members are
written ``struct.member``; ``|`` separates the names that different kernels use (newest first) and a trailing ``?``
marks what may be missing (it then reads as 0, and what it would have told is a named gap). Renames, with their commits:

- ``task_struct.start_boottime``: ``real_start_time`` before cf25e24db61c (5.5)
- ``file.__f_path``: newer kernels make ``f_path`` a const alias of it of the same place
- ``file.f_ref``: replaces ``f_count`` since 90ee6ed776c0 (6.13); it counts from 0 (FILE_REF_ONEREF, file_ref.h)
- ``kernfs_node.__parent``: ``parent`` before 633488947ef6 (6.15)
- ``inet_listen_hashbucket.nulls_head`` and no ``inet_hashinfo.listening_hash``: cae3873c5b3a (5.19); before it, lhash2
  chains ran through ``inet_connection_sock.icsk_listen_portaddr_node``
- ``netns_ipv4.udp_table``: "udp: Access &udp_table via net" (6.2); before it, the symbol ``udp_table``
- ``dentry.d_children``/``d_sib``: da549bdd15c2 (6.8); before it, ``d_subdirs``/``d_child``
- ``tk_data``: 6.13 gave the structure of ``tk_core`` a name; before it, an anonymous one of the same beginning
"""

from __future__ import annotations

from typing import Final

from appliance.errors import UnsupportedGuest
from appliance.guest.kernel import Kernel
from appliance.guest.layout import Field
from appliance.guest.linux.record import Record

# struct -> (source, members in the order in which Record.parse returns them)
RECORDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "task": (
        "include/linux/sched.h",
        (
            "task_struct.tasks.next",
            "task_struct.tasks.prev",
            "task_struct.thread_node.next",
            "task_struct.pid",
            "task_struct.tgid",
            "task_struct.start_boottime|task_struct.real_start_time",
            "task_struct.comm",
            "task_struct.flags",
            "task_struct.mm",
            "task_struct.files",
            "task_struct.real_cred",
            "task_struct.real_parent",
            "task_struct.signal",
            "task_struct.nsproxy",
            "task_struct.thread_pid",
            "task_struct.cgroups?",
            "task_struct.fs",
            "task_struct.self_exec_id?",
        ),
    ),
    "identity": (  # a task's own: what makes it this process, running this program, as this user
        "include/linux/sched.h",
        (
            "task_struct.tgid",
            "task_struct.start_boottime|task_struct.real_start_time",
            "task_struct.files",
            "task_struct.mm",
            "task_struct.self_exec_id?",
            "task_struct.real_cred",
            "task_struct.real_parent",
            "task_struct.nsproxy",
            "task_struct.cgroups?",
            "task_struct.comm",
        ),
    ),
    "mm": (
        "include/linux/mm_types.h",
        ("mm_struct.exe_file", "mm_struct.arg_start", "mm_struct.arg_end", "mm_struct.pgd"),
    ),
    "file.path": (
        "include/linux/fs.h",
        ("file.__f_path.mnt|file.f_path.mnt", "file.__f_path.dentry|file.f_path.dentry"),
    ),
    "file": ("include/linux/fs.h", ("file.f_ref|file.f_count", "file.private_data")),
    "dentry": (
        "include/linux/dcache.h",
        (
            "dentry.d_parent",
            "dentry.d_name.len",
            "dentry.d_name.name",
            "dentry.d_hash.pprev",
            "dentry.d_inode",
        ),
    ),
    "mount": ("fs/mount.h", ("mount.mnt_parent", "mount.mnt_mountpoint", "mount.mnt.mnt_root")),
    "kernfs_node": ("include/linux/kernfs.h", ("kernfs_node.__parent|kernfs_node.parent", "kernfs_node.name")),
    "fdtable": ("include/linux/fdtable.h", ("fdtable.max_fds", "fdtable.fd")),
    "files": (
        "include/linux/fdtable.h",
        ("files_struct.fdt", "files_struct.fdtab.max_fds", "files_struct.fdtab.fd", "files_struct.fd_array"),
    ),
    "common": (  # what full sockets, request sockets and TIME_WAIT sockets share
        "include/net/sock.h",
        (
            "sock_common.skc_nulls_node.next",
            "sock_common.skc_hash",
            "sock_common.skc_rcv_saddr",
            "sock_common.skc_daddr",
            "sock_common.skc_num",
            "sock_common.skc_dport",
            "sock_common.skc_family",
            "sock_common.skc_state",
            "sock_common.skc_net.net",
            "sock_common.skc_flags",
            "sock_common.skc_v6_rcv_saddr?",
            "sock_common.skc_v6_daddr?",
            "sock_common.skc_ipv6only?",  # a bit; see Facts.ipv6only
            "sock_common.skc_bound_dev_if?",  # SO_BINDTODEVICE
        ),
    ),
    "sock": ("include/net/sock.h", ("sock.sk_socket", "sock.sk_uid")),
    "socket": ("include/linux/net.h", ("socket.file", "socket.sk")),
    "subflow": (  # an MPTCP connection's TCP socket belongs to the kernel; the process holds its parent
        "net/mptcp/protocol.h",
        ("mptcp_subflow_context.tcp_sock?", "mptcp_subflow_context.conn?"),
    ),
    "listen_node": ("include/net/inet_connection_sock.h", ("inet_connection_sock.icsk_listen_portaddr_node.next?",)),
    "inet_hashinfo": (
        "include/net/inet_hashtables.h",
        (
            "inet_hashinfo.ehash",
            "inet_hashinfo.ehash_mask",
            "inet_hashinfo.lhash2",
            "inet_hashinfo.lhash2_mask",
        ),
    ),
    "udp_table": ("include/net/udp.h", ("udp_table.hash", "udp_table.mask")),
    "net": (
        "include/net/net_namespace.h",
        (
            "net.list.next",
            "net.ns.inum",
            "net.hash_mix",
            "net.dev_base_head.next",
            "net.ipv4.tcp_death_row.hashinfo?",
            "net.ipv4.udp_table?",
            "net.packet.sklist.first?",
        ),
    ),
    "net_device": (
        "include/linux/netdevice.h",
        ("net_device.dev_list.next", "net_device.ip_ptr", "net_device.ip6_ptr?", "net_device.promiscuity?"),
    ),
    "in_ifaddr": (
        "include/linux/inetdevice.h",
        ("in_ifaddr.ifa_next", "in_ifaddr.ifa_local", "in_ifaddr.ifa_broadcast", "in_ifaddr.ifa_mask"),
    ),
    "inet6_ifaddr": ("include/net/if_inet6.h", ("inet6_ifaddr.if_list.next?", "inet6_ifaddr.addr?")),
    "timekeeper": ("include/linux/timekeeper_internal.h", ("timekeeper.offs_real?", "timekeeper.offs_boot?")),
    "inode": ("include/linux/fs.h", ("inode.i_size", "inode.i_mapping", "inode.i_mode")),
}

# single offsets: name -> member
OFFSETS: Final[dict[str, str]] = {
    "task.tasks": "task_struct.tasks",
    "task.thread_node": "task_struct.thread_node",
    "task.tgid": "task_struct.tgid",
    "signal.thread_head": "signal_struct.thread_head",  # include/linux/sched/signal.h
    "cred.uid": "cred.uid",  # include/linux/cred.h; the value in the initial user namespace
    "nsproxy.net_ns": "nsproxy.net_ns",  # include/linux/nsproxy.h
    "pid.level": "pid.level",  # include/linux/pid.h
    "pid.numbers": "pid.numbers",
    "css_set.dfl_cgrp": "css_set.dfl_cgrp?",  # include/linux/cgroup-defs.h
    "css_set.subsys": "css_set.subsys?",
    "css.cgroup": "cgroup_subsys_state.cgroup?",
    "cgroup.kn": "cgroup.kn?",
    "mount.mnt": "mount.mnt",  # fs/mount.h
    "files.fdt": "files_struct.fdt",
    "files.fdtab": "files_struct.fdtab",
    "files.fd_array": "files_struct.fd_array",
    "fdtable.fd": "fdtable.fd",
    "file.private_data": "file.private_data",  # include/linux/fs.h
    "file.f_ref": "file.f_ref?",
    "socket.file": "socket.file",  # include/linux/net.h
    "socket.sk": "socket.sk",
    "sk.node": "sock_common.skc_nulls_node",  # the same place as skc_node: a union
    "tw.substate": "inet_timewait_sock.tw_substate",  # include/net/inet_timewait_sock.h
    "icsk.listen_node": "inet_connection_sock.icsk_listen_portaddr_node?",
    "icsk.ulp_data": "inet_connection_sock.icsk_ulp_data?",
    "hashinfo.listening_hash": "inet_hashinfo.listening_hash?",
    "lhash2.head": "inet_listen_hashbucket.nulls_head|inet_listen_hashbucket.head",
    "udp_hslot.head": "udp_hslot.head",
    "raw.ht": "raw_hashinfo.ht?",  # include/net/raw.h
    "ping.hash": "ping_table.hash?",  # net/ipv4/ping.c
    "net.list": "net.list",
    "net.dev_base_head": "net.dev_base_head",
    "net.packet.sklist": "net.packet.sklist?",
    "net_device.dev_list": "net_device.dev_list",
    "in_device.ifa_list": "in_device.ifa_list",
    "in_device.forwarding": "in_device.cnf.data?",  # its first: IPV4_DEVCONF_FORWARDING, include/uapi/linux/ip.h
    "inet6_dev.addr_list": "inet6_dev.addr_list?",
    "inet6_dev.forwarding": "inet6_dev.cnf.forwarding?",  # include/linux/ipv6.h
    "inet6_ifaddr.if_list": "inet6_ifaddr.if_list?",
    "tk_data.timekeeper": "tk_data.timekeeper?",
    "fs.root.mnt": "fs_struct.root.mnt",  # include/linux/fs_struct.h
    "fs.root.dentry": "fs_struct.root.dentry",
    "dentry.children": "dentry.d_children.first|dentry.d_subdirs.next",
    "dentry.sibling": "dentry.d_sib.next|dentry.d_child.next",
    "address_space.xa_head": "address_space.i_pages.xa_head?",
    "xa_node.shift": "xa_node.shift?",  # include/linux/xarray.h
    "xa_node.slots": "xa_node.slots?",
}

# sizes of structures that stand in arrays
SIZES: Final[dict[str, str]] = {
    "seqcount": "seqcount_raw_spinlock|seqcount",  # include/linux/seqlock.h: larger with PREEMPT_RT
    "inet_ehash_bucket": "inet_ehash_bucket",
    "inet_listen_hashbucket": "inet_listen_hashbucket",
    "udp_hslot": "udp_hslot",
    "upid": "upid",
    "page": "page",
}

# symbol -> whether it is needed
SYMBOLS: Final[dict[str, bool]] = {
    "init_task": True,  # init/init_task.c
    "init_net": True,  # net/core/net_namespace.c
    "net_namespace_list": True,
    "tcp_hashinfo": False,  # net/ipv4/tcp_ipv4.c; per namespace where the namespace names it
    "udp_table": False,  # net/ipv4/udp.c
    "udplite_table": False,  # net/ipv4/udplite.c
    "raw_v4_hashinfo": False,  # net/ipv4/raw.c
    "raw_v6_hashinfo": False,  # net/ipv6/raw.c
    "ping_table": False,  # net/ipv4/ping.c
    "tk_core": False,  # kernel/time/timekeeping.c
    "timekeeper_data": False,
}

PF_KTHREAD: Final = 0x0020_0000  # include/linux/sched.h
SOCK_DEAD: Final = 0  # bit of sk_flags, enum sock_flags (include/net/sock.h): the process has closed it
TCP_STATES: Final = {  # include/net/tcp_states.h
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "FIN_WAIT1",
    5: "FIN_WAIT2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "SYN_RECV",  # TCP_NEW_SYN_RECV: a request socket; ss and /proc show SYN_RECV
}
TIME_WAIT: Final = 6
LISTEN: Final = 10
NEW_SYN_RECV: Final = 12
AF_INET: Final = 2
AF_INET6: Final = 10
LISTENING_NULLS_BASE: Final = 1 << 29  # include/net/inet_hashtables.h


class Facts:
    """The facts of one guest, resolved to plain integers. Raises UnsupportedGuest naming everything that is missing."""

    def __init__(self, kernel: Kernel) -> None:
        self._types = kernel.types
        self.missing: list[str] = []
        self.records = {name: self._record(name, members) for name, (_, members) in RECORDS.items()}
        self._offsets = {name: self._field(member) for name, member in OFFSETS.items()}
        self._sizes = {name: self._size(struct) for name, struct in SIZES.items()}
        self._symbols = {name: self._symbol(kernel, name, needed) for name, needed in SYMBOLS.items()}
        only = self._field("sock_common.skc_ipv6only?")
        self.ipv6only = 0 if only is None else 1 << only.bit  # mask in the byte that holds the bit
        if self.missing:
            raise UnsupportedGuest(tuple(self.missing))

    def record(self, name: str) -> Record:
        """A record of RECORDS."""
        record = self.records[name]
        assert record is not None  # checked in the constructor
        return record

    def offset(self, name: str) -> int:
        """An offset that this kernel is known to have."""
        field = self._offsets[name]
        if field is None:
            raise UnsupportedGuest((f"member {OFFSETS[name].rstrip('?')}",))
        return field.offset

    def find(self, name: str) -> int | None:
        """An offset, None where this kernel has no such member."""
        field = self._offsets[name]
        return None if field is None else field.offset

    def length(self, name: str) -> int:
        """Elements of an array member, 0 where there is none."""
        field = self._offsets[name]
        return 0 if field is None else field.length

    def size(self, name: str) -> int:
        """Size of a structure of SIZES."""
        return self._sizes[name]

    def symbol(self, name: str) -> int | None:
        """Address of a symbol of SYMBOLS."""
        return self._symbols[name]

    def needed(self, name: str) -> int:
        """Address of a symbol that the constructor has checked."""
        address = self._symbols[name]
        assert address is not None
        return address

    def _record(self, name: str, members: tuple[str, ...]) -> Record | None:
        fields = [self._field(member) for member in members]
        if all(field is None for field in fields):
            return Record(name, [Field(0, 8)] + [None] * (len(fields) - 1))
        try:
            return Record(name, fields)
        except UnsupportedGuest as error:
            self.missing.extend(error.missing)
            return None

    def _field(self, member: str) -> Field | None:
        for path in member.rstrip("?").split("|"):
            if self._types.has(path):
                return self._types.field(path)
        if not member.endswith("?"):
            self.missing.append(f"type information of {member.replace('|', ' or ')}")
        return None

    def _size(self, struct: str) -> int:
        for name in struct.split("|"):
            if self._types.has(name):
                return self._types.size(name)
        self.missing.append(f"type information of struct {struct}")
        return 0

    def _symbol(self, kernel: Kernel, name: str, needed: bool) -> int | None:
        address = kernel.symbols.find(name)
        if address is None and needed:
            self.missing.append(f"kernel symbol {name}")
        return address
