"""The engine of the attacks: victims enter lanes, are searched for all at once, and leave when they are done."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from leakage.attacks.protocols import SearchProtocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import VictimDataModule
from leakage.inversion.memory import choose_lanes, is_out_of_memory, peak_memory
from leakage.inversion.reconstruction import Reconstruction
from leakage.objectives import DISTANCES
from leakage.objectives.chain_objective import ChainObjective
from leakage.seeds import derive_seed
from leakage.solvers import PerVictimOptimizer

# Finished victims leave the lanes, or give them to others, when they are this share of them: both move much memory.
_LEAVING_SHARE = 1 / 8
# Each restart draws from a distribution this much wider: close to the start that failed lies the same failure.
_WIDER = 3.0
# Bytes that lanes evaluated at once may take on a CPU: with more its cores wait for the memory.
_BYTES_AT_ONCE = 2**28
# Victims on whom the number of lanes is tried.
_SAMPLE = 8


class Engine(LightningModule):
    """What attacks do with victims in lanes, between the hooks of Lightning."""

    search: SearchProtocol
    dummy_images: nn.Parameter

    def _reset(self) -> None:
        """Begin with no victim."""
        self.iteration = 0
        self._victim: Victim | None = None
        self._queue: list[int] = []  # victims that no lane has had yet, by their places
        self._asked: list[int] = []  # those of them that have been asked for
        self._asked_at = -1  # and after which iteration
        self._most_lanes = 0
        self._at_once = 0  # lanes that autograd evaluates at once; 0 for all
        self._chain: ChainObjective | None = None
        self._shared: SharedGradient | None = None  # of the victims in the lanes
        self._lanes: dict[str, Tensor] = {}
        self._finished: list[Reconstruction] = []
        self._finished_places: list[int] = []

    # What a subclass supplies.

    @property
    def _unknowns(self) -> list[nn.Parameter]:
        """The parameters that are searched, the images first; each with a leading lanes' dimension."""
        return [self.dummy_images]

    def _check_victim(self, victim: Victim, *, labels_revealed: bool) -> None:
        """Raise a ``ValueError`` if the attack can't be used on such victims."""

    @abstractmethod
    def _begin(self, shared: SharedGradient) -> Tensor:
        """What is fixed while new victims are searched for, ``(V, ...)``: class probabilities, or nothing."""

    @abstractmethod
    def _targets(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        """Class probabilities ``(..., N, K)`` of victims from what is fixed and from the unknowns after the images."""

    @abstractmethod
    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        """Recovered labels ``(V, N)``."""

    # What there is.

    @property
    def victim(self) -> Victim:
        """The clients' model, loss and protocol, as the attacker knows them."""
        if self._victim is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no victim yet.")
        return self._victim

    @property
    def _searches(self) -> bool:
        """Whether there are lanes; while a checkpoint is read there is no optimizer yet."""
        return self._shared is not None and bool(self.trainer.optimizers)

    # One step.

    def _find_chain(self) -> ChainObjective | None:
        """The faster way to the squared distance, for networks that have one."""
        if self.hparams["distance"] != "squared":
            return None
        try:
            return ChainObjective(self.victim)
        except ValueError:
            return None

    def _idle(self) -> None:
        """Count a step that moves nobody: all processes make the same number of steps, else their checkpoints miss."""

        def evaluate() -> Tensor:
            for unknown in self._unknowns:
                unknown.grad = torch.zeros_like(unknown)
            return self.dummy_images.new_zeros(len(self.dummy_images))

        if self.trainer.world_size > 1:
            cast(Any, self.optimizers()).step(closure=evaluate)

    def _advance(self) -> None:
        """One evaluation for every victim in the lanes."""
        running = self._optimizer.running  # before the step, which may have settled some when it breaks off
        try:
            cast(Any, self.optimizers()).step(closure=self._evaluate)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cast(Any, self.trainer).profiler.stop(
                "optimizer_step"
            )  # which Lightning has begun for the step that failed
            self._begin_anew_with_fewer_lanes(running, error)
            self._idle()
            return
        self.iteration += 1
        self._retire()

    # Lanes.

    @property
    def _datamodule(self) -> VictimDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, VictimDataModule):
            raise ValueError(
                "Expected `Trainer.fit(attack, datamodule=...)` with a DataModule of `leakage.datamodules` (for your "
                f"own gradients: `SharedGradients`), but got {type(datamodule).__name__}."
            )
        return datamodule

    @property
    def _optimizer(self) -> PerVictimOptimizer:
        return cast(PerVictimOptimizer, self.trainer.optimizers[0])

    def _ask(self, victims: int) -> None:
        """Ask for the next victims of the queue."""
        self._asked, self._queue = self._queue[:victims], self._queue[victims:]
        self._asked_at = self.iteration
        self._datamodule.wanted = self._asked

    def _admit(self, shared: SharedGradient) -> None:
        """Put new victims into lanes: first into those that are free, then into further ones."""
        self.victim.check(shared)
        shared = shared.to(device=self.device, dtype=self.dummy_images.dtype)
        fixed = self._begin(shared)
        starts = self._first_starts(shared, fixed)
        lanes = self._fresh_lanes(shared, fixed, starts)
        free = torch.empty(0, dtype=torch.long, device=self.device)
        if self._shared is not None:
            free = (~self._optimizer.running).nonzero().squeeze(1)[: len(shared)]
        taken, further = slice(len(free)), torch.arange(len(free), len(shared))
        if len(free):
            assert self._shared is not None
            self._hand_out(free)
            self._optimizer.restart(free, *(start[taken] for start in starts))
            self._shared = self._shared.replace(free, shared.select(torch.arange(len(free))))
            for name, tensor in lanes.items():
                self._lanes[name][free] = tensor[taken]
        if len(further):
            self._optimizer.extend(*(start[len(free) :] for start in starts))
            rest, lanes = shared.select(further), {name: tensor[len(free) :] for name, tensor in lanes.items()}
            self._shared = rest if self._shared is None else SharedGradient.cat([self._shared, rest])
            self._lanes = (
                {name: torch.cat([tensor, lanes[name]]) for name, tensor in self._lanes.items()}
                if self._lanes
                else lanes
            )
        self._asked = []

    def _fresh_lanes(self, shared: SharedGradient, fixed: Tensor, starts: list[Tensor]) -> dict[str, Tensor]:
        """What is kept of each victim beside the optimizer's state."""
        norms = cast(Tensor, sum(tensor.square().flatten(1).sum(1) for tensor in shared.gradients.values()))
        relative = self.search.relative and self.hparams["distance"] == "squared"
        scale = 1 / norms if relative else torch.ones_like(norms)
        zeros = torch.zeros(len(shared), dtype=torch.long, device=self.device)
        return {
            "place": torch.tensor(self._asked, device=self.device),
            # A gradient of zero leaves nothing to compare with: its distance is taken as it is.
            "scale": torch.where(torch.isfinite(scale), scale, 1.0),
            "fixed": fixed,
            "restarts": zeros,
            "iterations": zeros.clone(),  # of the earlier starts
            "evaluations": zeros.clone(),
            "best_loss": torch.full_like(norms, torch.inf),  # of the earlier starts
            "best_images": starts[0].clone(),
            "best_labels": self._labels(fixed, *starts[1:]),
        }

    def _first_starts(self, shared: SharedGradient, fixed: Tensor) -> list[Tensor]:
        """Where the search for new victims begins, one ``(V, ...)`` tensor per unknown; later starts are random."""
        return [self._starts(shared.ids, torch.zeros_like(shared.ids), unknown) for unknown in self._unknowns]

    def _starts(self, ids: Tensor, restarts: Tensor, unknown: Tensor) -> Tensor:
        """Normally distributed starts, one stream per victim, restart and unknown."""
        kind = "images" if unknown is self.dummy_images else "labels"
        starts = []
        for victim, restart in zip(ids.tolist(), restarts.tolist(), strict=True):
            seed = derive_seed(self.hparams["seed"], victim, f"start/{kind}/{restart}")
            generator = torch.Generator().manual_seed(seed)
            # Drawn in float32 so that a start does not depend on the Trainer's precision.
            starts.append(torch.randn(unknown.shape[1:], generator=generator, dtype=torch.float32))
        spread = self.search.start_std * _WIDER ** restarts.to(unknown)
        return torch.stack(starts).to(unknown) * spread.view(-1, *[1] * (unknown.ndim - 1))

    def _evaluate(self) -> Tensor:
        """Objectives ``(lanes,)`` at the parameters; their gradients go to ``.grad``."""
        assert self._shared is not None
        if self._chain is None and self.device.type == "cpu" and not self._at_once:
            self._at_once = self._find_lanes_at_once(self._shared)
        values = [unknown.data for unknown in self._unknowns]
        losses, gradients = self._objective(self._shared, self._lanes["fixed"], self._lanes["scale"], values)
        for unknown, gradient in zip(self._unknowns, gradients, strict=True):
            unknown.grad = gradient
        return losses

    def _objective(
        self, shared: SharedGradient, fixed: Tensor, scale: Tensor, values: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Objectives ``(V,)`` of some victims at these unknowns, and the gradients with respect to each of those."""
        if self._chain is not None:
            return self._objective_of_chain(self._chain, shared, fixed, scale, values)
        distance = DISTANCES[self.hparams["distance"]]

        def objective(unknowns: tuple[Tensor, ...], fixed: Tensor, scale: Tensor, state: Any, targets: Any) -> Tensor:
            images, *others = unknowns
            gradients = self.victim.gradients(state, images, self._targets(fixed, *others))
            return scale * distance(gradients, targets)

        in_dims = (0, 0, 0, 0 if shared.own_weights else None, 0)
        evaluate = vmap(grad_and_value(objective), in_dims=in_dims, chunk_size=self._at_once or None)
        gradients, losses = evaluate(tuple(values), fixed, scale, shared.state, shared.gradients)
        return losses, gradients

    def _objective_of_chain(
        self, chain: ChainObjective, shared: SharedGradient, fixed: Tensor, scale: Tensor, values: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        images, *others = values
        with torch.enable_grad():
            others = [value.detach().requires_grad_() for value in others]
            targets = self._targets(fixed, *others)
        losses, by_images, by_targets = chain(shared, images, targets.detach())
        gradients = [by_images, *(torch.autograd.grad(targets, others, by_targets) if others else ())]
        return scale * losses, [scale.view(-1, *[1] * (part.ndim - 1)) * part for part in gradients]

    def _retire(self) -> None:
        """Start stalled victims again within their budget, let finished ones go, ask for the next."""
        optimizer, lanes = self._optimizer, self._lanes
        ended = ~optimizer.running
        poor = torch.minimum(lanes["best_loss"], optimizer.best_loss) > self.hparams["restart_above"]
        again = (ended & poor & (lanes["restarts"] < self.search.restarts)).nonzero().squeeze(1)
        if len(again):
            self._restart(again)
            ended = ~optimizer.running
        left = int(ended.sum())
        room = self._most_lanes - (len(ended) - left)
        if self._queue and not self._asked and room >= max(1, _LEAVING_SHARE * self._most_lanes):
            self._ask(room)
        spare = min(left, len(ended) - self._most_lanes) if self._asked or self._queue else left
        if spare > 0 and (left == len(ended) or spare > _LEAVING_SHARE * len(ended)):
            leaving = ended.nonzero().squeeze(1)[-spare:]
            self._hand_out(leaving)
            self._keep(~torch.zeros_like(ended).index_fill(0, leaving, True))

    def _hand_out(self, lanes: Tensor) -> None:
        """Note what the lanes at these indices have found."""
        self._finished.append(self._collect(lanes))
        self._finished_places += self._lanes["place"][lanes].tolist()

    def _keep(self, chosen: Tensor) -> None:
        """Drop the other lanes."""
        kept = chosen.nonzero().squeeze(1)
        self._optimizer.select(kept)
        assert self._shared is not None
        self._shared = self._shared.select(kept) if len(kept) else None
        self._lanes = {name: tensor[kept] for name, tensor in self._lanes.items()} if len(kept) else {}

    def _find_lanes(self) -> int:
        """How many victims shall be in the lanes at most."""
        datamodule = self._datamodule
        most = len(self._queue)
        if datamodule.lanes != "auto":
            return min(cast(int, datamodule.lanes), most)
        sample = datamodule.share(self._queue[:_SAMPLE])
        sample = sample.to(device=self.device, dtype=self.dummy_images.dtype)
        protocol = self.victim.protocol
        # Any labels will do, and none need be inferred.
        sample.labels = torch.zeros(len(sample), protocol.num_images, dtype=torch.long, device=self.device)

        def evaluate(lanes: int) -> None:
            chosen = torch.arange(lanes) % len(sample)
            shared = sample.select(chosen)
            values = [unknown.new_zeros(lanes, *unknown.shape[1:]) for unknown in self._unknowns]
            self._objective(shared, self._begin(shared), values[0].new_ones(lanes), values)
            self._chain = self._find_chain()  # the one that was tried holds tensors of these lanes

        bytes_per_lane, processes = self._bytes_per_lane(sample), self.trainer.num_devices
        return choose_lanes(evaluate, bytes_per_lane, most=most, device=self.device, processes=processes)

    def _find_lanes_at_once(self, shared: SharedGradient) -> int:
        """How many lanes to evaluate at once, by the memory that the first one takes."""
        first = torch.zeros(1, dtype=torch.long)
        values = [unknown.data[first] for unknown in self._unknowns]
        fixed, scale = self._lanes["fixed"][first], self._lanes["scale"][first]
        one = shared.select(first)
        return max(1, _BYTES_AT_ONCE // peak_memory(lambda: self._objective(one, fixed, scale, values), self.device))

    def _bytes_per_lane(self, sample: SharedGradient) -> int:
        """What a victim takes while it is in a lane: its gradients, weights of its own, the optimizer's state."""
        tensors = [*sample.gradients.values(), *(sample.state.values() if sample.own_weights else ())]
        shared: int = sum(tensor[0].nbytes for tensor in tensors)
        return shared + self._optimizer.bytes_per_lane

    def _begin_anew_with_fewer_lanes(self, running: Tensor, error: RuntimeError) -> None:
        """Use half of the lanes: the victims in them go back to the queue, and begin anew where they began."""
        lanes = len(self._lanes["place"])
        if lanes == 1:
            raise MemoryError(
                "Expected memory for one victim at least, but got none: take fewer images, or another precision, "
                f"`history_size` or device. ({error})"
            ) from error
        ended = (~running).nonzero().squeeze(1)
        if len(ended):
            self._hand_out(ended)
        self._queue = [*self._lanes["place"][running].tolist(), *self._queue]
        self._keep(torch.zeros_like(running))
        self._chain = self._find_chain()  # the present one holds tensors of all these lanes
        self._most_lanes = max(1, lanes // 2)
        warnings.warn(
            f"{lanes} lanes are more than the memory holds ({error}). The attack goes on with {self._most_lanes}, in "
            "which the victims that were searched for begin anew.",
            stacklevel=1,
        )
        if not self._asked:
            self._ask(self._most_lanes)

    def _restart(self, again: Tensor) -> None:
        """Begin lanes anew; what they have found so far is kept if it is the best."""
        ids = cast(SharedGradient, self._shared).ids[again.cpu()]
        so_far = self._best()
        for name in ("iterations", "evaluations"):
            self._lanes[name][again] = getattr(so_far, name)[again]
        for name, tensor in (("loss", so_far.loss), ("images", so_far.images), ("labels", so_far.labels)):
            self._lanes[f"best_{name}"][again] = tensor[again]
        self._lanes["restarts"][again] += 1
        restarts = self._lanes["restarts"][again]
        self._optimizer.restart(again, *(self._starts(ids, restarts, unknown) for unknown in self._unknowns))

    def _best(self) -> Reconstruction:
        """Best iterate of every lane over all its starts, by the attack's own objective."""
        optimizer, lanes = self._optimizer, self._lanes
        images, *others = optimizer.best()
        labels = self._labels(lanes["fixed"], *others)
        newer = optimizer.best_loss < lanes["best_loss"]
        return Reconstruction(
            ids=cast(SharedGradient, self._shared).ids.to(images.device),
            images=torch.where(newer[:, None, None, None, None], images, lanes["best_images"]),
            labels=torch.where(newer[:, None], labels, lanes["best_labels"]),
            loss=torch.minimum(optimizer.best_loss, lanes["best_loss"]),
            iterations=lanes["iterations"] + optimizer.iterations,
            evaluations=lanes["evaluations"] + optimizer.evaluations,
            restarts=lanes["restarts"],
            status=optimizer.status,
        )

    def _collect(self, lanes: Tensor) -> Reconstruction:
        """The best iterates of the lanes at these indices."""
        return Reconstruction(**{name: part.detach().cpu() for name, part in vars(self._best().select(lanes)).items()})

    def _empty(self) -> Reconstruction:
        whole, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        shape = self.dummy_images.shape[1:]
        images, labels = torch.zeros(0, *shape), torch.zeros(0, shape[0], dtype=torch.long)
        return Reconstruction(whole, images, labels, real, whole, whole, whole, whole)
