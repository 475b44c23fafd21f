from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import LeNet, SharedGradient, Victim
from leakage.attacks import GaussNewtonAttack
from leakage.clients.protocol import Protocol
from leakage.datamodules import SharedGradients
from leakage.defenses import DPSGD, Soteria
from tests.kit import fit


class Known(nn.Module):
    """Cross-entropy, computed by the model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), targets)


class Between(Known):
    """A loss that is half of this and half of that, with a penalty for the weights."""

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        logits = self.network(images)
        penalty = self.network.classifier.weight.square().sum()
        return F.binary_cross_entropy_with_logits(logits, targets) + F.mse_loss(logits.sigmoid(), targets) + penalty


def network() -> LeNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LeNet(image_size=12, num_classes=3)


IMAGES = torch.rand(2, 2, 1, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([[0, 2], [1, 1]])
OWN = {"loss": "own", "num_classes": 3, "image_shape": (1, 12, 12)}


@pytest.mark.parametrize(
    "client",
    [
        {},
        {"local_steps": 4, "learning_rate": 0.1, "local_batch_size": 1, "momentum": 0.5},
        {"defenses": [DPSGD(noise_multiplier=0.1, norm=0.01)]},
    ],
    ids=["one step", "steps", "DP-SGD"],
)
def test_a_known_loss_that_the_model_computes(client: dict) -> None:
    own = Victim(Known(network()), num_images=2, **OWN, **client).share(IMAGES, LABELS)
    known = Victim(network(), image_shape=(1, 12, 12), num_images=2, **client).share(IMAGES, LABELS)
    for name, gradient in known.gradients.items():
        torch.testing.assert_close(own.gradients[f"network.{name}"], gradient)


def test_images_come_out_behind_any_loss_and_files_know_it(tmp_path) -> None:
    victim = Victim(Between(network()), **OWN)
    victim.share(IMAGES[:, :1], LABELS[:, :1], reveal_labels=True).save(tmp_path / "own.safetensors")
    shared = SharedGradient.load(tmp_path / "own.safetensors")
    attack = GaussNewtonAttack()
    fit(attack, SharedGradients(shared, Victim.of(Between(network()), shared.protocol)))
    assert float((attack.finished.images - IMAGES[:, :1]).abs().max()) < 1e-3


def test_labels_are_searched_for_together_with_images() -> None:
    victim = Victim(Between(network()), **OWN)
    attack = GaussNewtonAttack(joint_labels=True)
    fit(attack, SharedGradients(victim.share(IMAGES[:, :1], LABELS[:, :1]), victim))
    assert attack.finished.labels.tolist() == LABELS[:, :1].tolist()
    assert float((attack.finished.images - IMAGES[:, :1]).abs().max()) < 1e-3


class Losses(Known):
    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), targets, reduction="none")


class OfImages(Known):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).sum()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Losses, {}, r"`model` with loss 'own' to give the loss as one number, but got \(1,\)"),
        (OfImages, {}, r"`model` to take images of shape \(N, 1, 12, 12\) and targets, but got: .*positional"),
        (Known, {"num_classes": None}, "`num_classes` with loss 'own', and only then, but got None with 'own'"),
        (
            Known,
            {"loss": "cross_entropy"},
            "`num_classes` with loss 'own', and only then, but got 3 with 'cross_entropy'",
        ),
        (Known, {"defenses": [Soteria(0.5, layer="nothing")]}, "`layer` of Soteria to be a linear layer"),
    ],
)
def test_models_that_do_not_compute_a_loss(model, options, message) -> None:
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        Victim(model(network()), **OWN | options)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("probabilities", LABELS, r"`labels` of shape \(2, 2, 3\), but got \(2, 2\)"),
        ("probabilities", torch.ones(2, 2, 3), "`labels` as probabilities of 3 classes, which sum to 1, but got"),
        ("probabilities", torch.tensor([2.0, -1.0, 0.0]).expand(2, 2, 3), "`labels` as probabilities of 3 classes"),
        ("values", torch.full((2, 2, 3), torch.inf), "`labels` as finite floating-point numbers, but got"),
        ("values", torch.ones(2, 2, 3).long(), "`labels` as finite floating-point numbers, but got torch.int64"),
    ],
)
def test_labels_of_another_kind(kind, labels, message) -> None:
    victim = Victim(Known(network()), num_images=2, label_kind=kind, **OWN)
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        victim.share(IMAGES, labels)


def test_labels_of_all_kinds_survive_a_file(tmp_path) -> None:
    soft = torch.tensor([0.5, 0.25, 0.25]).expand(2, 2, 3)
    victim = Victim(network(), image_shape=(1, 12, 12), num_images=2, label_kind="probabilities")
    victim.share(IMAGES, soft, reveal_labels=True).save(tmp_path / "soft.safetensors")
    loaded = SharedGradient.load(tmp_path / "soft.safetensors")
    assert torch.equal(loaded.labels, soft)
    assert loaded.protocol == Protocol((1, 12, 12), 3, 2, label_kind="probabilities")
    assert loaded.select(torch.tensor([1])).labels.shape == (1, 2, 3)
