"""A normal distribution fitted to the attacker's own images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_count
from leakage.labels.auxiliary import Auxiliary
from leakage.objectives.terms import Batched, Point, Simulate, Term
from leakage.pieces import State
from leakage.seeds import derive_seed

# Minimum variances to try; their square roots are from 0.3 % to 30 % of the range of brightness.
_FLOORS = [10 ** (place / 4) for place in range(-20, -3)]
# Share of the images that are used to choose the minimum variance.
_HELD_OUT = 1 / 4


class GaussianPrior(Term):
    r"""A normal prior of images, fitted to the attacker's own images.

    .. math:: R(x, y) = \sum_{n=1}^{N} (x_n - \mu_{y_n})^\top \Sigma_{y_n}^{-1} (x_n - \mu_{y_n})

    If the auxiliary images have labels, each class has its own mean and covariance, else all images share one. A few
    images say little about most directions, so no direction has a variance below a minimum. The minimum is the one with
    the largest likelihood on a quarter of the images, which is held out of the fit.

    If clients are known to add noise, the weight of the prior follows from it. With :math:`\nu^2` the variance of the
    noise on an entry of the gradient, and together with :class:`~leakage.objectives.SquaredDistance`, the objective is

    .. math:: \frac{1}{\lVert g^* \rVert^2} \Bigl( \lVert g(x) - g^* \rVert^2 + \nu^2 R(x, y) \Bigr).

    Its minimum is at the most probable images if the noise is normal. A weight given to the term multiplies this one.
    For defenses that round, clip or drop entries, :meth:`leakage.defenses.Defense.noise_variance` gives :math:`\nu^2`.
    Without any defense, :math:`\nu` is 1e-5 of the gradient's root mean square, about the size of rounding errors.

    The term is a sum of squares, for second-order solvers. If labels are searched for, the covariance is that of the
    class that is most probable at this point, and the mean is the mean over all classes, weighted by their
    probabilities.

    Shapes: images ``(N, C, H, W)`` around [0, 1], class probabilities ``(N, K)``.

    Args:
        auxiliary: images of the same kind as the victims' images, but disjoint from them.
        seed: seed of the split that holds out images to choose the minimum variance.

    Raises:
        ValueError: there are fewer than eight images, or fewer than eight of a class; in ``fit``, the images have
            another shape than the victims', or labels of other classes.

    References:
        Balunović et al., *Bayesian Framework for Gradient Leakage*, ICLR 2022, https://arxiv.org/abs/2111.04706, which
        describes attacks by their prior and likelihood.

    Example:
        >>> from leakage.labels import Auxiliary
        >>> own = 0.5 + 0.1 * torch.randn(500, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> prior = GaussianPrior(Auxiliary(own.clamp(0, 1)))
        >>> round(float(prior(torch.full((1, 1, 2, 2), 0.6), torch.ones(1, 1))))  # one standard deviation in each of 4
        4
    """

    isometric = True
    weighed_by_noise = True

    def __init__(self, auxiliary: Auxiliary, seed: int = 0) -> None:
        if not isinstance(auxiliary, Auxiliary):
            raise ValueError(
                f"Expected `auxiliary` to be a leakage.labels.Auxiliary, but got {type(auxiliary).__name__}."
            )
        check_count(0, seed=seed)
        self.auxiliary, self.seed = auxiliary, seed
        images, labels = auxiliary.images.flatten(1).double(), auxiliary.labels
        labels = torch.zeros(len(images), dtype=torch.long) if labels is None else labels.long()
        fitted = [_fit(images[labels == label], derive_seed(seed, label, "prior")) for label in range(_classes(labels))]
        rank = max(factors.shape[1] for _, factors, _, _ in fitted)

        def padded(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, rank - tensor.shape[-1]))

        self._fitted = (
            torch.stack([mean for mean, _, _, _ in fitted]),  # (K, D)
            torch.stack([padded(factors) for _, factors, _, _ in fitted]),  # (K, D, R), orthonormal
            torch.stack([padded(gains) for _, _, gains, _ in fitted]),  # (K, R), the share of a deviation they keep
            torch.tensor([1 / std for _, _, _, std in fitted], dtype=torch.float64),  # (K,)
        )
        self._prepared: tuple[Tensor, ...] = self._fitted

    def prepare(self, like: Tensor) -> None:
        """Move the distribution to the device and precision of the search."""
        self._prepared = tuple(tensor.to(like) for tensor in self._fitted)

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if the auxiliary images do not have the victims' shape and classes."""
        self.auxiliary.check(victim.protocol)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the prior R, at least 0."""
        return self._whitened(images, targets).square().sum()

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the prior at this point."""
        return self(point.images, point.targets)

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return the whitened images, whose squares add up to the value."""
        return self._whitened(point.images, point.targets).flatten()

    def _whitened(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the deviations from the mean, scaled to unit variance in all directions, ``(N, D)``."""
        means, factors, gains, sharpness = (tensor.to(images) for tensor in self._prepared)
        if len(means) == 1:
            targets = torch.ones_like(targets[:, :1])
        own = (targets.argmax(1, keepdim=True) == torch.arange(targets.shape[1], device=targets.device)).to(images)
        apart = images.flatten(1) - targets @ means
        along = torch.einsum("nd,kdr->nkr", apart, factors) * (own[..., None] * (1 - gains))
        return (own @ sharpness)[:, None] * (apart - torch.einsum("nkr,kdr->nd", along, factors))

    def state(self, victim: Victim, dtype: torch.dtype) -> State:
        """Return an empty ``scale``, the weight that follows from the noise."""
        return {"scale": torch.empty(0, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return a ``scale`` of one, which is then multiplied by the noise variance."""
        return {"scale": next(iter(shared.gradients.values())).new_ones(len(shared))}

    def batched(self, victim: Victim, simulate: Simulate | None = None) -> Batched:
        """Return an evaluation for many victims at once, without the network."""
        evaluate = vmap(grad_and_value(self, argnums=(0, 1)))

        def values(
            shared: SharedGradient, kept: State, images: Tensor, targets: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            (by_images, by_targets), found = evaluate(images, targets)
            return found, by_images, by_targets

        return values


def _classes(labels: Tensor) -> int:
    counts = labels.bincount()
    if int(counts.min()) < 8:
        rare = (counts < 8).nonzero().flatten().tolist()
        raise ValueError(
            "Expected at least eight `auxiliary` images of every class for GaussianPrior, but got fewer of "
            f"{rare[:10]}{', ...' if len(rare) > 10 else ''}. Leave the labels out to fit one distribution to all."
        )
    return len(counts)


def _fit(images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Fit images ``(M, D)``: mean, directions of more than the minimum variance, their gains, minimum deviation.

    The gain of a direction is the minimum standard deviation divided by the standard deviation of the direction.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order.tensor_split([math.ceil(_HELD_OUT * len(images))])
    mean = images[rest].mean(0)
    apart = images[rest] - mean
    variances, directions = torch.linalg.eigh(apart.T @ apart / len(apart))
    along = ((images[held_out] - mean) @ directions).square().mean(0)

    def surprise(floor: float) -> float:
        raised = variances.clamp(min=floor)
        return float((raised.log() + along / raised).sum())

    floor = min(_FLOORS, key=surprise)
    wide = variances > floor
    return mean, directions[:, wide], (floor / variances[wide]).sqrt(), math.sqrt(floor)
