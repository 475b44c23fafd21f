"""Generators that an attacker trains on images of the same kind as the victims' images."""

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

# Images in a training batch, and images tested at once.
_BATCH, _TESTED_AT_ONCE = 64, 100


@dataclass
class TrainedGenerator:
    """A generator after some epochs of training.

    Attributes:
        model: generator in evaluation mode, on the CPU, float32. It maps normally distributed codes ``(N, code_size)``
            to images ``(N, C, H, W)`` in [0, 1].
        epochs: number of passes over the training images.
        seen: ``(M,)`` int64, ascending, the indices in ``data.train`` of the images it was trained on.
        error: mean squared error of the pixels of the test images after encoding and decoding, which shows how well the
            generator can represent them.
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
    r"""Train a :class:`~leakage.models.Generator`, or load it from the cache.

    The generator is the decoder of a variational autoencoder. An encoder computes mean :math:`\mu` and variance
    :math:`\sigma^2` of the code of each image; it is discarded after training. Encoder and generator are trained by
    Adam on

    .. math:: \frac{1}{2 s} \, \lVert G(\mu + \sigma n) - x \rVert_2^2 + \mathrm{KL}\bigl(N(\mu, \sigma^2) \,\Vert\,
        N(0, 1)\bigr), \qquad n \sim N(0, 1)

    with s the variance of the pixels around the generated image. Codes of images are then normally distributed, as
    :class:`~leakage.dummies.LatentCode` assumes for its start. Train the generator on images other than the victims',
    as an attacker has to.

    The generator is cached as :func:`~leakage.clients.training.trained_network` caches networks. Like them, it depends
    only on the arguments.

    Args:
        data: images whose sides are multiples of 4, such as those of FashionMNIST and CIFAR-10; it is prepared and set
            up if needed.
        epochs: number of passes over the images; 0 for the initial weights.
        code_size, width: see :class:`~leakage.models.Generator`.
        num_images: number of training images to use, drawn by ``seed``; by default all.
        learning_rate: learning rate of Adam.
        variance: s; a larger value gives smoother images and simpler codes.
        seed: seed of weights, images, orders and noise.
        root, accelerator, progress: see :func:`~leakage.clients.training.trained_network`.

    Raises:
        ValueError: an option is out of range, ``data`` has another type, its images have other sizes, ``num_images`` is
            larger than the training set, or a checkpoint in the cache is broken (delete it to train again).
        FloatingPointError: the weights are no longer finite.
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
    with torch.random.fork_rng(devices=[]):  # these initial weights are replaced below
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
    """A variational autoencoder: an encoder and a generator that are trained together."""

    def __init__(
        self, generator: Generator, encoder: Encoder, learning_rate: float, variance: float, seed: int
    ) -> None:
        super().__init__()
        self.generator, self.encoder = generator, encoder
        self.learning_rate, self.variance, self.seed = learning_rate, variance, seed
        self.tested = MeanMetric()
        self.error = math.nan

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam with the given learning rate."""
        return torch.optim.Adam(self.parameters(), self.learning_rate)

    def on_train_epoch_start(self) -> None:
        """Seed the noise of this epoch, so that a resumed training has the same noise."""
        torch.manual_seed(derive_seed(self.seed, self.current_epoch, "training noise"))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images = in_unit_range(batch[0])
        mean, log_variance = self.encoder(images)
        written = self.generator(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        misses = (written - images).square().sum() / (2 * self.variance)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        loss: Tensor = (misses + divergence) / len(images)
        return loss

    def on_train_epoch_end(self) -> None:
        """Check that the weights are finite before they are saved."""
        check_weights(self, self.current_epoch, self.learning_rate)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Encode and decode images, and measure the error."""
        for images in torch.split(batch[0], _TESTED_AT_ONCE):
            found = self.generator(self.encoder(images)[0])
            self.tested.update((found - images).square().flatten(1).mean(1))

    def on_test_epoch_end(self) -> None:
        """Store the mean error."""
        self.error = float(self.tested.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the error to the checkpoint."""
        checkpoint["leakage"] = {"error": self.error}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the error from the checkpoint."""
        self.error = checkpoint["leakage"]["error"]
