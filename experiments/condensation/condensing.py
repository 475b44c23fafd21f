"""Several ways to make a small training set from the same data: run, tested and tabulated side by side."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from leakage.callbacks import CondensationProgressBar, SyntheticEvaluation, SyntheticImages, read_accuracies
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.comparison import align
from leakage.condensation import (
    GradientMatchingCondensation,
    SiameseAugmentation,
    evaluate,
    evaluate_full,
    random_images,
)
from leakage.datamodules import LabelledImages
from leakage.errors import check_choice, check_count
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.plots import plot_accuracy, save_figure

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import check_trainer, read_record, trainer_defaults

# Of rows with `accuracy_std` and `accuracy_ci`.
Row = TypeVar("Row")

# How each method condenses; those with None take no gradient.
METHODS: dict[str, dict[str, Any] | None] = {
    "dc": {"protocol": "published"},
    "dsa": {"protocol": "published", "augmentation": "color_crop_cutout_flip_scale_rotate"},
    "fast": {"protocol": "fast"},
    "random": None,
    "full": None,
}
# Iterations after which the images are tested; always at the end.
MOMENTS = (0, 10, 20, 50, 100, 200, 500, 1000)
# All that a run writes to its folder itself.
FILES = ("summary.json", "accuracy.png", "synthetic.png", "synthetic.safetensors")


@dataclass
class CondensationRow:
    """Test accuracy of networks trained on one set of images, a line of ``summary.json``.

    Attributes:
        method: a key of :data:`METHODS`.
        dataset: where the images come from.
        images_per_class: of the set; None for the whole training set.
        iterations: of the condensation, None where there is none.
        accuracy_mean: over the networks, 0 to 1.
        accuracy_std: over the networks.
        accuracy_ci: 95 % confidence interval of the mean, after Student.
        networks: how many were trained.
        seconds: spent on condensing, without tests, over all sessions of a resumed run; on training and testing for
            ``"full"``, 0 for ``"random"``.
        published_accuracy: the paper's figure, 0 to 1, where there is one.
    """

    method: str
    dataset: str
    images_per_class: int | None
    iterations: int | None
    accuracy_mean: float
    accuracy_std: float
    accuracy_ci: tuple[float, float]
    networks: int
    seconds: float
    published_accuracy: float | None = None


def condense(
    methods: Sequence[str],
    data: LabelledImages,
    output: str | os.PathLike[str],
    *,
    images_per_class: int = 1,
    loops: tuple[int, int] | None = None,
    iterations: int | None = None,
    networks: int = 10,
    moments: Sequence[int] = MOMENTS,
    network: nn.Module | None = None,
    epochs: int | None = None,
    augmentation: SiameseAugmentation | None = None,
    full_epochs: int = 5,
    cache: str | os.PathLike[str] | None = None,
    published: Mapping[str, float] | None = None,
    seed: int = 0,
    resume: bool = False,
    logger: Logger | bool = False,
    **trainer: Any,
) -> list[CondensationRow]:
    """Make a small training set in each of several ways, one after another, and test what each is worth.

    Files in ``output``: ``summary.json`` (a list of :class:`CondensationRow`), ``synthetic.safetensors`` and
    ``synthetic.png`` of the first method that makes a set, where something is condensed ``accuracy.png`` (test
    accuracy over iterations, the other methods as lines), and a folder per method with its record, its last
    checkpoint while it runs, its set, and what :class:`~leakage.callbacks.SyntheticImages` and
    :class:`~leakage.callbacks.SyntheticEvaluation` write. Without ``resume`` those of an earlier run are replaced.

    Args:
        methods: of ``"dc"``, ``"dsa"`` (with siamese augmentation, of the networks in the test too), ``"fast"``,
            ``"random"`` (real images, drawn by the seed) and ``"full"`` (the whole training set, for few epochs).
        data: where the images come from.
        output: the folder.
        images_per_class: of the set.
        loops: (outer, inner) of ``"dc"`` and ``"dsa"``, by default those of the paper, see
            :class:`~leakage.condensation.GradientMatchingCondensation`.
        iterations: networks that images are condensed on, of all methods; by default each protocol's own.
        networks: that are trained on the set for its test; one on the whole training set.
        moments: iterations after which the images are tested, besides the last.
        network: for condensing and testing; by default the :class:`~leakage.models.ConvNet` that fits.
        epochs: of the networks in the test, see :func:`~leakage.condensation.evaluate`.
        augmentation: likewise; ``"dsa"`` keeps its own.
        full_epochs: on the whole training set.
        cache: a folder that keeps the results on whole training sets, so that they are worked out once.
        published: the paper's test accuracies by method, 0 to 1.
        seed: of all but the batches of real images, whose seed is that of ``data``.
        resume: go on with what is in ``output``; where there is nothing, begin.
        logger: as for the Trainer.
        **trainer: further options of the Trainer.

    Returns:
        One row per method.

    Raises:
        ValueError: an unknown method, an option out of its range, a network that does not fit the data, or with
            ``resume`` results that are damaged or of another configuration.
        OSError: a folder or file that can't be written.
    """
    if not methods:
        raise ValueError("Expected `methods` to name at least one method, but got none.")
    for method in methods:
        check_choice("methods", method, METHODS)
    check_count(images_per_class=images_per_class, networks=networks, full_epochs=full_epochs)
    folder = Path(output)
    check_trainer(trainer)
    check_output(folder)
    condensations = {
        method: GradientMatchingCondensation(
            images_per_class,
            network=network,
            loops=loops if options["protocol"] == "published" else None,
            iterations=iterations,
            seed=seed,
            **options,
        )
        for method in methods
        if (options := METHODS[method]) is not None
    }
    data.prepare_data()
    data.setup("fit")
    test: dict[str, Any] = {"network": network, "networks": networks, "epochs": epochs, "seed": seed}
    device = "cpu" if trainer.get("accelerator") == "cpu" else None
    tests = {method: {**test, "augmentation": _augmentation(method, augmentation)} for method in methods}
    configurations = {
        method: {
            "method": method,
            "data": data.configuration,
            "images_per_class": images_per_class,
            "condensation": dict(condensations[method].hparams) if method in condensations else None,
            "test": {name: _plain(value) for name, value in tests[method].items()},
            "full_epochs": full_epochs if method == "full" else None,
            "precision": trainer.get("precision"),
        }
        for method in methods
    }
    # What was run before is compared with what is asked for, for all methods before the first is run.
    finished = {}
    for method in methods:
        row = read_accuracy_row(folder / method, configurations[method], CondensationRow) if resume else None
        if row is not None:
            finished[method] = row
    # What can be refused is refused before the first is run.
    chosen = random_images(data, images_per_class, seed) if "random" in methods else None
    evaluations = {
        method: SyntheticEvaluation(moments, output=folder / method, **tests[method]) for method in condensations
    }
    if not resume:
        for file in FILES:
            (folder / file).unlink(missing_ok=True)
    for method in methods:
        if method in finished:
            continue
        record = folder / method / "run.json"
        if not resume:
            _clear(folder / method)
        write_json(record, {"configuration": configurations[method], "row": None})
        begun = time.perf_counter()
        condensation = condensations.get(method)
        if condensation is not None:
            callbacks: list[Callback] = [evaluations[method], SyntheticImages(record.parent, moments=moments)]
            _run(method, condensation, data, record.parent, callbacks, logger, trainer)
            outcome = evaluations[method].last
            seconds = sum(spent for part, spent in condensation.seconds.items() if part != "evaluation")
        elif method == "random" and chosen is not None:
            outcome = evaluate(chosen, data, device=device, **tests[method])
            chosen.save(record.parent / "synthetic.safetensors")
            save_figure(chosen.figure(), record.parent / "synthetic.png")
            seconds = 0.0
        else:
            outcome = evaluate_full(data, network=network, epochs=full_epochs, seed=seed, device=device, cache=cache)
            seconds = time.perf_counter() - begun
        finished[method] = CondensationRow(
            method=method,
            dataset=data.name,
            images_per_class=None if method == "full" else images_per_class,
            iterations=None if condensation is None else condensation.iteration,
            accuracy_mean=outcome.mean,
            accuracy_std=outcome.std,
            accuracy_ci=outcome.interval,
            networks=outcome.networks,
            seconds=seconds,
            published_accuracy=(published or {}).get(method),
        )
        write_json(record, {"configuration": configurations[method], "row": asdict(finished[method])})
        (record.parent / "last.ckpt").unlink(missing_ok=True)
        # After each, so that a later one that fails loses nothing.
        rows = [finished[name] for name in methods if name in finished]
        _write_overview(folder, rows)
    rows = [finished[method] for method in methods]
    _write_overview(folder, rows)
    return rows


def format_table(rows: Sequence[CondensationRow]) -> str:
    """The rows as a table for the terminal, accuracy with its standard deviation over networks."""
    lines = [["", "images per class", "iterations", "test accuracy", "95 % interval", "paper", "networks", "time"]]
    for row in rows:
        lines.append(
            [
                row.method,
                "all" if row.images_per_class is None else str(row.images_per_class),
                "-" if row.iterations is None else str(row.iterations),
                *accuracy_cells(row.accuracy_mean, row.accuracy_std, row.accuracy_ci),
                "-" if row.published_accuracy is None else f"{100 * row.published_accuracy:.1f} %",
                str(row.networks),
                f"{row.seconds:.0f} s",
            ]
        )
    return align(lines)


def accuracy_cells(mean: float, std: float, interval: tuple[float, float]) -> tuple[str, str]:
    """An accuracy in words, and its interval; without what one network does not have."""
    spread = "" if math.isnan(std) else f" ± {100 * std:.1f}"
    low, high = interval
    return f"{100 * mean:.1f}{spread} %", "-" if math.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]"


def read_accuracy_row(folder: Path, configuration: dict[str, Any], kind: type[Row]) -> Row | None:
    """The row of a finished run as :func:`read_record` reads it, None if there is none.

    One network has neither standard deviation nor interval, and JSON no numbers for that: they are null in the file.
    """
    record = read_record(folder, configuration, kind)
    if record is None:
        return None
    std, interval = record["accuracy_std"], record["accuracy_ci"]
    record["accuracy_std"] = math.nan if std is None else std
    record["accuracy_ci"] = tuple(math.nan if end is None else end for end in interval)
    return kind(**record)


def _augmentation(method: str, given: SiameseAugmentation | None) -> SiameseAugmentation | None:
    """Of the networks in the test: that of the condensation, where it has one, else the one that is given."""
    strategy = (METHODS[method] or {}).get("augmentation")
    return given if strategy is None else SiameseAugmentation(strategy)


def _run(
    method: str,
    condensation: GradientMatchingCondensation,
    data: LabelledImages,
    folder: Path,
    callbacks: list[Callback],
    logger: Logger | bool,
    trainer: dict[str, Any],
) -> None:
    """Condense, from the last checkpoint if there is one."""
    checkpoint = folder / "last.ckpt"
    callbacks = [*callbacks, TimedCheckpoint(folder)]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(CondensationProgressBar(name=method))
    options = trainer_defaults() | {"log_every_n_steps": 1} | trainer
    runner = Trainer(logger=logger, callbacks=callbacks, **options)
    runner.fit(condensation, datamodule=data, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)


def _clear(folder: Path) -> None:
    """Remove what an earlier run of a method has written, and nothing else."""
    written = ("run.json", "last.ckpt", "accuracy.*", "synthetic.*", "synthetic/iteration_*.png")
    for pattern in written:
        for path in folder.glob(pattern):
            path.unlink()


def _write_overview(folder: Path, rows: Sequence[CondensationRow]) -> None:
    """The rows, the curves of all methods in one picture, and the set of the first that has one."""
    curves = {row.method: read_accuracies(folder / row.method / "accuracy.csv") for row in rows if row.iterations}
    lines = {row.method: row.accuracy_mean for row in rows if not row.iterations}
    paper = {f"{row.method}, paper": row.published_accuracy for row in rows if row.published_accuracy is not None}
    if curves:
        save_figure(plot_accuracy(curves, lines={**lines, **paper}, title=rows[0].dataset), folder / "accuracy.png")
    write_json(folder / "summary.json", [asdict(row) for row in rows])
    made = [row.method for row in rows if row.images_per_class is not None]
    for name in ("synthetic.safetensors", "synthetic.png") if made else ():
        shutil.copyfile(folder / made[0] / name, folder / name)


def _plain(value: Any) -> Any:
    """What tells an option from another in a record."""
    if isinstance(value, SiameseAugmentation):
        return dict(vars(value))
    return value if value is None or isinstance(value, int) else str(value)
