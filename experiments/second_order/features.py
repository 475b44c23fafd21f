r"""How exactly `separate_features` recovers the last layer's inputs for each image from the gradient of a batch.

    python experiments/second_order/features.py --dataset mnist --images 2 4 8 --labels random equal \
        --output features.json

Recovered features are paired one-to-one with the true features of the victim, at the least total squared error. An
image counts as found if the error of its features is below 1e-4 or 1e-2 of their length. The attacker knows the network
and the labels. The auditor computes the true features from the true images in double precision. Then one random label
of each victim is replaced by another class. The ratio of the residual with this label to the residual with the correct
labels measures how well wrong labels can be detected. With `--correct`, `correct_labels` looks for the wrong label.

Small untrained networks are drawn anew for each victim. Trained networks are shared, and were not trained on the
victims' images. Run times are those of `separate_features` with the correct labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reach_options import add_cells, check_given, make_cells  # in the folder of this script
from reach_victims import Cell, make_network, make_victims
from restoration_options import TRAINING_IMAGES  # in experiments/labels, which reach_victims has put on the path
from torch import Tensor

from leakage.cli import quiet
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form.features import check_separable, separate_features
from leakage.comparison import align
from leakage.datamodules import LABELLED_DATASETS, LabelledImages
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.labels import correct_labels
from leakage.labels.last_layer import last_layer
from leakage.metrics import ShareOverVictims, match, wilson_interval
from leakage.seeds import derive_seed

# A wrong label counts as detected if the residual grows by more than this factor.
DETECTED = 100.0
# Options of reach.py that this script fixes.
_FIXED: dict[str, Any] = {
    "noise": [0.0], "half": False, "infer_labels": False, "lanes": 64, "why": 0, "methods": [],
    "max_steps": None, "max_evaluations": None, "restarts": None, "learning_rate": None, "accelerator": "auto",
}  # fmt: skip


@dataclass
class FeaturesRow:
    """Results of one cell of the sweep.

    Attributes:
        victims: number of victims.
        own_weights: whether each victim has its own network.
        test_accuracy: test accuracy of a trained network, 0 to 1; None if untrained.
        below_1e4: share of the victims whose features all have an error below 1e-4 of their length.
        below_1e4_ci: 95 % Wilson interval of ``below_1e4``.
        below_1e3: share of the victims whose features all have an error below 1e-3 of their length.
        below_1e3_ci: 95 % Wilson interval of ``below_1e3``.
        images_below_1e3: share of all images whose features have an error below 1e-3 of their length.
        images_below_1e3_ci: its 95 % Wilson interval over the victims, which counts victims, not images.
        alone: share of all images that are the only ones of their class in their batch.
        below_1e2: share of the victims whose features all have an error below 1e-2 of their length.
        below_1e2_ci: 95 % Wilson interval of ``below_1e2``.
        error_median: median over victims of the error of their worst image.
        residual_median: median over victims of the residual of `SeparatedFeatures`.
        seconds_per_victim: mean run time per victim.
        wrong_ratio_min: minimum over victims of the ratio of the residual with a wrong label to that with the correct
            labels.
        wrong_ratio_median: median over victims of this ratio.
        wrong_detected: share of the victims whose wrong label is detected: with a ratio above 100.
        wrong_detected_ci: 95 % Wilson interval of ``wrong_detected``.
        corrected: share of the victims with a wrong label whose labels are all right after `correct_labels`; None if
            not measured.
        corrected_ci: 95 % Wilson interval of ``corrected``.
        corrected_seconds: mean run time of `correct_labels` per victim.
    """

    dataset: str
    network: str
    norm: str
    activation: str
    epochs: int
    labels: str
    images: int
    victims: int
    own_weights: bool
    test_accuracy: float | None
    below_1e4: float
    below_1e4_ci: tuple[float, float]
    below_1e3: float
    below_1e3_ci: tuple[float, float]
    images_below_1e3: float
    images_below_1e3_ci: tuple[float, float]
    alone: float
    below_1e2: float
    below_1e2_ci: tuple[float, float]
    error_median: float
    residual_median: float
    seconds_per_victim: float
    wrong_ratio_min: float
    wrong_ratio_median: float
    wrong_detected: float
    wrong_detected_ci: tuple[float, float]
    corrected: float | None = None
    corrected_ci: tuple[float, float] | None = None
    corrected_seconds: float | None = None


def true_features(shared: SharedGradient, victim: Victim, images: Tensor) -> Tensor:
    """Return the inputs of the last layer for the true images ``(V, N, C, H, W)``: ``(V, N, D)``, float64."""
    shared = shared.to(torch.float64)
    rows = []
    for row, own in enumerate(images):
        layer = last_layer(shared.select(torch.tensor([row])), victim)
        rows.append(layer.features(own)[0])
    return torch.stack(rows)


def feature_errors(found: Tensor, truth: Tensor) -> Tensor:
    r"""Return :math:`\lVert \hat h - h \rVert / \lVert h \rVert` of each image, ``(V, N)``, paired one-to-one.

    Args:
        found: recovered features ``(V, N, D)``, float64.
        truth: true features ``(V, N, D)``, float64.
    """
    # `match` clips errors to the range of pixels, so features are scaled to that range.
    size = truth.square().mean((1, 2), keepdim=True).sqrt()
    order = match(*((features / size)[:, :, None, None] for features in (found, truth)))
    paired = found.gather(1, order[..., None].expand_as(found))
    errors: Tensor = (paired - truth).norm(dim=2) / truth.norm(dim=2).clamp(min=torch.finfo(truth.dtype).tiny)
    return errors


def with_a_wrong_label(labels: Tensor, ids: Tensor, num_classes: int, seed: int) -> Tensor:
    """Return labels ``(V, N)`` with one label per victim replaced, drawn from the seed and the victim's id."""
    wrong = labels.clone()
    for row, victim in enumerate(ids.tolist()):
        generator = torch.Generator().manual_seed(derive_seed(seed, victim, "wrong label"))
        image = int(torch.randint(labels.shape[1], (), generator=generator))
        step = int(torch.randint(1, num_classes, (), generator=generator))
        wrong[row, image] = (labels[row, image] + step) % num_classes
    return wrong


def measure(cell: Cell, given: argparse.Namespace, data: LabelledImages) -> FeaturesRow:
    """Separate the features of all victims of a cell, and compare them with the true features."""
    network = make_network(cell, given, data)
    victims = make_victims(cell, given, data, network)
    victims.setup("fit")
    victim = victims.victim
    errors, right, wrong, alone, corrected, seconds, corrected_seconds = [], [], [], [], [], 0.0, 0.0
    for truth in victims.val_dataloader():  # in batches
        shared = victims.share(truth.ids.tolist())
        began = time.perf_counter()
        separated = separate_features(shared, victim, truth.labels, seed=given.seed)
        seconds += time.perf_counter() - began
        errors.append(feature_errors(separated.features, true_features(shared, victim, truth.images)))
        right.append(separated.residual)
        labels = with_a_wrong_label(truth.labels, truth.ids, victim.protocol.num_classes, given.seed)
        wrong.append(separate_features(shared, victim, labels, seed=given.seed).residual)
        alone.append((truth.labels[:, :, None] == truth.labels[:, None]).sum(2) == 1)
        if given.correct:
            began = time.perf_counter()
            found = correct_labels(shared, victim, labels, seed=given.seed)
            corrected_seconds += time.perf_counter() - began
            corrected.append((found.labels.sort(1).values == truth.labels.sort(1).values).all(1))
    small = torch.cat(errors) < 1e-3
    worst, residual = torch.cat(errors).amax(1), torch.cat(right)
    ratio = torch.cat(wrong) / residual.clamp(min=torch.finfo(residual.dtype).tiny)
    shares: dict[str, Any] = {}
    measured = {"below_1e4": worst < 1e-4, "below_1e3": worst < 1e-3, "below_1e2": worst < 1e-2}
    measured |= {"wrong_detected": ratio > DETECTED, **({"corrected": torch.cat(corrected)} if corrected else {})}
    for name, holds in measured.items():
        share = float(holds.double().mean())
        shares |= {name: share, f"{name}_ci": wilson_interval(share, len(holds))}
    images = ShareOverVictims()(small.double().mean(1))
    columns = ("dataset", "network", "norm", "activation", "epochs", "labels", "images")
    return FeaturesRow(
        **{name: getattr(cell, name) for name in columns},
        victims=len(worst),
        own_weights=network.own,
        test_accuracy=network.accuracy,
        images_below_1e3=images.value,
        images_below_1e3_ci=(images.low, images.high),
        alone=float(torch.cat(alone).double().mean()),
        corrected_seconds=corrected_seconds / len(worst) if corrected else None,
        error_median=float(worst.quantile(0.5)),
        residual_median=float(residual.quantile(0.5)),
        seconds_per_victim=seconds / len(worst),
        wrong_ratio_min=float(ratio.min()),
        wrong_ratio_median=float(ratio.quantile(0.5)),
        **shares,
    )


def check_cell(cell: Cell, given: argparse.Namespace, data: LabelledImages) -> None:
    """Raise a ``ValueError`` if the network does not exist, or images are too few or too many to separate."""
    network = make_network(dataclasses.replace(cell, epochs=0), given, data)
    if cell.epochs:  # without the images it will be trained on
        network.images = network.images[min(TRAINING_IMAGES, len(network.images) // 2) :]
    victims = make_victims(cell, given, data, network)
    victims.setup("fit")
    check_separable(victims.victim)


def format_table(rows: Sequence[FeaturesRow]) -> str:
    """Format the rows as a table for the terminal, with 95 % intervals of shares."""

    def percent(share: float, ends: tuple[float, float]) -> str:
        return f"{100 * share:.0f} % [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"

    names = ["dataset", "network", "activation", "epochs", "labels"]
    several = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    header = [
        *several,
        "images",
        "victims",
        "all < 1e-4",
        "all < 1e-3",
        "images < 1e-3",
        "all < 1e-2",
        "median error",
        "median residual",
        "s/victim",
    ]
    lines = [[*header, "wrong label: min", "median", f"> {DETECTED:g} x", "corrected", "s/victim"]]
    for row in rows:
        line = [str(getattr(row, name)) for name in (*several, "images", "victims")]
        line += [percent(row.below_1e4, row.below_1e4_ci), percent(row.below_1e3, row.below_1e3_ci)]
        line += [percent(row.images_below_1e3, row.images_below_1e3_ci), percent(row.below_1e2, row.below_1e2_ci)]
        line += [f"{row.error_median:.1e}", f"{row.residual_median:.1e}", f"{row.seconds_per_victim:.3f}"]
        line += [f"{row.wrong_ratio_min:.1e}", f"{row.wrong_ratio_median:.1e}"]
        line.append(percent(row.wrong_detected, row.wrong_detected_ci))
        if row.corrected is None or row.corrected_ci is None:
            lines.append([*line, "", ""])
        else:
            lines.append([*line, percent(row.corrected, row.corrected_ci), f"{row.corrected_seconds:.2f}"])
    return align(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="features.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout",
    )
    add_cells(parser, images=2)
    add("--correct", action="store_true", help="also measure how often a wrong label is replaced by the right one")
    add("--victims", type=int, default=32, help="victims per cell (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of victims, networks, starts and wrong labels (default: %(default)s)")
    add("--output", type=Path, required=True, help="JSON file")
    add("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(**_FIXED)
    return parser


def prepare(given: argparse.Namespace) -> tuple[list[Cell], LabelledImages]:
    """Check all options, and return the cells and the images.

    Raises:
        ValueError: if options contradict one another or do not fit the data.
        OSError: if the output file exists or cannot be written.
    """
    check_given(given)
    if given.output.is_dir():
        raise IsADirectoryError(f"Expected `--output` to be a file, but got the folder '{given.output}'.")
    if given.output.exists() and not given.force:
        raise FileExistsError(
            f"Expected `--output` to be a new file, but got '{given.output}', which exists. Add --force to replace "
            "it, or choose another file."
        )
    data = LabelledImages(given.dataset, root=given.root, image_size=given.image_size, seed=given.seed)
    check_output(given.output.parent)
    data.prepare_data()
    data.setup("fit")
    cells = make_cells(given, [data.name])
    for cell in cells:
        check_cell(cell, given, data)
    return cells, data


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        cells, data = prepare(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows: list[FeaturesRow] = []
    result = {"seed": given.seed, "init": given.init, "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        for number, cell in enumerate(cells):
            print(f"{number + 1} of {len(cells)}: {given.victims} victims, {cell}", flush=True)
            rows.append(measure(cell, given, data))
            write_json(given.output, {**result, "rows": [asdict(row) for row in rows]})
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n\n{given.output}")


if __name__ == "__main__":
    main()
