"""What went wrong, named after who must act.

Each error knows the exit code a command ends with (docs/tutorial.md lists them).
"""

from __future__ import annotations

from dataclasses import dataclass


class ParasightError(Exception):
    """Base of everything Parasight raises on purpose; its text is for the person at the terminal."""

    exit_code = 70


class UsageError(ParasightError):
    """The person at the terminal: an unknown guest, a PID that is no QEMU, options that do not fit."""

    exit_code = 2


class ConfigError(ParasightError):
    """The operator: a file that cannot be used as it is (configuration, capture, memory image)."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a rule file, where it stands and how to mend it. Lines and columns count from 1."""

    path: str
    line: int
    column: int
    message: str
    suggestion: str | None = None

    def __str__(self) -> str:
        hint = f" ({self.suggestion})" if self.suggestion else ""
        return f"{self.path}:{self.line}:{self.column}: {self.message}{hint}"


class RuleError(ParasightError):
    """The rule author: every mistake of every file at once. As text it tells the first `SHOWN` of them."""

    exit_code = 3
    SHOWN = 200

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        lines = [str(problem) for problem in problems[: self.SHOWN]]
        if len(problems) > self.SHOWN:
            lines.append(f"and {len(problems) - self.SHOWN} more")
        super().__init__("\n".join(lines))


class HostError(ParasightError):
    """The host or the hypervisor: something is missing, broken or not supported; says the remedy."""

    exit_code = 6


class PermissionRefused(HostError):
    """The host refuses what we need; the text names the capability or setting that mends it."""

    exit_code = 5


class GuestError(ParasightError):
    """The guest: torn, hostile or unknown content. Counted and named, never fatal to other guests."""

    exit_code = 6


class UnreadableMemory(GuestError):
    """Guest memory that cannot be read: not RAM, not mapped, or gone."""

    def __init__(self, address: int, size: int, why: str = "not mapped") -> None:
        self.address, self.size, self.why = address, size, why
        super().__init__(f"cannot read {size} bytes of guest memory at {address:#x}: {why}")


class OutOfTime(GuestError):
    """A walk through the guest took longer than it may: cut short, named, and never told beyond the port."""


class Implausible(GuestError):
    """Guest memory that was read but cannot be what it should be."""


class GuestGone(GuestError):
    """The guest ended, or its identity changed, while it was looked at."""


class UnsupportedGuest(GuestError):
    """The guest's kernel lacks what attaching needs; ``missing`` names each lack."""

    def __init__(self, missing: tuple[str, ...]) -> None:
        self.missing = missing
        super().__init__("this guest's kernel cannot be read: " + "; ".join(missing))
