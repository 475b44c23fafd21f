"""How labels affect reconstruction: quality over the batch size, for four kinds of labels.

    python experiments/labels/reconstruction.py --dataset mnist --batch-sizes 1 2 4 8 --output results/mnist

Each victim shares the gradient of a batch on its own, newly drawn network. The kinds of labels are

    true        known to the attacker, who searches only for the images;
    inferred    inferred from the gradient (IDLGAttack with `--rule`), followed by the same search;
    joint       searched for together with the images (DLGAttack);
    one-wrong   known to the attacker, but one of them is replaced by another class, to show what a wrong label costs.

The output folder has `summary.json`, with a row for each kind of labels and batch size; `quality.png`, with PSNR and
success over the batch size; and a folder per batch size as in `experiments/comparison`, with `gallery.png` (the first
victims' images as reconstructed with each kind) and the tables of all victims. In the rows, `label_accuracy` is the
share of images that were found with their own label, and `irec` is the share of labels that were known, whichever image
they were found with.

To continue an interrupted run, repeat the command with `--resume`. The results are the same as without the
interruption. Without `--resume`, a folder that holds results is refused, so that no results are lost by mistake.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from leakage.attacks import DLGAttack, GradientInversion, IDLGAttack
from leakage.cli import quiet
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.comparison import align
from leakage.datamodules import DATASETS, VictimDataModule, Victims
from leakage.errors import check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.labels import RULES, LabelReader
from leakage.metrics import MeanOverVictims, ShareOverVictims
from leakage.models import NETWORKS
from leakage.plots import save_figure
from leakage.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from comparing import compare
from records import holds_results

# Kinds of labels, and their styles in plots.
KINDS = {
    "true": ("#0072B2", "o", "-"),
    "inferred": ("#D55E00", "s", "--"),
    "joint": ("#009E73", "D", "-."),
    "one-wrong": ("#CC79A7", "^", ":"),
}
# Rules that can be used if victims have their own networks and the attacker has no auxiliary images.
_RULES = ["auto", *(name for name, rule in RULES.items() if not {"shared weights", "auxiliary"} & {*rule.needs})]


@dataclass
class Row:
    """The results of one kind of labels and one batch size, a row of ``summary.json``.

    Intervals are 95 % intervals over victims; values that are not finite are null.
    """

    labels: str
    dataset: str
    network: str
    batch_size: int
    victims: int
    success: float
    success_ci: tuple[float, float]
    mse_median: float
    psnr_mean: float
    psnr_ci: tuple[float, float]
    ssim_mean: float
    ssim_ci: tuple[float, float]
    label_accuracy: float
    label_accuracy_ci: tuple[float, float]
    irec: float
    irec_ci: tuple[float, float]
    evaluations_median: float
    seconds: float


class OneWrong(Victims):
    """Victims that reveal their labels, each with one label replaced by another class.

    The seed determines which label is replaced and by which class.
    """

    def share(self, victims: Sequence[int]) -> SharedGradient:
        """Return the victims' true gradients, each with one wrong label."""
        shared = super().share(victims)
        assert shared.labels is not None
        labels = shared.labels.clone()
        images, classes = shared.protocol.num_images, shared.protocol.num_classes
        for row, victim in enumerate(shared.ids.tolist()):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, victim, "wrong label"))
            place = int(torch.randint(images, (), generator=generator))
            further = torch.randint(1, classes, (), generator=generator)
            labels[row, place] = (labels[row, place] + further) % classes
        return dataclasses.replace(shared, labels=labels)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """The configuration of ordinary victims, marked as having wrong labels."""
        return super().configuration | {"wrong_labels": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    sizes, kinds = sorted(set(given.batch_sizes)), list(dict.fromkeys(given.labels))
    quiet()
    try:
        check_count(**{f"batch_sizes[{index}]": size for index, size in enumerate(given.batch_sizes)})
        check_output(given.output)
        if not given.resume and any(map(holds_results, (given.output, *given.output.glob("batch_*")))):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue that run, or choose another folder."
            )
        _attack("inferred", given)
        largest = _victims(given, sizes[-1])
        largest.prepare_data()
        dataset, images = largest.name, largest.source.open(largest.split)
        image_shape = tuple(images[0][0].shape)
        network = _network(given, image_shape, images.num_classes)
        if "inferred" in kinds:
            for size in sizes:
                LabelReader(given.rule).check(Victim(network, image_shape=image_shape, num_images=size))
        largest.setup("fit")
        del images, largest
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rows = []
    try:
        for size in sizes:
            print(f"{'/'.join(kinds)} labels, {given.victims} victims of {size} images of {dataset}:", flush=True)
            rows += _cells(given, kinds, dataset, network, size)
            write_json(given.output / "summary.json", [asdict(row) for row in rows])
            save_figure(plot_quality(rows), given.output / "quality.png")
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for path in ("summary.json", "quality.png", *(f"batch_{size}/gallery.png" for size in sizes)):
        print(given.output / path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reconstruction.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help=f"one of {', '.join(DATASETS)}, or a folder of images in ImageFolder layout, <folder>/<class>/<image>",
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), default="lenet", help="default: %(default)s")
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8], help="images per victim (default: 1 2 4 8)"
    )
    parser.add_argument("--victims", type=int, default=20, help="victims per batch size (default: %(default)s)")
    parser.add_argument(
        "--labels", nargs="+", choices=tuple(KINDS), default=list(KINDS), help="kinds of labels (default: all)"
    )
    parser.add_argument("--rule", choices=_RULES, default="auto", help="rule that infers labels (default: %(default)s)")
    parser.add_argument(
        "--protocol",
        choices=("published", "robust"),
        default="robust",
        help="protocol of the search (default: %(default)s)",
    )
    parser.add_argument(
        "--max-evaluations",
        type=int,
        help="evaluations of the objective per victim and start, at most (default: set by the protocol)",
    )
    parser.add_argument(
        "--restarts", type=int, help="restarts for a victim that was not found (default: set by the protocol)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of victims, networks and starts (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    parser.add_argument("--root", type=Path, help="folder of the data sets (default: $LEAKAGE_DATA, ~/.cache/leakage)")
    parser.add_argument("--image-size", type=int, help="scale and crop a folder's images to this height and width")
    parser.add_argument(
        "--accelerator", default="auto", help="accelerator of Lightning's Trainer (default: %(default)s)"
    )
    return parser


def _victims(given: argparse.Namespace, size: int, kind: type[Victims] = Victims, **options: Any) -> Victims:
    return kind(
        given.dataset,
        root=given.root,
        image_size=given.image_size,
        victims=given.victims,
        images=size,
        seed=given.seed,
        **options,
    )


def _network(given: argparse.Namespace, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the victims' network; each victim draws its own weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(given.seed)
        return NETWORKS[given.network](image_shape[0], image_shape[1:], num_classes).eval()


def _attack(kind: str, given: argparse.Namespace) -> GradientInversion:
    options = {name: getattr(given, name) for name in ("protocol", "seed", "max_evaluations", "restarts")}
    if kind == "joint":
        return DLGAttack(**options)
    return IDLGAttack(**options, rule=given.rule) if kind == "inferred" else IDLGAttack(**options)


def _cells(given: argparse.Namespace, kinds: list[str], dataset: str, network: nn.Module, size: int) -> list[Row]:
    """Measure all kinds of labels on the same victims."""
    options = {"model": network, "weights": "own"}
    hidden = _victims(given, size, **options)
    revealed = _victims(given, size, **options, reveal_labels=True)
    victims: dict[str, VictimDataModule] = {
        "true": revealed,
        "inferred": hidden,
        "joint": hidden,
        "one-wrong": _victims(given, size, kind=OneWrong, **options, reveal_labels=True),
    }
    folder = given.output / f"batch_{size}"
    found = compare(
        {kind: _attack(kind, given) for kind in kinds},
        {kind: victims[kind] for kind in kinds},
        folder,
        dataset=dataset,
        resume=given.resume,
        accelerator=given.accelerator,
        devices=1,
    )
    with (folder / "victims.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [
        _row([row for row in table if row["method"] == result.method], given.network, size, asdict(result))
        for result in found
    ]


def _row(table: list[dict[str, str]], network: str, size: int, compared: dict[str, Any]) -> Row:
    def over_victims(metric: MeanOverVictims | ShareOverVictims, values: list[float]) -> tuple[float, Any]:
        metric.update(torch.tensor(values))
        estimate = metric.compute()
        return estimate.value, (estimate.low, estimate.high)

    psnr, psnr_ci = over_victims(MeanOverVictims(), [float(victim["psnr"]) for victim in table])
    ssim, ssim_ci = over_victims(MeanOverVictims(), [float(victim["ssim"]) for victim in table])
    known = [
        (Counter(victim["labels_true"].split()) & Counter(victim["labels_recovered"].split())).total() / size
        for victim in table
    ]
    irec, irec_ci = over_victims(ShareOverVictims(), known)
    return Row(
        labels=compared["method"],
        dataset=compared["dataset"],
        network=network,
        batch_size=size,
        victims=compared["victims"],
        success=compared["success_rate"],
        success_ci=compared["success_rate_ci"],
        mse_median=compared["mse_median"],
        psnr_mean=psnr,
        psnr_ci=psnr_ci,
        ssim_mean=ssim,
        ssim_ci=ssim_ci,
        label_accuracy=compared["label_accuracy"],
        label_accuracy_ci=compared["label_accuracy_ci"],
        irec=irec,
        irec_ci=irec_ci,
        evaluations_median=statistics.median(float(victim["evaluations"]) for victim in table),
        seconds=compared["seconds"],
    )


def format_table(rows: list[Row]) -> str:
    """Return the rows as a table for the terminal."""
    header = [
        "images",
        "labels",
        "MSE < 1e-3",
        "median MSE",
        "PSNR",
        "SSIM",
        "own label",
        "IRec",
        "evaluations",
        "time",
    ]
    lines = [header]
    for row in rows:
        low, high = (100 * end for end in row.success_ci)
        lines.append(
            [
                str(row.batch_size),
                row.labels,
                f"{100 * row.success:.1f} % [{low:.1f}, {high:.1f}]",
                f"{row.mse_median:.1e}",
                f"{row.psnr_mean:.1f} dB [{row.psnr_ci[0]:.1f}, {row.psnr_ci[1]:.1f}]",
                f"{row.ssim_mean:.3f}",
                f"{100 * row.label_accuracy:.1f} %",
                f"{100 * row.irec:.1f} %",
                f"{row.evaluations_median:.0f}",
                f"{row.seconds:.0f} s",
            ]
        )
    return align(lines)


def plot_quality(rows: list[Row]) -> Figure:
    """Plot PSNR and success over the batch size, a line per kind of labels, with 95 % intervals as vertical bars."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    sizes = sorted({row.batch_size for row in rows})
    kinds = [kind for kind in KINDS if any(row.labels == kind for row in rows)]
    panels = figure.subplots(1, 2)
    for axes, name, ylabel in zip(panels, ("psnr", "success"), ("PSNR in dB", "images with MSE < 1e-3"), strict=True):
        for index, kind in enumerate(kinds):
            colour, marker, style = KINDS[kind]
            # Shift the kinds slightly, so that all are visible.
            shift = 0.3 * ((index + 0.5) / len(kinds) - 0.5)
            cells = sorted((row for row in rows if row.labels == kind), key=lambda row: row.batch_size)
            x = [sizes.index(row.batch_size) + shift for row in cells]
            values = [row.psnr_mean if name == "psnr" else row.success for row in cells]
            axes.plot(x, values, color=colour, marker=marker, linestyle=style, linewidth=1.8, label=kind,
                      markeredgecolor="white", markeredgewidth=0.5, zorder=3, clip_on=False)  # fmt: skip
            for place, row in zip(x, cells, strict=True):
                low, high = row.psnr_ci if name == "psnr" else row.success_ci
                if math.isfinite(low + high):
                    axes.plot([place, place], [low, high], color=colour, alpha=0.5, linewidth=1.2, clip_on=False)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_xlabel("images per victim")
        axes.set_ylabel(ylabel)
        axes.grid(True, axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[1].set_ylim(0, 1)
    panels[1].yaxis.set_major_formatter("{x:.0%}")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, title="labels", handlelength=5)
    figure.suptitle(f"{rows[0].dataset}, {rows[0].network}: {rows[0].victims} victims each", weight="bold")
    return figure


if __name__ == "__main__":
    main()
