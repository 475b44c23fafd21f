"""Compare several attacks on the same victims: run them, score them, and show the results side by side."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from records import check_trainer, read_record, trainer_defaults  # beside this script

from leakage.attacks import GradientInversion
from leakage.callbacks import TimedCheckpoint
from leakage.comparison import FILES, Row, run_attack, write_overview
from leakage.datamodules import VictimDataModule
from leakage.errors import check_positive
from leakage.files.checkpoints import parts_of
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.inversion.processes import from_first, is_first_process


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
    """Run attacks on the same victims, one after another, and write the results.

    Files in ``output``: ``summary.json`` (a list of :class:`Row`, with null for numbers that are not finite),
    ``victims.csv`` (one row per victim and method), ``gallery.png`` (the truth and the reconstruction by each
    method), ``fidelity.png`` (the share of victims whose MSE is below a threshold, against the threshold), and
    a folder per method with its configuration, its last checkpoint while it runs, and the files of
    :class:`~leakage.callbacks.VictimTable` and :class:`~leakage.callbacks.Gallery`.

    Without ``resume``, the files of an earlier comparison in ``output`` are replaced. With ``resume``, the results of
    finished methods are kept, an unfinished method resumes from its last checkpoint, and the rest
    are run: the results are those of a comparison that was never stopped.

    Args:
        attacks: name to attack; the name is the method's folder and its ``method`` in the files.
        victims: a DataModule with ground truth; or one for every attack, by name. They must have the same victims, but
            may reveal more (such as labels) to some attacks.
        output: the folder.
        dataset: name of the data set in the summary.
        published: the label accuracy in the papers, 0 to 1, by name of the attack.
        resume: continue from the results in ``output``, if there are any.
        checkpoint_seconds: time between two checkpoints: the most that a killed run loses.
        logger: logger of the Trainer.
        **trainer: additional arguments of the Trainer.

    Returns:
        One row per attack.

    Raises:
        ValueError: before anything is run, if there are no attacks, the victims have no ground truth or differ between
            attacks, the Trainer refuses its arguments, or, with ``resume``, results are damaged or from another
            configuration. Errors of the DataModule are passed on.
        OSError: before anything is run, if the folder can't be written to; later, if a file can't be written.
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
        # Comparing the first victim is enough, since a DataModule draws all victims from one seed.
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
    # Earlier results of all methods are checked against the configuration before the first method is run.
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
            record, checkpoint = folder / name / "run.json", folder / name / "last.ckpt"
            if first_process:
                if not resume or not checkpoint.is_file():
                    _remove(checkpoint)
                write_json(record, {"configuration": configurations[name], "row": None})
            row = run_attack(
                name,
                attack,
                data[name],
                record.parent,
                dataset=dataset,
                published=(published or {}).get(name),
                callbacks=[TimedCheckpoint(record.parent, checkpoint_seconds)],
                ckpt_path=str(checkpoint) if checkpoint.is_file() else None,
                logger=logger,
                # A strategy can only be used by one Trainer.
                **(trainer_defaults() | copy.deepcopy(trainer)),
            )
            if row is not None:
                write_json(record, {"configuration": configurations[name], "row": asdict(row)})
                _remove(checkpoint)
            finished[name] = from_first(row)
        rows.append(finished[name])
    if first_process:
        write_overview(folder, rows, next(iter(data.values())))
    return rows


def _remove(checkpoint: Path) -> None:
    for path in (checkpoint, *parts_of(checkpoint)):
        path.unlink(missing_ok=True)


def _read_row(folder: Path, configuration: dict[str, Any]) -> Row | None:
    """Read the row of a finished run; None if the run is unfinished or was never started."""
    row = read_record(folder, configuration, Row)
    if row is None:
        return None
    for name, value in row.items():
        if value is None and name != "published_label_accuracy":
            row[name] = math.nan
    return Row(**row)
