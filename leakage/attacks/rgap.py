"""Recursive gradient attack on privacy: layer by layer, in closed form."""

from __future__ import annotations

from leakage.dummies import InferredLabels, Pixels
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import SquaredDistance
from leakage.solvers import NoSearch


class RGAPAttack(GradientInversion):
    r"""R-GAP: inverts a plain chain of convolutions and linear layers layer by layer, by linear equations alone.

    The gradient of the last layer gives its inputs, for a batch those of every image
    (:func:`leakage.closed_form.separate_features`); from a layer's outputs and their gradients its inputs follow as
    the solution of linear least squares (:func:`leakage.closed_form.invert_layers`), down to the images. Nothing is
    searched for: the objective, that of iDLG, is evaluated once, to tell how well they fit.

    Where a layer has fewer equations than inputs, as with several images or behind ReLUs, the images are the
    nearest solution to what images look like, and inexact. A victim whose equations give no numbers keeps noise.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.dummies.Pixels` that start where the layers
    lead (:class:`~leakage.dummies.RGAPStart`), :class:`~leakage.dummies.InferredLabels`,
    :class:`~leakage.solvers.NoSearch`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        rule, auxiliary: how labels are read, see :class:`~leakage.dummies.InferredLabels`.
        seed: of the separation of features, and of rules that draw.
        success_threshold: an image counts as reconstructed if its MSE is below this.

    Raises:
        ValueError: in ``fit``, a network that is no such chain, more images than the last layer's gradient can hold,
            several with ``loss="mean_squared_error"``, and what :class:`~leakage.dummies.InferredLabels` raises.

    References:
        Zhu and Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, https://arxiv.org/abs/2010.07733.

    Example:
        >>> from lightning import Trainer
        >>> from leakage.datamodules import Victims
        >>> attack = RGAPAttack()
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...                   enable_checkpointing=False, enable_model_summary=False)
        >>> trainer.fit(attack, datamodule=Victims("sample", victims=2))
        >>> all(score.mse < 1e-6 for score in attack.scores.values())
        True
    """

    def __init__(
        self,
        *,
        rule: str = "auto",
        auxiliary: Auxiliary | None = None,
        seed: int = 0,
        success_threshold: float = 1e-3,
    ) -> None:
        super().__init__(
            objective=SquaredDistance(),
            images=Pixels(start="rgap"),
            labels=InferredLabels(rule, auxiliary, seed),
            solver=NoSearch(),
            seed=seed,
            success_threshold=success_threshold,
            adaptive=False,  # the layers are solved as if nothing had changed the gradient
        )
