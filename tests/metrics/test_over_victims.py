import math
import pickle
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from leakage.metrics import ReconstructionMetrics, VictimScore, mean_interval, score, wilson_interval

NAMES = ["mse", "psnr", "ssim", "label_accuracy", "success_rate"]


def victims(count: int, generator: torch.Generator) -> list[VictimScore]:
    images = torch.rand(count, 2, 1, 8, 8, generator=generator)
    deviations = torch.rand(count, 2, 1, 1, 1, generator=generator) * 0.06
    found = images + deviations * torch.randn(images.shape, generator=generator)
    labels = torch.randint(0, 2, (2, count, 2), generator=generator)
    return score(found, labels[0], images, labels[1]).per_victim()


def test_every_score_is_its_own_mean_with_its_own_interval(generator: torch.Generator) -> None:
    scores = victims(40, generator)
    metrics = ReconstructionMetrics()
    metrics.update(scores)
    logged = metrics.compute()
    assert logged.keys() == {f"{name}{end}" for name in NAMES for end in ("", "_low", "_high")} | {"victims"}
    assert logged["victims"] == 40
    for name in ("mse", "psnr", "ssim"):
        values = torch.tensor([getattr(one, name) for one in scores], dtype=torch.float64)
        assert logged[name] == pytest.approx(values.mean().item(), rel=1e-6)
        ends = logged[f"{name}_low"], logged[f"{name}_high"]
        assert ends == pytest.approx(mean_interval(values), rel=1e-5)
    for name, attribute in (("label_accuracy", "label_accuracy"), ("success_rate", "success")):
        share = sum(getattr(one, attribute) for one in scores) / 40
        assert 0 < share < 1
        assert logged[name] == pytest.approx(share)
        assert (logged[f"{name}_low"], logged[f"{name}_high"]) == pytest.approx(wilson_interval(share, 40))


def test_cohorts_accumulate_and_reset_forgets(generator: torch.Generator) -> None:
    scores = victims(20, generator)
    at_once, accumulated = ReconstructionMetrics(), ReconstructionMetrics()
    accumulated.update(scores[:3])
    accumulated.reset()
    at_once.update(scores)
    accumulated.update(scores[:7])
    assert accumulated.compute()["victims"] == 7
    accumulated.update(dict(enumerate(scores[7:])).values())
    assert accumulated.compute() == at_once.compute()


def test_copies_and_pickles_are_equal_and_independent(generator: torch.Generator) -> None:
    scores = victims(5, generator)
    metrics = ReconstructionMetrics(prefix="val/")
    metrics.update(scores)
    logged = metrics.compute()
    for copy in (metrics.clone(), pickle.loads(pickle.dumps(metrics))):
        assert copy.compute() == logged
        copy.update(scores)
    assert metrics.compute() == logged


def test_the_prefix_goes_before_each_key() -> None:
    metrics = ReconstructionMetrics(prefix="val/")
    metrics.update([VictimScore(mse=1.0, psnr=0.0, ssim=0.0, label_accuracy=0.0, success=1.0)])
    logged = metrics.compute()
    assert list(logged)[:5] == ["val/victims", "val/mse", "val/mse_low", "val/mse_high", "val/psnr"]
    assert all(key.startswith("val/") for key in logged)


def test_a_broken_victim_makes_only_the_mean_error_infinite() -> None:
    images, labels = torch.rand(3, 1, 1, 8, 8), torch.zeros(3, 1).long()
    found = images.clone()
    found[1] = torch.nan
    metrics = ReconstructionMetrics()
    metrics.update(score(found, labels, images, labels).per_victim())
    logged = metrics.compute()
    assert logged["mse"] == math.inf
    assert logged["success_rate"] == pytest.approx(2 / 3)
    assert all(math.isfinite(value) for name, value in logged.items() if not name.startswith("mse"))


def test_no_victims_have_unknown_scores() -> None:
    metrics = ReconstructionMetrics()
    metrics.update([])
    logged = metrics.compute()
    assert logged.pop("victims") == 0
    assert all(math.isnan(value) for value in logged.values())


def test_a_module_logs_them_and_a_trainer_moves_and_saves_it(generator: torch.Generator, tmp_path: Any) -> None:
    scores = victims(6, generator)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = ReconstructionMetrics(prefix="val/")

        def validation_step(self, batch: Any, _: int) -> None:
            self.metrics.update([scores[victim] for victim in batch[0].tolist()])

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    results = [trainer.validate(module, DataLoader(TensorDataset(torch.arange(6)), 4), verbose=False) for _ in range(2)]
    expected = ReconstructionMetrics(prefix="val/")
    expected.update(scores)
    assert results[0] == results[1] == [pytest.approx(expected.compute(), rel=1e-6)]
    assert not module.state_dict()  # nothing of them goes into a checkpoint


def test_anything_but_victim_scores_is_refused() -> None:
    metrics = ReconstructionMetrics()
    one = VictimScore(mse=1.0, psnr=0.0, ssim=0.0, label_accuracy=0.0, success=1.0)
    with pytest.raises(TypeError, match=r"Expected `scores` to hold VictimScores, but got int\."):
        metrics.update({7: one})  # type: ignore[arg-type]
    metrics.update([one])
    assert metrics.compute()["victims"] == 1
