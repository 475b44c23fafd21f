"""Compare the seconds per iteration of a condensation by this library and a plain eager loop.

    python experiments/benchmarks/condensation_speed.py --output condensation_speed.json
    python experiments/benchmarks/condensation_speed.py --iterations 5 --threads 1 --output one_thread.json

The plain side implements the same algorithm with ordinary autograd: torch's own layers, the real images of a class as
one batch, a double backward per class, `torch.optim.SGD`. The other side is `GradientMatchingCondensation` with its
published protocol in `Trainer.fit`, from one batch to the next. Both get the same networks, real images and start, so
the synthetic images must agree; otherwise the script ends with exit code 1. Without `--dataset` the images are from
FashionMNIST, or from the bundled sample if FashionMNIST is not found.

Each side is a separate process with the same number of threads. They take turns, one iteration each, so that other
work on the machine affects both equally. Times are medians over the iterations after one warm-up iteration. Memory is
the peak of each process and its value before the first iteration; on a GPU, the peak of what torch allocated there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.cli import quiet
from leakage.condensation import GradientMatchingCondensation
from leakage.condensation.protocols import schedule
from leakage.datamodules import LABELLED_DATASETS, LabelledImages
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.models import ConvNet, draw_state
from leakage.seeds import derive_seed

SIDES = ("plain", "leakage")
PARTS = ("real", "synthetic", "network")
# The published protocol.
LEARNING_RATE, MOMENTUM, NETWORK_LEARNING_RATE, NETWORK_BATCH_SIZE = 0.1, 0.5, 0.01, 256
WARM_UP = 1
# Root mean square difference of the images. Steps agree to 1e-6 until a unit within rounding of zero is active on one
# side only: such a step differs by 1e-3, as plain float32 does from float64. Another algorithm would differ by 0.1.
TOLERANCE = 1e-3

Turn = Callable[[Mapping[str, float]], None]


def plain_network(channels: int, height: int, breadth: int, num_classes: int, width: int) -> nn.Module:
    """Build the paper's ConvNet from torch's own layers, with the parameter names of the library's."""
    padding = (3 if height == 28 else 1, 3 if breadth == 28 else 1)
    left = [(32 if side == 28 else side) // 8 for side in (height, breadth)]
    layers: list[nn.Module] = []
    for block in range(3):
        convolution = nn.Conv2d(width if block else channels, width, 3, padding=1 if block else padding)
        layers += [convolution, nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    classifier = nn.Linear(width * left[0] * left[1], num_classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), flat=nn.Flatten(), classifier=classifier))


def distance(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Compute the row-wise cosine distance, layer by layer."""
    total = torch.zeros((), device=targets[0].device)
    for found, wanted in zip(gradients, targets, strict=True):
        found, wanted = found.flatten(1), wanted.flatten(1)
        total = total + (1 - (found * wanted).sum(1) / (found.norm(dim=1) * wanted.norm(dim=1) + 1e-6)).sum()
    return total


def run_plainly(data: LabelledImages, options: argparse.Namespace, turn: Turn) -> Tensor:
    """Run the plain loop; returns the normalised images ``(M, C, H, W)``. Each iteration waits for its ``turn``."""
    device, count, seed = torch.device(options.accelerator), options.images_per_class, options.seed
    outer, inner = schedule(count, None)
    classes = range(data.num_classes)
    network = plain_network(*data.image_shape, data.num_classes, options.width).to(device)
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    drawn = ConvNet(data.image_shape[0], data.image_shape[1:], data.num_classes, width=options.width)
    images = start(data, options).to(device).requires_grad_()
    labels = torch.arange(len(classes), device=device).repeat_interleave(count)
    optimizer = torch.optim.SGD([images], lr=LEARNING_RATE, momentum=MOMENTUM)
    seconds = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def clock(part: str) -> Iterator[None]:
        _wait(device)
        begun = time.perf_counter()
        yield
        _wait(device)
        seconds[part] += time.perf_counter() - begun

    for step in range((WARM_UP + options.iterations) * outer):
        if step % outer == 0:
            turn(seconds)
            network.load_state_dict(draw_state(drawn, derive_seed(seed, step // outer, "network")))
        batch = data.class_batch(step)
        images.grad = torch.zeros_like(images)
        for label in classes:
            with clock("real"):
                real = data.normalise(batch.images[batch.labels == label].to(device))
                loss = F.cross_entropy(network(real), torch.full((len(real),), label, device=device))
                targets = torch.autograd.grad(loss, weights)
            with clock("synthetic"):
                own = slice(label * count, (label + 1) * count)
                loss = F.cross_entropy(network(images[own]), labels[own])
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                images.grad += torch.autograd.grad(distance(gradients, targets), images)[0]
        with clock("synthetic"):
            optimizer.step()
        if (step + 1) % outer:
            with clock("network"):
                order = torch.Generator().manual_seed(derive_seed(seed, step + 1, "training"))
                train(network, images.detach(), labels, inner, order)
    turn(seconds)
    return images.detach().cpu()


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, order: torch.Generator) -> None:
    """Train the network on the synthetic images."""
    optimizer = torch.optim.SGD(network.parameters(), lr=NETWORK_LEARNING_RATE)
    for _ in range(epochs):
        shuffled = len(images) > NETWORK_BATCH_SIZE
        indices = torch.randperm(len(images), generator=order) if shuffled else torch.arange(len(images))
        for chosen in indices.to(images.device).split(NETWORK_BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()


class TakeTurns(Callback):
    """Make each iteration wait for its turn; Lightning's work between two iterations counts for the first."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the previous turn and wait for the next, if an iteration begins."""
        if batch_idx % pl_module.outer == 0:
            self.turn(pl_module.seconds)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last turn."""
        self.turn(pl_module.seconds)


def run_ours(data: LabelledImages, options: argparse.Namespace, turn: Turn) -> Tensor:
    """Run the library; returns the normalised images ``(M, C, H, W)``. Each iteration waits for its ``turn``."""
    network = ConvNet(data.image_shape[0], data.image_shape[1:], data.num_classes, width=options.width)
    condensation = GradientMatchingCondensation(
        options.images_per_class, network=network, iterations=WARM_UP + options.iterations, seed=options.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=1,
            precision=options.precision,
            max_epochs=1,
            callbacks=[TakeTurns(turn)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(condensation, datamodule=data)
    return condensation.synthetic_images.detach().cpu().float()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    if given.side is not None:
        options = argparse.Namespace(**json.loads(given.side))
        # Only the answers go to the parent; all other output goes to the terminal.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        torch.set_num_threads(options.threads)
        # Otherwise a GPU rounds to ten bits in convolutions, and the sides can't be compared.
        torch.backends.cudnn.allow_tf32 = False
        _be_a_side(options, sys.stdin, answers)
        return
    try:
        check_count(iterations=given.iterations, batch_size=given.batch_size, width=given.width, threads=given.threads)
        check_count(0, seed=given.seed)
        check_count(images_per_class=given.images_per_class)
        schedule(given.images_per_class, None)
        if given.output.is_dir():
            raise IsADirectoryError(f"Expected `--output` to be a file, but got the folder '{given.output}'.")
        check_output(given.output.parent)
        if given.accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("Expected `--accelerator` to be cpu, since torch finds no GPU, but got cuda.")
        given.dataset = _find_data(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    _measure(given)


def _measure(given: argparse.Namespace) -> None:
    total = WARM_UP + given.iterations
    print(
        f"{given.dataset}, {given.images_per_class} per class, {given.threads} threads: {WARM_UP} warm-up iteration "
        f"and {given.iterations} more, taking turns",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name, given, Path(folder))) for name in SIDES}
        before = {name: side.hear()["memory"] for name, side in sides.items()}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for iteration in range(total):
            for name, side in sides.items():
                turns[name].append(side.iterate())
                seconds = turns[name][-1]["seconds"]
                print(f"  {iteration + 1} of {total}, {name}: {seconds:.2f} s", flush=True)
        peak = {name: side.hear()["memory"] for name, side in sides.items()}
        images = {name: load_file(side.file) for name, side in sides.items()}
    result = _summarise(given, turns, images) | {"peak_memory_mib": peak, "memory_before_mib": before}
    write_json(given.output, result)
    _show(result, given.output)
    if given.precision == "32-true" and not result["relative_difference"] <= TOLERANCE:
        sys.exit(
            f"condensation_speed.py: error: Expected synthetic images that agree to {TOLERANCE:g}, but got a "
            f"relative difference of {result['relative_difference']:.1e}."
        )


def _summarise(
    given: argparse.Namespace, turns: dict[str, list[dict[str, Any]]], images: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    timed = {name: turns[name][WARM_UP:] for name in SIDES}
    seconds = {name: statistics.median(turn["seconds"] for turn in timed[name]) for name in SIDES}
    parts = {}
    for name in SIDES:
        spent = {part: (turns[name][-1][part] - turns[name][WARM_UP - 1][part]) / len(timed[name]) for part in PARTS}
        mean = statistics.fmean(turn["seconds"] for turn in timed[name])
        parts[name] = spent | {"other": mean - sum(spent.values())}
    plain, ours, start = images["plain"]["images"], images["leakage"]["images"], images["plain"]["start"]
    apart = (ours - plain).abs()
    return {
        "ratio": seconds["plain"] / seconds["leakage"],
        "dataset": given.dataset,
        "images_per_class": given.images_per_class,
        "batch_size": given.batch_size,
        "seconds_per_iteration": seconds,
        "seconds_of_iterations": {name: [turn["seconds"] for turn in timed[name]] for name in SIDES},
        "mean_seconds_by_part": parts,
        "max_abs_difference": float(apart.max()),
        "relative_difference": float(apart.norm() / plain.norm()),
        "relative_difference_of_change": float(apart.norm() / (plain - start).norm()),
        "tolerance": TOLERANCE,
        "iterations": given.iterations,
        "warm_up": WARM_UP,
        "threads": given.threads,
        "precision": {"plain": "32-true", "leakage": given.precision},
        "accelerator": given.accelerator,
        "width": given.width,
        "seed": given.seed,
        "torch": torch.__version__,
    }


def _show(result: dict[str, Any], output: Path) -> None:
    print(f"\n{'':8} {'s / iteration':>13} {'real':>8} {'synthetic':>9} {'network':>8} {'other':>8} {'memory':>10}")
    for name in SIDES:
        parts, peak = result["mean_seconds_by_part"][name], result["peak_memory_mib"][name]
        columns = f"{parts['real']:>8.3f} {parts['synthetic']:>9.3f} {parts['network']:>8.3f} {parts['other']:>8.3f}"
        memory = "-" if peak is None else f"{peak:.0f} MiB"
        print(f"{name:8} {result['seconds_per_iteration'][name]:>13.3f} {columns} {memory:>10}")
    apart, changed = result["relative_difference"], result["relative_difference_of_change"]
    print(f"\n{result['ratio']:.2f} times faster; the images differ by {apart:.1e}, {changed:.1e} of their change")
    print(output)


class Side:
    """One side in a separate process, which does one iteration at a time on demand."""

    def __init__(self, name: str, given: argparse.Namespace, folder: Path) -> None:
        self.name, self.file = name, folder / f"{name}.safetensors"
        options = json.dumps({**vars(given), "side": name, "output": self.file}, default=str)
        command = [sys.executable, str(Path(__file__).resolve()), "--output", str(self.file), "--side", options]
        # Use the packages of this process, wherever they are.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()

    def iterate(self) -> dict[str, Any]:
        """Run one iteration; returns how long it took."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Read the next message of the process; the script ends if there is none."""
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            sys.exit(f"condensation_speed.py: error: the {self.name} side ended with exit code {self.process.wait()}.")
        said: dict[str, Any] = json.loads(line)
        return said


def _be_a_side(options: argparse.Namespace, commands: IO[str], answers: IO[str]) -> None:
    """Run an iteration for each line of ``commands``, and write the images at the end."""

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    device = torch.device(options.accelerator)
    data = _data(options)
    data.setup("fit")
    begun: list[float] = []

    def turn(seconds: Mapping[str, float]) -> None:
        _wait(device)
        if begun:
            say(seconds=time.perf_counter() - begun[-1], **{part: seconds[part] for part in PARTS})
        else:
            # Only now, so that neither side sets up during the other's turn.
            say(memory=_memory(device, "VmRSS"))
        if len(begun) < WARM_UP + options.iterations:
            if not commands.readline():
                raise EOFError("Expected a command from the parent process, but got none: it has ended.")
            begun.append(time.perf_counter())

    images = (run_plainly if options.side == "plain" else run_ours)(data, options, turn)
    save_file({"images": images, "start": start(data, options)}, options.output)
    say(memory=_memory(device, "VmHWM"))


def _wait(device: torch.device) -> None:
    # A GPU works asynchronously.
    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory(device: torch.device, entry: str) -> float | None:
    """Return MiB of this process: on a GPU torch's peak, else VmRSS (now) or VmHWM (peak); None outside Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    # Not `resource`: its maximum starts with that of the parent.
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{entry}:")]
    return found[0] if found else None


def start(data: LabelledImages, options: argparse.Namespace) -> Tensor:
    """Return the images from which the library starts, ``(M, C, H, W)``, normalised."""
    generator = torch.Generator().manual_seed(derive_seed(options.seed, 0, "start"))
    return torch.randn(data.num_classes * options.images_per_class, *data.image_shape, generator=generator)


def _data(given: argparse.Namespace) -> LabelledImages:
    options = {"batch_size": given.batch_size, "seed": given.seed}
    return LabelledImages(given.dataset, root=given.root, image_size=given.image_size, **options)


def _find_data(given: argparse.Namespace) -> str:
    """Return the name or folder of a data set that exists."""
    if given.dataset is None:
        try:
            LabelledImages("fashion_mnist", root=given.root, download=False).setup("fit")
        except FileNotFoundError:
            print("FashionMNIST was not found (see --root), so its bundled sample is used.", flush=True)
            given.root = None
            return "sample"
        return "fashion_mnist"
    data = _data(given)
    data.prepare_data()
    data.setup("fit")
    return str(given.dataset)


def _parser() -> argparse.ArgumentParser:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="condensation_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--dataset",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout "
        "(default: fashion_mnist)",
    )
    parser.add_argument("--images-per-class", type=int, default=1, help="synthetic images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="real images per class (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=3, help="number of timed iterations (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores, help="per side (default: all cores, %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("32-true", "bf16-mixed"),
        default="32-true",
        help="of the library; with bf16-mixed, differences are reported but not judged (default: %(default)s)",
    )
    parser.add_argument(
        "--accelerator", choices=("cpu", "cuda"), default="cpu", help="for both sides (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=128, help="channels of the ConvNet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # the side to run, with all options: for the script itself
    return parser


if __name__ == "__main__":
    main()
