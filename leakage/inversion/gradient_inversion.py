"""The base class of all attacks, as a LightningModule."""

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
from leakage.pieces import stable_repr
from leakage.precision import full_precision
from leakage.solvers import LBFGS, PerVictimOptimizer, Solver

# Gradients in half precision are too inexact to be matched.
_PRECISIONS = ("32-true", "64-true")
# Iterations between two log entries.
_LOGGED_EVERY = 10
# Steps after which several processes exchange how many victims are done.
_AGREED_EVERY = 20
COMBINE = ("best", "mean")
"""Values of ``combine=``: the result of several starts."""
_PIECES = {"objective": Term, "images": Images, "labels": Labels, "solver": Solver}


class GradientInversion(LightningModule):
    r"""Search for images whose gradient matches the shared gradient, for many victims at once.

    An attack is made of four pieces. For each victim, ``images`` and ``labels`` define the dummy images x and class
    probabilities y, and ``solver`` moves them to minimise ``objective``:

    .. math:: \min_{x, y} \; \sum_k w_k \, D_k\bigl(\nabla_\theta \ell(f_\theta(x), y), \, g^*\bigr) +
        \sum_j w_j \, R_j(x)

    with distances D to the shared gradient :math:`g^*` and priors R. Each published attack is a choice of pieces: see
    :mod:`leakage.attacks`.

    Each training step evaluates the objective once for every victim in the lanes. A victim leaves its lane when it has
    converged, diverged, stalled or spent its budget; its result is the iterate with the lowest objective. Waiting
    victims take the free lanes, and training ends when every victim is done, so one epoch covers all victims. If an
    evaluation runs out of memory, the number of lanes is halved and the victims in progress start over. A victim whose
    gradient is zero, or too small to be matched, is ``uninformative`` and is not searched for. If clients keep details
    of their local steps secret, the attack searches for these too: :class:`~leakage.dummies.LearningRate`,
    :class:`~leakage.dummies.LocalOrder`.

    With ``Trainer(strategy="victim_parallel", devices=2)`` the victims are divided among several processes; in the end
    the first process has the results of all.

    Attributes:
        finished: reconstructions of the victims done so far, in the order they finished; after ``fit``, of all victims
            in the order of the data.
        scores: the score of each victim's reconstruction against the ground truth, by victim id.

    Args:
        objective: what to minimise: a weighted sum of terms from :mod:`leakage.objectives`.
        images: how dummy images are parametrised, see :mod:`leakage.dummies`.
        labels: where labels come from, see :mod:`leakage.dummies`.
        solver: how unknowns are moved, see :mod:`leakage.solvers`.
        restarts: additional starts for a victim that ended above ``restart_above``.
        restart_above: see ``restarts``; by default every victim is restarted.
        combine: the result of a victim with several starts. ``"best"`` is the start with the lowest objective L;
            ``"mean"`` is the mean of the images of all starts with the same labels as the best one so far, weighted by
            :math:`1/L^2`: where one start fits better than the others, it has nearly all the weight; where many images
            fit equally well, their mean is nearer to the true one than most of them. L must be positive, or the best
            start is kept.
        seed: seed of the starts. Each victim and restart has its own random stream, however victims are grouped.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: whether the attacker takes the defenses in the protocol into account, by applying them to the
            gradients of the dummies before matching (:meth:`leakage.defenses.Defense.simulate`). Otherwise the shared
            gradient is matched as if it were undefended.

    Raises:
        ValueError: if a piece has the wrong type or a number is out of range; in ``fit``, if a piece cannot be used on
            the victims, the DataModule is not a :class:`~leakage.datamodules.VictimDataModule`, the precision is not
            ``"32-true"`` or ``"64-true"``, the device is MPS, or the checkpoint has another configuration.

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
        combine: str = "best",
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
            raise ValueError("Expected `objective` to have a term with a nonzero weight, but got none.")
        check_positive(success_threshold=success_threshold)
        check_flag(adaptive=adaptive)
        check_count(0, restarts=restarts, seed=seed)
        check_not_negative(restart_above=restart_above)
        check_choice("combine", combine, COMBINE)
        self._save_options()
        self.automatic_optimization = False
        self.unknowns = nn.ParameterDict()
        self.expected_victims = 0
        self._reset()

    def _save_options(self) -> None:
        """Save the arguments of this class and its subclass, and the pieces, as plain values for loggers."""
        given = collect_init_args(cast(Any, inspect.currentframe()).f_back, [], classes=(GradientInversion,))
        options = {name: value for arguments in reversed(given) for name, value in arguments.items()}
        options |= {name: getattr(self, name) for name in _PIECES}
        plain = (str, int, float, bool, type(None))
        self.save_hyperparameters({name: v if isinstance(v, plain) else stable_repr(v) for name, v in options.items()})

    def _reset(self) -> None:
        """Reset the state to that of an attack without victims."""
        self._victim: Victim | None = None
        self._defenses: tuple[Defense, ...] = ()
        self._search = Search(Queue())
        self._deal = ""  # identifies how victims are divided among processes
        self._auditor = Auditor(self.hparams["success_threshold"])

    # What callers and callbacks read.

    @property
    def victim(self) -> Victim:
        """The clients' model, loss and protocol, as known to the attacker."""
        if self._victim is None:
            raise RuntimeError("Expected the attack to be inside `Trainer.fit`, but got no victim yet.")
        return self._victim

    @property
    def iteration(self) -> int:
        """Evaluations of the objective so far, each for all victims in the lanes."""
        return self._search.iteration

    @property
    def lanes(self) -> Lanes:
        """The victims currently in the lanes."""
        return self._search.lanes

    @property
    def most_lanes(self) -> int:
        """The maximum number of lanes; it is halved when an evaluation runs out of memory."""
        return self._search.most_lanes

    @property
    def scores(self) -> dict[int, VictimScore]:
        """The score of each victim, by victim id; filled in validation, never read in training."""
        return self._auditor.scores

    @property
    def num_running(self) -> int:
        """Number of victims in the lanes whose search is still running."""
        return self._search.num_running

    @property
    def num_converged(self) -> int:
        """Number of this process' victims whose search has ended below the solver's tolerance."""
        return self._search.num_converged

    @property
    def num_done(self) -> int:
        """Number of victims whose search has ended."""
        return self._search.num_done

    @property
    def finished(self) -> Reconstruction:
        """Reconstructions of the victims done so far; after ``fit``, of all victims in the order of the data."""
        return Reconstruction.cat([*self._search.finished, *self._search.in_lanes(running=False)])

    def current(self) -> Reconstruction:
        """Return the best iterates so far of the victims that are still running."""
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
        """Check the victims, and create unknowns of the shapes that the dummies need."""
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
                "Expected a CPU or a CUDA device, but got 'mps', which has no double precision. Label inference and "
                "closed forms need it. Pass accelerator='cpu' to the Trainer."
            )
        self._reset()
        adaptive, known = self.hparams["adaptive"], datamodule.victim.without_secrets()
        self._defenses = known_to(adaptive, known)
        victim = self._victim = known if adaptive else known.without_draws()
        self.expected_victims = datamodule.victims
        self._search = Search(Queue([*range(self.trainer.global_rank, datamodule.victims, self.trainer.world_size)]))
        target = Target(
            victim,
            labels_revealed=datamodule.reveal_labels,
            own_weights=datamodule.own_weights,
            labels_known=self.labels.known,
        )
        evaluator = self._make_evaluator()
        evaluator.prepare(next(victim.model.parameters()))  # an earlier fit may have moved the pieces to another device
        evaluator.check(target)
        dtype = torch.float64 if self.trainer.precision == "64-true" else torch.float32
        shapes = evaluator.shapes().items()
        # ParameterDict sorts the keys of a plain dict.
        empty = OrderedDict((name, torch.empty(0, *shape, dtype=dtype)) for name, shape in shapes)
        self.unknowns = nn.ParameterDict(empty)

    def _make_evaluator(self) -> Evaluator:
        low_rank = self._datamodule.low_rank
        return Evaluator(self.victim, self.objective, self.images, self.labels, low_rank, self._defenses)

    def configure_optimizers(self) -> PerVictimOptimizer:
        """Return an optimizer that applies the solver to the unknowns."""
        evaluator = self._make_evaluator()
        problem = evaluator.problem(
            lambda points, lanes: self.lanes.equations(points, lanes), next(iter(self.unknowns.values())).element_size()
        )
        optimizer = PerVictimOptimizer(self.unknowns.values(), self.solver, problem)
        options = {name: self.hparams[name] for name in ("seed", "combine")}
        self._search.put_lanes(Lanes(evaluator, self.unknowns, optimizer, **options))
        return optimizer

    @sdpa_kernel(SDPBackend.MATH)
    def on_fit_start(self) -> None:
        """Move to the Trainer's device, choose the number of lanes, and request the first victims."""
        # A copy, because the DataModule's own victim stays on the device of its images to capture further gradients.
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
            raise ValueError(f"Expected a checkpoint of all {self.expected_victims} victims, but got {len(mine)}.")
        # Lightning needs a batch in every process. A process without victims gets one, but scores none of it.
        datamodule.audited = (mine or [0]) if self.trainer.world_size > 1 else None
        search.begin(datamodule, processes=self.trainer.num_devices)

    def on_train_start(self) -> None:
        """Request the victims that come after the first batch."""
        self._search.queue.after_first_fetch(self._datamodule, self.iteration)

    @full_precision()
    @sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
    def training_step(self, batch: SharedGradient | tuple[()], batch_idx: int) -> None:
        """Admit the victims of the batch, then move every victim in the lanes by one evaluation."""
        search = self._search
        if isinstance(batch, SharedGradient):
            self.victim.check(batch)
            search.admit(batch)
        # All processes make the same number of steps, so that their checkpoints belong together.
        if search.num_running or self.trainer.world_size > 1:
            self._step()
        search.retire(self._datamodule, restarts=self.hparams["restarts"], above=self.hparams["restart_above"])
        # Synchronising at every step would make all processes wait for the slowest.
        if self.trainer.world_size == 1 or batch_idx % _AGREED_EVERY == 0:
            done = sum_over_processes(self.trainer, self.num_done)
            self.trainer.should_stop = self.trainer.should_stop or done == self.expected_victims
        self._tell(batch_idx)

    def _step(self) -> None:
        """Evaluate and move every victim in the lanes once."""
        search, step = self._search, cast(Any, self.optimizers()).step
        if not search.num_running:
            step(closure=search.lanes.rest)
            return
        running = search.lanes.optimizer.running  # taken before the step, which may end some lanes and then fail
        try:
            step(closure=search.lanes.evaluate)
            search.iteration += 1
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Lightning has started this timer for the step that failed.
            cast(Any, self.trainer).profiler.stop("optimizer_step")
            search.begin_anew_with_fewer_lanes(running, self._datamodule, error)
            if self.trainer.world_size > 1:
                step(closure=search.lanes.rest)

    def _tell(self, batch_idx: int) -> None:
        """Log the progress, only every tenth iteration: logging is slow compared with a small evaluation."""
        # Outside of the steps of `log_every_n_steps`, logged values reach only the progress bar.
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
        """Hand the current reconstructions to the auditor."""
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
        """Score all victims outside of validation, after an interrupt or at the end of training."""
        self._auditor.take(self.finished, self.current())
        for batch in self._datamodule.val_dataloader():
            self._auditor.compare(batch)
        self._auditor.release()

    def on_train_end(self) -> None:
        """Score victims that ended after the last validation, and gather the results of all processes."""
        if not all(map(self._auditor.is_final, self.finished.ids.tolist())):
            self.score_finished()
        search = self._search
        search.hand_out_all()
        search.finished, search.places, self._auditor.scores = gather(
            self.trainer, self.finished, search.places, self.scores
        )
        self._datamodule.audited = None

    # Checkpoints of lanes, their victims and results; Lightning saves the optimizer's state.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the lanes, their victims and the finished victims of this process to the checkpoint."""
        checkpoint["leakage"] = {
            "module": type(self).__name__,
            "precision": self.trainer.precision,
            "processes": self.trainer.world_size,
            "deal": self._deal,
            **self._search.saved(),
            "learnt": {name: getattr(self, name).learnt() for name in ("images", "labels")},
            # A finished run that is resumed does not validate again.
            "scores": {victim: vars(result) for victim, result in self.scores.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the lanes, their victims and the finished victims from a checkpoint.

        If the number of processes has changed, finished victims stay finished and victims in progress start over.

        Raises:
            ValueError: if the checkpoint belongs to another attack or configuration.
            OSError: if the part of a process is missing.
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
    """Remove Lightning's parameter summary from a Trainer: an attack has no parameters before victims arrive."""
    trainer.callbacks = [one for one in trainer.callbacks if type(one) is not ModelSummary]  # type: ignore[attr-defined]
