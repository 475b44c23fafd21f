r"""Labels read off gradients: instance recall of every rule over batch size, training, distribution and local steps.

    python experiments/labels/restoration.py --dataset mnist --network mlp --batch-sizes 8 24 64 128 \
        --auxiliary-images 0 --output results/mnist
    python experiments/labels/restoration.py --dataset fashion_mnist --network convnet --epochs 0 1 5 20 \
        --batch-sizes 24 --rules ilrg llg_plus rlu posterior --output results/trained
    python experiments/labels/restoration.py --dataset cifar10 --network lenet --init torch --classes 100 \
        --batch-sizes 64 256 --output results/hundred_classes

Victims hold training images that their network was not trained on (`--seen`: that it was); the attacker's auxiliary
images are test images. Untrained networks are drawn anew for each victim, where they are small; a trained network is
shared. Rules that can't be used, such as those that learn about one network where each victim has its own, are left
out, and it is told why. `auto` is always among the rules, and the trivial guess, which looks at no gradient, beside
them.

What is done is written after each cell, a choice of epochs, batch size, distribution and local steps. A run that was
stopped goes on with the same command and `--resume`, as does one that more cells are asked of. Without it a folder that
holds results is refused.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from restoration_options import AUXILIARY_IMAGES, TRAINING_IMAGES, check_together, make_parser
from restoration_results import WRITTEN, RestorationRow, draw_pictures, format_table, read_rows  # beside this script
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import Normalize

from leakage.cli import quiet
from leakage.compare import check_output, holds_results, read_record
from leakage.datamodules import draw_victims
from leakage.datamodules.images import digest
from leakage.datamodules.labelled import in_unit_range
from leakage.datamodules.named import images_named
from leakage.errors import check_count
from leakage.labels import NEEDS, RULES, Auxiliary, InferredLabels, check_label_rule, infer_labels
from leakage.metrics import LabelMetrics, score_labels, trivial_score
from leakage.models import NETWORKS, LeNet, draw_state
from leakage.overview import write_json
from leakage.seeds import derive_seed
from leakage.shared_gradient import SharedGradient
from leakage.training import trained_network
from leakage.victim import Victim

# More parameters than this are shared by all victims, unless it is said otherwise.
_SMALL = 2_000_000
# Victims with networks of their own that are in memory at once.
_NETWORKS_AT_ONCE = 64
# Images of one pass, fewer where all layers keep theirs, and numbers in the gradients of one.
_IMAGES_AT_ONCE, _TRAINED_ON_AT_ONCE, _NUMBERS_AT_ONCE = 1024, 128, 2**26


@dataclass(frozen=True)
class Cell:
    """One choice of all that may be given several times."""

    epochs: int
    distribution: str
    local_steps: int
    batch_size: int

    @property
    def folder(self) -> str:
        """Below the output."""
        distribution = self.distribution.replace(":", "_")
        return f"epochs_{self.epochs}_{distribution}_steps_{self.local_steps}_batch_{self.batch_size}"


@dataclass
class Record:
    """What is kept of a cell."""

    rows: list[dict[str, Any]]


@dataclass
class Network:
    """What the clients of a cell are given."""

    model: nn.Module  # of images in [0, 1]
    images: Tensor  # (M,), indices of the training images that victims hold
    accuracy: float | None


class TorchLeNet(LeNet):
    """LeNet with weights as torch draws those of each layer."""

    def reset_parameters(self) -> None:
        """Leave them as the layers drew them."""


class Restoration:
    """All cells of a run: made ready and checked, then measured one by one.

    Raises:
        ValueError: options that don't go together, or with ``resume`` results of another configuration.
        OSError: a folder that can't be written.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        check_count(victims=given.victims)
        check_count(0, seed=given.seed, **{} if given.classes is None else {"classes": given.classes})
        for name in ("epochs", "batch_sizes", "local_steps"):
            for value in getattr(given, name):
                check_count(0 if name == "epochs" else 1, **{name: value})
        self.dataset, self.data = images_named(
            given.dataset, root=given.root, image_size=given.image_size, seed=given.seed
        )
        check_output(given.output)
        if not given.resume and holds_results(given.output):
            raise ValueError(
                f"Expected `--output` to be a folder without results, but got '{given.output}'. Add --resume to go on "
                "with them, or choose another folder."
            )
        check_together(given)
        self.data.prepare_data()
        self.data.setup("fit")
        self.cells = [
            Cell(*choice)
            for choice in itertools.product(
                *map(dict.fromkeys, (given.epochs, given.distribution, given.local_steps, given.batch_sizes))
            )
        ]
        self.rules = [*dict.fromkeys(rule for rule in given.rules or RULES if rule != "auto"), "auto"]
        self._prepare_network()
        self._prepare_images()
        self.told: set[tuple[str, str]] = set()
        self.configurations = {cell: self._configuration(cell) for cell in self.cells}
        # What was run before is compared with what is asked for before anything is run.
        self.finished: dict[Cell, list[RestorationRow]] = {}
        for cell, configuration in self.configurations.items() if given.resume else ():
            record = read_record(given.output / cell.folder, configuration, Record)
            if record is not None:
                self.finished[cell] = read_rows(given.output / cell.folder, record["rows"])
        for rule in self.rules if given.rules else ():
            reasons = [self._left_out(rule, self._victim(self.network, cell), cell) for cell in self.cells]
            if all(reasons):
                raise ValueError(f"Expected `--rules` that can be used in some cell, but got {rule!r}. {reasons[0]}.")

    def _prepare_network(self) -> None:
        given = self.given
        kind = NETWORKS[given.network]
        options = {name: getattr(given, name) for name in ("activation", "norm") if getattr(given, name) is not None}
        takes = inspect.signature(kind).parameters
        for name, value in options.items():
            if name not in takes:
                raise ValueError(
                    f"Expected no `--{name}` with {given.network!r}, which has only one, but got {value!r}."
                )
        # AlexNet, which has no choice, has ReLU.
        self.activation = given.activation or (takes["activation"].default if "activation" in takes else "relu")
        self.norm = given.norm or (takes["norm"].default if "norm" in takes else "none")
        if given.init == "torch":
            if given.network != "lenet":
                raise ValueError(f"Expected `--init papers` with {given.network!r}, which is torch's, but got 'torch'.")
            kind = TorchLeNet
        channels, height, width = self.data.image_shape
        self.num_classes = given.classes or self.data.num_classes
        self.network = kind(channels, (height, width), self.num_classes, **options)
        self.network.load_state_dict(draw_state(self.network, given.seed), strict=False)
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        self.weights = given.weights or ("own" if parameters <= _SMALL else "shared")
        has_batch_norm = any(isinstance(module, _BatchNorm) for module in self.network.modules())
        if given.mode is not None and not has_batch_norm:
            raise ValueError(f"Expected no `--mode` with a network without BatchNorm, but got {given.mode!r}.")
        self.mode = (given.mode or "eval") if has_batch_norm else None

    def _prepare_images(self) -> None:
        given, train = self.given, self.data.train
        self.labels = self._labels(train.labels, "training")
        if given.train_images is None:
            self.train_images = min(TRAINING_IMAGES, len(train) // 2)
        else:
            self.train_images = given.train_images
            check_count(train_images=given.train_images)
            if given.train_images > len(train):
                raise ValueError(
                    f"Expected `--train-images` of at most {len(train)}, the training images of {self.dataset!r}, but "
                    f"got {given.train_images}."
                )
        self.auxiliary = self._auxiliary()
        known = {} if self.auxiliary is None else vars(self.auxiliary)
        self.digest = digest({name: tensor for name, tensor in known.items() if tensor is not None})
        for cell in self.cells:
            there = len(train)
            if cell.epochs:
                there = self.train_images if given.seen else there - self.train_images
            if cell.batch_size > there:
                raise ValueError(
                    f"Expected `--batch-sizes` of at most {there}, the images that victims may hold after "
                    f"{cell.epochs} epochs, but got {cell.batch_size}. Choose another `--train-images`."
                )
            self._draw(cell, torch.arange(len(train)), victims=0)
            victim = self._victim(self.network, cell)
            check_label_rule(victim, auxiliary=self.auxiliary)

    def _labels(self, own: Tensor, split: str) -> Tensor:
        """The images' own labels, or as many of each of the classes that were asked for, at random."""
        if self.given.classes is None:
            return own
        generator = torch.Generator().manual_seed(derive_seed(self.given.seed, 0, f"labels of {split} images"))
        return (torch.arange(len(own)) % self.given.classes)[torch.randperm(len(own), generator=generator)]

    def _auxiliary(self) -> Auxiliary | None:
        """Test images, as many of each class as there can be."""
        test = self.data.test
        count = self.given.auxiliary_images
        if count is None:
            count = min(AUXILIARY_IMAGES, len(test))
        check_count(0, auxiliary_images=count)
        if count > len(test):
            raise ValueError(
                f"Expected `--auxiliary-images` of at most {len(test)}, the test images of {self.dataset!r}, but got "
                f"{count}."
            )
        if not count:
            if self.given.unlabelled:
                raise ValueError("Expected `--auxiliary-images` above 0 with `--unlabelled`, but got 0.")
            return None
        generator = torch.Generator().manual_seed(derive_seed(self.given.seed, 0, "auxiliary images"))
        order = torch.randperm(len(test), generator=generator)
        labels = self._labels(test.labels, "test")[order]
        # The how-manieth of its class each image is: all first ones, then all second ones, ...
        place = F.one_hot(labels, self.num_classes).cumsum(0).gather(1, labels[:, None])[:, 0]
        first = place.argsort(stable=True)[:count]
        return Auxiliary(in_unit_range(test.images[order[first]]), None if self.given.unlabelled else labels[first])

    def _own(self, cell: Cell) -> bool:
        return self.weights == "own" and not cell.epochs

    def _draw(self, cell: Cell, images: Tensor, victims: int) -> Tensor:
        """``(V, N)``, indices of the images that victims hold, out of those given."""
        drawn = draw_victims(
            self.labels[images],
            victims=victims,
            num_images=cell.batch_size,
            distribution=cell.distribution,
            seed=self.given.seed,
        )
        return images[drawn]

    def _victim(self, network: nn.Module, cell: Cell, *, all_layers: bool = False) -> Victim:
        """A client; if no more is looked at, of the last layer alone, which is far cheaper to differentiate."""
        given = self.given
        model = nn.Sequential(Normalize(self.data.mean, self.data.std), network).train(self.mode == "train")
        if not all_layers:
            model = copy.deepcopy(model).requires_grad_(False)
            model[1].classifier.requires_grad_(True)
        local = {}
        if cell.local_steps > 1:
            local = {"learning_rate": given.local_learning_rate, "local_batch_size": given.local_batch_size}
        return Victim(
            model,
            image_shape=self.data.image_shape,
            num_images=cell.batch_size,
            local_steps=cell.local_steps,
            **local,
        )

    def _left_out(self, rule: str, victim: Victim, cell: Cell) -> str:
        """Why a rule can't be used, empty if it can."""
        if rule != "auto" and self._own(cell) and "shared weights" in RULES[rule].needs:
            return f"Expected {NEEDS['shared weights']} for rule={rule!r}, but got a network for each"
        try:
            check_label_rule(victim, rule, auxiliary=self.auxiliary)
        except ValueError as error:
            return str(error).split(". Rules that would work")[0]
        return ""

    def _configuration(self, cell: Cell) -> dict[str, Any]:
        given = self.given
        ignored = ("batch_size", "seed")
        training = {"images": self.train_images, "learning_rate": given.learning_rate, "precision": given.precision}
        return {
            "data": {name: value for name, value in self.data.configuration.items() if name not in ignored},
            "network": str(self.network),
            "init": given.init,
            "mode": self.mode,
            "classes": given.classes,
            "training": training if cell.epochs else None,
            "seen": given.seen if cell.epochs else None,
            "weights": "own" if self._own(cell) else "shared",
            "auxiliary": self.digest,
            "victims": given.victims,
            "rules": self.rules,
            "local_learning_rate": given.local_learning_rate if cell.local_steps > 1 else None,
            "local_batch_size": given.local_batch_size if cell.local_steps > 1 else None,
            "seed": given.seed,
            **asdict(cell),
        }

    def run(self, progress: bool = True) -> list[RestorationRow]:
        """Measure all cells, writing what is found after each."""
        output = self.given.output
        left = [cell for cell in self.cells if cell not in self.finished]
        networks = {epochs: self._train(epochs) for epochs in dict.fromkeys(cell.epochs for cell in left)}
        for cell in left:
            self._draw(cell, networks[cell.epochs].images, victims=0)  # the last that can go wrong
        pause = 0.1 if sys.stderr.isatty() else 30.0
        with Tqdm(
            total=len(left) * len(self.rules),
            disable=not progress,
            file=sys.stderr,
            desc="Rules",
            bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}<{remaining}",
            dynamic_ncols=True,
            mininterval=pause,
            maxinterval=max(pause, 10),
        ) as bar:
            for cell in left:
                self.finished[cell] = self._measure(cell, networks[cell.epochs], bar)
                rows = [asdict(row) for row in self.finished[cell]]
                record = {"configuration": self.configurations[cell], "row": {"rows": rows}}
                write_json(output / cell.folder / "run.json", record)
                self._write_summary()
        return self._write_summary()

    def _write_summary(self) -> list[RestorationRow]:
        # Those of an earlier run that are still to come are in it too.
        rows = [row for cell in self.cells for row in self.finished.get(cell, [])]
        write_json(self.given.output / "summary.json", [asdict(row) for row in rows])
        return rows

    def _train(self, epochs: int) -> Network:
        given, there = self.given, torch.arange(len(self.data.train))
        if not epochs:
            return Network(self.network, there, None)
        print(f"{WRITTEN[given.network]} after {epochs} epoch{'s' if epochs > 1 else ''}:", flush=True)
        rate = {} if given.learning_rate is None else {"learning_rate": given.learning_rate}
        trained = trained_network(
            self.network,
            self.data,
            epochs=epochs,
            num_images=self.train_images,
            seed=given.seed,
            precision=given.precision,
            root=given.networks,
            accelerator=given.accelerator,
            **rate,
        )
        print(f"test accuracy {100 * trained.accuracy:.1f} %", flush=True)
        images = trained.seen if given.seen else there[torch.isin(there, trained.seen, invert=True)]
        return Network(trained.model[1], images, trained.accuracy)  # type: ignore[index]

    def _measure(self, cell: Cell, network: Network, bar: Tqdm) -> list[RestorationRow]:
        given = self.given
        drawn = self._draw(cell, network.images, given.victims)
        seen_by_rules = self._victim(network.model, cell)
        rules = []
        for rule in self.rules:
            reason = self._left_out(rule, seen_by_rules, cell)
            if not reason:
                rules.append(rule)
            elif (told := (rule, reason.split(", but got")[0])) not in self.told:
                self.told.add(told)
                reason = reason.replace(f" for rule={rule!r}", "")
                bar.write(f"No {rule} for batch size {cell.batch_size}: {reason}.", file=sys.stdout)
        bar.update(len(self.rules) - len(rules))
        client = seen_by_rules if cell.local_steps == 1 else self._victim(network.model, cell, all_layers=True)
        # What rules learn of a shared network is learnt once for all victims.
        groups = torch.arange(given.victims).split(_NETWORKS_AT_ONCE if self._own(cell) else given.victims)
        found: dict[str, list[InferredLabels]] = {rule: [] for rule in rules}
        seconds = dict.fromkeys(rules, 0.0)
        for group in groups:
            shared = self._share(client, seen_by_rules.trainable, cell, drawn[group], group)
            for rule in rules:
                bar.set_description_str(f"Batch size {cell.batch_size}, {rule}", refresh=sys.stderr.isatty())
                start = time.perf_counter()
                found[rule].append(
                    infer_labels(shared, seen_by_rules, rule=rule, auxiliary=self.auxiliary, seed=given.seed)
                )
                seconds[rule] += time.perf_counter() - start
                bar.update(len(group) / given.victims)
        return [self._row(rule, cell, network, drawn, found[rule], seconds[rule]) for rule in rules]

    def _share(
        self, client: Victim, names: Sequence[str], cell: Cell, drawn: Tensor, victims: Tensor
    ) -> SharedGradient:
        """Gradients of these victims, of the named tensors alone."""
        images = _IMAGES_AT_ONCE
        if len(client.trainable) > len(names):
            numbers = sum(parameter.numel() for parameter in client.model.parameters())
            images = min(_TRAINED_ON_AT_ONCE, _NUMBERS_AT_ONCE * cell.batch_size // numbers)
        parts = []
        for part in torch.arange(len(drawn)).split(max(1, images // cell.batch_size)):
            states = None
            if self._own(cell):
                seeds = [derive_seed(self.given.seed, victim, "network") for victim in victims[part].tolist()]
                states = client.fresh_states(seeds)
            held = drawn[part]
            shared = client.share(in_unit_range(self.data.train.images[held]), self.labels[held], states=states)
            parts.append(dataclasses.replace(shared, gradients={name: shared.gradients[name] for name in names}))
        return SharedGradient.cat(parts)

    def _row(
        self, rule: str, cell: Cell, network: Network, drawn: Tensor, found: list[InferredLabels], seconds: float
    ) -> RestorationRow:
        labels = self.labels[drawn]
        counts, present = (torch.cat([getattr(part, name) for part in found]) for name in ("counts", "present"))
        metrics, guess = LabelMetrics(), LabelMetrics()
        metrics.update(score_labels(counts, labels, present=present))
        guess.update(trivial_score(labels, self.num_classes))
        scores, trivial = metrics.compute(), guess.compute()
        return RestorationRow(
            rule=rule,
            dataset=self.dataset,
            network=self.given.network,
            activation=self.activation,
            victims=len(drawn),
            seconds=seconds,
            chosen=found[0].rule if rule == "auto" else None,
            weights="own" if self._own(cell) else "shared",
            seen=self.given.seen if cell.epochs else None,
            norm=self.norm,
            mode=self.mode,
            classes=self.given.classes,
            init=self.given.init,
            auxiliary_images=0 if self.auxiliary is None else len(self.auxiliary),
            auxiliary_labels=self.auxiliary is not None and self.auxiliary.labels is not None,
            test_accuracy=network.accuracy,
            **asdict(cell),
            **{name: estimate.value for name, estimate in scores.items()},
            **{f"{name}_ci": [estimate.low, estimate.high] for name, estimate in scores.items()},
            **{f"trivial_{name}": estimate.value for name, estimate in trivial.items()},
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    given = parser.parse_args(arguments)
    quiet()
    try:
        restoration = Restoration(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{WRITTEN[given.network]} on {restoration.dataset}, {given.victims} victims:", flush=True)
    try:
        rows = restoration.run()
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
