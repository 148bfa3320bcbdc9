"""A tiny Linux made of bytes: page tables, an image with a symbol table and type information, a direct map.

Nothing runs in it; it is just enough kernel to attach to. Layouts after arch/x86/kernel/head_64.S, scripts/kallsyms.c,
Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.errors import UnreadableMemory
from appliance.model import Region, VcpuState

PAGE = 4096
MB = 1 << 20
RAM = 16 * MB
IMAGE_GPA, IMAGE_SIZE = 4 * MB, 6 * MB
TEXT_VA = 0xFFFF_FFFF_8560_0000
RODATA, DATA = 2 * MB, 4 * MB
BUILD_ID = bytes(range(20))
USER_PGD, USER_VA = 13 * MB, 0x7F00_1234_5000
KERNPG, TABLE, LARGE_RX, LARGE_RO, LARGE_RW = 0x063, 0x067, 0x1E1, 1 << 63 | 0x1E1, 1 << 63 | 0x1E3


class ByteMemory:
    """Guest RAM in a bytearray; ``holes`` are pages that cannot be read."""

    name = "bytes"
    live = False

    def __init__(self, data: bytes | bytearray, holes: Sequence[int] = ()) -> None:
        self.data, self.holes = bytearray(data), set(holes)

    @property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, len(self.data)),)

    def read(self, gpa: int, size: int) -> bytes:
        pages = range(gpa // PAGE, (gpa + size - 1) // PAGE + 1)
        if gpa < 0 or size < 0 or gpa + size > len(self.data) or (self.holes and not self.holes.isdisjoint(pages)):
            raise UnreadableMemory(gpa, size, "not RAM")
        return bytes(self.data[gpa : gpa + size])

    def readv(self, spans: Sequence[tuple[int, int]]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for gpa, size in spans:
            try:
                found.append(self.read(gpa, size))
            except UnreadableMemory:
                found.append(None)
        return found

    def vcpus(self) -> tuple[VcpuState, ...]:
        return ()

    def check_alive(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Tiny:
    """What to build. ``layout`` is old, seqs or new; ``signed``: per-CPU symbols are absolute."""

    layout: str = "seqs"
    signed: bool = True
    la57: bool = False
    symbols: bool = True
    types: bool = True
    marked: bool = True  # symbols say where the types lie
    page_offset: int = 0
    extra: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.page_offset = self.page_offset or (0xFF11_0000_4000_0000 if self.la57 else 0xFFFF_8880_4000_0000)
        self.ram = bytearray(RAM)
        self.cr3 = IMAGE_GPA + DATA
        self.names = self._names()
        self._image()
        self._tables()

    def memory(self) -> ByteMemory:
        return ByteMemory(self.ram)

    def put(self, gpa: int, data: bytes) -> None:
        self.ram[gpa : gpa + len(data)] = data

    def entry(self, table: int, index: int, value: int) -> None:
        struct.pack_into("<Q", self.ram, table + 8 * index, value)

    def _names(self) -> dict[str, int]:
        """Symbols and their addresses, sorted by address."""
        data = TEXT_VA + DATA
        named = {
            "_text": TEXT_VA,
            "linux_banner": TEXT_VA + RODATA,
            "init_top_pgt": data,
            "level4_kernel_pgt": data + 0x2000,
            "level3_kernel_pgt": data + 0x3000,
            "level2_kernel_pgt": data + 0x4000,
            "page_offset_base": data + 0x6000,
            "vmcoreinfo_data": data + 0x6008,
            "init_task": data + 0x7000,
            "inet_ehash_secret.5": data + 0x8000,
            "x" * 300: data + 0x8010,  # a name whose length needs two bytes
            **self.extra,
        }
        if self.types and self.marked:
            named |= {"__start_BTF": TEXT_VA + RODATA + 0x1000, "__stop_BTF": TEXT_VA + RODATA + 0x1000 + len(BTF)}
        named |= {f"function_{number:04}": TEXT_VA + 0x100 + 16 * number for number in range(700)}
        percpu = {"fixed_percpu_data": 0, "cpu_number": 0x1234} if self.signed else {}
        return dict(sorted((percpu | named).items(), key=lambda item: item[1]))

    def _image(self) -> None:
        self.put(IMAGE_GPA, bytes.fromhex("488d25513fa001488d3df2ffffff"))
        rodata = IMAGE_GPA + RODATA
        self.put(rodata, b"Linux version 6.1.0-tiny (nobody@nowhere) #1 SMP Thu Jan 1 00:00:00 UTC 1970\n\0")
        self.put(rodata + 0x400, struct.pack("<III", 4, 20, 3) + b"GNU\0" + BUILD_ID)
        if self.types:
            self.put(rodata + 0x1000, BTF)
        if self.symbols:
            self.put(rodata + 0x100000, kallsyms(self.names, TEXT_VA, self.layout, self.signed))
        data = IMAGE_GPA + DATA
        self.put(data + 0x6000, struct.pack("<QQ", self.page_offset, self.page_offset + 12 * MB))
        self.put(data + 0x7000, b"swapper/0\0")
        self.put(12 * MB, b"OSRELEASE=6.1.0-tiny\nBUILD-ID=" + BUILD_ID.hex().encode() + b"\nPAGESIZE=4096\n")
        self.put(12 * MB + PAGE - 4, b"left")
        self.put(12 * MB + PAGE, b"right")

    def _tables(self) -> None:
        """Kernel and user tables; the direct map covers RAM by 2 MiB pages."""
        root = IMAGE_GPA + DATA
        level4, level3, level2 = root + 0x2000, root + 0x3000, root + 0x4000
        spare = iter(range(13 * MB + PAGE, 14 * MB, PAGE))
        self.entry(root, 511, (level4 if self.la57 else level3) | KERNPG)
        self.entry(level4, 511, level3 | KERNPG)
        self.entry(level3, 510, level2 | KERNPG)
        self.entry(level3, 511, (root + 0x5000) | TABLE)
        first = (TEXT_VA >> 21) & 511
        for slot, flags in enumerate((LARGE_RX, LARGE_RO, LARGE_RW)):
            self.entry(level2, first + slot, IMAGE_GPA + slot * 2 * MB | flags)
        for gpa in range(0, RAM, 2 * MB):
            self.map(root, self.page_offset + gpa, gpa | LARGE_RW, 1, spare)
        self.map(
            root, 0xFFFF_C900_0000_0000 if not self.la57 else 0xFFA0_0000_0000_0000, 12 * MB | 1 << 63 | 0x63, 0, spare
        )
        self.map(root, VMALLOC[self.la57] + PAGE, (12 * MB + PAGE) | 1 << 63 | 0x63, 0, spare)
        self.put(USER_PGD, bytes(self.ram[root : root + PAGE]))
        self.map(USER_PGD, USER_VA, 12 * MB | 1 << 63 | 0x67, 0, spare, nx_top=True)
        self.map(USER_PGD, USER_VA + PAGE, (12 * MB + PAGE) | 0x25, 0, spare)
        self.map(USER_PGD, USER_VA + 2 * PAGE, 0x1234_5600_0000_0000 & ~0x101, 0, spare)  # swapped out

    def map(self, root: int, va: int, value: int, leaf: int, spare, nx_top: bool = False) -> None:
        """Enter a leaf at level ``leaf`` (0: 4 KiB, 1: 2 MiB), with the tables above it."""
        table = root
        top = 4 if self.la57 else 3
        for level in range(top, leaf, -1):
            index = (va >> (12 + 9 * level)) & 511
            below = struct.unpack_from("<Q", self.ram, table + 8 * index)[0]
            if not below & 1:
                below = next(spare) | TABLE | (1 << 63 if nx_top and level == top else 0)
                self.entry(table, index, below)
            table = below & 0x000F_FFFF_FFFF_F000
        self.entry(table, (va >> (12 + 9 * leaf)) & 511, value)


VMALLOC = {False: 0xFFFF_C900_0000_0000, True: 0xFFA0_0000_0000_0000}


def kallsyms(names: dict[str, int], base: int, layout: str, signed: bool) -> bytes:
    """A symbol table as scripts/kallsyms.c writes it: tokens are single characters and a few longer ones."""
    tokens = [bytes([code]) if 32 < code < 127 else b"?" for code in range(256)]
    tokens[0x80], tokens[0x81], tokens[0x00] = b"Tfunction_", b"_pgt", b"kernel"
    stream, markers = b"", []
    for number, name in enumerate(names):
        if number % 256 == 0:
            markers.append(len(stream))
        text = b"T" + name.encode()
        code = b""
        while text:
            best = max(
                (t for t in (0x80, 0x81, 0x00) if text.startswith(tokens[t])),
                default=text[0],
                key=lambda t: len(tokens[t]),
            )
            code, text = code + bytes([best]), text[len(tokens[best]) :]
        length = len(code)
        stream += (bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])) + code
    table = b"".join(token + b"\0" for token in tokens)
    starts = [len(b"".join(token + b"\0" for token in tokens[:number])) for number in range(256)]
    offsets = [
        (address if address < base else base - 1 - address) if signed else address - base for address in names.values()
    ]
    order = sorted(range(len(names)), key=lambda number: list(names)[number].encode())
    parts = {
        "offsets": struct.pack(f"<{len(names)}i", *offsets),
        "relative_base": struct.pack("<Q", base),
        "num_syms": struct.pack("<I", len(names)),
        "names": stream,
        "markers": struct.pack(f"<{len(markers)}I", *markers),
        "seqs": b"".join(number.to_bytes(3, "big") for number in order),
        "token_table": table,
        "token_index": struct.pack("<256H", *starts),
    }
    sequence = {
        "old": "offsets relative_base num_syms names markers token_table token_index",
        "seqs": "offsets relative_base num_syms names markers seqs token_table token_index",
        "new": "num_syms names markers token_table token_index offsets relative_base seqs",
    }[layout]
    blob = b"\xaa" * 64
    for part in sequence.split():
        blob += bytes(-len(blob) % 8) + parts[part]
    return blob + b"\xaa" * 64


class Btf:
    """Writes a BTF blob. Ids are handed out in order, from 1."""

    def __init__(self) -> None:
        self.records, self.text, self.count = b"", b"\0", 0

    def string(self, name: str) -> int:
        if not name:
            return 0
        at = self.text.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            self.text += name.encode() + b"\0"
            at = self.text.find(b"\0" + name.encode() + b"\0")
        return at + 1

    def add(
        self, kind: int, name: str = "", size: int = 0, words: Sequence[int] = (), vlen: int = 0, flag: bool = False
    ) -> int:
        self.records += struct.pack("<III", self.string(name), kind << 24 | vlen | flag << 31, size & 0xFFFFFFFF)
        self.records += struct.pack(f"<{len(words)}I", *(word & 0xFFFFFFFF for word in words))
        self.count += 1
        return self.count

    def struct(
        self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = 4, flag: bool = False
    ) -> int:
        words = [word for member, type_id, where in members for word in (self.string(member), type_id, where)]
        return self.add(kind, name, size, words, len(members), flag)

    def blob(self, pad: int = 1 << 16) -> bytes:
        text = self.text + b"p" * pad + b"\0"
        return (
            struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.records), len(self.records), len(text))
            + self.records
            + text
        )


def _types() -> bytes:
    btf = Btf()
    u32 = btf.add(1, "unsigned int", 4, [32])
    u64 = btf.add(1, "long unsigned int", 8, [64])
    char = btf.add(1, "char", 1, [1 << 24 | 8])
    array = btf.add(3, words=[char, u32, 16])
    pid = btf.add(8, "pid_t", u32)
    const = btf.add(10, size=pid)
    pointer = btf.add(2, size=0)
    inner = btf.struct("", 16, [("tgid", const, 0), ("word", u64, 64)], kind=5)
    outer = btf.struct("", 24, [("", inner, 0), ("flags", u32, 128)])
    bits = btf.struct(
        "bits", 4, [("first", u32, 3 << 24 | 0), ("second", u32, 7 << 24 | 11), ("plain", u32, 0)], flag=True
    )
    old = btf.add(1, "__u8:4", 4, [4 << 16 | 5])
    btf.struct("old_bits", 4, [("field", old, 8)])
    common = btf.struct("sock_common", 8, [("skc_family", u32, 32)])
    btf.struct("sock", 16, [("__sk_common", common, 0), ("sk_bits", bits, 64)])
    btf.struct("task_struct", 4096, [("pid", pid, 64), ("comm", array, 128), ("", outer, 256), ("mm", pointer, 512)])
    btf.add(
        6,
        "pid_type",
        4,
        [btf.string("PIDTYPE_PID"), 0, btf.string("PIDTYPE_MAX"), 4, btf.string("NEG"), -1],
        3,
        flag=True,
    )
    btf.add(19, "big", 8, [btf.string("BIG"), 1, 1], 1)
    btf.add(17, "tag", pid, [0xFFFFFFFF])
    btf.add(18, "user", pid)
    btf.add(4, "task_struct", 0)  # a namesake without members
    return btf.blob()


BTF = _types()
