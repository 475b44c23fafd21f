"""LPIPS: the perceptual distance of images, by a network fitted to human judgement."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from leakage.errors import check_choice
from leakage.metrics.matching import check_images
from leakage.precision import full_precision

# The networks, with the names of their weights in torchvision.
_NETWORKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
# AlexNet accepts no sides below 31 pixels, and the other networks only few.
_SMALLEST = 32


@torch.no_grad()
@full_precision()
def perceptual_distance(reconstructed: Tensor, images: Tensor, *, network: str = "alex") -> Tensor:
    r"""Compute LPIPS, the perceptual distance of each reconstruction from its image: 0 if equal, about 0.7 for noise.

    .. math:: \sum_l \operatorname{mean}_{h, w} \lVert w_l \odot (\hat y_l - y_l)_{hw} \rVert^2

    with the features :math:`y_l` of layer l of a network trained on ImageNet, normalised to unit length over the
    channels, and weights :math:`w_l` fitted to human judgement of similarity. It does not compare pixels: PSNR prefers
    a blurred image, LPIPS a sharp one.

    Both images are clamped to [0, 1], and a single channel is repeated to three. If the smaller side has fewer than
    32 pixels, images are enlarged to 32 (bilinear), since AlexNet accepts no smaller ones. The
    network was fitted to 64 pixels: only compare values of the same image size and network.

    torchvision downloads the network on first use (AlexNet 244 MB, VGG 553 MB, SqueezeNet 5 MB); torchmetrics
    includes the fitted weights.

    Args:
        reconstructed: ``(V, N, C, H, W)``, any values, in the order of ``images`` (:func:`~leakage.metrics.match`).
        images: ``(V, N, C, H, W)``, the private images, C = 1 or 3.
        network: ``"alex"`` (the authors' choice for evaluation), ``"vgg"`` or ``"squeeze"``.

    Returns:
        ``(V, N)`` in single precision, at least 0; infinite if a reconstruction is not finite.

    Raises:
        ValueError: the network is unknown, the shapes do not match, the images are not floating-point, or C is
            neither 1 nor 3.
        FileNotFoundError: the weights of the network are missing and can't be downloaded, or can't be read.

    References:
        Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, CVPR 2018,
        https://arxiv.org/abs/1801.03924.

    Example:
        >>> images = torch.rand(2, 4, 3, 32, 32)
        >>> perceptual_distance(images, images)  # doctest: +SKIP
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    check_choice("network", network, _NETWORKS)
    check_images(reconstructed, images)
    channels, *sides = images.shape[2:]
    if channels not in (1, 3):
        raise ValueError(f"Expected `images` of 1 or 3 channels, but got {channels}.")
    metric = _load(network).to(images.device)
    found, truth = (tensor.to(images.device).flatten(0, 1).float() for tensor in (reconstructed, images))
    finite = torch.isfinite(found).flatten(1).all(1)
    found, truth = (tensor.nan_to_num().clamp(0, 1).expand(-1, 3, -1, -1) for tensor in (found, truth))
    if min(sides) < _SMALLEST:
        size = [round(side * _SMALLEST / min(sides)) for side in sides]
        found, truth = (F.interpolate(tensor, size, mode="bilinear").clamp(0, 1) for tensor in (found, truth))
    # One image at a time, since torchmetrics averages over a batch.
    distances = [metric(found[place : place + 1], truth[place : place + 1]) for place in range(len(found))]
    values = torch.stack(distances) if distances else found.new_zeros(0)
    return values.where(finite, torch.inf).view(images.shape[:2])


def _load(network: str) -> Any:
    """Load the metric; raise a ``FileNotFoundError`` that says where to put which file if the weights are missing."""
    try:
        with torch.random.fork_rng(devices=[]):  # weights are initialised before they are loaded
            return LearnedPerceptualImagePatchSimilarity(cast(Literal["alex"], network), normalize=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        url = getattr(torchvision.models, _NETWORKS[network]).DEFAULT.url
        path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        raise FileNotFoundError(
            f"Expected the weights of network={network!r} in '{path}', or internet access to download them, but got: "
            f"{error}. Copy the file {url} there from another machine; the folder depends on the environment variable "
            "TORCH_HOME."
        ) from error
