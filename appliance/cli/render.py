"""Tables for eyes, JSON for machines. Guest text is attacker input: bounded, and its control characters escaped."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

GAP, LEAST = 2, 10  # of a table: columns between its columns, and of a column that folds
MAX_CELL = 96  # characters of guest text shown in one cell


class Output(StrEnum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


def safe(text: object, limit: int = MAX_CELL) -> str:
    """Make text from a guest harmless for a terminal: escapes control and bidi characters, bounds the length."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escape(clean if len(clean) <= limit else clean[: limit - 1] + "…")


class _Console(Console):
    """Rich would end the program with 1, our word for "flagged", when the reader of our output has left."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: TextIO | None = None) -> Console:
    """A console that never wraps a row apart when its output is read by a program."""
    out = stream or sys.stdout
    return _Console(
        file=out, highlight=False, emoji=False, soft_wrap=not out.isatty(), width=None if out.isatty() else 240
    )


class Printer:
    """Prints objects one by one: a line each (``jsonl``) or as one array (``json``)."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._first = True

    def start(self) -> None:
        """Open the array."""
        if self._output is Output.JSON:
            sys.stdout.write("[")

    def add(self, body: dict[str, Any]) -> None:
        """Print one object now."""
        if self._output is Output.JSONL:
            sys.stdout.write(json.dumps(body) + "\n")
        else:
            sys.stdout.write(("\n" if self._first else ",\n") + json.dumps(body, indent=2))
        self._first = False
        sys.stdout.flush()

    def end(self) -> None:
        """Close the array."""
        if self._output is Output.JSON:
            sys.stdout.write("]\n" if self._first else "\n]\n")
            sys.stdout.flush()


def print_objects(
    output: Output,
    bodies: Iterable[dict[str, Any]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    folding: Collection[str] = (),
) -> None:
    """Print a whole result. ``rows`` are already ``safe``; ``folding`` columns give room first where it is short."""
    if output is Output.TABLE:
        out = console()
        widths = [max(map(_width, cells)) for cells in zip(columns, *rows, strict=True)]
        needed = sum(GAP + (LEAST if name in folding else width) for name, width in zip(columns, widths, strict=True))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            rigid = bool(folding) and column not in folding and needed <= out.width
            table.add_column(column, overflow="fold", no_wrap=rigid)
        for row in rows:
            table.add_row(*row)
        out.print(table)
        return
    printer = Printer(output)
    printer.start()
    for body in bodies:
        printer.add(body)
    printer.end()


def print_lines(lines: Iterable[str]) -> None:
    """Print what is already ``safe`` below a table, with an empty line before it."""
    out = console()
    for number, line in enumerate(lines):
        out.print(line if number else f"\n{line}")


def endpoint_text(end: dict[str, Any] | None) -> str:
    """``ip:port`` as ``ss`` prints it; ``*`` where there is none."""
    if end is None:
        return "*"
    ip, port = end["ip"], end["port"]
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _width(cell: str) -> int:
    return max(line.cell_len for line in Text.from_markup(cell).split(allow_blank=True))
