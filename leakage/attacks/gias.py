"""Gradient inversion with a generative image prior (GIAS)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from leakage.attacks.protocols import chosen_values
from leakage.dummies import InferredLabels, LatentCode
from leakage.errors import check_not_negative
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import CosineDistance, TotalVariation
from leakage.solvers import Adam


@dataclass(frozen=True)
class GIASProtocol:
    """Values of a protocol of :class:`GIASAttack`; arguments with the same names override them."""

    total_variation: float
    lr: float
    tuning: float
    steps: int
    restarts: int

    def __post_init__(self) -> None:
        check_not_negative(total_variation=self.total_variation)


# From the authors' script for images of 32 pixels: 500 steps for codes, 5,000 steps at a rate of 1e-3 for weights.
GIAS = {"published": GIASProtocol(total_variation=1e-6, lr=3e-2, tuning=1 / 30, steps=5500, restarts=2)}


class GIASAttack(GradientInversion):
    r"""GIAS: search over the latent codes and the weights of an image generator.

    .. math:: \min_{z, u} \; 1 - \frac{\langle \nabla_\theta \ell(f_\theta(x), y), \, g^* \rangle}
        {\lVert \nabla_\theta \ell(f_\theta(x), y) \rVert \, \lVert g^* \rVert} + \alpha \, \mathrm{TV}(x),
        \qquad x_n = G_{w + \tau u}(z_n)

    for each victim, with one code z per image and separate weights u per victim. Use
    :func:`leakage.dummies.training.trained_generator` to train a generator on similar images of the attacker's own.

    Difference from the paper: the attack searches for codes and weights at the same time, the weights at :math:`\tau`
    times the learning rate, instead of first for codes and then for weights. The number of steps is the sum of the
    paper's two. Every victim starts from the given generator.

    Pieces: :class:`~leakage.objectives.CosineDistance`, :class:`~leakage.objectives.TotalVariation`,
    :class:`~leakage.dummies.LatentCode`, :class:`~leakage.dummies.InferredLabels`, :class:`~leakage.solvers.Adam`.

    Shapes: images ``(V, N, C, H, W)`` in the output range of the generator, labels ``(V, N)``.

    Args:
        generator, code_shape: see :class:`~leakage.dummies.LatentCode`. On the command line, pass the file of
            a trained generator, as written by ``trained.model.save``: ``--model.generator generator.safetensors``.
        protocol: ``"published"``.
        total_variation: :math:`\alpha`.
        lr, steps: see :class:`~leakage.solvers.Adam`.
        tuning: :math:`\tau`; 0 searches for codes only.
        restarts: additional starts; the one with the lowest objective is kept.
        rule, auxiliary: see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the starts, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.
        adaptive: see :class:`~leakage.attacks.GradientInversion`.

    Raises:
        ValueError: if the protocol is unknown, a number is out of range, or a piece raises it; in ``fit``, if the
            generator makes images of another shape than the victims'.

    References:
        Jeon et al., *Gradient Inversion with Generative Image Prior*, NeurIPS 2021, https://arxiv.org/abs/2110.14962.

    Example:
        >>> from leakage.models import Generator
        >>> GIASAttack(Generator(), tuning=0.0, steps=300).solver.steps
        300
    """

    def __init__(
        self,
        generator: nn.Module | str | os.PathLike[str],
        code_shape: Sequence[int] | None = None,
        *,
        protocol: str = "published",
        total_variation: float | None = None,
        lr: float | None = None,
        tuning: float | None = None,
        steps: int | None = None,
        restarts: int | None = None,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
        adaptive: bool = True,
    ) -> None:
        options = {"total_variation": total_variation, "lr": lr, "tuning": tuning, "steps": steps, "restarts": restarts}
        values = chosen_values(GIAS, protocol, **options)
        super().__init__(
            objective=CosineDistance() + values.total_variation * TotalVariation(),
            images=LatentCode(generator, code_shape, tuning=values.tuning),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=Adam(lr=values.lr, steps=values.steps),
            restarts=values.restarts,
            seed=seed,
            success_threshold=success_threshold,
            adaptive=adaptive,
        )
