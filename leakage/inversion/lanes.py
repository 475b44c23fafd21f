"""Lanes: the victims that are attacked at the same time, with all their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from leakage.clients.protocol import UNKNOWN, Protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.files.checkpoints import check_like
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import match
from leakage.pieces import State
from leakage.precision import full_precision
from leakage.seeds import derive_seed
from leakage.solvers import PerVictimOptimizer
from leakage.solvers.solver import DIVERGED, STEERING, UNINFORMATIVE, settle


class Lanes:
    """All lanes. Each holds one victim, which enters, is searched for, may restart, and leaves when it is done.

    A lane keeps what its victim shared, the solver's state, the engine's own entries (:meth:`state`), and the entries
    that the pieces of the attack declare.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        unknowns: nn.ParameterDict,
        optimizer: PerVictimOptimizer,
        *,
        seed: int,
        combine: str,
    ) -> None:
        self.evaluator, self.unknowns, self.optimizer, self.seed = evaluator, unknowns, optimizer, seed
        self.combine = combine
        self.shared: SharedGradient | None = None
        self.kept: State = {}

    def __len__(self) -> int:
        return 0 if self.shared is None else len(self.shared)

    @property
    def device(self) -> torch.device:
        """The device of the lanes."""
        device: torch.device = next(iter(self.unknowns.values())).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the lanes."""
        dtype: torch.dtype = next(iter(self.unknowns.values())).dtype
        return dtype

    @staticmethod
    def state(protocol: Protocol, dtype: torch.dtype) -> State:
        """Return the engine's own entries, as empty tensors ``(0, ...)``."""
        whole, real = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=dtype)
        rate = {"best_learning_rate": real} if protocol.learning_rate == UNKNOWN else {}
        return rate | {
            "place": whole,
            "restarts": whole,
            # From earlier starts:
            "iterations": whole,
            "evaluations": whole,
            "best_loss": real,
            "best_images": real.new_empty(0, protocol.num_images, *protocol.image_shape),
            "best_labels": whole.new_empty(0, protocol.num_images),
            # Weight of these images in a mean, in units of that of the best start:
            "best_weight": real,
        }

    # Entering.

    def free(self, victims: int) -> Tensor:
        """Return the indices of up to ``victims`` lanes whose victim is done and can be replaced."""
        return (~self.optimizer.running).nonzero().squeeze(1)[:victims]

    def admit(self, shared: SharedGradient, places: Sequence[int], free: Tensor) -> None:
        """Put new victims into the free lanes, and into additional lanes if these are too few."""
        shared = shared.to(device=self.device, dtype=self.dtype)
        fresh, starts = self._begin(shared, places)
        seeds = self._seeds(shared.ids, fresh["restarts"])
        informative = self.evaluator.informative(shared).to(self.device)
        shared = self.evaluator.reduced(shared, fresh)
        taken, further = slice(len(free)), torch.arange(len(free), len(shared))
        if len(free):
            assert self.shared is not None
            self.optimizer.restart(free, *(start[taken] for start in starts.values()), seeds=seeds[taken])
            self.shared = self.shared.replace(free, shared.select(torch.arange(len(free))))
            for name, tensor in fresh.items():
                self.kept[name][free] = tensor[taken]
        entered = [free]
        if len(further):
            entered.append(torch.arange(len(self), len(self) + len(further), device=self.device))
            self.optimizer.extend(*(start[len(free) :] for start in starts.values()), seeds=seeds[len(free) :])
            rest, fresh = (
                shared.select(further) if len(free) else shared,
                {name: tensor[len(free) :] for name, tensor in fresh.items()},
            )
            self.shared = rest if self.shared is None else SharedGradient.cat([self.shared, rest])
            kept = self.kept or {name: tensor[:0] for name, tensor in fresh.items()}
            self.kept = {name: torch.cat([tensor, fresh[name]]) for name, tensor in kept.items()}
        silent = torch.cat(entered)[~informative]
        if len(silent):
            settle(self.optimizer.lanes, self._mask(silent), UNINFORMATIVE)

    def _begin(self, shared: SharedGradient, places: Sequence[int]) -> tuple[State, dict[str, Tensor]]:
        """Return the kept entries of new victims, and the starts of their unknowns."""
        evaluator, victim = self.evaluator, self.evaluator.victim
        kept = evaluator.begin(shared)
        declared, given = (
            {name: (*tensor.shape[1:], tensor.dtype) for name, tensor in state.items()}
            for state in (evaluator.state(self.dtype), kept)
        )
        if declared != given:
            raise ValueError(
                "Expected `begin` of each piece to return the entries that its `state` declares, "
                f"{declared}, but got {given}."
            )
        none = torch.zeros(len(shared), dtype=torch.long, device=self.device)
        starts = self._starts(shared.ids, none)
        images, targets = evaluator.write(kept, starts)
        labels = evaluator.labels.read(targets)
        known = labels if evaluator.labels.known else None
        if "images" in starts:
            first = evaluator.images.first_starts(starts["images"], shared, victim, known, self.seed)
            if first is not starts["images"]:
                starts["images"] = self._projected(first)
                images = evaluator.write(kept, starts)[0]
        own = {
            "place": torch.tensor(places, device=self.device),
            "restarts": none,
            "iterations": none.clone(),
            "evaluations": none.clone(),
            "best_loss": images.new_full((len(shared),), torch.inf),
            "best_images": images.detach().clone(),
            "best_labels": labels,
            "best_weight": images.new_zeros(len(shared)),
        }
        if (rate := evaluator.write_rate(kept, starts)) is not None:
            own["best_learning_rate"] = rate
        return own | kept, starts

    def _starts(self, ids: Tensor, restarts: Tensor) -> dict[str, Tensor]:
        """Return starts from normal noise, with one random stream per victim, restart and unknown."""
        starts = {}
        for name, shape in self.evaluator.shapes().items():
            noise = []
            for victim, restart in zip(ids.tolist(), restarts.tolist(), strict=True):
                seed = derive_seed(self.seed, victim, f"start/{name}/{restart}")
                generator = torch.Generator().manual_seed(seed)
                # Drawn in float32 so that a start does not depend on the Trainer's precision.
                noise.append(torch.randn(shape, generator=generator, dtype=torch.float32))
            drawn = torch.stack(noise).to(device=self.device, dtype=self.dtype)
            starts[name] = self.evaluator.dummies[name].starts(drawn, restarts)
            if name == "images":
                starts[name] = self._projected(starts[name])
        return starts

    def _seeds(self, ids: Tensor, restarts: Tensor) -> Tensor:
        """Return seeds ``(V,)`` for solvers that draw random numbers, one for each victim and restart."""
        pairs = zip(ids.tolist(), restarts.tolist(), strict=True)
        seeds = [derive_seed(self.seed, victim, f"solver/{restart}") for victim, restart in pairs]
        return torch.tensor(seeds, dtype=torch.long)

    def _projected(self, images: Tensor) -> Tensor:
        project = self.evaluator.images.project()
        return images if project is None else project(images)

    # Searching.

    def evaluate(self) -> Tensor:
        """Return the objectives ``(lanes,)`` at the unknowns, and write their gradients to ``.grad``."""
        assert self.shared is not None  # there are lanes
        values = {name: unknown.data for name, unknown in self.unknowns.items()}
        losses, gradients = self.evaluator(self.shared, self._of_pieces(), values)
        for name, unknown in self.unknowns.items():
            unknown.grad = gradients[name]
        return losses

    def rest(self) -> Tensor:
        """Return zeros in place of an evaluation when no victim is running, so that nothing moves."""
        for unknown in self.unknowns.values():
            unknown.grad = torch.zeros_like(unknown)
        return torch.zeros(len(self), dtype=self.dtype, device=self.device)

    def equations(self, points: Tensor, lanes: Tensor) -> Tensor:
        """Return the residuals ``(L, M)`` of the lanes at these indices, at unknowns ``(L, D)``."""
        assert self.shared is not None  # there are lanes
        of_pieces = {name: tensor[lanes] for name, tensor in self._of_pieces().items()}
        return self.evaluator.equations(self.shared.select(lanes), of_pieces, points)

    def _of_pieces(self) -> State:
        """Return the entries of the pieces, and those with which the solver steers the objective."""
        return {name: tensor for name, tensor in {**self.kept, **self.optimizer.lanes}.items() if "/" in name}

    # Restarting and leaving.

    def restart(self, again: Tensor) -> None:
        """Restart the lanes at these indices; the combined result of all starts so far is kept."""
        assert self.shared is not None
        so_far, weight = self._combined()
        self.kept["best_weight"][again] = weight[again]
        for name in ("iterations", "evaluations"):
            self.kept[name][again] = getattr(so_far, name)[again]
        for name in ("loss", "images", "labels", "learning_rate"):
            if (tensor := getattr(so_far, name)) is not None:
                self.kept[f"best_{name}"][again] = tensor[again]
        # What diverged did not reach the objective that all starts share, so any other start is better.
        lost = again[self._steered & (self.optimizer.status == DIVERGED)[again] & (self.kept["restarts"] == 0)[again]]
        self.kept["best_loss"][lost], self.kept["best_weight"][lost] = torch.inf, 0.0
        self.kept["restarts"][again] += 1
        ids, restarts = self.shared.ids[again.cpu()], self.kept["restarts"][again]
        starts = self._starts(ids, restarts)
        self.optimizer.restart(again, *starts.values(), seeds=self._seeds(ids, restarts), restarts=restarts)

    def best(self) -> Reconstruction:
        """Return the result of every lane over all its starts: the best iterates, or their mean."""
        return self._combined()[0]

    @torch.no_grad()
    @full_precision()
    def _combined(self) -> tuple[Reconstruction, Tensor]:
        """Return the result of every lane over all its starts, and the weight that it has in a mean."""
        optimizer, kept = self.optimizer, self.kept
        unknowns = dict(zip(self.unknowns, optimizer.best(), strict=True))
        shared, own = cast(SharedGradient, self.shared), self._of_pieces()
        images, targets = self.evaluator.write(own, unknowns, self.evaluator.best_seeds(shared, own, unknowns))
        labels, before, loss = self.evaluator.labels.read(targets), kept["best_loss"], self._loss()
        alike = torch.zeros_like(loss, dtype=torch.bool)
        if self.combine == "mean":
            order = self._order(images, labels, targets)
            lanes = torch.arange(len(order), device=order.device)[:, None]
            images, labels = images[lanes, order], labels[lanes, order]
            alike = (labels == kept["best_labels"]).all(1)
        share, weight = accumulate(loss, before, kept["best_weight"], alike)
        newer, share = loss < before, share[:, None, None, None, None]
        mean = torch.lerp(kept["best_images"], images, share)
        rate = self.evaluator.write_rate(own, unknowns)
        found = Reconstruction(
            ids=shared.ids.to(images.device),
            images=torch.where(share == 1, images, torch.where(share == 0, kept["best_images"], mean)),
            labels=torch.where(newer[:, None], labels, kept["best_labels"]),
            loss=torch.minimum(loss, before),
            iterations=kept["iterations"] + optimizer.iterations,
            evaluations=kept["evaluations"] + optimizer.evaluations,
            restarts=kept["restarts"],
            status=optimizer.status,
            learning_rate=None if rate is None else torch.where(newer, rate, kept["best_learning_rate"]),
        )
        return found, weight

    def _order(self, images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Return ``(V, N)``, which image of the present start belongs to each one of the earlier starts."""
        # Starts may order images differently, but only those of the same class if labels are known.
        allowed = labels[:, None] == self.kept["best_labels"][:, :, None]
        if self.evaluator.labels.known:
            allowed &= (targets[:, None] == targets[:, :, None]).flatten(3).all(-1)
        order = match(images, self.kept["best_images"], allowed)
        return torch.where(self.kept["restarts"][:, None] > 0, order, torch.arange(order.shape[1], device=order.device))

    def _loss(self) -> Tensor:
        """Return the lowest objective of the present start of every lane, infinity where it does not count yet."""
        loss: Tensor = self.optimizer.best_loss
        if self.combine == "best" and not self._steered:
            return loss
        failed = self.optimizer.running | (self._steered & (self.optimizer.status == DIVERGED))
        return torch.where(failed & (self.kept["restarts"] > 0), torch.inf, loss)

    @property
    def _steered(self) -> bool:
        """Whether the solver steers the objective, so that objectives can be compared only where a search has ended."""
        return any(name.startswith(f"{STEERING}/") for name in self.optimizer.lanes)

    def best_losses(self) -> Tensor:
        """Return the lowest objective of every lane over all its starts, ``(lanes,)``."""
        return torch.minimum(self.kept["best_loss"], self._loss())

    def collect(self, lanes: Tensor) -> Reconstruction:
        """Return the best iterates of the lanes at these indices, on the CPU."""
        return self.best().select(lanes).map(lambda part: part.detach().cpu())

    def keep(self, chosen: Tensor) -> None:
        """Keep the lanes of a boolean mask and drop the others."""
        kept = chosen.nonzero().squeeze(1)
        self.optimizer.select(kept)
        assert self.shared is not None
        self.shared = self.shared.select(kept) if len(kept) else None
        self.kept = {name: tensor[kept] for name, tensor in self.kept.items()} if len(kept) else {}

    def _mask(self, lanes: Tensor) -> Tensor:
        return torch.zeros(len(self), dtype=torch.bool, device=self.device).index_fill(0, lanes, True)

    # Checkpoints; Lightning saves the optimizer's state.

    def saved(self) -> dict[str, Any]:
        """Return the state of all lanes, for a checkpoint."""
        shared = self.shared
        return {
            "kept": self.kept,
            "shared": None if shared is None else {n: v for n, v in vars(shared).items() if n != "protocol"},
        }


def accumulate(loss: Tensor, before: Tensor, weight: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the share of a new start in the mean over all starts, and the weight of this mean.

    Start k has the weight :math:`L_k^{-2}`. Weights are in units of that of the best start, so that none overflows.

    Args:
        loss: L of the new starts, ``(V,)``.
        before: the lowest L of the earlier starts, infinity if there are none.
        weight: the weight of their mean, 0 if there are none.
        alike: whether both may be averaged; otherwise the one with the lower L is kept.

    Returns:
        The shares from 0 to 1, and the weights, both ``(V,)``.

    Example:
        >>> two, four = torch.tensor([2.0]), torch.tensor([4.0])
        >>> accumulate(two, four, torch.ones(1), torch.tensor([True]))
        (tensor([0.8000]), tensor([1.2500]))
    """
    newer, lower, higher = loss < before, torch.minimum(loss, before), torch.maximum(loss, before)
    ratio = torch.where(alike & (lower > 0), lower / higher, 0.0).square().nan_to_num(0.0)
    own = torch.where(newer, 1.0, ratio)
    total = own + weight * torch.where(newer, ratio, 1.0)
    return (own / total).nan_to_num(0.0), total


def restored_lanes(saved: dict[str, Any], victim: Victim, declared: State) -> tuple[SharedGradient | None, State]:
    """Restore the state saved by :meth:`Lanes.saved`.

    Raises:
        ValueError: if its entries differ from ``declared``, or do not fit the victim.
    """
    if saved["shared"] is None:
        return None, {}
    shared = SharedGradient(**saved["shared"], protocol=victim.protocol)
    victim.check(shared)
    like = {name: tensor.new_empty(len(shared), *tensor.shape[1:]) for name, tensor in declared.items()}
    check_like("the lanes", saved["kept"], like)
    return shared, saved["kept"]
