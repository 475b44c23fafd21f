"""Recursive gradient attack on privacy: layer by layer, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from leakage.attacks.idlg import IDLGAttack
from leakage.clients.shared_gradient import SharedGradient
from leakage.clients.victim import Victim
from leakage.closed_form import check_separable, find_chain, invert_layers, separate_features
from leakage.labels import Auxiliary

# The layers of several images are seldom determined, and then further iterations find nothing more.
_ITERATIONS_OF_BATCHES = 300


class RGAPAttack(IDLGAttack):
    r"""R-GAP: inverts a plain chain of convolutions and linear layers layer by layer, by linear equations alone.

    The gradient of the last layer gives its inputs, for a batch those of every image
    (:func:`leakage.closed_form.separate_features`); from a layer's outputs and their gradients its inputs follow as
    the solution of linear least squares (:func:`leakage.closed_form.invert_layers`), down to the images. Nothing is
    searched for: the objective, that of iDLG, is evaluated once.

    Where a layer has fewer equations than inputs, as with several images or behind ReLUs, the images are the
    nearest solution to what images look like, and inexact. A victim whose equations give no numbers keeps noise.

    Shapes: images ``(V, N, C, H, W)`` in [0, 1], labels ``(V, N)``.

    Args:
        rule, auxiliary: how labels are read, see :class:`IDLGAttack`.
        seed: of the separation of features.
        success_threshold: an image counts as reconstructed if its MSE is below this.

    Raises:
        ValueError: in ``fit``, a network that is no such chain, more images than the last layer's gradient can hold,
            several with ``loss="mean_squared_error"``, and what :class:`IDLGAttack` raises.

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
            rule=rule,
            auxiliary=auxiliary,
            seed=seed,
            success_threshold=success_threshold,
            max_evaluations=1,
            restarts=0,
        )

    def _check_victim(self, victim: Victim, *, labels_revealed: bool) -> None:
        super()._check_victim(victim, labels_revealed=labels_revealed)
        check_layers(victim)

    def _first_starts(self, shared: SharedGradient, fixed: Tensor) -> list[Tensor]:
        starts = super()._first_starts(shared, fixed)
        return [layers_start(shared, self.victim, fixed.argmax(dim=-1), starts[0], seed=self.hparams["seed"])]


def check_layers(victim: Victim) -> None:
    """Raise a ``ValueError`` unless the images of such victims can be found layer by layer."""
    check_separable(victim)
    protocol = victim.protocol
    if protocol.loss == "mean_squared_error" and protocol.num_images > 1:
        raise ValueError(
            "Expected one image with loss 'mean_squared_error', which can't tell apart the features of several images "
            f"whose labels repeat, but got {protocol.num_images}."
        )
    find_chain(victim)


def layers_start(shared: SharedGradient, victim: Victim, labels: Tensor, fallback: Tensor, *, seed: int) -> Tensor:
    """Images by inverting the layers, clamped to [0, 1]; the fallback for victims where that gives no numbers."""
    separated = separate_features(shared, victim, labels, seed=seed)
    several = shared.protocol.num_images > 1
    iterations = {"max_iterations": _ITERATIONS_OF_BATCHES} if several else {}
    images = invert_layers(shared, victim, separated, **iterations).images
    usable = torch.isfinite(images).flatten(1).all(1)
    return torch.where(usable[:, None, None, None, None], images.clamp(0, 1).to(fallback), fallback)
