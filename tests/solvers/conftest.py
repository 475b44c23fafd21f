"""Problems for solvers: random smooth functions of each victim, and gradient matching on a small LeNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakage.models import LeNet
from leakage.solvers import LBFGS, GaussNewton, PerVictimOptimizer, PlainLBFGS
from leakage.solvers import Problem as Known


def lbfgs(params: Any, preconditioner: Any = None, project: Any = None, **options: Any) -> PerVictimOptimizer:
    """L-BFGS on parameters."""
    return PerVictimOptimizer(params, LBFGS(**options), Known(preconditioner=preconditioner, project=project))


def plain_lbfgs(params: Any, **options: Any) -> PerVictimOptimizer:
    """The published one."""
    return PerVictimOptimizer(params, PlainLBFGS(**options))


def gauss_newton(params: Any, equations: Any, spectrum: Any = None, **options: Any) -> PerVictimOptimizer:
    """Levenberg-Marquardt on equations that need not be relative to a gradient."""
    params = list(params)
    unknowns = sum(param[0].numel() for param in params if len(param))
    rows = 0
    if unknowns:
        flat = torch.cat([param.detach().flatten(1) for param in params], dim=1)
        rows = equations(flat[:1], torch.zeros(1, dtype=torch.long, device=flat.device)).shape[1]
    known = Known(
        equations=equations,
        preconditioner=spectrum,
        num_equations=rows,
        num_unknowns=unknowns,
        element_size=params[0].element_size(),
    )
    given = {"tolerance": 0.0, "max_evaluations": 100, "max_products": 200, "reference_loss": None} | options
    return PerVictimOptimizer(params, GaussNewton(underdetermined=True, **given), known)


@dataclass
class Problem:
    """Losses ``(V,)`` of unknowns ``(V, ...)``, and where to start. ``only`` computes one victim alone."""

    starts: list[Tensor]
    only: Callable[[int, list[Tensor]], Tensor]

    def params(self, victims: slice = slice(None)) -> list[nn.Parameter]:
        return [nn.Parameter(start[victims].clone()) for start in self.starts]

    def losses(self, params: list[Tensor], first: int = 0) -> Tensor:
        one_by_one = [self.only(first + v, [p[v] for p in params]) for v in range(len(params[0]))]
        return torch.stack(one_by_one)


def closure_of(problem: Problem, optimizer: PerVictimOptimizer, first: int = 0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        params = optimizer.param_groups[0]["params"]
        losses = problem.losses(params, first)
        gradients = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = torch.zeros_like(param) if gradient is None else gradient
        return losses

    return closure


@pytest.fixture(name="closure_of")
def _closure_of() -> Callable[..., Callable[[], Tensor]]:
    return closure_of


def smooth(seed: int, victims: int, unknowns: int, dtype: torch.dtype = torch.float64) -> Problem:
    """A bowl with ripples and walls of the fourth order, another one for each victim."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(victims, unknowns, unknowns, generator=generator).to(dtype)
    shifts = torch.randn(victims, unknowns, generator=generator).to(dtype)

    def only(victim: int, params: list[Tensor]) -> Tensor:
        x = torch.cat([param.flatten() for param in params])
        residual = matrices[victim] @ x - shifts[victim]
        ripples = 0.3 * torch.cos(3 * x).sum()
        return residual.square().sum() + ripples + 0.05 * x.pow(4).sum() + unknowns

    starts = torch.randn(victims, unknowns, generator=generator).to(dtype)
    return Problem([starts[:, : unknowns // 2], starts[:, unknowns // 2 :]], only)


@pytest.fixture(name="smooth")
def _smooth() -> Callable[..., Problem]:
    return smooth


def matching(seed: int, victims: int) -> Problem:
    """DLG on a LeNet of (1, 6, 6) images and 4 classes, with plain modules and ``autograd.grad``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        networks = [LeNet(1, 6, num_classes=4, width=4).double() for _ in range(victims)]
        images = torch.rand(victims, 1, 6, 6, dtype=torch.float64)
        labels = torch.randint(4, (victims, 1))
        starts = [torch.randn(victims, 1, 6, 6).double(), torch.randn(victims, 4).double()]

    def gradients(victim: int, image: Tensor, target: Tensor) -> list[Tensor]:
        network = networks[victim]
        loss = nn.functional.cross_entropy(network(image[None]), target)
        return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=True))

    shared = [[g.detach() for g in gradients(victim, images[victim], labels[victim])] for victim in range(victims)]

    def only(victim: int, params: list[Tensor]) -> Tensor:
        image, logits = params
        own = gradients(victim, image, logits.softmax(-1)[None])
        return torch.stack([(a - b).square().sum() for a, b in zip(own, shared[victim], strict=True)]).sum()

    return Problem(starts, only)


@pytest.fixture(name="matching")
def _matching() -> Callable[..., Problem]:
    return matching
