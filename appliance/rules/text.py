"""YAML text to plain data that remembers where everything stands.

A policy file must mean what it seems to mean, so this reads less than YAML offers: no aliases, no tags, no duplicate
keys, one document; and plain scalars are only ``true``, ``false``, ``null`` and decimal integers: ``no``, ``on``,
``012`` and ``1:30`` are text, as they look. Everything is bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from appliance.errors import Problem

MAX_BYTES = 2 << 20
MAX_DEPTH = 20
MAX_NODES = 200_000

Path = tuple[str | int, ...]
Spot = tuple[int, int]  # line and column, from 1

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})\Z")
_WORDS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands and where its key stands; lines and columns count from 1."""

    line: int
    column: int
    key_line: int
    key_column: int


@dataclass(slots=True)
class Document:
    """What a file says, where it says it, and what was wrong with the YAML itself."""

    file: str
    data: object = None
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)  # values that could not be taken; already reported

    def place(self, path: Path) -> Place:
        """The place of a value, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if (found := self.places.get(path[:end])) is not None:
                return found
        return Place(1, 1, 1, 1)

    def line(self, path: Path) -> int:
        """The line of the key of a value."""
        return self.place(path).key_line

    def report(self, path: Path, message: str, suggestion: str | None = None, *, at_key: bool = False) -> None:
        """Add a problem at a value, or at its key."""
        self.problems.append(self.problem(path, message, suggestion, at_key=at_key))

    def problem(self, path: Path, message: str, suggestion: str | None = None, *, at_key: bool = False) -> Problem:
        """Build a problem that stands at a value, or at its key."""
        place = self.place(path)
        line, column = (place.key_line, place.key_column) if at_key else (place.line, place.column)
        return Problem(self.file, line, column, message, suggestion)


class _TooMuchError(Exception):
    """A bound was reached; the problem is already reported."""


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that is being filled."""

    value: dict[str, object] | list[object]
    path: Path
    key: str | None = None
    key_spot: Spot = (1, 1)
    skip: bool = False  # the key before this value was refused


def parse(text: str, file: str) -> Document:
    """Read one document. Never raises: what is wrong is in ``problems``."""
    document = Document(file)
    try:
        _Builder(document).run(text)
    except _TooMuchError:
        document.data = None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        hint = "write blanks, not tabs" if _is_tab(text, line, column) else None
        document.problems.append(Problem(file, line, column, f"this is not YAML: {what}", hint))
        document.data = None
    except yaml.reader.ReaderError as error:
        document.problems.append(_unreadable(text, file, error))
        document.data = None
    return document


def _is_tab(text: str, line: int, column: int) -> bool:
    """Whether a tab stands there, or as the very first thing of that line."""
    (found,) = text.split("\n")[line - 1 : line] or [""]
    return found[column - 1 : column] == "\t" or found[:1] == "\t"


def _unreadable(text: str, file: str, error: yaml.reader.ReaderError) -> Problem:
    found = re.search(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
    before = text[: found.start()] if found else ""
    return Problem(
        file,
        before.count("\n") + 1,
        len(before) - (before.rfind("\n") + 1) + 1,
        f"this is not YAML: {error.reason}",
        f"remove the character U+{ord(found[0]):04X}" if found else None,
    )


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.stack: list[_Open] = []
        self.nodes = 0
        self.documents = 0

    def run(self, text: str) -> None:
        for event in yaml.parse(text, Loader=_LOADER):
            match event:
                case yaml.DocumentStartEvent():
                    self.documents += 1
                    if self.documents > 1:
                        self._fail(_spot(event), "a second YAML document", "one rule set per file")
                        return
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    self.stack.pop()
                case yaml.AliasEvent():
                    self._alias(event)
                case yaml.ScalarEvent() | yaml.CollectionStartEvent():
                    self._node(event)

    def _fail(self, spot: Spot, message: str, suggestion: str | None = None) -> None:
        self.document.problems.append(Problem(self.document.file, *spot, message, suggestion))

    def _alias(self, event: yaml.AliasEvent) -> None:
        self._fail(_spot(event), f"an alias (*{event.anchor}) is not allowed in a rule file", "write it out")
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and top.key is None:
            top.key, top.key_spot, top.skip = "*", _spot(event), True
        else:
            self.document.broken.add(self._put(None, _spot(event)))

    def _node(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self._fail(_spot(event), f"the file holds more than {MAX_NODES} values", "split it")
            raise _TooMuchError
        if event.anchor is not None:
            self._fail(_spot(event), f"an anchor (&{event.anchor}) is not allowed in a rule file", "write it out")
        if event.tag is not None:
            self._fail(_spot(event), f"a tag ({event.tag}) is not allowed in a rule file", "leave it out")
        top = self.stack[-1] if self.stack else None
        is_key = top is not None and isinstance(top.value, dict) and top.key is None
        if isinstance(event, yaml.ScalarEvent):
            if top is not None and is_key:
                self._key(top, event)
            else:
                self._put(_scalar(event), _spot(event))
            return
        value: dict[str, object] | list[object] = {} if isinstance(event, yaml.MappingStartEvent) else []
        if top is not None and is_key:
            self._fail(_spot(event), "a key must be a plain word")
            top.key, top.key_spot, top.skip = "?", _spot(event), True
            self._open(_Open(value, (*top.path, "?")), _spot(event))
        else:
            self._open(_Open(value, self._put(value, _spot(event))), _spot(event))

    def _open(self, opened: _Open, spot: Spot) -> None:
        self.stack.append(opened)
        if len(self.stack) > MAX_DEPTH:
            self._fail(spot, f"more than {MAX_DEPTH} levels deep")
            raise _TooMuchError

    def _key(self, top: _Open, event: yaml.ScalarEvent) -> None:
        top.key, top.key_spot = event.value, _spot(event)
        assert isinstance(top.value, dict)
        if event.value in top.value:
            first = self.document.places[(*top.path, event.value)].key_line
            self._fail(_spot(event), f"'{event.value}' is given twice", f"the first one is in line {first}")
            top.skip = True

    def _put(self, value: object, spot: Spot) -> Path:
        """Store a value where it belongs and return its path."""
        line, column = spot
        if not self.stack:
            self.document.data = value
            self.document.places[()] = Place(line, column, line, column)
            return ()
        top = self.stack[-1]
        if isinstance(top.value, list):
            path: Path = (*top.path, len(top.value))
            top.value.append(value)
            self.document.places[path] = Place(line, column, line, column)
            return path
        assert top.key is not None
        path = (*top.path, top.key)
        if not top.skip:
            top.value[top.key] = value
            self.document.places[path] = Place(line, column, *top.key_spot)
        else:
            path = (*top.path, top.key, "?")  # what stands below a refused key must not overwrite the first one
        top.key, top.skip = None, False
        return path


def _scalar(event: yaml.ScalarEvent) -> str | int | bool | None:
    text: str = event.value
    if event.style is not None and event.style != "":
        return text
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _INTEGER.match(text) else text


def _spot(event: yaml.Event) -> Spot:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
