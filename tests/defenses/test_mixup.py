"""MixUp: what clients compute with, and attackers who search for the images behind the mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakage import LeNet, Victim
from leakage.attacks import GaussNewtonAttack
from leakage.defenses import Encoding, MixUp
from leakage.dummies import Mixture
from tests.kit import SmallVictims, fit

SHAPE = (1, 12, 12)


def private(images: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(3, images, *SHAPE), torch.arange(images).expand(3, -1)


def test_images_and_labels_are_mixed_alike() -> None:
    images, targets = private()[0][0], torch.eye(4)
    for seed in range(5):
        mixed, labels = MixUp().encode(images, targets, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(mixed, torch.einsum("mn,nchw->mchw", labels, images))
        torch.testing.assert_close(labels.sum(0), torch.ones(4))
        share = labels.diagonal()
        assert int((labels > 0).sum(1).max()) <= 2
        assert bool(((share == 1) | (share - share.min() < 1e-6)).all())  # one share for all that are mixed


def test_the_share_is_that_of_a_beta_distribution() -> None:
    def shares(alpha: float) -> Tensor:
        found = []
        for seed in range(400):
            labels = MixUp(alpha).encode(torch.zeros(2, *SHAPE), torch.eye(2), torch.Generator().manual_seed(seed))[1]
            found += [labels[0, 0]] if 0 < labels[0, 0] < 1 else []
        return torch.stack(found)

    for alpha in (0.5, 1.0, 8.0):
        drawn = shares(alpha)
        assert abs(float(drawn.mean()) - 0.5) < 0.06
        assert abs(float(drawn.std()) - (4 * (2 * alpha + 1)) ** -0.5) < 0.04  # of Beta(alpha, alpha)


def expanded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.expand(3, *tensor.shape) for name, tensor in state.items()}


def test_what_is_shared_is_the_gradient_of_the_mixtures() -> None:
    victim = Victim(LeNet(image_size=12), image_shape=SHAPE, num_images=4, defenses=[MixUp()])
    plain = Victim(LeNet(image_size=12), image_shape=SHAPE, num_images=4)
    images, labels = private()
    shared = victim.share(images, labels, seed=3)
    for place in range(3):
        alone = victim.share(images[[place]], labels[[place]], ids=torch.tensor([place]), seed=3)
        torch.testing.assert_close(alone.gradients["classifier.bias"][0], shared.gradients["classifier.bias"][place])
    undefended = plain.share(images, labels, states=expanded(victim.state)).gradients["classifier.weight"]
    assert not torch.allclose(shared.gradients["classifier.weight"], undefended, rtol=1e-3)
    # With cross-entropy the gradient by the biases is the mean of p - y, and mixing keeps the mean of y.
    targets = F.one_hot(labels, 10).float().mean(1)
    torch.testing.assert_close(shared.gradients["classifier.bias"].sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert bool((shared.gradients["classifier.bias"][targets == 0] > 0).all())


@pytest.mark.slow
def test_who_knows_of_it_finds_the_images() -> None:
    clients: dict[str, Any] = {"victims": 1, "images": 2, "labels": "distinct", "reveal_labels": True}
    mixed = [Half()]
    found = fit(GaussNewtonAttack(restarts=1, solver="cholesky"), SmallVictims(defenses=mixed, **clients))
    with pytest.warns(UserWarning, match=r"defend their gradients with \['Half'\]"):
        naive = fit(
            GaussNewtonAttack(restarts=0, solver="cholesky", adaptive=False), SmallVictims(defenses=mixed, **clients)
        )
    knowing, guessing = (attack.scores[0].psnr for attack in (found, naive))
    assert knowing > guessing + 6


class Half(MixUp):
    """Always two images, three quarters of one and a quarter of the other."""

    def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return 0.75 * images + 0.25 * images.flip(0), 0.75 * targets + 0.25 * targets.flip(0)


def test_weights_begin_near_each_image_by_itself() -> None:
    victim = Victim(LeNet(image_size=12), image_shape=SHAPE, num_images=3)
    assert Mixture(False).shape(victim.protocol) is None
    assert Mixture(True).shape(victim.protocol) == (3, 3)
    weights = Mixture(True).write(Mixture(True).starts(torch.zeros(1, 3, 3), torch.zeros(1))[0], {})
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights.argmax(1).tolist() == [0, 1, 2]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`alpha` to be positive"):
        MixUp(0.0)
    with pytest.raises(ValueError, match="at least 2 images for MixUp, which mixes them, but got 1"):
        Victim(LeNet(image_size=12), image_shape=SHAPE, defenses=[MixUp()])

    class Smaller(Encoding):
        def encode(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return images[..., 1:], targets

    victim = Victim(LeNet(image_size=12), image_shape=SHAPE, num_images=4, defenses=[Smaller()])
    with pytest.raises(ValueError, match="Smaller to return images and class probabilities of shapes"):
        victim.share(*private())
