"""Priors of images, which do not depend on the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from leakage.clients.activations import Activation
from leakage.clients.victim import Victim
from leakage.errors import check_choice
from leakage.objectives.terms import ActivationPrior, Point, Prior
from leakage.pieces import State

_KINDS = ("anisotropic", "isotropic", "smooth", "squared")
# Differences below this length count as zero, because the square root has no derivative at zero.
_TINY = 1e-8
# With ``smooth``, differences below this length are penalised quadratically.
_SMALL = 1e-2


class TotalVariation(Prior):
    r"""Total variation: how much neighbouring pixels differ. Natural images are mostly smooth.

    With :math:`d_h, d_w` the differences between each pixel and the next one below and to the right,

    =============== ==================================================================
    ``kind``        value
    =============== ==================================================================
    ``anisotropic`` :math:`\mathrm{mean}\,|d_h| + \mathrm{mean}\,|d_w|`, as in Inverting Gradients
    ``isotropic``   :math:`\mathrm{mean}\,\sqrt{d_h^2 + d_w^2}`, over all pixels that have both
    ``smooth``      :math:`\mathrm{mean}\,(n - 0.01), \; n^2 = d_h^2 + d_w^2 + 0.01^2`, over all pixels
    ``squared``     :math:`\mathrm{mean}\,d_h^2 + \mathrm{mean}\,d_w^2`
    =============== ==================================================================

    The mean is taken over images, channels and pixels, so a weight means the same for images of any size. The last two
    kinds are sums of squares, as second-order solvers need them. ``smooth`` is written as
    :math:`\mathrm{mean}\,[d_h^2 + d_w^2 + (n - 0.01)^2] / 2 n`, where the n in the denominator is held fixed in
    derivatives. The gradient stays the same, and a least-squares step is one of iteratively reweighted least squares.

    Args:
        kind: a kind in the table.

    Raises:
        ValueError: ``kind`` is not in the table.

    References:
        Rudin, Osher and Fatemi, *Nonlinear total variation based noise removal algorithms*, 1992,
        https://doi.org/10.1016/0167-2789(92)90242-F; Geiping et al., *Inverting Gradients*, NeurIPS 2020,
        https://arxiv.org/abs/2003.14053.

    Example:
        >>> TotalVariation()(torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2))
        tensor(1.)
    """

    def __init__(self, kind: str = "anisotropic") -> None:
        check_choice("kind", kind, _KINDS)
        self.kind = kind

    def __call__(self, images: Tensor) -> Tensor:
        """Return the total variation of images ``(N, C, H, W)``, at least 0."""
        down, across = images.diff(dim=-2), images.diff(dim=-1)
        if self.kind == "smooth":
            return _mean(self._lengths(images)[-1] - _SMALL)
        if self.kind == "squared":
            return _mean(down.square()) + _mean(across.square())
        if self.kind == "anisotropic":
            return _mean(down.abs()) + _mean(across.abs())
        squares = down[..., :-1].square() + across[..., :-1, :].square()
        return _mean((squares + _TINY**2).sqrt() - _TINY)

    @staticmethod
    def _lengths(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both differences of every pixel (0 if there is no next pixel), and n."""
        down = images.diff(dim=-2, append=images[..., -1:, :])
        across = images.diff(dim=-1, append=images[..., -1:])
        return down, across, (down.square() + across.square() + _SMALL**2).sqrt()

    @property
    def is_sum_of_squares(self) -> bool:
        """Whether the kind is ``smooth`` or ``squared``, which are sums of squares."""
        return self.kind in ("smooth", "squared")

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return numbers ``(M,)`` whose squares add up to the value."""
        parts = [point.images.diff(dim=-2), point.images.diff(dim=-1)]
        if self.kind == "smooth":
            down, across, length = self._lengths(point.images)
            length = length.detach()
            parts = [part / (2 * length).sqrt() for part in (down, across, length - _SMALL)]
        return torch.cat([part.flatten() / max(1, part.numel()) ** 0.5 for part in parts])


class L2(Prior):
    r"""The mean square of the pixels, :math:`\mathrm{mean}\,x^2`, which keeps images from becoming too bright.

    References:
        Yin et al., *See through Gradients*, CVPR 2021, https://arxiv.org/abs/2104.07586.

    Example:
        >>> L2()(torch.full((1, 3, 8, 8), 2.0))
        tensor(4.)
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean square of images ``(N, C, H, W)``, at least 0."""
        return images.square().mean()

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return the pixels, divided by the square root of their number."""
        return point.images.flatten() / math.sqrt(point.images.numel())


class BatchNormStatistics(ActivationPrior):
    r"""The distance between the batch statistics before each BatchNorm layer and those of the training set.

    .. math:: \sum_l \lVert \mu_l(x) - \hat\mu_l \rVert_2 + \lVert \sigma_l^2(x) - \hat\sigma_l^2 \rVert_2

    Here :math:`\mu_l(x), \sigma_l^2(x)` are mean and variance of each channel over images and pixels, and
    :math:`\hat\mu_l, \hat\sigma_l^2` are the running statistics of layer l, which are shared with the weights.

    References:
        Yin et al., *See through Gradients* (GradInversion), CVPR 2021, https://arxiv.org/abs/2104.07586.

    Example:
        >>> seen = {"norm": Activation(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))}
        >>> state = {"norm.running_mean": torch.tensor([3.0, 0.0, 4.0]), "norm.running_var": torch.zeros(3)}
        >>> BatchNormStatistics()(seen, state)
        tensor(5.0000)
    """

    def watched(self, victim: Victim) -> Sequence[str]:
        """Return the names of all BatchNorm layers that have running statistics."""
        return [
            name
            for name, module in victim.model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if the network has no BatchNorm layer with running statistics."""
        if not self.watched(victim):
            raise ValueError(
                "Expected a network with BatchNorm in evaluation mode for BatchNormStatistics, which compares with its "
                f"running statistics, but got {type(victim.model).__name__} without any. Call `model.eval()`, or leave "
                "the prior out."
            )

    def __call__(self, activations: Mapping[str, Activation], state: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the distances over all layers, at least 0."""
        distances = []
        for name, seen in activations.items():
            others = [dim for dim in range(seen.inputs.ndim) if dim != 1]
            mean, variance = seen.inputs.mean(others), seen.inputs.var(others, correction=0)
            for found, expected in ((mean, "running_mean"), (variance, "running_var")):
                distances.append((found - state[f"{name}.{expected}"]).square().sum().clamp(min=_TINY**2).sqrt())
        return torch.stack(distances).sum()


def _mean(values: Tensor) -> Tensor:
    """Return the mean, or zero if there are no values, as for the differences between rows of a one-row image."""
    return values.sum() / max(1, values.numel())
