"""The loop that every attack shares: admit victims, search for all of them at once, write out the finished."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from leakage.attacks.auditor import Auditor
from leakage.attacks.protocols import ITERATIONS_PER_CALL, search_protocol
from leakage.checkpoints import check_checkpoint
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.errors import check_choice, check_count, check_positive
from leakage.metrics import ReconstructionMetrics, VictimScore
from leakage.objectives import DISTANCES
from leakage.optim import LBFGS, ImageSpectrum, PerVictimOptimizer, PlainLBFGS
from leakage.reconstruction import Reconstruction
from leakage.seeds import derive_seed
from leakage.shared_gradient import SharedGradient
from leakage.victim import Victim

# Finished victims leave the lanes when they are this share of them: leaving copies all histories.
_LEAVING_SHARE = 1 / 8
# The next cohort is admitted when this share of one is still running, so that no cohort waits for stragglers.
_CARRIED_SHARE = 1 / 4
# Each restart draws from a distribution this much wider: close to the start that failed lies the same failure.
_WIDER = 3.0
# L-BFGS needs gradients that are more precise than those of half precision.
_PRECISIONS = ("32-true", "64-true")


class GradientMatchingAttack(LightningModule):
    r"""Searches for the images whose gradient is the one that was shared, for many victims at once.

    For each victim the dummy images x (and whatever else a subclass searches for) minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(x) - g^*_l \rVert_2^2

    by L-BFGS with a state of its own; the robust protocol divides D by :math:`\lVert g^* \rVert_2^2`, so
    that its losses and thresholds mean the same for every network. ``distance`` takes another one in place
    of D, which is not divided.

    One training step is one evaluation of the objective for
    every victim in the lanes. A victim that has converged, diverged, stalled or spent its budget
    leaves with its best iterate by this objective; the next cohort enters as soon as there is room,
    and training ends when every victim is done: one epoch is all victims.

    Attributes:
        finished: the victims done so far, in the order they finished.
        scores: by victim id, how near the truth its reconstruction is.

    Args:
        protocol: ``"robust"`` (every victim its own line search, restarts) or ``"published"`` (the
            search of the papers: full steps, N(0, 1) start, 300 calls of 20 iterations).
        seed: of the starts; victim and restart have their own streams, however victims are grouped.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        restart_above: a victim that ends above this objective may start again, within ``restarts``.
        distance: a key of :data:`leakage.objectives.DISTANCES`; ``"squared"`` is that of the papers.
        start_std, history_size, tolerance, max_evaluations, restarts, spectrum: replace the protocol's
            value, see :class:`SearchProtocol`.

    Raises:
        ValueError: an unknown protocol or a number out of its range; in ``fit``, a DataModule that is
            no :class:`~leakage.datamodules.VictimDataModule`, a precision other than ``"32-true"`` and
            ``"64-true"``, or a checkpoint of another configuration.
    """

    def __init__(
        self,
        *,
        protocol: str = "robust",
        seed: int = 0,
        success_threshold: float = 1e-3,
        restart_above: float = 1e-5,
        distance: str = "squared",
        start_std: float | None = None,
        history_size: int | None = None,
        tolerance: float | None = None,
        max_evaluations: int | None = None,
        restarts: int | None = None,
        spectrum: bool | None = None,
    ) -> None:
        super().__init__()
        check_positive(success_threshold=success_threshold, restart_above=restart_above)
        check_count(0, seed=seed)
        check_choice("distance", distance, DISTANCES)
        self.search = search_protocol(
            protocol,
            start_std=start_std,
            history_size=history_size,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            restarts=restarts,
            spectrum=spectrum,
        )
        self.save_hyperparameters()
        # The same under LightningCLI, which keeps what the signature of the class itself names and nothing more.
        self.save_hyperparameters(
            {
                "protocol": protocol,
                "seed": seed,
                "success_threshold": success_threshold,
                "restart_above": restart_above,
                "distance": distance,
                "start_std": start_std,
                "history_size": history_size,
                "tolerance": tolerance,
                "max_evaluations": max_evaluations,
                "restarts": restarts,
                "spectrum": spectrum,
            }
        )
        self.automatic_optimization = False
        self.dummy_images = nn.Parameter(torch.empty(0, 1, 1, 1, 1))
        self.expected_victims = 0
        self._victim: Victim | None = None
        self._reset()

    def _reset(self) -> None:
        self.iteration = 0
        self._cohorts = 0  # admitted so far
        self._awaiting = True  # whether a further cohort has been asked for
        self._asked_at = -1  # and after which iteration
        self._shared: SharedGradient | None = None  # of the victims in the lanes
        self._lanes: dict[str, Tensor] = {}
        self._finished: list[Reconstruction] = []
        self._auditor = Auditor(self.hparams["success_threshold"])

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
        """Class probabilities ``(N, K)`` of one victim from what is fixed and from the unknowns after the images."""

    @abstractmethod
    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        """Recovered labels ``(V, N)``."""

    # What callers and callbacks read.

    @property
    def victim(self) -> Victim:
        """The clients' model, loss and protocol, as the attacker knows them."""
        if self._victim is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no victim yet.")
        return self._victim

    @property
    def scores(self) -> dict[int, VictimScore]:
        """By victim id, how near the truth its reconstruction is; filled in validation, read by nothing in training."""
        return self._auditor.scores

    @property
    def num_running(self) -> int:
        """Victims in the lanes that are still searched for."""
        return int(self._optimizer.running.sum()) if self._shared is not None else 0

    @property
    def num_done(self) -> int:
        """Victims whose search has ended."""
        in_lanes = len(self._shared) - self.num_running if self._shared is not None else 0
        return sum(map(len, self._finished)) + in_lanes

    @property
    def finished(self) -> Reconstruction:
        """The victims done so far, in the order they left the lanes."""
        parts = [*self._finished]
        if self._shared is not None:
            parts.append(self._collect(~self._optimizer.running))
        return Reconstruction.cat(parts) if parts else self._empty()

    def current(self) -> Reconstruction:
        """The best iterates so far of the victims still running."""
        return self._collect(self._optimizer.running) if self._shared is not None else self._empty()

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Look at the victims, and make dummies of their shape."""
        if stage != "fit":
            raise ValueError(
                f"Expected `Trainer.fit`, which runs and scores an attack, but got `Trainer.{str.__str__(stage)}`."
            )
        datamodule = self._datamodule
        check_choice("precision", self.trainer.precision, _PRECISIONS)
        if self.trainer.world_size > 1:
            raise ValueError(
                "Expected a Trainer with one process (devices=1, num_nodes=1), whose lanes hold many victims, but got "
                f"{self.trainer.world_size}: each would attack every victim. Run one process per seed instead."
            )
        self._reset()
        self._victim = datamodule.victim
        self.expected_victims = datamodule.victims
        self._check_victim(self._victim, labels_revealed=datamodule.reveal_labels)
        protocol = self._victim.protocol
        self.dummy_images = nn.Parameter(
            torch.empty(0, protocol.num_images, *protocol.image_shape, dtype=self.dummy_images.dtype)
        )

    def configure_optimizers(self) -> PerVictimOptimizer:
        """The solver of the protocol."""
        search = self.search
        if search.line_search:
            protocol = self.victim.protocol
            return LBFGS(
                self._unknowns,
                history_size=search.history_size,
                tolerance=search.tolerance,
                max_evaluations=search.max_evaluations,
                max_step=search.max_step,
                preconditioner=ImageSpectrum(protocol.num_images, protocol.image_shape) if search.spectrum else None,
            )
        return PlainLBFGS(
            self._unknowns,
            history_size=search.history_size,
            tolerance=search.tolerance,
            max_iterations=ITERATIONS_PER_CALL,
            max_calls=-(-search.max_evaluations // ITERATIONS_PER_CALL),
        )

    def on_fit_start(self) -> None:
        """Go where the Trainer computes, and ask for the first cohort."""
        # A copy of its own: the DataModule's captures further cohorts where its images are.
        self._victim = copy.deepcopy(self.victim)
        self._victim.model.to(device=self.device, dtype=self.dummy_images.dtype)
        # Before the first batch is fetched, and after a checkpoint's lanes are back. A cohort enters two steps
        # after it was asked for, as Lightning fetches one batch ahead: also if the run was resumed in between.
        delayed = self._asked_at == self.iteration
        self._datamodule.wanted = self._cohorts if self._awaiting and not delayed else None

    def on_train_start(self) -> None:
        """Ask for the cohort whose turn is not the first batch; end at once if nothing is left to do."""
        if self._awaiting and self._asked_at == self.iteration:
            self._datamodule.wanted = self._cohorts
        if self.num_done == self.expected_victims:
            self.trainer.should_stop = True

    def training_step(self, batch: SharedGradient | tuple[()], batch_idx: int) -> None:
        """Admit the cohort in the batch, if there is one, and move every victim in the lanes by one evaluation."""
        if isinstance(batch, SharedGradient):
            self._admit(batch)
        if self._shared is None:
            return
        optimizer = cast(Any, self.optimizers())
        optimizer.step(closure=self._evaluate)
        self.iteration += 1
        losses = torch.minimum(self._lanes["best_loss"], self._optimizer.best_loss)
        self.log("train/loss", losses.median(), prog_bar=True, batch_size=len(losses))
        self._retire()
        self.log("train/running", float(self.num_running), batch_size=1)
        self.log("train/done", float(self.num_done), prog_bar=True, batch_size=1)

    def validation_step(self, batch: GroundTruth, batch_idx: int) -> None:
        """Score the victims of the batch."""
        self._audit(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all victims so far."""
        if self.scores:
            metrics = ReconstructionMetrics(prefix="val/").to(self.device)
            metrics.update(self.scores.values())
            self.log_dict(metrics.compute())
        self._auditor.release()

    def score_finished(self) -> None:
        """Score, outside of validation, what no validation has scored yet (an interrupt, the end of training)."""
        self._auditor.release()
        for batch in self._datamodule.val_dataloader():
            self._audit(batch)
        self._auditor.release()

    def on_train_end(self) -> None:
        """Score what ended after the last validation."""
        unscored = any(not self._auditor.is_final(victim) for victim in self.finished.ids.tolist())
        if unscored:
            self.score_finished()

    def _audit(self, truth: GroundTruth) -> None:
        if not self._auditor.has_taken:
            self._auditor.take(self.finished, self.current())
        self._auditor.compare(truth)

    # The engine.

    @property
    def _datamodule(self) -> VictimDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, VictimDataModule):
            raise ValueError(
                "Expected `Trainer.fit(attack, datamodule=...)` with a DataModule of `leakage.datamodules` (for your "
                f"own gradients: `SharedGradientFiles`), but got {type(datamodule).__name__}."
            )
        return datamodule

    @property
    def _optimizer(self) -> PerVictimOptimizer:
        return cast(PerVictimOptimizer, self.trainer.optimizers[0])

    def _admit(self, shared: SharedGradient) -> None:
        """Put the victims of a cohort into lanes of their own."""
        self.victim.check(shared)
        shared = shared.to(device=self.device, dtype=self.dummy_images.dtype)
        fixed = self._begin(shared)
        starts = self._first_starts(shared, fixed)
        norms = sum(tensor.square().flatten(1).sum(1) for tensor in shared.gradients.values())
        norms = cast(Tensor, norms)
        relative = self.search.relative and self.hparams["distance"] == "squared"
        scale = 1 / norms if relative else torch.ones_like(norms)
        zeros = torch.zeros(len(shared), dtype=torch.long, device=self.device)
        lanes = {
            # A gradient of zero leaves nothing to compare with: its distance is taken as it is.
            "scale": torch.where(torch.isfinite(scale), scale, 1.0),
            "fixed": fixed,
            "restarts": zeros,
            "iterations": zeros.clone(),  # of the earlier starts
            "evaluations": zeros.clone(),
            "best_loss": torch.full_like(norms, torch.inf),  # of the earlier starts
            "best_images": starts[0],
            "best_labels": torch.zeros(starts[0].shape[:2], dtype=torch.long, device=self.device),
        }
        self._optimizer.extend(*starts)
        if self._shared is None:
            self._shared, self._lanes = shared, lanes
        else:
            self._shared = SharedGradient.cat([self._shared, shared])
            self._lanes = {name: torch.cat([tensor, lanes[name]]) for name, tensor in self._lanes.items()}
        self._cohorts += 1
        self._awaiting = False

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
        shared, unknowns = cast(SharedGradient, self._shared), self._unknowns
        distance = DISTANCES[self.hparams["distance"]]

        def objective(unknowns: tuple[Tensor, ...], fixed: Tensor, scale: Tensor, state: Any, targets: Any) -> Tensor:
            images, *others = unknowns
            gradients = self.victim.gradients(state, images, self._targets(fixed, *others))
            return scale * distance(gradients, targets)

        evaluate = vmap(grad_and_value(objective), in_dims=(0, 0, 0, 0 if shared.own_weights else None, 0))
        values = tuple(unknown.data for unknown in unknowns)
        lanes = self._lanes
        gradients, losses = evaluate(values, lanes["fixed"], lanes["scale"], shared.state, shared.gradients)
        for unknown, gradient in zip(unknowns, gradients, strict=True):
            unknown.grad = gradient
        return cast(Tensor, losses)

    def _retire(self) -> None:
        """Start stalled victims again within their budget, let finished ones go, ask for the next cohort."""
        optimizer, lanes = self._optimizer, self._lanes
        ended = ~optimizer.running
        poor = torch.minimum(lanes["best_loss"], optimizer.best_loss) > self.hparams["restart_above"]
        again = (ended & poor & (lanes["restarts"] < self.search.restarts)).nonzero().squeeze(1)
        if len(again):
            self._restart(again)
            ended = ~optimizer.running
        left = int(ended.sum())
        if left == len(ended) or left > _LEAVING_SHARE * len(ended):
            self._finished.append(self._collect(ended))
            kept = (~ended).nonzero().squeeze(1)
            optimizer.select(kept)
            shared = cast(SharedGradient, self._shared)
            self._shared = shared.select(kept) if len(kept) else None
            self._lanes = {name: tensor[kept] for name, tensor in lanes.items()} if len(kept) else {}
        running = len(ended) - left
        datamodule = self._datamodule
        if self._cohorts == datamodule.num_cohorts:
            self.trainer.should_stop |= running == 0
        elif not self._awaiting and running <= _CARRIED_SHARE * datamodule.batch_size:
            self._awaiting, self._asked_at = True, self.iteration
            datamodule.wanted = self._cohorts

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
            ids=cast(SharedGradient, self._shared).ids,
            images=torch.where(newer[:, None, None, None, None], images, lanes["best_images"]),
            labels=torch.where(newer[:, None], labels, lanes["best_labels"]),
            loss=torch.minimum(optimizer.best_loss, lanes["best_loss"]),
            iterations=lanes["iterations"] + optimizer.iterations,
            evaluations=lanes["evaluations"] + optimizer.evaluations,
            restarts=lanes["restarts"],
            status=optimizer.status,
        )

    def _collect(self, chosen: Tensor) -> Reconstruction:
        best = self._best()
        best.ids = best.ids.to(chosen.device)
        selected = best.select(chosen)
        return Reconstruction(**{name: tensor.detach().cpu() for name, tensor in vars(selected).items()})

    def _empty(self) -> Reconstruction:
        whole, real = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        shape = self.dummy_images.shape[1:]
        images, labels = torch.zeros(0, *shape), torch.zeros(0, shape[0], dtype=torch.long)
        return Reconstruction(whole, images, labels, real, whole, whole, whole, whole)

    # Checkpoints: the lanes, their victims and the finished; the optimizer's state is Lightning's to keep.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the lanes, their victims and those that are done."""
        shared = self._shared
        checkpoint["leakage"] = {
            "module": type(self).__name__,
            "precision": self.trainer.precision,
            "iteration": self.iteration,
            "cohorts": self._cohorts,
            "awaiting": self._awaiting,
            "asked_at": self._asked_at,
            "lanes": self._lanes,
            "finished": [vars(part) for part in self._finished],
            # A run that is resumed when it is over validates no more.
            "scores": {victim: vars(result) for victim, result in self.scores.items()},
            "shared": None
            if shared is None
            else {
                "gradients": shared.gradients,
                "state": shared.state,
                "ids": shared.ids,
                "own_weights": shared.own_weights,
                "labels": shared.labels,
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them.

        Raises:
            ValueError: a checkpoint of another attack or configuration.
        """
        check_checkpoint(checkpoint, type(self).__name__, dict(self.hparams), self.trainer.precision)
        saved = checkpoint["leakage"]
        self.iteration, self._cohorts = saved["iteration"], saved["cohorts"]
        self._awaiting, self._asked_at = saved["awaiting"], saved["asked_at"]
        self._lanes = {name: tensor.to(self.device) for name, tensor in saved["lanes"].items()}
        self._finished = [Reconstruction(**part) for part in saved["finished"]]
        self._auditor.scores = {victim: VictimScore(**result) for victim, result in saved["scores"].items()}
        if saved["shared"] is not None:
            shared = SharedGradient(**saved["shared"], protocol=self.victim.protocol)
            self._shared = shared.to(device=self.device)
        parameters = dict(self.named_parameters())
        for name, tensor in checkpoint["state_dict"].items():
            if name in parameters:
                parameters[name].data = torch.empty_like(tensor, device=self.device)
