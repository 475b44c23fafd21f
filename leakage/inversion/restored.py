"""Whether what a checkpoint holds of an attack fits together, before the attack goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from leakage.errors import check_count
from leakage.files.checkpoints import check_like
from leakage.files.tensors import brief
from leakage.inversion.reconstruction import Reconstruction


def check_lanes(
    saved: Mapping[str, Any], found: Mapping[str, Any], unknowns: Mapping[str, nn.Parameter], *, classes: int
) -> None:
    """Raise a ``ValueError`` unless lanes and unknowns have the names, shapes and types that they should.

    Args:
        saved: the attack's part of the checkpoint.
        found: the Trainer's ``state_dict``.
        unknowns: the attack's parameters, with any number of lanes; the images ``(V, N, C, H, W)`` come first.
        classes: K.
    """
    victims = 0 if saved["shared"] is None else len(saved["shared"]["ids"])
    dtype = torch.float64 if saved["precision"] == "64-true" else torch.float32
    like = {name: torch.empty(victims, *tensor.shape[1:], dtype=dtype) for name, tensor in unknowns.items()}
    check_like("the unknowns", found, like)
    if not victims:
        if saved["lanes"]:
            raise ValueError(
                f"Expected no lanes of a checkpoint without victims, but got {brief(saved['lanes'].keys())}."
            )
        return
    images = next(iter(like.values()))
    numbers = torch.empty(victims, dtype=dtype)
    whole = torch.empty(victims, dtype=torch.long)
    # Class probabilities; nothing where they are searched for, too.
    fixed = torch.empty(victims, images.shape[1], classes, dtype=dtype) if len(like) == 1 else torch.empty(victims, 0)
    lanes = {
        "place": whole, "scale": numbers, "fixed": fixed,
        "restarts": whole, "iterations": whole, "evaluations": whole, "best_loss": numbers, "best_images": images,
        "best_labels": torch.empty(images.shape[:2], dtype=torch.long),
    }  # fmt: skip
    check_like("the lanes", saved["lanes"], lanes)
    for name in ("restarts", "iterations", "evaluations", "best_labels"):
        if bool((saved["lanes"][name] < 0).any()):
            raise ValueError(f"Expected the lanes of a checkpoint with {name!r} of at least 0, but got less.")


def check_victims(saved: Mapping[str, Any], expected: int) -> None:
    """Raise a ``ValueError`` unless each victim is in one place at most: waiting, in a lane or done."""
    check_count(0, iteration=saved["iteration"], most_lanes=saved["most_lanes"], asked_at=saved["asked_at"] + 1)
    lanes = saved["lanes"]["place"].tolist() if saved["lanes"] else []
    places: Sequence[int] = [*saved["queue"], *saved["asked"], *lanes, *saved["finished_places"]]
    for place in places:
        check_count(0, place=place)
    if len(set(places)) < len(places) or max(places, default=0) >= expected:
        raise ValueError(
            f"Expected each of {expected} victims of a checkpoint once, waiting, in a lane or done, but got "
            f"{brief(sorted(places))}."
        )


def check_results(saved: Mapping[str, Any], images: Tensor, *, classes: int) -> None:
    """Raise a ``ValueError`` unless reconstructions and scores are as an attack on such ``images`` makes them."""
    done = 0
    for part in saved["finished"]:
        dtype, victims = part["images"].dtype, len(part["ids"])
        like = dict.fromkeys([field.name for field in fields(Reconstruction)], torch.empty(victims, dtype=torch.long))
        like |= {
            "images": torch.empty(victims, *images.shape[1:], dtype=dtype),
            "labels": torch.empty(victims, images.shape[1], dtype=torch.long),
            "loss": torch.empty(victims, dtype=dtype),
        }
        check_like("the reconstructions", part, like)
        if not dtype.is_floating_point or bool(((part["labels"] < 0) | (part["labels"] >= classes)).any()):
            raise ValueError("Expected reconstructions of a checkpoint as real images and classes, but got others.")
        done += victims
    if done != len(saved["finished_places"]):
        raise ValueError(f"Expected {len(saved['finished_places'])} reconstructions of a checkpoint, but got {done}.")
    for victim, score in saved["scores"].items():
        check_count(0, victim=victim)
        for name, value in score.items():
            if type(value) is not (bool if name == "final" else float):
                raise ValueError(
                    f"Expected the score {name!r} of a checkpoint as a number, but got {brief(repr(value))}."
                )
