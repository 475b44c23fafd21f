"""The loop that every attack shares: admit victims, search for many of them at once, hand out the finished."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from leakage.attacks.protocols import ITERATIONS_PER_CALL, search_protocol
from leakage.clients.shared_gradient import SharedGradient
from leakage.datamodules.base import GroundTruth
from leakage.errors import check_choice, check_count, check_positive
from leakage.files.checkpoints import check_checkpoint, restoring
from leakage.inversion.auditor import Auditor
from leakage.inversion.engine import Engine
from leakage.inversion.processes import check_strategy, gather, new_deal, sum_over_processes, take_part
from leakage.inversion.reconstruction import Reconstruction
from leakage.inversion.restored import check_lanes, check_results, check_victims
from leakage.metrics import ReconstructionMetrics, VictimScore
from leakage.objectives import DISTANCES
from leakage.solvers import LBFGS, ImageSpectrum, PerVictimOptimizer, PlainLBFGS

# L-BFGS needs gradients that are more precise than those of half precision.
_PRECISIONS = ("32-true", "64-true")
# Iterations between two that are logged.
_LOGGED_EVERY = 10
# Steps between two at which several processes tell one another how many victims are done.
_AGREED_EVERY = 20


class GradientMatchingAttack(Engine):
    r"""Searches for the images whose gradient is the one that was shared, for many victims at once.

    For each victim the dummy images x (and whatever else a subclass searches for) minimise

    .. math:: D(x) = \sum_l \lVert \nabla_{\theta_l} \ell(x) - g^*_l \rVert_2^2

    by L-BFGS with a state of its own; the robust protocol divides D by :math:`\lVert g^* \rVert_2^2`, so
    that its losses and thresholds mean the same for every network. ``distance`` takes another one in place
    of D, which is not divided.

    One training step is one evaluation of the objective for
    every victim in the lanes. A victim that has converged, diverged, stalled or spent its budget
    leaves with its best iterate by this objective; the next ones take the lanes that are free,
    and training ends when every victim is done: one epoch is all victims. Where an evaluation finds no
    memory, half of the lanes are used, and the victims that were searched for begin anew.

    Several processes, on one machine or many, share the victims out among them
    (``Trainer(strategy="victim_parallel", devices=2)``); the first one has all results in the end.

    Attributes:
        finished: the victims done so far, in the order they finished; in the end all, in their own order.
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
        self._reset()

    def _reset(self) -> None:
        super()._reset()
        self._deal = ""  # which victims are whose, if there are several processes
        self._auditor = Auditor(self.hparams["success_threshold"])

    # What callers and callbacks read.

    @property
    def scores(self) -> dict[int, VictimScore]:
        """By victim id, how near the truth its reconstruction is; filled in validation, read by nothing in training."""
        return self._auditor.scores

    @property
    def num_running(self) -> int:
        """Victims in the lanes that are still searched for."""
        return int(self._optimizer.running.sum()) if self._searches else 0

    @property
    def num_done(self) -> int:
        """Victims whose search has ended."""
        in_lanes = len(self._optimizer.status) - self.num_running if self._searches else 0
        return sum(map(len, self._finished)) + in_lanes

    @property
    def finished(self) -> Reconstruction:
        """The victims done so far, in the order they left the lanes; after ``fit`` all, in their own order."""
        parts = [*self._finished]
        if self._searches:
            parts.append(self._collect((~self._optimizer.running).nonzero().squeeze(1)))
        return Reconstruction.cat(parts) if parts else self._empty()

    def current(self) -> Reconstruction:
        """The best iterates so far of the victims still running."""
        if not self._searches:
            return self._empty()
        return self._collect(self._optimizer.running.nonzero().squeeze(1))

    # Lightning's hooks.

    def setup(self, stage: str) -> None:
        """Look at the victims, and make dummies of their shape."""
        if stage != "fit":
            raise ValueError(
                f"Expected `Trainer.fit`, which runs and scores an attack, but got `Trainer.{str.__str__(stage)}`."
            )
        datamodule = self._datamodule
        check_choice("precision", self.trainer.precision, _PRECISIONS)
        check_strategy(self.trainer)
        self._reset()
        self._victim = datamodule.victim
        self.expected_victims = datamodule.victims
        self._queue = list(range(self.trainer.global_rank, datamodule.victims, self.trainer.world_size))
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
        """Go where the Trainer computes, find how many lanes there shall be, and ask for the first victims."""
        # A copy of its own: the DataModule's captures further gradients where its images are.
        self._victim = copy.deepcopy(self.victim)
        self._victim.model.to(device=self.device, dtype=self.dummy_images.dtype)
        self._chain = self._find_chain()
        datamodule = self._datamodule
        self._deal = self._deal or new_deal(self.trainer)
        in_lanes = self._lanes["place"].tolist() if self._lanes else []
        mine = sorted({*self._finished_places, *in_lanes, *self._asked, *self._queue})
        if sum_over_processes(self.trainer, len(mine)) < self.expected_victims:
            raise ValueError(f"Expected a checkpoint of all {self.expected_victims} victims, but got {len(mine)} here.")
        # Lightning wants a batch in every process, also in one that has no victims: it scores none of the batch.
        datamodule.audited = (mine or [0]) if self.trainer.world_size > 1 else None
        if not self._most_lanes and self._queue:
            self._most_lanes = self._find_lanes()
            self._ask(self._most_lanes)
            self._asked_at = -1
        # Before the first batch is fetched, and after a checkpoint's lanes are back. Victims enter two steps
        # after they were asked for, as Lightning fetches one batch ahead: also if the run was resumed in between.
        delayed = self._asked_at == self.iteration
        datamodule.wanted = self._asked if self._asked and not delayed else None

    def on_train_start(self) -> None:
        """Ask for the victims whose turn is not the first batch."""
        if self._asked and self._asked_at == self.iteration:
            self._datamodule.wanted = self._asked

    def training_step(self, batch: SharedGradient | tuple[()], batch_idx: int) -> None:
        """Admit the victims of the batch, if there are any, and move every victim in the lanes by one evaluation."""
        if isinstance(batch, SharedGradient):
            self._admit(batch)
        if self.num_running:
            self._advance()
        else:
            self._idle()
        # Processes that agreed at every step would each time wait for the slowest.
        if self.trainer.world_size == 1 or batch_idx % _AGREED_EVERY == 0:
            self._end_when_all_are_done()
        self._tell()

    def _tell(self) -> None:
        """Log how far it is; every tenth time, as that takes as long as a good part of a small evaluation."""
        due = self.iteration % _LOGGED_EVERY == 1 or self.trainer.should_stop
        if not self.iteration or not (due or self.trainer._logger_connector.should_update_logs):
            return
        if not self._lanes and not self._finished:  # they begin anew, or are other processes'
            return
        best = torch.minimum(self._lanes["best_loss"], self._optimizer.best_loss) if self._lanes else None
        losses = self._finished[-1].loss if best is None else best
        self.log("train/loss", losses.median(), prog_bar=True, batch_size=len(losses))
        self.log("train/running", float(self.num_running), batch_size=1)
        self.log("train/done", float(self.num_done), prog_bar=True, batch_size=1)

    def _end_when_all_are_done(self) -> None:
        done = sum_over_processes(self.trainer, self.num_done)
        if done == self.expected_victims:
            self.trainer.should_stop = True

    def validation_step(self, batch: GroundTruth, batch_idx: int) -> None:
        """Score the victims of the batch."""
        self._audit(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all victims so far."""
        if sum_over_processes(self.trainer, len(self.scores)):
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
        if self._shared is not None:
            running = self._optimizer.running
            if not bool(running.all()):
                self._hand_out((~running).nonzero().squeeze(1))
            self._keep(running)
        self._finished, self._finished_places, self._auditor.scores = gather(
            self.trainer, self.finished, self._finished_places, self.scores
        )
        self._datamodule.audited = None

    def _audit(self, truth: GroundTruth) -> None:
        if not self._auditor.has_taken:
            self._auditor.take(self.finished, self.current())
        self._auditor.compare(truth)

    # Checkpoints: the lanes, their victims and the finished; the optimizer's state is Lightning's to keep.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the lanes, their victims and those that are done, of this process."""
        shared = self._shared
        checkpoint["leakage"] = {
            "module": type(self).__name__,
            "precision": self.trainer.precision,
            "processes": self.trainer.world_size,
            "deal": self._deal,
            "iteration": self.iteration,
            "queue": self._queue,
            "asked": self._asked,
            "asked_at": self._asked_at,
            "most_lanes": self._most_lanes,
            "lanes": self._lanes,
            "finished": [vars(part) for part in self._finished],
            "finished_places": self._finished_places,
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

        Where the number of processes is another one now, what is done stays done and the victims that were being
        searched for begin anew.

        Raises:
            ValueError: a checkpoint of another attack or configuration.
            OSError: a process' part of it is missing.
        """
        check_checkpoint(checkpoint, type(self).__name__, dict(self.hparams), self.trainer.precision)
        with restoring("the state of an attack"):
            take_part(self.trainer, checkpoint, self.expected_victims)
            saved, parameters = checkpoint["leakage"], dict(self.named_parameters())
            check_victims(saved, self.expected_victims)
            check_lanes(saved, checkpoint["state_dict"], parameters, classes=self.victim.protocol.num_classes)
            check_results(saved, self.dummy_images, classes=self.victim.protocol.num_classes)
            self.iteration, self._deal = saved["iteration"], saved["deal"]
            self._queue, self._asked, self._asked_at = saved["queue"], saved["asked"], saved["asked_at"]
            self._most_lanes = saved["most_lanes"]
            self._lanes = {name: tensor.to(self.device) for name, tensor in saved["lanes"].items()}
            self._finished = [Reconstruction(**part) for part in saved["finished"]]
            self._finished_places = saved["finished_places"]
            self._auditor.scores = {victim: VictimScore(**result) for victim, result in saved["scores"].items()}
            if saved["shared"] is not None:
                shared = SharedGradient(**saved["shared"], protocol=self.victim.protocol)
                self.victim.check(shared)
                self._shared = shared.to(device=self.device, dtype=checkpoint["state_dict"]["dummy_images"].dtype)
            for name, tensor in checkpoint["state_dict"].items():
                parameters[name].data = torch.empty_like(tensor, device=self.device)
