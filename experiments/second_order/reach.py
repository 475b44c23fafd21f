r"""Limits of the second-order attack: its success and run time compared with L-BFGS on the same victims.

    python experiments/second_order/reach.py --dataset mnist --images 1 2 4 8 --labels random equal \
        --methods gauss_newton rgap idlg idlg_published --output results/reach
    python experiments/second_order/reach.py --dataset mnist --activations sigmoid silu relu --init torch \
        --epochs 0 1 5 20 --output results/trained
    python experiments/second_order/reach.py --dataset mnist --noise 0 1e-6 1e-5 1e-4 1e-3 1e-2 --half \
        --output results/noise

One call covers all cells: combinations of data sets, networks, activations, training epochs, labels, noise and numbers
of images. The attacker knows the labels (with `--infer-labels`, it infers them from the gradient). Small untrained
networks are drawn anew for each victim. Trained networks are shared, and were not trained on the victims' images.
Methods that cannot be used in a cell are skipped, and the reason is printed.

Files in the output folder: `summary.json`, with a row for each cell and method; `reach.png`, success over the number of
equations per unknown; `noise.png`, the MSE over the noise, if there is some; and a folder per cell, written as by
`experiments/comparison`. The cell's `why/run.json` has measurements on some victims on which `gauss_newton` failed, and
some that it solved; the reason for failures is derived from them (see why.py).

To continue an interrupted run, repeat the command with `--resume`; its results are those of an uninterrupted run.
Without `--resume`, a folder that holds results is refused, so that none are lost by mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reach_options import check_given, make_attack, make_cells, make_parser  # in the folder of this script
from reach_results import ReachRow, draw_pictures, format_table, make_row
from reach_victims import Cell, make_network, make_victims
from why import FOUND, Diagnosis, diagnose, summarise

from leakage.cli import quiet
from leakage.closed_form import check_layers
from leakage.comparison import Row as ComparedRow
from leakage.comparison import read_reconstructions
from leakage.datamodules import GroundTruth, LabelledImages, VictimDataModule
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import score

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from comparing import compare
from records import holds_results, read_record


@dataclass
class Record:
    """Diagnoses of some victims of a cell, as stored in its folder."""

    diagnoses: list[dict[str, Any]]
    verdict: str | None


class Reach:
    """All cells of a run: prepared and checked, then attacked one by one.

    Raises:
        ValueError: if options contradict one another or do not fit the data.
        OSError: if a folder cannot be written.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        check_given(given)
        self.methods = list(dict.fromkeys(given.methods))
        for method in self.methods:
            make_attack(method, given)
        self.data: dict[str, LabelledImages] = {}
        for dataset in dict.fromkeys(given.dataset):
            data = LabelledImages(dataset, root=given.root, image_size=given.image_size, seed=given.seed)
            self.data[data.name] = data
        check_output(given.output)
        if not given.resume and any(map(holds_results, (given.output, *given.output.glob("*/")))):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue that run, or choose another folder."
            )
        for data in self.data.values():
            data.prepare_data()
            data.setup("fit")
        self.cells = make_cells(given, list(self.data))
        for cell in self.cells:
            self._check(cell)

    def _check(self, cell: Cell) -> None:
        """Raise a ``ValueError`` if there are too few images or the network does not exist."""
        data, given = self.data[cell.dataset], self.given
        network = make_network(dataclasses.replace(cell, epochs=0), given, data)
        if cell.epochs:
            trained_on = given.train_images or len(data.train) // 2
            if trained_on >= len(data.train):
                raise ValueError(
                    f"Expected `--train-images` below {len(data.train)}, the training images of {cell.dataset!r}, "
                    f"because victims need the rest, but got {trained_on}."
                )
            if given.train_images:
                network.images = network.images[: len(data.train) - trained_on]
        make_victims(cell, given, data, network).setup("fit")

    def run(self) -> list[ReachRow]:
        """Attack all cells, and write the results after each."""
        rows: list[ReachRow] = []
        for number, cell in enumerate(self.cells):
            print(f"{number + 1} of {len(self.cells)}: {self.given.victims} victims, {cell}", flush=True)
            rows += self._attack(cell)
            write_json(self.given.output / "summary.json", [asdict(row) for row in rows])
        return rows

    def _attack(self, cell: Cell) -> list[ReachRow]:
        given, folder = self.given, self.given.output / cell.folder
        network = make_network(cell, given, self.data[cell.dataset])
        victims = make_victims(cell, given, self.data[cell.dataset], network)
        victims.setup("fit")
        attacks = {name: make_attack(name, given) for name in self.methods if self._can_be_used(name, victims)}
        if not attacks:
            return []
        compared = compare(
            attacks,
            victims,
            folder,
            dataset=cell.dataset,
            resume=given.resume,
            accelerator=given.accelerator,
            devices=1,
            precision=given.precision,
            enable_progress_bar=sys.stderr.isatty(),
        )
        truth = GroundTruth.cat(list(victims.val_dataloader()))
        state = victims.victim.state
        columns = {
            "init": given.init,
            "own_weights": network.own,
            "test_accuracy": network.accuracy,
            "equations": sum(state[name].numel() for name in victims.victim.trainable),
            "unknowns": truth.images[0].numel(),
        }
        rows = []
        for row in compared:
            found = read_reconstructions(folder / row.method, truth.ids.tolist())
            scores = score(found.images.to(truth.images), found.labels, truth.images, truth.labels)
            verdict = None
            if row.method == "gauss_newton" and given.why:
                configuration = {"attack": {**attacks[row.method].hparams}, "data": victims.configuration}
                verdict = self._why(cell, victims, configuration, found, scores.order, scores.mse, truth)
            seconds = row.seconds / len(truth)
            rows.append(
                make_row(
                    cell, scores.mse, found.evaluations, method=row.method, seconds_per_victim=seconds, verdict=verdict,
                    **columns,
                )
            )  # fmt: skip
            self._tell(row, rows[-1])
        return rows

    def _can_be_used(self, method: str, victims: VictimDataModule) -> bool:
        if method == "rgap":
            try:
                check_layers(victims.victim)
            except ValueError as error:
                print(f"rgap is skipped: {error}", flush=True)
                return False
        return True

    def _why(
        self,
        cell: Cell,
        victims: VictimDataModule,
        configuration: dict[str, Any],
        found: Reconstruction,
        order: torch.Tensor,
        mse: torch.Tensor,
        truth: GroundTruth,
    ) -> str | None:
        """Return the verdict from measurements on some victims, which are read from the folder if present."""
        folder = self.given.output / cell.folder / "why"
        configuration = {**configuration, "victims": self.given.why, "precision": self.given.precision}
        if self.given.resume and (record := read_record(folder, configuration, Record)) is not None:
            return record["verdict"]
        solved = (mse < FOUND).all(1)
        chosen = [*(~solved).nonzero()[: self.given.why, 0].tolist(), *solved.nonzero()[: self.given.why, 0].tolist()]
        diagnoses: list[Diagnosis] = []
        for row in chosen:
            victim = int(truth.ids[row])
            diagnoses.append(
                diagnose(
                    victims.share(range(victim, victim + 1)),
                    victims.victim,
                    truth.labels[row],
                    truth.images[row],
                    found.images[row, order[row]],
                    noise=cell.noise,
                    half=cell.half,
                )
            )
        verdict = summarise(diagnoses)
        row = {"diagnoses": [asdict(one) for one in diagnoses], "verdict": verdict}
        write_json(folder / "run.json", {"configuration": configuration, "row": row})
        return verdict

    @staticmethod
    def _tell(compared: ComparedRow, row: ReachRow) -> None:
        print(
            f"  {row.method}: {100 * row.below_1e4:.0f} % of the images below 1e-4, median MSE {row.mse_median:.1e}, "
            f"{row.seconds_per_victim:.2f} s per victim{f'; {row.verdict}' if row.verdict else ''}",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    given = parser.parse_args(arguments)
    quiet()
    try:
        reach = Reach(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        rows = reach.run()
        if not rows:
            raise ValueError(f"Expected `--methods` that can be used in at least one cell, but got {given.methods}.")
        pictures = draw_pictures(rows, given.output)
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for path in (given.output / "summary.json", *pictures):
        print(path)


if __name__ == "__main__":
    main()
