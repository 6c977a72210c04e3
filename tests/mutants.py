"""The known ways to break the code, and the program behind `make mutants`.

    python tests/mutants.py [--only TEXT] [--jobs N] [--timeout SECONDS]

Ends with 0 if every mutant is killed, 1 if one survives or cannot be judged, 2 if the table does not fit the
code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mutation import Mutant, TableError, run, table

ROOT = Path(__file__).resolve().parent.parent

MUTANTS: tuple[Mutant, ...] = ()


def main(arguments: Sequence[str], mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="mutants", description="Break the code in known ways")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the mutants whose name contains TEXT")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="runs at a time (default: 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each run (default: 300)")
    options = parser.parse_args(arguments)

    chosen = [mutant for mutant in mutants if options.only in mutant.name]
    if not chosen:
        print(f"mutants: expected a mutant with {options.only!r} in its name, got none of {len(mutants)}.")
        return 2
    try:
        outcomes = run(chosen, root, jobs=options.jobs, timeout=options.timeout)
    except TableError as error:
        print(f"mutants: {error}")
        return 2
    print(table(outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        if outcome.output:
            print(f"\n{outcome.name}, {outcome.verdict}:\n{outcome.output.strip()}")
    killed = sum(outcome.verdict == "killed" for outcome in outcomes)
    print(f"\n{killed} of {len(chosen)} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
