"""Compare the time of evaluating R networks at once, stacked with `torch.func`, and one after another.

    python experiments/benchmarks/evaluation_speed.py --output evaluation.json
    python experiments/benchmarks/evaluation_speed.py --dataset fashion_mnist --images-per-class 10 --output F.json

Both sides are `leakage.condensation.evaluation.evaluate` on the same random real images, with the same networks,
threads and device; only `stacked` differs. They take turns, `--repeats` times after a short warm-up. The fastest
turn of each counts, with separate times for training and testing. The file also has the accuracies of both, which
agree to rounding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leakage.cli import quiet
from leakage.condensation.evaluation import Evaluation, evaluate
from leakage.condensation.synthetic_set import SyntheticSet, random_images
from leakage.datamodules import LABELLED_DATASETS, LabelledImages, LabelledTensors
from leakage.errors import check_count
from leakage.files.whole import check_output
from leakage.models import NETWORKS

SIDES = {"stacked": True, "sequential": False}
PARTS = ("training", "testing")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluation_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument(
        "--dataset",
        default="sample",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder in ImageFolder layout (default: %(default)s)",
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="convnet", help="(default: %(default)s)")
    parser.add_argument("--networks", type=int, default=10, help="R (default: %(default)s)")
    parser.add_argument("--images-per-class", type=int, default=1, help="for training (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="of training (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=500, help="maximum number (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(
            networks=given.networks, images_per_class=given.images_per_class, epochs=given.epochs,
            test_images=given.test_images, repeats=given.repeats, threads=given.threads,
        )  # fmt: skip
        check_count(0, seed=given.seed)
        if given.networks < 2:
            raise ValueError(f"Expected `--networks` to be at least 2, to stack them, but got {given.networks}.")
        if given.output.is_dir():
            raise IsADirectoryError(f"Expected `--output` to be a file, but got the folder '{given.output}'.")
        check_output(given.output.parent)
        given.device = _device(given.device)
        data = LabelledImages(given.dataset, root=given.root, image_size=given.image_size)
        data.prepare_data()
        data.setup("fit")
        data.test = LabelledTensors(data.test.images[: given.test_images], data.test.labels[: given.test_images])
        images = random_images(data, given.images_per_class, given.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        _measure(given, data.name, data, images)
    finally:
        torch.set_num_threads(threads_before)


def _device(name: str | None) -> str:
    found = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Expected `--device` to be cpu or a GPU that works, but got {found!r}: {error}") from error
    return found


def _measure(given: argparse.Namespace, dataset: str, data: LabelledImages, images: SyntheticSet) -> None:
    on_gpu = torch.device(given.device).type == "cuda"
    channels, height, width = data.image_shape
    with torch.random.fork_rng(devices=[]):
        network = NETWORKS[given.network](channels, (height, width), data.num_classes)

    def run(side: str, epochs: int) -> Evaluation:
        return evaluate(
            images, data, network=network, networks=given.networks, epochs=epochs, seed=given.seed,
            stacked=SIDES[side], device=given.device, progress=False,
        )  # fmt: skip

    turns: dict[str, list[Evaluation]] = {side: [] for side in SIDES}
    memory: dict[str, int] = {}
    for side in SIDES:
        run(side, 1)
    for turn in range(given.repeats):
        for side in SIDES:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(given.device)
            turns[side].append(run(side, given.epochs))
            if on_gpu:
                memory[side] = torch.cuda.max_memory_allocated(given.device)
            last = turns[side][-1]
            print(
                f"turn {turn + 1} of {given.repeats}, {side}: training {last.training_seconds:.2f} s, "
                f"testing {last.testing_seconds:.2f} s",
                flush=True,
            )
    seconds = {
        part: {side: min(getattr(done, f"{part}_seconds") for done in turns[side]) for side in SIDES} for part in PARTS
    }
    ratios = {part: seconds[part]["sequential"] / seconds[part]["stacked"] for part in PARTS}
    accuracies = {side: turns[side][0].accuracies for side in SIDES}
    result: dict[str, Any] = {
        "ratio": ratios,
        "seconds": seconds,
        "used_by_default": "stacked" if torch.device(given.device).type != "cpu" else "sequential",
        "accuracies": {side: accuracies[side].tolist() for side in SIDES},
        "greatest_difference_of_accuracy": float((accuracies["stacked"] - accuracies["sequential"]).abs().max()),
        "bytes_of_gpu_memory": memory or None,
        "dataset": dataset,
        "network": given.network,
        "networks": given.networks,
        "images": len(images),
        "epochs": given.epochs,
        "test_images": len(data.test),
        "repeats": given.repeats,
        "threads": given.threads,
        "device": torch.cuda.get_device_name(given.device) if on_gpu else given.device,
        "seed": given.seed,
        "torch": torch.__version__,
    }
    partial = given.output.with_name(given.output.name + ".partial")
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(given.output)
    print(f"\n{given.networks} networks {'stacked':>12} {'sequential':>12} {'ratio':>8}")
    for part in PARTS:
        print(
            f"{part:11} {seconds[part]['stacked']:>10.2f} s {seconds[part]['sequential']:>10.2f} s {ratios[part]:>8.2f}"
        )
    print(f"\n{given.output}")


if __name__ == "__main__":
    main()
