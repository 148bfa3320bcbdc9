"""A process of a tiny Linux made of bytes: memory map, files, pages and threads, laid out as we please.

Layouts are made up (that is the point: nothing may be assumed), except where the code under test takes real ones from
the ABI: pt_regs, maple nodes and ``struct page`` are the kernel's own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from appliance.errors import UnreadableMemory, UnsupportedGuest
from appliance.guest.kernel import Field, Pte
from appliance.guest.linux import facts, injection_facts
from appliance.guest.linux.facts import Facts
from appliance.guest.linux.injection import Injection
from appliance.model import Evidence, GuestProcess, ProcessKey, Region

PAGE = 4096
DIRECT = 0xFFFF_8880_0000_0000
VMEMMAP = 0xFFFF_EA00_0000_0000
RAM = 2 << 20
BLOCK = 64
MAX = (1 << 64) - 1

FIXED = {
    "maple_range_64.pivot": Field(8, 120, length=15),
    "maple_range_64.slot": Field(128, 128, length=16),
    "maple_arange_64.pivot": Field(8, 72, length=9),
    "maple_arange_64.slot": Field(80, 80, length=10),
    "page.compound_head": Field(8, 8),
    "page.mapping": Field(24, 8),
    "page.index": Field(32, 8),
    "pt_regs.ip": Field(128, 8),
    "pt_regs.cs": Field(136, 8),
    "pt_regs.sp": Field(152, 8),
    "pt_regs.ss": Field(160, 8),
    "xa_node.shift": Field(0, 1),
    "xa_node.slots": Field(64, 512, length=64),
}
SIZES = {"page": 64, "pt_regs": 168}
WIDTHS = {"task_struct.comm": 16}


class FakeTypes:
    """Every member that the facts name, 64 bytes apart; a member of a member follows at 8 bytes a piece."""

    def __init__(self, absent: Sequence[str] = ()) -> None:
        self.fields: dict[str, Field] = dict(FIXED)
        blocks: dict[str, dict[str, list[str]]] = {}
        tables = [*facts.RECORDS.values(), *injection_facts.RECORDS.values()]
        paths = [path for _, members in tables for path in members]
        paths += [*facts.OFFSETS.values(), *injection_facts.OFFSETS.values()]
        for name in paths:
            first = next((one for one in name.rstrip("?").split("|") if one in FIXED), name.rstrip("?").split("|")[0])
            owner, member, *rest = first.split(".", 2)
            inner = blocks.setdefault(owner, {}).setdefault(member, [])
            if rest and rest[0] not in inner:
                inner.append(rest[0])
        for owner, members in blocks.items():
            for number, (member, inner) in enumerate(members.items()):
                self.fields.setdefault(f"{owner}.{member}", Field(BLOCK * number, WIDTHS.get(f"{owner}.{member}", 8)))
                for place, name in enumerate(inner):
                    self.fields.setdefault(f"{owner}.{member}.{name}", Field(BLOCK * number + 8 * place, 8))
        for path in absent:
            for known in [one for one in self.fields if one == path or one.startswith(path + ".")]:
                del self.fields[known]

    def has(self, path: str) -> bool:
        return "." not in path or path in self.fields

    def field(self, path: str) -> Field:
        if path not in self.fields:
            raise UnsupportedGuest((path,))
        return self.fields[path]

    def offset(self, path: str) -> int:
        return self.field(path).offset

    def size(self, name: str) -> int:
        return SIZES.get(name, 8)


class FakeSymbols:
    special = 0xFFFF_FFFF_8200_0000

    def find(self, name: str) -> int | None:
        if name == "special_mapping_vmops":
            return self.special
        return DIRECT if facts.SYMBOLS.get(name) else None


class FakeMemory:
    name, live = "bytes", False

    def __init__(self) -> None:
        self.ram = bytearray(RAM)
        self.regions = (Region(0, RAM),)

    def read(self, gpa: int, size: int) -> bytes:
        if not 0 <= gpa <= gpa + size <= RAM:
            raise UnreadableMemory(gpa, size)
        return bytes(self.ram[gpa : gpa + size])

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return [bytes(self.ram[g : g + s]) if 0 <= g <= g + s <= RAM else None for g, s in spans]


class FakeKernel:
    """Direct map and vmemmap by addition; one user address space, as a dictionary of pages."""

    release, build_id, la57 = "made of bytes", "", False
    page_offset, vmemmap_base, vmalloc_base = DIRECT, VMEMMAP, 0

    def __init__(self, types: FakeTypes) -> None:
        self.memory, self.types, self.symbols = FakeMemory(), types, FakeSymbols()
        self.vmemmap = RAM - RAM // PAGE * 64  # where in RAM the struct pages are
        self.user: dict[int, int] = {}  # page -> gpa

    def forget(self) -> None:
        pass

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return [self._one(va, size) for va, size in spans]

    def _one(self, va: int, size: int) -> bytes | None:
        assert 0 <= va <= MAX, "an address of more than 64 bits"
        assert 0 <= size <= RAM, "a size nobody clamped"
        for base, start in ((DIRECT, 0), (VMEMMAP, self.vmemmap)):
            if base <= va and va + size <= base + RAM - start:
                return bytes(self.memory.ram[start + va - base : start + va - base + size])
        return None

    def read(self, va: int, size: int) -> bytes:
        raw = self._one(va, size)
        if raw is None:
            raise UnreadableMemory(va, size)
        return raw

    def u64(self, va: int) -> int:
        return int.from_bytes(self.read(va, 8), "little")

    def u8(self, va: int) -> int:
        return self.read(va, 1)[0]

    def read_text(self, va: int, limit: int) -> bytes:
        return self.read(va, limit).split(b"\0", 1)[0]

    def readv_user(self, pgd: int, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        return [self._user(va, size) for va, size in spans]

    def _user(self, va: int, size: int) -> bytes | None:
        found = b""
        while len(found) < size:
            gpa = self.user.get((va + len(found)) & -PAGE)
            if gpa is None:
                return None
            at = (va + len(found)) % PAGE
            found += self.memory.read(gpa + at, min(PAGE - at, size - len(found)))
        return found

    def walk_user_pages(self, pgd: int, start: int, end: int) -> Iterator[Pte]:
        assert end - start <= 1 << 30
        if start == VMEMMAP:
            yield Pte(start, self.vmemmap, 2 << 20, True, True, False, True, True, True, 0x80)
            return
        for va in sorted(self.user):
            if start <= va < end:
                yield Pte(va, self.user[va], PAGE, True, False, True, False, True, False, self.user[va] | 1)


class World:
    """One process; build it, then look at it."""

    def __init__(self, absent: Sequence[str] = ()) -> None:
        self.types = FakeTypes(absent)
        self.kernel = FakeKernel(self.types)
        self._next = PAGE
        self._names: dict[bytes, int] = {}
        self.root = self.make("dentry", 16)
        self.mount = self.make("mount", 16)
        self.put(self.root, "dentry.d_parent", self.root)
        for path, value in (("mount.mnt_parent", self.mount), ("mount.mnt.mnt_root", self.root)):
            self.put(self.mount, path, value)
        self.mm, self.task, self.signal = self.make("mm_struct"), self.make("task_struct"), self.make("signal_struct")
        self.program = self.file("/usr/sbin/program")
        self.put(self.mm, "mm_struct.pgd", DIRECT + PAGE)
        self.put(self.mm, "mm_struct.exe_file", self.program)
        self.vmas: list[tuple[int, int, int]] = []
        self._tasks: list[int] = []
        self._page = RAM // 2
        self.code = self.vma(0x400000, 2, file=self.program)
        self.thread(100, 0x400010, task=self.task)

    # -- objects --

    def make(self, name: str, members: int = 24) -> int:
        """Room for one structure, aligned to 256 bytes."""
        va, self._next = DIRECT + self._next, (self._next + BLOCK * members + 255) & -256
        assert self._next < RAM // 2, "the world is full"
        return va

    def put(self, va: int, path: str, value: int | bytes) -> None:
        """Write a member."""
        field = self.types.field(path)
        raw = value if isinstance(value, bytes) else value.to_bytes(field.size, "little")
        self.write(va + field.offset, raw)

    def write(self, va: int, raw: bytes) -> None:
        self.kernel.memory.ram[va - DIRECT : va - DIRECT + len(raw)] = raw

    def file(self, path: str, *, links: int = 1, unlinked: bool = False, pseudo: bool = False) -> int:
        """An open file."""
        above = self.root
        for name in path.strip("/").split("/") if not pseudo else [path]:
            dentry, text = self.make("dentry", 8), self.make("text", 2)
            self.write(text, name.encode())
            self.put(dentry, "dentry.d_parent", dentry if pseudo else above)
            self.put(dentry, "dentry.d_name.len", len(name.encode()))
            self.put(dentry, "dentry.d_name.name", text)
            self.put(dentry, "dentry.d_hash.pprev", DIRECT)
            above = dentry
        if unlinked or pseudo:
            self.put(above, "dentry.d_hash.pprev", 0)
        file, inode, mapping = self.make("file", 8), self.make("inode", 8), self.make("address_space", 4)
        self.put(inode, "inode.i_mode", 0o100755)
        self.put(inode, "inode.i_nlink", links)
        mnt = self.mount + self.types.offset("mount.mnt")
        members = ("f_inode", inode), ("f_mapping", mapping), ("__f_path.dentry", above), ("__f_path.mnt", mnt)
        for member, value in members:
            self.put(file, f"file.{member}", value)
        return file

    def mapping_of(self, file: int) -> int:
        return self.kernel.u64(file + self.types.offset("file.f_mapping"))

    def page(self, content: bytes = b"", *, mapping: int = 0, index: int = 0) -> int:
        """A page of RAM with its struct page; returns its gpa."""
        gpa, self._page = self._page, self._page + PAGE
        self.write(DIRECT + gpa, content.ljust(PAGE, b"\0"))
        at = self.kernel.vmemmap + gpa // PAGE * 64
        struct.pack_into("<QQ", self.kernel.memory.ram, at + 24, mapping, index)
        return gpa

    def struct_page(self, gpa: int) -> int:
        return VMEMMAP + gpa // PAGE * 64

    def cache(self, file: int, content: bytes, index: int = 0) -> int:
        """Put one page of a file into the page cache; at most one index up to 63."""
        mapping = self.mapping_of(file)
        gpa = self.page(content, mapping=mapping, index=index)
        node = self.make("xa_node", 10)
        self.put(mapping, "address_space.i_pages.xa_head", node + 2)
        self.write(node + 64 + 8 * index, self.struct_page(gpa).to_bytes(8, "little"))
        return gpa

    def vma(
        self, start: int, pages: int, flags: int = 5, file: int = 0, resident: Sequence[int] = (), **more: int
    ) -> int:
        """A mapping; ``resident`` are the gpas of its first pages."""
        va = self.make("vm_area_struct", 12)
        end = start + pages * PAGE
        values = {"vm_start": start, "vm_end": end, "__vm_flags": flags, "vm_mm": self.mm, "vm_file": file, **more}
        for member, value in values.items():
            self.put(va, f"vm_area_struct.{member}", value)
        self.vmas.append((start, end, va))
        for number, gpa in enumerate(resident):
            self.kernel.user[start + number * PAGE] = gpa
        return va

    def thread(
        self, tid: int, rip: int, rsp: int = 0x7FFF_0000_0000, *, task: int = 0, start: int = 0, ptrace: int = 0
    ) -> int:
        """A thread that waits in the kernel; ``start`` goes where glibc keeps start_routine."""
        task = task or self.make("task_struct")
        stack = DIRECT + ((self._next + PAGE - 1) & -PAGE)
        self._next = stack - DIRECT + 4 * PAGE
        self.write(stack + 4 * PAGE - 168 + 128, struct.pack("<QQQQQ", rip, 0x33, 0x246, rsp, 0x2B))
        values = {"pid": tid, "tgid": 100, "start_boottime": 7, "mm": self.mm, "signal": self.signal, "stack": stack}
        for member, value in (values | {"ptrace": ptrace, "parent": task}).items():
            self.put(task, f"task_struct.{member}", value)
        self.put(task, "task_struct.comm", b"program".ljust(16, b"\0"))
        if start:
            fsbase = 0x7F00_0000_0000 + tid * PAGE
            self.put(task, "task_struct.thread.fsbase", fsbase)
            self.kernel.user[fsbase] = self.page(bytes(0x640) + start.to_bytes(8, "little"))
        self._tasks.append(task)
        return task

    # -- looking --

    def tree(self, per_leaf: int = 15, kind: int = 3) -> int:
        """A maple tree of the mappings, two levels; returns its root, already marked."""
        ranges: list[tuple[int, int]] = []  # (last index, entry)
        below = 0
        for start, end, va in sorted(self.vmas):
            if start > below:
                ranges.append((start - 1, 0))
            ranges.append((end - 1, va))
            below = end
        ranges.append((MAX, 0))
        leaves = [ranges[at : at + per_leaf] for at in range(0, len(ranges), per_leaf)]
        nodes = [(leaf[-1][0], self.node(leaf, 1)) for leaf in leaves]
        return (nodes[0][1] if len(nodes) == 1 else self.node(nodes, kind)) | 2

    def node(self, ranges: Sequence[tuple[int, int]], kind: int) -> int:
        """One maple node; returns it marked with its type, as slots hold it (mt_mk_node)."""
        va = self.make("maple_node", 4)
        shape = "arange" if kind == 3 else "range"
        pivot, slot = self.types.field(f"maple_{shape}_64.pivot"), self.types.field(f"maple_{shape}_64.slot")
        self.write(va, b"\1".ljust(8, b"\0"))
        for number, (last, entry) in enumerate(ranges):
            if number < pivot.length and not (number == len(ranges) - 1 and last == MAX):
                self.write(va + pivot.offset + 8 * number, last.to_bytes(8, "little"))
            self.write(va + slot.offset + 8 * number, entry.to_bytes(8, "little"))
        return va | kind << 3 | 4

    def close(self) -> None:
        """Link what was made: the memory map and the threads."""
        if self.types.has("mm_struct.mm_mt.ma_root"):
            self.put(self.mm, "mm_struct.mm_mt.ma_root", self.tree())
        else:
            objects = [va for _, _, va in sorted(self.vmas)]
            self.put(self.mm, "mm_struct.mmap", objects[0])
            for va, following in zip(objects, [*objects[1:], 0], strict=True):
                self.put(va, "vm_area_struct.vm_next", following)
        node, head = self.types.offset("task_struct.thread_node"), self.types.offset("signal_struct.thread_head")
        links = [*(task + node for task in self._tasks), self.signal + head]
        for task, following in zip(self._tasks, links[1:], strict=True):
            self.put(task, "task_struct.thread_node.next", following)

    @property
    def process(self) -> GuestProcess:
        return GuestProcess(ProcessKey(100, 7), "program", "/usr/sbin/program", "program", 1, 0, task_va=self.task)

    def look(self, clock: Sequence[float] = ()) -> tuple[Evidence, ...]:
        """Close the world and look at its process."""
        self.close()
        return Injection(self.kernel, Facts(self.kernel)).find(self.process)
