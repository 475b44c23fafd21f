"""Pooling by a matrix product against torch's pooling, and the norms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakage.models.layers import AveragePooling, make_norm

SHAPES = [(3, 2, 8, 6), (1, 1, 2, 2), (2, 3, 4, 128), (5, 4, 6), (2, 2, 5, 6), (2, 2, 6, 5), (2, 1, 4, 130)]


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def derivatives(pool, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and second derivative, of a function that is not linear."""
    maps = maps.clone().requires_grad_()
    value = pool(maps)
    (first,) = torch.autograd.grad((value**3).sum(), maps, create_graph=True)
    (second,) = torch.autograd.grad((first * normal(maps.shape, seed=1)).sum(), maps)
    return value, first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_average_pooling_is_torchs(shape, dtype):
    maps = normal(shape).to(dtype)
    for ours, theirs in zip(
        derivatives(AveragePooling(), maps), derivatives(lambda maps: F.avg_pool2d(maps, 2), maps), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_average_pooling_in_bfloat16():
    maps = normal((4, 3, 8, 8)).bfloat16()
    ours = AveragePooling()(maps)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), F.avg_pool2d(maps.float(), 2), rtol=2**-8, atol=1e-6)


def test_average_pooling_under_vmap():
    pool = AveragePooling()
    maps = normal((5, 2, 3, 8, 6))
    cubes = torch.func.grad(lambda maps: (pool(maps) ** 3).sum())
    torch.testing.assert_close(torch.vmap(cubes)(maps), torch.stack([cubes(each) for each in maps]))
    torch.testing.assert_close(torch.vmap(pool, 1)(maps), torch.stack([pool(maps[:, index]) for index in range(2)]))


def test_average_pooling_of_maps_that_are_not_contiguous():
    maps = normal((2, 6, 8, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(AveragePooling()(maps), F.avg_pool2d(maps, 2))


@pytest.mark.parametrize(
    ("shape", "dtype", "product"),
    [
        ((1, 1, 2, 8), torch.float32, True),
        ((1, 1, 2, 128), torch.float32, True),
        ((1, 1, 2, 130), torch.float32, False),
        ((1, 1, 2, 8), torch.float64, False),
        ((1, 1, 3, 8), torch.float32, False),
    ],
)
def test_which_way_average_pooling_takes(shape, dtype, product):
    """A pixel that is not a number spoils its row in a product."""
    maps = torch.zeros(shape, dtype=dtype)
    maps[..., 0, 0] = math.nan
    assert AveragePooling()(maps).isnan().all() == product


def test_average_pooling_keeps_its_precision_under_autocast():
    maps = normal((2, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        pooled = AveragePooling()(maps)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, F.avg_pool2d(maps, 2))


def test_average_pooling_has_no_state_and_survives_inference_mode():
    pool = AveragePooling()
    assert not pool.state_dict()
    assert not [*pool.buffers(), *pool.parameters()]
    with torch.inference_mode():
        pool(torch.zeros(1, 1, 4, 4))
    maps = torch.zeros(1, 1, 4, 4, requires_grad=True)
    pool(maps).sum().backward()
    assert torch.equal(maps.grad, torch.full_like(maps, 0.25))


def normalised(maps: Tensor, dims: tuple[int, ...]) -> Tensor:
    mean = maps.mean(dims, keepdim=True)
    return (maps - mean) / (maps.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(("norm", "dims"), [("instance", (2, 3)), ("layer", (1, 2, 3)), ("batch", (0, 2, 3))])
def test_norms(norm, dims):
    maps = 3 * normal((3, 8, 4, 5)) + 1
    torch.testing.assert_close(make_norm(norm, 8, 4, 5)(maps), normalised(maps, dims), rtol=1e-4, atol=1e-5)


def test_group_norm_has_four_groups():
    maps = 3 * normal((3, 8, 4, 5)) + 1
    expected = normalised(maps.reshape(3, 4, 2, 4, 5), (2, 3, 4)).reshape(maps.shape)
    torch.testing.assert_close(make_norm("group", 8, 4, 5)(maps), expected, rtol=1e-4, atol=1e-5)


def test_no_norm():
    assert make_norm("none", 8, 4, 5) is None


@pytest.mark.parametrize("norm", ["instance", "group", "layer", "batch"])
def test_norms_scale_and_shift(norm):
    layer = make_norm(norm, 8, 4, 5)
    assert isinstance(layer, nn.Module)
    size = 8 * 4 * 5 if norm == "layer" else 8
    assert {name: parameter.numel() for name, parameter in layer.named_parameters()} == {"weight": size, "bias": size}
