"""Rule files to a RuleBook, or to every mistake of every file at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from appliance.errors import Problem, RuleError
from appliance.rules import doubts, lint, text
from appliance.rules.book import RuleBook
from appliance.rules.compile import compile_set
from appliance.rules.explain import explain
from appliance.rules.schema import RuleSet
from appliance.rules.values import guess

SUFFIXES = (".yaml", ".yml")


def load(paths: Sequence[Path]) -> RuleBook:
    """Load files, and the ``*.yaml`` and ``*.yml`` files of directories. Raises RuleError with all that is wrong."""
    problems: list[Problem] = []
    sources: list[tuple[str, str]] = []
    for path in _files(paths, problems):
        content = _read(path, problems)
        if content is not None:
            sources.append((str(path), content))
    return _build(sources, problems)


def load_text(content: str, file: str = "<text>") -> RuleBook:
    """Load one rule set from its text."""
    return _build([(file, content)], [])


def _build(sources: list[tuple[str, str]], problems: list[Problem]) -> RuleBook:
    parsed = []
    for file, content in sources:
        document = text.parse(content, file)
        parsed.append((document, content, _validate(document)))
    documents = [document for document, _, _ in parsed]
    lint.check_ties(documents)
    _refuse_same_names(documents)
    for document in documents:
        problems.extend(document.problems)
    if problems:
        order = sorted(dict.fromkeys(problems), key=lambda p: (p.path, p.line, p.column, p.message))
        raise RuleError(tuple(order))
    compiled = tuple(compile_set(rules, document, content) for document, content, rules in parsed if rules is not None)
    found = [warning for document in documents for warning in doubts.warnings(document)]
    return RuleBook(compiled, tuple(sorted(found, key=lambda p: (p.path, p.line, p.column, p.message))))


def _validate(document: text.Document) -> RuleSet | None:
    if not isinstance(document.data, dict):
        if not document.problems:
            document.report((), "this is no rule set", "it begins with apiVersion: v1 and kind: RuleSet")
        return None
    lint.check(document)
    try:
        return RuleSet.model_validate(document.data)
    except ValidationError as error:
        explain(document, error)
        return None


def _refuse_same_names(documents: list[text.Document]) -> None:
    seen: dict[str, str] = {}
    for document in documents:
        metadata = document.data.get("metadata") if isinstance(document.data, dict) else None
        name = metadata.get("name") if isinstance(metadata, dict) else None
        if name is None:
            continue
        if str(name) in seen:
            document.report(("metadata", "name"), f"a rule set '{name}' exists already", f"it is {seen[str(name)]}")
        else:
            seen[str(name)] = document.file


def _files(paths: Sequence[Path], problems: list[Problem]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        for file in _expand(path, problems):
            real = file.resolve()
            if real not in seen:
                seen.add(real)
                yield file


def _expand(path: Path, problems: list[Problem]) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and not f.name.startswith("."))
    except OSError as error:
        problems.append(Problem(str(path), 1, 1, f"cannot be read: {error.strerror}"))
        return []
    if not files:
        problems.append(Problem(str(path), 1, 1, "no rule files are here", "they end in .yaml or .yml"))
    return files


def _read(path: Path, problems: list[Problem]) -> str | None:
    try:
        with path.open("rb") as handle:
            raw = handle.read(text.MAX_BYTES + 1)
    except OSError as error:
        problems.append(Problem(str(path), 1, 1, f"cannot be read: {error.strerror}", _near(path)))
        return None
    if len(raw) > text.MAX_BYTES:
        problems.append(Problem(str(path), 1, 1, f"the file is larger than {text.MAX_BYTES >> 20} MiB", "split it"))
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        column = error.start - (before.rfind(b"\n") + 1) + 1
        problems.append(Problem(str(path), before.count(b"\n") + 1, column, "this is not UTF-8 text"))
        return None


def _near(path: Path) -> str | None:
    try:
        return guess(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    except OSError:
        return None
