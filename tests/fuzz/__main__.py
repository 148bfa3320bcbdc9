"""`./run fuzz [--rounds N] [--seed N] [NAME...]`: guests with bytes changed at random. Exit code 1 at any failure."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.fuzzer import fuzz, print_result
from tests.fuzz.targets import NAMES, open_target


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which guests: {' '.join(NAMES)}; all if left out")
    parser.add_argument("--rounds", type=int, default=100_000, help="in all, shared by the guests (100,000)")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; by chance if left out")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no guest {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    names = [name for name in NAMES if name in chosen.names or not chosen.names]
    seed = random.SystemRandom().randrange(1 << 31) if chosen.seed is None else chosen.seed
    print(f"seed {seed}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="parasight-fuzz-") as folder:
        for number, name in enumerate(names):
            rounds = chosen.rounds // len(names) + (number < chosen.rounds % len(names))
            with open_target(name, Path(folder)) as target:
                result = fuzz(target, rounds, seed)
            print_result(result)
            failed += len(result.failures)
    print(f"{failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
