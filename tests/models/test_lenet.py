"""The network of the papers, by their numbers."""

from __future__ import annotations

import pytest
import torch

from leakage import LeNet


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("channels", "image_size", "num_classes", "features", "parameters"),
    [
        (1, 28, 10, 588, 13_426),  # (1*25 + 1)*12 + 2*(12*25 + 1)*12 ... as published for MNIST
        (3, 32, 10, 768, 15_826),
        (3, 32, 100, 768, 85_036),
    ],
)
def test_published_sizes(channels, image_size, num_classes, features, parameters):
    model = LeNet(channels, image_size, num_classes)
    assert model.classifier.in_features == features
    assert count(model) == parameters


@pytest.mark.parametrize(
    ("channels", "image_size", "num_classes", "width"),
    [(1, 1, 2, 1), (2, (5, 9), 3, 4), (3, 33, 7, 12), (1, (28, 12), 10, 2)],
)
def test_other_sizes(channels, image_size, num_classes, width):
    model = LeNet(channels, image_size, num_classes, width)
    height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
    assert model(torch.zeros(3, channels, height, breadth)).shape == (3, num_classes)


def test_initialisation():
    torch.manual_seed(0)
    model = LeNet(3, 32, 100)
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert values.min() >= -0.5
    assert values.max() <= 0.5
    assert values.mean().abs() < 0.01
    assert values.std().item() == pytest.approx(1 / 12**0.5, rel=0.01)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() > 0.35, f"{name} keeps torch's narrower initialisation"


def test_reset_draws_anew():
    model = LeNet()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.reset_parameters()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sigmoid_after_each_convolution():
    layers = [type(layer).__name__ for layer in LeNet().features]
    assert layers == ["Conv2d", "Sigmoid"] * 3
    assert [LeNet().features[index].stride for index in (0, 2, 4)] == [(2, 2), (2, 2), (1, 1)]


@pytest.mark.parametrize("name", ["channels", "image_size", "num_classes", "width"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_errors(name, value):
    with pytest.raises(ValueError, match=f"^Expected `{name}` to be a whole number of at least 1, but got {value}"):
        LeNet(**{name: (4, value) if name == "image_size" and value != 0 else value})


@pytest.mark.parametrize("value", [(4,), (4, 4, 4), "28"])
def test_image_size_is_one_number_or_two(value):
    with pytest.raises(ValueError, match=r"^Expected `image_size` "):
        LeNet(image_size=value)
