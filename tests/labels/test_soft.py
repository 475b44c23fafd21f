from __future__ import annotations

import pytest
import torch
from torch import nn

from leakage import LeNet, Victim
from leakage.attacks import IDLGAttack
from leakage.datamodules import Victims
from leakage.defenses import Clip
from leakage.labels import infer_labels, infer_soft_labels
from tests.kit import fit

SOFT = torch.rand(5, 1, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
IMAGES = torch.rand(5, 1, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def victim_of(bias: bool = True, **options) -> Victim:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LeNet(image_size=12, num_classes=4)
    model.classifier.bias.requires_grad_(bias)
    return Victim(model, image_shape=(1, 12, 12), **{"label_kind": "probabilities"} | options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_labels_are_read_exactly(reduction: str) -> None:
    victim = victim_of(reduction=reduction)
    found = infer_soft_labels(victim.share(IMAGES, SOFT), victim)
    torch.testing.assert_close(found, SOFT, atol=1e-5, rtol=0)
    one_hot = torch.eye(4)[[3, 0, 1, 1, 2]][:, None]
    torch.testing.assert_close(infer_soft_labels(victim.share(IMAGES, one_hot), victim), one_hot, atol=1e-5, rtol=0)


def test_a_gradient_of_zero_reveals_nothing() -> None:
    victim = victim_of()
    shared = victim.share(IMAGES[:1], SOFT[:1])
    shared.gradients = {name: torch.zeros_like(gradient) for name, gradient in shared.gradients.items()}
    assert infer_soft_labels(shared, victim).tolist() == [[[0.25] * 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_kind": "classes"}, "labels that are probabilities to infer a soft label, but got 'classes'"),
        ({"num_images": 2}, "one image per gradient to infer a soft label, but got 2"),
        ({"loss": "mean_squared_error"}, "loss 'cross_entropy' to infer a soft label, but got 'mean_squared_error'"),
        ({"local_steps": 2, "learning_rate": 0.1}, "one local step to infer a soft label, but got several"),
        ({"defenses": [Clip(0.5)]}, "no defense to infer a soft label, but got 'Clip'"),
        ({"bias": False}, "a last layer whose weights and bias both share their gradient to infer a soft label"),
    ],
)
def test_soft_labels_that_cannot_be_read(options, message) -> None:
    victim = victim_of(**options)
    labels = SOFT.expand(-1, victim.protocol.num_images, -1)
    labels = labels.argmax(-1) if victim.protocol.label_kind == "classes" else labels
    shared = victim.share(IMAGES.expand(-1, victim.protocol.num_images, -1, -1, -1), labels)
    with pytest.raises(ValueError, match=f"^Expected {message}.* Use DLGAttack"):
        infer_soft_labels(shared, victim)


def test_rules_are_for_classes() -> None:
    victim = victim_of()
    with pytest.raises(ValueError, match="Expected a victim whose labels are classes, but got 'probabilities'"):
        infer_labels(victim.share(IMAGES, SOFT), victim)


class Mixed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(SOFT)

    def __getitem__(self, index: int):
        return IMAGES[index, 0], SOFT[index, 0]


def data(**options) -> Victims:
    return Victims(
        Mixed(), victims=2, model=victim_of().model.requires_grad_(True), **{"label_kind": "probabilities"} | options
    )


def test_images_with_soft_labels_come_out() -> None:
    victims, attack = data(), IDLGAttack(protocol="robust")
    fit(attack, victims)
    assert [score.mse < 1e-3 for score in attack.scores.values()] == [True, True]
    assert [score.label_accuracy for score in attack.scores.values()] == [1, 1]
    assert victims.victim.protocol.num_classes == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "uniform"}, r"Expected a Dataset whose items have labels \(K,\), and no `labels`"),
        ({"dataset": "sample"}, r"Expected a Dataset whose items have labels \(K,\), .* but got 'sample'"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(144, 6))},
            "Expected `model` to have a logit for each of the 4",
        ),
        (
            {"dataset": torch.utils.data.TensorDataset(IMAGES[:, 0], torch.arange(5))},
            r"Expected labels as floating-point tensors of shape \(K,\), but got torch.int64 \(\) in image 0",
        ),
    ],
)
def test_data_without_soft_labels(options, message) -> None:
    given = {"dataset": Mixed(), "victims": 2, "model": LeNet(image_size=12, num_classes=4)} | options
    with pytest.raises(ValueError, match=message):
        Victims(label_kind="probabilities", **given).setup("fit")
