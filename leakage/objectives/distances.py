"""Distances between gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.linalg import vector_norm

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.errors import check_flag
from leakage.objectives.chain_objective import ChainObjective
from leakage.objectives.terms import Batched, Distance, Gradients, Point, Simulate, Slopes
from leakage.pieces import State

# Norms within these bounds can be squared without scaling: nothing overflows, and nothing that matters underflows.
_PLAIN_NORMS = (2.0**-20, 2.0**40)


class SquaredDistance(Distance):
    r"""The sum of squared differences over all gradients, as in DLG and iDLG.

    .. math:: D(g, g^*) = \sum_l \lVert g_l - g_l^* \rVert_2^2

    If the network is a plain chain of layers, :class:`~leakage.objectives.ChainObjective` evaluates the distance for
    many victims at once.

    Args:
        relative: whether a search divides the distance by :math:`\lVert g^* \rVert_2^2`, so that losses and thresholds
            mean the same for every network. If the squared norm of a gradient is below the smallest normal number of
            the precision (norms below about 1e-19 in single precision, 1e-154 in double), the division is not possible
            and the victim is ``uninformative``.

    Raises:
        ValueError: the names or shapes of two gradients differ.

    References:
        Zhu, Liu and Han, *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935.

    Example:
        >>> SquaredDistance()({"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2)})
        tensor(4.)
    """

    isometric = True

    def __init__(self, relative: bool = True) -> None:
        check_flag(relative=relative)
        self.relative = relative

    def __call__(self, gradients: Gradients, shared: Gradients) -> Tensor:
        """Return the sum of squared differences, at least 0."""
        _check_same(gradients, shared)
        return torch.stack([(gradients[name] - wanted).square().sum() for name, wanted in shared.items()]).sum()

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the sum of squared differences in the victim's unit."""
        return self(*_in_unit(point, kept))

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return all differences in the victim's unit, as one vector."""
        gradients, shared = _in_unit(point, kept)
        return torch.cat([(gradients[name] - wanted).flatten() for name, wanted in shared.items()])

    def state(self, victim: Victim, dtype: torch.dtype) -> State:
        """Return empty ``unit`` and ``scale``; the unit is a power of two that scales extreme gradients to about 1."""
        return {name: torch.empty(0, dtype=dtype) for name in ("unit", "scale")} if self.relative else {}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return unit and scale, computed from the norms of the shared gradients."""
        if not self.relative:
            return {}
        largest = _largest(shared.gradients)
        plain = (largest > _PLAIN_NORMS[0]) & (largest < _PLAIN_NORMS[1]) | (largest == 0)
        # Multiplying by a power of two is exact.
        unit = torch.where(plain, 1.0, torch.exp2(-largest.double().log2().floor()).to(largest))
        flat = [tensor.flatten(1) for tensor in shared.gradients.values()]
        scale = 1 / cast(Tensor, sum((unit[:, None] * tensor).square().sum(1) for tensor in flat))
        # A gradient of zero leaves nothing to compare with.
        return {"unit": unit, "scale": torch.where(torch.isfinite(scale), scale, 1.0)}

    def needed(self, kept: State) -> State:
        """Leave out the unit if it is 1 for all victims, which is the usual case."""
        plain = "unit" in kept and bool((kept["unit"] == 1).all())
        return {name: tensor for name, tensor in kept.items() if name != "unit" or not plain}

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return whether the squared norm of each gradient is large enough for the precision, ``(V,)``."""
        largest = _largest(shared.gradients)
        return largest > torch.finfo(largest.dtype).tiny ** 0.5 if self.relative else largest > 0

    def batched(self, victim: Victim, simulate: Simulate | None = None) -> Batched | None:
        """Return an evaluation without double backward, or None if the network is no chain or a subclass differs."""
        if any(getattr(type(self), name) is not getattr(SquaredDistance, name) for name in ("__call__", "value")):
            return None
        try:
            chain = ChainObjective(victim, simulate)
        except ValueError:
            return None
        return lambda shared, kept, images, targets: chain(shared, images, targets, kept.get("unit"))


def _in_unit(point: Point, kept: State) -> tuple[Gradients, Gradients]:
    """Return the dummies' gradients and the shared gradients, multiplied by the victim's unit."""
    if "unit" not in kept:
        return point.gradients, point.shared
    both = ({name: kept["unit"] * part for name, part in side.items()} for side in (point.gradients, point.shared))
    gradients, shared = both
    return gradients, shared


class CosineDistance(Distance):
    r"""One minus the cosine of the angle between two gradients, each taken as one long vector.

    .. math:: D(g, g^*) = 1 - \frac{\langle g, g^* \rangle}{\lVert g \rVert \, \lVert g^* \rVert}
        = \frac{1}{2} \left\lVert \frac{g}{\lVert g \rVert} - \frac{g^*}{\lVert g^* \rVert} \right\rVert^2

    It is computed in the second form, which stays accurate if the two gradients are close: in single precision, the
    rounding error is below 1e-12, while cancellation in the first form leaves an error of 1e-7. The lengths of the
    gradients do not matter.

    Returns:
        A value from 0 to 2; 1 if one of the gradients is zero and so has no direction.

    Raises:
        ValueError: the names or shapes of two gradients differ.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053.

    Example:
        >>> CosineDistance()({"w": torch.ones(2, 2)}, {"w": -2 * torch.ones(2, 2)})
        tensor(2.)
    """

    isometric = by_direction = True

    def __call__(self, gradients: Gradients, shared: Gradients) -> Tensor:
        """Return half the squared difference of the two directions."""
        found, wanted = _vectors(gradients, shared)
        both = (found.detach().abs().amax() > 0) & (wanted.abs().amax() > 0)
        return torch.where(both, (_direction(found) - _direction(wanted)).square().sum() / 2, 1.0)

    def slopes(self, points: Point, kept: State, own_weights: bool) -> tuple[Tensor, Slopes]:
        r"""Return values and derivatives, computed layer by layer so that data stay in the CPU caches.

        With the directions :math:`u, u^*`, the derivative is :math:`(u - u^* - D u) / \lVert g \rVert`.
        """
        kind = type(self)
        lengths, others = (_lengths(gradients) for gradients in (points.gradients, points.shared))
        if (kind.__call__, kind.value) != (CosineDistance.__call__, CosineDistance.value) or not _are_plain(
            torch.cat([lengths, others])
        ):
            return super().slopes(points, kept, own_weights)
        _check_same(points.gradients, points.shared)
        rates, other_rates = 1 / lengths[:, None], 1 / others[:, None]
        found = {}
        for name, wanted in points.shared.items():
            # Use two products, because broadcasting in `addcmul` is several times slower.
            found[name] = (points.gradients[name].flatten(1) * rates).sub_(wanted.flatten(1) * other_rates)
        values = _lengths(found).square() / 2
        for name, difference in found.items():
            difference.sub_(points.gradients[name].flatten(1) * (rates * values[:, None])).mul_(rates)
        return values, {
            ("gradients", name): difference.view_as(points.gradients[name]) for name, difference in found.items()
        }

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return the difference of the two directions, divided by the square root of 2."""
        found, wanted = _vectors(point.gradients, point.shared)
        return (_direction(found) - _direction(wanted)) / 2**0.5

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return whether each gradient has a direction, ``(V,)``."""
        return _largest(shared.gradients) > 0


def _vectors(gradients: Gradients, shared: Gradients) -> tuple[Tensor, Tensor]:
    """Return the dummies' gradients and the shared gradients, each as one long vector."""
    _check_same(gradients, shared)
    parts = ((gradients[name].reshape(-1), wanted.reshape(-1)) for name, wanted in shared.items())
    found, wanted = zip(*parts, strict=True)
    return torch.cat(found), torch.cat(wanted)


def _lengths(gradients: Gradients) -> Tensor:
    """Return the norm of each victim's gradient, ``(V,)``."""
    lengths: Tensor = vector_norm(
        torch.stack([vector_norm(part.flatten(1), dim=1) for part in gradients.values()]), dim=0
    )
    return lengths


def _are_plain(lengths: Tensor) -> bool:
    return bool(((lengths > _PLAIN_NORMS[0]) & (lengths < _PLAIN_NORMS[1])).all())


def _direction(vector: Tensor) -> Tensor:
    """Return the vector scaled to length 1, even if squares of its entries would underflow."""
    largest = vector.detach().abs().amax()
    vector = vector / torch.where(largest > 0, largest, 1.0)
    # The gradient of a norm is not defined at zero.
    return vector / torch.where(largest > 0, vector.square().sum(), 1.0).sqrt()


class LengthDistance(Distance):
    r"""The squared logarithm of the ratio of two gradients' lengths, each taken as one long vector.

    .. math:: D(g, g^*) = \left( \ln \frac{\lVert g \rVert}{\lVert g^* \rVert} \right)^2

    It measures what :class:`CosineDistance` ignores. If clients keep their learning rate secret, attacks add this term
    automatically where it is needed.

    Returns:
        A value of at least 0; large but finite if one of the gradients is zero.

    Raises:
        ValueError: the names or shapes of two gradients differ.

    Example:
        >>> LengthDistance()({"w": torch.ones(2, 2)}, {"w": -torch.ones(2, 2)})
        tensor(0.)
    """

    isometric = True

    def __call__(self, gradients: Gradients, shared: Gradients) -> Tensor:
        """Return the squared logarithm of the ratio of lengths."""
        return _log_ratio(gradients, shared).square()

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return the logarithm of the ratio of lengths, ``(1,)``."""
        return _log_ratio(point.gradients, point.shared)[None]

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return whether each gradient is other than zero, ``(V,)``."""
        return _largest(shared.gradients) > 0


def _log_ratio(gradients: Gradients, shared: Gradients) -> Tensor:
    found, wanted = (_log_length(vector) for vector in _vectors(gradients, shared))
    return found - wanted


def _log_length(vector: Tensor) -> Tensor:
    """Return the logarithm of the norm, even if squares of the entries would underflow."""
    largest = vector.detach().abs().amax()
    largest = torch.where(largest > 0, largest, 1.0)
    squares = (vector / largest).square().sum()
    return largest.log() + squares.clamp(min=torch.finfo(vector.dtype).tiny).log() / 2


class RowCosineDistance(Distance):
    r"""One minus the cosine for the weights of each output unit, summed; the distance of dataset condensation.

    The gradient of a layer's weights is taken as a matrix with one row per output (unit or channel):

    .. math::
        D(g, g^*) = \sum_l \sum_{i} 1 - \frac{\langle g_{l,i}, g^*_{l,i} \rangle}
        {\lVert g_{l,i} \rVert \, \lVert g^*_{l,i} \rVert + 10^{-6}}

    Gradients with fewer than two dimensions (biases, scales of normalisation layers) are left out.

    Returns:
        A value from 0 to twice the number of rows.

    Raises:
        ValueError: the names or shapes differ, or all gradients have fewer than two dimensions.

    References:
        Zhao et al., *Dataset Condensation with Gradient Matching*, ICLR 2021, appendix A,
        https://arxiv.org/abs/2006.05929.

    Example:
        >>> RowCosineDistance()({"w": torch.eye(2), "b": torch.ones(2)}, {"w": 3 * torch.eye(2), "b": torch.zeros(2)})
        tensor(0.00)
    """

    by_direction = True

    def __call__(self, gradients: Gradients, shared: Gradients) -> Tensor:
        """Return the sum over all rows of all layers."""
        _check_same(gradients, shared)
        layers = [name for name, wanted in shared.items() if wanted.ndim > 1]
        if not layers:
            raise ValueError(f"Expected a gradient of at least two dimensions, but got only {sorted(shared)}.")
        return torch.stack([_one_minus_cosines(gradients[name], shared[name]).sum() for name in layers]).sum()

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return whether any row of each gradient has a direction, ``(V,)``."""
        return _largest(shared.gradients) > 0


def _one_minus_cosines(gradient: Tensor, target: Tensor) -> Tensor:
    found, wanted = gradient.flatten(1), target.flatten(1)
    lengths: Tensor = vector_norm(found, dim=1) * vector_norm(wanted, dim=1)
    return 1 - (found * wanted).sum(1) / (lengths + 1e-6)  # `@` would be rounded under autocast


def _largest(gradients: Gradients) -> Tensor:
    """Return the largest absolute value of an entry of each victim's gradient, ``(V,)``."""
    ends = [tensor.flatten(1).aminmax(dim=1) for tensor in gradients.values() if tensor[0].numel()]
    return torch.stack([torch.maximum(-low, high) for low, high in ends]).amax(0)


def _check_same(gradients: Gradients, targets: Gradients) -> None:
    if gradients.keys() != targets.keys():
        raise ValueError(
            f"Expected `gradients` and `targets` with the same names, but got {sorted(gradients)} and "
            f"{sorted(targets)}."
        )
    for name, target in targets.items():
        if gradients[name].shape != target.shape:
            raise ValueError(
                "Expected `gradients` and `targets` with the same shapes, but got "
                f"{tuple(gradients[name].shape)} and {tuple(target.shape)} for {name!r}."
            )


DISTANCES: dict[str, type[Distance]] = {
    "squared": SquaredDistance,
    "cosine": CosineDistance,
    "row_cosine": RowCosineDistance,
}
"""Distances by name, as accepted by the argument ``distance`` of attacks and of condensation."""
