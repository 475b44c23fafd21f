"""Models, images and shared gradients that must be refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage import LeNet, SharedGradient, Victim
from tests.clients.networks import IMAGE_SHAPE, LogSoftmaxAtTheEnd, network, private


def test_functional_dropout_in_training_mode():
    class Functional(LogSoftmaxAtTheEnd):
        def forward(self, images: Tensor) -> Tensor:
            return self.linear(F.dropout(images.flatten(1), training=self.training))

    with pytest.raises(ValueError, match=r"to be a function of images and weights alone.*random"):
        Victim(Functional(), image_shape=IMAGE_SHAPE)
    assert Victim(Functional().eval(), image_shape=IMAGE_SHAPE).classifier == "linear"


def test_nothing_to_share():
    for model in (nn.Flatten(), LeNet().requires_grad_(False)):
        with pytest.raises(ValueError, match="parameters that require gradients, but got none: nothing is shared"):
            Victim(model, image_shape=(1, 28, 28))


@pytest.mark.parametrize("image_shape", [(3, 28, 28), (1, 32, 32), (1, 28, 32)])
def test_images_that_the_model_does_not_take(image_shape):
    shape = ", ".join(map(str, image_shape))
    with pytest.raises(ValueError, match=rf"`model` to take images of shape \(N, {shape}\), but got: "):
        Victim(LeNet(), image_shape=image_shape)


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Conv2d(2, 3, 3), r"\(1, 3, 4, 3\)"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(60, 3)), r"\(3,\)"),
        (nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Flatten(0, 1), nn.Flatten()), r"\(2, 18\)"),
    ],
    ids=["maps", "no batch", "two for one"],
)
def test_no_logits(model, got):
    with pytest.raises(ValueError, match=rf"`model` to give logits of shape \(N, K\), but got {got} for one image"):
        Victim(model, image_shape=IMAGE_SHAPE)


def test_logits_that_are_no_tensor():
    class Tuple(LogSoftmaxAtTheEnd):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            logits = super().forward(images)
            return logits, logits

    for num_images, number in ((1, "one image"), (2, "2 images"), (9, "2 images")):
        with pytest.raises(ValueError, match=f"but got tuple for {number}"):
            Victim(Tuple(), image_shape=IMAGE_SHAPE, num_images=num_images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"loss": "hinge"},
            r"`loss` to be one of \['cross_entropy', 'mean_squared_error', 'own'\], but got 'hinge'",
        ),
        ({"reduction": "none"}, r"`reduction` to be one of \['mean', 'sum'\], but got 'none'"),
        ({"num_images": 0}, "`num_images` to be a whole number of at least 1, but got 0"),
        ({"num_images": -2}, "`num_images` to be a whole number of at least 1, but got -2"),
        ({"local_steps": 2}, "a `learning_rate` for 2 local steps, but got None"),
        ({"num_images": 4, "local_batch_size": 3}, "`local_batch_size` to divide `num_images` = 4"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        Victim(LeNet(), image_shape=(1, 28, 28), **arguments)


# -- errors of capture


def shape_of(shape: Sequence[int]) -> str:
    return str(tuple(shape)).replace("(", r"\(").replace(")", r"\)")


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 3, 6, 5), (2, 1, 2, 5, 6), (2, 2, 2, 6, 5), (2, 2, 6, 5), (0, 1, 2, 6, 5)],
    ids=["channels", "size", "number of images", "no victims' dimension", "no victims"],
)
def test_images_of_another_shape(shape):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    message = rf"`images` of shape \(V, 1, 2, 6, 5\), but got {shape_of(shape)}"
    with pytest.raises(ValueError, match=message):
        victim.share(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2], dtype=torch.long))


@pytest.mark.parametrize(
    ("value", "got"),
    [(1.5, "0.0 to 1.5"), (-0.1, "-0.1 to 0.0"), (255.0, "0.0 to 255.0"), (math.nan, "nan to nan")],
)
def test_images_of_another_range(value, got):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images = torch.zeros(2, 1, *IMAGE_SHAPE, dtype=torch.float64)
    images[1, 0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"`images` as floating-point numbers in \[0, 1\], but got .* from {got}"):
        victim.share(images, torch.zeros(2, 1, dtype=torch.long))


def test_images_of_another_type():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    labels = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`images` as floating-point numbers in \[0, 1\], but got torch.uint8"):
        victim.share(torch.zeros(2, 1, *IMAGE_SHAPE, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match=r"precision of the weights, torch.float64, but got torch.float32"):
        victim.share(torch.zeros(2, 1, *IMAGE_SHAPE), labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"`labels` of shape \(2, 1\), but got \(2,\)"),
        (torch.tensor([[0, 1], [1, 2]]), r"`labels` of shape \(2, 1\), but got \(2, 2\)"),
        (torch.tensor([[0], [4]]), "`labels` as class indices from 0 to 3, but got torch.int64 from 0 to 4"),
        (
            torch.tensor([[-1], [3]]),
            "`labels` as class indices from 0 to 3, but got torch.int64 from -1 to 3",
        ),
        (torch.tensor([[0.0], [1.0]]), "`labels` as class indices from 0 to 3, but got torch.float32"),
    ],
)
def test_wrong_labels(labels, message):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=message):
        victim.share(private(2)[0], labels)


def test_non_finite_gradients_name_the_victims():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    states = victim.fresh_states([0, 1, 2])
    states["3.bias"][1, 0] = math.nan
    with pytest.raises(ValueError, match=r"finite numbers in the gradient of '1\.weight'.*\(victims \[8\]\)"):
        victim.share(*private(3), states=states, ids=torch.tensor([7, 8, 9]))


def test_states_that_do_not_fit():
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    images, labels = private(2)
    states = victim.fresh_states([0, 1])
    with pytest.raises(ValueError, match=r"a state for every tensor of the model, but got missing \['3\.bias'\]"):
        victim.share(images, labels, states={name: states[name] for name in states if name != "3.bias"})
    with pytest.raises(ValueError, match=r"unknown \['4\.weight'\]"):
        victim.share(images, labels, states=states | {"4.weight": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match=r"state of '.*' to have shape \(2, .*\), but got \(3, "):
        victim.share(images, labels, states=victim.fresh_states([0, 1, 2]))


# -- shared gradients of somebody else


def change(kind: str, name: str, new: Callable[[Tensor], Tensor]) -> Callable[[SharedGradient], None]:
    def spoil(shared: SharedGradient) -> None:
        tensors = getattr(shared, kind)
        tensors[name] = new(tensors[name])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda shared: shared.gradients.update({"classifier.bias": shared.gradients.pop("3.bias")}),
            r"a gradient for every tensor of the model, but got missing \['3\.bias'\] and unknown \['classifier",
        ),
        (
            change("gradients", "3.bias", lambda tensor: tensor[:, :-1]),
            r"the gradient of '3\.bias' to have shape \(3, 4\), but got \(3, 3\)",
        ),
        (
            lambda shared: shared.state.pop("1.weight"),
            r"a state for every tensor .* missing \['1\.weight'\] and unknown \[\]",
        ),
        (
            change("state", "1.weight", lambda tensor: tensor.T),
            r"the state of '1\.weight' to have shape \(7, 60\), but got \(60, 7\)",
        ),
        (
            change("state", "1.weight", Tensor.long),
            r"the state of '1\.weight' of a type like torch\.float64, but got torch\.int64",
        ),
    ],
    ids=["names", "shapes", "missing", "transposed", "integers"],
)
def test_check(spoil, message):
    victim = Victim(network("mlp", bias=True), image_shape=IMAGE_SHAPE)
    shared = victim.share(*private(3))
    victim.check(shared)
    spoil(shared)
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        victim.check(shared)


def test_check_of_another_client():
    model = network("mlp", bias=True)
    shared = Victim(model, image_shape=IMAGE_SHAPE).share(*private(3))
    with pytest.raises(ValueError, match=r"protocol, with reduction='sum', but got reduction='mean'\..*Victim\.of\("):
        Victim(model, image_shape=IMAGE_SHAPE, reduction="sum").check(shared)
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"missing \[\] and unknown \['1\.weight'\]"):
        Victim(model, image_shape=IMAGE_SHAPE).check(shared)
