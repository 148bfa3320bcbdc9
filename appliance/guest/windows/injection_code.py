"""Executable memory of a process that no image file stands behind.

Regions that were made executable, and pages that were made so later: VirtualProtect changes the page tables, and the
region keeps the protection it was made with. Programs that make code at run time (JITs) have such memory by nature:
where such a runtime is mapped it counts less, unless it holds an image or shellcode, or a thread began in it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from appliance.errors import Implausible, UnreadableMemory
from appliance.guest.budget import Budget
from appliance.guest.suspects import Suspect, Suspects
from appliance.guest.windows.injection_bytes import find_image, find_shellcode, looks_wiped
from appliance.guest.windows.injection_pages import PAGE, Digest, Leaf, Pages, merge, small_of
from appliance.guest.windows.injection_paths import SANDBOXED
from appliance.guest.windows.injection_views import Scene, View
from appliance.model import Evidence

MAX_DETAILED: Final = 64  # regions of one process that are looked at one by one
MAX_RANKED: Final = 4096  # of whose first page tells which these are


class Patch(NamedTuple):
    """Executable memory of no image: a whole region, or a run of pages in one."""

    start: int
    end: int
    view: View
    writable: bool
    leaves: list[Leaf]
    whole: bool  # the region was made executable, as a whole

    @property
    def protection(self) -> str:
        """What is told of its rights."""
        if self.whole:
            return self.view.protection
        rights = "PAGE_EXECUTE_READWRITE" if self.writable else "PAGE_EXECUTE_READ"
        return f"{rights} now, in a region made {self.view.protection}"


def judge_code(scene: Scene, pages: Pages, budget: Budget, *, trust_nx: bool) -> tuple[list[Evidence], Suspects]:
    """Everything odd, and the ranges in which no thread should run; the heaviest is looked at first.

    ``trust_nx``: pages of this process are executable only where that was asked for.
    """
    evidence: list[Evidence] = []
    suspects: list[Suspect] = []
    patches = _ranked(list(_patches(scene, pages, budget, trust_nx=trust_nx)), scene, pages, budget)
    for number, patch in enumerate(patches):
        if number >= MAX_DETAILED or budget.over:
            evidence.append(_counted(patches[number:], scene))
            suspects += [_suspect(rest, _first_weight(rest, scene)) for rest in patches[number:]]
            break
        found = _judge(patch, scene, pages, budget)
        evidence.append(found)
        suspects.append(_suspect(patch, found.weight))
        evidence += _unseen(patch, pages)
    return evidence, Suspects(suspects)


def _patches(scene: Scene, pages: Pages, budget: Budget, *, trust_nx: bool) -> Iterator[Patch]:
    made = [view for view in scene.views if view.executable and not view.image]
    for view, leaves in _share(made, pages.leaves([(view.start, view.end) for view in made], budget)):
        writable = view.writable or any(leaf.writable and leaf.executable for leaf in leaves)
        yield Patch(view.start, view.end, view, writable, leaves, whole=True)
    if not (trust_nx and pages.has_nx):
        return
    others = [view for view in scene.views if not view.executable and not view.image]
    found = pages.leaves([(view.start, view.end) for view in others], budget, executable=True)
    for view, leaves in _share(others, found):
        for run in merge(leaves):
            writable = any(leaf.writable for leaf in run)
            yield Patch(run[0].va, run[-1].va + run[-1].size, view, writable, run, whole=False)


def _share(views: Sequence[View], leaves: Sequence[Leaf]) -> Iterator[tuple[View, list[Leaf]]]:
    """Which pages lie in which view; both are sorted, and no page lies in two."""
    starts = [leaf.va for leaf in leaves]
    for view in views:
        low, high = bisect_left(starts, view.start), bisect_left(starts, view.end)
        if view.executable or low < high:
            yield view, list(leaves[low:high])


def _ranked(patches: list[Patch], scene: Scene, pages: Pages, budget: Budget) -> list[Patch]:
    """The heaviest first: what many regions that hold nothing would hide, their first pages tell."""
    ranks = {patch.start: _first_weight(patch, scene) for patch in patches}
    patches.sort(key=lambda patch: -ranks[patch.start])
    if len(patches) > MAX_DETAILED:
        some = [patch for patch in patches[:MAX_RANKED] if patch.leaves]
        for at in range(0, len(some), MAX_DETAILED):
            if budget.over:
                break
            part = some[at : at + MAX_DETAILED]
            budget.spend(len(part))
            heads = pages.read([leaf for patch in part for leaf in small_of(patch.leaves[:1], 1)])
            for patch, raw in zip(part, heads, strict=True):
                if raw is not None and (find_image(raw) is not None or find_shellcode(raw) is not None):
                    ranks[patch.start] = 3
        patches.sort(key=lambda patch: -ranks[patch.start])
    return patches


def _first_weight(patch: Patch, scene: Scene) -> int:
    """How much a patch weighs before its bytes are seen."""
    if scene.began_in(patch.start, patch.end):
        return 2
    return 2 if patch.writable and scene.runtime is None else 1


def _judge(patch: Patch, scene: Scene, pages: Pages, budget: Budget) -> Evidence:
    digest, contents = pages.digest(patch.leaves, patch.start, patch.end, budget)
    kind, weight, claim = _weigh(patch, scene, digest, contents)
    file = patch.view.file
    where = f"path {file.path}" if file else "no file" if patch.view.private else "shared memory of no file"
    detail = f"{patch.protection}; {digest}; {where}"
    return Evidence(claim, kind, patch.start, patch.end - patch.start, digest.sha256, detail, weight)


def _unseen(patch: Patch, pages: Pages) -> Iterator[Evidence]:
    """What of it is not in memory."""
    try:
        count = pages.count_paged_out(patch.start, patch.end)
    except (UnreadableMemory, Implausible) as error:
        yield Evidence(f"executable memory at {patch.start:#x} could not be seen in full: {error}", "gap", patch.start)
        return
    if count:
        claim = f"executable memory at {patch.start:#x} could not be seen in full: paged out: {count} of its pages"
        yield Evidence(claim, "gap", patch.start, count * PAGE)


def _weigh(patch: Patch, scene: Scene, digest: Digest, contents: Sequence[tuple[int, bytes]]) -> tuple[str, int, str]:
    file = patch.view.file
    claim = ("writable and " if patch.writable else "") + "executable memory that belongs to no image"
    if file is not None:
        claim += f", but maps {file.path} as data"
    elif not patch.view.private:
        claim += " and can be shared with other processes"
    if not patch.whole:
        claim += ", made executable after it was allocated"
    image = _find_image(patch, contents)
    if image is not None:
        return "injected-pe", 2, f"{claim} and holds {image[1]} at {image[0]:#x}"
    if scene.began_in(patch.start, patch.end):
        return "anon-exec", 2, f"{claim} and in which a thread began"
    for va, raw in contents:
        shell = find_shellcode(raw, sandbox=scene.runtime in SANDBOXED)
        if shell is not None:
            return "anon-exec", 2, f"{claim} and holds shellcode at {va + shell[0]:#x}: {shell[1]}"
    if scene.runtime is not None:
        return "anon-exec", 1, f"{claim}, as {scene.runtime} makes it"
    return "anon-exec", 2 if patch.writable and not digest.blank else 1, claim


def _find_image(patch: Patch, contents: Sequence[tuple[int, bytes]]) -> tuple[int, str] | None:
    """Where an image begins in it: at the start of any page, by its header or by what is left of that."""
    for va, raw in contents:
        what = find_image(raw) if va % PAGE == 0 else None
        if what is not None:
            return va, what
    by_va = dict(contents)
    if by_va.get(patch.start, b"").startswith(b"MZ"):
        return patch.start, "what begins as an image does"
    first, second = by_va.get(patch.start), by_va.get(patch.start + PAGE)
    if patch.whole and patch.end - patch.start >= 3 * PAGE and looks_wiped(first, second):
        return patch.start, "compiled code behind a blank page, as an image whose header was wiped,"
    return None


def _counted(rest: Sequence[Patch], scene: Scene) -> Evidence:
    first, size = rest[0].start, sum(patch.end - patch.start for patch in rest)
    claim = f"{len(rest)} more executable regions of no image, {size} bytes together, were not looked at one by one"
    return Evidence(claim, "anon-exec", first, size, weight=max(_first_weight(patch, scene) for patch in rest))


def _suspect(patch: Patch, weight: int) -> Suspect:
    file = patch.view.file
    what = f"data file {file.path}" if file else "memory of no file"
    return Suspect(patch.start, patch.end, f"executable {what} at {patch.start:#x}", weight)
