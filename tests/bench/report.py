"""What a run has found: one line for each comparison, as a table for people or as JSON."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.measure import Sample

UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9, "x": 1.0}


@dataclass(frozen=True)
class Target:
    """What was promised, and whether this run kept it."""

    text: str
    met: bool

    def __str__(self) -> str:
        return f"{self.text} {'met' if self.met else 'MISSED'}"


@dataclass(frozen=True)
class Line:
    """Ours against a peer, measured in the same run."""

    bench: str
    what: str
    unit: str
    ours: Sample
    peer: str
    theirs: Sample
    at_least: float | None = None  # of the ratio
    below: float | None = None  # of our median, in seconds
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times the peer's median ours fits into."""
        return self.theirs.p50 / self.ours.p50

    @property
    def targets(self) -> list[Target]:
        found = []
        if self.at_least is not None:
            found.append(Target(f">= {self.at_least:g}x", self.ratio >= self.at_least))
        if self.below is not None:
            limit = f"{self.below * UNITS[self.unit]:g} {self.unit}"
            found.append(Target(f"p50 < {limit}", self.ours.p50 < self.below))
        return found

    def body(self) -> dict[str, Any]:
        scale = UNITS[self.unit]
        return {
            "bench": self.bench,
            "what": self.what,
            "unit": self.unit,
            "ours": {"p50": self.ours.p50 * scale, "p99": self.ours.p99 * scale, "n": len(self.ours)},
            "peer": {"name": self.peer, "p50": self.theirs.p50 * scale, "n": len(self.theirs)},
            "ratio": self.ratio,
            "targets": [{"target": one.text, "met": one.met} for one in self.targets],
            "note": self.note,
        }


def print_table(lines: Iterable[Line]) -> None:
    """For people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("bench", "what", "ours p50", "p99", "n", "peer", "its p50", "n", "ratio", "target"):
        table.add_column(column, justify="right" if column in ("ours p50", "p99", "n", "its p50", "ratio") else "left")
    bench = ""
    for line in lines:
        scale = UNITS[line.unit]
        table.add_row(
            line.bench if line.bench != bench else "",
            line.what + (f"\n[dim]{line.note}[/dim]" if line.note else ""),
            f"{_figure(line.ours.p50 * scale)} {line.unit}",
            _figure(line.ours.p99 * scale),
            str(len(line.ours)),
            line.peer,
            f"{_figure(line.theirs.p50 * scale)} {line.unit}",
            str(len(line.theirs)),
            f"{_figure(line.ratio)}x",
            "\n".join(f"[{'green' if one.met else 'red'}]{one}[/]" for one in line.targets),
        )
        bench = line.bench
    Console(width=170, soft_wrap=True).print(table)


def _figure(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"
