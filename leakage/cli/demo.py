"""``leakage demo``: three attacks on the bundled sample, side by side."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack
from leakage.cli import quiet
from leakage.cli.demo_page import PAGE, write_page
from leakage.comparison import FILES, format_table, run_attack, write_overview
from leakage.datamodules import Victims
from leakage.files.whole import check_output


def demo(arguments: Sequence[str]) -> None:
    """Compare DLG, iDLG and Gauss-Newton on the bundled sample of FashionMNIST test images."""
    parser = argparse.ArgumentParser(
        prog="leakage demo",
        description=f"{demo.__doc__} It replaces the files of an earlier demo in the same folder.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--victims", type=int, default=32, help="number of victims, 1 to 1000 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    quiet()
    try:
        compared: dict[str, GradientInversion] = {
            "dlg": DLGAttack(seed=given.seed),
            "idlg": IDLGAttack(seed=given.seed),
            "gauss_newton": GaussNewtonAttack(seed=given.seed),
        }
        victims = Victims("sample", victims=given.victims, seed=given.seed)
        victims.setup("fit")
        check_output(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(
        f"DLG, iDLG and Gauss-Newton on {given.victims} FashionMNIST images, a fresh random LeNet for each:", flush=True
    )
    try:
        options: dict[str, Any] = {"dataset": "sample", "accelerator": "cpu", "enable_checkpointing": False}
        for name in (PAGE, *FILES):
            (given.output / name).unlink(missing_ok=True)
        found = [run_attack(name, one, victims, given.output / name, **options) for name, one in compared.items()]
        rows = [row for row in found if row is not None]
        write_overview(given.output, rows, victims)
        write_page(given.output, rows, victims, FILES)
    except (KeyboardInterrupt, SystemExit):
        # The folder of each attack holds the results up to the interrupt.
        begun = [str(given.output / name) for name in compared if (given.output / name / "victims.csv").is_file()]
        print(f"\nPartial results: {', '.join(begun) or 'none yet'}", file=sys.stderr)
        raise
    except OSError as error:
        sys.exit(f"leakage demo: error: {error}")
    print(f"\n{format_table(rows)}\n")
    for name in FILES:
        print(given.output / name)
    print(f"{given.output / PAGE}: all results on one page, and what to do next")
    print(f"{time.monotonic() - started:.0f} s")
