"""What is allowed in a file, but surely not meant: lists nobody uses, rules without effect, modes that do not agree."""

from __future__ import annotations

from collections.abc import Iterator

from appliance.errors import Problem
from appliance.rules.acts import REDIRECT
from appliance.rules.globs import Glob
from appliance.rules.lint import get, list_uses, mapping, matching_of, profiles
from appliance.rules.schema import Matching
from appliance.rules.text import Document, Path

_COMM = 15  # bytes of a Linux process name


def warnings(document: Document) -> list[Problem]:
    """What is allowed, but surely not meant."""
    return [*_unused_lists(document), *_profile_warnings(document), *_mode_warnings(document), *_draft(document)]


def _draft(document: Document) -> Iterator[Problem]:
    if get(document.data, "metadata", "status") == "draft":
        why = "this is a draft: read it, then write status: reviewed; until then watch refuses it"
        yield document.problem(("metadata", "status"), why)


def _unused_lists(document: Document) -> Iterator[Problem]:
    used = {name for _, name in list_uses(document)}
    for name in mapping(document.data, "spec", "lists"):
        if name not in used:
            yield document.problem(("spec", "lists", name), f"the list '{name}' is not used", at_key=True)


def _profile_warnings(document: Document) -> Iterator[Problem]:
    os = get(document.data, "spec", "applies_to", "os")
    for path, profile in profiles(document):
        name = profile.get("name")
        if "id" not in profile:
            yield document.problem(path, f"'{name}' has no id", "give it a UUID, so that it can be renamed later")
        matching = matching_of(profile)
        if matching is not None:
            yield from _never_matches(document, path, matching, os)
        allow = profile.get("allow")
        if not isinstance(allow, list):
            continue
        if profile.get("default") == "allow" and allow:
            yield document.problem(
                (*path, "allow"), f"'{name}' allows by default: its allow entries have no effect", at_key=True
            )
        for i, entry in enumerate(allow):
            if profile.get("default") == "deny" and not entry.keys() - {"id", "description", "references", "expires"}:
                yield document.problem((*path, "allow", i), f"this entry allows '{name}' everything")


def _mode_warnings(document: Document) -> Iterator[Problem]:
    """A mode and what stands beside it must mean the same."""
    spec = mapping(document.data, "spec")
    modes = set()
    for path, name, block in _blocks(document):
        enforces = block.get("mode", spec.get("mode")) == "enforce"
        modes.add(enforces)
        if "hold" in block and not enforces:
            yield document.problem((*path, "hold"), f"'{name}' only monitors: nothing waits for it", at_key=True)
        asked = block.get("on_deny", spec.get("on_deny"))
        if enforces and asked is not None and not _stops(asked):
            at = (*path, "on_deny") if "on_deny" in block else ("spec", "on_deny")
            yield document.problem(
                at,
                f"'{name}' enforces: what it denies is stopped, although on_deny does not say how",
                "add block, or write mode: monitor",
                at_key=True,
            )
    if "hold" in spec and True not in modes:
        yield document.problem(("spec", "hold"), "nothing here enforces: nothing waits", at_key=True)


def _stops(asked: object) -> bool:
    words = [str(action) for action in (asked if isinstance(asked, list) else [asked])]
    return any(word in ("block", "reset", "hold") or word.startswith(REDIRECT) for word in words)


def _blocks(document: Document) -> Iterator[tuple[Path, str, dict[str, object]]]:
    """Everything that can have a mode of its own."""
    for path, profile in profiles(document):
        yield path, str(profile.get("name")), profile
    for name in ("otherwise", "kernel", "unbound"):
        if block := mapping(document.data, "spec", name):
            yield ("spec", name), name, block


def _never_matches(document: Document, path: Path, matching: Matching, os: object) -> Iterator[Problem]:
    for i, pattern in enumerate(matching.image or ()):
        at = (*path, "match", "image", i)
        glob = Glob(pattern, True)
        if not pattern.startswith(("/", "*", "?", "\\")) and pattern[1:2] != ":":
            yield document.problem(at, f"the image '{pattern}' can never match: an image is a whole path", "use name")
        elif os == "linux" and glob.windows:
            yield document.problem(at, f"the image '{pattern}' can never match on Linux")
        elif os == "windows" and pattern.startswith("/"):
            yield document.problem(at, f"the image '{pattern}' can never match on Windows")
    for i, pattern in enumerate(matching.name or ()):
        if os == "linux" and Glob(pattern, False).literal and len(pattern.encode()) > _COMM:
            yield document.problem(
                (*path, "match", "name", i),
                f"the name '{pattern}' can never match: Linux keeps {_COMM} bytes of it",
                f"write {pattern.encode()[:_COMM].decode(errors='ignore')}",
            )
