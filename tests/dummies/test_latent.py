"""Images that a generator writes, and an attack of one's own that searches for its weights too."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakage.attacks import GradientInversion
from leakage.clients import Protocol
from leakage.dummies import Images, LatentCode
from leakage.objectives import SquaredDistance
from leakage.solvers import LBFGS
from tests.kit import mean_error


def generator_of(images: Tensor, size: int) -> nn.Module:
    """A linear generator of the images' principal components."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    _, _, components = torch.linalg.svd(flat - mean, full_matrices=False)
    linear = nn.Linear(size, flat.shape[1])
    with torch.no_grad():
        linear.weight.copy_(components[:size].T)
        linear.bias.copy_(mean)
    return nn.Sequential(linear, nn.Unflatten(1, images.shape[1:]))


def test_a_latent_code_finds_images_that_the_generator_knows(kit: Any) -> None:
    images = torch.stack([kit.images()[index][0] for index in range(0, 1000, 5)])
    generator = generator_of(images, 60)
    before = copy.deepcopy(generator.state_dict())

    def run(evaluations: int) -> GradientInversion:
        written = LatentCode(generator, [60], std=0.1)
        solver = LBFGS(max_evaluations=evaluations, tolerance=1e-10)
        found: GradientInversion = kit.fit(GradientInversion(images=written, solver=solver), kit.victims(victims=4))
        return found

    attack = run(400)
    assert mean_error(attack) < 0.2 * mean_error(run(1))
    # Nothing but what it can make.
    flat = attack.finished.images.flatten(1) - generator[0].bias
    weight = generator[0].weight
    torch.testing.assert_close(flat @ weight @ weight.T, flat, atol=1e-4, rtol=1e-4)
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert attack.state_dict().keys() == {"unknowns.images"}, "no weights of the generator in checkpoints"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"generator": abs},
            r"Expected `generator` to be a torch\.nn\.Module or a path, but got builtin_function_or_method",
        ),
        ({"code_shape": 64}, r"Expected `code_shape` as a list of sizes such as \[64\], but got 64"),
        ({"code_shape": "64"}, r"Expected `code_shape` as a list of sizes such as \[64\], but got '64'"),
        ({"code_shape": [0]}, "Expected `code_shape` to be a whole number of at least 1, but got 0"),
        ({"std": 0.0}, "Expected `std` to be positive and finite, but got 0.0"),
        ({"tuning": -1.0}, "Expected `tuning` of at least 0, but got -1.0"),
        ({"tuning": 0.1}, "Expected `generator` with weights for tuning=0.1, but got none"),
    ],
)
def test_names_a_bad_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentCode(**({"generator": nn.Identity(), "code_shape": [64]} | options))


def test_tuned_weights_are_those_given_plus_what_is_searched_for() -> None:
    generator = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Unflatten(1, (1, 4, 4)))
    written = LatentCode(generator, [3], std=2.0, tuning=0.1)
    protocol = Protocol((1, 4, 4), 10, num_images=2)
    assert written.shape(protocol) == (2 * 3 + 4 * 16,)
    noise = torch.randn(5, 70)
    starts = written.starts(noise, torch.zeros(5, dtype=torch.long))
    assert torch.equal(starts[:, :6], 2 * noise[:, :6])
    assert not starts[:, 6:].any()
    torch.testing.assert_close(written.write(starts[0], {}), generator(starts[0, :6].view(2, 3)))
    codes = noise[0, :6].view(2, 3)
    weight, bias = generator[0].weight + 0.1 * noise[0, 6:54].view(16, 3), generator[0].bias + 0.1 * noise[0, 54:]
    torch.testing.assert_close(written.write(noise[0], {}), (codes @ weight.T + bias).tanh().view(2, 1, 4, 4))


@pytest.mark.slow
def test_tuning_finds_what_the_generator_does_not_know(kit: Any) -> None:
    """Each victim tunes one of its own, and that which was given stays as it is."""
    images = torch.stack([kit.images()[index][0] for index in range(0, 1000, 5)])
    generator = generator_of(images, 10)
    before = copy.deepcopy(generator.state_dict())
    solver = LBFGS(max_evaluations=200, tolerance=1e-10)

    def error(tuning: float, lanes: int = 2) -> Tensor:
        written = LatentCode(generator, [10], std=0.1, tuning=tuning)
        attack = kit.fit(GradientInversion(images=written, solver=solver), kit.victims(victims=2, lanes=lanes))
        return torch.tensor([attack.scores[victim].mse for victim in range(2)])

    known, tuned = error(0.0), error(0.1)
    assert tuned.mean() < 0.1 * known.mean()
    assert bool((error(0.1, lanes=1) < 0.5 * known).all())
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class TunedGenerator(Images):
    """A code and the generator's weights, both searched for."""

    def __init__(self, generator: nn.Module, code_size: int, tuning: float = 0.1) -> None:
        self.generator, self.code_size, self.tuning = copy.deepcopy(generator).requires_grad_(False), code_size, tuning

    def shape(self, protocol: Any) -> tuple[int, ...]:
        return (protocol.num_images * self.code_size + sum(p.numel() for p in self.generator.parameters()),)

    def starts(self, noise: Tensor, restarts: Tensor) -> Tensor:
        weights = sum(p.numel() for p in self.generator.parameters())
        return torch.cat([0.1 * noise[:, :-weights], torch.zeros_like(noise[:, -weights:])], dim=1)

    def write(self, unknown: Any, kept: Any) -> Tensor:
        named = dict(self.generator.named_parameters())
        sizes = [tensor.numel() for tensor in named.values()]
        codes, *moved = unknown.split([len(unknown) - sum(sizes), *sizes])
        weights = {
            name: tensor.to(unknown) + self.tuning * change.view_as(tensor)
            for (name, tensor), change in zip(named.items(), moved, strict=True)
        }
        return functional_call(self.generator, weights, codes.view(-1, self.code_size))


class GIASAttack(GradientInversion):
    """The latent code of GIAS, and then its weights, as one search."""

    def __init__(
        self, generator: nn.Module, code_size: int, *, code_prior: float = 0.0, evaluations: int = 300
    ) -> None:
        super().__init__(
            objective=SquaredDistance(),
            images=TunedGenerator(generator, code_size),
            solver=LBFGS(max_evaluations=evaluations, tolerance=1e-10),
        )


@pytest.mark.slow
def test_an_attack_of_ones_own_that_tunes_the_generator_finds_what_it_does_not_know(kit: Any) -> None:
    """Half of the images are not of its making; under a hundred lines, none of them in the library."""
    images = torch.stack([kit.images()[index][0] for index in range(0, 1000, 5)])
    generator = generator_of(images, 10)
    codes = GradientInversion(images=LatentCode(generator, [10], std=0.1), solver=LBFGS(max_evaluations=300))
    known = mean_error(kit.fit(codes, kit.victims(victims=2)))
    assert mean_error(kit.fit(GIASAttack(generator, 10), kit.victims(victims=2))) < 0.1 * known
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    lengths = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    assert lengths["TunedGenerator"] + lengths["GIASAttack"] < 100
