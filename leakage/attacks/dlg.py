"""Deep Leakage from Gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakage.clients.shared_gradient import SharedGradient
from leakage.inversion.gradient_inversion import GradientMatchingAttack


class DLGAttack(GradientMatchingAttack):
    r"""DLG: recovers images and labels together by matching the shared gradient.

    Dummy images x and dummy label logits u minimise

    .. math:: D(x, u) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), \mathrm{softmax}(u)) - g^*_l \rVert_2^2

    for every victim; the recovered label is the largest entry of u.

    Shapes: images ``(V, N, C, H, W)`` (searched without bounds; the truth lies in [0, 1]), label
    logits ``(V, N, K)``.

    Args:
        options: see :class:`~leakage.attacks.GradientMatchingAttack`.

    References:
        Zhu, Liu and Han, *Deep Leakage from Gradients*, NeurIPS 2019, https://arxiv.org/abs/1906.08935.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import Victims
        >>> attack = DLGAttack(max_evaluations=3, restarts=0)
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=Victims("sample", victims=2))
        >>> attack.finished.images.shape
        torch.Size([2, 1, 1, 28, 28])
    """

    def setup(self, stage: str) -> None:
        """Make dummy label logits too."""
        super().setup(stage)
        protocol = self.victim.protocol
        self.dummy_labels = nn.Parameter(
            torch.empty(0, protocol.num_images, protocol.num_classes, dtype=self.dummy_images.dtype)
        )

    @property
    def _unknowns(self) -> list[nn.Parameter]:
        return [self.dummy_images, self.dummy_labels]

    def _begin(self, shared: SharedGradient) -> Tensor:
        return torch.zeros(len(shared), 0, device=self.device)

    def _targets(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return unknowns[0].softmax(dim=-1)

    def _labels(self, fixed: Tensor, *unknowns: Tensor) -> Tensor:
        return unknowns[0].argmax(dim=-1)
