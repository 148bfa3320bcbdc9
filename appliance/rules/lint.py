"""What is wrong across the blocks of a file, and across files: names that lead nowhere, entries that contradict, ties.

These checks read the plain data, not the validated models, so that a typo elsewhere hides none of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from appliance.rules.compile import conditions_of, rank_of
from appliance.rules.conditions import Condition, ParentIs, TextIs, UserIs, can_coincide
from appliance.rules.globs import Glob
from appliance.rules.match import Rank
from appliance.rules.schema import MATCHING, Matching
from appliance.rules.text import Document, Path
from appliance.rules.values import RESERVED, guess, parse_member

MAX_TIES = 1000  # told; whoever has more of them has one mistake, not a thousand
_WILD = re.compile(r"\*+|\?")
_SEPARATOR = re.compile(r"[/\\]")


def check(document: Document) -> None:
    """Add the mistakes of one file to its problems."""
    _refuse_nothing(document)
    _check_lists(document)
    _check_entries(document)
    _check_names(document)
    _check_tests(document)


def _refuse_nothing(document: Document) -> None:
    for path, value in _walk(document.data, ()):
        if value is None and path and path not in document.broken:
            name = next(str(part) for part in reversed(path) if isinstance(part, str))
            document.report(path, f"{name}: is empty", "leave the key out, or give a value", at_key=True)
            document.broken.add(path)


def _walk(value: object, path: Path) -> Iterator[tuple[Path, object]]:
    yield path, value
    children: Iterable[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    for key, child in children:
        yield from _walk(child, (*path, key))


def _check_lists(document: Document) -> None:
    known = mapping(document.data, "spec", "lists")
    for path, name in list_uses(document):
        if name not in known:
            near = guess(name, [str(key) for key in known])
            document.report(path, f"there is no list '{name}'", near or "define it under spec.lists")

    for name, members in known.items():
        kinds = {
            isinstance(parsed, str) for parsed in map(_parsed, members if isinstance(members, list) else ()) if parsed
        }
        if len(kinds) > 1:
            document.report(
                ("spec", "lists", name), f"{name}: a list holds either addresses or domain names", "split it in two"
            )


def _parsed(member: object) -> object:
    try:
        return parse_member(member)
    except PydanticCustomError:
        return None


def _check_entries(document: Document) -> None:
    for path, entry in _entries(document):
        if "to" in entry and "from" in entry:
            document.report((*path, "from"), "an entry has either to or from", "write two entries", at_key=True)
        elif "to" in entry and entry.get("direction") == "in":
            document.report((*path, "to"), "direction in has no 'to'", "write from", at_key=True)
        elif "from" in entry and entry.get("direction") == "out":
            document.report((*path, "from"), "direction out has no 'from'", "write to", at_key=True)
        protocols = entry.get("protocol")
        protocols = protocols if isinstance(protocols, list) else [protocols]
        ports = [key for key in ("ports", "local_ports", "remote_ports") if key in entry]
        if ports and all(protocol in ("icmp", "raw") for protocol in protocols):
            document.report((*path, ports[0]), f"{protocols[0]} has no ports", "leave them out", at_key=True)


def list_uses(document: Document) -> Iterator[tuple[Path, str]]:
    """The lists that entries name, each with its place."""
    for path, entry in _entries(document):
        for side in ("to", "from"):
            for inner in ((side,), (side, "except")):
                names = get(entry, *inner, "list")
                for i, name in enumerate(names if isinstance(names, list) else [names]):
                    if isinstance(name, str | int) and not isinstance(name, bool):
                        yield (*path, *inner, "list", i), str(name)


def _entries(document: Document) -> Iterator[tuple[Path, dict[str, object]]]:
    sections = [(("spec", name), get(document.data, "spec", name)) for name in ("otherwise", "kernel")]
    for section_path, section in (*sections, *profiles(document)):
        for kind in ("allow", "deny"):
            entries = get(section, kind)
            for i, entry in enumerate(entries if isinstance(entries, list) else ()):
                if isinstance(entry, dict):
                    yield (*section_path, kind, i), entry


def profiles(document: Document) -> Iterator[tuple[Path, dict[str, object]]]:
    """The profiles, each with its place."""
    found = get(document.data, "spec", "processes")
    for i, profile in enumerate(found if isinstance(found, list) else ()):
        if isinstance(profile, dict):
            yield ("spec", "processes", i), profile


def _check_names(document: Document) -> None:
    seen: dict[str, int] = {}
    for path, profile in profiles(document):
        name = str(profile.get("name"))
        if name in seen:
            document.report((*path, "name"), f"a profile '{name}' exists already", f"it is in line {seen[name]}")
        elif "name" in profile:
            seen[name] = document.line((*path, "name"))


def _check_tests(document: Document) -> None:
    known = [str(profile.get("name")) for _, profile in profiles(document)] + list(RESERVED)
    tests = get(document.data, "tests")
    for i, case in enumerate(tests if isinstance(tests, list) else ()):
        rule = get(case, "expect", "rule")
        if isinstance(rule, str) and rule not in known:
            document.report(("tests", i, "expect", "rule"), f"there is no profile '{rule}'", guess(rule, known))


# -- ties --


@dataclass(frozen=True, slots=True)
class _Candidate:
    document: Document
    path: Path
    name: str
    os: str | None
    rank: Rank
    conditions: tuple[Condition, ...]
    image: Glob | None


def check_ties(documents: list[Document]) -> None:
    """Two profiles that are equally specific and can both match a process: nobody could say which one decides."""
    groups: dict[tuple[object, ...], list[_Candidate]] = defaultdict(list)
    for candidate in (c for document in documents for c in _candidates(document)):
        literal = candidate.image.pattern.lower() if candidate.image and candidate.image.literal else None
        groups[(candidate.rank, literal)].append(candidate)
    told: set[tuple[object, ...]] = set()
    for first, second in (pair for group in groups.values() for pair in _pairs(group)):
        pair = (id(first.document), first.path, id(second.document), second.path)
        if pair[:2] != pair[2:] and pair not in told and _tie(first, second):
            at = (*second.path, "match")
            if len(told) == MAX_TIES:
                second.document.report(at, f"more than {MAX_TIES} pairs of profiles tie; the others are not listed")
                return
            told.add(pair)
            other = first.document.problem((*first.path, "match"), "")
            where = f"line {other.line}" if first.document is second.document else f"{other.path}:{other.line}"
            second.document.report(
                at,
                f"'{second.name}' and '{first.name}' ({where}) are equally specific and can match the same process",
                "add a condition to one of them, or a priority",
                at_key=True,
            )


def _pairs(group: list[_Candidate]) -> Iterator[tuple[_Candidate, _Candidate]]:
    """The pairs that have no plain reason not to meet. Sets of candidates are bits of one number."""
    keys = [_keys(candidate) for candidate in group]
    holders: dict[str, dict[object, int]] = defaultdict(lambda: defaultdict(int))  # aspect -> key -> candidates
    asked: dict[str, int] = defaultdict(int)  # aspect -> candidates that it says anything about
    for number, aspects in enumerate(keys):
        for aspect, wanted in aspects.items():
            asked[aspect] |= 1 << number
            for key in wanted:
                holders[aspect][key] |= 1 << number
    everybody = (1 << len(group)) - 1
    for number, aspects in enumerate(keys):
        left = everybody >> number + 1 << number + 1
        for aspect, wanted in aspects.items():
            same = everybody & ~asked[aspect]
            for key in wanted:
                same |= holders[aspect][key]
            left &= same
        while left:
            lowest = left & -left
            yield group[number], group[lowest.bit_length() - 1]
            left ^= lowest


def _keys(candidate: _Candidate) -> dict[str, set[object]]:
    """By aspect, what one of must be shared: two candidates with no common key of an aspect cannot meet."""
    keys: dict[str, set[object]] = {}
    image = candidate.image
    if image is not None and not image.literal:
        pieces = _WILD.split(image.pattern.lower())
        keys[f"image begins, {len(pieces[0])}"] = {pieces[0]}
        last = _SEPARATOR.split(pieces[-1])
        if len(last) > 1:  # the last component of the path is fixed
            keys["image ends"] = {last[-1]}
    for condition in candidate.conditions:
        if isinstance(condition, TextIs):
            keys.update(_literal(condition.what, condition.patterns))
        elif isinstance(condition, ParentIs) and not condition.names:
            keys.update(_literal("parent's image", condition.images))
        elif isinstance(condition, ParentIs) and not condition.images:
            keys.update(_literal("parent's name", condition.names))
        elif isinstance(condition, UserIs) and not condition.names:
            keys["uid"] = set(condition.uids)
        elif isinstance(condition, UserIs) and not condition.uids:
            keys["user"] = {name.lower() for name in condition.names}
    return keys


def _literal(aspect: str, patterns: tuple[Glob, ...]) -> dict[str, set[object]]:
    """Patterns without a wildcard meet those of the same letters only."""
    return {aspect: {p.pattern.lower() for p in patterns}} if all(p.literal for p in patterns) else {}


def _tie(first: _Candidate, second: _Candidate) -> bool:
    if first.os and second.os and first.os != second.os:
        return False
    if first.image is not None and second.image is not None and not first.image.meets(second.image):
        return False
    return can_coincide(first.conditions, second.conditions)


def _candidates(document: Document) -> Iterator[_Candidate]:
    os = get(document.data, "spec", "applies_to", "os")
    for path, profile in profiles(document):
        matching = matching_of(profile)
        if matching is None:
            continue
        given = profile.get("priority", 0)
        priority = given if isinstance(given, int) else 0
        for image, conditions in conditions_of(matching):
            rank = rank_of(matching, image, priority)
            name = str(profile.get("name", "a profile without a name"))
            yield _Candidate(document, path, name, os if isinstance(os, str) else None, rank, conditions, image)


def matching_of(profile: dict[str, object]) -> Matching | None:
    """A profile's match, None where it is broken."""
    try:
        return MATCHING.validate_python(profile.get("match"))
    except ValidationError:
        return None  # reported where the whole file is validated


def get(value: object, *keys: str) -> object:
    """The value at the end of these keys; None where it does not exist."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def mapping(value: object, *keys: str) -> dict[str, object]:
    """The mapping at the end of these keys, empty where there is none."""
    found = get(value, *keys)
    return found if isinstance(found, dict) else {}
