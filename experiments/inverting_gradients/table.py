r"""Attacks on networks as used in practice: PSNR of each attack, with baselines that use no gradient.

    python experiments/inverting_gradients/table.py --dataset cifar10 --network convnet --victims 20 \
        --attacks inverting_gradients continuation --output results/convnet
    python experiments/inverting_gradients/table.py --dataset data/cifar10 --network resnet18 --epochs 5 --images 4 \
        --attacks inverting_gradients grad_inversion --output results/resnet18

Victims hold test images, which no network was trained on. An untrained network of up to half a million weights is drawn
anew for each victim; larger or trained networks are shared. The attacker knows the labels, unless `--infer-labels` is
given. Attacks simulate the `--local-steps` of SGD with the clients' learning rate and order, or search for these
(`--hide-learning-rate`, `--shuffle`).

An image is *exact* if its MSE is below 1e-6. An attack that does not beat every baseline (a grey image, each image's
own mean colour, the nearest training image) is marked in the table and in the pictures. An image is *identified* if its
reconstruction is nearer to it than to any of `--others` training images. Where the paper has a figure, it is shown
beside ours (Inverting Gradients: https://arxiv.org/abs/2003.14053, CIFAR-10, one image, 4,800 iterations).

Files in the output folder: `summary.json`, with a row for each attack; `gallery.png`; `psnr_over_time.png`; and the
folder `attacks`, written as by `experiments/comparison`. To continue an interrupted run, repeat the command with
`--resume`; its results are those of an uninterrupted run. Without `--resume`, a folder that holds results is refused.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from table_networks import (  # in the folder of this script
    BATCH_NORM,
    Network,
    add_attack_options,
    add_options,
    make_network,
    make_victims,
)
from table_networks import WRITTEN as NETWORKS_WRITTEN
from table_rows import BASELINES, WRITTEN, TableRow, format_table, plot_time
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.attacks import (
    ContinuationAttack,
    DLGAttack,
    GaussNewtonAttack,
    GIASAttack,
    GradientInversion,
    GradInversionAttack,
    IDLGAttack,
    InvertingGradientsAttack,
)
from leakage.cli import quiet
from leakage.comparison import Row, read_reconstructions
from leakage.condensation.embeddings import embed, embedding_layer
from leakage.datamodules import GroundTruth, LabelledImages, in_unit_range
from leakage.dummies.training import trained_generator
from leakage.errors import check_count, check_positive
from leakage.files.text import write_json
from leakage.files.whole import check_output
from leakage.inversion.gradient_inversion import COMBINE
from leakage.metrics import MeanOverVictims, ShareOverVictims, baseline_guesses, below_baseline, identified, score
from leakage.plots import plot_gallery, save_figure
from leakage.seeds import derive_seed

sys.path.append(str(Path(__file__).parents[1] / "comparison"))
from comparing import compare
from records import holds_results

PROTOCOLS = ("published", "robust")
LABELS = ("random", "distinct", "equal")
# Mean PSNR in dB from table 1 of Inverting Gradients, by network and whether it is trained.
PUBLISHED = {("lenet", False): 18.00, ("lenet", True): 18.08, ("resnet20x4", False): 19.83, ("resnet20x4", True): 13.95}
# MSE below which an image is exact.
EXACT = 1e-6
_SHOWN = 8


class Table:
    """The victims of one network and the attacks on them: prepared and checked, then run.

    Raises:
        ValueError: if options contradict one another or do not fit the data.
        OSError: if a folder cannot be written.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.names = list(dict.fromkeys(given.attacks))
        check_count(victims=given.victims, images=given.images, others=given.others, local_steps=given.local_steps)
        check_count(0, epochs=given.epochs, generator_epochs=given.generator_epochs, seed=given.seed)
        check_positive(local_learning_rate=given.local_learning_rate)
        self.data = LabelledImages(
            given.dataset, root=given.root, image_size=given.image_size, benchmark=given.benchmark, seed=given.seed
        )
        check_output(given.output)
        if not given.resume and (holds_results(given.output) or holds_results(given.output / "attacks")):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to "
                "continue that run, or choose another folder."
            )
        self.data.prepare_data()
        self.data.setup("fit")
        if given.others > len(self.data.train):
            raise ValueError(
                f"Expected `--others` of at most {len(self.data.train)}, the training images of {self.data.name!r}, "
                f"but got {given.others}."
            )
        # Check all options before anything is trained.
        network = make_network(given, self.data, epochs=0)
        victims = make_victims(given, self.data, network)
        victims.setup("fit")
        for name in self.names:
            self._attack(name, network.model, generator_epochs=0)

    def run(self) -> list[TableRow]:
        """Run all attacks, write the results, and return the rows of the table."""
        given, folder = self.given, self.given.output / "attacks"
        network = make_network(given, self.data, given.epochs)
        victims = make_victims(given, self.data, network)
        compared = compare(
            {name: self._attack(name, network.model, given.generator_epochs) for name in self.names},
            victims,
            folder,
            dataset=self.data.name,
            resume=given.resume,
            accelerator=given.accelerator,
            devices=1,
            enable_progress_bar=sys.stderr.isatty(),
        )
        truth = GroundTruth.cat(list(victims.val_dataloader()))
        public = in_unit_range(self.data.train.images)
        guesses = baseline_guesses(truth.images, public)
        baselines = {name: score(guesses[name], truth.labels, truth.images, truth.labels).psnr for name in BASELINES}
        rows, pictures = [], {}
        for row in compared:
            found = read_reconstructions(folder / row.method, truth.ids.tolist())
            order = score(found.images, found.labels, truth.images, truth.labels).order
            images = found.images[torch.arange(len(truth))[:, None], order]
            rows.append(self._row(row, network, truth, images, public, baselines))
            if found.learning_rate is not None:
                misses = (found.learning_rate / given.local_learning_rate - 1).abs()
                rows[-1].learning_rate_error = float(misses.median())
            pictures[row.method] = images
        write_json(given.output / "summary.json", [asdict(row) for row in rows])
        self._draw(rows, truth, guesses["nearest"], pictures)
        return rows

    def _attack(self, name: str, model: nn.Module, generator_epochs: int) -> GradientInversion:
        """Return the attack of this name, with the options of the command line."""
        given = self.given
        options: dict[str, Any] = {"seed": given.seed}
        options |= {"protocol": given.protocol} if name in ("dlg", "idlg") else {}
        if given.total_variation is not None and name in PRIORS:
            options["total_variation"] = given.total_variation
        if given.restarts is not None:
            options["restarts"] = given.restarts
        if name == "continuation":
            options["combine"] = given.combine
        if given.iterations is not None:
            limit = "steps" if name in ("inverting_gradients", "grad_inversion", "gias") else "max_evaluations"
            options[limit] = given.iterations
        if name == "gias":
            trained = trained_generator(
                self.data,
                epochs=generator_epochs,
                seed=derive_seed(given.seed, 0, "generator"),
                root=given.networks,
                accelerator=given.accelerator,
                progress=sys.stderr.isatty(),
            )
            return GIASAttack(trained.model, [trained.model.code_size], **options)
        if name == "grad_inversion" and not has_statistics(model):
            options["batch_norm"] = 0.0
        if name == "gauss_newton":
            options["underdetermined"] = True
        return ATTACKS[name](**options)

    def _row(
        self,
        compared: Row,
        network: Network,
        truth: GroundTruth,
        images: Tensor,
        public: Tensor,
        baselines: dict[str, Tensor],
    ) -> TableRow:
        given = self.given
        scores = score(images, truth.labels, truth.images, truth.labels)
        psnr = MeanOverVictims()(scores.psnr.mean(1))
        exact = ShareOverVictims()((scores.mse < EXACT).double().mean(1))
        generator = torch.Generator().manual_seed(derive_seed(given.seed, 0, "others"))
        others = public[torch.randperm(len(public), generator=generator)[: given.others]]
        found = identified(images, truth.images, others).double().mean(1)
        share = ShareOverVictims()(found)
        by_features = None
        if given.epochs:
            model = copy.deepcopy(network.model).eval()  # in training mode it would mix the images of a batch
            seen = Features(model, embedding_layer(model, self.data.image_shape))
            by_features = float(identified(images, truth.images, others, seen).double().mean())
        means = {name: float(values.mean()) for name, values in baselines.items()}
        is_published = (given.images, given.local_steps, self.data.name) == (1, 1, "cifar10")
        key = given.network, given.epochs > 0
        return TableRow(
            attack=compared.method,
            protocol=compared.protocol,
            network=given.network,
            activation=given.activation,
            epochs=given.epochs,
            test_accuracy=network.accuracy,
            images=given.images,
            labels=given.labels,
            labels_revealed=not given.infer_labels,
            local_steps=given.local_steps,
            victims=compared.victims,
            psnr_mean=psnr.value,
            psnr_ci=(psnr.low, psnr.high),
            ssim_mean=compared.ssim_mean,
            exact=exact.value,
            exact_ci=(exact.low, exact.high),
            identified=share.value,
            identified_ci=(share.low, share.high),
            identified_features=by_features,
            others=given.others,
            **{f"baseline_{name}": value for name, value in means.items()},
            below=below_baseline(psnr.value, means),
            label_accuracy=compared.label_accuracy,
            iterations=compared.evaluations_per_victim,
            seconds_per_victim=compared.seconds / compared.victims,
            published_psnr=PUBLISHED.get(key) if is_published and compared.method == "inverting_gradients" else None,
        )

    def _draw(self, rows: list[TableRow], truth: GroundTruth, nearest: Tensor, pictures: dict[str, Tensor]) -> None:
        shown = min(_SHOWN, truth.images.shape[0] * truth.images.shape[1])
        columns = {"truth": truth.images, "nearest\ntraining image": nearest}
        columns |= {
            WRITTEN[row.attack].replace(" ", "\n") + "\nbelow a baseline" * bool(row.below): pictures[row.attack]
            for row in rows
        }
        flat = {name: images.flatten(0, 1)[:shown] for name, images in columns.items()}
        own = truth.images.flatten(0, 1)[:shown]
        captions = {}
        for name, images in flat.items():
            decibels = -10 * (images - own).square().flatten(1).mean(1).log10()
            captions[name] = [f"{value:.1f} dB" if name != "truth" else "" for value in decibels.tolist()]
        network = NETWORKS_WRITTEN[self.given.network] + (
            f" with {self.given.activation}" * bool(self.given.activation)
        )
        epochs = f"after {self.given.epochs} epochs" if self.given.epochs else "untrained"
        title = f"{self.data.name}, {network}, {epochs}"
        figure = plot_gallery(
            [[images[place] for images in flat.values()] for place in range(shown)],
            columns=list(flat),
            rows=[str(place) for place in range(shown)],
            captions=[[lines[place] for lines in captions.values()] for place in range(shown)],
            title=title,
        )
        save_figure(figure, self.given.output / "gallery.png")
        save_figure(plot_time(rows, title), self.given.output / "psnr_over_time.png")


ATTACKS: dict[str, Callable[..., GradientInversion]] = {
    "inverting_gradients": InvertingGradientsAttack,
    "continuation": ContinuationAttack,
    "grad_inversion": GradInversionAttack,
    "gias": GIASAttack,
    "dlg": DLGAttack,
    "idlg": IDLGAttack,
    "gauss_newton": GaussNewtonAttack,
}
# Attacks with total variation as a prior.
PRIORS = ("inverting_gradients", "continuation", "grad_inversion", "gias")


class Features(nn.Module):
    """The features of images in a network: the inputs of its last layer."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, images: Tensor) -> Tensor:
        """Return features ``(B, D)`` of images ``(B, C, H, W)``, computed in batches of 100."""
        return torch.cat([embed(self.model, self.layer, some) for some in torch.split(images, 100)])


def has_statistics(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm in evaluation mode, whose running statistics the attacker knows."""
    return any(isinstance(module, _BatchNorm) and not module.training for module in model.modules())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    quiet()
    try:
        table = Table(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{'/'.join(table.names)} on {given.victims} victims of {table.data.name}:", flush=True)
    try:
        rows = table.run()
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, OSError) or str(error).startswith("Expected "):
            sys.exit(f"{parser.prog}: error: {error}")
        raise
    print(f"\n{format_table(rows)}\n")
    for name in ("summary.json", "gallery.png", "psnr_over_time.png"):
        print(given.output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, network="convnet", victims=20)
    add_attack_options(parser)
    add = parser.add_argument
    add("--batch-norm", choices=BATCH_NORM, default="evaluation", help="mode of BatchNorm (default: %(default)s)")
    add("--attacks", nargs="+", choices=tuple(ATTACKS), default=["inverting_gradients"], help="default: %(default)s")
    add("--protocol", choices=PROTOCOLS, default="published", help="protocol of dlg and idlg (default: %(default)s)")
    add("--iterations", type=int, help="evaluations of the objective per start (default: the protocol's)")
    add("--restarts", type=int, help="additional starts of every victim (default: the protocol's)")
    add("--combine", choices=COMBINE, default="mean", help="of the starts of continuation (default: %(default)s)")
    add("--total-variation", type=float, help="weight of the prior (default: the protocol's)")
    add("--labels", choices=LABELS, default="random", help="labels of a victim's images (default: %(default)s)")
    add("--local-steps", type=int, default=1, help="local SGD steps, whose sum is shared (default: %(default)s)")
    add(
        "--local-learning-rate",
        type=float,
        default=1e-2,
        help="learning rate of several local steps (default: %(default)s)",
    )
    add("--hide-learning-rate", action="store_true", help="hide the rate of local steps; the attacker searches for it")
    add("--local-batch-size", type=int, help="images per local step (default: all)")
    add("--shuffle", action="store_true", help="take local batches in an order unknown to the attacker")
    add("--generator-epochs", type=int, default=3, help="epochs to train the generator of gias (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
