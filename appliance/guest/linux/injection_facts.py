"""Kernel facts behind the look into one process, as data, in the notation of :mod:`appliance.guest.linux.facts`.

They stand apart from the facts of sockets and processes because they are wanted at alert time only: a kernel that lacks
one of them can still be watched. Renames:

- ``vm_area_struct.__vm_flags``: lies over ``vm_flags`` since bc292ab00f6c (6.3)
- ``mm_struct.mm_mt``: replaces ``mmap``/``vm_next`` since 763ecb035029 and 524e00b36e8c (6.1)
- ``inode.__i_nlink``: the same place as ``i_nlink`` (a union, include/linux/fs.h)
- ``page.__folio_index``: replaces ``index`` in newer kernels; ``folio`` has both names at the same places as ``page``
"""

from __future__ import annotations

from typing import Any, Final

from appliance.errors import UnsupportedGuest
from appliance.guest.kernel import Field, Kernel
from appliance.guest.linux.record import Record

RECORDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "mm": (
        "include/linux/mm_types.h",
        (
            "mm_struct.pgd",
            "mm_struct.mm_mt.ma_root?",
            "mm_struct.mmap?",
            "mm_struct.exe_file?",
            "mm_struct.start_brk",
            "mm_struct.brk",
            "mm_struct.start_stack",
            "mm_struct.env_start",
            "mm_struct.env_end",
        ),
    ),
    "vma": (
        "include/linux/mm_types.h",
        (
            "vm_area_struct.vm_start",
            "vm_area_struct.vm_end",
            "vm_area_struct.__vm_flags|vm_area_struct.vm_flags",
            "vm_area_struct.vm_mm",
            "vm_area_struct.vm_pgoff",
            "vm_area_struct.vm_file",
            "vm_area_struct.vm_ops",
            "vm_area_struct.vm_private_data",
            "vm_area_struct.vm_next?",
            "vm_area_struct.anon_name?",
        ),
    ),
    "file": (
        "include/linux/fs.h",
        ("file.f_inode", "file.f_mapping", "file.__f_path.dentry|file.f_path.dentry"),
    ),
    "inode": ("include/linux/fs.h", ("inode.i_mode", "inode.i_nlink|inode.__i_nlink")),
    "page": (
        "include/linux/mm_types.h",
        (
            "page.compound_head|page.compound_info",
            "page.mapping|folio.mapping",
            "page.index|page.__folio_index|folio.index",
        ),
    ),
    "task": (
        "include/linux/sched.h",
        (
            "task_struct.pid",
            "task_struct.tgid",
            "task_struct.start_boottime|task_struct.real_start_time",
            "task_struct.comm",
            "task_struct.flags",
            "task_struct.mm",
            "task_struct.signal",
            "task_struct.thread_node.next",
            "task_struct.stack",
            "task_struct.ptrace",
            "task_struct.parent",
            "task_struct.thread.fsbase",
        ),
    ),
    "pt_regs": (
        "arch/x86/include/asm/ptrace.h",
        ("pt_regs.ip|pt_regs.rip", "pt_regs.cs", "pt_regs.sp|pt_regs.rsp", "pt_regs.ss"),
    ),
}

OFFSETS: Final[dict[str, str]] = {
    "task.thread_node": "task_struct.thread_node",
    "signal.thread_head": "signal_struct.thread_head",  # include/linux/sched/signal.h
    "special.name": "vm_special_mapping.name?",  # include/linux/mm_types.h
    "anon_name.name": "anon_vma_name.name?",
    "dentry.d_parent": "dentry.d_parent",  # include/linux/dcache.h
    "xa_head": "address_space.i_pages.xa_head?",  # include/linux/xarray.h
    "xa_shift": "xa_node.shift?",
    "xa_slots": "xa_node.slots?",
    "range.pivot": "maple_range_64.pivot?",  # include/linux/maple_tree.h
    "range.slot": "maple_range_64.slot?",
    "arange.pivot": "maple_arange_64.pivot?",
    "arange.slot": "maple_arange_64.slot?",
}

VM_READ: Final = 0x1  # include/linux/mm.h
VM_WRITE: Final = 0x2
VM_EXEC: Final = 0x4
VM_MAYSHARE: Final = 0x80
VM_GROWSDOWN: Final = 0x100
S_IFMT, S_IFREG = 0o170000, 0o100000  # include/uapi/linux/stat.h
PF_IO_WORKER: Final = 0x10  # include/linux/sched.h: threads of io_uring have an mm and never run user code
PF_USER_WORKER: Final = 0x4000  # since 6.4; before it, a hole
PAGE: Final = 4096


class InjectionFacts:
    """The facts of one guest, resolved. Raises UnsupportedGuest naming everything that is missing."""

    def __init__(self, kernel: Kernel) -> None:
        self._types = kernel.types
        missing: list[str] = []
        self._records: dict[str, Record] = {}
        for name, (_, members) in RECORDS.items():
            fields = [self._field(member, missing) for member in members]
            if any(field is not None for field in fields):
                self._records[name] = Record(name, fields)
        self._fields = {name: self._field(member, missing) for name, member in OFFSETS.items()}
        if not kernel.types.has("page"):
            missing.append("type information of struct page")
        if missing:
            raise UnsupportedGuest(tuple(missing))
        self.page_size = kernel.types.size("page")
        self.regs_size = kernel.types.size("pt_regs")
        self.special_ops = kernel.symbols.find("special_mapping_vmops")  # mm/mmap.c: vdso, vvar, uprobes

    def record(self, name: str) -> Record:
        """A record of RECORDS."""
        return self._records[name]

    def parse(self, name: str, raw: bytes) -> tuple[Any, ...]:
        """The members of a record from its bytes."""
        return self._records[name].parse(raw)

    def find(self, name: str) -> Field | None:
        """A single member, None where this kernel has none of it."""
        return self._fields[name]

    def offset(self, name: str) -> int:
        """Offset of a single member. Raises UnsupportedGuest."""
        field = self._fields[name]
        if field is None:
            raise UnsupportedGuest((f"type information of {OFFSETS[name].rstrip('?')}",))
        return field.offset

    def _field(self, member: str, missing: list[str]) -> Field | None:
        for path in member.rstrip("?").split("|"):
            if self._types.has(path):
                return self._types.field(path)
        if not member.endswith("?"):
            missing.append(f"type information of {member.replace('|', ' or ')}")
        return None
