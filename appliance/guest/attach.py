"""Attaches to a Linux guest with nothing but its RAM: no file, no agent, no profile.

Steps: the image by its page tables (image.py), the symbol table in its read-only data (kallsyms.py), its type
information (layout.py), and from these the page-table root, the number of levels and the direct map. Each is checked
against another source in the guest before it is believed.
Sources: arch/x86/kernel/head_64.S, arch/x86/mm/kaslr.c (page_offset_base, vmalloc_base, vmemmap_base),
arch/x86/include/asm/page_64_types.h (__PAGE_OFFSET_BASE_L4/L5), kernel/vmcore_info.c (OSRELEASE, BUILD-ID).
"""

from __future__ import annotations

import re
from pathlib import Path

from appliance.errors import Implausible, UnreadableMemory, UnsupportedGuest
from appliance.guest.image import Found, find_images
from appliance.guest.kallsyms import KallsymsTable, find_tables
from appliance.guest.kernel import Kernel
from appliance.guest.layout import BtfTypes, find_blob
from appliance.guest.paging import ADDRESS, translate
from appliance.ports import GuestMemory

MAX_CANDIDATES = 16
PAGE_OFFSET_L4 = 0xFFFF_8880_0000_0000
PAGE_OFFSET_L5 = 0xFF11_0000_0000_0000
_BANNER = re.compile(rb"Linux version (\S{1,64}) [^\n\0]{10,400}")
_NOTE = re.compile(rb"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0(.{20})", re.DOTALL)
_VMCOREINFO_LIMIT = 4096


def attach(memory: GuestMemory, *, cr3: int | None = None, cache_dir: Path | None = None) -> Kernel:
    """Attach to the Linux kernel in this RAM. Raises UnsupportedGuest (each lack named), Implausible, GuestGone."""
    lacks: tuple[str, ...] = ("no running x86-64 Linux kernel was found in its memory",)
    for number, found in enumerate(find_images(memory, cr3)):
        if number >= MAX_CANDIDATES:
            break
        try:
            return _attach_to(memory, found)
        except UnsupportedGuest as error:
            lacks = error.missing
    raise UnsupportedGuest(lacks)


def _attach_to(memory: GuestMemory, found: Found) -> Kernel:
    data = memory.read(found.rodata.gpa, found.rodata.size)
    tables = find_tables(data, found.image.va)
    symbols = KallsymsTable(tables) if tables else None
    blob = _find_types(data, found, symbols)
    if symbols is None or blob is None:
        raise UnsupportedGuest(tuple(_lacks(data, symbols, blob)))
    return _assemble(memory, found, symbols, BtfTypes(blob), data)


def _find_types(data: bytes, found: Found, symbols: KallsymsTable | None) -> bytes | None:
    start, end = (symbols.find(name) if symbols else None for name in ("__start_BTF", "__stop_BTF"))
    if start and end and found.rodata.va <= start < end <= found.rodata.va + found.rodata.size:
        return data[start - found.rodata.va : end - found.rodata.va]
    return find_blob(data)


def _lacks(data: bytes, symbols: KallsymsTable | None, blob: bytes | None) -> list[str]:
    banner = _BANNER.search(data)
    name = f"Linux {banner[1].decode('ascii', 'replace')}" if banner else "its kernel"
    lacks = []
    if symbols is None:
        lacks.append(f"{name} has no symbol table in memory (CONFIG_KALLSYMS)")
    if blob is None:
        lacks.append(f"{name} has no type information in memory (CONFIG_DEBUG_INFO_BTF)")
    return lacks


def _assemble(memory: GuestMemory, found: Found, symbols: KallsymsTable, types: BtfTypes, data: bytes) -> Kernel:
    """Put the pieces together, checking one against the other."""
    image = found.image

    def read(name: str, size: int = 8) -> int | None:
        va = symbols.find(name)
        if va is None or not image.va <= va <= image.va + image.size - size:
            return None
        return int.from_bytes(memory.read(va - image.va + image.gpa, size), "little")

    root_va = symbols.find("init_top_pgt") or symbols.get("init_level4_pgt")
    root = root_va - image.va + image.gpa
    top = int.from_bytes(memory.read(root + 8 * 511, 8), "little") & ADDRESS
    la57 = top != found.level3_gpa  # then it is level4_kernel_pgt's
    levels = 5 if la57 else 4
    if translate(memory, root, image.va, levels) != image.gpa:
        raise Implausible("the guest's page tables do not map its kernel image")
    page_offset = read("page_offset_base") or (PAGE_OFFSET_L5 if la57 else PAGE_OFFSET_L4)
    if translate(memory, root, page_offset + image.gpa, levels) != image.gpa:
        raise Implausible("the guest's direct map is not where its kernel says")
    kernel = Kernel(
        memory,
        image=image,
        root=root,
        la57=la57,
        page_offset=page_offset,
        symbols=symbols,
        types=types,
        vmemmap_base=read("vmemmap_base") or 0,
        vmalloc_base=read("vmalloc_base") or 0,
    )
    kernel.release, kernel.build_id = _identity(kernel, data)
    return kernel


def _identity(kernel: Kernel, data: bytes) -> tuple[str, str]:
    """Release and build id: from vmcoreinfo where the kernel keeps it, else from its banner and its ELF notes."""
    text = b""
    pointer = kernel.symbols.find("vmcoreinfo_data")
    if pointer:
        try:
            text = kernel.read(kernel.u64(pointer), _VMCOREINFO_LIMIT)
        except UnreadableMemory:
            text = b""
    release = re.search(rb"^OSRELEASE=([\x21-\x7e]{1,64})$", text, re.MULTILINE) or _BANNER.search(data)
    build_id = re.search(rb"^BUILD-ID=([0-9a-f]{40})$", text, re.MULTILINE)
    if release is None:
        raise Implausible("the guest's kernel does not say its release")
    note = _NOTE.search(data)
    identity = build_id[1].decode() if build_id else note[1].hex() if note else ""
    return release[1].decode("ascii", "replace"), identity
