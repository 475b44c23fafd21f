"""Files that show several methods at once, each made from the files of the single ones."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.files.text import write_text
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import score
from leakage.plots import plot_fidelity, plot_gallery, save_figure

# As the papers write the methods, in pictures and tables; others go by the name they are given.
WRITTEN = {"dlg": "DLG", "idlg": "iDLG", "rgap": "R-GAP", "gauss_newton": "Gauss-Newton"}
_GALLERY_ROWS = 8


def write_overview(folder: Path, names: list[str], victims: VictimDataModule, dataset: str) -> None:
    """What shows all methods at once, made from the files of each, so that resumed methods are in it."""
    tables = {}
    for name in names:
        tables[name] = _read_table(folder / name / "victims.csv", victims.victims)
    columns = list(tables[names[0]][0])
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["method", *columns])
    for name, table in tables.items():
        for row in table:
            writer.writerow([name, *(row[column] for column in columns)])
    write_text(folder / "victims.csv", text.getvalue())
    curves = {
        WRITTEN.get(name, name): torch.tensor([float(row["mse"]) for row in table]) for name, table in tables.items()
    }
    save_figure(plot_fidelity(curves, title=f"{dataset}: fidelity of the reconstructions"), folder / "fidelity.png")
    _gallery(folder, names, victims, dataset)


def _read_table(path: Path, victims: int) -> list[dict[str, str]]:
    """The rows that :class:`~leakage.callbacks.VictimTable` has written of all victims, in their order."""
    damaged = f"Expected '{path}' to be the whole table of {victims} victims, but got"
    if not path.is_file():
        raise ValueError(f"{damaged} no such file. Remove '{path.parent}' to run this method again.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        numbers = [(int(row["victim"]), float(row["mse"])) for row in rows]
    except (KeyError, TypeError, ValueError):
        numbers = []
    # A line cut short lacks values.
    if sorted(victim for victim, _ in numbers) != list(range(victims)) or any(None in row.values() for row in rows):
        raise ValueError(f"{damaged} another file. Remove '{path.parent}' to run this method again.")
    return sorted(rows, key=lambda row: int(row["victim"]))


def _gallery(folder: Path, names: list[str], victims: VictimDataModule, dataset: str) -> None:
    """The truth and every method's reconstruction of the first victims, a row for each image."""
    truth = _first_victims(victims)
    rows = [f"victim {victim}" for victim in truth.ids.tolist() for _ in range(victims.victim.protocol.num_images)]
    images: list[list[Tensor]] = [[image] for image in truth.images.flatten(0, 1)]
    captions = [[f"label {label}"] for label in truth.labels.flatten().tolist()]
    for name in names:
        parts = sorted((folder / name / "reconstructions").glob("part_*.safetensors"))
        place: dict[int, int] = {}
        if parts:
            found = Reconstruction.cat([Reconstruction.load(path) for path in parts])
            place = {victim: index for index, victim in enumerate(found.ids.tolist())}
        if not place.keys() >= set(truth.ids.tolist()):
            raise ValueError(
                f"Expected '{folder / name / 'reconstructions'}' to hold the reconstructions of all victims, but got "
                f"{len(place)} of them. Remove '{folder / name}' to run this method again."
            )
        found = found.select(torch.tensor([place[victim] for victim in truth.ids.tolist()]))
        scores = score(found.images.to(truth.images), found.labels, truth.images, truth.labels)
        # Each image beside the true one that it was paired with for its scores.
        victim = torch.arange(len(found))[:, None]
        paired, labels = found.images[victim, scores.order], found.labels[victim, scores.order]
        for row, image in enumerate(paired.flatten(0, 1)):
            images[row].append(image)
        for row, (psnr, label) in enumerate(
            zip(scores.psnr.flatten().tolist(), labels.flatten().tolist(), strict=True)
        ):
            captions[row].append(f"{psnr:.1f} dB, label {label}")
    figure = plot_gallery(
        images[:_GALLERY_ROWS],
        columns=["truth", *(WRITTEN.get(name, name) for name in names)],
        rows=rows[:_GALLERY_ROWS],
        captions=captions[:_GALLERY_ROWS],
        title=f"{dataset}: what the gradient gave away",
    )
    save_figure(figure, folder / "gallery.png")


def _first_victims(victims: VictimDataModule) -> GroundTruth:
    parts: list[GroundTruth] = []
    for batch in victims.val_dataloader():
        parts.append(batch)
        if sum(map(len, parts)) >= _GALLERY_ROWS:
            break
    truth = GroundTruth.cat(parts)
    return GroundTruth(truth.ids[:_GALLERY_ROWS], truth.images[:_GALLERY_ROWS], truth.labels[:_GALLERY_ROWS])
