"""What pydantic found wrong, told as a person would: where it stands, what is wrong, what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from appliance.rules.schema import schema
from appliance.rules.text import Document, Path
from appliance.rules.values import guess

_KINDS = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "int_type": "a whole number",
    "bool_type": "true or false",
}
_SHOWN = 60


def explain(document: Document, error: ValidationError, base: Path = ()) -> None:
    """Add every mistake to the document's problems; what is known to be broken already is not told twice."""
    details = error.errors(include_url=False)
    meant = {_meant(base + tuple(detail["loc"])) for detail in details if detail["type"] == "extra_forbidden"}
    for detail in details:
        path = base + tuple(detail["loc"])
        if detail["type"] == "missing" and path in meant:
            continue  # it is there, but with a typo, and that is told
        if any(path[:end] in document.broken for end in range(len(path) + 1)):
            continue
        message, suggestion = _say(path, detail)
        document.report(path, message, suggestion, at_key=detail["type"] == "extra_forbidden")


def _say(path: Path, detail: ErrorDetails) -> tuple[str, str | None]:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    key = str(path[-1]) if path else "the file"
    where = _where(path)
    if kind == "rule":
        return where + detail["msg"], context.get("suggestion")
    if kind == "extra_forbidden":
        options = sorted(_keys_at(path[:-1]))
        near = guess(key, options)
        return f"unknown key '{key}'", near or (f"possible are {', '.join(options)}" if options else None)
    if kind == "missing":
        return f"the key '{key}' is missing", None
    if kind in ("literal_error", "enum"):
        options = re.findall(r"'([^']*)'", context["expected"])
        one = f"must be {options[0]}" if len(options) == 1 else f"must be one of {', '.join(options)}"
        return f"{where}{one}, not {_show(given)}", guess(str(given), options)
    if kind in ("too_short", "string_too_short"):
        return f"{where}is empty", "leave it out or give a value"
    if kind in ("too_long", "string_too_long"):
        return f"{where}is too long (at most {context.get('max_length')})", None
    if kind == "string_pattern_mismatch":
        return f"{where}{_show(given)} is no name", "letters, digits, '.', '_' and '-', at most 63"
    if kind in _KINDS:
        hint = None
        if kind == "bool_type" and isinstance(given, str):
            word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(given.lower())
            hint = f"write {word}" if word else None
        return f"{where}must be {_KINDS[kind]}, not {_show(given)}", hint
    return where + str(detail["msg"]), None


def _meant(path: Path) -> Path:
    """Where a mistyped key would stand if it were written as was probably meant."""
    near = difflib.get_close_matches(str(path[-1])[:100], _keys_at(path[:-1]), n=1)
    return (*path[:-1], *near)


def _where(path: Path) -> str:
    names = [str(part) for part in path if isinstance(part, str) and part != "[key]"]
    return f"{names[-1]}: " if names else ""


def _show(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case dict():
            return "a mapping"
        case list():
            return "a list"
    text = str(value)
    return f"'{text if len(text) <= _SHOWN else text[: _SHOWN - 1] + '…'}'"


def _keys_at(path: Path) -> set[str]:
    """The keys that the format knows at a place, read from its own JSON Schema."""
    nodes = [_schema()]
    for part in path:
        nodes = [child for node in nodes for child in _children(node, part)]
    return {key for node in nodes for alternative in _alternatives(node) for key in alternative.get("properties", {})}


def _children(node: dict[str, Any], part: str | int) -> Iterator[dict[str, Any]]:
    for alternative in _alternatives(node):
        if isinstance(part, int):
            if isinstance(alternative.get("items"), dict):
                yield alternative["items"]
        elif part in alternative.get("properties", {}):
            yield alternative["properties"][part]
        elif isinstance(alternative.get("additionalProperties"), dict):
            yield alternative["additionalProperties"]


def _alternatives(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in node:
        yield from _alternatives(_schema()["$defs"][node["$ref"].rpartition("/")[2]])
    for choice in (*node.get("anyOf", ()), *node.get("allOf", ())):
        yield from _alternatives(choice)
    yield node


@cache
def _schema() -> dict[str, Any]:
    return schema()
