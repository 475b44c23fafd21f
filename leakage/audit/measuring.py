"""Scores of an attack against the truth and against guesses that look at no gradient, with pictures."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from leakage.audit.client import Client, slug
from leakage.audit.report import Figure, Measured, VictimRow
from leakage.audit.run import Outcome
from leakage.audit.subject import Subject
from leakage.datamodules.base import GroundTruth
from leakage.files.whole import whole_file
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import (
    MeanOverVictims,
    Scores,
    ShareOverVictims,
    baseline_guesses,
    identified,
    score,
    score_labels,
)

#: The metrics that limits can be set for. Higher is worse.
METRICS = ("label_accuracy", "success_rate", "identified", "psnr", "ssim")
_BASELINES = ("grey", "mean_colour", "nearest")
# The number of images whose pictures are kept: this many worst and this many typical ones.
_SHOWN = 8


def measure_labels(client: Client, truth: GroundTruth | None, counts: Tensor, seconds: float) -> Measured:
    """Score the labels that were read off the last layer."""
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
    """Score what an attack found against the truth and against guesses without a gradient, and keep pictures.

    Without ground truth there is nothing to score: the rows hold NaN and pictures of what was found.

    Returns:
        The figures of the attack, and one row per image.
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
    others = subject.own_classes
    classes = None if others is None else (truth.labels, others)
    known = identified(images, truth.images, subject.own_images, classes=classes)
    guesses = baseline_guesses(truth.images, subject.own_images)
    guessed = torch.stack(
        [score(guesses[kind], truth.labels, truth.images, truth.labels).psnr for kind in _BASELINES]
    ).double()
    success = scores.mse < success_threshold
    metrics = {
        "label_accuracy": _figure(ShareOverVictims, scores.label_correct.double().mean(1)),
        "success_rate": _figure(ShareOverVictims, success.double().mean(1)),
        "identified": _figure(ShareOverVictims, known.double().mean(1)),
        "psnr": _figure(MeanOverVictims, scores.psnr.double().mean(1)),
        "ssim": _figure(MeanOverVictims, scores.ssim.double().mean(1)),
    }
    if others is None:  # labels are numbers that attackers know
        del metrics["label_accuracy"]
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
                label=-1 if others is None else int(truth.labels[place]),
                label_found=-1 if others is None else int(labels[place]),
                psnr=float(scores.psnr[place]),
                mse=float(scores.mse[place]),
                ssim=float(scores.ssim[place]),
                success=bool(success[place]),
                identified=bool(known[place]),
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


def fewest_others(subject: Subject) -> int:
    """Number of the auditor's images of the rarest class: a guess identifies at most 1 in this number plus 1."""
    if (classes := subject.own_classes) is None:
        return len(subject.own_images)
    counts = classes.bincount()
    return int(counts[counts > 0].min())


def _figure(kind: type[MeanOverVictims | ShareOverVictims], values: Tensor) -> Figure:
    return Figure(*kind()(values))


def _shown(scores: Scores) -> set[tuple[int, int]]:
    """Indices of the images that leak most, and of those with a PSNR near the median."""
    flat = scores.psnr.flatten()
    most = flat.argsort(descending=True)[:_SHOWN]
    typical = (flat - flat.median()).abs().argsort()[: 2 * _SHOWN]
    typical = torch.tensor([place for place in typical.tolist() if place not in set(most.tolist())][:_SHOWN])
    width = scores.psnr.shape[1]
    return {(place // width, place % width) for place in (*most.tolist(), *typical.long().tolist())}


def _draw(image: Tensor, folder: Path, name: str) -> str:
    """Write a picture and return its path within the folder."""
    path = f"images/{name}.png"
    with whole_file(folder / path) as partial:
        to_pil_image(image.float().nan_to_num(0.5, 1.0, 0.0).clamp(0, 1)).save(partial, format="PNG")
    return path
