from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from leakage.audit import Client, audit
from leakage.audit.data import find_images
from leakage.audit.losses import OwnLoss, known_loss
from leakage.audit.preflight import NO_VERDICT, preflight
from leakage.audit.report import Problem, read_victims
from leakage.audit.self_check import self_check
from leakage.audit.subject import Loss, Subject, copy_of, loss_of
from leakage.clients.losses import OWN
from tests.audit.modules import (
    Autoencoder,
    Binary,
    Bytes,
    Data,
    Focal,
    OneClass,
    OtherLoss,
    Parity,
    Penalised,
    Regression,
    Scaled,
    Selecting,
    Small,
    dropping,
)


def inspect(module: LightningModule, data: Any) -> tuple[Subject, Problem]:
    subject, problems = preflight(module, data, [Client(images=2)], victims=4, public=50, seed=0)
    assert subject is not None, problems
    return subject, problems[-1]


def zero_head(module: Small) -> Small:
    """Its loss is the same for all labels, but not its gradient."""
    torch.nn.init.zeros_(module.net[-1].weight)
    torch.nn.init.zeros_(module.net[-1].bias)
    return module


CASES = [
    (Scaled(), "tuple", "classes", "more than cross_entropy"),
    (Penalised(), "tuple", "classes", "more than cross_entropy"),
    (Focal(), "tuple", "classes", "more than cross_entropy"),
    (OtherLoss(weight=torch.linspace(0.5, 5, 10), label_smoothing=0.1), "tuple", "classes", "with options"),
    (OtherLoss(weight=torch.arange(10.0)), "tuple", "classes", "`class_weights` to be positive"),
    (OtherLoss(label_smoothing=0.1), "soft", "classes", "`label_kind` 'classes' with `label_smoothing`"),
    (Binary(), "tuple", "classes", "the loss binary_cross_entropy_with_logits"),
    (Binary(), "several", "numbers", "the loss binary_cross_entropy_with_logits"),
    (Regression(), "numbers", "numbers", "instead of logits (N, K)"),
    (Regression(), "tuple", "classes", "instead of logits (N, K)"),
    (Selecting(), "tuple", "classes", "not a function of torch.nn.functional"),
    (Bytes(), "uint8", "classes", "more than cross_entropy"),
    (OneClass(), "column", "classes", "the loss binary_cross_entropy_with_logits"),
    (zero_head(Binary()), "tuple", "classes", "the loss binary_cross_entropy_with_logits"),
    (Parity(), "tuple", "numbers", "instead of logits (N, K)"),
    (Autoencoder(), "tuple", "nothing", "other targets than the labels"),
    (Autoencoder(), "alone", "nothing", "other targets than the labels"),
    (Binary(), "truths", "numbers", "the loss binary_cross_entropy_with_logits"),
]


@pytest.mark.parametrize(("module", "kind", "uses", "said"), CASES, ids=lambda value: type(value).__name__)
def test_any_loss_is_simulated_as_it_trains(module: LightningModule, kind: str, uses: str, said: str) -> None:
    subject, problem = inspect(module, Data(kind=kind))
    assert (subject.loss["loss"], subject.uses) == (OWN, uses)
    assert (problem.kind, problem.where) == ("not yet", "training_step")
    assert said in problem.problem
    client = Client(images=2)
    checks = self_check(subject, client, subject.victim(num_images=2), seed=0)
    assert [check.passed for check in checks] == [True, True], checks


def test_soft_labels_are_declared() -> None:
    subject, problems = preflight(Small(), Data(kind="soft"), [Client()], victims=4, public=50, seed=0)
    assert problems == []
    assert subject is not None
    assert (subject.loss["loss"], subject.loss["label_kind"]) == ("cross_entropy", "probabilities")
    assert torch.equal(subject.own_classes, subject.own_labels.argmax(1))


def own_loss(module: LightningModule, batch: Any = None) -> OwnLoss:
    return OwnLoss(copy_of(module), batch or (lambda images, labels: (images, labels)), 10, classes=True)


LABELS = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
WEIGHT = torch.linspace(0.5, 5, 10)


class WithNumbers(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]).mean(1) - batch[1].view(-1, 1).squeeze(1).to(torch.float32)).square().sum()


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Small(), lambda logits: F.cross_entropy(logits, LABELS)),
        (OtherLoss(reduction="sum"), lambda logits: F.cross_entropy(logits, LABELS, reduction="sum")),
        (
            OtherLoss(weight=WEIGHT),
            lambda logits: -(LABELS * WEIGHT * logits.log_softmax(1)).sum() / (LABELS @ WEIGHT).sum(),
        ),
        (OtherLoss(label_smoothing=0.2), lambda logits: F.cross_entropy(logits, LABELS, label_smoothing=0.2)),
        (Binary(), lambda logits: F.binary_cross_entropy_with_logits(logits, LABELS)),
        (Selecting(), None),
        (WithNumbers(), lambda logits: (logits.mean(1) - LABELS @ torch.arange(10.0)).square().sum()),
    ],
    ids=["mean", "sum", "weights", "smoothing", "one-hot", "selecting", "numbers"],
)
def test_labels_between_classes_can_be_searched_for(module: Small, expected: Any) -> None:
    images = torch.rand(3, 1, 12, 12)
    logits = module(images)
    if isinstance(module, Selecting):
        apart = (logits - LABELS @ module.centres.weight).square().mean()
        found = (
            apart - (logits.softmax(1) * LABELS).sum(1).log().mean() - (logits.log_softmax(1) * LABELS).sum(1).mean()
        )
    else:
        found = expected(logits)
    torch.testing.assert_close(own_loss(module)(images, LABELS), found)


@pytest.mark.parametrize("module", [OtherLoss(weight=WEIGHT, label_smoothing=0.2), Focal(), Binary(), Selecting()])
def test_one_hot_labels_give_the_loss_of_the_module(module: LightningModule) -> None:
    images, labels = torch.rand(3, 1, 12, 12), torch.tensor([3, 9, 0])
    expected = loss_of(copy_of(module), (images, labels)).detach()
    torch.testing.assert_close(own_loss(module)(images, F.one_hot(labels, 10).float()), expected)


def test_records_do_not_grow_and_metrics_do_not_run() -> None:
    focal, selecting = own_loss(Focal()), own_loss(Selecting())
    for loss in (focal, selecting):
        loss(torch.rand(3, 1, 12, 12), LABELS)
    assert focal.module.recorded == []
    assert not focal.module.accuracy.update_called
    assert selecting.module.found == {"losses": []}


class Stopping(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if len(batch[0]) < 16:
            raise RuntimeError("too few")
        return 2 * F.cross_entropy(self(batch[0]), batch[1])


class Branching(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return 2 * loss if loss.item() > 1 else loss


class Multiplied(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss * (loss / 2).item()


class Frozen(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            features = self.net[:2](batch[0])
        return F.cross_entropy(self.net[2:](features), batch[1])


class Measured(Focal):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) / self.accuracy(logits, batch[1])


class Lucky(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (1 + random.random()) * F.cross_entropy(self(batch[0]), batch[1])


class Weighted(Small):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        each = F.cross_entropy(self(batch["image"]), batch["label"][:, 0], reduction="none")
        return (batch["weight"] * each).mean()


class Powered(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss / (1 + loss.item() ** 2)


@pytest.mark.parametrize(
    ("module", "where", "said"),
    [
        (Powered(), "training_step", r"such as `loss.item\(\)`, only for its logs"),
        (Stopping(), "training_step", "outside of `Trainer.fit`: RuntimeError: too few"),
        (Branching(), "training_step", r"such as `loss.item\(\)`, only for its logs"),
        (Multiplied(), "training_step", r"such as `loss.item\(\)`, only for its logs"),
        (Frozen(), "training_step", "an update without a derivative by the images"),
        (Measured(), "training_step", "a loss that is not finite; if a metric of torchmetrics"),
        (Lucky(), "training_step", "depends on random numbers"),
        (Weighted(), "data", "hold more of each image than labels: the loss depends on 'weight'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LightningModule) else None,
)
def test_losses_that_attacks_cannot_run(module: LightningModule, where: str, said: str) -> None:
    data = Data(kind="weights" if isinstance(module, Weighted) else "tuple")
    subject, problems = preflight(module, data, [Client()], victims=4, public=50, seed=0)
    assert subject is None
    assert (problems[-1].where, problems[-1].means) == (where, NO_VERDICT)
    assert re.search(said, problems[-1].problem)


class Attention(Small):
    """Attention whose fast kernel has no second derivative, in a network with plain cross-entropy or twice that."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.attention = factor, torch.nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.attention(images[:, 0]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (
            self.factor * F.cross_entropy(self(batch[0]), batch[1])
            if self.factor > 1
            else super().training_step(batch, 0)
        )


class Ignoring(Small):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], ignore_index=int(self.ignored))

    ignored = 3


class Keeping(Small):
    """Keeps tensors with a graph, and counts."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.last = self(batch[0])
        self._right = [*getattr(self, "_right", []), int((self.last.argmax(1) == batch[1]).sum())]
        self.count = getattr(self, "count", 0) + 1
        loss = 2 * F.cross_entropy(self.last, batch[1])
        self.mean = loss.detach() if getattr(self, "mean", None) is None else 0.9 * self.mean + 0.1 * loss
        return loss


@pytest.mark.parametrize(
    ("module", "own"),
    [(Attention(1), False), (Attention(2), True), (Ignoring(), True), (Keeping(), True)],
    ids=["attention", "twice attention", "ignored labels", "keeping"],
)
def test_steps_of_many_kinds_are_simulated(module: LightningModule, own: bool) -> None:
    subject, _ = preflight(module, Data(), [Client()], victims=4, public=50, seed=0)
    assert subject is not None
    assert subject.has_own_loss == own
    checks = self_check(subject, Client(images=6), subject.victim(num_images=6), seed=0)
    assert [check.passed for check in checks] == [True, True], checks
    assert copy.deepcopy(subject).size_of_gradient() == subject.size_of_gradient()


def test_ignored_labels_are_those_of_all_batches() -> None:
    logits, labels = torch.randn(4, 10), torch.tensor([0, 1, 2, 5])
    call = Loss("cross_entropy", logits, labels, {"ignore_index": 7}, F.cross_entropy(logits, labels))
    assert known_loss(call.value, [call], labels, "classes") is call
    said = known_loss(call.value, [call], torch.tensor([0, 1, 2, 5, 7]), "classes")
    assert said == "the loss cross_entropy with ignored labels"


@pytest.mark.parametrize(
    "options", [{"ignore_index": 3, "label_smoothing": 0.1}, {"ignore_index": 3, "weight": WEIGHT}]
)
def test_ignored_labels_are_those_of_torch(options: dict[str, Any]) -> None:
    labels, images = torch.tensor([3, 9, 0, 3]), torch.rand(4, 1, 12, 12)
    module = OtherLoss(**options)
    expected = module.training_step((images, labels), 0)
    torch.testing.assert_close(own_loss(module)(images, F.one_hot(labels, 10).float()), expected)


def test_labels_in_turn_are_used() -> None:
    """The first eight labels are 0 to 4, 0, 1, 2."""
    images, labels = torch.rand(8, 1, 12, 12), torch.arange(8) % 5
    loss = OwnLoss(copy_of(Scaled()), lambda images, labels: (images, labels), 10, classes=True)
    assert loss.use_of_labels(images, labels, 0) == "classes"


def test_a_number_before_the_image_is_no_label_and_tensors_of_any_length_are_further_secrets() -> None:
    images, labels = torch.rand(1, 1, 12, 12), torch.tensor([4])
    batch = find_images((torch.tensor([7]), images, labels, torch.rand(5)))
    assert batch is not None
    assert batch.labels is not None
    assert torch.equal(batch.labels, labels)
    assert set(batch.others) == {0, 3}
    assert not torch.equal(batch.others[0][0], torch.tensor([7]))


def test_dropout_does_not_make_another_audit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"victims": 2, "budget": "20s", "attacks": ["labels"], "output": tmp_path}
    for seed in (0, 1):
        torch.manual_seed(seed)
        audit(dropping(), Data(), Client(dropout=True), **options)  # the second one resumes


def test_another_loss_is_another_audit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"victims": 2, "budget": "20s", "attacks": ["gauss_newton"], "output": tmp_path}
    audit(Scaled(), Data(), Client(), **options)
    with pytest.raises(ValueError, match="Expected `output` without another audit"):
        audit(Penalised(), Data(), Client(), **options)


def test_secret_orders_need_a_loss_of_each_image(tmp_path: Path) -> None:
    client = Client(images=2, local_steps=2, local_batch_size=1, shuffle=True, learning_rate=0.1)
    report = audit(Scaled(), Data(), client, victims=2, budget="20s", output=tmp_path)
    assert report.verdict == "failed check"
    assert "no `shuffle` with loss 'own'" in report.checks[0].finding


def captured(module: Small, data: Data) -> dict[str, Tensor]:
    trained = copy.deepcopy(module)
    image, label = data.images[150]
    trained.training_step((image[None], torch.as_tensor(label)[None]), 0).backward()
    trained.configure_optimizers().step()
    return dict(trained.state_dict())


@pytest.mark.parametrize(
    ("module", "kind", "untested"),
    [
        (Penalised(), "tuple", {"bias sum", "classes", "rank", "biases", "last layer", "features"}),
        (Small(), "soft", {"classes"}),
    ],
    ids=["another loss", "soft labels"],
)
def test_captured_updates_are_checked_and_attacked(
    module: Small, kind: str, untested: set[str], tmp_path: Path
) -> None:
    data = Data(kind=kind)
    options: dict[str, Any] = {"victims": 1, "budget": "60s", "attacks": ["gauss_newton"], "learning_rate": 0.1}
    client = Client(learning_rate=options.pop("learning_rate"))
    report = audit(module, data, client, update=captured(module, data), output=tmp_path, **options)
    assert all(check.passed for check in report.checks), report.checks
    assert {check.name for check in report.checks if check.finding.startswith("Not tested")} == untested
    (row,) = read_victims(tmp_path)
    assert row.label_found == int(
        torch.as_tensor(data.images[150][1]).argmax() if kind == "soft" else data.images[150][1]
    )
    other = audit(Small(), data, client, update=captured(module, data), output=tmp_path / "other", **options)
    assert (other.verdict == "failed check") == (kind == "tuple"), "its loss is not that of the declared module"


def test_labels_that_must_be_known(tmp_path: Path) -> None:
    clients = [Client(), Client(reveal_labels=True)]
    options: dict[str, Any] = {"victims": 2, "budget": "20s", "attacks": ["gauss_newton"], "output": tmp_path}
    report = audit(Binary(), Data(kind="several"), clients, **options)
    assert report.verdict == "failed check"
    (check,) = [check for check in report.checks if not check.passed]
    assert (check.client, check.name) == ("1 image", "preflight")
    assert "Declare the client with reveal_labels=True" in check.finding
    update = captured(Binary(), Data(kind="several"))
    report = audit(Binary(), Data(kind="several"), clients[1], update=update, **options)
    assert "a captured update comes without its labels" in report.checks[0].finding


@pytest.mark.parametrize(
    ("module", "kind", "found"),
    [(Penalised(), "tuple", {"label_accuracy", "success_rate"}), (Autoencoder(), "alone", {"success_rate"})],
)
def test_images_come_out_behind_any_loss(module: LightningModule, kind: str, found: set[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"victims": 2, "budget": "60s", "attacks": ["gauss_newton"], "output": tmp_path}
    report = audit(module, Data(kind=kind), Client(), fail_above={"success_rate": 0.05}, **options)
    (measured,) = report.measured
    assert {"label_accuracy", "success_rate"} & measured.metrics.keys() == found
    assert all(measured.metrics[name].value == 1 for name in found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("read as" in page, "class -1" in page) == (kind == "tuple", False)
