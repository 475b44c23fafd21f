"""Runs several methods that make small training sets from the same data, tests the sets and compares them."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from budgets import Schedule, fit_schedule, read_schedule  # in the folder of this script
from condensation_rows import FILES, CondensationRow, clear, sum_up, write_overview
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from leakage.callbacks import CondensationProgressBar, SyntheticEvaluation, SyntheticImages
from leakage.callbacks.timed_checkpoint import TimedCheckpoint
from leakage.condensation import (
    Condensation,
    DistributionMatchingCondensation,
    Evaluation,
    GradientMatchingCondensation,
    Recipe,
    Score,
    SiameseAugmentation,
    SyntheticSet,
    evaluate,
    evaluate_full,
    kmeans_images,
    random_images,
)
from leakage.condensation.decoding import check_factor
from leakage.condensation.training import EVALUATIONS, evaluation_options
from leakage.datamodules import LabelledImages
from leakage.errors import check_choice, check_count, check_share
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.plots import save_figure

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from records import check_trainer, code_version, read_record, trainer_defaults

# The condensation of each method.
CONDENSATIONS: dict[str, Callable[..., Condensation]] = {
    "dc": GradientMatchingCondensation,
    "dsa": partial(GradientMatchingCondensation, initialization="real"),
    "dm": DistributionMatchingCondensation,
    "fast": partial(GradientMatchingCondensation, protocol="fast"),
}
# Methods that choose real images instead of condensing.
CHOICES: dict[str, Callable[[LabelledImages, int, int], SyntheticSet]] = {
    "random": random_images,
    "kmeans": kmeans_images,
}
METHODS = (*CONDENSATIONS, *CHOICES, "full")
# Iterations after which the images are tested on held-out training images; always at the end.
MOMENTS = (0, 10, 20, 50, 100, 200, 500, 1000)
# Networks trained for each such test.
_WATCHING = 1


@dataclass
class _Made:
    """The record of a finished set."""

    iterations: int | None
    seconds: float


def condense(
    methods: Sequence[str],
    data: LabelledImages,
    output: str | os.PathLike[str],
    *,
    images_per_class: int = 1,
    sets: int = 1,
    evaluations: Sequence[str] = ("dc",),
    loops: tuple[int, int] | None = None,
    iterations: int | None = None,
    factor: int | None = None,
    batch_size: int | None = None,
    budget: float | None = None,
    networks: int = 10,
    moments: Sequence[int] | None = None,
    held_out: float | None = 0.02,
    network: nn.Module | None = None,
    epochs: int | None = None,
    test_precision: str = "32-true",
    full_epochs: int = 5,
    cache: str | os.PathLike[str] | None = None,
    published: Mapping[str, float] | None = None,
    seed: int = 0,
    resume: bool = False,
    logger: Logger | bool = False,
    **trainer: Any,
) -> list[CondensationRow]:
    """Make small training sets by several methods, one after another, and test them.

    Files in ``output``:

    - ``summary.json``, a list of :class:`CondensationRow`;
    - ``synthetic.safetensors`` and ``synthetic.png``, of the first method that makes a set;
    - ``accuracy.png``, if something is condensed: accuracy on held-out training images over iterations, with test
      accuracies as lines;
    - a folder ``<method>/seed_<seed>`` per set, with its record, its last checkpoint during the run, the set with its
      recipe, the files of :class:`~leakage.callbacks.SyntheticImages` and
      :class:`~leakage.callbacks.SyntheticEvaluation`, and the result of each network trained on it.

    Without ``resume`` the files of an earlier run are replaced.

    Args:
        methods: any of ``"dc"``, ``"dsa"`` (with siamese augmentation, from real images), ``"dm"``, ``"fast"``,
            ``"random"`` and ``"kmeans"`` (real images) and ``"full"`` (the whole training set, for few epochs).
        data, output: the data set, and the folder for results.
        images_per_class: images per class of each set.
        sets: sets of each method, with the seeds ``seed``, ``seed + 1`` and so on.
        evaluations: any of ``"dc"`` and ``"dsa"``, see :func:`~leakage.condensation.evaluate`.
        loops: (outer, inner) of ``"dc"`` and ``"dsa"``, by default those of the paper.
        iterations, factor, batch_size: options of all methods that condense; by default those of each protocol.
        budget: minutes for a set with its tests on held-out images, instead of ``iterations``: as many as fit are run.
        networks: networks trained on each set for each evaluation; the whole training set has one network.
        moments: iterations after which the images are tested on held-out training images, besides the last; by default
            :data:`MOMENTS`, or a few, evenly spaced, with a ``budget``.
        held_out: share of the training images left out of condensation; None for no held-out images and no such tests.
        network: architecture for condensing and testing; by default the :class:`~leakage.models.ConvNet` that fits.
        epochs, test_precision: options of the networks in the test, see :func:`~leakage.condensation.evaluate`.
        full_epochs, cache: epochs on the whole training set, and a folder that keeps its result (by default in
            ``output``).
        published: the papers' test accuracies by evaluation, 0 to 1.
        seed: seed of all random draws.
        resume: whether to continue a run in ``output``, if there is one.
        logger, **trainer: options of the Trainer.

    Returns:
        One row per method and evaluation.

    Raises:
        ValueError: a method is unknown, an option is out of range, the network does not fit the data, the budget is too
            small for one iteration, or, with ``resume``, earlier results are damaged or of another configuration.
        OSError: a folder or file can't be written.
    """
    if not methods:
        raise ValueError("Expected `methods` to name at least one method, but got none.")
    for method in methods:
        check_choice("methods", method, METHODS)
    if not evaluations:
        raise ValueError("Expected `evaluations` to name at least one evaluation, but got none.")
    for evaluation in evaluations:
        check_choice("evaluations", evaluation, EVALUATIONS)
    if budget is not None and iterations is not None:
        raise ValueError(f"Expected `budget` or `iterations`, but got both, {budget!r} and {iterations!r}.")
    check_count(images_per_class=images_per_class, sets=sets, networks=networks, full_epochs=full_epochs)
    evaluation_options(data.name, epochs, seed=seed, precision=test_precision)
    if held_out is not None:
        check_share(held_out=held_out)
    check_trainer(trainer)
    run = _Run(
        data=data,
        output=Path(output),
        images_per_class=images_per_class,
        evaluations=tuple(evaluations),
        options={
            "network": network,
            "loops": loops,
            "iterations": iterations,
            "factor": factor,
            "batch_size": batch_size,
        },
        tests={"network": network, "epochs": epochs, "precision": test_precision},
        budget=budget,
        networks=networks,
        moments=moments,
        held_out=held_out,
        full_epochs=full_epochs,
        cache=cache,
        published=dict(published or {}),
        resume=resume,
        logger=logger,
        trainer=trainer,
    )
    return run.all(methods, range(seed, seed + sets))


@dataclass
class _Run:
    """The options that all sets share; see :func:`condense`."""

    data: LabelledImages
    output: Path
    images_per_class: int
    evaluations: tuple[str, ...]
    options: dict[str, Any]
    tests: dict[str, Any]
    budget: float | None
    networks: int
    moments: Sequence[int] | None
    held_out: float | None
    full_epochs: int
    cache: str | os.PathLike[str] | None
    published: dict[str, float]
    resume: bool
    logger: Logger | bool
    trainer: dict[str, Any]

    def __post_init__(self) -> None:
        self.device = "cpu" if self.trainer.get("accelerator") == "cpu" else None
        self.progress = self.trainer.get("enable_progress_bar", True)
        self.rows: dict[tuple[str, str | None], CondensationRow] = {}

    def all(self, methods: Sequence[str], seeds: range) -> list[CondensationRow]:
        """Make and test all sets, and write the results after each evaluation."""
        # Check everything before the first set is made and before files of an earlier run are changed.
        condensations = [self._condensation(method, seeds[0], None) for method in methods if method in CONDENSATIONS]
        SyntheticEvaluation(self.moments or (), **self.tests)
        check_output(self.output)
        self.data.prepare_data()
        self.data.setup("fit")
        for condensation in condensations:
            check_factor(condensation.protocol.factor, self.data.image_shape)
        watched = self.data if self.held_out is None else self.data.hold_out(self.held_out)
        if CHOICES.keys() & set(methods):
            random_images(self.data, self.images_per_class)
        sources = {method: watched if method in CONDENSATIONS else self.data for method in methods if method != "full"}
        schedules = {}
        for method, source in sources.items() if self.resume else ():
            schedules[method] = read_schedule(self.output / method, self.budget) if method in CONDENSATIONS else None
            for seed in seeds:
                self._finished(method, seed, of_seed(source, seed), schedules[method])
        if not self.resume:
            for file in FILES:
                (self.output / file).unlink(missing_ok=True)
        for method in methods:
            if not self.resume:
                clear(self.output / method)
            if method == "full":
                self._full(seeds[0])
                continue
            found: dict[str, list[Evaluation]] = {evaluation: [] for evaluation in self.evaluations}
            spent: list[_Made] = []
            for seed in seeds:
                source = of_seed(sources[method], seed)
                if method in CONDENSATIONS and schedules.get(method) is None:
                    schedules[method] = self._schedule(method, seed, source)
                synthetic, made = self._make(method, seed, source, schedules.get(method))
                spent.append(made)
                for evaluation in self.evaluations:
                    synthetic, outcome = self._test(synthetic, evaluation, seed, self._folder(method, seed))
                    found[evaluation].append(outcome)
                    self._add_row(method, evaluation, found[evaluation], spent)
        return list(self.rows.values())

    def _folder(self, method: str, seed: int) -> Path:
        return self.output / method / f"seed_{seed}"

    def _condensation(self, method: str, seed: int, iterations: int | None) -> Condensation:
        options = self.options | {"seed": seed} | ({} if iterations is None else {"iterations": iterations})
        if method not in ("dc", "dsa"):
            del options["loops"]
        if method in ("dsa", "dm"):
            options["augmentation"] = SiameseAugmentation.dsa(self.data.name).strategy
        return CONDENSATIONS[method](self.images_per_class, **options)

    def _schedule(self, method: str, seed: int, data: LabelledImages) -> Schedule:
        """Return the schedule of all sets of a method: as requested, or what fits into the budget."""
        if self.budget is None:
            return Schedule(None, None, tuple(MOMENTS if self.moments is None else self.moments))
        print(f"{method}: timing some iterations and a test", flush=True)
        watch = self._watch(seed, (), None) if self.held_out is not None else None
        make = partial(self._condensation, method, seed)
        names = ("dc", *self.evaluations)
        first, *epochs = (evaluation_options(data.name, self.tests["epochs"], name).epochs for name in names)
        tested = self.networks * sum(epochs) / first / _WATCHING
        schedule, words = fit_schedule(make, data, self.budget, watch, self.moments, tested, self.trainer)
        print(f"{method}: {words}", flush=True)
        write_json(self.output / method / "budget.json", asdict(schedule))
        return schedule

    def _watch(self, seed: int, moments: Sequence[int], folder: Path | None) -> SyntheticEvaluation:
        return SyntheticEvaluation(moments, output=folder, networks=_WATCHING, seed=seed, **self.tests)

    def _configuration(self, method: str, seed: int, data: LabelledImages, schedule: Schedule | None) -> dict[str, Any]:
        iterations = schedule.iterations if schedule is not None else None
        condenses = method in CONDENSATIONS
        return {
            "method": method,
            "data": data.configuration,
            "images_per_class": self.images_per_class,
            "condensation": dict(self._condensation(method, seed, iterations).hparams) if condenses else None,
            "seed": seed,
            "precision": self.trainer.get("precision"),
        }

    def _finished(self, method: str, seed: int, data: LabelledImages, schedule: Schedule | None) -> _Made | None:
        """Return the record of a finished set, or None; a ``ValueError`` if its folder belongs to another set."""
        configuration = self._configuration(method, seed, data, schedule)
        record = read_record(self._folder(method, seed), configuration, _Made)
        return None if record is None else _Made(**record)

    def _make(
        self, method: str, seed: int, data: LabelledImages, schedule: Schedule | None
    ) -> tuple[SyntheticSet, _Made]:
        folder = self._folder(method, seed)
        path = folder / "synthetic.safetensors"
        made = self._finished(method, seed, data, schedule) if self.resume else None
        if made is not None:
            return SyntheticSet.load(path), made
        configuration = self._configuration(method, seed, data, schedule)
        write_json(folder / "run.json", {"configuration": configuration, "row": None})
        if schedule is not None:
            condensation = self._condensation(method, seed, schedule.iterations)
            callbacks: list[Callback] = [SyntheticImages(folder, moments=schedule.moments)]
            if self.held_out is not None and schedule.watches:
                callbacks.insert(0, self._watch(seed, schedule.moments, folder))
            _fit(f"{method} {seed}", condensation, data, folder, callbacks, self.logger, self.trainer)
            synthetic, recipe = condensation.synthetic_set(), Recipe.of(condensation, method)
            made = _Made(condensation.iteration, recipe.seconds)
        else:
            synthetic = CHOICES[method](data, self.images_per_class, seed)
            recipe, made = Recipe(method, seed), _Made(None, 0.0)
            save_figure(synthetic.figure(), folder / "synthetic.png")
        synthetic = replace(synthetic, recipe=replace(recipe, commit=code_version()))
        synthetic.save(path)
        write_json(folder / "run.json", {"configuration": configuration, "row": asdict(made)})
        (folder / "last.ckpt").unlink(missing_ok=True)
        return synthetic, made

    def _test(
        self, synthetic: SyntheticSet, evaluation: str, seed: int, folder: Path
    ) -> tuple[SyntheticSet, Evaluation]:
        """Return the set with its score in the recipe, and the results of the networks."""
        outcome = evaluate(
            synthetic,
            self.data,
            augmentation=evaluation,
            networks=self.networks,
            seed=seed,
            device=self.device,
            progress=self.progress,
            cache=folder / "evaluations",
            **self.tests,
        )
        if self.tests["network"] is None and synthetic.recipe is not None:
            options = evaluation_options(self.data.name, self.tests["epochs"], evaluation)
            score = Score(
                evaluation,
                tuple(outcome.accuracies.tolist()),
                epochs=options.epochs,
                seed=seed,
                precision=self.tests["precision"],
            )
            if synthetic.recipe.score(evaluation) != score:
                synthetic = replace(synthetic, recipe=synthetic.recipe.with_score(score))
                synthetic.save(folder / "synthetic.safetensors")
        return synthetic, outcome

    def _full(self, seed: int) -> None:
        outcome = evaluate_full(
            self.data,
            network=self.tests["network"],
            epochs=self.full_epochs,
            precision=self.tests["precision"],
            seed=seed,
            device=self.device,
            progress=self.progress,
            cache=self.cache if self.cache is not None else self.output / "full" / "evaluations",
        )
        self._add_row("full", None, [outcome], [_Made(None, outcome.training_seconds + outcome.testing_seconds)])

    def _add_row(self, method: str, evaluation: str | None, found: list[Evaluation], made: list[_Made]) -> None:
        """Add a row, or replace the one with fewer sets, and write all rows."""
        self.rows[method, evaluation] = CondensationRow(
            method=method,
            dataset=self.data.name,
            images_per_class=None if method == "full" else self.images_per_class,
            evaluation=evaluation,
            sets=len(found),
            iterations=made[-1].iterations,
            **sum_up(found),
            seconds=math.fsum(one.seconds for one in made) / len(made),
            published_accuracy=self.published.get(evaluation or "") if method in CONDENSATIONS else None,
        )
        write_overview(self.output, list(self.rows.values()))


def of_seed(data: LabelledImages, seed: int) -> LabelledImages:
    """Return the same data set with batches of another seed."""
    other = copy.copy(data)
    other.__dict__.pop("configuration", None)
    other.seed = seed
    return other


def _fit(
    method: str,
    condensation: Condensation,
    data: LabelledImages,
    folder: Path,
    callbacks: list[Callback],
    logger: Logger | bool,
    trainer: dict[str, Any],
) -> None:
    """Condense, resuming from the last checkpoint if there is one."""
    checkpoint = folder / "last.ckpt"
    bar = [CondensationProgressBar(name=method)] if trainer.get("enable_progress_bar", True) else []
    callbacks = [*callbacks, TimedCheckpoint(folder), *bar]
    runner = Trainer(logger=logger, callbacks=callbacks, **trainer_defaults() | {"log_every_n_steps": 1} | trainer)
    runner.fit(condensation, datamodule=data, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
