"""A stand-in for an attack: the attributes callbacks rely on, and an outcome that is known in advance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from leakage.datamodules import GroundTruth
from leakage.inversion.reconstruction import Reconstruction
from leakage.metrics import VictimScore, score
from leakage.solvers import STATUS

COHORT = 4
PASSES_PER_STEP = 5


class KnownAttack(LightningModule):
    """Four victims enter when at most one is running, and its errors are known.

    Victim v is done at its iteration 15 + 10 (v mod 3); at iteration i every pixel is off by 2 to the power of -i.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.images, self.labels = images, labels
        self.fail_at = fail_at
        # Lightning counts the steps of an optimizer.
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.error: BaseException = RuntimeError("out of memory")
        self.iteration = 0
        self.cohorts = 0
        self.done: list[int] = []
        self.running: dict[int, int] = {}
        self.scores: dict[int, VictimScore] = {}
        self.looks = 0

    @property
    def expected_victims(self) -> int:
        return len(self.images)

    @property
    def num_done(self) -> int:
        return len(self.done)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @staticmethod
    def last(victim: int) -> int:
        return 15 + 10 * (victim % 3)

    def _reconstruct(self, iterations: dict[int, int]) -> Reconstruction:
        ids = torch.tensor(list(iterations), dtype=torch.long)
        reached = torch.tensor(list(iterations.values()), dtype=torch.long)
        done = [STATUS.index("converged" if victim in self.done else "running") for victim in iterations]
        # The images of a victim are recovered in reverse order, as gradients do not tell the order.
        return Reconstruction(
            ids=ids,
            images=(self.images[ids] + torch.pow(2.0, -reached.float())[:, None, None, None, None]).flip(1),
            labels=self.labels[ids].flip(1),
            loss=torch.pow(2.0, -reached.float()),
            iterations=reached,
            evaluations=reached + 1,
            restarts=torch.zeros_like(ids),
            status=torch.tensor(done, dtype=torch.long),
        )

    @property
    def finished(self) -> Reconstruction:
        return self._reconstruct({victim: self.last(victim) for victim in self.done})

    @property
    def num_converged(self) -> int:
        return int((self.finished.status == STATUS.index("converged")).sum())

    def current(self) -> Reconstruction:
        self.looks += 1
        return self._reconstruct(self.running)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if len(batch):
            self.running |= {int(victim): 0 for victim in batch}
            self.cohorts += 1
        if self.iteration == self.fail_at:
            raise self.error
        self.optimizers().step()
        self.iteration += PASSES_PER_STEP
        for victim in list(self.running):
            self.running[victim] = min(self.running[victim] + PASSES_PER_STEP, self.last(victim))
            if self.running[victim] == self.last(victim):
                del self.running[victim]
                self.done.append(victim)
        self.log("train/loss", 2.0**-self.iteration)
        self.log("train/running", float(len(self.running)))
        self.trainer.should_stop = self.num_done == self.expected_victims

    def validation_step(self, batch: GroundTruth, batch_idx: int) -> None:
        self._score(batch)

    def on_validation_epoch_end(self) -> None:
        if self.scores:
            self.log("val/mse", sum(score.mse for score in self.scores.values()) / len(self.scores))

    def score_finished(self) -> None:
        for batch in self.trainer.val_dataloaders or []:
            self._score(batch)

    def _score(self, batch: GroundTruth) -> None:
        finished = self.finished
        for index, victim in enumerate(finished.ids.tolist()):
            if victim in batch.ids.tolist():
                part = finished.select(torch.tensor([index]))
                at = batch.ids.tolist().index(victim)
                scores = score(part.images, part.labels, batch.images[at : at + 1], batch.labels[at : at + 1])
                self.scores[victim] = VictimScore(
                    mse=float(scores.mse.mean()),
                    psnr=float(scores.psnr.mean()),
                    ssim=float(scores.ssim.mean()),
                    label_accuracy=float(scores.label_correct.double().mean()),
                    success=float((scores.mse < 1e-3).double().mean()),
                    final=True,
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["known"] = {name: getattr(self, name) for name in ("iteration", "cohorts", "done", "running")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["known"].items():
            setattr(self, name, value)


class Cohorts(IterableDataset[Tensor | tuple[()]]):
    def __init__(self, attack: KnownAttack) -> None:
        self.attack = attack

    def __iter__(self) -> Iterator[Tensor | tuple[()]]:
        sent = self.attack.cohorts
        while True:
            first = sent * COHORT
            room = sent == self.attack.cohorts and len(self.attack.running) <= 1
            if room and first < self.attack.expected_victims:
                sent += 1
                yield torch.arange(first, min(first + COHORT, self.attack.expected_victims))
            else:
                yield ()


class Run:
    """Victims, and a way to attack them under some callbacks."""

    def __init__(self, folder: Path, victims: int = 6, num_images: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.folder = folder
        self.images = torch.rand(victims, num_images, 1, 12, 12, generator=generator)
        self.labels = torch.randint(10, (victims, num_images), generator=generator)

    def attack(self, **kwargs: Any) -> KnownAttack:
        return KnownAttack(self.images, self.labels, **kwargs)

    def truth(self) -> DataLoader[GroundTruth]:
        parts = [
            GroundTruth(torch.arange(first, first + 2), self.images[first : first + 2], self.labels[first : first + 2])
            for first in range(0, len(self.images), 2)
        ]
        return DataLoader(parts, batch_size=None, collate_fn=lambda part: part)

    def fit(
        self,
        attack: KnownAttack,
        *callbacks: Callback,
        logger: Any = False,
        truth: bool = True,
        resume: Path | None = None,
        **kwargs: Any,
    ) -> Trainer:
        trainer = Trainer(
            max_epochs=1,
            callbacks=list(callbacks),
            logger=logger,
            accelerator="cpu",
            default_root_dir=self.folder,
            enable_model_summary=False,
            enable_progress_bar=kwargs.pop("enable_progress_bar", False),
            enable_checkpointing=kwargs.pop("enable_checkpointing", False),
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            **kwargs,
        )
        trainer.fit(
            attack,
            DataLoader(Cohorts(attack), batch_size=None, collate_fn=lambda batch: batch),
            self.truth() if truth else [],
            ckpt_path=resume,
        )
        return trainer


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def run_of_pairs(tmp_path: Path) -> Run:
    """Two images per victim."""
    return Run(tmp_path, num_images=2)


@pytest.fixture(autouse=True)
def _few_victims_fill_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakage.callbacks.table._PER_FILE", 3)
