"""A callback that measures leakage during any training."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchvision.transforms import Normalize

from leakage.attacks import InvertingGradientsAttack
from leakage.callbacks.loggers import log_image
from leakage.callbacks.undisturbed import undisturbed
from leakage.clients.protocol import Protocol
from leakage.clients.victim import Victim
from leakage.datamodules.shared import SharedGradients
from leakage.errors import check_count, check_positive
from leakage.inversion.gradient_inversion import GradientInversion
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import ReconstructionMetrics, ShareOverVictims, baseline_guesses, identified, score
from leakage.plots import figure_pixels, plot_gallery

# The share of the budget that the default attack plans to use. The rest is for labels, scores and estimation errors.
_PLANNED = 0.8
# Number of steps by which the first look measures the time of one step of the default attack, and the minimum and
# maximum number of steps of a search.
_TRIED, _FEWEST, _MOST = 10, 20, 4800
# Number of images of the batch that belong to no victim, for identification, and number of victims in the picture.
_OTHERS, _SHOWN = 256, 4


class LeakageMonitor(Callback):
    r"""Measure what a client would leak if it shared its gradient now, every n steps of your own ``Trainer.fit``.

    The callback takes some images of the current batch (or images set aside), computes what clients with these images
    would share at the current weights, attacks that within a time budget, and logs to all loggers:

    ============================================== ===============================================================
    key                                            meaning
    ============================================== ===============================================================
    ``leakage/label_accuracy``                     share of the labels recovered
    ``leakage/success_rate``                       share of the images with an MSE below the attack's threshold
    ``leakage/psnr`` (dB), ``/mse``, ``/ssim``     means over the victims
    ``leakage/identified``                         share of the images nearer to their reconstruction than any other
                                                   of the batch
    ``leakage/psnr_grey``, ``/psnr_nearest``       PSNR of guesses without the gradient: grey, and the nearest
                                                   other image of the batch
    ``..._low``, ``..._high``                      95 % interval of each of the first six
    ``leakage/victims``, ``/iterations``           number of victims, and mean number of the attack's iterations
    ``leakage/seconds``                            time that the look took
    ``leakage/gallery``                            truth, reconstruction, nearest other image (W&B, TensorBoard)
    ============================================== ===============================================================

    A low figure means "not reconstructed by this attack in this time". The default attack works on any network,
    but does not reach float precision: for smooth networks pass :class:`~leakage.attacks.GaussNewtonAttack`.

    **The training is the same with and without this callback**, bit for bit. It attacks a copy of the module in
    evaluation mode (dropout off, BatchNorm at its running statistics, the best case for an attacker) and restores
    random states, modes, gradients and switches. An error in the callback becomes a warning, and the training
    continues. With several processes, the first one looks and the others wait.

    Attributes:
        history: the logged figures, a dict for each look, with its ``step``.
        notes: what was changed in the copy, and how the images were scaled.

    Args:
        every_n_steps: steps of the trainer (``global_step``) between two looks. The first look is before training.
        victims: number of clients per look; fewer if the batch has fewer images.
        images: N, the number of images behind one gradient.
        budget: time limit of a look, in seconds.
        attack: by default :class:`~leakage.attacks.InvertingGradientsAttack` with as many steps as fit.
        data: images set aside, as ``(images, labels)`` or a Dataset of such pairs, in the format of the batches.
        network: name of the part of the module that gives logits; by default the module itself.
        mean, std: mean and standard deviation by which the batches are normalised, for each channel. Without them,
            images outside [0, 1] are scaled by the smallest and the largest value of each channel so far.
        **client: further settings of the clients, see :class:`~leakage.Victim`: ``loss``, ``local_steps``,
            ``learning_rate``, ``defenses``, and so on.

    Raises:
        ValueError: at construction, a number is out of range, ``attack`` is not an attack, only one of ``mean`` and
            ``std`` is given, or the settings of the clients are invalid.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[LeakageMonitor(every_n_steps=500, victims=8, budget=20.0)],
        ...                   logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        victims: int = 8,
        *,
        images: int = 1,
        budget: float = 30.0,
        attack: GradientInversion | None = None,
        data: tuple[Tensor, Tensor] | Dataset[Any] | None = None,
        network: str = "",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **client: Any,
    ) -> None:
        check_count(every_n_steps=every_n_steps, victims=victims, images=images)
        check_positive(budget=budget)
        if attack is not None and not isinstance(attack, GradientInversion):
            raise ValueError(f"Expected `attack` to be a leakage.attacks.GradientInversion, but got {attack!r}.")
        if (mean is None) != (std is None):
            raise ValueError(f"Expected `mean` and `std` together, but got mean={mean!r} and std={std!r}.")
        settings = {name: value for name, value in client.items() if name not in ("defenses", "reveal_learning_rate")}
        try:
            Protocol((1, 1, 1), 2, images, **settings)
        except TypeError as error:
            raise ValueError(f"Expected settings of a leakage.Victim, but got: {error}") from error
        self.every_n_steps, self.victims, self.images, self.budget = every_n_steps, victims, images, budget
        self.attack, self.data, self.network, self.client = attack, data, network, client
        self.scale = None if mean is None or std is None else (torch.tensor(mean), torch.tensor(std))
        self.history: list[dict[str, float]] = []
        self.notes: list[str] = []
        self._next = 0
        self._clock: _Clock | None = None  # of the default attack's last search
        self._ends: tuple[Tensor, Tensor] | None = None  # of the images' values so far

    def state_dict(self) -> dict[str, Any]:
        """Return the step at which the next look is due."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self._next = state_dict["next"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look if it is time to."""
        if trainer.global_step < self._next:
            return
        self._next = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        try:
            with undisturbed():
                figures, picture = self._look(trainer, pl_module, batch)
            self.history.append({"step": step, **figures})
            for logger in trainer.loggers:
                logger.log_metrics({f"leakage/{name}": value for name, value in figures.items()}, step=step)
            if picture is not None:
                log_image(trainer, "leakage/gallery", picture, step=step)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"LeakageMonitor has no figures at step {step}; the training continues: {what}")

    def _look(self, trainer: Trainer, module: LightningModule, batch: Any) -> tuple[dict[str, float], Any]:
        begin = time.perf_counter()
        device = torch.device("cpu") if module.device.type == "mps" else module.device
        images, labels = self._pairs(batch if self.data is None else self.data, device)
        network, images = self._copy(module, images, device)
        count = min(self.victims, len(images) // self.images)
        if not count:
            raise ValueError(f"Expected at least `images` = {self.images} images, but got a batch of {len(images)}.")
        used = count * self.images
        truth = images[:used].reshape(count, self.images, *images.shape[1:])
        own = labels[:used].reshape(count, self.images)
        others = images[used : used + _OTHERS]
        victim = Victim(network, image_shape=tuple(images.shape[1:]), num_images=self.images, **self.client)
        shared = SharedGradients(victim.share(truth, own, seed=trainer.global_step), victim.without_secrets())
        found = self._attack(shared, device, begin)
        if not len(found):
            raise ValueError(f"Expected to attack a victim in `budget` = {self.budget:g} seconds, but got none.")
        places = found.ids.tolist()
        return self._score(found, truth[places], own[places], others, begin), self._picture(
            trainer, found, truth[places], own[places], others
        )

    def _pairs(self, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images and labels of the batch, or those set aside."""
        if isinstance(batch, Dataset):
            batch = [batch[place] for place in range(self.victims * self.images + _OTHERS) if place < len(batch)]  # type: ignore[arg-type]
            batch = tuple(torch.stack([torch.as_tensor(pair[part]) for pair in batch]) for part in (0, 1))
        values = list(batch.values()) if isinstance(batch, Mapping) else batch
        if not isinstance(values, list | tuple) or not all(isinstance(value, Tensor) for value in values[:2]):
            raise ValueError(f"Expected a batch of images and labels, but got {type(batch).__name__}.")
        tensors = [value.detach().to(device) for value in values if isinstance(value, Tensor)]
        images = next((tensor for tensor in tensors if tensor.ndim == 4 and tensor.is_floating_point()), None)
        labels = next((tensor for tensor in tensors if tensor.ndim == 1 and not tensor.is_floating_point()), None)
        if images is None or labels is None or len(images) != len(labels):
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(f"Expected images (B, C, H, W) and whole labels (B,) in the batch, but got {shapes}.")
        return images.float(), labels.long()

    def _copy(self, module: nn.Module, images: Tensor, device: torch.device) -> tuple[nn.Module, Tensor]:
        """Return a copy of the network for images in [0, 1], in evaluation mode, and these images."""
        network = module.get_submodule(self.network)
        if type(network).forward in (nn.Module.forward, LightningModule.forward):
            raise ValueError(
                "Expected a module with `forward`, which returns logits, or its part that has one as `network` (one of "
                f"{[name for name, _ in network.named_children()]}), but got {type(network).__name__} without it."
            )
        network = copy.deepcopy(getattr(network, "_orig_mod", network)).to(device, torch.float32)
        if any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in network.modules()):
            self._note("dropout is off in the attacked copy")
        if any(isinstance(part, _BatchNorm) and part.training for part in network.modules()):
            self._note("in the attacked copy, BatchNorm uses its running statistics instead of the client's batch")
        if self.scale is not None:
            shift, scale = (end.to(images).view(-1, 1, 1) for end in self.scale)
        else:
            low, high = images.amin((0, 2, 3)).cpu(), images.amax((0, 2, 3)).cpu()
            if self._ends is not None:
                low, high = torch.minimum(low, self._ends[0]), torch.maximum(high, self._ends[1])
            self._ends = low, high
            if bool((low >= 0).all() and (high <= 1).all()):
                return network.eval(), images
            self._note("images are scaled to [0, 1] by the smallest and the largest value of each channel")
            shift, scale = (end.to(images).view(-1, 1, 1) for end in (low, (high - low).clamp(min=1e-6)))
        # A module of torchvision that attacks can differentiate through: x * scale + shift.
        normalise = Normalize((-shift / scale).flatten().tolist(), (1 / scale).flatten().tolist())
        return nn.Sequential(normalise, network).eval(), ((images - shift) / scale).clamp(0, 1)

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)
            rank_zero_info(f"LeakageMonitor: the module itself is unchanged; {words}.")

    def _attack(self, shared: SharedGradients, device: torch.device, begin: float) -> Reconstruction:
        def left() -> float:
            return self.budget - (time.perf_counter() - begin)

        if self.attack is not None:
            return _run(copy.deepcopy(self.attack), shared, device, left(), _Clock())
        if self._clock is None:
            self._clock = _Clock()
            _run(InvertingGradientsAttack(steps=_TRIED), shared, device, left() / 2, self._clock)
        steps = self._clock.steps_in(_PLANNED * left())
        attack = InvertingGradientsAttack(steps=min(max(steps, _FEWEST), _MOST))
        self._clock = _Clock()
        return _run(attack, shared, device, left(), self._clock)

    def _score(
        self, found: Reconstruction, truth: Tensor, labels: Tensor, others: Tensor, begin: float
    ) -> dict[str, float]:
        threshold = 1e-3 if self.attack is None else float(self.attack.hparams["success_threshold"])
        scores = score(found.images.to(truth), found.labels.to(labels), truth, labels)
        metrics, share = ReconstructionMetrics(), ShareOverVictims()
        for part in (*metrics.modules(), share):
            if isinstance(part, Metric):  # no synchronisation with other processes
                part.distributed_available_fn = lambda: False
        metrics.update(scores.per_victim(threshold=threshold))
        figures = {name: float(value) for name, value in metrics.compute().items()}
        order = scores.order[..., None, None, None].expand_as(truth)
        if len(others):
            correct = identified(found.images.to(truth).gather(1, order), truth, others)
            share.update(correct.float().mean(1).cpu())
            estimate = share.compute()
            figures |= {"identified": estimate.value, "identified_low": estimate.low, "identified_high": estimate.high}
        guesses = baseline_guesses(truth, others if len(others) else None)
        for name in {"grey", "nearest"} & guesses.keys():
            figures[f"psnr_{name}"] = float(score(guesses[name], labels, truth, labels).psnr.mean())
        figures["iterations"] = float(found.iterations.float().mean())
        figures["seconds"] = time.perf_counter() - begin
        return figures

    def _picture(
        self, trainer: Trainer, found: Reconstruction, truth: Tensor, labels: Tensor, others: Tensor
    ) -> Any | None:
        """Draw a picture for the loggers that accept pictures; None if there are none."""
        if not any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers):
            return None
        images = found.images.to(truth)
        scores = score(images, found.labels.to(labels), truth, labels)
        nearest = baseline_guesses(truth, others).get("nearest") if len(others) else None
        rows, captions = [], []
        for victim in range(min(_SHOWN, len(found))):
            partner = int(scores.order[victim, 0])
            rows.append([truth[victim, 0], images[victim, partner], None if nearest is None else nearest[victim, 0]])
            read = f"{float(scores.psnr[victim, 0]):.1f} dB, label {int(found.labels[victim, partner])}"
            captions.append([f"label {int(labels[victim, 0])}", read, ""])
        names = [f"client {victim}" for victim in range(len(rows))]
        cells = [[None if image is None else image.detach().cpu() for image in row] for row in rows]
        columns = ["truth", "reconstruction", "nearest other"]
        return figure_pixels(plot_gallery(cells, columns=columns, rows=names, captions=captions))


class _Clock(Callback):
    """Measure how long a step of an attack takes, and the time before and after the steps."""

    def __init__(self) -> None:
        self.start, self.times = time.perf_counter(), list[float]()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def on_fit_end(self, *arguments: Any) -> None:
        """Note the time."""
        self.end = time.perf_counter()

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into this time."""
        if len(self.times) < 2:
            return 0
        pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        besides = self.end - self.start - pace * len(self.times)
        return int((seconds - besides) / max(pace, 1e-6))


def _run(
    attack: GradientInversion, shared: SharedGradients, device: torch.device, seconds: float, clock: _Clock
) -> Reconstruction:
    """Run an attack for a limited time and return the reconstructions of all victims that it has begun with."""
    trainer = Trainer(
        max_epochs=1,
        max_time=timedelta(seconds=max(seconds, 0.1)),
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        callbacks=[clock],
        plugins=[LightningEnvironment()],  # a single process, however the training was started
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(attack, datamodule=shared)
    return Reconstruction.cat([attack.finished, attack.current()])
