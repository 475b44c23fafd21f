"""Several attacks on the same victims: run, scored, tabulated and drawn side by side."""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger

from leakage.attacks import GradientMatchingAttack
from leakage.callbacks import AttackProgressBar, Gallery, VictimTable
from leakage.datamodules.base import VictimDataModule
from leakage.metrics import MeanOverVictims, ShareOverVictims
from leakage.plots import plot_fidelity, plot_gallery, save_figure
from leakage.reconstruction import Reconstruction

# Passes between two checkpoints of a running attack.
_CHECKPOINT_EVERY = 200


@dataclass
class Row:
    """One attack's figures over all victims, a line of ``summary.json``.

    Attributes:
        method: the attack.
        dataset: where the images come from.
        protocol: ``"robust"`` or ``"published"``.
        victims: number of victims.
        label_accuracy: share of images whose label was recovered, 0 to 1.
        label_accuracy_ci: its 95 % Wilson interval.
        success_rate: share of images with an MSE under the threshold (1e-3), 0 to 1.
        success_rate_ci: its 95 % Wilson interval.
        mse_median: median over victims.
        psnr_mean: mean over victims, dB.
        ssim_mean: mean over victims.
        evaluations_per_victim: mean number of evaluations of the objective and its gradient.
        seconds: time spent in training, over all sessions of a resumed run.
        published_label_accuracy: the paper's figure, 0 to 1, where there is one.
    """

    method: str
    dataset: str
    protocol: str
    victims: int
    label_accuracy: float
    label_accuracy_ci: tuple[float, float]
    success_rate: float
    success_rate_ci: tuple[float, float]
    mse_median: float
    psnr_mean: float
    ssim_mean: float
    evaluations_per_victim: float
    seconds: float
    published_label_accuracy: float | None = None


def compare(
    attacks: Mapping[str, GradientMatchingAttack],
    victims: VictimDataModule,
    output: str | os.PathLike[str],
    *,
    dataset: str,
    published: Mapping[str, float] | None = None,
    resume: bool = False,
    logger: Logger | bool = False,
    **trainer: Any,
) -> list[Row]:
    """Run attacks on the same victims, one after another, and write what came of them.

    Files in ``output``: ``summary.json`` (a list of :class:`Row`), ``victims.csv`` (one row per
    victim and method), ``gallery.png`` (truth and every method's reconstruction), ``fidelity.png``
    (share of victims under an MSE threshold, over the threshold), and a folder per method with the
    files of :class:`~leakage.callbacks.VictimTable` and :class:`~leakage.callbacks.Gallery` and its
    last checkpoint.

    Args:
        attacks: name to attack.
        victims: a DataModule with ground truth.
        output: the folder.
        dataset: what to call the data in the summary.
        published: the papers' label accuracy by name of the attack, 0 to 1.
        resume: take finished methods from ``output`` and go on with an unfinished one.
        logger: as for the Trainer.
        **trainer: further options of the Trainer.

    Returns:
        One row per attack.

    Raises:
        ValueError: no attacks; with ``resume``, a checkpoint of another configuration.
        OSError: a file that can't be written.
    """
    if not attacks:
        raise ValueError("Expected `attacks` to name at least one attack, but got none.")
    folder = Path(output)
    rows = []
    for name, attack in attacks.items():
        row_file = folder / name / "row.json"
        configuration = {"attack": dict(attack.hparams), "victims": victims.configuration}
        if resume and row_file.is_file():
            rows.append(_read_row(row_file, configuration))
            continue
        row_file.unlink(missing_ok=True)
        seconds = _run(attack, victims, folder / name, resume=resume, logger=logger, trainer=trainer)
        row = _summarise(name, attack, dataset, (published or {}).get(name), seconds)
        _write_json(row_file, {"configuration": configuration, "row": asdict(row)})
        rows.append(row)
    _write_json(folder / "summary.json", [asdict(row) for row in rows])
    _write_together(folder, list(attacks), victims, dataset)
    return rows


def format_table(rows: list[Row]) -> str:
    """The rows as a table for the terminal, label accuracy and success with their 95 % intervals."""
    header = ["", "victims", "label accuracy", "published", "MSE < 1e-3", "median MSE", "PSNR", "evaluations", "time"]
    lines = [header]
    for row in rows:
        lines.append(
            [
                row.method,
                str(row.victims),
                _percent(row.label_accuracy, row.label_accuracy_ci),
                "-" if row.published_label_accuracy is None else f"{100 * row.published_label_accuracy:.1f} %",
                _percent(row.success_rate, row.success_rate_ci),
                f"{row.mse_median:.1e}",
                f"{row.psnr_mean:.1f} dB",
                f"{row.evaluations_per_victim:.0f}",
                f"{row.seconds:.0f} s",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _run(
    attack: GradientMatchingAttack,
    victims: VictimDataModule,
    folder: Path,
    *,
    resume: bool,
    logger: Logger | bool,
    trainer: dict[str, Any],
) -> float:
    checkpoint = folder / "last.ckpt"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    timer = Timer()
    callbacks: list[Callback] = [
        timer,
        AttackProgressBar(leave=True),
        VictimTable(folder),
        Gallery(folder),
        ModelCheckpoint(
            folder,
            filename="last",
            every_n_train_steps=_CHECKPOINT_EVERY,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        ),
    ]
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_model_summary": False} | trainer
    runner = Trainer(logger=logger, callbacks=callbacks, **options)
    runner.fit(attack, datamodule=victims, ckpt_path=str(checkpoint) if resume and checkpoint.is_file() else None)
    checkpoint.unlink(missing_ok=True)
    return timer.time_elapsed("train")


def _summarise(
    name: str, attack: GradientMatchingAttack, dataset: str, published: float | None, seconds: float
) -> Row:
    scores = list(attack.scores.values())
    if not scores:
        raise ValueError("Expected victims with a ground truth to compare with, but got none that is scored.")
    accuracy, success, psnr, ssim = ShareOverVictims(), ShareOverVictims(), MeanOverVictims(), MeanOverVictims()
    for metric, values in (
        (accuracy, [score.label_accuracy for score in scores]),
        (success, [score.success for score in scores]),
        (psnr, [score.psnr for score in scores]),
        (ssim, [score.ssim for score in scores]),
    ):
        metric.update(torch.tensor(values))
    labels, images = accuracy.compute(), success.compute()
    return Row(
        method=name,
        dataset=dataset,
        protocol=attack.hparams["protocol"],
        victims=len(scores),
        label_accuracy=labels.value,
        label_accuracy_ci=(labels.low, labels.high),
        success_rate=images.value,
        success_rate_ci=(images.low, images.high),
        mse_median=statistics.median(score.mse for score in scores),
        psnr_mean=psnr.compute().value,
        ssim_mean=ssim.compute().value,
        evaluations_per_victim=attack.finished.evaluations.double().mean().item(),
        seconds=seconds,
        published_label_accuracy=published,
    )


def _read_row(path: Path, configuration: dict[str, Any]) -> Row:
    saved = json.loads(path.read_text())
    if saved["configuration"] != json.loads(json.dumps(configuration)):
        raise ValueError(
            f"Expected '{path.parent}' to hold results of the same configuration, but got another: it has "
            f"{saved['configuration']}. Choose another output folder, or don't resume."
        )
    row = saved["row"]
    return Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()})


def _write_together(folder: Path, names: list[str], victims: VictimDataModule, dataset: str) -> None:
    """What shows all methods at once, made from the files of each, so that resumed methods are in it."""
    tables = {}
    for name in names:
        with (folder / name / "victims.csv").open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    with (folder / "victims.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = list(tables[names[0]][0])
        writer.writerow(["method", *columns])
        for name, table in tables.items():
            for row in sorted(table, key=lambda row: int(row["victim"])):
                writer.writerow([name, *(row[column] for column in columns)])
    curves = {name: torch.tensor([float(row["mse"]) for row in table]) for name, table in tables.items()}
    save_figure(plot_fidelity(curves, title=f"{dataset}: fidelity of the reconstructions"), folder / "fidelity.png")
    _gallery(folder, tables, victims, dataset)


def _gallery(folder: Path, tables: dict[str, list[dict[str, str]]], victims: VictimDataModule, dataset: str) -> None:
    truth = next(iter(victims.val_dataloader()))
    shown = truth.ids[:8].tolist()
    columns, rows = ["truth", *tables], [f"victim {victim}" for victim in shown]
    images = [[truth.images[index, 0]] for index in range(len(shown))]
    captions = [[f"label {truth.labels[index, 0]}"] for index in range(len(shown))]
    for name, table in tables.items():
        by_victim = {int(row["victim"]): row for row in table}
        parts = [Reconstruction.load(path) for path in sorted((folder / name / "reconstructions").glob("*"))]
        found = Reconstruction.cat(parts)
        place = {victim: index for index, victim in enumerate(found.ids.tolist())}
        for index, victim in enumerate(shown):
            images[index].append(found.images[place[victim], 0])
            row = by_victim[victim]
            captions[index].append(f"{float(row['psnr']):.1f} dB, label {found.labels[place[victim], 0]}")
    figure = plot_gallery(images, columns=columns, rows=rows, captions=captions, title=f"{dataset}: what the gradient gave away")
    save_figure(figure, folder / "gallery.png")


def _percent(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
