"""Faults at every operation of every command that writes: what they leave of a run.

    python benchmarks/faults.py [--only TEXT] [--every K]

Every creation, write, sync, change of a name, removal and statement of SQLite under the run's folder
(``tests/faults.py``) fails once, is the last before a kill, and is the last before a crash that loses what was not
synced. Afterwards the run must open as it was before the command or as it is after it, the command must be repeatable,
and nothing be left over that is not there without a fault. The last line is JSON: how many operations and faults, and
of the faults how many

lost          left a run that does not open
between       left one that is neither as before nor as after
unrepeatable  left one on which the same command fails
leftovers     left a file that is there still after the repeat (and a purge)
tracebacks    ended in a traceback, or with another exit status than 0 or 2
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from trials import TRIALS, Place, tried

SUMS = "lost", "between", "unrepeatable", "leftovers", "tracebacks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="trials whose name has this in it")
    parser.add_argument("--every", type=int, default=1, help="every so many operations alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # forks of a process with threads hang
    table = Table("command", "operations", "faults", *SUMS)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for trial in (each for each in TRIALS if arguments.only in each.name):
            found = list(tried(Place(Path(folder)), trial, lambda number: number % arguments.every == 0))
            for each in found:
                if each.wrong:
                    print(each.trial, each.operation, each.fault, each.wrong, each.said, sep=" | ", flush=True)
            sums = Counter(each.wrong for each in found if each.wrong)
            sums |= Counter({"operations": len({each.operation for each in found}), "faults": len(found)})
            table.add_row(trial.name, *(str(sums[name]) for name in ("operations", "faults", *SUMS)))
            print(trial.name, dict(sums), flush=True)
            total += sums
    Console().print(table)
    print(json.dumps({name: total[name] for name in ("operations", "faults", *SUMS)}))


if __name__ == "__main__":
    main()
