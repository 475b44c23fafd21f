"""The command line: ``leakage fit`` on LightningCLI, and ``leakage demo``."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

from leakage.attacks import DLGAttack, GradientMatchingAttack, IDLGAttack
from leakage.compare import compare, format_table
from leakage.datamodules import SampleVictims, VictimDataModule

_DESCRIPTION = """What a shared gradient gives away.

  leakage demo               DLG and iDLG on a bundled sample, in under a minute
  leakage fit --config FILE  any attack on any victims, configured by a file or by arguments
"""


class LeakageCLI(LightningCLI):
    """LightningCLI with the one thing to do with an attack: ``fit``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: an attack has no separate validation, test or prediction."""
        return {"fit": LightningCLI.subcommands()["fit"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: what follows ``leakage``; by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        demo(given[1:])
        return
    LeakageCLI(
        GradientMatchingAttack,
        VictimDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False},
        parser_kwargs={
            "description": _DESCRIPTION,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        },
        args=given,
    )


def demo(arguments: Sequence[str]) -> None:
    """DLG and iDLG side by side on the bundled sample of FashionMNIST test images."""
    parser = argparse.ArgumentParser(prog="leakage demo", description=demo.__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for results (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=64, help="number of victims, 1 to 1000 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of victims, networks and starts (default: %(default)s)")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    quiet()
    try:
        attacks: dict[str, GradientMatchingAttack] = {
            "dlg": DLGAttack(seed=given.seed),
            "idlg": IDLGAttack(seed=given.seed),
        }
        victims = SampleVictims(victims=given.victims, seed=given.seed, batch_size=1000)
        print(f"DLG and iDLG on {given.victims} FashionMNIST images, a fresh random LeNet for each:")
        rows = compare(attacks, victims, given.output, dataset="sample", accelerator="cpu")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"\n{format_table(rows)}\n")
    for name in ("gallery.png", "fidelity.png", "summary.json", "victims.csv"):
        print(given.output / name)
    print(f"{time.monotonic() - started:.0f} s")


def quiet() -> None:
    """Silence Lightning's hints, which are about training and not about attacks."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


