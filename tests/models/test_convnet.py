"""ConvNet-3 by its published numbers, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leakage.models import ConvNet


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("channels", "image_size", "num_classes", "parameters"),
    [(1, 28, 10, 317_706), (3, 32, 10, 320_010), (3, 32, 100, 320_010 + 90 * 2049)],
)
def test_published_sizes(channels, image_size, num_classes, parameters):
    model = ConvNet(channels, image_size, num_classes)
    assert count(model) == parameters
    assert model.classifier.in_features == 128 * 4 * 4


def test_published_layers():
    """Against the same network, written with torch's functions alone."""
    model = ConvNet(width=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    weights = [parameter for name, parameter in model.named_parameters() if name.startswith("features")]
    maps = F.pad(images, (2, 2, 2, 2))
    for block in range(3):
        kernel, bias, scale, shift = weights[4 * block : 4 * block + 4]
        maps = F.conv2d(maps, kernel, bias, padding=1)
        mean, variance = maps.mean((2, 3), keepdim=True), maps.var((2, 3), unbiased=False, keepdim=True)
        maps = (maps - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]
        maps = F.avg_pool2d(maps.clamp(min=0), 2)
    expected = maps.flatten(1) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "layer", "none"])
@pytest.mark.parametrize("pooling", ["average", "max", "none"])
def test_norms_and_poolings(norm, pooling):
    model = ConvNet(2, (12, 17), 3, width=4, depth=2, norm=norm, pooling=pooling)
    names = [type(layer).__name__ for layer in model.features]
    norms = {"batch": ["BatchNorm2d"], "layer": ["LayerNorm"], "none": []}.get(norm, ["GroupNorm"])
    poolings = {"average": ["AveragePooling"], "max": ["MaxPool2d"], "none": []}[pooling]
    assert names == 2 * ["Conv2d", *norms, "ReLU", *poolings]
    assert model(torch.zeros(2, 2, 12, 17)).shape == (2, 3)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", F.relu),
        ("leaky_relu", F.leaky_relu),
        ("sigmoid", torch.sigmoid),
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("tanh", torch.tanh),
    ],
)
def test_activations(activation, function):
    model = ConvNet(1, 8, 3, width=2, depth=1, norm="none", pooling="none", activation=activation)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(images), model.classifier(function(model.features[0](images)).flatten(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "spectral"}, r"`norm` to be one of \['batch', 'group', 'instance', 'layer', 'none'\], but got 'sp"),
        (
            {"activation": "elu"},
            r"`activation` to be one of \['gelu', 'leaky_relu', 'relu', 'sigmoid', 'silu', 'tanh'\]",
        ),
        ({"pooling": "median"}, r"`pooling` to be one of \['average', 'max', 'none'\], but got 'median'"),
        ({"width": 0}, "`width` to be a whole number of at least 1, but got 0"),
        ({"depth": 1.5}, "`depth` to be a whole number of at least 1, but got 1.5"),
        ({"image_size": (32, 7)}, r"`image_size` of at least 8 pixels a side for this network, but got \(32, 7\)"),
        ({"depth": 6}, "`image_size` of at least 64 pixels a side for this network, but got 28"),
        ({"norm": "group", "width": 6}, "a multiple of 4 channels for norm='group', but got 6"),
        ({"image_size": 1, "pooling": "none"}, "`image_size` to leave more than one pixel to normalise for norm='inst"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        ConvNet(**options)
