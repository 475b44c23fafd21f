"""Compare the seconds per victim of several processes with one thread each and of one process.

    python experiments/benchmarks/processes.py --output processes.json
    python experiments/benchmarks/processes.py --processes 4 --victims 400 --output four.json

The single process runs with one thread, and with as many threads as there are processes. Each run is a new child
process; `VictimParallel` starts the others. All attack the same victims with the same seeds on the CPU, and take
turns. The time is measured in the first process, from the start of the first training step to the end of the last,
after which all processes have finished all victims. The time before that (Python, imports, starting processes, sharing
the first gradients) is the start-up and is reported separately. The figures are medians over the turns.

The results must not depend on the number of processes: labels and successes must be equal, and images that both
have reconstructed must be within an MSE of 1e-3 of each other. If not, the script ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_plots import plot_parts
from lightning import Callback
from setting import (  # beside this script
    check_file,
    cores,
    describe_machine,
    make_trainer,
    write_result,
)

from leakage.attacks import IDLGAttack
from leakage.cli import quiet
from leakage.datamodules import DATASETS, Victims
from leakage.errors import check_count
from leakage.inversion.strategy import VictimParallel

# Two images with a smaller MSE count as equal.
AGREE = 1e-3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="processes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument("--processes", type=int, default=2, help="with one thread each (default: %(default)s)")
    parser.add_argument("--victims", type=int, default=200, help="with one image each (default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=64, help="maximum per process (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--dataset",
        default="sample",
        help=f"one of {', '.join(DATASETS)}, or a folder in ImageFolder layout (default: %(default)s)",
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the side to run, with all options: for the script itself
    given = parser.parse_args(arguments)
    quiet()
    if given.side is not None:
        _be_a_side(argparse.Namespace(**json.loads(given.side)))
        return
    try:
        check_count(victims=given.victims, lanes=given.lanes, repeats=given.repeats)
        check_count(0, seed=given.seed)
        check_count(2, processes=given.processes)
        if given.processes > given.victims:
            raise ValueError(
                f"Expected `--victims` to be at least the {given.processes} processes, but got {given.victims}."
            )
        check_file(given.output)
        victims = _victims(given)
        victims.prepare_data()
        victims.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    _measure(given, victims.name)


def _victims(given: argparse.Namespace) -> Victims:
    return Victims(
        given.dataset, root=given.root, image_size=given.image_size, victims=given.victims, seed=given.seed,
        lanes=given.lanes,
    )  # fmt: skip


def _measure(given: argparse.Namespace, dataset: str) -> None:
    count = given.processes
    sides = {
        "1 process, 1 thread": (1, 1),
        f"1 process, {count} threads": (1, count),
        f"{count} processes, 1 thread each": (count, 1),
    }
    machine = describe_machine() | {"threads": None}
    print(f"{machine['cpu']}, {machine['cores']} cores: {given.victims} victims of {dataset}", flush=True)
    if count > cores():
        print(f"{count} processes are more than the {cores()} cores, so the comparison is not meaningful.", flush=True)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    outcomes: dict[str, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.repeats):
            for name, (processes, threads) in sides.items():
                said, outcomes[name] = _run(given, processes, threads, Path(folder))
                turns[name].append(said)
                print(
                    f"turn {turn + 1} of {given.repeats}, {name}: {said['seconds']:.2f} s after a start-up of "
                    f"{said['start_up']:.2f} s",
                    flush=True,
                )
    seconds = {name: statistics.median(turn["seconds"] for turn in turns[name]) for name in sides}
    start_up = {name: statistics.median(turn["start_up"] for turn in turns[name]) for name in sides}
    one, threaded, several = sides
    same = {name: compare_outcomes(outcomes[one], outcomes[name]) for name in (threaded, several)}
    result: dict[str, Any] = {
        "ratio": {f"to {name}": seconds[name] / seconds[several] for name in (one, threaded)},
        "seconds_per_victim": {name: spent / given.victims for name, spent in seconds.items()},
        "seconds": {name: [turn["seconds"] for turn in turns[name]] for name in sides},
        "start_up_seconds": start_up,
        "success_rate": {name: float(outcomes[name]["success"].double().mean()) for name in sides},
        f"compared_with_{one.replace(', ', '_').replace(' ', '_')}": same,
        "machine": machine,
        "dataset": dataset,
        "processes": count,
        "victims": given.victims,
        "lanes": given.lanes,
        "repeats": given.repeats,
        "seed": given.seed,
    }
    print(f"\n{'':28} {'s / victim':>11} {'start-up':>9} {'success':>9}")
    for name in sides:
        success = 100 * result["success_rate"][name]
        print(f"{name:28} {seconds[name] / given.victims:>11.4f} {start_up[name]:>7.2f} s {success:>7.1f} %")
    for name, ratio in result["ratio"].items():
        print(f"{count} processes {name}: {ratio:.2f} times fewer seconds per victim")
    bars = {name: {"start-up": start_up[name], "all training steps": seconds[name]} for name in sides}
    title = f"{machine['cpu']}: {given.victims} victims"
    write_result(given.output, result, plot_parts(bars, xlabel="seconds", title=title))
    differing = [name for name, found in same.items() if not found["same"]]
    if differing:
        sys.exit(
            f"processes.py: error: Expected the results of '{one}' from {differing}, but got other results: "
            f"{ {name: same[name] for name in differing} }."
        )


def compare_outcomes(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare whether labels and successes are equal, and whether images that both reconstructed agree."""
    both = (expected["success"] & found["success"]).nonzero().squeeze(1)
    apart = (expected["images"] - found["images"]).square().flatten(1).mean(1)[both]
    greatest = float(apart.max()) if len(apart) else 0.0
    differing = {
        "ids": int((expected["ids"] != found["ids"]).sum()),
        "labels": int((expected["labels"] != found["labels"]).any(1).sum()),
        "successes": int((expected["success"] != found["success"]).sum()),
    }
    same = not any(differing.values()) and greatest < AGREE
    return {"same": same, "victims_that_differ_in": differing, "greatest_mse_between_images": greatest}


def _run(
    given: argparse.Namespace, processes: int, threads: int, folder: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run one side; returns the seconds of its start-up and its steps, and its results."""
    file = folder / "outcome.pt"
    file.unlink(missing_ok=True)
    side = {**vars(given), "side": None, "output": str(file), "processes": processes, "threads": threads}
    side["began"] = time.time()
    # The processes that it starts find this script by its path, and the package in the same place as this process.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--output", str(file)]
    done = subprocess.run(
        [*command, "--side", json.dumps(side, default=str)], env=environment, capture_output=True, text=True
    )
    if done.returncode or not file.is_file():
        sys.exit(f"processes.py: error: {processes} processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
    outcome: dict[str, Any] = torch.load(file, weights_only=True)
    return outcome.pop("said"), outcome


class Clock(Callback):
    """Record when the first training step began and the last one ended."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the start of the first step."""
        self.first = self.first or time.time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the end of the latest step."""
        self.last = time.time()


def _be_a_side(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    clock = Clock()
    attack = IDLGAttack(seed=options.seed)
    several = {"strategy": VictimParallel(), "devices": options.processes} if options.processes > 1 else {}
    trainer = make_trainer(torch.device("cpu"), clock, **several)
    victims = _victims(options)
    trainer.fit(attack, datamodule=victims)
    if trainer.is_global_zero:
        found = attack.finished
        outcome = {
            "said": {"start_up": clock.first - options.began, "seconds": clock.last - clock.first},
            "ids": found.ids,
            "images": found.images,
            "labels": found.labels,
            "success": torch.tensor([attack.scores[victim].success == 1 for victim in found.ids.tolist()]),
        }
        torch.save(outcome, options.output)


if __name__ == "__main__":
    main()
