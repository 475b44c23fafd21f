"""Generators that an attacker trains on images of the victims' kind."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from leakage.clients.training import CachedTraining, check_weights
from leakage.datamodules import LabelledImages, in_unit_range
from leakage.errors import check_positive
from leakage.models import Generator, draw_state
from leakage.models.generator import Encoder
from leakage.pieces import digest
from leakage.seeds import derive_seed

# Images in a batch, and the images tested at a time.
_BATCH, _TESTED_AT_ONCE = 64, 100


@dataclass
class TrainedGenerator:
    """A generator after some epochs of training.

    Attributes:
        model: in evaluation mode, on the CPU, float32; normally distributed codes ``(N, code_size)`` to images
            ``(N, C, H, W)`` in [0, 1].
        epochs: how often it has seen each of its images.
        seen: ``(M,)`` int64, ascending, the indices in ``data.train`` of the images it was trained on.
        error: mean square error of the pixels of the test images, written and read again: what it can show of them.
    """

    model: Generator
    epochs: int
    seen: Tensor
    error: float


@torch.inference_mode(False)
@torch.enable_grad()
def trained_generator(
    data: LabelledImages,
    *,
    epochs: int,
    code_size: int = 64,
    width: int = 32,
    num_images: int | None = None,
    learning_rate: float = 1e-3,
    variance: float = 0.02,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
    progress: bool = True,
) -> TrainedGenerator:
    r"""Train a :class:`~leakage.models.Generator`, or read it from the cache: the decoder of a variational autoencoder.

    An encoder, which is thrown away, tells of each image mean :math:`\mu` and variance :math:`\sigma^2` of its code;
    both are trained by Adam on

    .. math:: \frac{1}{2 s} \, \lVert G(\mu + \sigma n) - x \rVert_2^2 + \mathrm{KL}\bigl(N(\mu, \sigma^2) \,\Vert\,
        N(0, 1)\bigr), \qquad n \sim N(0, 1)

    with s the variance of the pixels around what is generated. So codes of images are normally distributed, which is
    what :class:`~leakage.dummies.LatentCode` starts from. Train it on other images than the victims': what an
    attacker has.

    It is kept as :func:`~leakage.clients.training.trained_network` keeps networks, and depends on the arguments alone
    in the same way.

    Args:
        data: images whose sides are multiples of 4, such as those of FashionMNIST and CIFAR-10; made ready if it is
            not yet.
        epochs: passes over the images; 0 for the first weights.
        code_size, width: see :class:`~leakage.models.Generator`.
        num_images: train on so many of the training images, drawn by ``seed``; by default on all.
        learning_rate: of Adam.
        variance: s; the larger, the smoother the images and the simpler the codes.
        seed: of weights, images, orders and noise.
        root, accelerator, progress: see :func:`~leakage.clients.training.trained_network`.

    Raises:
        ValueError: an option out of its range, other data, images of other sizes, more ``num_images`` than there are,
            or a checkpoint in the cache that is broken (delete it to train anew).
        FloatingPointError: weights that are no longer finite.
        OSError: the cache can't be written.

    References:
        Kingma and Welling, *Auto-Encoding Variational Bayes*, ICLR 2014, https://arxiv.org/abs/1312.6114.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as root:
        ...     trained = trained_generator(
        ...         LabelledImages("sample"), epochs=1, num_images=100, width=4, root=root, progress=False)
        >>> trained.model(torch.randn(5, 64)).shape
        torch.Size([5, 1, 28, 28])
    """
    check_positive(learning_rate=learning_rate, variance=variance)
    training = CachedTraining(data, epochs, num_images, _BATCH, seed, "32-true", root, accelerator, progress)
    sides = data.image_shape[1], data.image_shape[2]
    with torch.random.fork_rng(devices=[]):  # first weights that are drawn anew
        generator = Generator(data.image_shape[0], sides, code_size=code_size, width=width)
        encoder = Encoder(data.image_shape[0], sides, code_size, width)
    module = Autoencoder(generator, encoder, learning_rate, variance, seed)
    first = draw_state(module, seed)
    module.load_state_dict(first)
    configuration = {
        "layers": f"{module.generator} {module.encoder}",
        "weights": digest(first),
        "learning_rate": float(learning_rate),
        "variance": float(variance),
    }
    training.run(module, "generator", configuration)
    return TrainedGenerator(module.generator, epochs, training.seen, module.error)


class Autoencoder(LightningModule):
    """A generator, and an encoder, that learn together."""

    def __init__(
        self, generator: Generator, encoder: Encoder, learning_rate: float, variance: float, seed: int
    ) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.learning_rate, self.variance, self.seed = learning_rate, variance, seed
        self.tested = MeanMetric()
        self.error = math.nan

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)

    def on_train_epoch_start(self) -> None:
        """The noise is the same whether or not the training had a break before."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, "training noise"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images = in_unit_range(batch[0])
        mean, log_variance = self.encoder(images)
        written = self.generator(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        misses = (written - images).square().sum() / (2 * self.variance)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        loss: Tensor = (misses + divergence) / len(images)
        return loss

    def on_train_epoch_end(self) -> None:
        """Look at the weights before they are kept."""
        check_weights(self, self.current_epoch, self.learning_rate)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Write images and read them again."""
        for images in torch.split(batch[0], _TESTED_AT_ONCE):
            found = self.generator(self.encoder(images)[0])
            self.tested.update((found - images).square().flatten(1).mean(1))

    def on_test_epoch_end(self) -> None:
        """Keep the mean."""
        self.error = float(self.tested.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the error."""
        checkpoint["leakage"] = {"error": self.error}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.error = checkpoint["leakage"]["error"]
