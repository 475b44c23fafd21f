"""What condensation refuses, and when; and what is left when the loss is no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from leakage.condensation import GradientMatchingCondensation, matching
from leakage.datamodules import Victims

BAD: list[tuple[dict[str, Any], str]] = [
    ({"images_per_class": 0}, "Expected `images_per_class` to be a whole number of at least 1, but got 0"),
    ({"images_per_class": 7}, r"Expected `loops` \(outer, inner\) with images_per_class=7, but got None"),
    ({"num_classes": 1}, "Expected `num_classes` to be a whole number of at least 2, but got 1"),
    ({"network": "convnet"}, "Expected `network` to be a torch.nn.Module, but got str"),
    ({"protocol": "dsa"}, r"Expected `protocol` to be one of \['fast', 'published'\], but got 'dsa'"),
    ({"loops": (0, 1)}, "to be a whole number of at least 1, but got 0"),
    ({"loops": (1, 0)}, "to be a whole number of at least 1, but got 0"),
    ({"distance": "l1"}, r"Expected `distance` to be one of \['cosine', 'row_cosine', 'squared'\], but got 'l1'"),
    (
        {"augmentation": "crop_blur"},
        r"to be some of \['color', 'crop', 'cutout', 'flip', 'scale', 'rotate'\].*'crop_blur'",
    ),
    (
        {"initialization": "zeros"},
        r"Expected `initialization` to be one of \['kmeans', 'noise', 'real'\], but got 'zeros'",
    ),
    ({"real_images": "all"}, r"Expected `real_images` to be one of \['kmeans', 'random'\], but got 'all'"),
    ({"network_learning_rate": 0.0}, "Expected `network_learning_rate` to be positive and finite, but got 0.0"),
    ({"network_batch_size": 0}, "Expected `network_batch_size` to be a whole number of at least 1, but got 0"),
    ({"seed": -1}, "Expected `seed` to be a whole number of at least 0, but got -1"),
    ({"iterations": 0}, "Expected `iterations` to be a whole number of at least 1, but got 0"),
    ({"batch_size": 0}, "Expected `batch_size` to be a whole number of at least 1, but got 0"),
    ({"network_reuse": 0}, "Expected `network_reuse` to be a whole number of at least 1, but got 0"),
    ({"learning_rate": -0.1}, "Expected `learning_rate` to be positive and finite, but got -0.1"),
    ({"momentum": 1.0}, r"Expected `momentum` from 0 to below 1, but got 1\.0"),
    ({"factor": 0}, "Expected `factor` to be a whole number of at least 1, but got 0"),
    ({"synthetic_batch_size": 0}, "Expected `synthetic_batch_size` to be a whole number of at least 1, but got 0"),
    ({"network_width": 0}, "Expected `network_width` to be a whole number of at least 1, but got 0"),
    ({"decay": 1}, "Expected `decay` to be True or False, but got 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_names_a_bad_option_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientMatchingCondensation(**options)


def test_real_images_to_start_from_must_be_there(kit: Any) -> None:
    # The smallest class has five.
    kit.condense(5, loops=(1, 1), iterations=1, initialization="real")
    with pytest.raises(ValueError, match=r"Expected `images_per_class` of at most .*\b5\b.*middle.*but got 6"):
        kit.condense(6, loops=(1, 1), iterations=1, initialization="real")
    assert len(kit.images(kit.condense(6, loops=(1, 1), iterations=1))) == 18


def test_the_number_of_classes_must_be_the_datas(kit: Any) -> None:
    assert kit.condense(num_classes=3, iterations=1).iteration == 1
    with pytest.raises(ValueError, match="Expected `num_classes` to be 3, that of stripes, but got 10"):
        kit.condense(num_classes=10, iterations=1)


NETWORKS = [
    pytest.param({"image_size": 16}, "ConvNet, which fails on them: ", id="size"),
    pytest.param({"channels": 3}, "ConvNet, which fails on them: .*channels", id="channels"),
    pytest.param({"num_classes": 10}, r"ConvNet, which returns \(2, 10\) for two", id="classes"),
]


@pytest.mark.parametrize(("options", "message"), NETWORKS)
def test_the_network_must_fit_the_images(kit: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"for images \(1, 8, 8\) and 3 classes of 'stripes', but got {message}"):
        kit.condense(network=kit.network(**options), iterations=1)


class Pair(nn.Module):
    """Logits, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, int]:
        return self.classifier(images.flatten(1)), 0


class Own(nn.Module):
    """Weights that nothing draws anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def test_the_network_must_have_weights_that_can_be_matched_and_drawn(kit: Any) -> None:
    with pytest.raises(
        ValueError,
        match="Expected a `network` with trainable weights, but got Flatten without",
    ):
        kit.condense(network=nn.Flatten(), iterations=1)
    frozen = kit.network().requires_grad_(False)
    with pytest.raises(ValueError, match="with trainable weights, but got ConvNet without"):
        kit.condense(network=frozen, iterations=1)
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    with pytest.raises(ValueError, match="with trainable weights that distance='row_cosine' compares, but got ConvNet"):
        kit.condense(network=frozen, iterations=1)
    with pytest.raises(ValueError, match="but got Pair, which returns tuple for two"):
        kit.condense(network=Pair(), iterations=1)
    with pytest.raises(ValueError, match=r"Expected every module with weights to have `reset_parameters\(\)`.*Own"):
        kit.condense(network=Own(), iterations=1)


def test_the_default_network_wants_images_large_enough(kit: Any) -> None:
    condensation = GradientMatchingCondensation(iterations=1)
    with pytest.raises(ValueError, match="Expected `image_size`"):
        kit.trainer().fit(condensation, datamodule=kit.data(side=4))


def test_wants_a_labelled_data_set(kit: Any) -> None:
    class Other(LightningDataModule):
        """Images and labels, as for training."""

        def train_dataloader(self) -> Any:
            return [torch.zeros(1)]

    for data, name in ((Other(), "Other"), (Victims("sample", victims=1), "Victims")):
        with pytest.raises(ValueError, match=rf"data set of `leakage\.datamodules`, `LabelledImages`.*got {name}"):
            kit.trainer().fit(GradientMatchingCondensation(), datamodule=data)
    with pytest.raises(ValueError, match=r"Trainer\.fit\(condensation, datamodule=\.\.\.\).*but got NoneType"):
        kit.trainer().fit(GradientMatchingCondensation(), [torch.zeros(1)])


def test_only_fits(kit: Any) -> None:
    condensation = kit.condense(iterations=1)
    before = kit.images(condensation)
    for task in ("validate", "test", "predict"):
        with pytest.raises((ValueError, MisconfigurationException), match=rf"Trainer\.{task}|{task}_step"):
            getattr(kit.trainer(), task)(condensation, datamodule=kit.data(batch_size=6))
    assert torch.equal(kit.images(condensation), before)


def test_wants_one_process(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"Expected a Trainer with one process .* but got 2"):
        kit.condense(iterations=1)


def test_refuses_other_precisions(kit: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`precision` to be one of \['32-true', '64-true', 'bf16-mixed'\], but got 'bf16-t"
    ):
        kit.condense(iterations=1, trainer={"precision": "bf16-true"})


def test_has_no_images_before_fit() -> None:
    condensation = GradientMatchingCondensation()
    with pytest.raises(RuntimeError, match=r"Expected `Trainer.fit` to have begun, but got no synthetic images yet"):
        condensation.synthetic_set()
    assert condensation.iteration == 0
    assert condensation.images_per_second == 0


def test_steps_too_large_end_with_an_error_and_the_last_good_images(kit: Any) -> None:
    condensation = GradientMatchingCondensation(network=kit.network(), iterations=5, learning_rate=1e30)
    with pytest.raises(
        FloatingPointError, match=r"loss of nan at iteration 1, class 0 \(narrow\).*smaller `learning_rate`"
    ):
        kit.trainer().fit(condensation, datamodule=kit.data(batch_size=6))
    # The one update that was made led to images whose loss is no number: it is taken back.
    start = kit.images(kit.condense(iterations=1, learning_rate=1e-30))
    assert torch.equal(kit.images(condensation), start)
    assert condensation.synthetic_set().images.isfinite().all()
    assert condensation.iteration == 1


@pytest.mark.parametrize("loops", [(1, 1), (2, 2)])
def test_a_network_that_breaks_down_leaves_good_images(
    kit: Any, loops: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, calls = matching.real_gradients, []

    def spoilt(*arguments: Any) -> dict[str, Tensor]:
        gradients = exact(*arguments)
        calls.append(1)
        if len(calls) == 4:
            gradients["classifier.weight"][1, 0] = torch.inf
        return gradients

    monkeypatch.setattr(matching, "real_gradients", spoilt)
    condensation = GradientMatchingCondensation(network=kit.network(), iterations=5, loops=loops)
    where = rf"at iteration {3 // loops[0]}, class 1 \(middle\)"
    with pytest.raises(FloatingPointError, match=where):
        kit.trainer().fit(condensation, datamodule=kit.data(batch_size=6))
    assert condensation.step == 3
    assert condensation.synthetic_set().images.isfinite().all()
    assert condensation.last_loss < float("inf")


def test_one_batch_size(kit: Any) -> None:
    with pytest.raises(
        ValueError, match="Expected one `batch_size`, but got 3 for the condensation and 2 for the data"
    ):
        kit.trainer().fit(
            GradientMatchingCondensation(network=kit.network(), iterations=1, batch_size=3),
            datamodule=kit.data(batch_size=2),
        )


def test_half_precision_takes_no_batch_norm(kit: Any) -> None:
    with pytest.raises(ValueError, match="a `network` without BatchNorm for precision='bf16-mixed', but got ConvNet"):
        kit.trainer(precision="bf16-mixed").fit(
            GradientMatchingCondensation(network=kit.network(norm="batch"), iterations=1), datamodule=kit.data()
        )


def test_a_trainer_that_has_fitted_is_refused_and_the_images_stay(kit: Any) -> None:
    condensation = GradientMatchingCondensation(network=kit.network(), iterations=1)
    trainer = kit.trainer()
    trainer.fit(condensation, datamodule=kit.data())
    images = condensation.synthetic_images.detach().clone()
    with pytest.raises(ValueError, match="Expected a new Trainer, but got one that has already fitted"):
        trainer.fit(condensation, datamodule=kit.data())
    assert torch.equal(condensation.synthetic_images, images)
    kit.trainer().fit(condensation, datamodule=kit.data())
    assert torch.equal(condensation.synthetic_images, images), "a new one begins anew"


def test_the_global_random_state_is_left_alone_with_the_default_network(kit: Any) -> None:
    before = torch.get_rng_state()
    kit.trainer().fit(GradientMatchingCondensation(iterations=1), datamodule=kit.data(side=32, batch_size=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("options", "width"), [({}, 128), ({"network_width": 5}, 5)])
def test_the_default_network_has_the_width_asked_for(kit: Any, options: dict[str, Any], width: int) -> None:
    condensation = GradientMatchingCondensation(iterations=1, **options)
    kit.trainer().fit(condensation, datamodule=kit.data(side=8, batch_size=2))
    assert condensation.network.features[0].out_channels == width
