"""What an objective is made of: terms that are added up with weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from leakage.clients.activations import Activation
from leakage.clients.protocol import Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.pieces import Piece, State, tell

Gradients = Mapping[str, Tensor]
"""The gradient of a loss by each parameter, by the parameter's name."""
# Values (V,) of V victims with their derivatives by images (V, N, C, H, W) and by class probabilities (V, N, K), None
# where they are zero, from what the victims shared, what the term keeps of them, images and class probabilities.
Batched = Callable[[SharedGradient, State, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# Derivatives of the values of V victims by what their points hold: ``("images", "")``, ``("targets", "")``, and by name
# ``("gradients", name)`` and ``("inputs", module)``, ``("outputs", module)`` of activations. What is missing is zero.
Slopes = dict[tuple[str, str], Tensor]


@dataclass
class Point:
    """Where one victim's search is, and what its client shared: what a term may look at.

    Attributes:
        images: the dummy images, ``(N, C, H, W)``.
        targets: their class probabilities, ``(N, K)``.
        gradients: those of the dummies, by name.
        shared: those that the victim shared, by name.
        activations: inputs and outputs of the modules that the term watches, by their names.
        state: weights and buffers of the victim's network, by name.
    """

    images: Tensor
    targets: Tensor
    gradients: Gradients
    shared: Gradients
    activations: Mapping[str, Activation]
    state: Mapping[str, Tensor]


class Term(Piece, ABC):
    """A function of dummies that a search lowers. Terms add up: ``CosineDistance() + 1e-2 * TotalVariation()``.

    Of your own: subclass :class:`Distance`, :class:`Prior` or :class:`ActivationPrior` and write ``__call__``. It is a
    function of one victim that ``torch.func.vmap`` runs for many: it may not branch on numbers (``if x > 0``;
    ``torch.where`` may), nor take them out (``x.item()``). It may be an ``nn.Module`` too, or hold one.

    Attributes:
        isometric: whether it stays the same when the gradients of the dummies and that which was shared are written in
            other orthonormal coordinates, or does not look at them: those of a last layer with many classes may then be
            given in fewer numbers (:mod:`leakage.clients.low_rank`).
        fades: whether a solver may lower its weight as the search gets nearer: it is a prior.
        weighed_by_noise: whether its ``scale`` is multiplied by the variance of the noise on an entry of the gradient,
            relative to the squared norm of what was shared.
    """

    isometric: ClassVar[bool] = False
    fades: ClassVar[bool] = False
    weighed_by_noise: ClassVar[bool] = False

    @abstractmethod
    def value(self, point: Point, kept: State) -> Tensor:
        """The term at one victim's dummies, a scalar; differentiable.

        Args:
            point: the dummies, and what they give.
            kept: what :meth:`begin` gave for this victim, without the victims' dimension.
        """

    def slopes(self, points: Point, kept: State, own_weights: bool) -> tuple[Tensor, Slopes]:
        """Values ``(V,)`` of V victims, and their derivatives by all that the term looked at.

        Args:
            points: of V victims, without a graph; every tensor has a leading victims' dimension, those of ``state``
                if victims have weights of their own.
            kept: what :meth:`begin` gave.
            own_weights: whether they have.
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
        """Whether it has :meth:`residuals`, which second-order solvers need."""
        return type(self).residuals is not Term.residuals

    def residuals(self, point: Point, kept: State) -> Tensor:
        """Numbers ``(M,)`` whose squares add up to :meth:`value`."""
        raise NotImplementedError(f"Expected a term that is a sum of squares, but got {self!r}.")

    def watched(self, model: nn.Module) -> Sequence[str]:
        """Names of the modules whose inputs and outputs it wants to see."""
        return ()

    def check(self, victim: Victim) -> None:
        """Raise a ``ValueError`` if it can't be used on such victims."""

    def state(self, protocol: Protocol, dtype: torch.dtype) -> State:
        """What it keeps of each victim while it is searched for, as tensors without a victim.

        An entry ``"scale"`` of shape ``(V,)`` multiplies the term.
        """
        return {}

    def begin(self, shared: SharedGradient, victim: Victim) -> State:
        """The entries of :meth:`state` for V victims, from what they shared."""
        return {}

    def needed(self, kept: State) -> State:
        """Those of the entries of V victims that change anything for them."""
        return kept

    def informative(self, shared: SharedGradient) -> Tensor:
        """``(V,)``, whether a victim's gradient says anything that this term can measure."""
        return torch.ones(len(shared), dtype=torch.bool)

    def batched(self, victim: Victim) -> Batched | None:
        """A faster way to evaluate it for many victims at once, without its scale; None if there is none."""
        return None

    def parts(self) -> list[tuple[float, Term]]:
        """The terms it adds up, with their weights."""
        return [(1.0, self)]

    def __add__(self, other: Term) -> Sum:
        """Both, added up."""
        if not isinstance(other, Term):
            return NotImplemented
        parts = [*self.parts(), *other.parts()]
        return Sum([term for _, term in parts], [weight for weight, _ in parts])

    def __mul__(self, weight: float) -> Sum:
        """The same with a weight."""
        return Sum([self], [weight])

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> Sum:
        """The same with one over this weight."""
        return self * (1 / weight)

    def __radd__(self, other: object) -> Term:
        """So that :func:`sum`, which begins with 0, adds terms up."""
        return self if other == 0 else NotImplemented


class Sum(Term):
    """Terms added up with weights, as ``a + 0.1 * b`` makes it; by itself for YAML.

    Args:
        terms: what is added up.
        weights: of each, by default 1; a term of weight 0 is left out.

    Raises:
        ValueError: no terms, weights of another number, or one that is negative or not finite.

    Example:
        >>> from leakage.objectives import SquaredDistance, TotalVariation
        >>> SquaredDistance() + 0.1 * TotalVariation()
        SquaredDistance(relative=True) + 0.1 * TotalVariation(kind='anisotropic')
    """

    def __init__(self, terms: Sequence[Term], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(terms) if weights is None else list(weights)
        if not terms or len(weights) != len(terms):
            raise ValueError(f"Expected `terms` with one of `weights` each, but got {len(terms)} and {len(weights)}.")
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
        """The single terms, with their weights."""
        return list(zip(self.weights, self.terms, strict=True))

    def value(self, point: Point, kept: State) -> Tensor:
        """Not asked for: an evaluation takes the parts one by one, each with what it keeps."""
        raise NotImplementedError("Expected the parts of a sum to be evaluated one by one.")

    def __repr__(self) -> str:
        words = [f"{'' if weight == 1 else f'{weight:g} * '}{tell(term)}" for weight, term in self.parts()]
        return " + ".join(words) or "0"


class Distance(Term):
    """Between the gradient of the dummies and that which was shared; a subclass is a function of the two.

    Attributes:
        by_direction: whether it stays the same when a gradient is multiplied by a number. Where clients keep their
            learning rate to themselves, an attack whose distances all do compares lengths too.

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
        """The distance of one victim, a scalar of at least 0.

        Args:
            gradients: named gradients of the dummies, any shapes.
            shared: those that the victim shared, the same names and shapes.
        """

    def value(self, point: Point, kept: State) -> Tensor:
        """The distance at this point."""
        return self(point.gradients, point.shared)


class Prior(Term):
    """What images look like, whatever the gradient says; a subclass is a function of the images of one victim.

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
        """A scalar, from ``(N, C, H, W)``."""

    def value(self, point: Point, kept: State) -> Tensor:
        """The prior at this point."""
        return self(point.images)

    def batched(self, victim: Victim) -> Batched | None:
        """Without the network, where it only looks at images."""
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
    """What images look like inside the network; a subclass names modules and is a function of their activations.

    They are collected in the one forward pass that also gives the gradients. With local steps they are those of the
    first pass over all images.
    """

    isometric = True
    fades = True

    @abstractmethod
    def watched(self, model: nn.Module) -> Sequence[str]:
        """Names of the modules, as ``model.named_modules()`` has them."""

    @abstractmethod
    def __call__(self, activations: Mapping[str, Activation], state: Mapping[str, Tensor]) -> Tensor:
        """A scalar, from the activations of one victim's images and the weights and buffers of its network."""

    def value(self, point: Point, kept: State) -> Tensor:
        """The prior at this point."""
        return self(point.activations, point.state)
