"""What a profile may ask of a process. An answer is yes, no, or None: the guest did not let us know.

The image path comes from the guest's kernel; name and command line are chosen by the process itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.model import GuestProcess, Missing
from appliance.rules.globs import MAX_TEXT, Glob, looks_windows

Answer = bool | None

_SERVICE_OF_SVCHOST = re.compile(r'\s-s\s+"?([^\s"]{1,256})')  # svchost.exe -k GROUP -p -s SERVICE
_UNITS = (".service", ".scope")


@dataclass(frozen=True, slots=True)
class Actor:
    """One process under judgement, and what is known around it."""

    process: GuestProcess
    parent: GuestProcess | None
    fold: bool  # a Windows guest: the case of letters means nothing

    def text(self, what: str) -> str | Missing | None:
        """The text that a condition looks at; None: there is none; Missing: there may be one that was not readable."""
        process = self.process
        match what:
            case "name":
                return process.name
            case "service":
                return service_of(process, self.fold)
            case "command":
                return _known(process.command)
            case "container":
                return process.container or None
        return None


def image_of(process: GuestProcess) -> str | Missing | None:
    """The path of the executable; a kernel thread has none."""
    path = process.path
    if isinstance(path, str):
        return path if len(path) <= MAX_TEXT else Missing.IMPLAUSIBLE
    return None if path is Missing.NOT_APPLICABLE else path


def service_of(process: GuestProcess, windows: bool) -> str | Missing | None:
    """The service it runs for: the systemd unit in its cgroup path, or svchost's ``-s`` argument on Windows."""
    if windows or (isinstance(process.path, str) and looks_windows(process.path)):
        command = _known(process.command)
        if not isinstance(command, str):
            return command
        found = _SERVICE_OF_SVCHOST.search(command)
        return found[1] if found else None
    cgroup = _known(process.cgroup)
    if not isinstance(cgroup, str):
        return cgroup
    unit = next((part for part in reversed(cgroup.split("/")) if part.endswith(_UNITS)), "")
    return unit.removesuffix(".service") if unit.endswith(".service") else None


def _known(text: str | Missing) -> str | Missing | None:
    return None if text is Missing.NOT_APPLICABLE or text is Missing.UNKNOWN else text


@dataclass(frozen=True, slots=True)
class TextIs:
    """One of the process's texts fits one of the patterns."""

    what: str
    patterns: tuple[Glob, ...]

    def holds(self, actor: Actor) -> Answer:
        """Ask the process."""
        text = actor.text(self.what)
        if isinstance(text, str):
            return any(pattern.matches(text, fold=actor.fold) for pattern in self.patterns)
        return False if text is None else None

    def meets(self, other: Condition) -> bool:
        """Whether one process can satisfy both."""
        if isinstance(other, TextIs) and other.what == self.what:
            return any(mine.meets(theirs) for mine in self.patterns for theirs in other.patterns)
        return True


@dataclass(frozen=True, slots=True)
class UserIs:
    """It runs as one of these users, by number or by the name in the guest's own passwd."""

    uids: frozenset[int]
    names: frozenset[str]

    @classmethod
    def of(cls, users: Iterable[int | str]) -> UserIs:
        """Numbers are uids, texts are names; root is always 0."""
        listed = tuple(users)
        uids = {user for user in listed if isinstance(user, int)}
        names = {user for user in listed if isinstance(user, str)}
        return cls(frozenset(uids | {0} if "root" in names else uids), frozenset(names - {"root"}))

    def holds(self, actor: Actor) -> Answer:
        """Ask the process; None where it has no readable name and only a name could tell."""
        process = actor.process
        if process.uid in self.uids:
            return True
        if not self.names:
            return False
        if process.user is None:
            return None
        if not actor.fold:
            return process.user in self.names
        user = process.user.lower()
        wanted = {name.lower() for name in self.names}
        return user in wanted or user.rpartition("\\")[2] in wanted

    def meets(self, other: Condition) -> bool:
        """Whether one process can satisfy both: a name and a number may be the same user, but for root and 0."""
        if not isinstance(other, UserIs):
            return True
        mixed = (self.uids - {0} and other.names) or (self.names and other.uids - {0})
        same_name = {name.lower() for name in self.names} & {name.lower() for name in other.names}
        return bool(mixed or self.uids & other.uids or same_name)


@dataclass(frozen=True, slots=True)
class ParentIs:
    """Its parent's image (a pattern with a separator) or name fits."""

    images: tuple[Glob, ...]
    names: tuple[Glob, ...]

    def holds(self, actor: Actor) -> Answer:
        """Ask the parent; None where it is not known."""
        if actor.parent is None:
            return False if actor.process.parent_pid == 0 else None
        if any(pattern.matches(actor.parent.name, fold=actor.fold) for pattern in self.names):
            return True
        image = image_of(actor.parent)
        if isinstance(image, str):
            return any(pattern.matches(image, fold=actor.fold) for pattern in self.images)
        return None if self.images and image is not None else False

    def meets(self, other: Condition) -> bool:
        """Whether one process can satisfy both: a name says nothing about an image."""
        if not isinstance(other, ParentIs):
            return True
        if (self.images and other.names) or (self.names and other.images):
            return True
        pairs = [(a, b) for a in self.images for b in other.images] + [(a, b) for a in self.names for b in other.names]
        return any(mine.meets(theirs) for mine, theirs in pairs)


@dataclass(frozen=True, slots=True)
class DeletedIs:
    """Its executable file has, or has no, name any more."""

    deleted: bool

    def holds(self, actor: Actor) -> Answer:
        """Ask the process."""
        return actor.process.deleted is self.deleted

    def meets(self, other: Condition) -> bool:
        """Whether one process can satisfy both."""
        return not isinstance(other, DeletedIs) or other.deleted is self.deleted


@dataclass(frozen=True, slots=True)
class ContainedIs:
    """It runs in some container, or in none."""

    contained: bool

    def holds(self, actor: Actor) -> Answer:
        """Ask the process."""
        return bool(actor.process.container) is self.contained

    def meets(self, other: Condition) -> bool:
        """Whether one process can satisfy both."""
        if isinstance(other, ContainedIs):
            return other.contained is self.contained
        return self.contained or not (isinstance(other, TextIs) and other.what == "container")


Condition = TextIs | UserIs | ParentIs | DeletedIs | ContainedIs


def all_hold(conditions: tuple[Condition, ...], actor: Actor) -> Answer:
    """Every condition together: no as soon as one says no, None when the rest is yes but something is not known."""
    doubt = False
    for condition in conditions:
        answer = condition.holds(actor)
        if answer is False:
            return False
        doubt = doubt or answer is None
    return None if doubt else True


def can_coincide(left: tuple[Condition, ...], right: tuple[Condition, ...]) -> bool:
    """Whether one process can satisfy all of both."""
    return all(mine.meets(theirs) and theirs.meets(mine) for mine in left for theirs in right)
