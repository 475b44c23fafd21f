"""What a GPU finds is what the CPU finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from leakage.attacks import DLGAttack, GaussNewtonAttack, GradientInversion, IDLGAttack, InvertingGradientsAttack
from leakage.clients.victim import Victim
from leakage.condensation import GradientMatchingCondensation
from leakage.datamodules import LabelledImages, Victims
from leakage.labels import RULES, Auxiliary, infer_labels
from leakage.models import MLP, ConvNet

from .pieces import RUNS, make, share_defended

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def fit(module: Any, data: Any, ckpt_path: str | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **defaults | options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("kind", [IDLGAttack, DLGAttack, GaussNewtonAttack])
def test_finds_images(kind: type[GradientInversion]) -> None:
    attack = fit(kind(), Victims("sample", victims=20))
    limit = 1e-6 if kind is GaussNewtonAttack else 1e-3
    assert max(score.mse for score in attack.scores.values()) < limit
    assert all(score.label_accuracy == 1 for score in attack.scores.values())


def test_inverting_gradients_on_a_convnet() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        victims = Victims("sample", victims=4, model=ConvNet(width=16).eval())
    attack = fit(InvertingGradientsAttack(steps=300), victims)
    nothing = fit(InvertingGradientsAttack(steps=1), victims)
    errors = [sum(score.mse for score in run.scores.values()) for run in (attack, nothing)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", RUNS)
def test_pieces_find_there_what_they_find_on_the_cpu(name: str) -> None:
    (attack, data), (again, same) = make(name), make(name)
    there = fit(attack, data, precision="64-true").finished
    here = fit(again, same, precision="64-true", accelerator="cpu").finished
    assert here.evaluations.tolist() == [4] * 3
    torch.testing.assert_close(there.images, here.images, rtol=1e-3, atol=1e-3)
    assert there.labels.tolist() == here.labels.tolist()


def test_defenses_act_there() -> None:
    here = share_defended("cpu").gradients
    for name, tensor in share_defended("cuda").gradients.items():
        assert tensor.device.type == "cuda"
        torch.testing.assert_close(tensor.cpu(), here[name], rtol=1e-6, atol=1e-9)


def test_resumes_where_it_computes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=15, save_top_k=-1)
    whole = fit(IDLGAttack(), Victims("sample", victims=8, lanes=4), callbacks=[saver], enable_checkpointing=True)
    attack = IDLGAttack()
    begin, seen = attack.on_train_start, set()

    def look() -> None:
        begin()
        shared = attack.lanes.shared
        assert shared is not None
        seen.update(tensor.device.type for tensor in (*attack.lanes.kept.values(), *shared.gradients.values()))
        seen.update(tensor.device.type for tensor in attack.lanes.optimizer.lanes.values())

    attack.on_train_start = look  # type: ignore[method-assign]
    fit(attack, Victims("sample", victims=8, lanes=4), ckpt_path=str(tmp_path / "step=30.ckpt"))
    assert seen == {"cuda"}
    torch.testing.assert_close(attack.finished.images, whole.finished.images, rtol=0, atol=1e-2)


def test_leaves_the_settings_of_precision_as_they_are() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        attack = fit(IDLGAttack(), Victims("sample", victims=4))
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        assert bool((attack.finished.loss < 1e-7).all()), "matched in full precision all the same"
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.parametrize("rule", ["auto", *(name for name in RULES if name != "idlg")])
def test_reads_the_labels_that_the_cpu_reads(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    victim = Victim(MLP(1, 12), image_shape=(1, 12, 12), num_images=4)
    images, labels = torch.rand(20, 4, 1, 12, 12, generator=generator), torch.randint(10, (20, 4), generator=generator)
    auxiliary = Auxiliary(torch.rand(200, 1, 12, 12, generator=generator), torch.arange(200) % 10)
    shared = victim.share(images, labels)
    here = infer_labels(shared, victim, rule=rule, auxiliary=auxiliary).labels
    victim.model.cuda()
    there = infer_labels(shared.to("cuda"), victim, rule=rule, auxiliary=auxiliary).labels
    assert there.device.type == "cuda"
    assert (there.cpu() == here).float().mean() > 0.95


def test_condenses() -> None:
    condensation = GradientMatchingCondensation(network=ConvNet(width=16), iterations=6)
    losses: list[float] = []
    log = condensation.log

    def note(name: str, value: Any, *arguments: Any, **options: Any) -> None:
        if name == "train/loss":
            losses.append(float(value))
        log(name, value, *arguments, **options)

    condensation.log = note  # type: ignore[method-assign]
    fit(condensation, LabelledImages("sample", batch_size=32))
    assert condensation.synthetic_dataset().tensors[0].shape == (10, 1, 28, 28)
    assert len(losses) > 1
    assert losses[-1] < losses[0]
