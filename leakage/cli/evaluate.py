"""``leakage evaluate``: what a saved synthetic set is worth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from leakage.cli.refusals import one_line
from leakage.condensation import SiameseAugmentation, SyntheticSet
from leakage.condensation import evaluate as test
from leakage.datamodules import LABELLED_DATASETS, LabelledImages
from leakage.models import NETWORKS


def evaluate(arguments: Sequence[str]) -> None:
    """Train new networks on a saved synthetic set and test them on the real test images of its data set."""
    parser = argparse.ArgumentParser(prog="leakage evaluate", description=evaluate.__doc__)
    parser.add_argument("file", type=Path, help="a synthetic.safetensors")
    parser.add_argument(
        "--dataset",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout (default: the set's)",
    )
    parser.add_argument("--root", type=Path, help="where the data sets lie (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--network", choices=tuple(NETWORKS), default="convnet", help="default: %(default)s")
    parser.add_argument("--networks", type=int, default=10, help="how many are trained (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each (default: 300, or 1,000 with --augmentation)")
    parser.add_argument(
        "--augmentation", help="of their training: a strategy such as color_crop_cutout_flip_scale_rotate, or mnist"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the networks (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        synthetic = SyntheticSet.load(given.file)
        if not (given.dataset or synthetic.dataset):
            raise ValueError("Expected `--dataset` for a set that does not name its data set, but got none.")
        data = LabelledImages(given.dataset or synthetic.dataset, root=given.root, image_size=given.image_size)
        data.prepare_data()
        data.setup("fit")
        augmentation = None
        if given.augmentation == "mnist":
            augmentation = SiameseAugmentation.mnist_evaluation()
        elif given.augmentation is not None:
            augmentation = SiameseAugmentation(given.augmentation)
        found = test(
            synthetic,
            data,
            network=NETWORKS[given.network](data.image_shape[0], data.image_shape[1:], data.num_classes),
            networks=given.networks,
            epochs=given.epochs,
            augmentation=augmentation,
            seed=given.seed,
        )
    except (ValueError, OSError) as error:
        parser.error(one_line(str(error)))
    except FloatingPointError as error:
        sys.exit(f"leakage evaluate: error: {one_line(str(error))}")
    print(f"{given.file}: test accuracy on {data.name} {found}")
