r"""Table 2 of Dataset Condensation: test accuracy of networks trained on a few condensed images, per data set.

    python experiments/condensation/table2.py --dataset fashion_mnist --images-per-class 10 --method fast kmeans \
        --evaluation dc dsa --sets 3 --budget 15 --output results/fashion_mnist_10
    python experiments/condensation/table2.py --dataset data/cifar10 --benchmark cifar10 --images-per-class 1 \
        --method fast --sets 3 --output results/cifar10_1

Methods: `dc` (gradient matching with the paper's protocol, https://arxiv.org/abs/2006.05929), `dsa` (`dc` with siamese
augmentation, https://arxiv.org/abs/2102.08259), `dm` (distribution matching, as published, with that augmentation,
https://arxiv.org/abs/2110.04181), `fast` (this library's protocol), `random` and `kmeans` (the same number of real
images) and `full` (the whole training set, for `--full-epochs`). Evaluations: `dc`, as in the first paper (300 epochs
without augmentation, but on MNIST 1,000 with random shifts, scales and rotations), and `dsa`, as in the second (1,000
epochs with its augmentation). The table shows our figures next to those of these two papers, after 1,000 iterations,
for the same evaluation.

With several `--sets` the seeds are consecutive. The interval is Student's over the means of the sets, since networks
trained on the same set are not independent; for a single set it is over its networks, and holds for this set only.

A share of the training images (`--held-out`) is left out of condensation. During the run the sets are tested on these
images, never on test images. `--budget` times some iterations and a test, prints how many iterations fit into this many
minutes per set and how long everything should take, and runs that many; the schedule of a protocol ends with the last
iteration.

To continue a stopped run, repeat the command with `--resume`. The results are those of a run without a stop, since the
result of each network is saved as soon as it is known. With `--resume` you can also ask for more sets, networks and
evaluations; known results are kept. Without it, a folder that holds results is rejected, so that none are lost by
mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from condensation_rows import FILES, format_table  # in the folder of this script
from condensing import METHODS, condense

from leakage.cli import quiet
from leakage.condensation.training import EVALUATIONS, PRECISIONS
from leakage.datamodules import LABELLED_DATASETS, LabelledImages
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.files.whole import check_output

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import holds_results

# Test accuracy in % with 1, 10 and 50 images per class in table 2 of DC and table 1 of DSA.
_COUNTS = (1, 10, 50)
_DC = {
    "mnist": (91.7, 97.4, 98.8),
    "fashion_mnist": (70.5, 82.3, 83.6),
    "svhn": (31.2, 76.1, 82.3),
    "cifar10": (28.3, 44.9, 53.9),
    "cifar100": (12.8, 25.2),
}
_DSA = {
    "mnist": (88.7, 97.8, 99.2),
    "fashion_mnist": (70.6, 84.6, 88.7),
    "svhn": (27.5, 79.2, 84.4),
    "cifar10": (28.8, 52.1, 60.6),
    "cifar100": (13.9, 32.3),
}


def published(dataset: str, images_per_class: int) -> dict[str, float]:
    """Return the papers' test accuracies from 0 to 1 by evaluation, for the evaluations that have one."""
    found = {}
    for evaluation, table in (("dc", _DC), ("dsa", _DSA)):
        for count, accuracy in zip(_COUNTS, table.get(dataset, ()), strict=False):
            if count == images_per_class:
                found[evaluation] = accuracy / 100
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        data = LabelledImages(
            given.dataset,
            root=given.root,
            image_size=given.image_size,
            benchmark=given.benchmark,
            seed=given.seed,
        )
        check_output(given.output)
        if not given.resume and holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue its run, or choose another folder."
            )
        data.prepare_data()
        data.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    methods = list(dict.fromkeys(given.method))
    print(f"{'/'.join(methods)} on {data.name}, {given.images_per_class} per class:", flush=True)
    try:
        rows = condense(
            methods,
            data,
            given.output,
            images_per_class=given.images_per_class,
            sets=given.sets,
            evaluations=list(dict.fromkeys(given.evaluation)),
            loops=None if given.loops is None else tuple(given.loops),
            iterations=given.iterations,
            factor=given.factor,
            batch_size=given.batch_size,
            budget=given.budget,
            networks=given.networks,
            moments=given.moments,
            held_out=given.held_out or None,
            epochs=given.epochs,
            test_precision=given.test_precision,
            full_epochs=given.full_epochs,
            cache=given.cache,
            published=published(data.name, given.images_per_class),
            seed=given.seed,
            resume=given.resume,
            accelerator=given.accelerator,
            devices=1,
            precision=given.precision,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for name in FILES:
        if (given.output / name).is_file():
            print(given.output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="table2.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout, "
        "<folder>/<class>/<image>",
    )
    parser.add_argument(
        "--benchmark",
        choices=tuple(BENCHMARKS),
        help="the data set that a folder holds, to use its published figures and statistics",
    )
    parser.add_argument("--images-per-class", type=int, default=1, help="size of the sets (default: %(default)s)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["dc"], help="methods to run (default: dc)")
    parser.add_argument(
        "--sets", type=int, default=1, help="sets of each method, with consecutive seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluation", nargs="+", choices=EVALUATIONS, default=["dc"], help="evaluations of each set (default: dc)"
    )
    parser.add_argument(
        "--loops",
        nargs=2,
        type=int,
        metavar=("OUTER", "INNER"),
        help="loops of dc and dsa (default: those of the paper for 1, 10, 20 ... 50 images)",
    )
    parser.add_argument(
        "--iterations", type=int, help="iterations of every condensation (default: those of its protocol)"
    )
    parser.add_argument(
        "--factor",
        type=int,
        help="each image of a set holds FACTOR x FACTOR smaller ones (default: 2 for fast, 1 for others)",
    )
    parser.add_argument(
        "--batch-size", type=int, help="real images of each class matched at once (default: that of the protocol)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="time for the condensation of a set, instead of --iterations: run as many iterations as fit",
    )
    parser.add_argument(
        "--networks", type=int, default=10, help="networks trained on a set for each evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--moments",
        nargs="*",
        type=int,
        help="iterations after which the images are tested on held-out training images, besides the last (default: 0, "
        "10, 20, 50, ...; a few with --budget)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.02,
        help="share of the training images left out for such tests; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, help="epochs of the networks in the test (default: 300, or 1000 with augmentation)"
    )
    parser.add_argument("--full-epochs", type=int, default=5, help="epochs of the method full (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder that keeps results on whole training sets (default: none)")
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of images, networks and initial images (default: %(default)s)"
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument(
        "--precision",
        choices=("32-true", "64-true", "bf16-mixed"),
        default="32-true",
        help="precision of the condensation (default: %(default)s)",
    )
    parser.add_argument(
        "--test-precision",
        choices=PRECISIONS,
        default="32-true",
        help="precision of the networks in the test (default: %(default)s)",
    )
    parser.add_argument("--accelerator", default="auto", help="accelerator of the Trainer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
