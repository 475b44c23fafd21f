"""Recursive gradient attack on privacy (R-GAP): layer by layer, in closed form."""

from __future__ import annotations

from leakage.dummies import InferredLabels, Pixels
from leakage.inversion import GradientInversion
from leakage.labels import Auxiliary
from leakage.objectives import SquaredDistance
from leakage.solvers import NoSearch


class RGAPAttack(GradientInversion):
    r"""R-GAP: invert a chain of convolutions and linear layers one layer at a time, by linear equations alone.

    The gradient of the last layer gives the inputs of that layer for every image of the batch
    (:func:`leakage.closed_form.separate_features`). The inputs of each earlier layer follow from its outputs and their
    gradients by linear least squares (:func:`leakage.closed_form.invert_layers`), down to the images. There is no
    search: the objective, the same as in iDLG, is evaluated once, to measure how well the images fit.

    If a layer has fewer equations than inputs, as with several images or behind ReLUs, the result is the solution
    closest to typical images, and is not exact. If the equations of a victim give no finite solution, its images stay
    noise.

    Pieces: :class:`~leakage.objectives.SquaredDistance`, :class:`~leakage.dummies.Pixels` that start at the
    layer-by-layer solution (:class:`~leakage.dummies.RGAPStart`), :class:`~leakage.dummies.InferredLabels`,
    :class:`~leakage.solvers.NoSearch`.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        rule, auxiliary: how labels are inferred, see :class:`~leakage.dummies.InferredLabels`.
        seed: seed of the separation of features, and of label rules that draw random numbers.
        success_threshold: an image counts as reconstructed if its MSE is below this value.

    Raises:
        ValueError: in ``fit``, if the network is not such a chain, if there are more images than the last layer's
            gradient can separate, or several with ``loss="mean_squared_error"``, or if
            :class:`~leakage.dummies.InferredLabels` raises it.

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
            adaptive=False,  # the layers are solved as if no defense had changed the gradient
        )
