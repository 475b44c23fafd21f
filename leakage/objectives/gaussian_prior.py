"""A normal distribution of images, fitted to some of the attacker's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_count
from leakage.labels.auxiliary import Auxiliary
from leakage.objectives.terms import Batched, Point, Term
from leakage.pieces import State
from leakage.seeds import derive_seed

# Least variances that are tried: their roots are steps of brightness from 0.3 % to 30 %.
_FLOORS = [10 ** (place / 4) for place in range(-20, -3)]
# Share of the images by which the least variance is chosen.
_HELD_OUT = 1 / 4


class GaussianPrior(Term):
    r"""What images of this kind look like: a normal distribution, fitted to images of the attacker's own.

    .. math:: R(x, y) = \sum_{n=1}^{N} (x_n - \mu_{y_n})^\top \Sigma_{y_n}^{-1} (x_n - \mu_{y_n})

    with mean and covariance of each class where the images have labels, else of all. No direction has a variance below
    a least one, which is chosen by the likelihood of a quarter of the images, that the rest was fitted without: few
    images say little of most directions.

    Where clients are known to add noise, its weight follows: with :math:`\nu^2` the variance of the noise on an entry
    of the gradient, and :class:`~leakage.objectives.SquaredDistance` beside it, the objective is

    .. math:: \frac{1}{\lVert g^* \rVert^2} \Bigl( \lVert g(x) - g^* \rVert^2 + \nu^2 R(x, y) \Bigr),

    least at the most probable images, if the noise is normal. The weight that it is given multiplies this one. Against
    defenses that round, cut or leave out, :math:`\nu` is what :meth:`leakage.defenses.Defense.noise_variance` says.
    Without any it is 1e-5 of the gradient's root mean square, about what rounding leaves.

    It is a sum of squares, for second-order solvers. Where labels are searched for, the covariance is that of the class
    which is the most probable at this point, and the mean that of all by their probabilities.

    Shapes: images ``(N, C, H, W)`` around [0, 1], class probabilities ``(N, K)``.

    Args:
        auxiliary: images of the victims' kind, but never theirs.
        seed: of which of them choose the least variance.

    Raises:
        ValueError: fewer than eight images, or than eight of a class; in ``fit``, images of another shape or labels of
            other classes than the victims'.

    References:
        Balunović et al., *Bayesian Framework for Gradient Leakage*, ICLR 2022, https://arxiv.org/abs/2111.04706, where
        attacks differ by prior and likelihood.

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
            torch.stack([padded(gains) for _, _, gains, _ in fitted]),  # (K, R), what they keep of a deviation
            torch.tensor([1 / std for _, _, _, std in fitted], dtype=torch.float64),  # (K,)
        )
        self._prepared: tuple[Tensor, ...] = self._fitted

    def prepare(self, like: Tensor) -> None:
        """Take the distribution to where the search takes place, in its precision."""
        self._prepared = tuple(tensor.to(like) for tensor in self._fitted)

    def check(self, victim: Victim) -> None:
        """The images must be of the victims' shape, and of their classes."""
        self.auxiliary.check(victim.protocol)

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """At least 0."""
        return self._whitened(images, targets).square().sum()

    def value(self, point: Point, kept: State) -> Tensor:
        """At this point."""
        return self(point.images, point.targets)

    def residuals(self, point: Point, kept: State) -> Tensor:
        """What is left of the images when all directions vary alike."""
        return self._whitened(point.images, point.targets).flatten()

    def _whitened(self, images: Tensor, targets: Tensor) -> Tensor:
        """``(N, D)``."""
        means, factors, gains, sharpness = (tensor.to(images) for tensor in self._prepared)
        if len(means) == 1:
            targets = torch.ones_like(targets[:, :1])
        own = (targets.argmax(1, keepdim=True) == torch.arange(targets.shape[1], device=targets.device)).to(images)
        apart = images.flatten(1) - targets @ means
        along = torch.einsum("nd,kdr->nkr", apart, factors) * (own[..., None] * (1 - gains))
        return (own @ sharpness)[:, None] * (apart - torch.einsum("nkr,kdr->nd", along, factors))

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """``scale``, the weight that the noise gives it."""
        return {"scale": torch.empty(0, dtype=dtype)}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """One, which is multiplied by the noise."""
        return {"scale": next(iter(shared.gradients.values())).new_ones(len(shared))}

    def batched(self, victim: Victim) -> Batched:
        """Without the network."""
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
            f"{rare[:10]}{', ...' if len(rare) > 10 else ''}. Leave the labels out for one distribution of all."
        )
    return len(counts)


def _fit(images: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of images ``(M, D)``: mean, directions that vary more than the least, what they keep, least standard deviation.

    What a direction keeps is the least standard deviation over its own.
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
