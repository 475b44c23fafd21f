"""The network of a condensation: its checks, its BatchNorm statistics, and its training between steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.condensation.augmentation import SiameseAugmentation
from leakage.datamodules.labelled import LabelledImages
from leakage.models import ConvNet, draw_state

# Real images of each class from which BatchNorm takes its statistics.
_IMAGES_FOR_STATISTICS = 16


def default_network(data: LabelledImages, width: int = 128) -> ConvNet:
    """Return the network of the paper for a data set, with ``width`` channels. Its initial weights are not used."""
    channels, height, across = data.image_shape
    with torch.random.fork_rng(devices=[]):
        return ConvNet(channels, (height, across), data.num_classes, width=width)


def fitting_network(given: nn.Module | None, data: LabelledImages, width: int) -> nn.Module:
    """Return a copy of ``given`` in single precision, or the default network if it is None.

    Raises:
        ValueError: the network has no trainable weights, does not fit the data, or can't be drawn anew.
    """
    if given is None:
        return default_network(data, width)
    network = copy.deepcopy(given).float()  # the Trainer sets the precision
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"Expected a `network` with trainable weights, but got {type(given).__name__} without any.")
    check_network(network, data)
    draw_state(network, 0)  # fail now if it can't be drawn anew
    return network


def check_network(model: nn.Module, data: LabelledImages, device: torch.device | str = "cpu") -> None:
    """Raise a ``ValueError`` unless the network accepts the images and returns one logit per class."""
    shape = tuple(data.image_shape)
    expected = f"Expected a `network` for images {shape} and {data.num_classes} classes of {data.name!r}, but got"
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).to(device).eval()(torch.zeros(2, *shape, device=device, dtype=torch.float32))
    except (RuntimeError, ValueError, TypeError) as error:
        line = str(error).split("\n")[0]
        raise ValueError(f"{expected} {type(model).__name__}, which fails on them: {line}") from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, data.num_classes):
        shown = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{expected} {type(model).__name__}, which returns {shown} for two images.")


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers, whose mode and statistics matter."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def take_statistics(network: nn.Module, data: LabelledImages, classes: Sequence[Tensor]) -> None:
    """Set the statistics of BatchNorm to those of real images of all classes; training the network changes them.

    The network is in evaluation mode before and after.
    """
    norms = batch_norms(network)
    if not norms:
        return
    images = data.normalise(torch.cat([images[:_IMAGES_FOR_STATISTICS] for images in classes]))
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.train()
        module.momentum = None  # average over all batches since the reset: only this one
    with torch.no_grad():
        network(images.to(next(network.parameters()).dtype))
    for module, momentum in zip(norms, momenta, strict=True):
        module.eval()
        module.momentum = momentum


def train_on(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    augmentation: SiameseAugmentation | None = None,
) -> None:
    """Train ``network`` in place by plain SGD on normalised images, with batch statistics in BatchNorm.

    The network is in evaluation mode before and after. If there are more images than ``batch_size``, they are shuffled
    in each epoch.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate)
    norms = batch_norms(network)
    for module in norms:
        module.train()
    for _ in range(epochs):
        order = torch.arange(len(images))
        if len(images) > batch_size:
            order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order.to(images.device), batch_size):
            batch = images[chosen]
            if augmentation is not None:
                batch = augmentation.draw(generator, len(batch))(batch)
            loss = F.cross_entropy(network(batch), labels[chosen])
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    for module in norms:
        module.eval()
