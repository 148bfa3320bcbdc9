"""`./run bench [NAME...]`: figures as ratios to a peer that was measured in the same run, on the same guest."""

import argparse
import importlib
import json
import os
import platform
import sys
import time
import traceback

from lab.accel import accelerator
from lab.packages import LabError
from tests.bench.lab import Lab, Sizes, say
from tests.bench.report import Line, print_table

ALONE = ("rules", "flow", "tap", "eye", "hand", "windows")
NAMES = (*ALONE, "memory", "attach", "lookup", "walk", "impact", "backends", "xen")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {' '.join(NAMES)}; all if left out")
    parser.add_argument("--json", action="store_true", help="a JSON document on standard output instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--quick", action="store_true", help="tiny counts: shows that it works, and nothing else")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    names = [name for name in NAMES if name in chosen.names or not chosen.names]
    start = time.monotonic()
    lines, crashed = measure(names, Sizes.quick() if chosen.quick else Sizes())
    seconds = time.monotonic() - start
    missed = [line for line in lines if any(not target.met for target in line.targets)]
    if chosen.json:
        print(json.dumps(document(names, lines, seconds), indent=2))
    else:
        print_table(lines)
        targets = sum(len(line.targets) for line in lines)
        print(f"\n{targets - len(missed)} of {targets} targets met; {seconds:.0f} s; {machine(names)}")
    return 1 if crashed or (missed and chosen.strict) else 0


def measure(names: list[str], sizes: Sizes) -> tuple[list[Line], list[str]]:
    """All lines, and the benchmarks that failed: one failure does not take the others' figures with it."""
    lab = Lab(sizes)
    lines: list[Line] = []
    crashed: list[str] = []
    try:
        for name in names:
            say(name)
            try:
                lines.extend(importlib.import_module(f"tests.bench.{name}").run(lab))
            except LabError:
                raise
            except Exception:
                traceback.print_exc()
                say(f"{name} FAILED")
                crashed.append(name)
    finally:
        lab.close()
    return lines, crashed


def document(names: list[str], lines: list[Line], seconds: float) -> dict:
    return {
        "version": 1,
        "machine": machine(names),
        "seconds": round(seconds, 1),
        "lines": [line.body() for line in lines],
    }


def machine(names: list[str]) -> str:
    """Where it was measured, as far as it matters to the figures."""
    guest = "" if set(names) <= set(ALONE) else f", guest under {accelerator().upper()}"
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}{guest}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as error:
        sys.exit(f"bench: {error}")
