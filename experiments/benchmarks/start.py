"""Measure the fixed cost: seconds to the first screen of `leakage`, and to the demo's first evaluation.

    python experiments/benchmarks/start.py --output start.json

Every figure is from a new process, from just before its start to a moment that the process reports: the last line of
the first screen; the end of importing torch, `leakage` or the command line; or, for the demo, the end of the first
evaluation of its first attack, after which the process exits. That moment is found by wrapping `Lanes.evaluate` in
that process; nothing else is changed. All processes take turns, and the medians count. The first turn is reported
separately, since the files may not be in memory yet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_plots import plot_parts
from setting import check_file, describe_machine, show_machine, write_result  # beside this script

from leakage.errors import check_count

MARK = "the moment is "
PRINT = f"import sys, time; print('{MARK}', repr(time.time()), sep='', flush=True)"
DEMO = f"""
import os, sys
from leakage.cli.main import load, main
load("demo")
from leakage.inversion.lanes import Lanes
evaluate = Lanes.evaluate
def first(lanes):
    evaluate(lanes)
    {PRINT}
    os._exit(0)
Lanes.evaluate = first
main(["demo", "--output", sys.argv[1], "--victims", sys.argv[2]])
"""
FIRST = "leakage demo, first evaluation"
SCREEN = "leakage, the first screen"
# From `import torch` on, each does the work of the one before, and more.
MOMENTS = {
    "Python": PRINT,
    SCREEN: f"from leakage.cli.main import main\nmain([])\n{PRINT}",
    "leakage --help": f"from leakage.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    {PRINT}",
    "import torch": f"import torch\n{PRINT}",
    "import leakage": f"from leakage import LeNet, Protocol, SharedGradient, Victim\n{PRINT}",
    "load the command line": f"from leakage.cli.main import load\nload('demo')\n{PRINT}",
    FIRST: DEMO,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="start.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=64, help="of the demo (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        check_count(repeats=given.repeats, victims=given.victims)
        check_file(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    _measure(given)


def _measure(given: argparse.Namespace) -> None:
    machine = describe_machine()
    print(show_machine(machine), flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in MOMENTS}
    for turn in range(given.repeats):
        for name, code in MOMENTS.items():
            seconds[name].append(seconds_until(code, given.victims))
            print(f"turn {turn + 1} of {given.repeats}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    result: dict[str, Any] = {
        "seconds": medians,
        "first_turn_seconds": {name: spent[0] for name, spent in seconds.items()},
        "ratio_to_import_torch": {name: spent / medians["import torch"] for name, spent in medians.items()},
        "machine": machine,
        "victims": given.victims,
        "repeats": given.repeats,
    }
    print(f"\n{'':32} {'median':>9} {'first':>9}")
    for name, spent in medians.items():
        print(f"{name:32} {spent:>7.2f} s {seconds[name][0]:>7.2f} s")
    bars = {name: {"since the process was started": spent} for name, spent in medians.items()}
    write_result(given.output, result, plot_parts(bars, xlabel="seconds", title=machine["cpu"]))


def seconds_until(code: str, victims: int) -> float:
    """Return the seconds from the start of a process with this code to the moment that it reports."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, folder, str(victims)]
        began = time.time()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    reported = done.stdout.rpartition(MARK)[2].split()  # a progress bar may be in the same line
    if done.returncode or MARK not in done.stdout:
        sys.exit(f"start.py: error: a process ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return float(reported[0]) - began


if __name__ == "__main__":
    main()
