"""Compare the seconds per victim and iteration of Inverting Gradients on many victims at once and in a plain loop.

    python experiments/benchmarks/inversion_speed.py --network resnet20 --lanes 16 --output resnet20.json
    python experiments/benchmarks/inversion_speed.py --network convnet64 --weights own --threads 1 --output F.json

The plain side attacks one victim at a time in a straightforward way: autograd that differentiates twice, cosine
distance and total variation, `torch.optim.Adam` on signs with the published decays, images kept in [0, 1]. The other
side is `InvertingGradientsAttack` in `Trainer.fit` on as many victims as lanes, once unchanged and once without joint
passes (`vmap`), as for networks that do not support them. All sides have the same victims, starts, steps and threads.
Before the timing, objectives and gradients at the starts are compared. The sides take turns, `--repeats` times. The
time of a step of the library is from its start to that of the next, so it includes the solver, Lightning and Python.
Ratios are medians over the turns; those of CPU time are more reliable if other work runs on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_plots import plot_parts
from setting import (  # beside this script
    CLASSES,
    RandomVictims,
    Steps,
    check_file,
    describe_machine,
    find_device,
    make_trainer,
    show_machine,
    threads,
    write_result,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

from leakage.attacks import InvertingGradientsAttack
from leakage.cli import quiet
from leakage.clients.shared_gradient import SharedGradient
from leakage.errors import check_count
from leakage.inversion import evaluator
from leakage.inversion.evaluator import Evaluator
from leakage.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1] / "inverting_gradients"))
from table_networks import NETWORKS

LR, TOTAL_VARIATION = 0.1, 1e-2
MILESTONES = (3 / 8, 5 / 8, 7 / 8)
SIZE = 32
# Number of steps of the library before the timed ones.
WARM_UP = 2
# Largest relative difference of objectives and gradients at the start, in single precision.
AGREEMENT = 1e-3


class Plain:
    """The plain search, one victim after another."""

    def __init__(self, model: nn.Module, shared: SharedGradient, steps: int) -> None:
        self.model, self.shared, self.steps = copy.deepcopy(model).requires_grad_(), shared, steps
        parameters = dict(self.model.named_parameters())
        self.weights = [parameters[name] for name in shared.gradients]

    def load(self, victim: int) -> None:
        """Load the network, gradient and labels of a victim."""
        state = self.shared.state
        own = {name: tensor[victim] for name, tensor in state.items()} if self.shared.own_weights else state
        self.model.load_state_dict(own)
        self.targets = [gradient[victim] for gradient in self.shared.gradients.values()]
        assert self.shared.labels is not None
        self.labels = self.shared.labels[victim]

    def evaluate(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective at images ``(N, C, H, W)`` that require gradients, and its gradient."""
        found = torch.autograd.grad(F.cross_entropy(self.model(images), self.labels), self.weights, create_graph=True)
        product = torch.stack([(a * b).sum() for a, b in zip(found, self.targets, strict=True)]).sum()
        norms = [torch.stack([part.square().sum() for part in side]).sum().sqrt() for side in (found, self.targets)]
        variation = images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
        objective = 1 - product / (norms[0] * norms[1]) + TOTAL_VARIATION * variation
        (gradient,) = torch.autograd.grad(objective, images)
        return objective.detach(), gradient

    def search(self, victim: int, start: Tensor, until: int | None = None) -> Tensor:
        """Return the images after all steps, or after ``until`` steps."""
        self.load(victim)
        images = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=LR)
        milestones = [math.ceil(share * self.steps) for share in MILESTONES]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for _ in range(self.steps if until is None else until):
            images.grad = self.evaluate(images)[1].sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return images.detach()


def now(device: torch.device) -> tuple[float, float]:
    """Return the current time by the wall clock and in CPU time, after all work of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def make_victims(given: argparse.Namespace) -> RandomVictims:
    """Return as many victims as lanes, ready to share their gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(given.seed)
        network = NETWORKS[given.network](3, (SIZE, SIZE), CLASSES)
    model = nn.Sequential(Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)), network).eval()
    victims = RandomVictims(
        victims=given.lanes,
        images=given.images,
        image_size=SIZE,
        seed=given.seed,
        model=model,
        weights=given.weights,
        lanes=given.lanes,
    )
    victims.setup("fit")
    return victims


def make_attack(given: argparse.Namespace, steps: int) -> InvertingGradientsAttack:
    """Ours."""
    return InvertingGradientsAttack(total_variation=TOTAL_VARIATION, lr=LR, steps=steps, seed=given.seed)


def starts(given: argparse.Namespace) -> Tensor:
    """Return the starts of all sides, ``(V, N, C, H, W)``."""
    seeds = [derive_seed(given.seed, victim, "start/images/0") for victim in range(given.lanes)]
    shape = given.images, 3, SIZE, SIZE
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).clamp(0, 1).to(given.device)


def compare(
    given: argparse.Namespace, victims: RandomVictims, shared: SharedGradient, plain: Plain
) -> dict[str, float]:
    """Return the largest relative differences of objectives and gradients at the starts of all victims."""
    attack, images = make_attack(given, given.iterations), starts(given)
    victim = copy.deepcopy(victims.victim)
    victim.model.to(given.device)
    ours = Evaluator(victim, attack.objective, attack.images, attack.labels)
    ours.prepare(images)
    losses, gradients = ours(shared, ours.begin(shared), {"images": images})
    differences: dict[str, list[float]] = {"objective": [], "gradient": []}
    for index, loss in enumerate(losses):
        plain.load(index)
        expected, by = plain.evaluate(images[index].clone().requires_grad_())
        differences["objective"].append(float((loss - expected).abs() / expected))
        differences["gradient"].append(float((gradients["images"][index] - by).norm() / by.norm()))
    largest = {name: max(values) for name, values in differences.items()}
    if max(largest.values()) > AGREEMENT:
        raise ArithmeticError(f"Expected both sides to agree to {AGREEMENT:g}, but got differences of {largest}.")
    return largest


def run_ours(given: argparse.Namespace, joint: bool) -> tuple[float, float]:
    """Run the library; returns wall-clock and CPU seconds per victim and iteration."""
    steps = Steps(lambda: now(given.device))
    apart = mock.patch.object(evaluator, "has_joint_pass", return_value=False)
    with contextlib.nullcontext() if joint else apart:
        # One more step, since a step lasts until the next begins.
        attack, victims = make_attack(given, WARM_UP + given.iterations + 1), make_victims(given)
        make_trainer(given.device, steps, limit_val_batches=0).fit(attack, datamodule=victims)
    pairs = zip(steps.moments[WARM_UP:-1], steps.moments[WARM_UP + 1 :], strict=True)
    seconds = [(after[0] - before[0], after[1] - before[1]) for before, after in pairs]
    wall, cpu = (statistics.median(part) / given.lanes for part in zip(*seconds, strict=True))
    return wall, cpu


def run_plainly(given: argparse.Namespace, plain: Plain) -> tuple[float, float]:
    """Run the plain loop on the first victims; returns wall-clock and CPU seconds per victim and iteration."""
    images = starts(given)
    before = now(given.device)
    for victim in range(given.plain_victims):
        plain.search(victim, images[victim])
    after = now(given.device)
    count = given.plain_victims * plain.steps
    return (after[0] - before[0]) / count, (after[1] - before[1]) / count


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="inversion_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet20", help="(default: %(default)s)")
    parser.add_argument("--weights", choices=("shared", "own"), default="shared", help="(default: %(default)s)")
    parser.add_argument("--lanes", type=int, default=16, help="victims at once (default: %(default)s)")
    parser.add_argument("--plain-victims", type=int, default=2, help="for the plain loop (default: %(default)s)")
    parser.add_argument("--images", type=int, default=1, help="per victim (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=10, help="timed iterations (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(
            lanes=given.lanes, plain_victims=given.plain_victims, images=given.images, repeats=given.repeats,
            threads=given.threads,
        )  # fmt: skip
        check_count(2, iterations=given.iterations)
        check_count(0, seed=given.seed)
        if given.plain_victims > given.lanes:
            raise ValueError(
                f"Expected `--plain-victims` of at most the {given.lanes} lanes, but got {given.plain_victims}."
            )
        given.device = find_device(given.device)
        check_file(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with threads(given.threads):
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    machine, victims = describe_machine(given.device), make_victims(given)
    shared = victims.share(range(given.lanes)).to(given.device)
    plain = Plain(copy.deepcopy(victims.victim.model).to(given.device), shared, given.iterations)
    print(f"{show_machine(machine)}: {given.network}, {given.lanes} lanes", flush=True)
    differences = compare(given, victims, shared, plain)
    print("  " + ", ".join(f"{name}s differ by {value:.1e}" for name, value in differences.items()), flush=True)
    sides: dict[str, Callable[[], tuple[float, float]]] = {
        "plain": lambda: run_plainly(given, plain),
        "vmap": lambda: run_ours(given, joint=False),
        "leakage": lambda: run_ours(given, joint=True),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(given.repeats):
        for name, run in sides.items():
            found[name].append(run())
        times = ", ".join(f"{name} {1e3 * turns[-1][0]:.2f} ms" for name, turns in found.items())
        print(f"  turn {turn + 1} of {given.repeats}: {times} per victim and iteration", flush=True)
    seconds, cpu_seconds = (
        {name: statistics.median(turn[clock] for turn in turns) for name, turns in found.items()} for clock in (0, 1)
    )
    ratio, cpu_ratio = (
        {
            name: statistics.median(a[clock] / b[clock] for a, b in zip(found["plain"], found[name], strict=True))
            for name in ("vmap", "leakage")
        }
        for clock in (0, 1)
    )
    result: dict[str, Any] = {
        "ratio": ratio,
        "ratio_of_cpu_time": cpu_ratio,
        "seconds_per_victim_and_iteration": seconds,
        "cpu_seconds_per_victim_and_iteration": cpu_seconds,
        "largest_differences": differences,
        "network": given.network,
        "weights": given.weights,
        "lanes": given.lanes,
        "images": given.images,
        "iterations": given.iterations,
        "repeats": given.repeats,
        "plain_victims": given.plain_victims,
        "seed": given.seed,
        "machine": machine,
    }
    print(f"\n{ratio['leakage']:.1f} times faster than the plain loop, {cpu_ratio['leakage']:.1f} times in CPU time")
    title = f"{machine['gpu'] or machine['cpu']}: {given.network}, {given.lanes} lanes"
    bars = {name: {"per victim and iteration": 1e3 * value} for name, value in seconds.items()}
    write_result(given.output, result, plot_parts(bars, xlabel="milliseconds", title=title))


if __name__ == "__main__":
    main()
