"""The first picture of the README: shared gradients, and the images that iDLG recovers from them.

    python experiments/idlg/front_picture.py --datasets cifar10 fashion_mnist mnist --victims 2 1 1 \
        --output docs/front.png

Each row is a victim with one test image and its own LeNet. The victims are the first ones of the seed; none is chosen
by its result. The gradient is drawn entry by entry. `--datasets` takes names and folders, as `table1.py` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, Trainer
from torch import Tensor

from leakage.attacks import IDLGAttack
from leakage.cli import quiet
from leakage.datamodules import GroundTruth, Victims
from leakage.plots import plot_gallery, save_figure

MOMENTS = (0, 5, 10, 20, 40)
# Share of the entries, the largest ones, to draw in full colour; most entries are far smaller.
SATURATED = 0.02
BLUE, WHITE, RED = torch.tensor([[0.13, 0.35, 0.75], [1.0, 1.0, 1.0], [0.80, 0.18, 0.15]])


class Moments(Callback):
    """Keep the best iterate of each victim at some of its iterations."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Store the best iterates of all victims in the lanes that have reached a moment."""
        current = pl_module.current()
        for index, (victim, iterations) in enumerate(
            zip(current.ids.tolist(), current.iterations.tolist(), strict=True)
        ):
            for moment in MOMENTS:
                if iterations >= moment:
                    self.seen.setdefault(victim, {}).setdefault(moment, current.images[index, 0].clone())


def gradient_picture(gradient: Tensor) -> Tensor:
    """Draw the entries as a square image: blue below zero, red above, pale near zero."""
    side = int(len(gradient) ** 0.5)
    square = gradient[: side * side].view(side, side)
    scaled = (square / square.abs().quantile(1 - SATURATED)).clamp(-1, 1).abs().sqrt() * square.sign()
    ends = torch.where(scaled[..., None] < 0, BLUE, RED)
    return (WHITE + (ends - WHITE) * scaled.abs()[..., None]).permute(2, 0, 1)


def rows_of(dataset: str, count: int, seed: int) -> list[tuple[list[Tensor | None], list[str]]]:
    """Return images and captions for the first victims of a data set."""
    victims = Victims(dataset, victims=count, seed=seed)
    attack, moments = IDLGAttack(seed=seed), Moments()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[moments], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(attack, datamodule=victims)
    truth = GroundTruth.cat(list(victims.val_dataloader()))
    finished, rows = attack.finished, []
    for victim in range(count):
        shared = victims.share([victim])
        entries = torch.cat([gradient.flatten() for gradient in shared.gradients.values()])
        at = finished.ids.tolist().index(victim)
        score = attack.scores[victim]
        images = [
            gradient_picture(entries),
            *(moments.seen.get(victim, {}).get(moment) for moment in MOMENTS),
            finished.images[at, 0],
            truth.images[truth.ids.tolist().index(victim), 0],
        ]
        captions = [f"{len(entries):,} numbers"] + [""] * len(MOMENTS) + [f"{score.psnr:.0f} dB", ""]
        rows.append((cast("list[Tensor | None]", images), captions))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="front_picture.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", default=["sample"], help="names or folders (default: sample)")
    parser.add_argument("--victims", nargs="+", type=int, default=[4], help="number of rows per data set (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of victims, networks and starts (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="file of the picture")
    given = parser.parse_args(arguments)
    if len(given.victims) != len(given.datasets):
        parser.error(f"Expected `--victims` with a number for each data set, but got {given.victims}.")
    quiet()
    rows = [
        row
        for dataset, count in zip(given.datasets, given.victims, strict=True)
        for row in rows_of(dataset, count, given.seed)
    ]
    moments = [f"{moment}\niterations" for moment in MOMENTS[1:]]
    columns = ["what is shared:\na gradient", "the attack\nbegins", *moments, "the attack\nends", "the private\nimage"]
    figure = plot_gallery(
        [images for images, _ in rows], columns=columns, rows=[""] * len(rows), captions=[line for _, line in rows]
    )
    save_figure(figure, given.output)
    print(given.output)


if __name__ == "__main__":
    main()
