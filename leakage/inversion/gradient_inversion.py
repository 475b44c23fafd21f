"""The attack that all attacks are: admit victims, search for many of them at once, hand out the finished."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.datamodules.base import GroundTruth, VictimDataModule
from leakage.defenses.base import Defense
from leakage.dummies import Images, InferredLabels, Labels, Pixels, Target
from leakage.errors import check_choice, check_count, check_flag, check_not_negative, check_positive
from leakage.files.checkpoints import check_checkpoint, restoring
from leakage.inversion.auditor import Auditor
from leakage.inversion.evaluator import Evaluator
from leakage.inversion.lanes import Lanes
from leakage.inversion.memory import is_out_of_memory
from leakage.inversion.processes import check_strategy, gather, new_deal, sum_over_processes, take_part
from leakage.inversion.reconstruction import Reconstruction
from leakage.inversion.search import Queue, Search
from leakage.inversion.simulation import known_to
from leakage.metrics import ReconstructionMetrics, VictimScore
from leakage.objectives import SquaredDistance, Term
from leakage.pieces import tell
from leakage.precision import full_precision
from leakage.solvers import LBFGS, PerVictimOptimizer, Solver

# What is matched needs gradients that are more precise than those of half precision.
_PRECISIONS = ("32-true", "64-true")
# Iterations between two that are logged.
_LOGGED_EVERY = 10
# Steps between two at which several processes tell one another how many victims are done.
_AGREED_EVERY = 20
_PIECES = {"objective": Term, "images": Images, "labels": Labels, "solver": Solver}


class GradientInversion(LightningModule):
    r"""Searches for the images whose gradient is the one that was shared, for many victims at once.

    It is made of pieces: for each victim the dummy images x and class probabilities y, as ``images`` and ``labels``
    write them, are moved by ``solver`` so that they lower ``objective``,

    .. math:: \min_{x, y} \; \sum_k w_k \, D_k\bigl(\nabla_\theta \ell(f_\theta(x), y), \, g^*\bigr) +
        \sum_j w_j \, R_j(x)

    with distances D to the shared gradient :math:`g^*` and priors R. A published attack is a choice of pieces: see
    :mod:`leakage.attacks`.

    One training step is one evaluation of the objective for every victim in the lanes. A victim that has converged,
    diverged, stalled or spent its budget leaves with its best iterate by this objective; the next ones take the lanes
    that are free, and training ends when every victim is done: one epoch is all victims. Where an evaluation finds no
    memory, half of the lanes are used, and the victims that were searched for begin anew. A victim whose gradient is
    zero, or too small to be compared with, is ``uninformative``, and not searched for. What clients don't tell of their
    local steps is searched for too: :class:`~leakage.dummies.LearningRate`, :class:`~leakage.dummies.LocalOrder`.

    Several processes share the victims out (``Trainer(strategy="victim_parallel", devices=2)``); the first has all.

    Attributes:
        finished: the victims done so far, in the order they finished; in the end all, in their own order.
        scores: by victim id, how near the truth its reconstruction is.

    Args:
        objective: what is lowered: terms of :mod:`leakage.objectives`, added up with weights.
        images: how dummy images are written, see :mod:`leakage.dummies`.
        labels: where labels come from, see :mod:`leakage.dummies`.
        solver: how unknowns are moved, see :mod:`leakage.solvers`.
        restarts: further starts for a victim that ended above ``restart_above``; the best of all starts is kept.
        restart_above: see ``restarts``; by default every victim starts again.
        seed: of the starts; victim and restart have their own streams, however victims are grouped.
        success_threshold: an image counts as reconstructed if its MSE is below this.
        adaptive: an attacker who knows the defenses that the protocol tells of, and asks for gradients that the clients
            would have made of these (:meth:`leakage.defenses.Defense.simulate`); else what was shared is matched as if
            it was the gradient.

    Raises:
        ValueError: a piece of another kind or a number out of its range; in ``fit``, what a piece says of victims that
            it can't be used on, a DataModule that is no :class:`~leakage.datamodules.VictimDataModule`, a precision
            other than ``"32-true"`` and ``"64-true"``, an MPS device, or a checkpoint of another configuration.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import Victims
        >>> from leakage.objectives import CosineDistance, TotalVariation
        >>> from leakage.solvers import SignedAdam
        >>> attack = GradientInversion(
        ...     objective=CosineDistance() + 1e-2 * TotalVariation(), images=Pixels(box=(0, 1)),
        ...     labels=InferredLabels("auto"), solver=SignedAdam(lr=0.1, steps=5))
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=Victims("sample", victims=2))
        >>> attack.finished.images.shape
        torch.Size([2, 1, 1, 28, 28])
    """

    def __init__(
        self,
        *,
        objective: Term | None = None,
        images: Images | None = None,
        labels: Labels | None = None,
        solver: Solver | None = None,
        restarts: int = 0,
        restart_above: float = 0.0,
        seed: int = 0,
        success_threshold: float = 1e-3,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        self.objective = SquaredDistance() if objective is None else objective
        self.images = Pixels() if images is None else images
        self.labels = InferredLabels() if labels is None else labels
        self.solver = LBFGS() if solver is None else solver
        for name, kind in _PIECES.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"Expected `{name}` to be a {kind.__module__.rpartition('.')[0]}.{kind.__name__}, but got "
                    f"{getattr(self, name)!r}."
                )
        if not self.objective.parts():
            raise ValueError("Expected `objective` with a weight that is not 0, but got none.")
        check_positive(success_threshold=success_threshold)
        check_flag(adaptive=adaptive)
        check_count(0, restarts=restarts, seed=seed)
        check_not_negative(restart_above=restart_above)
        self._save_options()
        self.automatic_optimization = False
        self.unknowns = nn.ParameterDict()
        self.expected_victims = 0
        self._reset()

    def _save_options(self) -> None:
        """The arguments of this class and of the preset that it is, and the pieces, as plain values for loggers."""
        given = collect_init_args(cast(Any, inspect.currentframe()).f_back, [], classes=(GradientInversion,))
        options = {name: value for arguments in reversed(given) for name, value in arguments.items()}
        options |= {name: getattr(self, name) for name in _PIECES}
        plain = (str, int, float, bool, type(None))
        self.save_hyperparameters({name: v if isinstance(v, plain) else tell(v) for name, v in options.items()})

    def _reset(self) -> None:
        """Begin with no victim."""
        self._victim: Victim | None = None
        self._defenses: tuple[Defense, ...] = ()
        self._search = Search(Queue())
        self._deal = ""  # which victims are whose, if there are several processes
        self._auditor = Auditor(self.hparams["success_threshold"])

    # What callers and callbacks read.

    @property
    def victim(self) -> Victim:
        """The clients' model, loss and protocol, as the attacker knows them."""
        if self._victim is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no victim yet.")
        return self._victim

    @property
    def iteration(self) -> int:
        """Evaluations of the objective so far, each for all victims in the lanes."""
        return self._search.iteration

    @property
    def lanes(self) -> Lanes:
        """The victims that are searched for at present."""
        return self._search.lanes

    @property
    def most_lanes(self) -> int:
        """How many victims may be in the lanes; fewer after an evaluation found no memory."""
        return self._search.most_lanes

    @property
    def scores(self) -> dict[int, VictimScore]:
        """By victim id, how near the truth its reconstruction is; filled in validation, read by nothing in training."""
        return self._auditor.scores

    @property
    def num_running(self) -> int:
        """Victims in the lanes that are still searched for."""
        return self._search.num_running

    @property
    def num_converged(self) -> int:
        """Victims of this process whose search has ended below the solver's tolerance."""
        return self._search.num_converged

    @property
    def num_done(self) -> int:
        """Victims whose search has ended."""
        return self._search.num_done

    @property
    def finished(self) -> Reconstruction:
        """The victims done so far, in the order they left the lanes; after ``fit`` all, in their own order."""
        return Reconstruction.cat([*self._search.finished, *self._search.in_lanes(running=False)])

    def current(self) -> Reconstruction:
        """The best iterates so far of the victims still running."""
        return Reconstruction.cat(self._search.in_lanes(running=True))

    # Lightning's hooks.

    @property
    def _datamodule(self) -> VictimDataModule:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, VictimDataModule):
            raise ValueError(
                "Expected `Trainer.fit(attack, datamodule=...)` with a DataModule of `leakage.datamodules` (for your "
                f"own gradients: `SharedGradients`), but got {type(datamodule).__name__}."
            )
        return datamodule

    def setup(self, stage: str) -> None:
        """Look at the victims, and make unknowns of the shape that the dummies need."""
        if stage != "fit":
            raise ValueError(
                f"Expected `Trainer.fit`, which runs and scores an attack, but got `Trainer.{str.__str__(stage)}`."
            )
        datamodule = self._datamodule
        check_choice("precision", self.trainer.precision, _PRECISIONS)
        check_strategy(self.trainer)
        _leave_out_summary(self.trainer)
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                "Expected a CPU or a CUDA device, but got 'mps', which knows no double precision: labels and closed "
                "forms need it. Pass accelerator='cpu' to the Trainer."
            )
        self._reset()
        adaptive, told = self.hparams["adaptive"], datamodule.victim.as_told()
        self._defenses = known_to(adaptive, told)
        victim = self._victim = told if adaptive else told.without_draws()
        self.expected_victims = datamodule.victims
        self._search = Search(Queue([*range(self.trainer.global_rank, datamodule.victims, self.trainer.world_size)]))
        target = Target(
            victim,
            labels_revealed=datamodule.reveal_labels,
            own_weights=datamodule.own_weights,
            labels_known=self.labels.known,
        )
        evaluator = self._make_evaluator()
        evaluator.prepare(next(victim.model.parameters()))  # which an earlier fit may have taken elsewhere
        evaluator.check(target)
        dtype = torch.float64 if self.trainer.precision == "64-true" else torch.float32
        shapes = evaluator.shapes().items()
        # A plain dict would be sorted.
        empty = OrderedDict((name, torch.empty(0, *shape, dtype=dtype)) for name, shape in shapes)
        self.unknowns = nn.ParameterDict(empty)

    def _make_evaluator(self) -> Evaluator:
        low_rank = self._datamodule.low_rank
        return Evaluator(self.victim, self.objective, self.images, self.labels, low_rank, self._defenses)

    def configure_optimizers(self) -> PerVictimOptimizer:
        """The solver, on the unknowns."""
        evaluator = self._make_evaluator()
        problem = evaluator.problem(
            lambda points, lanes: self.lanes.equations(points, lanes), next(iter(self.unknowns.values())).element_size()
        )
        optimizer = PerVictimOptimizer(self.unknowns.values(), self.solver, problem)
        self._search.put_lanes(Lanes(evaluator, self.unknowns, optimizer, self.hparams["seed"]))
        return optimizer

    @sdpa_kernel(SDPBackend.MATH)
    def on_fit_start(self) -> None:
        """Go where the Trainer computes, find how many lanes there shall be, and ask for the first victims."""
        # A copy of its own: the DataModule's captures further gradients where its images are.
        victim = self._victim = copy.deepcopy(self.victim)
        victim.model.to(device=self.device, dtype=self.lanes.dtype)
        evaluator = self._make_evaluator()
        like = next(victim.model.parameters())
        evaluator.prepare(like)
        self.solver.prepare(like)
        datamodule, search = self._datamodule, self._search
        search.move(evaluator)
        self._deal = self._deal or new_deal(self.trainer)
        mine = search.victims()
        if sum_over_processes(self.trainer, len(mine)) < self.expected_victims:
            raise ValueError(f"Expected a checkpoint of all {self.expected_victims} victims, but got {len(mine)} here.")
        # Lightning wants a batch in every process, also in one that has no victims: it scores none of the batch.
        datamodule.audited = (mine or [0]) if self.trainer.world_size > 1 else None
        search.begin(datamodule, processes=self.trainer.num_devices)

    def on_train_start(self) -> None:
        """Ask for the victims whose turn is not the first batch."""
        self._search.queue.after_first_fetch(self._datamodule, self.iteration)

    @full_precision()
    @sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
    def training_step(self, batch: SharedGradient | tuple[()], batch_idx: int) -> None:
        """Admit the victims of the batch, if there are any, and move every victim in the lanes by one evaluation."""
        search = self._search
        if isinstance(batch, SharedGradient):
            self.victim.check(batch)
            search.admit(batch)
        # All processes make the same number of steps, else their checkpoints miss.
        if search.num_running or self.trainer.world_size > 1:
            self._step()
        search.retire(self._datamodule, restarts=self.hparams["restarts"], above=self.hparams["restart_above"])
        # Processes that agreed at every step would each time wait for the slowest.
        if self.trainer.world_size == 1 or batch_idx % _AGREED_EVERY == 0:
            done = sum_over_processes(self.trainer, self.num_done)
            self.trainer.should_stop = self.trainer.should_stop or done == self.expected_victims
        self._tell(batch_idx)

    def _step(self) -> None:
        """One evaluation for every victim in the lanes."""
        search, step = self._search, cast(Any, self.optimizers()).step
        if not search.num_running:
            step(closure=search.lanes.rest)
            return
        running = search.lanes.optimizer.running  # before the step, which may have settled some when it breaks off
        try:
            step(closure=search.lanes.evaluate)
            search.iteration += 1
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Lightning has begun this for the step that failed.
            cast(Any, self.trainer).profiler.stop("optimizer_step")
            search.begin_anew_with_fewer_lanes(running, self._datamodule, error)
            if self.trainer.world_size > 1:
                step(closure=search.lanes.rest)

    def _tell(self, batch_idx: int) -> None:
        """Log how far it is; every tenth time, as that takes as long as a good part of a small evaluation."""
        # What is logged in other steps than those of `log_every_n_steps` reaches the progress bar alone.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = (
            self.iteration % _LOGGED_EVERY == 1 or self.trainer.should_stop or (every and (batch_idx + 1) % every == 0)
        )
        if not self.iteration or not due or (losses := self._search.losses()) is None:
            return
        self.log("train/loss", losses.median(), prog_bar=True, batch_size=len(losses))
        self.log("train/running", float(self.num_running), batch_size=1)
        self.log("train/done", float(self.num_done), prog_bar=True, batch_size=1)

    # Scores.

    def on_validation_epoch_start(self) -> None:
        """Take what there is to score."""
        self._auditor.take(self.finished, self.current())

    def validation_step(self, batch: GroundTruth, batch_idx: int) -> None:
        """Score the victims of the batch."""
        self._auditor.compare(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all victims so far."""
        if sum_over_processes(self.trainer, len(self.scores)):
            metrics = ReconstructionMetrics(prefix="val/").to(self.device)
            metrics.update(self.scores.values())
            self.log_dict(metrics.compute())
        self._auditor.release()

    def score_finished(self) -> None:
        """Score, outside of validation, what no validation has scored yet (an interrupt, the end of training)."""
        self._auditor.take(self.finished, self.current())
        for batch in self._datamodule.val_dataloader():
            self._auditor.compare(batch)
        self._auditor.release()

    def on_train_end(self) -> None:
        """Score what ended after the last validation."""
        if not all(map(self._auditor.is_final, self.finished.ids.tolist())):
            self.score_finished()
        search = self._search
        search.hand_out_all()
        search.finished, search.places, self._auditor.scores = gather(
            self.trainer, self.finished, search.places, self.scores
        )
        self._datamodule.audited = None

    # Checkpoints: the lanes, their victims and the finished; the optimizer's state is Lightning's to keep.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the lanes, their victims and those that are done, of this process."""
        checkpoint["leakage"] = {
            "module": type(self).__name__,
            "precision": self.trainer.precision,
            "processes": self.trainer.world_size,
            "deal": self._deal,
            **self._search.saved(),
            "learnt": {name: getattr(self, name).learnt() for name in ("images", "labels")},
            # A run that is resumed when it is over validates no more.
            "scores": {victim: vars(result) for victim, result in self.scores.items()},
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
            saved = checkpoint["leakage"]
            self._deal = saved["deal"]
            self._auditor.scores = {victim: VictimScore(**result) for victim, result in saved["scores"].items()}
            for name, learnt in saved["learnt"].items():
                getattr(self, name).load_learnt(learnt)
            dtype = next(iter(self.unknowns.values())).dtype
            declared = Lanes.state(self.victim.protocol, dtype) | self._make_evaluator().state(dtype)
            self._search = Search.restored(saved, self.victim, declared)
            for name, unknown in self.unknowns.items():
                unknown.data = torch.empty_like(checkpoint["state_dict"][f"unknowns.{name}"], device=unknown.device)


def _leave_out_summary(trainer: Trainer) -> None:
    """Take Lightning's own summary of parameters from a Trainer: an attack has none before its victims come."""
    trainer.callbacks = [one for one in trainer.callbacks if type(one) is not ModelSummary]  # type: ignore[attr-defined]
