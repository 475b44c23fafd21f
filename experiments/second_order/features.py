r"""How exactly the gradient of a batch gives the last layer's inputs of each of its images, by `separate_features`.

    python experiments/second_order/features.py --dataset mnist --images 2 4 8 --labels random equal \
        --output features.json

An image is found if its features, paired one-to-one with the true ones of its victim at the least total squared error,
are wrong by less than 1e-4 or 1e-2 of their length. The attacker knows the network and the labels. The true features
are the auditor's, from the true images in double precision. Then one label of each victim is replaced by another, at
random: the ratio of the residual with it to the one with the right labels says how well wrong labels can be told.

Untrained networks are drawn anew for each victim, where they are small, and trained ones are shared and hold none of
the victims' images. Seconds are those of `separate_features` with the right labels.
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
from reach_options import check_given, make_cells  # these two lie beside this script
from reach_victims import WRITTEN, Cell, make_network, make_victims
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
from leakage.labels.last_layer import last_layer
from leakage.metrics import match, wilson_interval
from leakage.models.layers import ACTIVATIONS
from leakage.seeds import derive_seed

# Wrong labels are told for sure where the residual grows by more than this.
TOLD = 100.0
# What reach.py can be asked for, and this script can't.
_FIXED: dict[str, Any] = {
    "norm": None, "noise": [0.0], "half": False, "infer_labels": False, "lanes": 64, "why": 0, "methods": [],
    "max_steps": None, "max_evaluations": None, "restarts": None, "train_images": None, "learning_rate": None,
    "accelerator": "auto",
}  # fmt: skip


@dataclass
class FeaturesRow:
    """One cell of the sweep.

    Attributes:
        victims: V.
        own_weights: whether each drew a network of its own.
        test_accuracy: of a trained network, 0 to 1; None untrained.
        below_1e4: share of victims of whom all images have features wrong by less than 1e-4 of their length.
        below_1e4_ci: its 95 % Wilson interval over victims, as all others.
        below_1e2: see ``below_1e4``.
        below_1e2_ci: see there.
        error_median: over victims, of their worst image.
        residual_median: of `SeparatedFeatures`, over victims.
        seconds_per_victim: mean.
        wrong_ratio_min: over victims, residual with a wrong label over that with the right ones.
        wrong_ratio_median: see there.
        wrong_told: share of victims where that is above 100.
        wrong_told_ci: see there.
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
    below_1e2: float
    below_1e2_ci: tuple[float, float]
    error_median: float
    residual_median: float
    seconds_per_victim: float
    wrong_ratio_min: float
    wrong_ratio_median: float
    wrong_told: float
    wrong_told_ci: tuple[float, float]


def true_features(shared: SharedGradient, victim: Victim, images: Tensor) -> Tensor:
    """``(V, N, D)`` in float64, the inputs of the last layer for the true images ``(V, N, C, H, W)``."""
    shared = shared.to(torch.float64)
    rows = []
    for row, own in enumerate(images):
        layer = last_layer(shared.select(torch.tensor([row])), victim)
        rows.append(layer.features(own)[0])
    return torch.stack(rows)


def feature_errors(found: Tensor, truth: Tensor) -> Tensor:
    r"""``(V, N)``, :math:`\lVert \hat h - h \rVert / \lVert h \rVert` of each image, paired one-to-one.

    Args:
        found: ``(V, N, D)``.
        truth: ``(V, N, D)``, likewise in float64.
    """
    # `match` limits errors to those that pixels have, so features are made as large.
    size = truth.square().mean((1, 2), keepdim=True).sqrt()
    order = match(*((features / size)[:, :, None, None] for features in (found, truth)))
    paired = found.gather(1, order[..., None].expand_as(found))
    errors: Tensor = (paired - truth).norm(dim=2) / truth.norm(dim=2).clamp(min=torch.finfo(truth.dtype).tiny)
    return errors


def with_a_wrong_label(labels: Tensor, ids: Tensor, num_classes: int, seed: int) -> Tensor:
    """``(V, N)``: one label of each victim replaced by another class, drawn from the seed and the victim's number."""
    wrong = labels.clone()
    for row, victim in enumerate(ids.tolist()):
        generator = torch.Generator().manual_seed(derive_seed(seed, victim, "wrong label"))
        image = int(torch.randint(labels.shape[1], (), generator=generator))
        step = int(torch.randint(1, num_classes, (), generator=generator))
        wrong[row, image] = (labels[row, image] + step) % num_classes
    return wrong


def measure(cell: Cell, given: argparse.Namespace, data: LabelledImages) -> FeaturesRow:
    """Separate the features of all victims of a cell, and compare them with the truth."""
    network = make_network(cell, given, data)
    victims = make_victims(cell, given, data, network)
    victims.setup("fit")
    victim = victims.victim
    errors, right, wrong, seconds = [], [], [], 0.0
    for truth in victims.val_dataloader():  # in parts
        shared = victims.share(truth.ids.tolist())
        began = time.perf_counter()
        separated = separate_features(shared, victim, truth.labels, seed=given.seed)
        seconds += time.perf_counter() - began
        errors.append(feature_errors(separated.features, true_features(shared, victim, truth.images)))
        right.append(separated.residual)
        labels = with_a_wrong_label(truth.labels, truth.ids, victim.protocol.num_classes, given.seed)
        wrong.append(separate_features(shared, victim, labels, seed=given.seed).residual)
    worst, residual = torch.cat(errors).amax(1), torch.cat(right)
    ratio = torch.cat(wrong) / residual.clamp(min=torch.finfo(residual.dtype).tiny)
    shares: dict[str, Any] = {}
    for name, holds in (("below_1e4", worst < 1e-4), ("below_1e2", worst < 1e-2), ("wrong_told", ratio > TOLD)):
        share = float(holds.double().mean())
        shares |= {name: share, f"{name}_ci": wilson_interval(share, len(holds))}
    columns = ("dataset", "network", "norm", "activation", "epochs", "labels", "images")
    return FeaturesRow(
        **{name: getattr(cell, name) for name in columns},
        victims=len(worst),
        own_weights=network.own,
        test_accuracy=network.accuracy,
        error_median=float(worst.quantile(0.5)),
        residual_median=float(residual.quantile(0.5)),
        seconds_per_victim=seconds / len(worst),
        wrong_ratio_min=float(ratio.min()),
        wrong_ratio_median=float(ratio.quantile(0.5)),
        **shares,
    )


def check_cell(cell: Cell, given: argparse.Namespace, data: LabelledImages) -> None:
    """Raise a ``ValueError`` if there is no such network, too few images, or more than can be told apart."""
    network = make_network(dataclasses.replace(cell, epochs=0), given, data)
    if cell.epochs:  # which it then is trained on
        network.images = network.images[min(TRAINING_IMAGES, len(network.images) // 2) :]
    victims = make_victims(cell, given, data, network)
    victims.setup("fit")
    check_separable(victims.victim)


def format_table(rows: Sequence[FeaturesRow]) -> str:
    """The rows as a table for the terminal, shares with their 95 % intervals."""

    def percent(share: float, ends: tuple[float, float]) -> str:
        return f"{100 * share:.0f} % [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"

    told = ["dataset", "network", "activation", "epochs", "labels"]
    several = [name for name in told if len({getattr(row, name) for row in rows}) > 1]
    header = [*several, "images", "victims", "all < 1e-4", "all < 1e-2", "median error", "median residual", "s/victim"]
    lines = [[*header, "wrong label: min", "median", f"> {TOLD:g} x"]]
    for row in rows:
        line = [str(getattr(row, name)) for name in (*several, "images", "victims")]
        line += [percent(row.below_1e4, row.below_1e4_ci), percent(row.below_1e2, row.below_1e2_ci)]
        line += [f"{row.error_median:.1e}", f"{row.residual_median:.1e}", f"{row.seconds_per_victim:.3f}"]
        line += [f"{row.wrong_ratio_min:.1e}", f"{row.wrong_ratio_median:.1e}"]
        lines.append([*line, percent(row.wrong_told, row.wrong_told_ci)])
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
    add("--network", nargs="+", choices=tuple(WRITTEN), default=["lenet"], help="default: lenet")
    add("--activations", nargs="+", choices=tuple(ACTIVATIONS), help="default: each network's own")
    add(
        "--init",
        choices=("papers", "torch"),
        default="papers",
        help="weights of LeNets: from U(-0.5, 0.5) or as torch draws those of each layer (default: %(default)s)",
    )
    add("--epochs", nargs="+", type=int, default=[0], help="of training, 0 for none (default: 0)")
    add("--images", nargs="+", type=int, default=[2], help="of a victim, fewer than classes (default: 2)")
    add("--labels", nargs="+", choices=("random", "equal"), default=["random"], help="of a victim (default: random)")
    add("--victims", type=int, default=32, help="in each cell (default: %(default)s)")
    add("--seed", type=int, default=0, help="of victims, networks, starts and wrong labels (default: %(default)s)")
    add("--root", type=Path, help="where the data sets lie (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    add("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    add("--networks", type=Path, help="folder that keeps trained networks (default: ~/.cache/leakage/networks)")
    add("--output", type=Path, required=True, help="JSON file")
    add("--force", action="store_true", help="replace the file if it is there")
    parser.set_defaults(**_FIXED)
    return parser


def prepare(given: argparse.Namespace) -> tuple[list[Cell], LabelledImages]:
    """All cells and the images, checked.

    Raises:
        ValueError: options that don't go together, or don't fit the data; a file that is there.
        OSError: a file that can't be written.
    """
    check_given(given)
    if given.output.is_dir():
        raise IsADirectoryError(f"Expected `--output` to be a file, but got the folder '{given.output}'.")
    if given.output.exists() and not given.force:
        raise FileExistsError(
            f"Expected `--output` to be a new file, but got '{given.output}', which is there. Add --force to replace "
            "it, or choose another."
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
