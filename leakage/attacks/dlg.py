"""Deep Leakage from Gradients (DLG)."""

from __future__ import annotations

from typing import Any

from leakage.attacks.protocols import LBFGSAttack, search_protocol
from leakage.dummies import JointLabels


class DLGAttack(LBFGSAttack):
    r"""DLG: recover images and labels together by matching the shared gradient.

    Dummy images x and dummy label logits u minimise

    .. math:: D(x, u) = \sum_l \lVert \nabla_{\theta_l} \ell(f_\theta(x), \mathrm{softmax}(u)) - g^*_l \rVert_2^2

    for each victim. The recovered label is the index of the largest entry of u.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.dummies.Pixels`,
    :class:`~leakage.dummies.JointLabels`, :class:`~leakage.solvers.LBFGS` (:class:`~leakage.solvers.PlainLBFGS` with
    ``protocol="published"``).

    Shapes: images ``(V, N, C, H, W)`` (true images lie in [0, 1]; searched without bounds unless ``box`` is given),
    label logits ``(V, N, K)``.

    Args:
        protocol: ``"robust"`` (this library's) or ``"published"`` (the paper's).
        start_std: standard deviation of the initial images and label logits; by default the protocol's value.
        options: other arguments, see :class:`~leakage.attacks.protocols.LBFGSAttack`.

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

    def __init__(self, *, protocol: str = "robust", start_std: float | None = None, **options: Any) -> None:
        labels = JointLabels(search_protocol(protocol, start_std=start_std).start_std)
        super().__init__(labels=labels, protocol=protocol, start_std=start_std, **options)
