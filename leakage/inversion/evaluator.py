"""Evaluation of the objective of many victims at once, and of its gradient with respect to the unknowns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from leakage.clients.activations import Activation
from leakage.clients.inspection import trial_inputs
from leakage.clients.joint_pass import has_joint_pass
from leakage.clients.local_steps import Secrets
from leakage.clients.low_rank import in_basis
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.smoothing import SHARPNESS, has_kinks, kinks_left
from leakage.clients.victim import Victim
from leakage.defenses.base import Defense, relative_noise
from leakage.defenses.encoding import Encoding
from leakage.dummies.drawn import Drawn
from leakage.dummies.dummy import Dummy, Images, Labels, Target
from leakage.dummies.learning_rate import LearningRate
from leakage.dummies.local_order import LocalOrder
from leakage.dummies.mixture import Mixture
from leakage.inversion.memory import peak_memory
from leakage.inversion.simulation import Simulation, as_known, stepping
from leakage.inversion.sums import (
    added,
    joined,
    of_lanes,
    parted,
    seen,
    smooth_and_sharp,
    sum_in_a_pass,
    through,
    weighted,
)
from leakage.objectives.distances import LengthDistance
from leakage.objectives.terms import Batched, Distance, Point, Term
from leakage.pieces import State
from leakage.solvers import STEERING, Problem

# Weight of the distance between lengths of updates, added to distances that only compare directions when the learning
# rate is searched for. Weights from 0.01 to 1 give the same rates and images.
_LENGTH_WEIGHT = 0.1
# Bytes that lanes evaluated at once may take on a CPU; with more, its cores wait for memory.
_BYTES_AT_ONCE = 2**28
# Dummies of what clients keep secret.
_SECRETS = frozenset({"learning_rate", "order", "drawn", "mixture"})


class Evaluator:
    """Evaluate the objective of V victims, each at its own unknowns.

    If every term has a faster method for many victims at once, that method is used. Otherwise the evaluation is a
    :class:`~leakage.clients.joint_pass.JointPass` if the network supports it, and if not, the objective is
    differentiated under ``vmap``. On a CPU, both process the lanes in chunks of limited size.
    """

    def __init__(
        self,
        victim: Victim,
        objective: Term,
        images: Images,
        labels: Labels,
        low_rank: bool = False,
        defenses: Sequence[Defense] = (),
    ) -> None:
        victim = stepping(victim, defenses)
        self.victim, self.images, self.labels, self.learning_rate = victim, images, labels, LearningRate()
        self.order, self.drawn = LocalOrder(), Drawn(victim.draws)
        self.mixture = Mixture(any(isinstance(each, Encoding) and each.mixes for each in defenses))
        self.defenses = defenses
        self.simulation = Simulation(defenses, victim)
        parts = [*objective.parts()]
        distances = [term for _, term in parts if isinstance(term, Distance)]
        if self.searches_rate and distances and all(term.by_direction for term in distances):
            parts.append((_LENGTH_WEIGHT, LengthDistance()))  # the length determines the rate
        self.terms = {f"objective/{place}": pair for place, pair in enumerate(parts)}
        # Whether the gradient of the last layer is reduced to a basis.
        self.low_rank = low_rank and not victim.draws and all(term.isometric for _, term in self.terms.values())
        self.watched = {name: tuple(term.watched(victim)) for name, (_, term) in self.terms.items()}
        self.modules = list(dict.fromkeys(name for names in self.watched.values() for name in names))
        self.at_once = 0  # lanes that autograd evaluates at once; 0 for all
        self._joint: bool | None = None  # whether evaluations are joint passes; None until known
        self.forget()

    def forget(self) -> None:
        """Free the memory held for the lanes that were evaluated last."""
        simulate = self.simulation.for_all if self.simulation.changes else None
        found = [term.batched(self.victim, simulate) for _, term in self.terms.values()]
        ways = [way for way in found if way is not None]
        plain = self.images.seeds == 1 and not _SECRETS & self.shapes().keys() and not self.simulation.per_image
        self._batched: list[Batched] | None = ways if len(ways) == len(found) and plain else None

    @property
    def searches_rate(self) -> bool:
        """Whether the clients keep their learning rate secret."""
        return self.learning_rate.shape(self.victim.protocol) is not None

    @property
    def dummies(self) -> dict[str, Dummy]:
        """The dummies, by name: images, labels and what clients keep secret."""
        return {
            "images": self.images,
            "labels": self.labels,
            "learning_rate": self.learning_rate,
            "order": self.order,
            "drawn": self.drawn,
            "mixture": self.mixture,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one victim's unknowns, by name, those of the images first."""
        found = {name: dummy.shape(self.victim.protocol) for name, dummy in self.dummies.items()}
        return {name: shape for name, shape in found.items() if shape is not None}

    def problem(self, equations: Callable[[Tensor, Tensor], Tensor], element_size: int) -> Problem:
        """Return the problem that the solver receives; ``element_size`` is the number of bytes of one element."""
        model, protocol, shapes = self.victim.model, self.victim.protocol, self.shapes()
        pixels = math.prod(shapes["images"]) if "images" in shapes else 0
        project = self.images.project()

        def boxed(points: Tensor) -> Tensor:
            assert project is not None
            return torch.cat([project(points[:, :pixels]), points[:, pixels:]], dim=1)

        squares = self.images.seeds == 1 and all(term.is_sum_of_squares for _, term in self.terms.values())
        images = "an image" if protocol.num_images == 1 else f"{protocol.num_images} images"
        return Problem(
            num_images=protocol.num_images,
            project=None if project is None else boxed,
            preconditioner=self.images.preconditioner(protocol),
            equations=equations if squares else None,
            num_equations=self._count_equations() if squares else 0,
            num_unknowns=sum(map(math.prod, shapes.values())),
            element_size=element_size,
            written=f"{images} of {protocol.image_shape}{' and their labels' if 'labels' in shapes else ''}",
            # A network that draws random numbers would draw them here.
            kinked=bool(self.victim.draws) or has_kinks(model, *trial_inputs(model, protocol)),
            kinks_left=() if self.victim.draws else kinks_left(model, *trial_inputs(model, protocol)),
            exact=not protocol.defenses,
        )

    def check(self, target: Target) -> None:
        """Raise a ``ValueError`` if a piece cannot be used on these victims."""
        for name in ("labels", *(name for name in self.dummies if name != "labels")):
            self.dummies[name].check(target)
        for _, term in self.terms.values():
            term.check(target.victim)
        target.victim.check_modules(self.modules)
        if not self.shapes():
            raise ValueError("Expected `images` or `labels` to have unknowns to search for, but got none.")

    def prepare(self, like: Tensor) -> None:
        """Move all pieces to the device and dtype of ``like``."""
        for piece in (self.images, self.labels, *(term for _, term in self.terms.values())):
            piece.prepare(like)

    # What the pieces keep for each victim, under the name of the piece.

    def state(self, dtype: torch.dtype) -> State:
        """Return what the pieces keep for each victim, as empty tensors ``(0, ...)``."""
        protocol = self.victim.protocol
        kept = {name: dummy.state(protocol, dtype) for name, dummy in self.dummies.items()}
        kept |= {name: term.state(self.victim, dtype) for name, (_, term) in self.terms.items()}
        return joined(kept)

    def begin(self, shared: SharedGradient) -> State:
        """Return what the pieces keep for V victims, computed from what these shared."""
        rate = self.learning_rate.begin(shared, self.victim)
        as_it_came, shared = shared, self._in_steps(shared, rate)
        kept = {
            "images": self.images.begin(shared, self.victim),
            "labels": self.labels.begin(*as_known(self.defenses, shared, self.victim)),
        }
        kept["learning_rate"] = rate
        if self.labels.known:
            shared = replace(shared, labels=self.labels.write_all(None, kept["labels"]).argmax(-1))
        kept |= {name: term.begin(shared, self.victim) for name, (_, term) in self.terms.items()}
        for name in [name for name, (_, term) in self.terms.items() if term.weighed_by_noise]:
            kept[name]["scale"] = kept[name]["scale"] * relative_noise(self.defenses, as_it_came).to(
                kept[name]["scale"]
            )
        return joined(kept)

    def _needed(self, kept: State) -> State:
        """Leave out entries that change nothing for these victims, and weaken priors as the solver asks."""
        parts = parted(kept)
        if "sharpness" in (steering := parts.get(STEERING, {})) and bool(steering["sharpness"].isinf().all()):
            del steering["sharpness"]
        own = {name: term.needed(parts.get(name, {})) for name, (_, term) in self.terms.items()}
        if (fading := parts.get(STEERING, {}).pop("fading", None)) is not None:
            for name, (_, term) in self.terms.items():
                if term.fades:
                    own[name] = {**own[name], "scale": own[name].get("scale", 1.0) * fading}
        return joined(parts | own)

    def informative(self, shared: SharedGradient) -> Tensor:
        """Return ``(V,)``, whether each victim's gradient carries information for every term."""
        return torch.stack([term.informative(shared).cpu() for _, term in self.terms.values()]).all(0)

    def reduced(self, shared: SharedGradient, kept: State) -> SharedGradient:
        """Return the part of the shared gradient that evaluations need."""
        shared = self._in_steps(shared, parted(kept).get("learning_rate", {}))
        return in_basis(shared, self.victim) if self.low_rank else shared

    def _in_steps(self, shared: SharedGradient, rate: State) -> SharedGradient:
        """Convert an update of unknown learning rate to its average step at the initial rate."""
        if not rate:
            return shared
        length = self.victim.protocol.local_steps * rate["start"]
        gradients = {
            name: tensor / length.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in shared.gradients.items()
        }
        return replace(shared, gradients=gradients)

    def write(self, kept: State, unknowns: Mapping[str, Tensor], seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return images ``(V, N, C, H, W)`` and class probabilities ``(V, N, K)``.

        Args:
            kept: what the pieces keep for the victims.
            unknowns: the current unknowns.
            seeds: ``(V,)``, the set of images to return if a victim has several; by default the first.
        """
        parts = parted(kept)
        if self.images.seeds > 1:
            sets = unknowns["images"]
            chosen = sets[:, 0] if seeds is None else sets[torch.arange(len(sets), device=sets.device), seeds]
            unknowns = {**unknowns, "images": chosen}
        images, targets = (
            self.dummies[name].write_all(unknowns.get(name), parts.get(name, {})) for name in ("images", "labels")
        )
        return images, targets

    def write_rate(self, kept: State, unknowns: Mapping[str, Tensor]) -> Tensor | None:
        """Return learning rates ``(V,)``, or None if the attacker knows them."""
        own = parted(kept).get("learning_rate", {})
        return self.learning_rate.write_all(unknowns["learning_rate"], own) if self.searches_rate else None

    # Evaluations.

    def __call__(self, shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Return the objectives ``(V,)`` and their gradients with respect to the unknowns, each ``(V, ...)``."""
        if groups := smooth_and_sharp(kept):
            parts = [self(*of_lanes(some, shared, kept, unknowns)) for some in groups]
            order = torch.cat(groups).argsort()
            return torch.cat([losses for losses, _ in parts])[order], {
                name: torch.cat([gradients[name] for _, gradients in parts])[order] for name in unknowns
            }
        kept = self._needed(kept)
        if self._batched is not None and f"{STEERING}/sharpness" not in kept:
            return self._by_terms(self._batched, shared, kept, unknowns)
        if self._joint is None:
            plain = shared.basis is None and not _SECRETS & self.shapes().keys() and not self.simulation.per_image
            self._joint = plain and has_joint_pass(self.victim, shared.state, shared.own_weights)
        evaluate = self._jointly if self._joint else self._apart
        if not self.at_once and next(iter(unknowns.values())).device.type == "cpu":
            one = of_lanes(slice(1), shared, kept, unknowns)
            device = next(iter(unknowns.values())).device
            self.at_once = max(1, _BYTES_AT_ONCE // peak_memory(lambda: evaluate(*one), device))
        lanes = len(next(iter(unknowns.values())))
        size = self.at_once or lanes
        if size >= lanes:
            return evaluate(shared, kept, unknowns)
        pieces = [slice(first, first + size) for first in range(0, lanes, size)]
        found = [evaluate(*of_lanes(some, shared, kept, unknowns)) for some in pieces]
        losses, gradients = zip(*found, strict=True)
        return torch.cat(losses), {name: torch.cat([part[name] for part in gradients]) for name in unknowns}

    def _apart(self, shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Evaluate by differentiating the whole objective, separately for each victim."""
        gradients, losses = self._for_all(grad_and_value(self._objective), shared, kept, unknowns)
        return losses, gradients

    def best_seeds(self, shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]) -> Tensor | None:
        """Return ``(V,)``, the set of images with the lowest objective; None if victims have only one set."""
        if self.images.seeds == 1:
            return None
        losses: Tensor = self._for_all(self._of_sets, shared, self._needed(kept), unknowns)
        return losses.nan_to_num(nan=torch.inf).argmin(1)

    def _for_all(
        self, function: Callable[..., Any], shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]
    ) -> Any:
        """Apply a function of one victim to all victims."""
        evaluate = vmap(function, in_dims=_in_dims(shared), chunk_size=self.at_once or None)
        return evaluate(dict(unknowns), parted(kept), shared.state, (shared.gradients, shared.basis))

    def _objective(self, unknowns: Mapping[str, Tensor], kept: Mapping[str, State], state: Any, shared: Any) -> Tensor:
        """Return the objective of one victim."""
        if self.images.seeds == 1:
            return self._of_set(unknowns, kept, state, shared)
        return self._of_sets(unknowns, kept, state, shared).mean() + self.images.joint(unknowns["images"])

    def _of_sets(self, unknowns: Mapping[str, Tensor], kept: Mapping[str, State], state: Any, shared: Any) -> Tensor:
        """Return the objective of each set of images of one victim, ``(seeds,)``."""
        found: Tensor = vmap(lambda images: self._of_set({**unknowns, "images": images}, kept, state, shared))(
            unknowns["images"]
        )
        return found

    def _of_set(self, unknowns: Mapping[str, Tensor], kept: Mapping[str, State], state: Any, shared: Any) -> Tensor:
        """Return the objective of one set of images of one victim."""
        point = self._point(unknowns, kept, state, shared, sparing=True)
        total: Tensor | None = None
        for name, (weight, term) in self.terms.items():
            value = weighted(
                weight, kept.get(name, {}), term.value(seen(point, self.watched[name]), kept.get(name, {}))
            )
            total = value if total is None else total + value
        assert total is not None
        return total

    def _point(
        self,
        unknowns: Mapping[str, Tensor],
        kept: Mapping[str, State],
        state: Any,
        shared: Any,
        *,
        sparing: bool = False,
    ) -> Point:
        images = self.images.write(unknowns.get("images"), kept.get("images", {}))
        targets = self.labels.write(unknowns.get("labels"), kept.get("labels", {}))
        wanted, basis = shared
        if (sharpness := kept.get(STEERING, {}).get("sharpness")) is not None:
            state = {**state, SHARPNESS: sharpness}
        rate, own = None, kept.get("learning_rate", {})
        if self.searches_rate:
            rate = self.learning_rate.write(unknowns["learning_rate"], own)
        shares = self.order.write(unknowns["order"], {}) if "order" in unknowns else None
        drawn = self.drawn.write(unknowns["drawn"], {}) if "drawn" in unknowns else None
        secrets = Secrets(rate, shares=shares, drawn=drawn)
        searched = images
        if "mixture" in unknowns:
            weights = self.mixture.write(unknowns["mixture"], {})
            images, targets = torch.einsum("mn,nchw->mchw", weights, images), weights @ targets
        if self.simulation.per_image and not self.modules:
            found: tuple[dict[str, Tensor], dict[str, Activation]] = ({}, {})  # simulated per image below
        else:
            found = self.victim.evaluate(state, images, targets, self.modules, basis, secrets=secrets, sparing=sparing)
        gradients, activations = found
        if rate is not None:
            gradients = {name: rate / own["start"] * tensor for name, tensor in gradients.items()}
        gradients = self.simulation(gradients, wanted, own, state, images, targets)
        if basis is not None:  # the part outside of the basis was not shared
            wanted = {name: wanted[name] if name in wanted else torch.zeros_like(gradients[name]) for name in gradients}
        return Point(searched, targets, gradients, wanted, activations, state)

    def _by_terms(
        self, ways: Sequence[Batched], shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]
    ) -> tuple[Tensor, State]:
        """Evaluate by the terms' own methods; autograd differentiates only how the dummies are written."""
        parts = parted(kept)
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in unknowns.items()}
            images, targets = self.write(kept, leaves)
        found = [
            (weight, parts.get(name, {}), way(shared, parts.get(name, {}), images.detach(), targets.detach()))
            for way, (name, (weight, _)) in zip(ways, self.terms.items(), strict=True)
        ]
        if len(found) > 1:
            rows = [[part if part is None else weighted(w, own, part) for part in row] for w, own, row in found]
            found = [
                (1.0, {}, (cast(Tensor, added(a)), cast(Tensor, added(b)), added(c)))
                for a, b, c in [tuple(zip(*rows, strict=True))]
            ]
        # The factor of a single term is applied last, so that nothing is rounded before.
        weight, own, (losses, by_images, by_targets) = found[0]
        gradients = through([(images, by_images), (targets, by_targets)], leaves)
        scaled = {name: weighted(weight, own, gradient) for name, gradient in gradients.items()}
        return weighted(weight, own, losses), scaled

    def _jointly(self, shared: SharedGradient, kept: State, unknowns: Mapping[str, Tensor]) -> tuple[Tensor, State]:
        """Evaluate by joint passes, one for each set of images."""
        parts, several = parted(kept), self.images.seeds > 1
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in unknowns.items()}
            targets = self.labels.write_all(leaves.get("labels"), parts.get("labels", {}))
            losses, pairs = [], []
            for unknown in leaves["images"].unbind(1) if several else [leaves.get("images")]:
                images = self.images.write_all(unknown, parts.get("images", {}))
                terms = [(*pair, self.watched[name], parts.get(name, {})) for name, pair in self.terms.items()]
                sharpness = parts.get(STEERING, {}).get("sharpness")
                loss, *by = sum_in_a_pass(
                    self.victim, terms, shared, images.detach(), targets.detach(), sharpness, self.simulation
                )
                losses.append(loss)
                pairs += [
                    (output, part / self.images.seeds) for output, part in zip((images, targets), by, strict=True)
                ]
            values = torch.stack(losses).mean(0)
            if several:
                joint = vmap(self.images.joint)(leaves["images"])
                values = values + joint.detach()
                pairs.append((joint, torch.ones_like(joint)))
        return values, through(pairs, leaves)

    # Equations.

    def _count_equations(self) -> int:
        """Return the number of residuals of one victim."""
        state = self.victim.state
        like = state[self.victim.trainable[0]]
        kept = {name: tensor.new_ones(tensor.shape[1:]) for name, tensor in self.state(like.dtype).items()}
        kept = {name: tensor.to(like.device) for name, tensor in kept.items()}
        size = sum(map(math.prod, self.shapes().values()))
        protocol = self.victim.protocol
        shared = SharedGradient(
            {name: torch.zeros_like(state[name])[None] for name in self.victim.trainable},
            state,
            torch.arange(1),
            protocol,
        )
        shared = self.reduced(shared, {})
        gradients = {name: tensor[0] for name, tensor in shared.gradients.items()}
        with torch.no_grad():
            basis = None if shared.basis is None else shared.basis[0]
            return len(self._residuals(like.new_zeros(size), parted(kept), shared.state, (gradients, basis)))

    def equations(self, shared: SharedGradient, kept: State, points: Tensor) -> Tensor:
        """Return residuals ``(V, M)`` at flattened unknowns ``(V, D)``; their squared norm is the objective."""
        if groups := smooth_and_sharp(kept):
            some = [of_lanes(lanes, shared, kept, {"points": points}) for lanes in groups]
            found = [self.equations(own, kept_of, given["points"]) for own, kept_of, given in some]
            return torch.cat(found)[torch.cat(groups).argsort()]
        evaluate = vmap(self._residuals, in_dims=_in_dims(shared))
        given = shared.gradients, shared.basis
        residuals: Tensor = evaluate(points, parted(self._needed(kept)), shared.state, given)
        return residuals

    def _residuals(self, point: Tensor, kept: Mapping[str, State], state: Any, shared: Any) -> Tensor:
        shapes = self.shapes()
        parts = torch.split(point, [math.prod(shape) for shape in shapes.values()])
        unknowns = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        at = self._point(unknowns, kept, state, shared)
        found = []
        for name, (weight, term) in self.terms.items():
            residuals = term.residuals(seen(at, self.watched[name]), kept.get(name, {}))
            found.append(weighted(weight, kept.get(name, {}), point.new_ones(())).sqrt() * residuals)
        return found[0] if len(found) == 1 else torch.cat(found)


def _in_dims(shared: SharedGradient) -> tuple[Any, ...]:
    """Return the ``in_dims`` of ``vmap`` for unknowns, kept entries, weights and shared gradients."""
    return 0, 0, 0 if shared.own_weights else None, (0, None if shared.basis is None else 0)
