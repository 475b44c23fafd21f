"""Test that nothing is lost: compare runs that are killed or fail, and are resumed, with an undisturbed run.

    python experiments/robustness/soak.py --victims 200 --kills 20 --output results/soak

iDLG attacks the victims in a process that is killed with SIGKILL at random moments: between two iterations, during
start-up, while a checkpoint is written, and when a file is written but has not replaced the earlier one. It is resumed
each time. At the end, every victim must be present once, and all results must equal those of the undisturbed run
bit for bit. Then the scenarios run on fewer victims: a full disk (a tmpfs if it can be mounted, otherwise a limit on
the length of files), an unreachable W&B server, loggers that raise, SIGTERM as a scheduler sends it, once and twice,
SIGINT, and SIGTERM to `leakage fit` and to two processes that share the victims.

Verdicts and figures are written to `soak.json` after each scenario. The exit code is 0 if all scenarios succeed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from soak_child import Job, run  # these are beside this script
from soak_scenarios import SCENARIOS, Verdict, killed

from leakage.datamodules import Victims, data_folder
from leakage.errors import check_choice, check_count, check_positive
from leakage.files.text import write_json
from leakage.files.whole import check_output


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder for the runs and soak.json")
    parser.add_argument("--victims", type=int, default=200, help="in the killed run (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="number of kills (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=16, help="victims at once (default: %(default)s)")
    parser.add_argument(
        "--scenario-victims",
        type=int,
        default=12,
        help="victims per scenario, in half as many lanes (default: %(default)s)",
    )
    parser.add_argument("--scenarios", nargs="*", help=f"some of {', '.join(SCENARIOS)} (default: all)")
    parser.add_argument("--dataset", help="such as mnist (default: mnist if it is found, else the bundled sample)")
    parser.add_argument("--root", type=Path, help="folder of the data set (default: $LEAKAGE_DATA)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=0.2, help="time between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--max-evaluations", type=int, help="of the attack, per start (default: the attack's)")
    return parser


def find_dataset(given: argparse.Namespace) -> str:
    """Return the given data set, ready to use; by default MNIST if it is found, else the bundled sample."""
    name = given.dataset
    if name is None:
        name = "mnist" if (data_folder(given.root) / "MNIST" / "raw").is_dir() else "sample"
    victims = Victims(name, root=given.root, victims=max(given.victims, given.scenario_victims))
    victims.prepare_data()
    victims.setup("fit")
    return name


def soak(given: argparse.Namespace, dataset: str) -> list[Verdict]:
    """Run all scenarios, and write each verdict immediately."""
    job = Job(
        output=given.output / "whole",
        dataset=dataset,
        root=given.root,
        victims=given.victims,
        lanes=given.lanes,
        seed=given.seed,
        checkpoint_seconds=given.checkpoint_seconds,
        max_evaluations=given.max_evaluations,
    )
    names = list(SCENARIOS) if given.scenarios is None else list(dict.fromkeys(given.scenarios))
    verdicts: list[Verdict] = []
    configuration = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}

    def note(verdict: Verdict) -> None:
        verdicts.append(verdict)
        bar.write(str(verdict), file=sys.stdout)
        record = {"configuration": configuration | {"dataset": dataset}, "verdicts": [asdict(one) for one in verdicts]}
        write_json(given.output / "soak.json", record)

    with Tqdm(
        total=2 + given.kills + (1 + len(names) if names else 0),
        file=sys.stderr,
        desc="Runs",
        bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}<{remaining}",
        dynamic_ncols=True,
    ) as bar:
        note(killed(job, given.kills, bar.update))
        if names:
            half = max(given.scenario_victims // 2, 1)
            small = replace(job, output=given.output / "small", victims=given.scenario_victims, lanes=half)
            ending = run(small)
            bar.update()
            if ending.code:
                raise RuntimeError(f"Expected the run in '{small.output}' to succeed, but got: {ending.said[-2000:]}")
            for name in names:
                bar.set_description_str(name.replace("_", " "))
                note(SCENARIOS[name](small, ending.completed))
                bar.update()
    return verdicts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    try:
        check_count(victims=given.victims, lanes=given.lanes)
        check_count(2, scenario_victims=given.scenario_victims)
        check_count(0, kills=given.kills, seed=given.seed)
        if given.max_evaluations is not None:
            check_count(max_evaluations=given.max_evaluations)
        check_positive(checkpoint_seconds=given.checkpoint_seconds)
        for name in given.scenarios or ():
            check_choice("--scenarios", name, SCENARIOS)
        check_output(given.output)
        if any(given.output.iterdir()):
            raise ValueError(f"Expected `--output` to be an empty folder, but got '{given.output}'.")
        dataset = find_dataset(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    verdicts = soak(given, dataset)
    print(given.output / "soak.json")
    sys.exit(not all(verdict.passed for verdict in verdicts))


if __name__ == "__main__":
    main()
