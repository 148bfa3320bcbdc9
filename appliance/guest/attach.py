"""Attaches to a Linux guest with nothing but its RAM: no file, no agent, no profile.

Steps: the image by its page tables (image.py), the symbol table in its read-only data (kallsyms.py), its type
information (layout.py), and from these the page-table root, the number of levels and the direct map. Each is checked
against another source in the guest before it is believed.
Sources: arch/x86/kernel/head_64.S, arch/x86/mm/kaslr.c (page_offset_base, vmalloc_base, vmemmap_base),
arch/x86/include/asm/page_64_types.h (__PAGE_OFFSET_BASE_L4/L5), kernel/vmcore_info.c (OSRELEASE, BUILD-ID).
"""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from pathlib import Path

from appliance.errors import GuestError, GuestGone, Implausible, UnreadableMemory, UnsupportedGuest
from appliance.guest import profile
from appliance.guest.image import Found, find_images
from appliance.guest.kallsyms import KallsymsTable, find_tables, is_sorted, load_tables
from appliance.guest.kernel import Kernel
from appliance.guest.layout import BtfTypes, find_blob
from appliance.guest.paging import ADDRESS, translate
from appliance.ports import GuestMemory

PAGE_OFFSET_L4 = 0xFFFF_8880_0000_0000
PAGE_OFFSET_L5 = 0xFF11_0000_0000_0000
NO_LINUX = "no running x86-64 Linux kernel was found in its memory"
_BANNER = re.compile(rb"Linux version (\S{1,64}) [^\n\0]{10,400}")
_VMCOREINFO_LIMIT = 4096


def attach(memory: GuestMemory, *, cr3: int | None = None, cache_dir: Path | None = None, cache: bool = True) -> Kernel:
    """Attach to the Linux kernel in this RAM.

    Profiles are kept in ``cache_dir``, by default in the user's cache. Raises UnsupportedGuest (each lack named),
    Implausible, UnreadableMemory, GuestGone.
    """
    folder = (cache_dir or profile.default_folder()) if cache else None
    trouble: GuestError = UnsupportedGuest((NO_LINUX,))
    for candidates in find_images(memory, cr3):
        kernels = []
        for found in candidates:
            try:
                kernels.append((folder and _attach_warm(memory, found, folder)) or _attach_cold(memory, found, folder))
            except GuestGone:
                raise
            except GuestError as error:
                trouble = error
        if kernels:
            return max(kernels, key=_wall_clock) if len(kernels) > 1 else kernels[0]
    raise trouble


def _wall_clock(kernel: Kernel) -> int:
    """The last second a kernel knew of: of several boots in one RAM the running one has the latest.

    Source: kernel/time/timekeeping.c (tk_core: a sequence counter, then struct timekeeper).
    """
    try:
        inner = kernel.types.offset("tk_data.timekeeper") if kernel.types.has("tk_data.timekeeper") else 8
        return kernel.u64(kernel.symbols.get("tk_core") + inner + kernel.types.offset("timekeeper.xtime_sec"))
    except (UnreadableMemory, UnsupportedGuest, Implausible):
        return 0


def _attach_cold(memory: GuestMemory, found: Found, folder: Path | None) -> Kernel:
    data = memory.read(found.rodata.gpa, found.rodata.size)
    tables = find_tables(data, found.image.va)
    symbols = KallsymsTable(tables) if tables else None
    where = _find_types(data, found, symbols)
    if tables is None or symbols is None or where is None:
        raise UnsupportedGuest(tuple(_lacks(data, symbols, where)))
    blob = data[where[0] : where[0] + where[1]]
    types = BtfTypes(blob)
    kernel = _assemble(memory, found, symbols, types)
    kernel.release, kernel.build_id = _identity(kernel, data)
    note = data.find(profile.NOTE + bytes.fromhex(kernel.build_id)) if kernel.build_id else -1
    if folder and note >= 0:
        rodata_at = found.rodata.va - found.image.va
        profile.save(
            folder,
            profile.Profile(
                release=kernel.release,
                build_id=kernel.build_id,
                note_at=rodata_at + note,
                rodata_at=rodata_at,
                rodata_size=found.rodata.size,
                symbols=tables.places,
                types_at=where[0],
                types_size=where[1],
                types_crc=zlib.crc32(blob),
                index=types.index,
                order=symbols.order(),
            ),
        )
    return kernel


def _attach_warm(memory: GuestMemory, found: Found, folder: Path) -> Kernel | None:
    """Attach by a remembered profile; None where there is none, or where the guest does not bear it out."""
    known = profile.load(folder, memory, found.image)
    if known is None or known.rodata_at + known.rodata_size > found.image.size:
        return None
    start = found.image.gpa + known.rodata_at
    try:
        blob = memory.read(start + known.types_at, known.types_size)
        tables = load_tables(lambda at, size: memory.read(start + at, size), known.symbols, found.image.va)
        if tables is None or not known.matches(blob):
            return None
        if tables.seqs is None and known.order is not None:
            tables = replace(tables, seqs=known.order)
            if not is_sorted(tables):
                return None
        kernel = _assemble(memory, found, KallsymsTable(tables), BtfTypes(blob, known.index))
    except (Implausible, UnsupportedGuest, UnreadableMemory):
        return None
    kernel.release, kernel.build_id = known.release, known.build_id
    return kernel


def _find_types(data: bytes, found: Found, symbols: KallsymsTable | None) -> tuple[int, int] | None:
    """Offset and size of the BTF blob in the read-only data."""
    start, end = (symbols.find(name) if symbols else None for name in ("__start_BTF", "__stop_BTF"))
    if start and end and found.rodata.va <= start < end <= found.rodata.va + found.rodata.size:
        return start - found.rodata.va, end - start
    return find_blob(data)


def _lacks(data: bytes, symbols: KallsymsTable | None, types: tuple[int, int] | None) -> list[str]:
    banner = _BANNER.search(data)
    name = f"Linux {banner[1].decode('ascii', 'replace')}" if banner else "its kernel"
    lacks = []
    if symbols is None:
        lacks.append(f"{name} has no symbol table in memory (CONFIG_KALLSYMS)")
    if types is None:
        lacks.append(f"{name} has no type information in memory (CONFIG_DEBUG_INFO_BTF)")
    return lacks


def _assemble(memory: GuestMemory, found: Found, symbols: KallsymsTable, types: BtfTypes) -> Kernel:
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
    return Kernel(
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
    note = data.find(profile.NOTE) + len(profile.NOTE)
    identity = build_id[1].decode() if build_id else data[note : note + 20].hex() if note >= len(profile.NOTE) else ""
    return release[1].decode("ascii", "replace"), identity
