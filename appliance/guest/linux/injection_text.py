"""Code of mapped files that was changed in memory, page by page, and how it differs from the file.

A breakpoint, a hook or a patched function turns the file's page into a private copy of the process. Debuggers (int3),
libraries with text relocations and writers of the same bytes do that too, and are told apart by the bytes themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.budget import Budget
from appliance.guest.kernel import Kernel
from appliance.guest.linux.injection_cache import PageCache
from appliance.guest.linux.injection_facts import PAGE, VM_MAYSHARE
from appliance.guest.linux.injection_files import MappedFile
from appliance.guest.linux.injection_pages import Page, Pages, is_anonymous
from appliance.guest.linux.vmas import Vma
from appliance.model import Evidence

MAX_COMPARED: Final = 128  # changed pages of one process that are compared byte by byte
MAX_TOLD: Final = 16  # of these told one by one
MAX_RUNS: Final = 4  # differences of a page told byte by byte
MAX_RUN: Final = 8
INT3: Final = 0xCC
PT_DYNAMIC, DT_TEXTREL, DT_FLAGS, DF_TEXTREL = 2, 22, 30, 4  # include/uapi/linux/elf.h, System V gABI
MAX_HEADERS: Final = 64
_HEADER = Struct("<IIQQQQQQ")  # Elf64_Phdr
_TAGS = Struct("<qQ")  # Elf64_Dyn


Mapped = tuple[Vma, MappedFile | None, Sequence[Page]]  # an executable mapping, its file, what of it is resident


class Change(NamedTuple):
    """A page of code that is the process's own copy."""

    vma: Vma
    file: MappedFile | None  # None: the vdso
    page: Page
    foreign: bool = False  # it is another file's page, not a copy


class Texts:
    """Finds changed code in processes of one guest."""

    def __init__(self, kernel: Kernel, pages: Pages, cache: PageCache) -> None:
        self._kernel, self._pages, self._cache = kernel, pages, cache

    def find(self, pgd: int, mapped: Sequence[Mapped], budget: Budget) -> Iterator[Evidence]:
        """Changed pages of private executable mappings."""
        changes = self._changes(pgd, mapped, budget)
        relocated: dict[int, bool] = {}
        for number, change in enumerate(changes):
            if number >= MAX_COMPARED or budget.over:
                yield self._rest(changes[number:])
                return
            raw = self._pages.read([change.page])[0]
            if raw is None:
                continue
            evidence = self._judge(change, raw, relocated)
            budget.spend(2)
            if number < MAX_TOLD or evidence.weight > 1:
                yield evidence
        if len(changes) > MAX_TOLD:
            yield Evidence(f"{len(changes)} pages of code are copies of this process", "modified-text")

    def _changes(self, pgd: int, mapped: Sequence[Mapped], budget: Budget) -> list[Change]:
        private = [one for one in mapped if not one[0].flags & VM_MAYSHARE]
        candidates = [Change(vma, file, page) for vma, file, pages in private for page in pages]
        owners = self._pages.owners(pgd, [change.page for change in candidates])
        found: list[Change] = []
        if None in owners:
            budget.cut_off(f"whose {owners.count(None)} of {len(owners)} pages of code are")
        for change, mapping in zip(candidates, owners, strict=True):
            if mapping is None:
                continue
            if is_anonymous(mapping):
                found += [
                    change._replace(page=Page(change.page.va + at, change.page.gpa + at, PAGE))
                    for at in range(0, change.page.size, PAGE)
                ]
            elif change.file is not None and change.file.regular and mapping not in (0, change.file.mapping):
                found.append(change._replace(foreign=True))
        return found

    def _judge(self, change: Change, raw: bytes, relocated: dict[int, bool]) -> Evidence:
        vma, file, page = change.vma, change.file, change.page
        name = file.path if file is not None else vma.label
        offset = (page.va - vma.start) + vma.page_offset * PAGE
        original = self._original(change, offset)
        where = f"code of {name} at {page.va:#x}"
        detail = f"{vma.protection}; bytes at {page.va:#x}: {raw[:16].hex()}; file offset {offset:#x}; path {name}"
        if change.foreign:
            claim, weight = f"{where} is a page of another file", 1
        elif original is None:
            claim, weight = f"{where} was changed in memory; the file's own page is not resident to compare with", 2
        elif original == raw:
            claim, weight = f"{where} was written to and holds the file's bytes again", 0
        else:
            differing = [at for at in range(PAGE) if raw[at] != original[at]]
            count = _count(len(differing), "byte differs", "bytes differ")
            claim, weight = f"{where} was changed in memory: {count} from the file", 2
            detail += f"; {_runs(differing, original, raw)}"
            if all(raw[at] == INT3 for at in differing):
                claim, weight = f"{where} holds {_count(len(differing), 'breakpoint', 'breakpoints')}", 1
            elif file is not None and self._has_text_relocations(file, relocated):
                claim, weight = f"{claim}, which has text relocations", 1
        sha256 = hashlib.sha256(raw).hexdigest()
        return Evidence(claim, "modified-text", page.va, page.size, sha256, detail, weight)

    def _original(self, change: Change, offset: int) -> bytes | None:
        if change.file is not None:
            return self._cache.of_file(change.file.mapping, offset // PAGE)
        image = self._kernel.symbols.find("vdso_image_64")  # arch/x86/include/asm/vdso.h: struct vdso_image
        if image is None or not self._kernel.types.has("vdso_image.data"):
            return None
        try:
            data = self._kernel.u64(image + self._kernel.types.offset("vdso_image.data"))
            return self._kernel.read(data + change.page.va - change.vma.start, PAGE)
        except UnreadableMemory:
            return None

    def _has_text_relocations(self, file: MappedFile, known: dict[int, bool]) -> bool:
        if file.mapping not in known:
            known[file.mapping] = any(
                tag == DT_TEXTREL or (tag == DT_FLAGS and value & DF_TEXTREL) for tag, value in self._dynamic(file)
            )
        return known[file.mapping]

    def _dynamic(self, file: MappedFile) -> Iterator[tuple[int, int]]:
        """The dynamic section of a mapped ELF file, as far as its first two pages are in the page cache."""
        first = self._cache.of_file(file.mapping, 0)
        if first is None or not first.startswith(b"\x7fELF\2\1"):
            return
        table = int.from_bytes(first[32:40], "little")  # e_phoff
        count = min(int.from_bytes(first[56:58], "little"), MAX_HEADERS)  # e_phnum
        for at in range(table, table + count * _HEADER.size, _HEADER.size):
            if at + _HEADER.size > PAGE:
                return
            kind, _, offset, _, _, size, _, _ = _HEADER.unpack_from(first, at)
            if kind != PT_DYNAMIC:
                continue
            parts = [self._cache.of_file(file.mapping, offset // PAGE + step) for step in (0, 1)]
            raw = b"".join(part or b"" for part in parts)[offset % PAGE :][: min(size, PAGE)]
            yield from _TAGS.iter_unpack(raw[: len(raw) - len(raw) % _TAGS.size])

    def _rest(self, changes: Sequence[Change]) -> Evidence:
        first, size = changes[0].page.va, sum(change.page.size for change in changes)
        claim = f"{len(changes)} more pages of code from {first:#x} on were changed in memory; they were not compared"
        return Evidence(claim, "modified-text", first, size, weight=2)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _runs(differing: Sequence[int], original: bytes, raw: bytes) -> str:
    """The differences as ``+0x5a0 5548 to cc90``, the first few of them."""
    starts = [differing[0]] + [after for before, after in pairwise(differing) if after != before + 1]
    told = []
    for start in starts[:MAX_RUNS]:
        end = start
        while end < PAGE and end - start < MAX_RUN and raw[end] != original[end]:
            end += 1
        told.append(f"+{start:#x} {original[start:end].hex()} to {raw[start:end].hex()}")
    return ", ".join(told) + (f" and {len(starts) - MAX_RUNS} more" if len(starts) > MAX_RUNS else "")
