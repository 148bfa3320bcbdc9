"""``rules suggest``: a draft of rules from what was recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from appliance.cli.duration import parse_duration
from appliance.cli.progress import tell
from appliance.errors import ConfigError, UsageError
from appliance.rules import load_text
from appliance.rules.draft import write_draft
from appliance.rules.learn import Learnt, Limits, learn
from appliance.store.book import Book, default_path

MAX_LINE = 1 << 20
_NAMES = ("vm", "vm_uuid", "vm_name")  # of a guest


def suggest(
    history: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Verdicts as watch -o jsonl prints them; the book if left out."),
    ] = None,
    since: Annotated[str, typer.Option(metavar="7d", help="How far back to look.")] = "30d",
    guest: Annotated[list[str] | None, typer.Option(metavar="TARGET", help="Only these; also a name or UUID.")] = None,
    program: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only programs with such a path.")] = None,
    connections: Annotated[int, typer.Option(min=1, help="How many connections a program must have made.")] = 20,
    kinds: Annotated[int, typer.Option(min=1, max=64, help="How many kinds of access are still a single purpose.")] = 4,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the draft; else it is printed.")
    ] = None,
) -> None:
    """Suggest default-deny rules for single-purpose programs from their recorded behaviour: a draft, to be reviewed."""
    seconds = parse_duration(since, "--since")
    after_ns = time.time_ns() - round((seconds or 0.0) * 1e9)
    bodies = (
        body
        for body in (_read_file(history, after_ns) if history else _read_book(after_ns))
        if (not guest or any(body.get(key) in guest for key in _NAMES)) and (not program or _is_asked(body, program))
    )
    learnt = learn(bodies, Limits(connections, kinds))
    draft = write_draft(learnt)
    _prove(draft)
    if write is None:
        typer.echo(draft, nl=False)
    else:
        try:
            with write.open("x") as file:
                file.write(draft)
        except FileExistsError:
            raise UsageError(f"{write} is there already; a draft replaces nothing") from None
        except OSError as error:
            raise ConfigError(f"cannot write {write}: {error.strerror}") from error
    _say(learnt, write)


def _is_asked(body: dict[str, Any], patterns: list[str]) -> bool:
    process = body.get("process")
    path = process.get("path") if isinstance(process, dict) else None
    return isinstance(path, str) and any(fnmatchcase(path, pattern) for pattern in patterns)


def _prove(draft: str) -> None:
    """A draft that does not load, or whose own tests fail, is a defect of ours and never shown."""
    failed = [one for one in load_text(draft, "draft").test() if not one.ok]
    if failed:
        raise AssertionError(f"a draft fails its own test {failed[0].name!r}: {failed[0].why}")


def _say(learnt: Learnt, write: Path | None) -> None:
    tell(f"{len(learnt.suggested)} programs suggested, {len(learnt.others)} not, from {learnt.used} connections")
    for one, why in learnt.others[:20]:
        tell(f"not suggested: {one.program.image}: {why}")
    if len(learnt.others) > 20:
        tell(f"not suggested: {len(learnt.others) - 20} more")
    if learnt.suggested:
        name = str(write) if write else "the draft"
        tell(f"read {name}, try it with: parasight replay --rules; then write status: reviewed")


def _read_book(after_ns: int) -> Iterator[dict[str, Any]]:
    path = default_path()
    if not path.exists():
        raise UsageError(f"nothing is recorded yet in {path}: run parasight watch for some days first, or use --from")
    book = Book(path)
    try:
        yield from book.read_since(after_ns)
    finally:
        book.close()


def _read_file(path: Path, after_ns: int) -> Iterator[dict[str, Any]]:
    after = datetime.fromtimestamp(after_ns / 1e9, UTC).isoformat()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), ""), 1):
                try:
                    body = json.loads(line)
                except ValueError:
                    raise ConfigError(f"{path}:{number}: not a JSON object; watch -o jsonl prints such lines") from None
                if isinstance(body, dict) and "summary" not in body and str(body.get("time", "")) >= after:
                    yield body
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
