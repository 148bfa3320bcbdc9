"""What of a process's executable memory is foreign: memory of no file, files in odd places, files without a name.

One look over the executable VMAs; what is odd about one is told with its place, size, protection, resident bytes and
their hash. Programs that make code at run time (JITs) have anonymous executable memory by nature: where such a runtime
is mapped, that counts less, unless the memory holds an ELF image or a thread began in it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from struct import Struct
from typing import Final, NamedTuple

from appliance.guest.budget import Budget
from appliance.guest.linux.injection_facts import VM_GROWSDOWN, VM_WRITE
from appliance.guest.linux.injection_files import MappedFile, find_runtime, has_regex_compiler, odd_place
from appliance.guest.linux.injection_pages import Digest, Pages
from appliance.guest.linux.vmas import MemoryMap, Vma
from appliance.guest.suspects import Suspect, Suspects
from appliance.model import Evidence

ELF_MAGIC: Final = b"\x7fELF"
MAX_DETAILED: Final = 64  # odd mappings of one process that are looked at one by one
REGEX_CHUNK: Final = 64 << 10  # sljit allocates executable memory in multiples of it (sljitExecAllocatorCore.c)
_BLOCK = Struct("<5Q")  # struct block_header and, of a free block, the rest of struct free_block
JIT_FILES: Final = ("/memfd:doublemapper", "/memfd:libffi", "/memfd:JITCode")  # .NET, libffi, Qt


class Oddity(NamedTuple):
    """One thing that is odd about a mapping."""

    kind: str
    weight: int
    claim: str


class Code(NamedTuple):
    """The executable memory of one process, ready to be judged."""

    vmas: tuple[Vma, ...]
    files: Mapping[int, MappedFile]
    program: MappedFile | None
    starts: Sequence[int]  # where threads began, sorted
    runtime: str | None  # what makes code in this process
    regexes: bool  # PCRE is there

    @classmethod
    def of(cls, memory: MemoryMap, files: Mapping[int, MappedFile], starts: Sequence[int]) -> Code:
        """From what was read; ``files`` are those with code and the program's own."""
        vmas = tuple(vma for vma in memory.vmas if vma.executable)
        names = {file.path.rsplit("/", 1)[-1] for file in files.values()}
        runtime, regexes = find_runtime(names), has_regex_compiler(names)
        return cls(vmas, files, files.get(memory.exe_file), starts, runtime, regexes)

    def began_in(self, vma: Vma) -> bool:
        """Whether a thread began in a mapping."""
        number = bisect_left(self.starts, vma.start)
        return number < len(self.starts) and self.starts[number] < vma.end

    @property
    def own_path(self) -> str:
        """Path of the program, empty where it is not known."""
        return self.program.path if self.program else ""


def judge_code(code: Code, reader: Pages, pgd: int, budget: Budget) -> tuple[list[Evidence], Suspects]:
    """Everything odd, and the ranges in which no thread should run.

    The heaviest come first and the others are counted: a process full of odd mappings hides none of them.
    """
    evidence: list[Evidence] = list(_program(code))
    suspects: list[Suspect] = []
    odd = [(vma, code.files.get(vma.file)) for vma in code.vmas if _is_odd(vma, code.files.get(vma.file), code)]
    odd.sort(key=lambda one: -_first_weight(one[0], one[1], code))
    for number, (vma, file) in enumerate(odd):
        if number >= MAX_DETAILED or budget.over:
            evidence.append(_counted(odd[number:], code))
            suspects += [_suspect(*one) for one in odd[number:] if _first_weight(*one, code) > 1]
            break
        pages = reader.resident(pgd, vma.start, vma.end, budget)
        digest = reader.digest(pages, vma.start, vma.end, budget)
        oddities = _file_oddities(vma, file, code) if file and not file.anonymous else []
        oddities = oddities or [_anonymous(vma, digest, code)]
        evidence += [_tell(oddity, vma, file, digest) for oddity in oddities]
        if max(oddity.weight for oddity in oddities) > 1:
            suspects.append(_suspect(vma, file))
    return evidence, Suspects(suspects)


def _first_weight(vma: Vma, file: MappedFile | None, code: Code) -> int:
    """How much a mapping weighs before its bytes are seen."""
    if file is not None and not file.anonymous:
        return max(oddity.weight for oddity in _file_oddities(vma, file, code))
    return 2 if vma.flags & VM_WRITE and code.runtime is None else 1


def _counted(rest: Sequence[tuple[Vma, MappedFile | None]], code: Code) -> Evidence:
    first, size = rest[0][0].start, sum(vma.end - vma.start for vma, _ in rest)
    claim = f"{len(rest)} more odd executable mappings, {size} bytes together, were not looked at one by one"
    return Evidence(claim, "anon-exec", first, size, weight=max(_first_weight(*one, code) for one in rest))


def _suspect(vma: Vma, file: MappedFile | None) -> Suspect:
    return Suspect(vma.start, vma.end, _name(vma, file))


def _is_odd(vma: Vma, file: MappedFile | None, code: Code) -> bool:
    if vma.special:
        return False
    return file is None or file.anonymous or bool(_file_oddities(vma, file, code))


def _program(code: Code) -> Iterator[Evidence]:
    program = code.program
    if program is None or not program.deleted:
        return
    place = odd_place(program.path, "")
    weight = 2 if program.in_memory or (place is not None and place[0] > 1) else 1
    claim = f"the program's own file {program.path} was deleted or replaced while it runs"
    yield Evidence(claim, "deleted-executable", detail=f"path {program.shown}", weight=weight)


def _file_oddities(vma: Vma, file: MappedFile, code: Code) -> list[Oddity]:
    found = []
    own = code.program is not None and file.inode == code.program.inode and file.inode != 0
    place = None if file.pseudo else odd_place(file.path, code.own_path)
    if file.in_memory:
        by_runtime = file.path.startswith(JIT_FILES)
        weight = 1 if by_runtime else 2
        note = ", as language runtimes have it" if by_runtime else ""
        claim = f"code is mapped from {file.path}, a file that exists in memory only{note}"
        found.append(Oddity("memfd", weight, claim))
    elif file.pseudo:
        found.append(Oddity("odd-path", 1, f"code is mapped from {file.path}, which is no file of any file system"))
    if place is not None:
        weight, why = place
        if code.runtime == "the Java virtual machine" and weight > 1 and file.path.count("/") == 2:
            weight, why = 1, f"{why}, as {code.runtime} does with its native libraries"
        found.append(Oddity("odd-path", weight, f"code is mapped from {file.path}, {why}"))
    if file.deleted and not own:
        weight = 2 if any(oddity.weight > 1 for oddity in found) else 1
        claim = f"code is mapped from {file.path}, which was deleted or replaced since"
        found.append(Oddity("deleted-file", weight, claim))
    if vma.flags & VM_WRITE:
        weight = 1 if code.runtime else 2
        note = f", as {code.runtime} may have it" if code.runtime else ""
        found.append(Oddity("writable-exec-file", weight, f"code of {file.path} is mapped writable{note}"))
    return found


def _anonymous(vma: Vma, digest: Digest, code: Code) -> Oddity:
    """Executable memory of no file. Writable at the same time, or filled by nobody we know, it is suspicious."""
    writable = bool(vma.flags & VM_WRITE)
    claim = ("writable and " if writable else "") + "executable memory that belongs to no file"
    claim += f" ({vma.label})" if vma.label else ""
    if digest.first.startswith(ELF_MAGIC):
        return Oddity("anon-exec", 2, f"{claim} and holds an ELF image")
    if code.began_in(vma):
        return Oddity("anon-exec", 2, f"{claim} and in which a thread began")
    if code.runtime is not None:
        return Oddity("anon-exec", 1, f"{claim}, as {code.runtime} makes it")
    if _is_regex_code(vma, digest, code):
        return Oddity("anon-exec", 1, f"{claim}, of the size and form in which PCRE compiles expressions")
    if vma.flags & VM_GROWSDOWN or vma.label in ("[stack]", "[heap]"):
        return Oddity("anon-exec", 1, f"{claim}: the program asks for an executable stack or heap")
    filled = digest.hashed > 0 and not digest.blank
    return Oddity("anon-exec", 2 if writable or filled else 1, claim)


def _is_regex_code(vma: Vma, digest: Digest, code: Code) -> bool:
    """A chunk of sljit begins with a block's header: its size (0: a free block, whose size follows), none before it."""
    if not code.regexes or (vma.end - vma.start) % REGEX_CHUNK or digest.first_va != vma.start:
        return False
    size, before, _, _, free = (int(word) for word in _BLOCK.unpack_from(digest.head))
    return 0 < (size or free) < vma.end - vma.start and before == 0 and (size or free) % 16 == 0


def _name(vma: Vma, file: MappedFile | None) -> str:
    if file is None or file.anonymous:
        return f"executable memory of no file at {vma.start:#x}"
    return file.path


def _tell(oddity: Oddity, vma: Vma, file: MappedFile | None, digest: Digest) -> Evidence:
    where = f"path {file.shown}" if file is not None else f"label {vma.label}" if vma.label else "no file"
    detail = f"{vma.protection}; {digest}; {where}"
    return Evidence(oddity.claim, oddity.kind, vma.start, vma.end - vma.start, digest.sha256, detail, oddity.weight)
