"""The cost of a defense: the test accuracy of a network that defended clients train together."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from leakage.clients.victim import Victim
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.defenses import Defense
from leakage.files.text import write_json
from leakage.metrics import mean_interval
from leakage.models import draw_state
from leakage.seeds import derive_seed

# Number of test images at once.
_TESTED_AT_ONCE = 500
# The learning rate of the server's SGD is chosen for each defense: the first of these factors that trains best in a
# part of the rounds, measured on a held-out share of the training images.
_RATES, _TRIED_ROUNDS, _HELD_OUT = (1.0, 0.1, 10.0, 0.01, 100.0), 0.3, 0.02


@dataclass(frozen=True)
class Federation:
    """Options of the joint training.

    Attributes:
        rounds: number of rounds; every client shares one gradient in each.
        clients: number of clients in a round.
        images: number of images of a client in a round, drawn anew in each.
        learning_rate, momentum: options of the server's SGD on the mean of what the clients share; the last quarter of
            the rounds uses a tenth of the rate.
    """

    rounds: int = 300
    clients: int = 8
    images: int = 8
    learning_rate: float = 0.02
    momentum: float = 0.9


class Rounds(IterableDataset[tuple[Tensor, Tensor]]):
    """Yields images ``(clients, images, C, H, W)`` in [0, 1] and labels for each round."""

    def __init__(self, data: LabelledImages, federation: Federation, seed: int) -> None:
        self.data, self.federation, self.seed = data, federation, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        shape, train = (self.federation.clients, self.federation.images), self.data.train
        for _ in range(self.federation.rounds):
            chosen = torch.randint(len(train), shape, generator=generator)
            yield in_unit_range(train.images[chosen.flatten()]).unflatten(0, shape), train.labels[chosen]


class FederatedSGD(LightningModule):
    """SGD on the mean of the gradients that defended clients share.

    Args:
        model: maps images in [0, 1] to logits.
        defenses: defenses of each client.
        data: the data set, for its image shape and number of classes.
        federation: options of the training.
        seed: seed of the defenses' draws.
    """

    def __init__(
        self, model: nn.Module, defenses: Sequence[Defense], data: LabelledImages, federation: Federation, seed: int
    ) -> None:
        super().__init__()
        self.model, self.federation, self.seed = copy.deepcopy(model), federation, seed
        shape = tuple(data.image_shape)
        self.client = Victim(model, image_shape=shape, num_images=federation.images, defenses=list(defenses))
        self.accuracy = MulticlassAccuracy(data.num_classes, average="micro")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the server's SGD."""
        return torch.optim.SGD(
            self.model.parameters(), lr=self.federation.learning_rate, momentum=self.federation.momentum
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Run one round; the gradient of the returned loss is the mean of the shared gradients."""
        if batch_idx == max(1, 3 * self.federation.rounds // 4):
            for group in cast(torch.optim.Optimizer, self.optimizers()).param_groups:
                group["lr"] /= 10
        images, labels = batch
        parameters = dict(self.model.named_parameters())
        self.client.model.load_state_dict(self.model.state_dict())
        shared = self.client.share(images, labels, seed=derive_seed(self.seed, batch_idx, "round"))
        means = {name: tensor.mean(0) for name, tensor in shared.gradients.items()}
        return torch.stack([(parameters[name] * mean).sum() for name, mean in means.items()]).sum()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on test images."""
        images, labels = batch
        self.accuracy(self.model(in_unit_range(images)), labels)
        self.log("accuracy", self.accuracy)


def suitable_rate(
    model: nn.Module, defenses: Sequence[Defense], data: LabelledImages, federation: Federation, seed: int
) -> float:
    """Choose the learning rate for such clients on training images alone."""
    rest = data.hold_out(_HELD_OUT)
    rest.prepare_data()
    rest.setup("fit")
    found = {}
    for factor in _RATES:
        rate, rounds = factor * federation.learning_rate, max(1, round(_TRIED_ROUNDS * federation.rounds))
        tried = replace(federation, learning_rate=rate, rounds=rounds)
        found[rate] = accuracy_under(model, defenses, rest, tried, seed)
    return max(found, key=lambda rate: found[rate])


def accuracy_under(
    model: nn.Module, defenses: Sequence[Defense], data: LabelledImages, federation: Federation, seed: int
) -> float:
    """Return the test accuracy, 0 to 1, of the model trained under these defenses from its weights.

    The same ``seed`` draws the same images, whatever the defense. Training that diverges counts as guessing.
    """
    module = FederatedSGD(model, defenses, data, federation, seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    try:
        trainer.fit(module, DataLoader(Rounds(data, federation, derive_seed(seed, 0, "rounds")), batch_size=None))
    except ValueError as error:
        if "finite numbers" not in str(error):
            raise
        return 1 / data.num_classes  # training has diverged: as good as guessing
    tests = list(zip(data.test.images.split(_TESTED_AT_ONCE), data.test.labels.split(_TESTED_AT_ONCE), strict=True))
    (found,) = trainer.test(module, DataLoader(tests, batch_size=None), verbose=False)  # type: ignore[arg-type]
    return found["accuracy"]


def accuracies_under(
    network: nn.Module,
    defenses: Sequence[Defense],
    data: LabelledImages,
    federation: Federation,
    seeds: int,
    seed: int,
    path: Path,
) -> dict[str, Any]:
    """Train networks from ``seeds`` starts; returns the mean test accuracy, its interval and the learning rate.

    The learning rate is chosen with the first start. What is done is kept in the file ``path``, and not done again.
    """
    known: dict[str, Any] = {"learning_rate": None, "accuracies": []}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    accuracies = known["accuracies"]
    for start in range(len(accuracies), seeds):
        model = copy.deepcopy(network)
        model.load_state_dict(draw_state(model, derive_seed(seed, start, "federation")), strict=False)
        if known["learning_rate"] is None:
            known["learning_rate"] = suitable_rate(model, defenses, data, federation, start)
        suited = replace(federation, learning_rate=known["learning_rate"])
        accuracies.append(accuracy_under(model, defenses, data, suited, start))
        write_json(path, known)
    accuracies = accuracies[:seeds]
    return {
        "test_accuracy": sum(accuracies) / len(accuracies),
        "test_accuracy_ci": mean_interval(torch.tensor(accuracies, dtype=torch.float64)),
        "learning_rate": known["learning_rate"],
    }
