r"""Privacy against accuracy: what attackers find behind each defense, with and without knowing it, and its cost.

    python experiments/defenses/tradeoff.py --dataset fashion_mnist --network lenet --victims 10 \
        --defenses none gaussian_noise clip top_k quantise sign soteria --attacks gauss_newton \
        --output results/defenses
    python experiments/defenses/tradeoff.py --dataset data/cifar10 --network convnet --victims 10 \
        --defenses none dp_sgd --attacks inverting_gradients --rounds 300 --output results/dp

The attacks are `gauss_newton`, `idlg`, `inverting_gradients`, `continuation`, and `gauss_newton_prior`, which also uses
a prior fitted to the training images. Each attack is run twice against every strength of every defense: by a naive
attacker, who treats what was shared as the gradient, and by an adaptive one, who knows the defense (`--attackers`).
Where knowledge changes nothing, as with noise, one run counts for both. Victims hold test images. If the network is
untrained and has up to half a million weights, each victim has a newly drawn one; larger and trained networks are
shared. The attacker knows the labels, unless `--infer-labels` is given. Secure aggregation over m clients is attacked
as one client with m times as many images. It is not part of the training, where it changes nothing.

With `--rounds`, a network is trained under each defense: every client shares a defended gradient in each round. There
are `--seeds` starts, and the learning rate is chosen for the defense on held-out training images. The test accuracy
shows the cost of the defense. A star marks a PSNR that is not above that of the best guess without any gradient (a grey
image, the image's own mean colour, the nearest training image). An image is *identified* if its reconstruction is
nearer to it than to any of `--others` training images of its class. For DP-SGD, the table also has epsilon and the
bound on this share. Scores compare with the clients' original images, also where the clients encode them (MixUp, ATS);
`psnr_encoded` of `summary.json` compares with the encoded images.

Files in the output folder: `summary.json`, with an entry for each defense, strength, attack and kind of attacker;
`table.md`, a table of the best attack of each kind of attacker; `attackers.png`; with `--rounds`, also `tradeoff.png`;
and the folder `cells`, with a comparison of attacks for each defense and strength. To continue an interrupted run,
repeat the command with `--resume`; it may then have other defenses, attacks and rounds, and more seeds. Without
`--resume`, a folder that holds results is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from defended_training import Federation, accuracies_under  # three modules in this folder
from torch import Tensor
from torch.nn import functional as F
from tradeoff_defenses import DEFENSES, Cell
from tradeoff_rows import TradeoffRow, format_page, format_table, plot_attackers, plot_tradeoff

from leakage.attacks import (
    ContinuationAttack,
    GaussNewtonAttack,
    GradientInversion,
    IDLGAttack,
    InvertingGradientsAttack,
)
from leakage.audit.bounds import gaussian_success_bound
from leakage.cli import quiet
from leakage.comparison import Row, read_reconstructions
from leakage.datamodules import GroundTruth, LabelledImages, Victims, in_unit_range
from leakage.defenses import DPSGD, Encoding, encoded, size_sent
from leakage.errors import check_count, check_share
from leakage.files.text import write_json, write_text
from leakage.files.whole import check_output
from leakage.labels import Auxiliary
from leakage.metrics import MeanOverVictims, ShareOverVictims, baseline_guesses, identified, score
from leakage.objectives import GaussianPrior
from leakage.plots import save_figure
from leakage.seeds import derive_seed

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("comparison", "inverting_gradients")]
from comparing import compare
from records import holds_results
from table_networks import WRITTEN, Network, add_attack_options, add_options, make_network

ATTACKS: dict[str, Callable[..., GradientInversion]] = {
    "continuation": ContinuationAttack,
    "gauss_newton": GaussNewtonAttack,
    "gauss_newton_prior": GaussNewtonAttack,
    "idlg": IDLGAttack,
    "inverting_gradients": InvertingGradientsAttack,
}
ATTACKERS = ("naive", "adaptive")
# Options that may change when a run is resumed; all others determine its results.
_MAY_CHANGE = {
    *(
        "output",
        "resume",
        "defenses",
        "strengths",
        "attacks",
        "attackers",
        "rounds",
        "seeds",
        "trained",
        "root",
        "networks",
        "lanes",
    ),
    *("accelerator", "delta", "iterations", "protocol", "infer_labels"),  # `compare` checks the last three
}


class Tradeoff:
    """Prepares and checks the victims, defenses and attacks, then runs them.

    Raises:
        ValueError: the options don't go together, or don't fit the data.
        OSError: a folder can't be written.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        check_count(victims=given.victims, images=given.images, others=given.others, seeds=given.seeds)
        check_count(0, epochs=given.epochs, rounds=given.rounds, seed=given.seed)
        check_share(delta=given.delta)
        if not given.defenses:
            given.defenses = [name for name, kind in DEFENSES.items() if given.images >= kind.images]
        if given.strengths and len(given.defenses) != 1:
            raise ValueError(
                f"Expected `--strengths` with a single defense, as they are in its unit, but got {given.defenses}."
            )
        self.cells = [
            Cell(name, strength, DEFENSES[name].make(strength))
            for name in dict.fromkeys(given.defenses)
            for strength in given.strengths or DEFENSES[name].strengths
        ]
        for cell in self.cells:
            if cell.clients < 1 or (DEFENSES[cell.name].aggregates and cell.clients != cell.strength):
                raise ValueError(
                    f"Expected `--strengths` of {cell.name} to be numbers of clients, but got {cell.strength:g}."
                )
        self.data = LabelledImages(
            given.dataset, root=given.root, image_size=given.image_size, benchmark=given.benchmark, seed=given.seed
        )
        check_output(given.output)
        record = given.output / "options.json"
        if not given.resume and (holds_results(given.output) or record.is_file()):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue with them, or choose another folder."
            )
        self.options = {name: str(value) for name, value in sorted(vars(given).items()) if name not in _MAY_CHANGE}
        self.options["federation"] = str(Federation())
        if record.is_file():
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if differing := [name for name in self.options if earlier.get(name) != self.options[name]]:
                differences = ", ".join(
                    f"{name}={self.options[name]} instead of {earlier.get(name)}" for name in differing
                )
                raise ValueError(f"Expected the options of the run in '{given.output}', but got {differences}.")
        self.data.prepare_data()
        self.data.setup("fit")
        if given.others > len(self.data.train):
            raise ValueError(
                f"Expected `--others` of at most {len(self.data.train)}, the training images of {self.data.name!r}, "
                f"but got {given.others}."
            )
        # Check everything before anything is trained.
        network = make_network(given, self.data, epochs=0)
        for cell in self.cells:
            self._victims(network, cell).setup("fit")
        for name in given.attacks:
            self._attack(name, adaptive=True)
        self.public = in_unit_range(self.data.train.images)
        self.baselines: dict[int, float] = {}  # by number of aggregated clients
        write_json(record, self.options)

    def run(self) -> list[TradeoffRow]:
        """Attack and train, and write the results after every cell, so that nothing is lost."""
        given, rows = self.given, []
        network = make_network(given, self.data, given.epochs)
        for cell in self.cells:
            print(DEFENSES[cell.name].named(cell.strength), flush=True)
            rows += self._cell(network, cell)
            write_json(given.output / "summary.json", [asdict(row) for row in rows])
        epochs = f"after {given.epochs} epochs" if given.epochs else "untrained"
        number = "one image" if given.images == 1 else f"{given.images} images"
        title = f"{self.data.name}, {WRITTEN[given.network]}, {epochs}, {number}, {given.victims} victims"
        write_text(given.output / "table.md", format_page(rows))
        save_figure(plot_attackers(rows, title), given.output / "attackers.png")
        if given.rounds:
            save_figure(plot_tradeoff(rows, title), given.output / "tradeoff.png")
        return rows

    def _victims(self, network: Network, cell: Cell) -> Victims:
        given, model = self.given, cell.network(network.model)
        return Victims(
            self.data.test,
            num_classes=self.data.num_classes,
            victims=given.victims,
            images=given.images * cell.clients,
            seed=given.seed,
            lanes=given.lanes,
            model=model,
            weights="own" if network.own else "shared",
            reveal_labels=not given.infer_labels,
            defenses=cell.on(model),
        )

    def _attack(self, name: str, *, adaptive: bool) -> GradientInversion:
        given = self.given
        options: dict[str, Any] = {"seed": given.seed, "adaptive": adaptive}
        if name.startswith("gauss_newton"):
            options["underdetermined"] = True
            if name == "gauss_newton_prior":
                options["prior"] = self._prior
        elif name == "idlg":
            options["protocol"] = given.protocol
        if given.iterations is not None:
            options["steps" if name == "inverting_gradients" else "max_evaluations"] = given.iterations
        return ATTACKS[name](**options)

    @cached_property
    def _prior(self) -> GaussianPrior:
        """The prior fitted to the training images."""
        print("fitting the prior", flush=True)
        return GaussianPrior(Auxiliary(in_unit_range(self.data.train.images), self.data.train.labels))

    def _cell(self, network: Network, cell: Cell) -> list[TradeoffRow]:
        given, folder = self.given, self.given.output / "cells" / cell.key
        kinds = [kind for kind in ATTACKERS if kind in given.attackers] if cell.can_be_known else ATTACKERS[:1]
        runs = {
            f"{attack}_{kind}": (attack, kind == "adaptive")
            for attack in given.attacks
            for kind in (kinds[:1] if self._alike(attack, cell) else kinds)
        }
        victims = self._victims(network, cell)
        with warnings.catch_warnings():
            # A naive attacker is not supposed to know the defense.
            warnings.filterwarnings("ignore", "The clients defend their gradients|The clients' network draws")
            compared = self._compare(runs, victims, folder)
        trained = self._accuracies(network, cell)
        truth = GroundTruth.cat(list(victims.val_dataloader()))
        rows = []
        for each in compared:
            row = self._row(each, *runs[each.method], cell, truth, folder)
            alike = len(kinds) > 1 and self._alike(row.attack, cell)
            rows += [row, replace(row, adaptive=True)] if alike else [row]
        sent = size_sent(cell.defenses, dict(cell.network(network.model).named_parameters())).bytes
        return [replace(row, bytes=sent, **trained) for row in rows]

    def _alike(self, attack: str, cell: Cell) -> bool:
        """Return whether the attack of an adaptive attacker is that of a naive one, as the defense averages out."""
        changes = any(
            not defense.averages_out or defense.example_norm is not None or isinstance(defense, Encoding)
            for defense in cell.defenses
        )
        uses_noise = attack == "gauss_newton_prior" or self.given.infer_labels
        return not (changes or uses_noise or DEFENSES[cell.name].network)

    def _compare(self, runs: dict[str, tuple[str, bool]], victims: Victims, folder: Path) -> list[Row]:
        given = self.given
        return compare(
            {run: self._attack(attack, adaptive=adaptive) for run, (attack, adaptive) in runs.items()},
            victims,
            folder,
            dataset=self.data.name,
            resume=given.resume,
            accelerator=given.accelerator,
            devices=1,
            enable_progress_bar=sys.stderr.isatty(),
        )

    def _row(
        self, compared: Row, attack: str, adaptive: bool, cell: Cell, truth: GroundTruth, folder: Path
    ) -> TradeoffRow:
        given = self.given
        found = read_reconstructions(folder / compared.method, truth.ids.tolist())
        scores = score(found.images, found.labels, truth.images, truth.labels)
        images = found.images[torch.arange(len(truth))[:, None], scores.order]
        psnr = MeanOverVictims()(scores.psnr.mean(1))
        share = ShareOverVictims()(self._identified(images, truth))
        against = None
        if any(isinstance(defense, Encoding) for defense in cell.defenses):
            targets = F.one_hot(truth.labels, self.data.num_classes).to(truth.images)
            used, _ = encoded(cell.defenses, truth.images, targets, truth.ids.tolist(), given.seed)
            against = float(score(found.images, found.labels, used, truth.labels).psnr.mean())
        if cell.clients not in self.baselines:
            guesses = baseline_guesses(truth.images, self.public).values()
            self.baselines[cell.clients] = max(
                float(score(guess, truth.labels, truth.images, truth.labels).psnr.mean()) for guess in guesses
            )
        epsilon = bound = None
        private = next((defense for defense in cell.defenses if isinstance(defense, DPSGD)), None)
        if private is not None and private.noise_multiplier:
            epsilon = private.epsilon(1, 1.0, given.delta)
            # The images of a victim are matched with the help of the truth, so each counts as this many tries.
            others = min(given.others, int(self.data.train.labels.bincount().min()))
            bound = gaussian_success_bound(min(1.0, given.images / (others + 1)), private.noise_multiplier)
        return TradeoffRow(
            defense=cell.name,
            strength=cell.strength,
            attack=attack,
            adaptive=adaptive,
            network=given.network,
            epochs=given.epochs,
            images=truth.images.shape[1],
            victims=compared.victims,
            psnr_mean=psnr.value,
            psnr_ci=(psnr.low, psnr.high),
            psnr_encoded=against,
            mse_median=compared.mse_median,
            success_rate=compared.success_rate,
            success_ci=compared.success_rate_ci,
            success_threshold=compared.success_threshold,
            identified=share.value,
            identified_ci=(share.low, share.high),
            others=given.others,
            baseline=self.baselines[cell.clients],
            label_accuracy=compared.label_accuracy,
            epsilon=epsilon,
            delta=given.delta,
            bound=bound,
            seconds_per_victim=compared.seconds / compared.victims,
        )

    def _identified(self, images: Tensor, truth: GroundTruth) -> Tensor:
        """Return ``(V,)``, the share of each victim's images that are identified among others of their class."""
        generator = torch.Generator().manual_seed(derive_seed(self.given.seed, 0, "others"))
        order = torch.randperm(len(self.public), generator=generator)
        labels = self.data.train.labels[order]
        some = torch.cat([order[labels == label][: self.given.others] for label in labels.unique()])
        classes = truth.labels, self.data.train.labels[some]
        return identified(images, truth.images, self.public[some], classes=classes).double().mean(1)

    def _accuracies(self, network: Network, cell: Cell) -> dict[str, Any]:
        """Return the test accuracy of networks trained under the defense, and their rate, as fields of a row."""
        given = self.given
        if not given.rounds or cell.clients > 1 or cell.name not in (given.trained or given.defenses):
            return {}
        path = given.output / "cells" / cell.key / f"accuracy_{given.rounds}.json"
        model = cell.network(network.model)
        federation = Federation(given.rounds)
        return accuracies_under(model, cell.on(model), self.data, federation, given.seeds, given.seed, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        tradeoff = Tradeoff(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        rows = tradeoff.run()
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for name in ("summary.json", "table.md", "attackers.png", *["tradeoff.png"] * bool(given.rounds)):
        print(given.output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tradeoff.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, network="lenet", victims=10)
    add_attack_options(parser)
    add = parser.add_argument
    add("--defenses", nargs="+", choices=tuple(DEFENSES), help="default: all that work with this number of images")
    add("--strengths", nargs="+", type=float, help="strengths of a single defense (default: up to three of each)")
    add("--attacks", nargs="+", choices=tuple(ATTACKS), default=["gauss_newton"], help="default: %(default)s")
    add("--attackers", nargs="+", choices=ATTACKERS, default=list(ATTACKERS), help="default: both")
    add("--protocol", choices=("published", "robust"), default="robust", help="protocol of idlg (default: %(default)s)")
    add("--iterations", type=int, help="evaluations of the objective for each start (default: the protocol's)")
    add("--rounds", type=int, default=0, help="rounds of training under each defense (default: %(default)s, none)")
    add("--trained", nargs="+", choices=tuple(DEFENSES), help="defenses to train under (default: all of `--defenses`)")
    add("--seeds", type=int, default=3, help="number of networks to train per defense (default: %(default)s)")
    add("--delta", type=float, default=1e-5, help="delta of DP-SGD (default: %(default)s)")
    parser.set_defaults(batch_norm="evaluation")
    return parser


if __name__ == "__main__":
    main()
