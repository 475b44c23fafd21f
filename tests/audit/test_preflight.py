from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import Victim
from leakage.audit import Client
from leakage.audit.data import find_images
from leakage.audit.plan import candidates
from leakage.audit.preflight import NO_VERDICT, preflight
from leakage.audit.report import Problem
from leakage.audit.subject import LogitsOfTrainingStep, Subject
from leakage.closed_form.inverses import find_chain
from tests.audit.modules import LOSSES, Data, Images, Inside, Manual, OfDicts, Small, normalised


def inspect(module: LightningModule, data: Any = None, **options: Any) -> tuple[Subject | None, list[Problem]]:
    given = {"victims": 4, "public": 50, "seed": 0} | options
    return preflight(module, Data() if data is None else data, [Client(images=2)], **given)


def subject_of(module: LightningModule, data: Any = None) -> Subject:
    subject, problems = inspect(module, data)
    assert subject is not None, problems
    return subject


def problem(problems: list[Problem], where: str) -> Problem:
    (found,) = [one for one in problems if where in one.where or where in one.problem]
    return found


def test_takes_a_module_and_its_data_as_they_are() -> None:
    module, data = Small(), Data()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    subject, problems = inspect(module, data)
    assert problems == []
    assert subject is not None
    # The innermost part that takes images and gives logits, so that closed forms find a chain of layers.
    assert isinstance(subject.network, nn.Sequential)
    plain = {"loss": "cross_entropy", "reduction": "mean", "label_smoothing": 0.0, "class_weights": None}
    plain |= {"label_kind": "classes"}
    assert (subject.loss, subject.num_classes) == (plain, 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module._trainer is None
    assert data.trainer is None
    assert torch.equal(state, torch.get_rng_state())
    together = torch.cat([subject.images, subject.own_images])
    assert len(together.flatten(1).unique(dim=0)) == len(together), "an auditor's image is a victim's"


def test_the_same_seed_gives_the_same_images() -> None:
    first, again, other = (inspect(Small(), seed=seed)[0] for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images[:5], other.images[:5])


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (Small(), normalised()),
        (Inside(), None),
        (OfDicts(), Data(kind="dict")),
        (Small(), Images()),
        (Small(), Data(kind="scaled")),
    ],
    ids=["normalised", "changed inside", "dicts", "a Dataset", "another range"],
)
def test_the_network_gives_the_loss_of_the_module(module: LightningModule, data: Any) -> None:
    subject = subject_of(module, data)
    images, labels = subject.own_images[:3], subject.own_labels[:3]
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    ours = F.cross_entropy(subject.network(images), labels)
    torch.testing.assert_close(ours, subject.module_loss(images, labels))
    assert isinstance(subject.network, LogitsOfTrainingStep) == isinstance(module, Inside)


def test_normalised_images_are_those_of_the_file() -> None:
    subject = subject_of(Small(), normalised())
    plain = torch.stack([image for image, _ in Images()])
    apart = torch.cdist(subject.own_images.flatten(1), plain.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    distances = apart.amin(1)
    assert float(distances.max()) < 1e-4


def test_closed_forms_see_through_the_normalisation() -> None:
    subject = subject_of(Small(), normalised())
    links = find_chain(Victim(subject.network, image_shape=tuple(subject.images.shape[1:])))
    assert [type(link.module).__name__ for link in links] == ["Normalize", "Linear", "Sigmoid", "Linear"]


def test_attackers_have_labels_only_of_all_classes() -> None:
    subject, _ = inspect(Small(), Data(number=400), public=200)
    assert subject is not None
    few = subject.auxiliary(20)
    assert few.labels is not None
    assert few.labels.bincount().tolist() == [2] * 10
    assert len(subject.auxiliary()) == len(subject.own_images)
    assert subject.auxiliary(19).labels is None
    some = dataclasses.replace(subject, own_labels=subject.own_labels.clamp(max=8))
    assert some.auxiliary().labels is None


def test_second_order_comes_last_on_a_network_with_kinks() -> None:
    for layer, place in ((nn.Sigmoid(), 2), (nn.ReLU(), 3)):
        subject = subject_of(Small(layer))
        victim = Victim(subject.network, image_shape=tuple(subject.images.shape[1:]))
        names = [one.name for one in candidates(subject, Client(), victim, seed=0, success_threshold=1e-3)]
        assert names[:2] == ["labels", "rgap"]
        assert names.index("gauss_newton") == place
        assert len(names) == 4


def test_images_of_an_unknown_scale_are_a_problem() -> None:
    found = problem(inspect(Small(), Data(kind="scaled"))[1], "no Normalize")
    assert found.kind == "replace"
    assert "refer to that range" in found.means


class Many(Small):
    """Everything that is in the way at once, but nothing that ends an audit."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.BatchNorm1d(16))
        self.net[1].bias.requires_grad_(False)


def test_tells_all_problems_at_once() -> None:
    module = Many()
    subject, problems = inspect(module)
    assert subject is not None
    kinds = {one.problem.split(":")[0]: (one.kind, one.where) for one in problems}
    assert kinds == {
        "dropout in training mode": ("replace", "net.3"),
        "BatchNorm in training mode": ("replace", "net.4"),
        "in-place operations": ("replace", "net.2"),
        "frozen parameters": ("replace", "net.1.bias"),
    }
    assert all(one.means and one.fix for one in problems)
    relu, dropout = module.net[2], module.net[3]
    assert isinstance(relu, nn.ReLU)
    assert relu.inplace
    assert dropout.training


class Tied(Small):
    def __init__(self) -> None:
        super().__init__(nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Sigmoid())
        self.net[5].weight = self.net[3].weight


def test_tells_shared_and_half_precise_parameters() -> None:
    assert problem(inspect(Tied())[1], "several layers share").where == "net.5.weight"
    half = Small().bfloat16()

    def step(batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        dtype = next(half.parameters()).dtype
        return F.cross_entropy(half.net(batch[0].to(dtype)), batch[1])

    assert "precision" in problem(inspect(half)[1], "half precision").problem
    assert next(half.parameters()).dtype == torch.bfloat16


class Constant(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return torch.tensor(1.0)


class Failing(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("module", "kind", "said"),
    [
        (Constant(), "never", "a loss without gradient"),
        (Failing(), "not yet", "RuntimeError: no such thing"),
        (Manual(), "not yet", "manual optimization"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LightningModule) else None,
)
def test_says_what_leaves_nothing_to_attack(module: LightningModule, kind: str, said: str) -> None:
    subject, problems = inspect(module)
    assert subject is None
    assert problems[-1].kind == kind
    assert said in problems[-1].problem
    assert problems[-1].means == NO_VERDICT


@pytest.mark.parametrize("module", LOSSES)
def test_losses_of_torch_are_declared(module: LightningModule) -> None:
    subject, problems = inspect(module)
    assert problems == []
    assert subject is not None
    assert subject.loss["loss"] == "cross_entropy"
    victim = Victim(subject.network, image_shape=tuple(subject.images.shape[1:]), num_images=3, **subject.loss)
    assert [type(link.module) for link in find_chain(victim)] == [nn.Linear, nn.Sigmoid, nn.Linear]


class OfProbabilities(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]).softmax(1).log(), batch[1])


def test_probabilities_hide_the_last_layer() -> None:
    found = problem(inspect(OfProbabilities())[1], "trained linear layer")
    assert (found.kind, found.where) == ("not yet", "Linear 'module.net.3' and operations after it")


def test_refuses_what_is_no_module_and_no_data() -> None:
    with pytest.raises(ValueError, match="Expected `model` to be a LightningModule, but got Linear"):
        inspect(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected `data`, or a module with a `train_dataloader`, but got neither"):
        preflight(Small(), None, [Client()], victims=1, public=1, seed=0)
    with pytest.raises(ValueError, match=r"Expected at least 5 images in the data, .* but got 3"):
        preflight(Small(), Data(number=3), [Client(images=3)], victims=1, public=9, seed=0)
    nothing = torch.utils.data.TensorDataset(torch.full((9, 1, 12, 12), torch.nan), torch.zeros(9).long())
    with pytest.raises(ValueError, match="Expected images of finite numbers, but got NaN"):
        inspect(Small(), nothing)
    with pytest.raises(
        ValueError, match=r"Expected batches with images \(B, C, H, W\), .*, but got \(\(9, 3\), \(9,\)\)"
    ):
        inspect(Small(), torch.utils.data.TensorDataset(torch.rand(9, 3), torch.zeros(9)))


def test_finds_images_in_any_batch() -> None:
    images, labels = torch.rand(3, 1, 4, 4), torch.arange(3)
    for batch in ((images, labels), [images, labels], {"y": labels, "x": images}, {"img": images, "target": labels}):
        found = find_images(batch)
        assert found is not None
        assert torch.equal(found.images, images)
        rebuilt = found.rebuild(images[:1], labels[2:])
        assert type(rebuilt) is type(batch)
        again = find_images(rebuilt)
        assert again is not None
        assert torch.equal(again.labels, labels[2:])
    for batch in (images, {"image": images}, (images,)):
        found = find_images(batch)
        assert found is not None
        assert found.labels is None
        assert type(found.rebuild(images[:1], labels)) is type(batch)
    assert find_images(labels) is None
    assert find_images({"y": labels}) is None
