r"""Train other architectures on images condensed with one network: test accuracy of a saved set by architecture.

    python experiments/condensation/cross_architecture.py --synthetic results/fashion_mnist_1/dc/synthetic.safetensors \
        --networks 5 --baseline random --output results/cross_architecture

`--synthetic` is a file written by `SyntheticSet.save`, `leakage fit` or `table2.py`, or an output folder of
`table2.py`, in which the first set of every method is tested. For each architecture new networks are trained on the
set alone, as for table 2, and tested on the whole test set of the data set named in the file. `--baseline random` also
tests the same number of random real images. Networks are trained as in the evaluation of the first paper (`dc`), and
on sets of the method `dsa` as in that of the second, unless `--evaluation` is given.

LeNet is the network of the attacks (sigmoids, weights from the uniform distribution on [-0.5, 0.5]), which is not
designed for training; LeNet with ReLU is the one of Dataset Condensation, which is.

Results are written after each architecture. To continue a stopped run, or to add architectures, repeat the command
with `--resume`. Without it, a folder that holds results is rejected.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from condensation_rows import accuracy_cells, read_accuracy_row  # in the folder of this script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn

from leakage.cli import quiet
from leakage.comparison import align
from leakage.condensation import SyntheticSet, evaluate, random_images
from leakage.condensation.training import EVALUATIONS, evaluation_options
from leakage.datamodules import DATASETS, LABELLED_DATASETS, LabelledImages
from leakage.datamodules.benchmarks import BENCHMARKS
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.models import NETWORKS
from leakage.pieces import digest
from leakage.plots import save_figure

FILES = ("summary.json", "accuracy.png")


def lenet_relu(channels: int, image_size: tuple[int, int], num_classes: int) -> nn.Sequential:
    """Build the LeNet of Dataset Condensation: ReLU, max-pooling, and torch's default weight initialisation.

    The first convolution pads sides of 28 pixels to 32.
    """
    sides = [(side + 4 * (side == 28) - 4) // 2 for side in image_size]
    height, width = ((side - 4) // 2 for side in sides)
    if min(height, width) < 1:
        raise ValueError(f"Expected images of at least 16 pixels per side for LeNet with ReLU, but got {image_size}.")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=tuple(2 * (side == 28) for side in image_size)),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


# Each is called with the arguments of those in `NETWORKS`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {**NETWORKS, "lenet_relu": lenet_relu}
# Names as written in the papers.
WRITTEN = {
    "convnet": "ConvNet", "mlp": "MLP", "lenet": "LeNet", "lenet_relu": "LeNet, ReLU",
    "alexnet": "AlexNet", "vgg11": "VGG11", "resnet18": "ResNet18", "resnet20": "ResNet20", "vit": "ViT",
}  # fmt: skip
# Colours that colour-blind readers can distinguish (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class CrossRow:
    """Test accuracy of one architecture trained on one set, a line of ``summary.json``.

    Attributes:
        architecture: a key of :data:`ARCHITECTURES`.
        dataset: name of the data set of the test images.
        images_per_class: images per class of the set; the smallest number if classes differ.
        source: the file or the method that the set comes from, ``"random"`` for random real images.
        accuracy_mean: mean over the networks, 0 to 1.
        accuracy_std: standard deviation over the networks.
        accuracy_ci: 95 % confidence interval of the mean by Student's t-distribution.
        networks: number of networks.
        seconds: time spent on training and testing all networks.
    """

    architecture: str
    dataset: str
    images_per_class: int
    source: str
    accuracy_mean: float
    accuracy_std: float
    accuracy_ci: tuple[float, float]
    networks: int
    seconds: float


def read_sets(path: Path) -> dict[str, SyntheticSet]:
    """Read the sets by source: that of a file, or the first of every method in an output folder of ``table2.py``.

    Raises:
        ValueError: the folder has no sets or sets of different data sets, or the file is of another kind.
        FileNotFoundError: the file or folder does not exist.
    """
    if not path.is_dir():
        synthetic = SyntheticSet.load(path)
        # A set without a recipe in `dc/synthetic.safetensors` is named after its folder.
        name = path.resolve().parent.name if path.stem == "synthetic" else path.stem
        return {synthetic.recipe.method if synthetic.recipe is not None else name: synthetic}
    found: dict[str, SyntheticSet] = {}
    for file in sorted(path.glob("*/seed_*/synthetic.safetensors"), key=lambda file: (len(file.parent.name), file)):
        if file.parents[1].name not in found:
            found[file.parents[1].name] = SyntheticSet.load(file)
    if not found:
        raise ValueError(
            f"Expected `--synthetic` to hold <method>/seed_<seed>/synthetic.safetensors, but got '{path}' without such "
            "files."
        )
    if len({synthetic.dataset for synthetic in found.values()}) > 1:
        of = {name: synthetic.dataset for name, synthetic in found.items()}
        raise ValueError(f"Expected `--synthetic` to hold sets of one data set, but got {of}.")
    return found


def cross_architecture(
    sets: Mapping[str, SyntheticSet],
    data: LabelledImages,
    architectures: Sequence[str],
    output: Path,
    *,
    networks: int,
    epochs: int | None,
    evaluations: Mapping[str, str],
    seed: int,
    resume: bool,
    device: str | None,
    progress: bool = True,
) -> list[CrossRow]:
    """Test each set with each architecture, write the results after each, and return a row for each.

    Sets and evaluations are given by source.

    Raises:
        ValueError: a set does not fit the data, an architecture does not accept the images, or, with ``resume``,
            earlier results are damaged or of another configuration.
        OSError: a file can't be written.
    """
    channels, height, width = data.image_shape
    models = {name: ARCHITECTURES[name](channels, (height, width), data.num_classes) for name in architectures}
    options = {"networks": networks, "epochs": epochs, "seed": seed}
    tested_on = {
        "name": data.name,
        "test": digest({"images": data.test.images, "labels": data.test.labels}),
        "mean": data.mean,
        "std": data.std,
    }
    configurations: dict[tuple[str, str], dict[str, Any]] = {}
    for architecture in architectures:
        for source, synthetic in sets.items():
            synthetic.check(data)
            seen = synthetic.decoded()
            configurations[architecture, source] = {
                "set": digest({"images": seen.images, "labels": seen.labels}),
                "data": tested_on,
                "network": repr(models[architecture]),
                "evaluation": evaluations[source],
                **options,
            }
    # Compare the configurations of earlier results before anything is run.
    finished = {}
    for (architecture, source), configuration in configurations.items() if resume else ():
        row = read_accuracy_row(output / source / architecture, configuration, CrossRow)
        if row is not None:
            finished[architecture, source] = row
    rows: list[CrossRow] = []
    for (architecture, source), configuration in configurations.items():
        if (architecture, source) not in finished:
            print(f"{WRITTEN[architecture]}, {source}:", flush=True)
            outcome = evaluate(
                sets[source],
                data,
                network=models[architecture],
                augmentation=evaluations[source],
                device=device,
                progress=progress,
                **options,  # type: ignore[arg-type]
            )
            finished[architecture, source] = CrossRow(
                architecture=architecture,
                dataset=data.name,
                images_per_class=int(sets[source].images_per_class.min()),
                source=source,
                accuracy_mean=outcome.mean,
                accuracy_std=outcome.std,
                accuracy_ci=outcome.interval,
                networks=outcome.networks,
                seconds=outcome.training_seconds + outcome.testing_seconds,
            )
            record = {"configuration": configuration, "row": asdict(finished[architecture, source])}
            write_json(output / source / architecture / "run.json", record)
        # This includes rows of an earlier run that come later in the order.
        rows = [finished[key] for key in configurations if key in finished]
        write_json(output / "summary.json", [asdict(row) for row in rows])
        save_figure(plot(rows), output / "accuracy.png")
    return rows


def plot(rows: Sequence[CrossRow]) -> Figure:
    """Plot a group of bars for each architecture, with a bar for each source and the interval of its mean."""
    architectures = list(dict.fromkeys(row.architecture for row in rows))
    sources = list(dict.fromkeys(row.source for row in rows))
    figure = Figure(figsize=(max(4.8, 1.2 + len(rows) * 0.7), 4.2), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thickness = 0.8 / len(sources)
    for index, source in enumerate(sources):
        own = [row for row in rows if row.source == source]
        shift = (index - (len(sources) - 1) / 2) * thickness
        places = [architectures.index(row.architecture) + shift for row in own]
        heights = [row.accuracy_mean for row in own]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.bar(places, heights, width=0.9 * thickness, color=colour, alpha=0.75, label=source)
        for place, row in zip(places, own, strict=True):
            low, high = row.accuracy_ci
            if math.isfinite(low):
                axes.plot([place, place], [low, high], color="#222222", linewidth=1.5)
            top = max(row.accuracy_mean, high if math.isfinite(high) else 0.0)
            axes.text(place, top + 0.01, f"{100 * row.accuracy_mean:.1f}", fontsize=8, ha="center", va="bottom")
    axes.set_xticks(range(len(architectures)), [WRITTEN[name] for name in architectures])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_ylabel("test accuracy")
    axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    axes.set_title(f"{rows[0].dataset}, {rows[0].images_per_class} per class")
    return figure


def format_table(rows: Sequence[CrossRow]) -> str:
    """Format the rows as a table for the terminal; ± is the standard deviation over networks."""
    lines = [["", "trained on", "images per class", "test accuracy", "95 % interval", "networks", "time"]]
    for row in rows:
        lines.append(
            [
                WRITTEN[row.architecture],
                row.source,
                str(row.images_per_class),
                *accuracy_cells(row.accuracy_mean, row.accuracy_std, row.accuracy_ci),
                str(row.networks),
                f"{row.seconds:.0f} s",
            ]
        )
    return align(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        check_count(networks=given.networks)
        evaluation_options("", given.epochs, seed=given.seed)
        if given.device is not None:
            _check_device(given.device)
        sets = read_sets(given.synthetic)
        named = next(iter(sets.values())).dataset
        dataset = given.dataset or named
        if not dataset:
            raise ValueError(f"Expected `--dataset`, since '{given.synthetic}' names no data set, but got none.")
        # A folder may hold a copy of the data set that the sets name.
        benchmark = named if named in BENCHMARKS and dataset not in DATASETS else None
        data = LabelledImages(
            dataset, root=given.root, image_size=given.image_size, benchmark=benchmark, seed=given.seed
        )
        check_output(given.output)
        if not given.resume and (given.output / "summary.json").exists():
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue its run, or choose another folder."
            )
        data.prepare_data()
        data.setup("fit")
        if given.baseline is not None and "random" not in sets:
            images_per_class = int(next(iter(sets.values())).images_per_class.min())
            sets["random"] = random_images(data, images_per_class, given.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    evaluations = {source: given.evaluation or ("dsa" if source == "dsa" else "dc") for source in sets}
    try:
        rows = cross_architecture(
            sets,
            data,
            list(dict.fromkeys(given.architectures)),
            given.output,
            networks=given.networks,
            epochs=given.epochs,
            evaluations=evaluations,
            seed=given.seed,
            resume=given.resume,
            device=given.device,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for name in FILES:
        print(given.output / name)


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).split("\n")[0]
        raise ValueError(f"Expected `--device` to be one that torch can use, but got {device!r}: {line}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cross_architecture.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--synthetic", type=Path, required=True, help="a saved set, or an output folder of table2.py")
    parser.add_argument(
        "--dataset",
        help=f"one of {', '.join(LABELLED_DATASETS)}, or a folder of images in ImageFolder layout "
        "(default: the data set named in the set)",
    )
    parser.add_argument("--networks", type=int, default=5, help="networks of each architecture (default: %(default)s)")
    parser.add_argument(
        "--architectures",
        nargs="+",
        choices=tuple(ARCHITECTURES),
        default=list(ARCHITECTURES),
        help="architectures to test (default: all)",
    )
    parser.add_argument("--baseline", choices=("random",), help="also test the same number of random real images")
    parser.add_argument("--epochs", type=int, help="epochs of training (default: 300, or 1000 with augmentation)")
    parser.add_argument(
        "--evaluation",
        choices=EVALUATIONS,
        help="how networks are trained (default: dsa for sets of the method dsa, else dc)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    parser.add_argument("--seed", type=int, default=0, help="seed of networks and random images (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument("--device", help="torch device, such as cpu or cuda:0 (default: the first GPU, else the CPU)")
    return parser


if __name__ == "__main__":
    main()
