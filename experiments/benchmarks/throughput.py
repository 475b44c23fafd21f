"""Measure the time per victim and evaluation, and the peak memory, by the number of lanes (victims at once).

    python experiments/benchmarks/throughput.py --output throughput.json
    python experiments/benchmarks/throughput.py --cells lenet/own/28/1 resnet18/shared/32/1 --lanes 1 16 --output F.json

A cell is NETWORK/WEIGHTS/SIZE/IMAGES: the victims' network, own weights (for each victim) or shared weights, height
and width of the images (28: grey, else three channels), and images per victim. By default the cells change one thing
at a time. Each cell runs `IDLGAttack` with the robust search in `Trainer.fit`, on as many random victims as lanes, for
a few evaluations. The time of a step is from the start of one training step to that of the next, the median after two
warm-up steps, so it includes L-BFGS, Lightning and Python. The objective's share of it is measured in the same steps.

Peak memory is that of the tensors: on a GPU `torch.cuda.max_memory_allocated` of the same run; on a CPU the bytes of
all tensors alive at once (`leakage.inversion.memory.peak_memory`), counted in a separate run, since counting takes
time. This is exact and reproducible, but does not include memory that libraries allocate themselves. The L-BFGS
history, which grows with the evaluations, is only partly filled; the file also has the size of a full one. Lanes for
which there is not enough time or memory are listed as skipped. Ratios compare lanes within one run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from benchmark_plots import plot_over_lanes
from setting import (  # beside this script
    RandomVictims,
    Steps,
    check_file,
    describe_machine,
    find_device,
    make_network,
    make_trainer,
    show_machine,
    threads,
    write_result,
)
from torch import Tensor

from leakage.attacks import IDLGAttack
from leakage.cli import quiet
from leakage.errors import check_choice, check_count, check_positive
from leakage.inversion.lanes import Lanes
from leakage.inversion.memory import free_memory, is_out_of_memory, peak_memory
from leakage.models import NETWORKS

CELLS = (
    "lenet/own/28/1",
    "lenet/shared/28/1",
    "lenet/own/32/1",
    "lenet/own/64/1",
    "lenet/own/28/2",
    "lenet/own/28/4",
    "lenet/own/28/8",
    "resnet18/shared/32/1",
    "resnet18/own/32/1",
    "convnet/shared/32/1",
    "convnet/own/32/1",
)
LANES = tuple(2**power for power in range(11))
# Number of steps before the timed ones, and of evaluations in a run for memory only.
WARM_UP, MEMORY_EVALUATIONS = 2, 4
# The share of the free memory that may be used.
SHARE_OF_MEMORY = 0.6
# A tolerance that no loss reaches.
TOLERANCE = 1e-30


@dataclass(frozen=True)
class Cell:
    """A setting that is measured for several numbers of lanes."""

    network: str
    weights: str
    image_size: int
    images: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Parse NETWORK/WEIGHTS/SIZE/IMAGES; raise a ``ValueError`` for any other text."""
        parts = text.split("/")
        if len(parts) != 4 or not (parts[2].isdecimal() and parts[3].isdecimal()):
            raise ValueError(
                f"Expected `--cells` as NETWORK/WEIGHTS/SIZE/IMAGES (such as {CELLS[0]}), but got {text!r}."
            )
        cell = cls(parts[0], parts[1], int(parts[2]), int(parts[3]))
        check_choice("network", cell.network, NETWORKS)
        check_choice("weights", cell.weights, ("own", "shared"))
        check_count(size=cell.image_size, images=cell.images)
        make_network(cell.network, cell.image_size)  # some networks refuse small images
        return cell

    def __str__(self) -> str:
        return f"{self.network}/{self.weights}/{self.image_size}/{self.images}"


class Clock:
    """Times by the clock of the device: a GPU works asynchronously and is not made to wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        """Return the current time of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two times."""
        if self.device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


class UnmeasuredError(Exception):
    """The reason why there is no figure: ``"memory"`` or ``"search"``, and an explanation."""


def attack(cell: Cell, lanes: int, evaluations: int, device: torch.device, seed: int) -> dict[str, Any]:
    """Attack as many victims as lanes; returns the seconds of the timed steps, and of the objective in them."""
    victims = RandomVictims(
        victims=lanes,
        lanes=lanes,
        image_size=cell.image_size,
        images=cell.images,
        model=make_network(cell.network, cell.image_size),
        weights=cell.weights,
        seed=seed,
    )
    module = IDLGAttack(seed=seed, max_evaluations=evaluations, tolerance=TOLERANCE, restarts=0)
    clock = Clock(device)
    steps = Steps(clock.now)
    objectives: list[tuple[Any, Any]] = []
    evaluate = Lanes.evaluate

    def timed(searched: Lanes) -> Tensor:
        begin = clock.now()
        result = evaluate(searched)
        objectives.append((begin, clock.now()))
        return result

    with warnings.catch_warnings(), mock.patch.object(Lanes, "evaluate", timed):
        # a warning that the attack continues with fewer lanes, which is checked below
        warnings.filterwarnings("ignore", message=".*lanes do not fit into memory")
        make_trainer(device, steps, limit_val_batches=0).fit(module, datamodule=victims)
    if module.most_lanes < lanes:
        raise UnmeasuredError("memory", f"allocation failed with {lanes} lanes")
    seconds = [
        clock.seconds(begin, end) for begin, end in zip(steps.moments[:-1], steps.moments[1:], strict=True)
    ]  # the last step has no successor
    spent = [clock.seconds(begin, end) for begin, end in objectives[: len(seconds)]]
    done = module.finished.evaluations
    if len(seconds) <= WARM_UP:
        raise UnmeasuredError("search", f"all victims stopped after {len(steps.moments)} evaluations")
    return {
        "seconds": seconds[WARM_UP:],
        "objective_seconds": spent[WARM_UP:],
        "stopped_early": float((done < evaluations).double().mean()),
        "full_history_bytes": _history_bytes(cell, module.search.history_size),
    }


def _history_bytes(cell: Cell, size: int) -> int:
    """Return the bytes of one victim's full history: pairs (s, y), and the products of all of them."""
    unknowns = cell.images * (1 if cell.image_size == 28 else 3) * cell.image_size**2
    return 4 * (2 * size * unknowns + size * size)


def measure(cell: Cell, lanes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measure time and memory with this number of lanes."""
    device: torch.device = given.device
    outcome: dict[str, Any] = {}

    def run(evaluations: int) -> None:
        outcome.clear()
        outcome.update(attack(cell, lanes, evaluations, device, given.seed))

    if device.type == "cuda":
        peak = peak_memory(lambda: run(given.evaluations), device)
    else:
        peak = peak_memory(lambda: run(MEMORY_EVALUATIONS), device)
        gc.collect()
        run(given.evaluations)
    step = statistics.median(outcome["seconds"])
    return {
        "lanes": lanes,
        "seconds_per_step": step,
        "seconds_per_victim_and_evaluation": step / lanes,
        "objective_share": sum(outcome["objective_seconds"]) / sum(outcome["seconds"]),
        "peak_bytes": peak,
        "stopped_early": outcome["stopped_early"],
        "full_history_bytes_per_lane": outcome["full_history_bytes"],
    }


def over_lanes(cell: Cell, given: argparse.Namespace, end: float) -> dict[str, Any]:
    """Measure all numbers of lanes of a cell, as far as time and memory allow.

    Args:
        cell: the cell.
        given: the options.
        end: the time by `time.monotonic` at which this cell must end.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    began, last = time.monotonic(), 0.0
    for lanes in given.lanes:
        more = lanes / rows[-1]["lanes"] if rows else 1.0
        reason = None
        remaining = min(began + given.seconds, end) - time.monotonic()
        needed = rows[-1]["peak_bytes"] * more if rows else 0
        if more * last > remaining:
            reason = ("time", f"about {more * last:.0f} s needed, {max(remaining, 0):.0f} s left")
        elif needed > SHARE_OF_MEMORY * (free := free_memory(given.device)):
            reason = ("memory", f"about {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")
        else:
            started = time.monotonic()
            try:
                rows.append(measure(cell, lanes, given))
            except UnmeasuredError as error:
                reason = error.args
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                reason = ("memory", str(error).splitlines()[0])
            last = time.monotonic() - started
        if reason is not None:
            rest = [count for count in given.lanes if count >= lanes]
            skipped.append({"cell": str(cell), "lanes": rest, "reason": reason[0], "detail": reason[1]})
            break
        row = rows[-1]
        row["ratio_to_first"] = rows[0]["seconds_per_victim_and_evaluation"] / row["seconds_per_victim_and_evaluation"]
        print(
            f"  {cell}, {lanes} lanes: {1e3 * row['seconds_per_victim_and_evaluation']:.3f} ms per victim and "
            f"evaluation, {row['peak_bytes'] / 2**20:.1f} MiB",
            flush=True,
        )
    return {**asdict(cell), "cell": str(cell), "rows": rows, "memory": line(rows), "skipped": skipped}


def line(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Fit peak bytes = fixed + slope * lanes by least squares; also returns R²; None for a single row."""
    if len(rows) < 2:
        return None
    lanes = torch.tensor([row["lanes"] for row in rows], dtype=torch.float64)
    peaks = torch.tensor([row["peak_bytes"] for row in rows], dtype=torch.float64)
    x, y = lanes - lanes.mean(), peaks - peaks.mean()
    slope = (x * y).sum() / x.square().sum()
    total = y.square().sum()
    rest = (y - slope * x).square().sum()
    return {
        "bytes_per_lane": float(slope),
        "fixed_bytes": float(peaks.mean() - slope * lanes.mean()),
        "r_squared": float(1 - rest / total) if total > 0 else 1.0,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture is written next to it")
    parser.add_argument(
        "--cells", nargs="+", default=CELLS, metavar="CELL", help=f"what to measure (default: {' '.join(CELLS)})"
    )
    parser.add_argument("--lanes", nargs="+", type=int, default=LANES, help="ascending (default: 1 2 4 ... 1024)")
    parser.add_argument("--evaluations", type=int, default=8, help="per run, at least 4 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="limit per cell (default: %(default)s)")
    parser.add_argument("--total-seconds", type=float, default=300.0, help="limit for all cells (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(threads=given.threads)
        check_count(WARM_UP + 2, evaluations=given.evaluations)
        check_count(0, seed=given.seed)
        check_positive(seconds=given.seconds, total_seconds=given.total_seconds)
        for lanes in given.lanes:
            check_count(lanes=lanes)
        if list(given.lanes) != sorted(set(given.lanes)):
            raise ValueError(f"Expected `--lanes` in ascending order, but got {given.lanes}.")
        given.cells = [Cell.parse(text) for text in given.cells]
        given.device = find_device(given.device)
        check_file(given.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with threads(given.threads):
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    machine = describe_machine(given.device)
    print(f"{show_machine(machine)}: {len(given.cells)} cells", flush=True)
    began = time.monotonic()
    cells = []
    for index, cell in enumerate(given.cells):
        print(f"{index + 1} of {len(given.cells)}", flush=True)
        # Time that earlier cells did not use is shared by the remaining ones.
        end = time.monotonic() + (given.total_seconds - (time.monotonic() - began)) / (len(given.cells) - index)
        cells.append(over_lanes(cell, given, end))
    skipped = [entry for cell in cells for entry in cell.pop("skipped")]
    result: dict[str, Any] = {
        "machine": machine,
        "cells": cells,
        "skipped": skipped,
        "memory_is": "torch.cuda.max_memory_allocated" if given.device.type == "cuda" else "bytes of living tensors",
        "evaluations": given.evaluations,
        "seconds": given.seconds,
        "total_seconds": given.total_seconds,
        "seed": given.seed,
    }
    print(f"\n{'cell':22} {'ms, 1st':>9} {'ms, best':>9} {'ratio':>7} {'lanes':>6} {'MiB/lane':>9} {'R^2':>7}")
    for cell in cells:
        if cell["rows"]:
            best = min(cell["rows"], key=lambda row: row["seconds_per_victim_and_evaluation"])
            fit = cell["memory"]
            memory = "" if fit is None else f"{fit['bytes_per_lane'] / 2**20:>9.3f} {fit['r_squared']:>7.4f}"
            first = 1e3 * cell["rows"][0]["seconds_per_victim_and_evaluation"]
            print(
                f"{cell['cell']:22} {first:>9.3f} {1e3 * best['seconds_per_victim_and_evaluation']:>9.3f} "
                f"{best['ratio_to_first']:>7.2f} {best['lanes']:>6} {memory}"
            )
    for entry in skipped:
        print(f"skipped: {entry['cell']}, lanes {entry['lanes']}: {entry['reason']} ({entry['detail']})")
    curves: dict[str, dict[str, dict[float, float]]] = {"ms per victim and evaluation": {}, "peak memory in MiB": {}}
    for cell in cells:
        for heading, key, unit in zip(
            curves, ("seconds_per_victim_and_evaluation", "peak_bytes"), (1e-3, 2**20), strict=True
        ):
            values = {row["lanes"]: row[key] / unit for row in cell["rows"] if row[key] > 0}
            if values:
                curves[heading][cell["cell"]] = values
    if not all(curves.values()):
        raise SystemExit("throughput.py: error: Expected time and memory for at least one cell, but got none.")
    write_result(given.output, result, plot_over_lanes(curves, title=machine["gpu"] or machine["cpu"]))


if __name__ == "__main__":
    main()
