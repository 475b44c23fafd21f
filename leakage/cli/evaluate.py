"""``leakage evaluate``: the test accuracy of networks trained on a saved synthetic set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from leakage.cli.refusals import one_line
from leakage.condensation import Evaluation, Score, SyntheticSet
from leakage.condensation import evaluate as test
from leakage.condensation.training import EVALUATIONS, PRECISIONS
from leakage.datamodules import DATASETS, LABELLED_DATASETS, LabelledImages
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.models import NETWORKS

# The options of an evaluation that the set has no record of.
_DEFAULTS = {"network": "convnet", "networks": 10, "epochs": None, "seed": 0, "precision": "32-true"}


def evaluate(arguments: Sequence[str]) -> None:
    """Train new networks on a saved synthetic set and test them on the real test images of its data set.

    If the set has a record of its score, the evaluation is repeated with the recorded options and compared.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        synthetic = SyntheticSet.load(given.file)
        data = _data(given, synthetic)
        synthetic.check_name(data)
        data.prepare_data()
        data.setup("fit")
        for name in dict.fromkeys(given.evaluation):
            _run(name, given, synthetic, data)
    except (ValueError, OSError) as error:
        parser.error(one_line(str(error)))
    except FloatingPointError as error:
        sys.exit(f"leakage evaluate: error: {one_line(str(error))}")


def _run(name: str, given: argparse.Namespace, synthetic: SyntheticSet, data: LabelledImages) -> None:
    score = synthetic.recipe.score(name) if synthetic.recipe is not None else None
    recorded = {} if score is None else {**score.options, "network": score.network, "networks": len(score.accuracies)}
    asked = {option: getattr(given, option) for option in _DEFAULTS}
    options: dict[str, Any] = {
        option: value if value is not None else recorded.get(option, _DEFAULTS[option])
        for option, value in asked.items()
    }
    network = NETWORKS[options.pop("network")](data.image_shape[0], data.image_shape[1:], data.num_classes)
    found = test(synthetic, data, network=network, augmentation=name, **options)
    print(f"{given.file}: test accuracy on {data.name}, evaluation {name}: {found}")
    if score is not None:
        same = all(asked[option] in (None, recorded[option]) for option in _DEFAULTS if option != "networks")
        verdict = _compare(found.accuracies, score) if same else "with other options"
        print(f"recorded: {Evaluation(score.accuracies)}, {verdict}")  # type: ignore[arg-type]


def _compare(accuracies: Tensor, score: Score) -> str:
    """Compare the accuracies of networks trained in the same way with the recorded ones, in words."""
    pairs = list(zip(accuracies.tolist(), score.accuracies, strict=False))
    furthest = max(abs(one - other) for one, other in pairs)
    count = f"{len(pairs)} network{'s' * (len(pairs) > 1)}"
    return f"the same for {count}" if furthest == 0 else f"{count} differ by up to {100 * furthest:.2f} %"


def _data(given: argparse.Namespace, synthetic: SyntheticSet) -> LabelledImages:
    if not (given.dataset or synthetic.dataset):
        raise ValueError("Expected `--dataset` for a set that does not name its data set, but got none.")
    dataset = given.dataset or synthetic.dataset
    # A folder may contain a benchmark that the set knows by name.
    benchmark = synthetic.dataset if synthetic.dataset in BENCHMARKS and dataset not in DATASETS else None
    return LabelledImages(dataset, root=given.root, image_size=given.image_size, benchmark=benchmark)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="leakage evaluate", description=evaluate.__doc__)
    parser.add_argument("file", type=Path, help="a synthetic.safetensors file")
    parser.add_argument(
        "--dataset",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout (default: the set's)",
    )
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        choices=EVALUATIONS,
        default=["dc"],
        help="that of Dataset Condensation (dc), or with siamese augmentation (dsa) (default: dc)",
    )
    recorded = "default: as recorded, else {}".format
    parser.add_argument("--network", choices=tuple(NETWORKS), help=recorded("convnet"))
    parser.add_argument("--networks", type=int, help=f"number of networks to train ({recorded(10)})")
    parser.add_argument("--epochs", type=int, help=f"training epochs ({recorded('300, or 1,000 with augmentation')})")
    parser.add_argument("--precision", choices=PRECISIONS, help=f"precision of the training ({recorded('32-true')})")
    parser.add_argument("--seed", type=int, help=f"seed of the networks ({recorded(0)})")
    return parser
