"""Globs over paths and over plain text: matching in bounded time, and whether two of them can meet.

``?`` is one character, ``*`` any run of characters, ``**`` any run that may also cross path separators. In plain text
(a name, a command line) there are no separators, so ``*`` and ``**`` mean the same. Nothing else is special.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

SEPARATORS = "/\\"
MAX_TEXT = 8192  # longer paths come from a hostile guest: PATH_MAX is 4096
_LITERAL_RANK = 1 << 16


class Wild(Enum):
    """The parts of a pattern that are no characters."""

    ONE = "?"  # one character that is no separator
    SEGMENT = "*"  # a run without separators
    ANY = "**"  # any run


Token = str | Wild


@dataclass(frozen=True, slots=True)
class Glob:
    """One pattern. ``windows`` patterns (with a backslash) never look at the case of letters."""

    pattern: str
    is_path: bool
    tokens: tuple[Token, ...] = field(init=False, repr=False, compare=False)
    windows: bool = field(init=False, repr=False, compare=False)
    literal: bool = field(init=False, repr=False, compare=False)
    _exact: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _folded: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tokens = _tokens(self.pattern, self.is_path)
        put = object.__setattr__
        put(self, "tokens", tokens)
        put(self, "windows", self.is_path and looks_windows(self.pattern))
        put(self, "literal", all(isinstance(token, str) for token in tokens))
        put(self, "_exact", re.compile(_regex(tokens, self.is_path), re.DOTALL))
        put(self, "_folded", re.compile(_regex(_tokens(self.pattern.lower(), self.is_path), self.is_path), re.DOTALL))

    @property
    def fixed(self) -> int:
        """How much of it is certain: the length of its fixed beginning; more than any length when all of it is."""
        if self.literal:
            return _LITERAL_RANK
        return next(i for i, token in enumerate(self.tokens) if not isinstance(token, str))

    def matches(self, text: str, *, fold: bool = False) -> bool:
        """Whether the whole text fits; with ``fold`` letters match in either case."""
        if fold or self.windows:
            return self._folded.match(text.lower()) is not None
        return self._exact.match(text) is not None

    def meets(self, other: Glob) -> bool:
        """Whether some text fits both patterns, whatever the case of its letters."""
        return _meet(
            _tokens(self.pattern.lower(), self.is_path), _tokens(other.pattern.lower(), other.is_path), self.is_path
        )


def looks_windows(path: str) -> bool:
    r"""Whether it is written as Windows writes paths: ``C:\...`` or ``\Device\...``."""
    return "\\" in path


def _tokens(pattern: str, is_path: bool) -> tuple[Token, ...]:
    tokens: list[Token] = []
    for part in re.split(r"(\*+|\?)", pattern):
        if part == "?":
            tokens.append(Wild.ONE)
        elif part.startswith("*"):
            tokens.append(Wild.SEGMENT if is_path and part == "*" else Wild.ANY)
        else:
            tokens.extend(part)
    return tuple(tokens)


def _regex(tokens: tuple[Token, ...], is_path: bool) -> str:
    r"""Write the pattern as an expression that does not backtrack across ``**``, nor across ``*`` but the last one.

    Taking the leftmost place for everything between two wild runs loses no match, so those are atomic groups; only
    the tail has to try on.
    """
    one = r"[^/\\]" if is_path else "."
    groups = _split(tokens, Wild.ANY)
    if len(groups) == 1:
        return _group(groups[0], one, last=True) + r"\Z"
    middle = "".join(f"(?>.*?{_group(group, one, last=False)})" for group in groups[1:-1])
    return _group(groups[0], one, last=False) + middle + ".*?" + _group(groups[-1], one, last=True) + r"\Z"


def _group(tokens: list[Token], one: str, *, last: bool) -> str:
    pieces = ["".join(re.escape(t) if isinstance(t, str) else one for t in p) for p in _split(tokens, Wild.SEGMENT)]
    atomic = pieces[1:-1] if last else pieces[1:]
    text = pieces[0] + "".join(f"(?>{one}*?{piece})" for piece in atomic)
    return text + f"{one}*{pieces[-1]}" if last and len(pieces) > 1 else text


def _split(tokens: tuple[Token, ...] | list[Token], at: Wild) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in tokens:
        if token is at:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@lru_cache(maxsize=65536)
def _meet(left: tuple[Token, ...], right: tuple[Token, ...], is_path: bool) -> bool:
    """Walk both patterns at once, looking for a text that leads both to their ends."""
    seen = {(0, 0)}
    todo = [(0, 0)]
    while todo:
        i, j = todo.pop()
        if i == len(left) and j == len(right):
            return True
        for step in _steps(left, right, i, j, is_path):
            if step not in seen:
                seen.add(step)
                todo.append(step)
    return False


def _steps(left: tuple[Token, ...], right: tuple[Token, ...], i: int, j: int, is_path: bool) -> list[tuple[int, int]]:
    a = left[i] if i < len(left) else None
    b = right[j] if j < len(right) else None
    steps = []
    if _is_run(a):
        steps.append((i + 1, j))
    if _is_run(b):
        steps.append((i, j + 1))
    if a is not None and b is not None and _share(a, b, is_path):
        steps.append((i if _is_run(a) else i + 1, j if _is_run(b) else j + 1))
    return steps


def _is_run(token: Token | None) -> bool:
    return token is Wild.SEGMENT or token is Wild.ANY


def _share(a: Token, b: Token, is_path: bool) -> bool:
    """Whether one character can be eaten by both tokens."""
    if isinstance(a, str) and isinstance(b, str):
        return a == b
    for char, wild in ((a, b), (b, a)):
        if isinstance(char, str):
            return wild is Wild.ANY or not is_path or char not in SEPARATORS
    return True
