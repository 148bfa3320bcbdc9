"""Images of a process that are not what they seem: hollowed, unlisted, from odd places, under a false name.

Four views are compared: the kernel's regions (VADs) with their files, the kernel's note of the program's own section
(`_EPROCESS.SectionBaseAddress`, `SectionObject`, `ImageFilePointer`), the process's own block (`_PEB`), and the
loader's lists. Process and loader can lie in the last two; a contradiction is the finding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from appliance.guest.budget import Budget
from appliance.guest.windows.injection_bytes import Header, parse_header
from appliance.guest.windows.injection_pages import PAGE, Pages, Prototypes
from appliance.guest.windows.injection_paths import (
    Place,
    compare,
    is_native_image,
    is_resource,
    odd_place,
    parse_place,
)
from appliance.guest.windows.injection_views import MappedFile, Module, Scene, View
from appliance.model import Evidence

MAX_HASHED: Final = 4 << 20  # bytes of an image that are hashed
MAX_TOLD: Final = 32  # of one kind
FIRST_IMAGES: Final = 3  # that the kernel maps before there is a loader: the program, ntdll.dll, WOW64's ntdll.dll


class Program(NamedTuple):
    """What kernel and process say of the program's own image."""

    section_base: int  # _EPROCESS.SectionBaseAddress; 0: the types have none
    file: MappedFile | None  # of _EPROCESS.ImageFilePointer or the section, None: not known
    peb: int  # where the process's own block lies
    peb_base: int | None  # _PEB.ImageBaseAddress; None: unreadable
    peb_path: str | None  # _RTL_USER_PROCESS_PARAMETERS.ImagePathName
    command: str | None


def judge_places(scene: Scene, pages: Pages, budget: Budget) -> Iterator[Evidence]:
    """Code from where no code belongs, and from files that are being deleted."""
    seen: set[str] = set()
    for view in scene.views:
        file = view.file
        if budget.over:
            budget.cut_off(f"places of images from {view.start:#x} on")
            return
        if file is None or not (view.image or view.executable) or file.place.rest in seen:
            continue
        seen.add(file.place.rest)
        main = file.place.rest == scene.program.rest
        claims: list[tuple[str, int, str]] = []
        if file.deleted:
            claims.append(("deleted-file", 2 if main else 1, "which is being deleted"))
        odd = odd_place(file.place, scene.program, system=scene.system)
        if odd is None and (file.remote or file.removable):
            odd = 2 if scene.system else 1, "another machine's share" if file.remote else "a removable medium"
        if odd is not None:
            claims.append(("odd-path", *odd))
        for kind, weight, why in claims:
            yield _told(f"code is mapped from {file.path}, {why}", kind, view, pages, budget, weight)


def judge_lists(scene: Scene, pages: Pages, budget: Budget) -> Iterator[Evidence]:
    """Images that the loader does not know, and modules of the loader that are no images."""
    if not scene.modules:
        images = sum(view.image for view in scene.views)
        if images > FIRST_IMAGES and scene.lists_whole:
            claim = f"none of {images} mapped images is in the loader's lists, which are empty"
            yield Evidence(claim, "unlisted-module", weight=1)
        return
    listed = {module.base: module for module in scene.modules}
    told = 0
    for view in scene.views:
        if not view.image or (view.start in listed and _in_enough(listed[view.start])):
            continue
        weight, claim = _unlisted(view, listed.get(view.start), scene)
        if not weight:
            continue
        told += 1
        if told > MAX_TOLD:
            yield Evidence(f"more than {MAX_TOLD} images are not listed by the loader", "unlisted-module", weight=1)
            return
        yield _told(claim, "unlisted-module", view, pages, budget, weight)
    yield from _false_modules(scene)


def _in_enough(module: Module) -> bool:
    """Whether a module is listed as modules are: the program is never in the list of initializations, others late."""
    return module.in_load and module.in_memory


def _unlisted(view: View, module: Module | None, scene: Scene) -> tuple[int, str]:
    name = view.file.path if view.file else f"the image at {view.start:#x}"
    if module is not None:
        lists = [
            text
            for text, there in (
                ("load order", module.in_load),
                ("memory order", module.in_memory),
                ("initialization order", module.in_init),
            )
            if there
        ]
        weight = 2 if scene.lists_whole else 1
        return weight, f"{name} is in the loader's list of {' and '.join(lists)} only"
    claim = f"{name} is mapped as an image and in none of the loader's lists"
    place = view.file.place if view.file else None
    if place is not None and is_resource(place):
        return 0, claim
    if place is not None and is_native_image(place) and scene.runtime == ".NET":
        return 0, claim
    if not view.executable and not scene.began_in(view.start, view.end):
        return 1, f"{claim}, but as one that cannot be run (SEC_IMAGE_NO_EXECUTE)"
    if not scene.lists_whole:
        return 1, f"{claim}, which could not be read to their ends"
    if place is not None and _is_systems(place, scene) and not scene.began_in(view.start, view.end):
        return 1, f"{claim}, as of images that are opened for their resources only"
    return 2, claim


def _false_modules(scene: Scene) -> Iterator[Evidence]:
    """Entries of the loader at whose place there is no image, or the image of another file."""
    told = 0
    for module in scene.modules:
        view = scene.at(module.base)
        detail = f"base {module.base:#x}; size {module.size:#x}; loader's path {module.path}"
        if view is None or not view.image:
            if view is not None and view.file is not None and not view.executable:
                continue  # opened as a data file; .NET does so with assemblies that hold no machine code
            weight = 2 if view is not None and view.executable else 1
            where = "nothing is mapped" if view is None else f"{view.protection} memory of no image is"
            claim = f"the loader lists {module.name} where {where}"
            found = Evidence(claim, "fake-module", module.base, module.size, None, detail, weight)
        elif view.file is not None and view.file.path != "?" and view.start == module.base:
            difference = compare(view.file.place, parse_place(module.path or module.name))
            if difference != "name":
                continue
            claim = f"the loader calls the image {view.file.path} {module.path or module.name}"
            found = Evidence(claim, "peb-masquerade", module.base, module.size, None, detail, 2)
        else:
            continue
        told += 1
        if told > MAX_TOLD:
            yield Evidence(f"more than {MAX_TOLD} modules of the loader are false", found.kind, weight=found.weight)
            return
        yield found


def judge_program(
    scene: Scene, program: Program, pages: Pages, prototypes: Prototypes, budget: Budget
) -> Iterator[Evidence]:
    """Whether the program's own image is the one that the kernel started."""
    base = program.section_base or program.peb_base or 0
    view = scene.at(base) if base else None
    moved = program.section_base and program.peb_base is not None and program.peb_base != program.section_base
    if moved:
        other = scene.at(program.peb_base or 0)
        claim = (
            f"the process says that its program lies at {program.peb_base:#x}, "
            f"and the kernel started the one at {program.section_base:#x}"
        )
        yield _hollowed(claim, other, program.peb_base or 0, pages, budget)
    if base and (view is None or not view.image or view.start != base):
        what = "nothing is" if view is None else f"{view.protection} memory, no image, is"
        yield _hollowed(
            f"the program's own image is gone from {base:#x}: {what} mapped there", view, base, pages, budget
        )
    elif view is not None and view.file is not None and program.file is not None:
        difference = _difference(view.file, program.file)
        if difference != "same":
            claim = f"the program's image is {view.file.path}, and the process was started from {program.file.path}"
            # A file with two names (the system's own have one in WinSxS) is mapped under the one that was used first.
            yield _hollowed(claim, view, base, pages, budget, 2 if difference == "name" else 1)
    if view is not None and view.image:
        yield from _judge_header(view, pages, prototypes, budget)
    yield from judge_names(program, view.file if view is not None and view.image else None)


def judge_names(program: Program, file: MappedFile | None) -> Iterator[Evidence]:
    """Whether the process says of itself what the kernel says of it."""
    file = program.file or file
    if file is None or file.path == "?":
        return
    if program.peb_path:
        difference = compare(file.place, parse_place(program.peb_path))
        if difference != "same":
            claim = f"the process calls itself {program.peb_path}, and the kernel started {file.path}"
            detail = f"ImagePathName {program.peb_path}; file {file.path}"
            yield Evidence(claim, "peb-masquerade", program.peb, 0, None, detail, 2 if difference == "name" else 1)
            return
    first = _first_word(program.command or "")
    name = parse_place(first).name if first else ""
    if name.endswith(".exe") and name != file.name and "~" not in name:
        claim = f"its command line calls the program {name}, and the kernel started {file.path}"
        detail = f"CommandLine {(program.command or '')[:512]}; file {file.path}"
        yield Evidence(claim, "peb-masquerade", program.peb, 0, None, detail, 1)


def _difference(mapped: MappedFile, started: MappedFile) -> str:
    return "same" if "?" in (mapped.path, started.path) else compare(started.place, mapped.place)


def _judge_header(view: View, pages: Pages, prototypes: Prototypes, budget: Budget) -> Iterator[Evidence]:
    leaves = pages.leaves([(view.start, view.start + PAGE)], budget)
    raw = pages.read(leaves)[0] if leaves else None
    shared = prototypes.shared(view.prototypes, [0])[0]
    if raw is None or shared == leaves[0].gpa:
        return
    original = pages.space.memory.readv([(shared, PAGE)])[0] if shared else None
    detail = (
        f"{view.protection}; bytes at {view.start:#x}: {raw[:32].hex()}; path {view.file.path if view.file else '?'}"
    )
    header = parse_header(raw)
    if header is None:
        claim = f"the header of the program's image at {view.start:#x} was wiped or written over"
    elif original is None or (before := parse_header(original)) is None:
        return
    elif _essentials(header) != _essentials(before):
        claim = f"the header of the program's image at {view.start:#x} is that of another program"
    else:
        return
    yield Evidence(claim, "hollowed", view.start, view.end - view.start, None, detail, 2)


def _essentials(header: Header) -> tuple[object, ...]:
    return header.machine, header.stamp, header.entry, header.size, [s[:3] for s in header.sections]


def _hollowed(claim: str, view: View | None, address: int, pages: Pages, budget: Budget, weight: int = 2) -> Evidence:
    if view is None:
        return Evidence(claim, "hollowed", address, weight=weight)
    return _told(claim, "hollowed", view, pages, budget, weight)


def _told(claim: str, kind: str, view: View, pages: Pages, budget: Budget, weight: int) -> Evidence:
    """A finding about a whole region, with its bytes."""
    end = min(view.end, view.start + MAX_HASHED)
    digest, _ = pages.digest(pages.leaves([(view.start, end)], budget), view.start, end, budget)
    detail = f"{view.protection}; {digest}; path {view.file.path if view.file else 'none'}"
    return Evidence(claim, kind, view.start, view.end - view.start, digest.sha256, detail, weight)


def _is_systems(place: Place, scene: Scene) -> bool:
    """Whether a file lies among the system's own."""
    return place.rest.startswith("\\windows\\") and odd_place(place, scene.program, system=scene.system) is None


def _first_word(command: str) -> str:
    text = command.strip()
    if text.startswith('"'):
        return text[1:].split('"', 1)[0]
    return text.split(" ", 1)[0]
