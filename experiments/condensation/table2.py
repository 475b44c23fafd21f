r"""Table 2 of Dataset Condensation: test accuracy of networks trained on a few condensed images, per data set.

    python experiments/condensation/table2.py --dataset fashion_mnist --images-per-class 1 --iterations 100 \
        --method dc random --output results/fashion_mnist_1
    python experiments/condensation/table2.py --dataset fashion_mnist --images-per-class 1 --method fast \
        --output results/fashion_mnist_1_fast

Methods: `dc` (gradient matching with the paper's protocol, https://arxiv.org/abs/2006.05929), `dsa` (the same with
siamese augmentation, https://arxiv.org/abs/2102.08259), `fast` (this library's protocol), `random` (as many random real
images) and `full` (the whole training set, for `--full-epochs`). The papers' figures, after 1,000 iterations, stand
beside ours in the table that is printed; `fast` is compared with that of `dc`. As in the paper, networks on MNIST are
trained with random shifts, scales and rotations; `--no-augment-test` leaves them out.

A run that was stopped, in whatever way, goes on with the same command and `--resume`, and ends with the results that it
would have had. Without `--resume` a folder that holds results is refused, so that none are lost by mistake.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from condensing import FILES, METHODS, MOMENTS, condense, format_table  # beside this script

from leakage.cli import quiet
from leakage.condensation import SiameseAugmentation
from leakage.datamodules import LABELLED_DATASETS, LabelledImages
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
    """The papers' test accuracies from 0 to 1 by method, where they have one."""
    found = {}
    for method, table in (("dc", _DC), ("dsa", _DSA), ("fast", _DC)):
        for count, accuracy in zip(_COUNTS, table.get(dataset, ()), strict=False):
            if count == images_per_class:
                found[method] = accuracy / 100
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        data = LabelledImages(given.dataset, root=given.root, image_size=given.image_size, seed=given.seed)
        check_output(given.output)
        if not given.resume and holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to go on "
                "with them, or choose another folder."
            )
        data.prepare_data()
        data.setup("fit")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    methods = list(dict.fromkeys(given.method))
    augments = given.dataset == "mnist" if given.augment_test is None else given.augment_test
    print(f"{'/'.join(methods)} on {data.name}, {given.images_per_class} per class:", flush=True)
    try:
        rows = condense(
            methods,
            data,
            given.output,
            images_per_class=given.images_per_class,
            loops=None if given.loops is None else tuple(given.loops),
            iterations=given.iterations,
            networks=given.networks,
            moments=given.moments,
            epochs=given.epochs,
            augmentation=SiameseAugmentation.mnist_evaluation() if augments else None,
            full_epochs=given.full_epochs,
            cache=given.cache,
            published=published(given.dataset, given.images_per_class),
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
    parser.add_argument("--images-per-class", type=int, default=1, help="of the sets (default: %(default)s)")
    parser.add_argument("--method", nargs="+", choices=tuple(METHODS), default=["dc"], help="default: dc")
    parser.add_argument(
        "--loops",
        nargs=2,
        type=int,
        metavar=("OUTER", "INNER"),
        help="of dc and dsa (default: the paper's for 1, 10, 20 ... 50 images)",
    )
    parser.add_argument(
        "--iterations", type=int, help="networks to condense on, with every method (default: each protocol's)"
    )
    parser.add_argument("--networks", type=int, default=10, help="trained on a set to test it (default: %(default)s)")
    parser.add_argument(
        "--moments",
        nargs="*",
        type=int,
        default=list(MOMENTS),
        help="iterations after which the images are tested, besides the last (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, help="of the networks in the test (default: 300, augmented 1000)")
    parser.add_argument("--full-epochs", type=int, default=5, help="of the method full (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder that keeps results on whole training sets (default: none)")
    parser.add_argument(
        "--augment-test",
        action=argparse.BooleanOptionalAction,
        help="train the networks in the test with the paper's augmentation for MNIST (default: with mnist only)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of images, networks and starts (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="where the data sets lie (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument(
        "--precision",
        choices=("32-true", "64-true", "bf16-mixed"),
        default="32-true",
        help="of the condensation (default: %(default)s)",
    )
    parser.add_argument("--accelerator", default="auto", help="as for Lightning's Trainer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
