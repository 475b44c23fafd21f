"""Measure where the time of a run goes, and how far the objective is from the arithmetic limit of the machine.

    python experiments/benchmarks/parts.py --output parts.json
    python experiments/benchmarks/parts.py --methods idlg --victims 1000 --device cuda --output parts_gpu.json

Each attack runs on the same victims with its defaults in `Trainer.fit`, several times in turn: unchanged, and with its
functions wrapped from outside to measure the parts. A part is the time of its functions without that of other parts
called within them. The file has the ratio of the two times, which shows the cost of the wrapping (on a GPU it waits at
the boundaries of the parts; otherwise time would be assigned to the wrong part). A lane is idle in an evaluation if
its victim has finished and no other has entered yet.

The limit is the arithmetic of one evaluation at the rate at which this machine multiplies float32 matrices: the
fastest of several sizes, single and batched, with the same number of threads. torch's `FlopCounterMode` counts the
operations, once for plain autograd that differentiates twice, one victim at a time, and once for the library.
Activations, pooling and other small operations count as zero. A ratio of 1 would be a machine that only multiplies
matrices.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_plots import plot_parts
from setting import (  # beside this script
    check_file,
    describe_machine,
    find_device,
    make_trainer,
    show_machine,
    threads,
    write_result,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from leakage.attacks import DLGAttack, GradientInversion, IDLGAttack
from leakage.cli import quiet
from leakage.datamodules import DATASETS, Victims
from leakage.errors import check_count
from leakage.inversion.lanes import Lanes
from leakage.inversion.search import Search
from leakage.solvers import lbfgs

METHODS = {"idlg": IDLGAttack, "dlg": DLGAttack}
OTHER = "Lightning and Python"
PARTS = (
    "capturing",
    "lanes found",
    "objective",
    "L-BFGS directions",
    "L-BFGS rest",
    "admission and leaving",
    "scoring",
)
# The sizes of a matrix product, single and batched: batch, rows = columns.
SIZES = ((1, 512), (1, 1024), (1, 2048), (64, 64), (64, 128), (16, 256))
SIZES_ON_A_GPU = ((1, 2048), (1, 4096), (1, 8192), (1024, 128), (256, 256), (64, 1024))
# Seconds for each size, and minimum number of runs of each.
SECONDS, RUNS = 0.25, 3


class Parts:
    """A stopwatch for each part; only that of the innermost part runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """Add the time until now to the running part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def time(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for the part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return timed


def run_once(method: str, victims: Victims, given: argparse.Namespace, parts: Parts | None) -> dict[str, Any]:
    """Run one attack; with ``parts``, its functions are wrapped."""
    attack: GradientInversion = METHODS[method](seed=given.seed)
    lanes: list[int] = []
    fit = make_trainer(given.device).fit
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, part: str, *names: str) -> None:
            assert parts is not None
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, parts.time(part, getattr(owner, name))))

        if parts is not None:
            wrap(victims, "capturing", "share")
            wrap(Search, "lanes found", "begin")
            wrap(Lanes, "objective", "evaluate")
            wrap(Search, "admission and leaving", "admit", "retire")
            wrap(attack, "scoring", "on_validation_epoch_end", "validation_step", "on_train_end")
            wrap(lbfgs, "L-BFGS directions", "push_and_direct")
            configure = attack.configure_optimizers

            def configured() -> Any:
                optimizer = configure()
                optimizer.step = parts.time("L-BFGS rest", optimizer.step)  # type: ignore[method-assign]
                return optimizer

            stack.enter_context(mock.patch.object(attack, "configure_optimizers", configured))
            fit = parts.time(OTHER, fit)
        evaluate = Lanes.evaluate

        def counted(searched: Lanes) -> Tensor:
            lanes.append(len(searched))
            return evaluate(searched)

        stack.enter_context(mock.patch.object(Lanes, "evaluate", counted))
        began = time.perf_counter()
        fit(attack, datamodule=victims)
        if given.device.type == "cuda":
            torch.cuda.synchronize(given.device)
        seconds = time.perf_counter() - began
    evaluations = int(attack.finished.evaluations.sum())
    return {
        "seconds": seconds,
        "evaluations": evaluations,
        "lane_evaluations": sum(lanes),
        "steps": len(lanes),
        "most_lanes": max(lanes),
        "success_rate": statistics.fmean(float(result.success) for result in attack.scores.values()),
    }


def measure(method: str, victims: Victims, given: argparse.Namespace) -> dict[str, Any]:
    """Run an attack with and without wrapping in turn; the parts are those of the run with the median time."""
    plain, wrapped = [], []
    for turn in range(given.repeats):
        plain.append(run_once(method, victims, given, None))
        parts = Parts(given.device)
        wrapped.append(run_once(method, victims, given, parts) | {"parts": dict(parts.seconds)})
        print(
            f"  {method}, turn {turn + 1} of {given.repeats}: {plain[-1]['seconds']:.2f} s, "
            f"{wrapped[-1]['seconds']:.2f} s with the parts measured",
            flush=True,
        )
    middle = sorted(wrapped, key=lambda run: run["seconds"])[(len(wrapped) - 1) // 2]
    parts_seconds = {part: middle["parts"].get(part, 0.0) for part in (*PARTS, OTHER)}
    total, evaluations = sum(parts_seconds.values()), middle["evaluations"]
    seconds = statistics.median(run["seconds"] for run in plain)
    return {
        "seconds": seconds,
        "seconds_per_victim": seconds / given.victims,
        "evaluations_per_victim": evaluations / given.victims,
        "success_rate": middle["success_rate"],
        "wrapping_ratio": statistics.median(run["seconds"] for run in wrapped) / seconds,
        "share": {part: spent / total for part, spent in parts_seconds.items()},
        "seconds_per_victim_and_evaluation": {part: spent / evaluations for part, spent in parts_seconds.items()},
        "idle_share_of_lane_evaluations": 1 - evaluations / middle["lane_evaluations"],
        "steps": middle["steps"],
        "most_lanes": middle["most_lanes"],
    }


def multiplication_rate(device: torch.device) -> dict[str, float]:
    """Measure float32 matrix products in operations per second, by size; the fastest run of each counts."""
    rates = {}
    for batch, size in SIZES_ON_A_GPU if device.type == "cuda" else SIZES:
        left, right = (torch.full((batch, size, size), 0.5, device=device) for _ in range(2))
        out = torch.empty_like(left)
        fastest, runs, began = float("inf"), 0, time.perf_counter()
        while runs < RUNS or time.perf_counter() - began < SECONDS:
            started = time.perf_counter()
            torch.bmm(left, right, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if runs:  # the first run is a warm-up
                fastest = min(fastest, time.perf_counter() - started)
            runs += 1
        rates[f"{batch}x{size}x{size}"] = 2 * batch * size**3 / fastest
    return rates


def count_operations(victims: Victims, given: argparse.Namespace) -> dict[str, int]:
    """Count the floating-point operations of one evaluation for one victim, by plain autograd and by the library."""
    shared = victims.share([0])
    protocol = victims.victim.protocol
    model = copy.deepcopy(victims.victim.model).requires_grad_()
    model.load_state_dict({name: tensor[0] if shared.own_weights else tensor for name, tensor in shared.state.items()})
    weights = [dict(model.named_parameters())[name] for name in shared.gradients]
    image = torch.rand(1, protocol.num_images, *protocol.image_shape, requires_grad=True)
    label = torch.zeros(protocol.num_images, dtype=torch.long)
    with FlopCounterMode(display=False) as plain:
        found = torch.autograd.grad(F.cross_entropy(model(image[0]), label), weights, create_graph=True)
        distance = torch.stack(
            [(a - b[0]).square().sum() for a, b in zip(found, shared.gradients.values(), strict=True)]
        )
        torch.autograd.grad(distance.sum(), image)
    attack = IDLGAttack(seed=given.seed)
    counts: list[int] = []
    evaluate = Lanes.evaluate

    def counted(lanes: Lanes) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = evaluate(lanes)
        counts.append(counter.get_total_flops())
        attack.trainer.should_stop = True
        return result

    # One lane, since torch's counts of grouped convolutions, which serve many victims, are too high.
    with mock.patch.object(Lanes, "evaluate", counted), mock.patch.object(victims, "lanes", 1):
        make_trainer(torch.device("cpu"), limit_val_batches=0).fit(attack, datamodule=victims)
    return {"plain autograd": plain.get_total_flops(), "library": counts[-1]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="parts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dataset",
        default="sample",
        help=f"one of {', '.join(DATASETS)}, or a folder in ImageFolder layout (default: %(default)s)",
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--victims", type=int, default=200, help="with one image each (default: %(default)s)")
    parser.add_argument("--lanes", type=int, help="victims attacked at once (default: 64, on a GPU 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(victims=given.victims, repeats=given.repeats, threads=given.threads)
        check_count(0, seed=given.seed)
        given.device = find_device(given.device)
        # Not "auto", which might choose different numbers for the runs that are compared.
        options = {"lanes": (1024 if given.device.type == "cuda" else 64) if given.lanes is None else given.lanes}
        check_file(given.output)
        victims = Victims(
            given.dataset,
            root=given.root,
            image_size=given.image_size,
            victims=given.victims,
            seed=given.seed,
            **options,
        )
        victims.prepare_data()
        victims.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with threads(given.threads):
        _measure(given, victims.name, victims)


def _measure(given: argparse.Namespace, dataset: str, victims: Victims) -> None:
    machine = describe_machine(given.device)
    print(f"{show_machine(machine)}: {given.victims} victims of {dataset}", flush=True)
    operations = count_operations(victims, given)
    before = multiplication_rate(given.device)
    methods = {method: measure(method, victims, given) for method in given.methods}
    # Twice, since other work on the machine may have slowed down one of them.
    rates = {size: max(rate, before[size]) for size, rate in multiplication_rate(given.device).items()}
    fastest = max(rates.values())
    limit = {kind: count / fastest for kind, count in operations.items()}
    for found in methods.values():
        spent = found["seconds_per_victim_and_evaluation"]
        everything = sum(spent.values())
        found["ratio_to_limit"] = {
            f"{what}, {kind}": seconds / limit[kind]
            for what, seconds in (("objective", spent["objective"]), ("whole run", everything))
            for kind in limit
        }
    result: dict[str, Any] = {
        "machine": machine,
        "methods": methods,
        "operations_per_evaluation": operations,
        "operations_per_second": rates,
        "limit_seconds_per_evaluation": limit,
        "dataset": dataset,
        "victims": given.victims,
        "repeats": given.repeats,
        "seed": given.seed,
    }
    _show(result)
    bars = {
        method: {part: 1e6 * spent for part, spent in found["seconds_per_victim_and_evaluation"].items()}
        for method, found in methods.items()
    }
    bars["arithmetic limit"] = {"objective": 1e6 * limit["plain autograd"]}
    title = f"{machine['gpu'] or machine['cpu']}: {dataset}"
    write_result(given.output, result, plot_parts(bars, xlabel="microseconds per victim and evaluation", title=title))


def _show(result: dict[str, Any]) -> None:
    methods = result["methods"]
    print(f"\n{'share of time':24}" + "".join(f"{method:>10}" for method in methods))
    for part in (*PARTS, OTHER):
        print(f"{part:24}" + "".join(f"{100 * found['share'][part]:>8.1f} %" for found in methods.values()))
    idle = [f"{100 * found['idle_share_of_lane_evaluations']:>8.1f} %" for found in methods.values()]
    print(f"{'idle lanes (share)':24}" + "".join(idle))
    print(f"{'wrapped / plain':24}" + "".join(f"{found['wrapping_ratio']:>10.2f}" for found in methods.values()))
    for kind, seconds in result["limit_seconds_per_evaluation"].items():
        operations = result["operations_per_evaluation"][kind]
        print(f"\n{kind}: {operations / 1e6:.2f} million operations, at best {1e6 * seconds:.1f} us; ratio to it:")
        for method, found in methods.items():
            ratios = [f"{what} {found['ratio_to_limit'][f'{what}, {kind}']:.1f}" for what in ("objective", "whole run")]
            print(f"  {method}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
