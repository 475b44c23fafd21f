"""One attack on the victims of one client: timed, run within its budget, scored, and kept on disk."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.functional import to_pil_image

from leakage.attacks import GradientInversion
from leakage.audit.client import Client, slug
from leakage.audit.report import Figure, Measured, Planned, VictimRow
from leakage.audit.subject import Subject
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules import SharedGradients
from leakage.datamodules.base import GroundTruth
from leakage.files.records import from_json, to_json
from leakage.files.text import write_json, write_text
from leakage.files.whole import whole_file
from leakage.inversion.reconstruction import Reconstruction
from leakage.labels import LabelReader
from leakage.metrics import (
    MeanOverVictims,
    Scores,
    ShareOverVictims,
    baseline_guesses,
    identified,
    score,
    score_labels,
)

#: What thresholds may be set on; more is worse.
METRICS = ("label_accuracy", "success_rate", "identified", "psnr", "ssim")
_BASELINES = ("grey", "mean_colour", "nearest")
# Images whose pictures are kept, of each kind.
_SHOWN = 8
# Evaluations of a trial that tells how long an attack takes; the first also prepares.
_TRIED = 2
# Victims of the first group, and of later ones at most.
_FIRST_GROUP, _MOST_IN_GROUP = 4, 64


@dataclass
class Outcome:
    """What an attack found, in how many seconds, and whether it came to its end with these victims."""

    found: Reconstruction
    seconds: float
    complete: bool


@dataclass
class Record:
    """An attack that is done, as it is kept on disk.

    Attributes:
        key: of the audit.
        planned: what became of the plan.
        measured: what it found, None if it was not run.
        rows: of every image.
        reached: whether the budget did.
    """

    key: str
    planned: Planned
    measured: Measured | None = None
    rows: list[VictimRow] = field(default_factory=list)
    reached: bool = True


class _Clock(Callback):
    """When each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first begins."""
        self.ends.append(time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """One more."""
        self.ends.append(time.monotonic())

    @property
    def step(self) -> float:
        """Seconds of one; the first also prepares."""
        steps = [after - before for before, after in itertools.pairwise(self.ends)]
        later = steps[1:] or steps or [0.0]
        return sum(later) / len(later)


def fit(
    attack: GradientInversion,
    shared: SharedGradient,
    victim: Victim,
    *,
    accelerator: str,
    seconds: float | None = None,
    steps: int = -1,
    callbacks: tuple[Callback, ...] = (),
) -> Outcome:
    """Run an attack on what clients shared until it ends or its time is over; it sees nothing else."""
    trainer = Trainer(
        max_epochs=1,
        max_steps=steps,
        max_time=None if seconds is None else timedelta(seconds=max(seconds, 0.1)),
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    began = time.monotonic()
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        trainer.fit(attack, datamodule=SharedGradients(shared, victim))
    done = len(attack.finished)
    found = Reconstruction.cat([attack.finished, attack.current()]).map(lambda tensor: tensor.detach().cpu())
    return Outcome(found.select(found.ids.argsort()), time.monotonic() - began, done == len(shared))


def seconds_of_one(attack: GradientInversion, shared: SharedGradient, victim: Victim, *, accelerator: str) -> float:
    """Seconds of one evaluation of one victim, by a short trial.

    Raises:
        ValueError: an attack that can't be run on such victims.
    """
    clock = _Clock()
    fit(attack, shared, victim, accelerator=accelerator, steps=_TRIED, callbacks=(clock,))
    return clock.step / len(shared)


def fit_all(
    make: Callable[[], GradientInversion],
    share: Callable[[Sequence[int]], SharedGradient],
    victim: Victim,
    victims: int,
    *,
    accelerator: str,
    seconds: float,
    expected: float,
    folder: Path,
) -> Outcome:
    """Run an attack on as many victims as the time allows, some after others, each group to its end.

    How many there are is told by the clock alone, so that no victim is left out for what was found of it. Each group
    is kept on disk as soon as it is done.

    Args:
        make: a fresh attack.
        share: what victims at some places shared.
        victim: the client.
        victims: how many there are.
        accelerator: as for the Trainer.
        seconds: of all of it.
        expected: seconds of one victim.
        folder: for the groups.
    """
    parts: list[Reconstruction] = []
    done, spent, size, complete = 0, 0.0, _FIRST_GROUP, True
    while done < victims:
        path = folder / f"{done}.safetensors"
        if path.is_file():
            part = Reconstruction.load(path)
            took = float(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        else:
            each = spent / done if done else expected
            left = seconds - spent
            fitting = int(left / each) if each > 0 else victims
            if done and fitting < 1:
                break
            number = max(1, min(size, fitting, victims - done))
            shared = share(range(done, done + number))
            outcome = fit(make(), shared, victim, accelerator=accelerator, seconds=left)
            part, took = outcome.found, outcome.seconds
            if not outcome.complete:
                if done:
                    break
                complete = False
            else:
                write_json(path.with_suffix(".json"), took)
                part.save(path)
        parts.append(part)
        done, spent, size = done + len(part), spent + took, min(2 * size, _MOST_IN_GROUP)
        if not complete:
            break
    return Outcome(Reconstruction.cat(parts), spent, complete)


def read_labels(reader: LabelReader, shared: SharedGradient, victim: Victim) -> tuple[Tensor, float]:
    """Counts ``(V, K)`` of the labels of victims, and the seconds that it took."""
    began = time.monotonic()
    counts = reader(shared, victim.as_told()).counts
    return counts, time.monotonic() - began


def measure_labels(client: Client, truth: GroundTruth | None, counts: Tensor, seconds: float) -> Measured:
    """What reading labels alone found."""
    metrics = {}
    if truth is not None:
        share = torch.tensor([one.irec for one in score_labels(counts, truth.labels)], dtype=torch.float64)
        metrics["label_accuracy"] = _figure(ShareOverVictims, share)
    return Measured(
        client=client.name,
        attack="labels",
        adaptive=bool(client.defenses),
        images=client.images,
        victims=len(counts),
        iterations=0.0,
        seconds=seconds,
        metrics=metrics,
        baselines={},
        worst=[],
    )


def measure(
    name: str,
    client: Client,
    subject: Subject,
    outcome: Outcome,
    truth: GroundTruth | None,
    *,
    success_threshold: float,
    folder: Path,
) -> tuple[Measured, list[VictimRow]]:
    """Score what an attack found against the truth, beside guesses without a gradient, and keep pictures.

    Where nobody knows the truth there is nothing to score: rows have NaN, and pictures of what was found.
    """
    found = outcome.found
    if truth is None:
        metrics, baselines = dict[str, Figure](), dict[str, Figure]()
        rows = _rows_without_truth(name, client, found, folder)
    else:
        metrics, baselines, rows = _scored(name, client, subject, found, truth, success_threshold, folder)
    measured = Measured(
        client=client.name,
        attack=name,
        adaptive=bool(client.defenses) and name != "rgap",
        images=client.images,
        victims=len(found),
        iterations=float(found.evaluations.double().mean()),
        seconds=outcome.seconds,
        metrics=metrics,
        baselines=baselines,
        worst=sorted(rows, key=lambda one: -one.psnr)[:_SHOWN],
    )
    return measured, rows


def _scored(
    name: str,
    client: Client,
    subject: Subject,
    found: Reconstruction,
    truth: GroundTruth,
    success_threshold: float,
    folder: Path,
) -> tuple[dict[str, Figure], dict[str, Figure], list[VictimRow]]:
    scores = score(found.images, found.labels, truth.images, truth.labels)
    victim = torch.arange(len(truth))[:, None]
    images, labels = found.images[victim, scores.order], found.labels[victim, scores.order]
    told = identified_of_class(images, truth, subject)
    guesses = baseline_guesses(truth.images, subject.own_images)
    guessed = torch.stack(
        [score(guesses[kind], truth.labels, truth.images, truth.labels).psnr for kind in _BASELINES]
    ).double()
    success = scores.mse < success_threshold
    metrics = {
        "label_accuracy": _figure(ShareOverVictims, scores.label_correct.double().mean(1)),
        "success_rate": _figure(ShareOverVictims, success.double().mean(1)),
        "identified": _figure(ShareOverVictims, told.double().mean(1)),
        "psnr": _figure(MeanOverVictims, scores.psnr.double().mean(1)),
        "ssim": _figure(MeanOverVictims, scores.ssim.double().mean(1)),
    }
    baselines = {kind: _figure(MeanOverVictims, one.mean(1)) for kind, one in zip(_BASELINES, guessed, strict=True)}
    best, shown = guessed.argmax(0), _shown(scores)
    rows: list[VictimRow] = []
    for row, column in itertools.product(range(len(truth)), range(client.images)):
        place = (row, column)
        guess = guesses[_BASELINES[int(best[place])]]
        drawn = {"truth": truth.images, "reconstruction": images, "guess": guess} if place in shown else {}
        stem = f"{slug(client.name)}-{name}-{int(truth.ids[row])}-{column}"
        paths = {kind: _draw(pictures[place], folder, f"{stem}-{kind}") for kind, pictures in drawn.items()}
        rows.append(
            VictimRow(
                client=client.name,
                attack=name,
                victim=int(truth.ids[row]),
                image=column,
                label=int(truth.labels[place]),
                label_found=int(labels[place]),
                psnr=float(scores.psnr[place]),
                mse=float(scores.mse[place]),
                ssim=float(scores.ssim[place]),
                success=bool(success[place]),
                identified=bool(told[place]),
                baseline=float(guessed.amax(0)[place]),
                **(dict.fromkeys(("truth", "reconstruction", "guess"), "") | paths),
            )
        )
    return metrics, baselines, rows


def _rows_without_truth(name: str, client: Client, found: Reconstruction, folder: Path) -> list[VictimRow]:
    rows: list[VictimRow] = []
    for row, column in itertools.product(range(len(found)), range(client.images)):
        number, path = int(found.ids[row]), ""
        if len(rows) < _SHOWN:
            stem = f"{slug(client.name)}-{name}-{number}-{column}"
            path = _draw(found.images[row, column], folder, f"{stem}-reconstruction")
        rows.append(
            VictimRow(
                client=client.name,
                attack=name,
                victim=number,
                image=column,
                label=-1,
                label_found=int(found.labels[row, column]),
                psnr=math.nan,
                mse=math.nan,
                ssim=math.nan,
                success=False,
                identified=False,
                baseline=math.nan,
                truth="",
                reconstruction=path,
                guess="",
            )
        )
    return rows


def identified_of_class(images: Tensor, truth: GroundTruth, subject: Subject) -> Tensor:
    """``(V, N)``, whether each image is told from the auditor's images of its class; from all, where there are none."""
    told = torch.zeros(truth.labels.shape, dtype=torch.bool)
    for label in sorted({*truth.labels.flatten().tolist()}):
        others = subject.own_images[subject.own_labels == label]
        here = truth.labels == label
        pair = images[here][:, None], truth.images[here][:, None]
        told[here] = identified(*pair, others if len(others) else subject.own_images)[:, 0]
    return told


def fewest_others(subject: Subject) -> int:
    """The images that the rarest class of the auditor's has, so that a guess identifies no more than 1 in that + 1."""
    counts = subject.own_labels.bincount()
    return int(counts[counts > 0].min())


def _figure(kind: type[MeanOverVictims | ShareOverVictims], values: Tensor) -> Figure:
    return Figure(*kind()(values))


def _shown(scores: Scores) -> set[tuple[int, int]]:
    """Places of the images that leak most, and of those nearest to the median."""
    flat = scores.psnr.flatten()
    most = flat.argsort(descending=True)[:_SHOWN]
    typical = (flat - flat.median()).abs().argsort()[: 2 * _SHOWN]
    typical = torch.tensor([place for place in typical.tolist() if place not in set(most.tolist())][:_SHOWN])
    width = scores.psnr.shape[1]
    return {(place // width, place % width) for place in (*most.tolist(), *typical.long().tolist())}


def _draw(image: Tensor, folder: Path, name: str) -> str:
    """Keep a picture; its path within the folder."""
    path = f"images/{name}.png"
    with whole_file(folder / path) as partial:
        to_pil_image(image.float().nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)).save(partial, format="PNG")
    return path


def save_record(folder: Path, record: Record) -> None:
    """Write it, so that an audit that is killed goes on behind it."""
    path = _record_path(folder, record.planned.client, record.planned.attack)
    write_text(path, json.dumps(to_json(record), allow_nan=False) + "\n")


def load_record(folder: Path, client: str, attack: str, key: str) -> Record | None:
    """One that is there, of the same attack on the same victims; None if there is none.

    Raises:
        ValueError: a file that is damaged, or of another audit.
    """
    path = _record_path(folder, client, attack)
    if not path.is_file():
        return None
    mend = f"Remove '{folder}', or choose another folder."
    try:
        record = from_json(Record, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected '{path}' as an audit writes it, but got: {error} {mend}") from None
    if record.key != key:
        raise ValueError(f"Expected `output` without another audit, but got '{path}' of one. {mend}")
    return record


def _record_path(folder: Path, client: str, attack: str) -> Path:
    return folder / "runs" / slug(client) / f"{attack}.json"
