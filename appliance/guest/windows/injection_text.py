"""Code of mapped images that was changed in memory, byte for byte where the shared page is still there.

A page of an image that a process has written to is a copy of its own. Copies are what hooks and patches leave, but
also what Windows makes: the loader writes import addresses, and moves an image that did not get its place (before
Vista often, later seldom); debuggers set breakpoints; and many a decent program (browsers' sandboxes, compatibility
shims, security products) puts detours over functions. So differences are judged: where a detour leads to a module that
the loader lists, it is unusual; where it leads to memory of no image, or where the change is none, it is suspicious.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from appliance.errors import UnreadableMemory
from appliance.guest.budget import Budget
from appliance.guest.windows.injection_bytes import Header, decode_jump, is_relocated, parse_header, runs_of
from appliance.guest.windows.injection_pages import PAGE, Leaf, Pages, Prototypes, small_of
from appliance.guest.windows.injection_paths import patches_itself
from appliance.guest.windows.injection_views import Scene, View
from appliance.model import Evidence

MAX_IMAGE: Final = 1 << 30  # bytes of one image that are looked at
MAX_PAGES: Final = 131_072  # of code of one process: 512 MiB
MAX_COMPARED: Final = 512  # changed pages of one process that are compared byte by byte
MAX_TOLD: Final = 16  # of these told one by one
MAX_RUNS: Final = 4  # differences of a page told byte by byte
MAX_RUN: Final = 16
MAX_HOPS: Final = 4  # of a detour: it often goes through a trampoline in memory of no image
INT3: Final = 0xCC
BACK: Final = 3  # a jump may have begun with bytes that are the same


class Change(NamedTuple):
    """A page of code that is the process's own copy."""

    view: View
    leaf: Leaf
    shared: int  # where the shared page is; 0: it is not in memory


class Texts:
    """Finds changed code in one process."""

    def __init__(self, scene: Scene, pages: Pages, prototypes: Prototypes, *, trust_nx: bool) -> None:
        self._scene, self._pages, self._prototypes = scene, pages, prototypes
        self._trust_nx = trust_nx and pages.has_nx
        self._headers: dict[int, Header | None] = {}

    def find(self, budget: Budget) -> Iterator[Evidence]:
        """Changed pages of executable memory of images."""
        changes = list(self._changes(budget))
        quiet: Counter[str] = Counter()
        told = 0
        for number, change in enumerate(changes):
            if number >= MAX_COMPARED or budget.over:
                yield self._rest(changes[number:])
                break
            evidence = self._judge(change, quiet)
            budget.spend(2)
            if evidence is None:
                continue
            told += 1
            if told <= MAX_TOLD or evidence.weight > 1:
                yield evidence
        if told > MAX_TOLD:
            yield Evidence(f"{told} pages of code were changed in memory", "modified-text")
        if quiet:
            names = ", ".join(sorted(quiet)[:8])
            claim = f"pages of code that only the loader has written addresses to: {quiet.total()}, in {names}"
            yield Evidence(claim, "modified-text")

    def _changes(self, budget: Budget) -> Iterator[Change]:
        views = [view for view in self._scene.views if view.image and view.prototypes]
        ranges = [(view.start, min(view.end, view.start + MAX_IMAGE)) for view in views]
        leaves = iter(small_of(self._pages.leaves(ranges, budget, executable=True), MAX_PAGES))
        leaf = next(leaves, None)
        for view in views:
            mine: list[Leaf] = []
            while leaf is not None and leaf.va < view.end:
                if leaf.va >= view.start:
                    mine.append(leaf)
                leaf = next(leaves, None)
            if not mine:
                continue
            if budget.over or not (self._trust_nx or self._header(view)):
                budget.cut_off(f"code of {view.name}" + ", whose header is not in memory" * (not budget.over))
                continue
            numbers = [(page.va - view.start) // PAGE for page in mine]
            shared = self._prototypes.shared(view.prototypes, numbers)
            if None in shared:
                budget.cut_off(f"whose {shared.count(None)} of {len(shared)} pages of {view.name} are")
            for page, gpa in zip(mine, shared, strict=True):
                if gpa is not None and gpa != page.gpa and self._is_code(view, page):
                    yield Change(view, page, gpa)

    def _is_code(self, view: View, page: Leaf) -> bool:
        """Whether the file has code there; asked where page tables do not tell, or tell too much."""
        header = None if self._trust_nx else self._header(view)
        rva = page.va - view.start
        return header is None or any(part.executable and part.start <= rva < part.end for part in header.sections)

    def _judge(self, change: Change, quiet: Counter[str]) -> Evidence | None:
        """None: nothing was changed, or by the loader only; the latter is counted."""
        view, page = change.view, change.leaf
        spans = [(page.gpa, PAGE)] + [(change.shared, PAGE)] * bool(change.shared)
        raw, *others = self._pages.space.memory.readv(spans)
        if raw is None:
            return None
        original = others[0] if others else None
        where = f"code of {view.file.path if view.file else view.name} at {page.va:#x}"
        detail = f"{view.protection}; bytes at {page.va:#x}: {raw[:32].hex()}; image offset {page.va - view.start:#x}"
        sha256 = hashlib.sha256(raw).hexdigest()
        if original is None:
            claim = f"{where} was written to; the page that it was a copy of is not in memory to compare with"
            return Evidence(
                claim, "modified-text", page.va, PAGE, sha256, detail, 0 if self._is_writable(change) else 1
            )
        differing = [at for at in range(PAGE) if raw[at] != original[at]] if raw != original else []
        if not differing:
            return None
        if self._is_loaders(change, original, raw, differing):
            quiet[view.name] += 1
            return None
        runs = runs_of(differing)
        claim, weight, at = self._weigh(change, raw, differing, runs)
        detail += f"; first change at {page.va + at:#x}; {_tell(runs, original, raw)}"
        return Evidence(f"{where} {claim}", "modified-text", page.va, PAGE, sha256, detail, weight)

    def _weigh(
        self, change: Change, raw: bytes, differing: Sequence[int], runs: Sequence[tuple[int, int]]
    ) -> tuple[str, int, int]:
        count = f"{len(differing)} {'byte differs' if len(differing) == 1 else 'bytes differ'} from the file's"
        if all(raw[at] == INT3 for at in differing):
            return f"holds {len(differing)} {'breakpoint' if len(differing) == 1 else 'breakpoints'}", 1, differing[0]
        if self._is_writable(change):
            return f"was changed in memory, as its file asks for (writable code): {count}", 1, differing[0]
        if len(differing) > PAGE // 4:
            return f"was replaced in memory: {count}", 2, differing[0]
        worst: tuple[int, str, int] = (-1, "", differing[0])
        for start, end in runs[:64]:
            weight, text = self._hook(change.leaf.va, raw, start, end)
            worst = max(worst, (weight, text, start), key=lambda one: one[0])
        why = patches_itself(change.view.name) if self._scene.is_listed(change.view) else None
        if why is not None and not worst[1]:
            return f"was changed in memory, {why}: {count}", 1, worst[2]
        return f"was changed in memory: {count}{worst[1]}", worst[0], worst[2]

    def _hook(self, va: int, raw: bytes, start: int, end: int) -> tuple[int, str]:
        """What one run of changed bytes does: the weight, and where a jump in it leads."""
        for at in range(start, max(start - BACK, 0) - 1, -1):
            target = self._follow(raw[at : at + 16], va + at)
            view = self._scene.at(target) if target else None
            if view is None or at + 2 > end:
                continue
            if view.image:
                where = view.file.path if view.file else view.name
                if self._scene.is_listed(view) or not self._scene.modules:
                    return 1, f", a detour to {where} at {target:#x}"
                return 2, f", a detour to {where} at {target:#x}, which the loader does not know"
            return 2, f", a detour to memory of no image at {target:#x}"
        return 2, ""

    def _follow(self, code: bytes, va: int) -> int:
        """Where a jump ends: through trampolines in memory of no image, a few of them."""
        target = 0
        for _ in range(MAX_HOPS):
            jump = decode_jump(code, va, self._bits(va))
            if jump is None:
                return target
            target = jump.target
            try:
                if jump.indirect:
                    target = int.from_bytes(self._pages.space.read(target, self._bits(va) // 8), "little")
                view = self._scene.at(target)
                if view is None or view.image:
                    return target
                code, va = self._pages.space.read(target, 16), target
            except UnreadableMemory:
                return target
        return target

    def _bits(self, va: int) -> int:
        """Of the code at an address: a WOW64 process has images of both kinds."""
        view = self._scene.at(va)
        header = self._header(view) if view is not None and view.image else None
        return header.bits if header is not None else self._scene.bits

    def _is_loaders(self, change: Change, original: bytes, raw: bytes, differing: Sequence[int]) -> bool:
        """Whether all changes are what the loader writes: import addresses, and addresses in a moved image."""
        header = self._header(change.view)
        if header is None:
            return False
        rva = change.leaf.va - change.view.start
        rest = [at for at in differing if not any(start <= rva + at < end for start, end in header.imports)]
        if not rest:
            return True
        return is_relocated(original, raw, rest, change.view.start - header.base)

    def _is_writable(self, change: Change) -> bool:
        """Whether the file's own header asks for writable code there, as packed programs do."""
        header, rva = self._header(change.view), change.leaf.va - change.view.start
        sections = header.sections if header is not None else ()
        return any(part.writable and part.executable and part.start <= rva < part.end for part in sections)

    def _header(self, view: View) -> Header | None:
        """The header of an image: the shared page's, where that is in memory, since a process can change its own."""
        if view.start not in self._headers:
            shared = self._prototypes.shared(view.prototypes, [0])[0]
            raw = self._pages.space.memory.readv([(shared, PAGE)])[0] if shared else None
            if raw is None:
                raw = self._pages.space.readv([(view.start, PAGE)])[0]
            self._headers[view.start] = parse_header(raw) if raw is not None else None
        return self._headers[view.start]

    def _rest(self, changes: Sequence[Change]) -> Evidence:
        first = changes[0].leaf.va
        claim = f"{len(changes)} more pages of code from {first:#x} on were written to; they were not compared"
        return Evidence(claim, "modified-text", first, PAGE * len(changes), weight=1)


def _tell(runs: Sequence[tuple[int, int]], original: bytes, raw: bytes) -> str:
    """The differences as ``+0x5a0 5548 to cc90``, the first few of them."""
    told = []
    for start, stop in runs[:MAX_RUNS]:
        end = min(stop, start + MAX_RUN)
        told.append(f"+{start:#x} {original[start:end].hex()} to {raw[start:end].hex()}")
    return ", ".join(told) + (f" and {len(runs) - MAX_RUNS} more" if len(runs) > MAX_RUNS else "")
