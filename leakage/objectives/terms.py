"""The terms of an objective, which are added with weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakage.clients.activations import Activation
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.pieces import Piece, State, stable_repr

Gradients = Mapping[str, Tensor]
"""The gradient of a loss with respect to each parameter, by the parameter's name."""
# A function of what V victims shared, the term's state, images and class probabilities. It returns the values (V,) and
# their derivatives by images (V, N, C, H, W) and by class probabilities (V, N, K); the latter are None if zero.
Batched = Callable[[SharedGradient, State, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# From gradients of V victims and what they shared: what they would have shared of these gradients, as an attacker
# simulates their defenses, and a function from derivatives by this to derivatives by the gradients, in which a missing
# derivative is zero.
Simulate = Callable[[Gradients, Gradients], tuple[Gradients, Callable[[Gradients], Gradients]]]
# Derivatives of the values of V victims by the tensors of their points. Keys are ``("images", "")``,
# ``("targets", "")``, ``("gradients", name)``, and for activations ``("inputs", module)`` and ``("outputs", module)``.
# A missing derivative is zero.
Slopes = dict[tuple[str, str], Tensor]


@dataclass
class Point:
    """The current point of one victim's search, with all that a term may depend on.

    Attributes:
        images: dummy images, ``(N, C, H, W)``.
        targets: class probabilities of the dummy images, ``(N, K)``.
        gradients: gradients of the dummy images, by parameter name.
        shared: gradients that the victim shared, by parameter name.
        activations: inputs and outputs of the modules that the term watches, by module name.
        state: weights and buffers of the victim's network, by name.
    """

    images: Tensor
    targets: Tensor
    gradients: Gradients
    shared: Gradients
    activations: Mapping[str, Activation]
    state: Mapping[str, Tensor]


class Term(Piece, ABC):
    """A term of the objective that a search minimises.

    Terms can be added and weighted: ``CosineDistance() + 1e-2 * TotalVariation()``.

    To write your own term, subclass :class:`Distance`, :class:`Prior` or :class:`ActivationPrior` and define
    ``__call__``. It is a function of one victim that ``torch.func.vmap`` runs for many victims, so it must not branch
    on values (use ``torch.where`` instead of ``if x > 0``) or convert them to Python numbers (``x.item()``). A term may
    also be an ``nn.Module``, or hold one.

    Attributes:
        isometric: whether the term does not depend on gradients, or stays the same if the dummies' gradients and the
            shared gradient are written in another orthonormal basis. If so, the gradient of a last layer with many
            classes may be given in fewer numbers (:mod:`leakage.clients.low_rank`).
        fades: whether a solver may lower the weight of the term as the search converges, because it is a prior.
        weighed_by_noise: whether its ``scale`` is multiplied by the variance of the noise on an entry of the gradient,
            relative to the squared norm of the shared gradient.
    """

    isometric: ClassVar[bool] = False
    fades: ClassVar[bool] = False
    weighed_by_noise: ClassVar[bool] = False

    @abstractmethod
    def value(self, point: Point, kept: State) -> Tensor:
        """Return the term for one victim as a differentiable scalar.

        Args:
            point: current point of the victim's search.
            kept: what :meth:`begin` returned for this victim, without the victims' dimension.
        """

    def slopes(self, points: Point, kept: State, own_weights: bool) -> tuple[Tensor, Slopes]:
        """Return the values ``(V,)`` of V victims, and their derivatives by all tensors that the term uses.

        Args:
            points: points of V victims, without a graph. Every tensor has a leading victims' dimension; those of
                ``state`` have it only if each victim has its own weights.
            kept: what :meth:`begin` returned.
            own_weights: whether each victim has its own weights.
        """
        held: Slopes = {("images", ""): points.images, ("targets", ""): points.targets}
        held |= {("gradients", name): tensor for name, tensor in points.gradients.items()}
        for name, seen in points.activations.items():
            held |= {("inputs", name): seen.inputs, ("outputs", name): seen.outputs}

        def value(held: Slopes, shared: Gradients, kept: State, state: Mapping[str, Tensor]) -> Tensor:
            gradients = {name: held["gradients", name] for name in points.gradients}
            seen = {name: Activation(held["inputs", name], held["outputs", name]) for name in points.activations}
            return self.value(Point(held["images", ""], held["targets", ""], gradients, shared, seen, state), kept)

        with torch.enable_grad():
            held = {key: tensor.detach().requires_grad_() for key, tensor in held.items()}
            evaluate = vmap(value, in_dims=(0, 0, 0, 0 if own_weights else None))
            values = evaluate(held, dict(points.shared), kept, dict(points.state))
            if not values.requires_grad:
                return values, {}
            found = torch.autograd.grad(values.sum(), list(held.values()), allow_unused=True)
        return values.detach(), {key: by for key, by in zip(held, found, strict=True) if by is not None}

    @property
    def is_sum_of_squares(self) -> bool:
        """Whether the term defines :meth:`residuals`, which second-order solvers need."""
        return type(self).residuals is not Term.residuals

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Return numbers ``(M,)`` whose squares add up to :meth:`value`."""
        raise NotImplementedError(f"Expected a term that is a sum of squares, but got {self!r}.")

    def watched(self, victim: Victim) -> Sequence[str]:
        """Return the names of the modules whose inputs and outputs the term needs."""
        return ()

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if the term can't be used on such victims."""

    def state(self, victim: Victim, dtype: torch.dtype) -> State:
        """Return empty tensors, with zero victims, for what the term keeps of each victim during the search.

        An entry ``"scale"`` of shape ``(V,)`` multiplies the term.
        """
        return {}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """Return the entries of :meth:`state` for V victims, computed from what they shared.

        ``shared.labels`` are the labels that victims revealed or that were inferred before the search, or None.
        """
        return {}

    def needed(self, kept: State) -> State:
        """Return only the entries that affect the result for these V victims."""
        return kept

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return whether each victim's gradient contains anything that this term can measure, ``(V,)``."""
        return torch.ones(len(shared), dtype=torch.bool)

    def batched(self, victim: Victim, simulate: Simulate | None = None) -> Batched | None:
        """Return a faster function for many victims at once, without the scale, or None if there is none.

        Args:
            victim: the victim.
            simulate: what to do with gradients before they are compared; None for nothing.
        """
        return None

    def parts(self) -> list[tuple[float, Term]]:
        """Return the terms that this term adds up, with their weights."""
        return [(1.0, self)]

    def __add__(self, other: Term) -> Sum:
        """Return the sum of both terms."""
        if not isinstance(other, Term):
            return NotImplemented
        parts = [*self.parts(), *other.parts()]
        return Sum([term for _, term in parts], [weight for weight, _ in parts])

    def __mul__(self, weight: float) -> Sum:
        """Return the term multiplied by a weight."""
        return Sum([self], [weight])

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Sum:
        """Return the term divided by a number."""
        return self * (1 / weight)

    def __radd__(self, other: object) -> Term:
        """Support :func:`sum`, which starts with 0."""
        return self if other == 0 else NotImplemented


class Sum(Term):
    """A weighted sum of terms, as created by ``a + 0.1 * b``; use the class directly in YAML.

    Args:
        terms: terms to add.
        weights: weight of each term, by default 1; a term of weight 0 is left out.

    Raises:
        ValueError: there are no terms, there is not one weight per term, or a weight is negative or not finite.

    Example:
        >>> from leakage.objectives import SquaredDistance, TotalVariation
        >>> SquaredDistance() + 0.1 * TotalVariation()
        SquaredDistance(relative=True) + 0.1 * TotalVariation(kind='anisotropic')
    """

    def __init__(self, terms: Sequence[Term], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if not terms or len(weights) != len(terms):
            raise ValueError(
                f"Expected at least one of `terms` and as many `weights`, but got {len(terms)} and {len(weights)}."
            )
        self.terms: list[Term] = []
        self.weights: list[float] = []
        for term, weight in zip(terms, weights, strict=True):
            if not isinstance(term, Term):
                raise ValueError(
                    f"Expected `terms` of leakage.objectives, such as a Prior, but got {type(term).__name__}."
                )
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
                raise ValueError(f"Expected `weights` of at least 0, but got {weight!r}.")
            if weight:
                self.terms += [part for _, part in term.parts()]
                self.weights += [weight * inner for inner, _ in term.parts()]

    def parts(self) -> list[tuple[float, Term]]:
        """Return the single terms with their weights."""
        return list(zip(self.weights, self.terms, strict=True))

    def value(self, point: Point, kept: State) -> Tensor:
        """Raise an error, because the parts of a sum are evaluated one by one, each with its own state."""
        raise NotImplementedError("Expected the parts of a sum to be evaluated one by one.")

    def __repr__(self) -> str:
        words = [f"{'' if weight == 1 else f'{weight:g} * '}{stable_repr(term)}" for weight, term in self.parts()]
        return " + ".join(words) or "0"


class Distance(Term):
    """A distance between the dummies' gradient and the shared gradient; a subclass is a function of the two.

    Attributes:
        by_direction: whether the distance stays the same if a gradient is multiplied by a positive number. If clients
            keep their learning rate secret and all distances of an attack have this property, the attack also compares
            lengths.

    Example:
        >>> class LargestDifference(Distance):
        ...     def __call__(self, gradients, shared):
        ...         return torch.stack([(gradients[name] - shared[name]).abs().max() for name in shared]).max()
        >>> float(LargestDifference()({"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}))
        2.0
    """

    by_direction: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, gradients: Gradients, shared: Gradients) -> Tensor:
        """Return the distance of one victim, a scalar of at least 0.

        Args:
            gradients: gradients of the dummies by parameter name, of any shapes.
            shared: gradients that the victim shared, with the same names and shapes.
        """

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the distance at this point."""
        return self(point.gradients, point.shared)


class Prior(Term):
    """Prior knowledge of what images look like; a subclass is a function of the images of one victim.

    Example:
        >>> class Bright(Prior):
        ...     def __call__(self, images):
        ...         return (1 - images).square().mean()
        >>> float(Bright()(torch.full((1, 3, 8, 8), 0.5)))
        0.25
    """

    isometric = True
    fades = True

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Return the prior of images ``(N, C, H, W)``, a scalar."""

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the prior at this point."""
        return self(point.images)

    def batched(self, victim: Victim, simulate: Simulate | None = None) -> Batched | None:
        """Return an evaluation without the network, or None if a subclass does not depend on images alone."""
        if type(self).value is not Prior.value:
            return None
        evaluate = vmap(grad_and_value(self))

        def values(
            shared: SharedGradient, kept: State, images: Tensor, targets: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            by_images, found = evaluate(images)
            return found, by_images, None

        return values


class ActivationPrior(Term):
    """Prior knowledge of activations in the network.

    A subclass names modules and is a function of their inputs and outputs for one victim. The activations are collected
    in the same forward pass that computes the gradients. With local steps, they come from the first pass over all
    images.
    """

    isometric = True
    fades = True

    @abstractmethod
    def watched(self, victim: Victim) -> Sequence[str]:
        """Return the names of the modules, as in ``victim.model.named_modules()``."""

    @abstractmethod
    def __call__(self, activations: Mapping[str, Activation], state: Mapping[str, Tensor]) -> Tensor:
        """Return the prior, a scalar, for the activations of one victim and its network's weights and buffers."""

    def value(self, point: Point, kept: State) -> Tensor:
        """Return the prior at this point."""
        return self(point.activations, point.state)
