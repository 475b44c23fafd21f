"""Compare several attacks on the same victims: the figures of each, and files that show them side by side."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, Timer
from matplotlib.figure import Figure

from leakage.attacks import GradientInversion
from leakage.callbacks import AttackProgressBar, Gallery, VictimTable
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.files.text import write_json, write_text
from leakage.inversion.processes import is_first_process
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import MeanOverVictims, ShareOverVictims, score
from leakage.plots import as_power, plot_fidelity, plot_gallery, save_figure
from leakage.solvers.solver import UNINFORMATIVE

FILES = ("summary.json", "victims.csv", "gallery.png", "fidelity.png")
# The names of the methods as their papers write them, for pictures and tables. Other methods keep the given name.
WRITTEN = {"dlg": "DLG", "idlg": "iDLG", "rgap": "R-GAP", "gauss_newton": "Gauss-Newton"}
_GALLERY_ROWS = 8
# The scores of a victim that are averaged, and how.
_ESTIMATES: dict[str, type[MeanOverVictims | ShareOverVictims]] = {
    "label_accuracy": ShareOverVictims,
    "success": ShareOverVictims,
    "psnr": MeanOverVictims,
    "ssim": MeanOverVictims,
}


@dataclass
class Row:
    """The figures of one attack over all victims: an entry of ``summary.json``.

    Attributes:
        method: name of the attack.
        dataset: name of the data set.
        protocol: ``"robust"`` or ``"published"``.
        victims: number of victims.
        uninformative: number of victims whose gradient carries no information, so that no search was run. All other
            figures include them.
        label_accuracy: share of images whose label was recovered, 0 to 1.
        label_accuracy_ci: its 95 % Wilson interval.
        success_rate: share of images with an MSE under ``success_threshold``, 0 to 1.
        success_rate_ci: its 95 % Wilson interval.
        success_threshold: the attack's threshold of the MSE.
        mse_median: median MSE over victims.
        psnr_mean: mean PSNR over victims, in dB.
        ssim_mean: mean SSIM over victims.
        evaluations_per_victim: mean number of evaluations of the objective and its gradient.
        seconds: training time, summed over all sessions of a resumed run.
        published_label_accuracy: the figure reported in the paper, 0 to 1, if there is one.
    """

    method: str
    dataset: str
    protocol: str
    victims: int
    uninformative: int
    label_accuracy: float
    label_accuracy_ci: tuple[float, float]
    success_rate: float
    success_rate_ci: tuple[float, float]
    success_threshold: float
    mse_median: float
    psnr_mean: float
    ssim_mean: float
    evaluations_per_victim: float
    seconds: float
    published_label_accuracy: float | None = None


@dataclass(frozen=True)
class SideBySide:
    """One image of a victim: the truth and the reconstruction by each method.

    Attributes:
        victim: id of the victim.
        images: the truth, then the reconstruction by each method, each ``(C, H, W)``.
        captions: the label of the truth, then the PSNR and label of each reconstruction.
    """

    victim: int
    images: tuple[torch.Tensor, ...]
    captions: tuple[str, ...]


def run_attack(
    name: str,
    attack: GradientInversion,
    victims: VictimDataModule,
    folder: Path,
    *,
    dataset: str,
    published: float | None = None,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | None = None,
    **trainer: Any,
) -> Row | None:
    """Run one attack with a victim table, a gallery and a progress bar.

    Args:
        name: name of the attack.
        attack: an attack that has not been run yet.
        victims: a DataModule with ground truth.
        folder: where the files of this attack go. Files of an earlier run there are replaced.
        dataset: name of the data set in the results.
        published: the label accuracy reported in the paper, 0 to 1.
        callbacks: additional callbacks.
        ckpt_path: a checkpoint to resume from.
        **trainer: additional arguments of the Trainer.
    """
    timer = Timer()
    callbacks = [timer, VictimTable(folder), Gallery(folder), *callbacks]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(AttackProgressBar(name=WRITTEN.get(name, name)))
    defaults = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False, "logger": False}
    runner = Trainer(callbacks=callbacks, **(defaults | trainer))
    if ckpt_path is None and is_first_process():
        for pattern in (*VictimTable.files, *Gallery.files):
            for path in folder.glob(pattern):
                path.unlink()
    runner.fit(attack, datamodule=victims, ckpt_path=ckpt_path)
    if not is_first_process():
        return None
    scores = list(attack.scores.values())

    # Calling a metric uses the data of this process only, and the first process has all scores.
    estimates = {}
    for kind, metric in _ESTIMATES.items():
        estimates[kind] = metric()(torch.tensor([getattr(victim, kind) for victim in scores]))
    labels, success = estimates["label_accuracy"], estimates["success"]
    return Row(
        method=name,
        dataset=dataset,
        protocol=attack.hparams.get("protocol", "robust"),
        victims=len(scores),
        uninformative=int((attack.finished.status == UNINFORMATIVE).sum()),
        label_accuracy=labels.value,
        label_accuracy_ci=(labels.low, labels.high),
        success_rate=success.value,
        success_rate_ci=(success.low, success.high),
        success_threshold=attack.hparams["success_threshold"],
        # NaN (an image that diverged) counts as the worst possible error.
        mse_median=statistics.median(math.inf if math.isnan(victim.mse) else victim.mse for victim in scores),
        psnr_mean=estimates["psnr"].value,
        ssim_mean=estimates["ssim"].value,
        evaluations_per_victim=attack.finished.evaluations.double().mean().item(),
        seconds=timer.time_elapsed("train"),
        published_label_accuracy=published,
    )


def write_overview(folder: Path, rows: Sequence[Row], victims: VictimDataModule) -> None:
    """Write the files that compare all methods, from ``rows`` and the files that each method left in ``folder``.

    These are ``summary.json`` (the rows, with null for numbers that are not finite), ``victims.csv`` (one row per
    victim and method), ``gallery.png`` (the truth and the reconstruction by each method) and ``fidelity.png`` (the
    share of victims whose MSE is below a threshold, against the threshold).

    Raises:
        ValueError: a file is damaged or does not cover all victims.
        OSError: a file can't be written.
    """
    tables = {row.method: _read_table(folder / row.method / "victims.csv", victims.victims) for row in rows}
    columns = list(tables[rows[0].method][0])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["method", *columns])
    for name, table in tables.items():
        writer.writerows([name, *(line[column] for column in columns)] for line in table)
    write_text(folder / "victims.csv", text.getvalue())
    dataset = rows[0].dataset
    save_figure(plot_errors(folder, rows, f"{dataset}: fidelity of the reconstructions"), folder / "fidelity.png")
    shown = first_victims(folder, list(tables), victims)
    figure = plot_gallery(
        [row.images for row in shown],
        columns=["truth", *(WRITTEN.get(name, name) for name in tables)],
        rows=[f"victim {row.victim}" for row in shown],
        captions=[row.captions for row in shown],
        title=f"{dataset}: what the gradient gave away",
    )
    save_figure(figure, folder / "gallery.png")
    write_json(folder / "summary.json", [asdict(row) for row in rows])


def plot_errors(folder: Path, rows: Sequence[Row], title: str = "") -> Figure:
    """Plot the share of victims whose MSE is below a threshold against the threshold, one curve per method.

    Raises:
        ValueError: the table of a method in ``folder`` is damaged or does not cover all victims.
    """
    tables = {row.method: _read_table(folder / row.method / "victims.csv", row.victims) for row in rows}
    curves = {WRITTEN.get(name, name): [float(line["mse"]) for line in table] for name, table in tables.items()}
    return plot_fidelity({name: torch.tensor(errors) for name, errors in curves.items()}, title=title)


def read_reconstructions(folder: Path, victims: Sequence[int]) -> Reconstruction:
    """Read the reconstructions of ``victims``, in this order, from a method's :class:`~leakage.callbacks.VictimTable`.

    Raises:
        ValueError: a reconstruction is missing.
    """
    parts = [Reconstruction.load(path) for path in sorted((folder / "reconstructions").glob("part_*.safetensors"))]
    found = Reconstruction.cat(parts)
    place = {victim: index for index, victim in enumerate(found.ids.tolist())}
    if not place.keys() >= set(victims):
        raise ValueError(
            f"Expected '{folder / 'reconstructions'}' to hold the reconstructions of all victims, but got "
            f"{len(place)} of them. Remove '{folder}' to run this method again."
        )
    return found.select(torch.tensor([place[victim] for victim in victims]))


def format_table(rows: list[Row]) -> str:
    """Format the rows as a table for the terminal; label accuracy and success come with 95 % intervals.

    If there were uninformative victims, a line below the table counts them.
    """
    success = " / ".join(dict.fromkeys(f"MSE < {as_power(row.success_threshold)}" for row in rows))
    header = ["", "victims", "label accuracy", "published", success, "median MSE", "PSNR", "evaluations", "time"]
    lines = [header]
    for row in rows:
        lines.append(
            [
                WRITTEN.get(row.method, row.method),
                str(row.victims),
                _percent(row.label_accuracy, row.label_accuracy_ci),
                "-" if row.published_label_accuracy is None else f"{100 * row.published_label_accuracy:.1f} %",
                _percent(row.success_rate, row.success_rate_ci),
                f"{row.mse_median:.1e}" if math.isfinite(row.mse_median) else "-",
                f"{row.psnr_mean:.1f} dB" if math.isfinite(row.psnr_mean) else "-",
                f"{row.evaluations_per_victim:.0f}",
                f"{row.seconds:.0f} s",
            ]
        )
    if all(row.published_label_accuracy is None for row in rows):
        column = header.index("published")
        lines = [[*line[:column], *line[column + 1 :]] for line in lines]
    silent = [f"{WRITTEN.get(row.method, row.method)} {row.uninformative}" for row in rows if row.uninformative]
    note = f"\nVictims with an uninformative gradient, which were not searched for: {', '.join(silent)}"
    return align(lines) + (note if silent else "")


def align(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as a table for the terminal, with aligned columns."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _read_table(path: Path, victims: int) -> list[dict[str, str]]:
    """Read the table that :class:`~leakage.callbacks.VictimTable` wrote, with the rows sorted by victim."""
    damaged = f"Expected '{path}' to be the whole table of {victims} victims, but got"
    if not path.is_file():
        raise ValueError(f"{damaged} no such file. Remove '{path.parent}' to run this method again.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        numbers = [(int(row["victim"]), float(row["mse"])) for row in rows]
    except (KeyError, TypeError, ValueError):
        numbers = []
    # A truncated line has missing values.
    if sorted(victim for victim, _ in numbers) != list(range(victims)) or any(None in row.values() for row in rows):
        raise ValueError(f"{damaged} another file. Remove '{path.parent}' to run this method again.")
    return sorted(rows, key=lambda row: int(row["victim"]))


def first_victims(folder: Path, names: Sequence[str], victims: VictimDataModule) -> list[SideBySide]:
    """Return the first victims' true images with each method's reconstruction, from the files in ``folder``."""
    parts: list[GroundTruth] = []
    for batch in victims.val_dataloader():
        parts.append(batch)
        if sum(map(len, parts)) >= _GALLERY_ROWS:
            break
    truth = GroundTruth.cat(parts)
    truth = GroundTruth(truth.ids[:_GALLERY_ROWS], truth.images[:_GALLERY_ROWS], truth.labels[:_GALLERY_ROWS])
    # One list per column, from left to right.
    images = [[*truth.images.flatten(0, 1)]]
    captions = [[f"label {label}" for label in truth.labels.flatten().tolist()]]
    for name in names:
        found = read_reconstructions(folder / name, truth.ids.tolist())
        scores = score(found.images.to(truth.images), found.labels, truth.images, truth.labels)
        # Each reconstruction goes next to the true image that it was matched with for scoring.
        victim = torch.arange(len(found))[:, None]
        images.append([*found.images[victim, scores.order].flatten(0, 1)])
        labels = found.labels[victim, scores.order].flatten().tolist()
        shown = zip(scores.psnr.flatten().tolist(), labels, strict=True)
        captions.append([f"{psnr:.1f} dB, label {label}" for psnr, label in shown])
    ids = [victim for victim in truth.ids.tolist() for _ in range(victims.victim.protocol.num_images)]
    rows = map(SideBySide, ids, zip(*images, strict=True), zip(*captions, strict=True))
    return list(rows)[:_GALLERY_ROWS]


def _percent(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
