"""Several attacks on the same victims: run, scored, tabulated and drawn side by side."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger

from leakage.attacks import GradientInversion
from leakage.callbacks import AttackProgressBar, Gallery, VictimTable
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.comparison.overview import WRITTEN, write_overview
from leakage.datamodules.base import VictimDataModule
from leakage.errors import check_positive
from leakage.files.checkpoints import WholeCheckpointIO, parts_of
from leakage.files.text import write_json
from leakage.inversion.processes import from_first, is_first_process
from leakage.metrics import MeanOverVictims, ShareOverVictims

FILES = ("summary.json", "victims.csv", "gallery.png", "fidelity.png")


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
        success_rate: share of images with an MSE under ``success_threshold``, 0 to 1.
        success_rate_ci: its 95 % Wilson interval.
        success_threshold: of the attack.
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
    success_threshold: float
    mse_median: float
    psnr_mean: float
    ssim_mean: float
    evaluations_per_victim: float
    seconds: float
    published_label_accuracy: float | None = None


def compare(
    attacks: Mapping[str, GradientInversion],
    victims: VictimDataModule | Mapping[str, VictimDataModule],
    output: str | os.PathLike[str],
    *,
    dataset: str,
    published: Mapping[str, float] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 60.0,
    logger: Logger | bool = False,
    **trainer: Any,
) -> list[Row]:
    """Run attacks on the same victims, one after another, and write what came of them.

    Files in ``output``: ``summary.json`` (a list of :class:`Row`; what is not a finite number is null),
    ``victims.csv`` (one row per victim and method), ``gallery.png`` (truth and every method's
    reconstruction), ``fidelity.png`` (share of victims under an MSE threshold, over the threshold), and
    a folder per method with its configuration, its last checkpoint while it runs, and the files of
    :class:`~leakage.callbacks.VictimTable` and :class:`~leakage.callbacks.Gallery`.

    Without ``resume`` the files of an earlier comparison in ``output`` are replaced. With it, methods that
    are finished are taken from there, an unfinished one goes on from its last checkpoint, and the rest
    begins: the results are those of a comparison that was never stopped.

    Args:
        attacks: name to attack; the name is the method's folder and its ``method`` in the files.
        victims: a DataModule with ground truth; or one for every attack, under its name, of the same victims, who
            may tell some attacks more (their labels) than others.
        output: the folder.
        dataset: what to call the data in the summary.
        published: the papers' label accuracy by name of the attack, 0 to 1.
        resume: go on with what is in ``output``; where there is nothing, begin.
        checkpoint_seconds: between two checkpoints; what a run that is killed loses at most.
        logger: as for the Trainer.
        **trainer: further options of the Trainer.

    Returns:
        One row per attack.

    Raises:
        ValueError: before anything is run, no attacks, victims without ground truth or not those of every
            attack, options that the Trainer refuses, or with ``resume`` results that are damaged or of another
            configuration; and what the DataModule raises.
        OSError: before anything is run, a folder that can't be written; later, a file that can't be.
    """
    if not attacks:
        raise ValueError("Expected `attacks` to name at least one attack, but got none.")
    folder = Path(output)
    check_positive(checkpoint_seconds=checkpoint_seconds)
    check_trainer(trainer)
    check_output(folder)
    data = dict(victims) if isinstance(victims, Mapping) else dict.fromkeys(attacks, victims)
    if data.keys() != attacks.keys():
        raise ValueError(f"Expected `victims` for the attacks {list(attacks)}, but got {list(data)}.")
    for datamodule in data.values():
        datamodule.prepare_data()
        datamodule.setup("fit")
        if not len(datamodule.val_dataloader()):
            raise ValueError(
                "Expected `victims` with a ground truth to compare with, but got "
                f"{type(datamodule).__name__}, which has none."
            )
    if len({datamodule.victims for datamodule in data.values()}) > 1:
        raise ValueError(
            "Expected the same `victims` for every attack, but got "
            f"{', '.join(f'{datamodule.victims} for {name!r}' for name, datamodule in data.items())}."
        )
    first, *others = {id(datamodule): datamodule for datamodule in data.values()}.values()
    for other in others:
        # The first one tells: a DataModule draws its victims from one seed.
        here, there = (next(iter(datamodule.val_dataloader())) for datamodule in (first, other))
        if not torch.equal(here.images[0], there.images[0]) or not torch.equal(here.labels[0], there.labels[0]):
            raise ValueError(
                "Expected the same `victims` for every attack, but got others. Give them the same data set and `seed`."
            )
    configurations = {
        name: {
            "attack": {"class": type(attack).__name__, **attack.hparams},
            "data": data[name].configuration,
            "precision": trainer.get("precision"),
        }
        for name, attack in attacks.items()
    }
    # What was run before is compared with what is asked for, for all methods before the first is run.
    finished: dict[str, Row] = {}
    for name, configuration in configurations.items():
        row = _read_row(folder / name, configuration) if resume else None
        if row is not None:
            finished[name] = row
    first_process = is_first_process()
    if not resume and first_process:
        for file in FILES:
            (folder / file).unlink(missing_ok=True)
    rows = []
    for name, attack in attacks.items():
        if name not in finished:
            record = folder / name / "run.json"
            if first_process:
                if not resume or not (record.parent / "last.ckpt").is_file():
                    _clear(record.parent)
                write_json(record, {"configuration": configurations[name], "row": None})
            seconds = _run(name, attack, data[name], record.parent, checkpoint_seconds, logger, trainer)
            row = None
            if first_process:
                row = _summarise(name, attack, dataset, (published or {}).get(name), seconds)
                write_json(record, {"configuration": configurations[name], "row": asdict(row)})
                for path in (record.parent / "last.ckpt", *parts_of(record.parent / "last.ckpt")):
                    path.unlink(missing_ok=True)
            finished[name] = from_first(row)
        rows.append(finished[name])
    if first_process:
        write_overview(folder, list(attacks), next(iter(data.values())), dataset)
        write_json(folder / "summary.json", [asdict(row) for row in rows])
    return rows


def check_output(folder: Path) -> None:
    """Make a folder and try to write there.

    Raises:
        OSError: it can't be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"Expected `output` to be a folder that can be written, but got '{folder}': {error}.") from error


def holds_results(folder: Path) -> bool:
    """Whether a comparison, finished or not, was written to a folder."""
    return (folder / "summary.json").exists() or any(folder.glob("*/run.json"))


def format_table(rows: list[Row]) -> str:
    """The rows as a table for the terminal, label accuracy and success with their 95 % intervals."""
    success = " / ".join(dict.fromkeys(f"MSE < {_power(row.success_threshold)}" for row in rows))
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
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: every column as wide as its widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _clear(folder: Path) -> None:
    """Remove what an earlier run of a method has written, and nothing else."""
    for pattern in (
        "run.json",
        "last.ckpt",
        "last.ckpt.[0-9]*",
        "victims.csv",
        "gallery.png",
        "reconstructions/part_*.safetensors",
    ):
        for path in folder.glob(pattern):
            path.unlink()


def trainer_defaults() -> dict[str, Any]:
    """What a run is made with unless it is said otherwise."""
    return {
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "plugins": [WholeCheckpointIO()],
    }


def check_trainer(trainer: dict[str, Any]) -> None:
    """Let the Trainer look at its options before any result of an earlier run is touched.

    Raises:
        ValueError: it refuses them.
    """
    try:
        Trainer(logger=False, **(trainer_defaults() | copy.deepcopy(trainer)))
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in trainer.items())
        raise ValueError(f"Expected options that the Trainer takes, but got {given}: {error}") from error


def _run(
    name: str,
    attack: GradientInversion,
    victims: VictimDataModule,
    folder: Path,
    checkpoint_seconds: float,
    logger: Logger | bool,
    trainer: dict[str, Any],
) -> float:
    """Run one attack, from its last checkpoint if there is one, and tell the seconds in training."""
    checkpoint = folder / "last.ckpt"
    timer = Timer()
    callbacks: list[Callback] = [
        timer,
        VictimTable(folder),
        Gallery(folder),
        TimedCheckpoint(folder, checkpoint_seconds),
    ]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(AttackProgressBar(name=WRITTEN.get(name, name)))
    # A strategy belongs to one Trainer.
    runner = Trainer(logger=logger, callbacks=callbacks, **(trainer_defaults() | copy.deepcopy(trainer)))
    runner.fit(attack, datamodule=victims, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    return timer.time_elapsed("train")


def _summarise(name: str, attack: GradientInversion, dataset: str, published: float | None, seconds: float) -> Row:
    scores = list(attack.scores.values())
    # The first process has the scores of all.
    accuracy, success = (ShareOverVictims(sync_on_compute=False) for _ in range(2))
    psnr, ssim = (MeanOverVictims(sync_on_compute=False) for _ in range(2))
    for metric, values in (
        (accuracy, [victim.label_accuracy for victim in scores]),
        (success, [victim.success for victim in scores]),
        (psnr, [victim.psnr for victim in scores]),
        (ssim, [victim.ssim for victim in scores]),
    ):
        metric.update(torch.tensor(values))
    labels, images = accuracy.compute(), success.compute()
    return Row(
        method=name,
        dataset=dataset,
        protocol=attack.hparams.get("protocol", "robust"),
        victims=len(scores),
        label_accuracy=labels.value,
        label_accuracy_ci=(labels.low, labels.high),
        success_rate=images.value,
        success_rate_ci=(images.low, images.high),
        success_threshold=attack.hparams["success_threshold"],
        # What is not a number (an image that diverged) is the worst there is.
        mse_median=statistics.median(math.inf if math.isnan(victim.mse) else victim.mse for victim in scores),
        psnr_mean=psnr.compute().value,
        ssim_mean=ssim.compute().value,
        evaluations_per_victim=attack.finished.evaluations.double().mean().item(),
        seconds=seconds,
        published_label_accuracy=published,
    )


def _read_row(folder: Path, configuration: dict[str, Any]) -> Row | None:
    """The row of a finished run, None if the run is not finished or was never begun."""
    row = read_record(folder, configuration, Row)
    if row is None:
        return None
    for name, value in row.items():
        if value is None and name != "published_label_accuracy":
            row[name] = math.nan
    return Row(**row)


def read_record(folder: Path, configuration: dict[str, Any], kind: type) -> dict[str, Any] | None:
    """The row in a run's ``run.json``, None if the run is not finished or was never begun.

    Args:
        folder: of the run.
        configuration: of the run that is asked for.
        kind: dataclass of the row.

    Raises:
        ValueError: a record that is damaged or of another configuration.
    """
    record = folder / "run.json"
    if not record.is_file():
        return None
    damaged = (
        f"Expected '{record}' to be the whole record of a run, but got {{}}. Remove '{folder}' to run this method "
        "again, or choose another `output`."
    )
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(damaged.format(f"no JSON ({error})")) from error
    if not isinstance(saved, dict) or not isinstance(saved.get("configuration"), dict) or "row" not in saved:
        raise ValueError(damaged.format("another file"))
    differing = _differing(saved["configuration"], json.loads(json.dumps(configuration)))
    if differing:
        raise ValueError(
            f"Expected '{folder}' to hold a run of the same configuration, but got one that differs in "
            f"{'; '.join(differing)}. Choose another `output`, or don't resume."
        )
    row = saved["row"]
    if row is None:
        return None
    if not isinstance(row, dict) or row.keys() != {field.name for field in fields(kind)}:
        raise ValueError(damaged.format("a row of other columns"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


def _differing(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in {**saved, **given}:
        there, here = saved.get(name), given.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += _differing(there, here, f"{prefix}{name}.")
        elif there != here:
            found.append(f"`{prefix}{name}`: {there!r} there, {here!r} here")
    return found


def _power(threshold: float) -> str:
    """As 1e-3 or 2.5e-4."""
    mantissa, exponent = f"{threshold:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _percent(value: float, interval: tuple[float, float]) -> str:
    return f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
