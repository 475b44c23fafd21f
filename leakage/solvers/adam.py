"""Adam, and Adam on the sign of the gradient, for many victims at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakage.errors import check_choice, check_count, check_not_negative, check_pair, check_positive
from leakage.pieces import State
from leakage.seeds import hashed_normal
from leakage.solvers.solver import CONVERGED, DIVERGED, EXHAUSTED, Evaluated, Solver, running, settle

SCHEDULES = ("steps", "cosine", "constant")
# Shares of the steps after which the learning rate falls, and the factor, as in Inverting Gradients.
_MILESTONES, _FALL = (3 / 8, 5 / 8, 7 / 8), 0.1


@dataclass(kw_only=True, repr=False, eq=False)
class Adam(Solver):
    r"""Adam, with separate moments and learning rate for each victim.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        x \leftarrow x - \eta_t \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} +
        \eta_t \, \sigma \, n, \quad n \sim N(0, 1)

    The optional noise (Langevin) depends only on victim, restart and step, not on how victims are grouped: see
    :func:`leakage.seeds.hashed_normal`. The loss may rise; the iterate with the lowest loss is kept.

    ============= ===============================================================================
    ``schedule``  :math:`\eta_t`
    ============= ===============================================================================
    ``steps``     ``lr``, divided by 10 after 3/8, 5/8 and 7/8 of the steps: Inverting Gradients
    ``cosine``    ``lr``, falling to zero along half a cosine: GradInversion
    ``constant``  ``lr``
    ============= ===============================================================================

    Args:
        lr: initial learning rate.
        steps: number of steps after which a victim is exhausted.
        schedule: a schedule from the table.
        warmup: number of steps in which the rate rises linearly to ``lr``.
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon`.
        tolerance: a victim has converged when its loss is at most this.
        noise: :math:`\sigma`; GradInversion uses 0.2.

    Raises:
        ValueError: if an option is out of range.

    References:
        Kingma and Ba, *Adam: A Method for Stochastic Optimization*, 2015, https://arxiv.org/abs/1412.6980;
        for the noise Yin et al., *See through Gradients*, CVPR 2021, https://arxiv.org/abs/2104.07586.

    Example:
        >>> Adam(lr=0.1, steps=4800).schedule
        'steps'
    """

    lr: float = 0.1
    steps: int = 1000
    schedule: str = "steps"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    tolerance: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, eps=self.eps)
        check_count(steps=self.steps)
        check_count(0, warmup=self.warmup)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_not_negative(tolerance=self.tolerance, noise=self.noise)
        self.betas = check_pair(betas=self.betas)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"Expected `betas` from 0 to below 1, but got {self.betas!r}.")

    def fresh(self, like: Tensor) -> State:
        """Return the two moments, and a seed if there is noise."""
        moments = {"mean": torch.zeros_like(like), "square": torch.zeros_like(like)}
        return moments | ({"seed": torch.zeros(len(like), dtype=torch.long, device=like.device)} if self.noise else {})

    def move(self, lanes: State, at: Evaluated) -> Tensor:
        """Make one step for each victim."""
        settle(lanes, ~at.finite, DIVERGED)
        settle(lanes, at.losses <= self.tolerance, CONVERGED)
        settle(lanes, lanes["evaluations"] >= self.steps, EXHAUSTED)
        lanes["iterations"] += running(lanes)
        gradient = self._gradient(torch.where(at.finite[:, None], at.gradient, 0.0))
        step = lanes["evaluations"].to(gradient).clamp(min=1)
        mean = lanes["mean"] = torch.lerp(gradient, lanes["mean"], self.betas[0])
        square = lanes["square"] = torch.lerp(gradient.square(), lanes["square"], self.betas[1])
        first, second = (1 - beta**step for beta in self.betas)
        rate = self._rate(step)
        target = at.point - (rate / first)[:, None] * mean / ((square / second[:, None]).sqrt() + self.eps)
        if not self.noise:
            return target
        noise = hashed_normal(lanes["seed"], lanes["evaluations"], target.shape[1])
        return target + self.noise * rate[:, None] * noise.to(target)

    def meet_new_objective(self, lanes: State, chosen: Tensor, target: Tensor) -> Tensor:
        """Continue unchanged, because the objective has hardly changed."""
        return target

    def _gradient(self, gradient: Tensor) -> Tensor:
        return gradient

    def _rate(self, step: Tensor) -> Tensor:
        """Return the learning rates ``(V,)`` of victims at their steps, counted from 1."""
        share = (step - 1) / self.steps
        if self.schedule == "steps":
            passed = torch.stack([share >= milestone for milestone in _MILESTONES]).sum(0)
            rate = self.lr * _FALL ** passed.to(step)
        elif self.schedule == "cosine":
            rate = self.lr * (1 + torch.cos(math.pi * share)) / 2
        else:
            rate = torch.full_like(step, self.lr)
        return rate * (step / self.warmup).clamp(max=1) if self.warmup else rate


@dataclass(kw_only=True, repr=False, eq=False)
class SignedAdam(Adam):
    """Adam on the sign of the gradient: each pixel moves by about the learning rate, whatever its gradient.

    Args:
        options: see :class:`Adam`.

    References:
        Geiping et al., *Inverting Gradients*, NeurIPS 2020, https://arxiv.org/abs/2003.14053.

    Example:
        >>> SignedAdam(lr=0.1, steps=24000).lr
        0.1
    """

    def _gradient(self, gradient: Tensor) -> Tensor:
        return gradient.sign()
