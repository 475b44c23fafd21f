"""Compare the time of capturing and of attacking gradients with each defense and without any.

    python experiments/benchmarks/defense_speed.py --output defenses.json
    python experiments/benchmarks/defense_speed.py --network convnet --attack inverting_gradients --output F.json

Capturing is what clients do: they compute their gradients, and defend them. Attacking is one evaluation of an adaptive
attacker in `Trainer.fit`; its time is from the start of a step to that of the next, so it includes the solver,
Lightning and Python. All defenses have the same random victims, lanes and threads, and take turns, in `--repeats`
rounds. Times are CPU time per victim; ratios to the time without a defense are medians over the rounds. Each defense
has the middle one of its strengths in `experiments/defenses/tradeoff.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmark_plots import plot_parts
from setting import (  # beside this script
    CLASSES,
    RandomVictims,
    Steps,
    check_file,
    describe_machine,
    make_trainer,
    show_machine,
    threads,
    write_result,
)

from leakage.attacks import GradientInversion, IDLGAttack, InvertingGradientsAttack
from leakage.cli import quiet
from leakage.errors import check_count

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("defenses", "inverting_gradients")]
from table_networks import NETWORKS
from tradeoff_defenses import DEFENSES, Cell

NONE, SIZE, PARTS = "none", 28, ("capturing", "evaluation")
# Defenses of the gradient: those that change images or the network have no counterpart without.
NAMES = (
    *("clip", "dp_sgd", "gaussian_noise", "laplace_noise", "half_precision", "quantise", "quantise_stochastic", "sign"),
    *("top_k", "random_pruning", "soteria"),
)
ATTACKS = ("idlg", "inverting_gradients")
# Number of steps before the timed ones, and a tolerance that no loss reaches.
WARM_UP, TOLERANCE = 2, 1e-30


def make_attack(name: str, evaluations: int, seed: int) -> GradientInversion:
    """Return an adaptive attacker with a single start."""
    if name == "idlg":
        return IDLGAttack(max_evaluations=evaluations, tolerance=TOLERANCE, restarts=0, seed=seed)
    return InvertingGradientsAttack(steps=evaluations, seed=seed)


def run(cell: Cell, given: argparse.Namespace) -> dict[str, float]:
    """Capture the gradients of as many victims as lanes, and attack them; returns CPU seconds per victim."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(given.seed)
        model = NETWORKS[given.network](1, SIZE, CLASSES).eval()
    victims = RandomVictims(
        victims=given.lanes,
        lanes=given.lanes,
        image_size=SIZE,
        images=given.images,
        model=model,
        weights=given.weights,
        seed=given.seed,
        defenses=cell.on(model),
    )
    victims.setup("fit")
    drawn = torch.Generator().manual_seed(given.seed)
    images = torch.rand(given.lanes, given.images, 1, SIZE, SIZE, generator=drawn)
    labels = torch.randint(CLASSES, (given.lanes, given.images), generator=drawn)
    client = victims.victim
    states = client.fresh_states([*range(given.lanes)]) if given.weights == "own" else None
    before = time.process_time()
    client.share(images, labels, states=states)
    capturing = time.process_time() - before
    steps = Steps(time.process_time)
    # One more step, since a step lasts until the next begins.
    attack = make_attack(given.attack, WARM_UP + given.evaluations + 1, given.seed)
    make_trainer(torch.device("cpu"), steps, limit_val_batches=0).fit(attack, datamodule=victims)
    moments = steps.moments[WARM_UP:]
    seconds = [after - begun for begun, after in pairwise(moments)]
    return {"capturing": capturing / given.lanes, "evaluation": statistics.median(seconds) / given.lanes}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="defense_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    add("--network", choices=tuple(NETWORKS), default="lenet", help="(default: %(default)s)")
    add("--weights", choices=("shared", "own"), default="own", help="(default: %(default)s)")
    add("--attack", choices=ATTACKS, default="idlg", help="(default: %(default)s)")
    add("--images", type=int, default=1, help="per victim (default: %(default)s)")
    add("--lanes", type=int, default=16, help="victims at once (default: %(default)s)")
    add("--defenses", nargs="+", choices=NAMES, default=NAMES, help="(default: all)")
    add("--evaluations", type=int, default=10, help="timed ones (default: %(default)s)")
    add("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(
            lanes=given.lanes, images=given.images, evaluations=given.evaluations, repeats=given.repeats,
            threads=given.threads,
        )  # fmt: skip
        check_count(0, seed=given.seed)
        check_file(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with threads(given.threads):
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    machine = describe_machine()
    print(f"{show_machine(machine)}: {given.network}, {given.lanes} lanes, images: {given.images}", flush=True)
    cells = []
    for name in dict.fromkeys((NONE, *given.defenses)):
        strength = DEFENSES[name].strengths[len(DEFENSES[name].strengths) // 2]
        cells.append(Cell(name, strength, DEFENSES[name].make(strength)))
    found: dict[str, list[dict[str, float]]] = {cell.name: [] for cell in cells}
    run(cells[0], given)  # warms up
    for turn in range(given.repeats):
        for cell in cells:
            found[cell.name].append(run(cell, given))
        print(f"  round {turn + 1} of {given.repeats}", flush=True)
    rows = []
    for cell in cells:
        row: dict[str, Any] = {"defense": cell.name, "strength": cell.strength}
        for part in PARTS:
            row[f"{part}_seconds"] = statistics.median(turn[part] for turn in found[cell.name])
            row[f"{part}_ratio"] = statistics.median(
                turn[part] / plain[part] for turn, plain in zip(found[cell.name], found[NONE], strict=True)
            )
        rows.append(row)
    result = {
        "rows": rows,
        "attack": given.attack,
        "network": given.network,
        "weights": given.weights,
        "images": given.images,
    }
    result |= {"lanes": given.lanes, "evaluations": given.evaluations, "repeats": given.repeats, "seed": given.seed}
    print(f"\n{'':40} {'capturing':>20} {'one evaluation':>20}")
    bars = {}
    for row in rows:
        name = DEFENSES[row["defense"]].named(row["strength"])
        parts = [f"{1e3 * row[f'{part}_seconds']:9.3f} ms {row[f'{part}_ratio']:7.2f}" for part in PARTS]
        print(f"{name:40} {parts[0]:>20} {parts[1]:>20}")
        bars[name] = {"one evaluation": row["evaluation_ratio"]}
    title = f"{given.attack}, {given.network}, {given.lanes} lanes, images: {given.images}"
    picture = plot_parts(bars, xlabel="CPU time of one evaluation, in units of that without a defense", title=title)
    write_result(given.output, {**result, "machine": machine}, picture)


if __name__ == "__main__":
    main()
